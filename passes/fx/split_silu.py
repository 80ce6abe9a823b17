"""Writes SiLU as what integer kernels compute: a sigmoid, and a product.

    y = SiLU(x)   becomes   y = x * sigmoid(x)

so that the sigmoid, and what both read, can have quantizers. Every SiLU is split, module or function; what it computes may differ in the
last bit. The product is the function `SiLU` below: one node that a table of quantizers can name, unlike any other product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.fx.graph import FxPass, module_of


def SiLU(x: Tensor, gate: Tensor) -> Tensor:  # noqa: N802  # it is named as what it completes
    """What is left of SiLU once its sigmoid is a node of its own."""
    return x * gate


class SplitSilu(FxPass):
    """Splits SiLU into a sigmoid and a product."""

    name = "split-silu"

    def rewrite(self, graph: GraphModule) -> int:
        found = [node for node in graph.graph.nodes if type(module_of(graph, node)) is nn.SiLU or node.target is F.silu]
        for node in found:
            self._split(graph, node)
        graph.delete_all_unused_submodules()
        return len(found)

    def _split(self, graph: GraphModule, node: Node) -> None:
        (source,) = node.all_input_nodes
        with graph.graph.inserting_before(node):
            gate = graph.graph.call_function(torch.sigmoid, (source,))
            product = graph.graph.call_function(SiLU, (source, gate))
        gate.meta, product.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(product)
        graph.graph.erase_node(node)
