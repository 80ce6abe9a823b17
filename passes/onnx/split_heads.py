"""Writes a product of codes with a scale for each head as one product a head: integer kernels know one scale a tensor.

    y = MatMul(a, b)   of a or b [B,m,..,..] with a scale for each index of axis 1
    becomes   y = Concat_h(MatMul(a_h, b_h)),   a_h and b_h the codes of one head, read with its scale

onnxruntime takes the scale of the first head for all, or refuses to run. Left alone: products of one scale, or of floats.
"""

import numpy as np
import onnx_ir as ir

from passes.onnx.codes import Read, dims, read
from passes.onnx.model import OnnxPass, Writer, constant_of, drop_dead, replace

FLOAT = ir.DataType.FLOAT
HEADS = 1


class SplitHeads(OnnxPass):
    """Writes a product of codes with a scale for each head as one product a head."""

    name = "split-heads"

    def rewrite(self, graph: ir.Model) -> int:
        found = [node for node in graph.graph if node.op_type == "MatMul" and _per_head(node)]
        for node in found:
            _split(graph.graph, node)
        drop_dead(graph)
        return len(found)


def _per_head(node: ir.Node) -> bool:
    operands = [read(value) for value in node.inputs]
    shapes = [dims(value) if value is not None else None for value in node.inputs]
    if any(shape is None or len(shape) != 4 or shape[HEADS] is None for shape in shapes):
        return False
    return any(each is not None and each.axis == HEADS for each in operands)


def _split(graph: ir.Graph, node: ir.Node) -> None:
    made = node.outputs[0]
    write, name = Writer(graph, node), str(made.name)
    heads = next(len(each.scale) for value in node.inputs if (each := read(value)) is not None and each.axis == HEADS)
    parts = [
        _heads(write, value, f"{name}.{side}", heads)
        for side, value in zip(("first", "second"), node.inputs, strict=True)
        if value is not None
    ]
    shape = dims(made) or ()
    products = [
        write.op("MatMul", list(pair), f"{name}.{head}", dtype=FLOAT, shape=[shape[0], 1, *shape[2:]])
        for head, pair in enumerate(zip(*parts, strict=True))
    ]
    replace(made, write.op("Concat", products, f"{name}.heads", dtype=FLOAT, shape=made.shape, axis=HEADS))


def _heads(write: Writer, value: ir.Value, name: str, heads: int) -> list[ir.Value]:
    """The value of each head: split as codes, where it is read from codes."""
    codes = read(value)
    source = value if codes is None else codes.codes
    shape = dims(source) or ()
    apart = [shape[0], 1, *shape[2:]]
    sizes = write.numbers(f"{name}.sizes", *[1] * heads)
    split = write.ops(
        "Split", [source, sizes], [f"{name}.{head}.codes" for head in range(heads)], dtype=source.dtype, shapes=[apart] * heads, axis=HEADS
    )
    return split if codes is None else [_read_head(write, part, codes, f"{name}.{head}", head) for head, part in enumerate(split)]


def _read_head(write: Writer, part: ir.Value, codes: Read, name: str, head: int) -> ir.Value:
    if codes.axis is None:
        return write.op("DequantizeLinear", [part, *codes.node.inputs[1:]], name, dtype=FLOAT, shape=part.shape)
    inputs = [part, write.constant(f"{name}.scale", np.array(codes.scale[head], np.float32))]
    zeros = constant_of(codes.zero_point)
    if zeros is not None:
        inputs.append(write.constant(f"{name}.zero_point", np.array(zeros[head], zeros.dtype)))
    return write.op("DequantizeLinear", inputs, name, dtype=FLOAT, shape=part.shape)
