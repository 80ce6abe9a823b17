"""Removes nodes and initializers that no output needs, and Identity nodes: onnx_ir's own passes, counted."""

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from passes.onnx.model import OnnxPass


class DropUnused(OnnxPass):
    """Removes what no output needs."""

    name = "drop-unused"

    def rewrite(self, graph: ir.Model) -> int:
        before = len(graph.graph) + len(graph.graph.initializers)
        IdentityEliminationPass()(graph)
        RemoveUnusedNodesPass()(graph)
        return before - len(graph.graph) - len(graph.graph.initializers)
