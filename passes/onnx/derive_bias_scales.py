"""Stores of a bias its codes alone: its scale is the product of two that are there.

    b = DequantizeLinear(codes int32, s_b)   becomes   b = DequantizeLinear(codes, s_x s_w)

of a Conv whose x and W are read with s_x and s_w; onnxruntime multiplies once, when it loads the file. Left alone: a bias whose scale is
another number than the product by a single bit, and one that several nodes read.
"""

import numpy as np
import onnx_ir as ir

from passes.onnx.codes import read
from passes.onnx.model import OnnxPass, Writer, drop_dead, only_reader


class DeriveBiasScales(OnnxPass):
    """Stores of a bias its codes alone: its scale is the product of two that are there."""

    name = "derive-bias-scales"

    def rewrite(self, graph: ir.Model) -> int:
        found = sum(_derived(graph.graph, node) for node in list(graph.graph) if node.op_type == "Conv" and len(node.inputs) > 2)
        drop_dead(graph)
        return found


def _derived(graph: ir.Graph, node: ir.Node) -> bool:
    x, weight, bias = (read(value) for value in node.inputs)
    if x is None or weight is None or bias is None or x.axis is not None or bias.axis != 0 or weight.axis != 0:
        return False
    if bias.codes.dtype != ir.DataType.INT32 or only_reader(bias.node.outputs[0]) is not node:
        return False
    if not np.array_equal(x.scale * weight.scale, bias.scale):
        return False
    stored = bias.node.inputs[1]
    assert stored is not None
    scales = [x.node.inputs[1], weight.node.inputs[1]]
    product = Writer(graph, bias.node).op("Mul", scales, f"{stored.name}.product", dtype=ir.DataType.FLOAT, shape=list(bias.scale.shape))
    bias.node.replace_input_with(1, product)
    if not stored.uses():
        product.name, stored.name = stored.name, f"{stored.name}#before"
    return True
