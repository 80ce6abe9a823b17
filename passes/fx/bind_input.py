"""Gives an input of the graph a value for good.

    y = f(x, text)   becomes   y = f(x), text a buffer

The buffer bears the input's name. Left alone: every other input, and a graph that has no such input (it is bound already). An input whose
name is an attribute of the model is refused.
"""

from torch import Tensor
from torch.fx import GraphModule

from passes.base import PassError
from passes.fx.graph import FxPass


class BindInput(FxPass):
    """Makes an input a constant."""

    name = "bind-input"

    def __init__(self, target: str, value: Tensor) -> None:
        self.target, self.value = target, value

    def requires(self, graph: GraphModule) -> None:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
        if self.target in names and hasattr(graph, self.target):
            raise PassError(self.name, f"the model has an attribute {self.target!r}, by which the constant would go: rename the input")

    def rewrite(self, graph: GraphModule) -> int:
        found = [node for node in graph.graph.nodes if node.op == "placeholder" and node.target == self.target]
        for node in found:
            graph.register_buffer(self.target, self.value.detach().clone())
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(self.target)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
            graph.graph.erase_node(node)
        return len(found)
