"""Keeps some of the outputs, and drops what only the others need.

    return (a, b, c)   becomes   return (a, b)

Left alone: a graph that returns these entries and no others. An entry that does not exist, or an output that is no tuple, is refused.
"""

from collections.abc import Sequence

from torch.fx import GraphModule

from passes.base import PassError
from passes.fx.graph import FxPass


class KeepOutputs(FxPass):
    """Drops outputs that nobody asked for, and what only they need."""

    name = "keep-outputs"

    def __init__(self, entries: Sequence[int], of: int) -> None:
        """`entries` of a tuple of `of`; a graph that returns as many as are kept has been here before."""
        self.entries, self.of = tuple(entries), of

    def requires(self, graph: GraphModule) -> None:
        returned = graph.graph.output_node().args[0]
        if not isinstance(returned, tuple | list) or len(returned) not in (self.of, len(self.entries)):
            raise PassError(self.name, f"the graph does not return a tuple of {self.of}")

    def rewrite(self, graph: GraphModule) -> int:
        output = graph.graph.output_node()
        returned = output.args[0]
        assert isinstance(returned, tuple | list)  # what was required
        if len(returned) == len(self.entries):
            return 0
        output.args = (tuple(returned[entry] for entry in self.entries),)
        graph.graph.eliminate_dead_code()
        graph.delete_all_unused_submodules()
        return 1
