"""Gives a convolution of fewer than four channels a fourth that holds nothing: kernels read four bytes at a time.

    y = Conv(x [B,3,H,W], W [O,3,k,k])   becomes   y = Conv(Pad(x) [B,4,H,W], W' [O,4,k,k]),   W' = W and zeros

x is padded with its zero point, which stands for 0. Where x is Transpose(x' [B,H,W,3]), onnxruntime would pad it before the Transpose, each
pixel by itself, which is slow: it is turned and padded as rows, [B,3,HW] to [B,4,HW], and a Reshape back keeps the two apart.
Left alone: convolutions of floats, of groups, or whose weights are read elsewhere too.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from passes.onnx.codes import CHANNELS_FIRST, dequantize, read
from passes.onnx.model import OnnxPass, Writer, constant_of, drop_dead, made_by

CHANNELS = 4
Dim = int | ir.SymbolicDim | None


class PadStem(OnnxPass):
    """Gives a convolution of fewer than four channels a fourth that holds nothing."""

    name = "pad-stem"

    def rewrite(self, graph: ir.Model) -> int:
        found = sum(_padded(graph.graph, node) for node in list(graph.graph) if node.op_type == "Conv")
        drop_dead(graph)
        return found


def _padded(graph: ir.Graph, node: ir.Node) -> bool:
    x, weight = read(node.inputs[0]), read(node.inputs[1])
    if x is None or weight is None or node.attributes.get_int("group", 1) != 1 or x.axis is not None or not weight.symmetric:
        return False
    codes, zero = constant_of(weight.codes), constant_of(x.zero_point)
    if codes is None or zero is None or codes.shape[1] >= CHANNELS or len(weight.codes.uses()) > 1:
        return False
    missing = CHANNELS - codes.shape[1]
    padded = np.pad(codes, ((0, 0), (0, missing), (0, 0), (0, 0)))
    weight.codes.const_value = ir.Tensor(padded, name=weight.codes.name)
    weight.codes.shape = ir.Shape(padded.shape)
    weight.node.outputs[0].shape = ir.Shape(padded.shape)
    write = Writer(graph, node)
    assert x.codes.shape is not None
    shape = [CHANNELS if axis == 1 else dim for axis, dim in enumerate(x.codes.shape)]
    name, value = f"{x.codes.name}.padded", write.constant(f"{x.codes.name}.padded.value", zero)
    turned = made_by(x.codes, "Transpose")
    if turned is not None and list(turned.attributes.get_ints("perm", ())) == CHANNELS_FIRST:
        wide = _in_rows(write, turned.inputs[0], value, missing, name, shape)
    else:
        wide = _pad(write, x.codes, value, missing, name, shape)
    node.replace_input_with(0, dequantize(write, wide, x, f"{x.name}.padded", shape))
    return True


def _pad(write: Writer, x: ir.Value, value: ir.Value, missing: int, name: str, shape: Sequence[Dim]) -> ir.Value:
    rest = [0] * (len(shape) - 2)
    sides = write.numbers(f"{name}.sides", 0, 0, *rest, 0, missing, *rest)
    return write.op("Pad", [x, sides, value], name, dtype=x.dtype, shape=shape, mode="constant")


def _in_rows(write: Writer, pixels: ir.Value | None, value: ir.Value, missing: int, name: str, shape: Sequence[Dim]) -> ir.Value:
    """[B,H,W,C] as [B,C+missing,H,W]."""
    assert pixels is not None
    batch, channels, height, width = shape
    area = height * width if isinstance(height, int) and isinstance(width, int) else None
    flat = write.numbers(f"{name}.flat_shape", 0, -1, CHANNELS - missing)
    rows = write.op("Reshape", [pixels, flat], f"{name}.flat", dtype=pixels.dtype, shape=[batch, area, CHANNELS - missing])
    planes = write.op("Transpose", [rows], f"{name}.planes", dtype=pixels.dtype, shape=[batch, CHANNELS - missing, area], perm=[0, 2, 1])
    wide = _pad(write, planes, value, missing, f"{name}.rows", [batch, channels, area])
    if area is not None:
        target = write.numbers(f"{name}.shape", 0, CHANNELS, *(side for side in (height, width) if isinstance(side, int)))
    else:
        sides = write.op("Shape", [pixels], f"{name}.size", dtype=ir.DataType.INT64, start=1, end=3)
        target = write.op(
            "Concat", [write.numbers(f"{name}.planes_shape", 0, CHANNELS), sides], f"{name}.shape", dtype=ir.DataType.INT64, axis=0
        )
    return write.op("Reshape", [wide, target], name, dtype=pixels.dtype, shape=shape)
