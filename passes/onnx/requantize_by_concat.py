"""Writes codes again at another scale by a Concat of one: onnxruntime has an integer kernel for it, and none for the bare pair.

    codes' = QuantizeLinear(DequantizeLinear(codes))   becomes   codes' = QuantizeLinear(Concat(DequantizeLinear(codes)))

Left alone: codes of another type than those they become, or with a scale for each index of an axis.
"""

import onnx_ir as ir

from passes.onnx.codes import read
from passes.onnx.model import OnnxPass, Writer, constant_of


class RequantizeByConcat(OnnxPass):
    """Writes codes again at another scale by a Concat of one."""

    name = "requantize-by-concat"

    def rewrite(self, graph: ir.Model) -> int:
        found = [node for node in graph.graph if node.op_type == "QuantizeLinear" and _bare(node)]
        for node in found:
            source = node.inputs[0]
            assert source is not None
            joined = Writer(graph.graph, node).op(
                "Concat", [source], f"{node.outputs[0].name}.source", dtype=source.dtype, shape=source.shape, axis=1
            )
            node.replace_input_with(0, joined)
        return len(found)


def _bare(node: ir.Node) -> bool:
    x, scale, zero = read(node.inputs[0]), constant_of(node.inputs[1]), constant_of(node.inputs[2])
    if x is None or x.axis is not None or scale is None or scale.ndim or zero is None or len(x.codes.shape or ()) < 2:
        return False
    return x.codes.dtype is not None and x.codes.dtype.numpy() == zero.dtype
