"""Computes what is the same once: nodes of one kind, one set of inputs and one set of attributes. onnx_ir's own pass, counted."""

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from passes.onnx.model import OnnxPass


class MergeEqual(OnnxPass):
    """Computes what is the same once."""

    name = "merge-equal"

    def rewrite(self, graph: ir.Model) -> int:
        before = len(graph.graph)
        CommonSubexpressionEliminationPass()(graph)
        return before - len(graph.graph)
