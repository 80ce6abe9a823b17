"""Writes the nearest upsampling of codes as a Tile, channels last: onnxruntime has no fast Resize of integers.

    y = Resize(x, scales [1, 1, a, b], nearest)     x [B,C,H,W] of codes
    becomes   x [B,H,W,C] -> [B,H,1,W,1,C] -> Tile [1,1,a,1,b,1] -> [B,aH,bW,C] -> y [B,C,aH,bW]

The transposes meet those of the convolutions around and go. Left alone: floats, a Resize by a scale that is no whole number, to a size, or
that does not take the pixel to the left and above.
"""

import numpy as np
import onnx_ir as ir

from passes.onnx.codes import CHANNELS_FIRST, CHANNELS_LAST, dims
from passes.onnx.model import OnnxPass, Writer, constant_of, replace

CODES = (ir.DataType.UINT8, ir.DataType.INT8)


class TileUpsample(OnnxPass):
    """Writes the nearest upsampling of codes as a Tile."""

    name = "tile-upsample"

    def rewrite(self, graph: ir.Model) -> int:
        found = [(node, factors) for node in graph.graph if (factors := _factors(node)) is not None]
        for node, factors in found:
            _tile(graph.graph, node, *factors)
        return len(found)


def _factors(node: ir.Node) -> tuple[int, int] | None:
    """By how much a Resize of codes repeats rows and columns; None where it does anything else."""
    if node.op_type != "Resize" or node.inputs[0] is None or node.inputs[0].dtype not in CODES or len(node.inputs) != 3:
        return None
    scales, shape = constant_of(node.inputs[2]), dims(node.inputs[0])
    if scales is None or shape is None or len(shape) != 4 or shape[1] is None or scales.shape != (4,):
        return None
    attributes = node.attributes
    if attributes.get_string("mode", "nearest") != "nearest" or attributes.get_string("nearest_mode", "") != "floor":
        return None
    if attributes.get_string("coordinate_transformation_mode", "") != "asymmetric" or (scales[:2] != 1).any():
        return None
    factors = scales[2:].astype(np.int64)
    return (int(factors[0]), int(factors[1])) if (factors == scales[2:]).all() and (factors >= 1).all() else None


def _tile(graph: ir.Graph, node: ir.Node, rows: int, columns: int) -> None:
    source, made = node.inputs[0], node.outputs[0]
    assert source is not None
    name, dtype = str(made.name), source.dtype
    batch, channels, height, width = dims(source) or ()
    write = Writer(graph, node)
    last = write.op("Transpose", [source], f"{name}.last", dtype=dtype, shape=[batch, height, width, channels], perm=CHANNELS_LAST)
    if None not in (batch, height, width):  # five axes are tiled faster than six
        assert batch is not None
        assert height is not None
        assert width is not None
        assert channels is not None
        apart = write.op(
            "Reshape", [last, write.numbers(f"{name}.apart.shape", batch * height, 1, width, 1, channels)], f"{name}.apart", dtype=dtype
        )
        repeats = write.numbers(f"{name}.repeats", 1, rows, 1, columns, 1)
        target = write.numbers(f"{name}.shape", batch, rows * height, columns * width, channels)
    else:
        assert channels is not None
        apart = write.op("Unsqueeze", [last, write.numbers(f"{name}.axes", 2, 4)], f"{name}.apart", dtype=dtype)
        repeats = write.numbers(f"{name}.repeats", 1, 1, rows, 1, columns, 1)
        sides = write.op("Shape", [last], f"{name}.sides", dtype=ir.DataType.INT64, start=1, end=3)
        grown = write.op("Mul", [sides, write.numbers(f"{name}.factors", rows, columns)], f"{name}.grown", dtype=ir.DataType.INT64)
        around = [write.numbers(f"{name}.batch", 0), grown, write.numbers(f"{name}.channels", channels)]
        target = write.op("Concat", around, f"{name}.shape", dtype=ir.DataType.INT64, axis=0)
    tiled = write.op("Tile", [apart, repeats], f"{name}.tiled", dtype=dtype)
    together = write.op("Reshape", [tiled, target], f"{name}.together", dtype=dtype)
    first = write.op("Transpose", [together], f"{name}.first", dtype=dtype, shape=list(made.shape or ()), perm=CHANNELS_FIRST)
    replace(made, first)
    graph.remove(node, safe=True)
