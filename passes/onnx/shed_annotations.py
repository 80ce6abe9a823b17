"""Drops what a file can do without: shapes and types that any reader infers, and the names of nodes whose output has one that says as much.

Values keep their names, and so do nodes that compute. Nodes that only move between values and codes (QuantizeLinear, DequantizeLinear,
Clip) are numbered; and so is, with its output, what a runtime computes once when it loads the file, such as the Cast of a weight.
"""

import onnx_ir as ir

from passes.onnx.model import OnnxPass

BETWEEN = frozenset(("QuantizeLinear", "DequantizeLinear", "Clip"))


class ShedAnnotations(OnnxPass):
    """Drops shapes that any reader infers, and names that say nothing new."""

    name = "shed-annotations"

    def rewrite(self, graph: ir.Model) -> int:
        shed = 0
        outputs = set(graph.graph.outputs)
        constant: set[ir.Value] = set(graph.graph.initializers.values())
        for number, node in enumerate(graph.graph):
            folded = all(value is None or value in constant for value in node.inputs)
            if folded:
                constant.update(node.outputs)
            named = f"n{number}"
            if (folded or node.op_type in BETWEEN) and node.name != named:
                node.name = named
                shed += 1
            if folded and node.op_type not in BETWEEN and node.outputs[0] not in outputs:
                node.outputs[0].name = named
            for value in node.outputs:
                if value not in outputs and (value.shape is not None or value.type is not None):
                    value.shape, value.type = None, None
                    shed += 1
        return shed
