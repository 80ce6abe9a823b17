"""Keeps a softmax between codes in floating point, where onnxruntime would put an integer kernel that rounds down.

    codes = Q(Softmax(DQ(c)))   becomes   codes = Q(Exp(LogSoftmax(DQ(c))))

onnxruntime's QLinearSoftmax is a table whose sum is cut to whole numbers: one or two codes in a hundred come out a step too low. What it
would save is nothing beside the products around it.
Left alone: a softmax that is not written to codes, which stays in floating point by itself.
"""

import onnx_ir as ir

from passes.onnx.codes import written
from passes.onnx.model import OnnxPass, Writer, drop_dead, replace


class FloatSoftmax(OnnxPass):
    """Keeps a softmax between codes in floating point: onnxruntime's integer kernel rounds down."""

    name = "float-softmax"

    def rewrite(self, graph: ir.Model) -> int:
        found = [node for node in graph.graph if node.op_type == "Softmax" and written(node.outputs[0]) is not None]
        for node in found:
            (value,) = node.outputs
            write, axis = Writer(graph.graph, node), node.attributes.get_int("axis", -1)
            shape = None if value.shape is None else list(value.shape)
            logarithm = write.op("LogSoftmax", [node.inputs[0]], f"{value.name}.logarithm", dtype=value.dtype, shape=shape, axis=axis)
            replace(value, write.op("Exp", [logarithm], f"{value.name}.exp", dtype=value.dtype, shape=shape))
        drop_dead(graph)
        return len(found)
