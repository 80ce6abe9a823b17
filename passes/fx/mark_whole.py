"""Marks every node with one and the same stage: for a graph whose curriculum has no parts.

Left alone: the graph itself; only `node.meta["stage"]` is written.
"""

from torch.fx import GraphModule

from passes.fx.graph import STAGE, FxPass

WHOLE = "whole"


class MarkWhole(FxPass):
    """Marks every node with the one stage `whole`."""

    name = "mark-whole"

    def rewrite(self, graph: GraphModule) -> int:
        changed = [node for node in graph.graph.nodes if node.meta.get(STAGE) != WHOLE]
        for node in changed:
            node.meta[STAGE] = WHOLE
        return len(changed)
