"""Gives one quantizer to all that a concat joins, and to what comes out of it: with one scale the concat only copies codes.

    c = q3(concat(q1(a), q2(b)))   becomes   c = q(concat(q(a), q(b)))

Only channels, and only within a block and a stage: a concat that reads what another block made, or another stage, is left alone, or scales
would be welded through the whole model. Left alone too: quantizers of other bits than the concat's, scales that are known, and a concat
whose output or one of whose inputs has no quantizer. Concats that share a member share one scale.
"""

from collections.abc import Callable, Collection

from torch.fx import GraphModule, Node

from passes.fx.graph import STAGE, FxPass, blocks_of, module_of
from passes.fx.placement import Table, carries, kinds, knows, operands, quantizes, spec_of
from passes.spec import QuantSpec

CHANNELS = 1  # the axis of a concat whose parts are one feature map; parts along another are maps of their own


class ShareScales(FxPass):
    """Gives one scale to what a concat joins within a block."""

    name = "share-scales"

    def __init__(self, table: Table, shared: Collection[str], wanted: Callable[[QuantSpec], bool]) -> None:
        """`shared`: kinds that copy codes of one scale. `wanted`: whether quantizers of such a spec are to share."""
        self.table, self.shared, self.wanted = table, shared, wanted

    def rewrite(self, graph: GraphModule) -> int:
        blocks = blocks_of(graph)
        groups: list[tuple[str, set[str]]] = []  # under the name of the quantizer behind the concat
        for node in graph.graph.nodes:
            if not knows(self.shared, kinds(graph, node)) or getattr(module_of(graph, node), "axis", CHANNELS) != CHANNELS:
                continue
            behind = next((user for user in node.users if quantizes(graph, user)), None)
            if behind is not None and len(members := self._members(graph, node, behind, blocks)) > 1:
                groups.append((str(behind.target), members))
        renamed = {old: name for name, members in _joined(groups) for old in members if old != name}
        for node in graph.graph.nodes:
            if node.op == "call_module" and node.target in renamed:
                node.target = renamed[str(node.target)]
        graph.delete_all_unused_submodules()
        return len(renamed)

    def _members(self, graph: GraphModule, node: Node, behind: Node, blocks: dict[Node, str]) -> set[str]:
        """The quantizers of a concat's inputs and of its output; nothing where they may not share."""
        spec, found = spec_of(graph, behind), [behind]
        for _, source in operands(node):
            before = self._quantizer(graph, source)
            if before is None:
                return set()
            found.append(before)
        if not self.wanted(spec) or any(blocks[each] != blocks[node] or each.meta.get(STAGE) != node.meta.get(STAGE) for each in found):
            return set()
        return {
            str(each.target) for each in found if spec_of(graph, each) == spec and getattr(module_of(graph, each), "fixed", None) is None
        }

    def _quantizer(self, graph: GraphModule, node: Node) -> Node | None:
        """The quantizer whose codes a node hands on, or is."""
        while not quantizes(graph, node):
            if not carries(graph, self.table, node):
                return None
            node = node.all_input_nodes[0]
        return node


def _joined(groups: list[tuple[str, set[str]]]) -> list[tuple[str, set[str]]]:
    """Groups that have a member in common become one, under the name of the first."""
    joined: list[tuple[str, set[str]]] = []
    for name, members in groups:
        for other in [each for each in joined if each[1] & members]:
            joined.remove(other)
            name, members = other[0], members | other[1]
        joined.append((name, members))
    return joined
