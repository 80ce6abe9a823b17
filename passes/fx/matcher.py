"""Finds a small traced module inside a graph: torch.fx's SubgraphMatcher, taught to compare what a graph means and not how it is named.

A module matches a module of its class or a subclass, whatever either is called. Literals (axes, sizes, paddings) are not compared, but
none stands for a tensor. Quantizers and dead nodes are looked through. As in torch.fx, what lies strictly inside a match has no reader
outside it, and a function matches only where the same arguments are given, by position or by name, as in the pattern.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.utils.matcher_utils import InternalMatch, SubgraphMatcher

from passes.fx.graph import is_quantizer


@dataclass(frozen=True)
class Match:
    """Where a pattern was found: `nodes` in the pattern's order, what they read, and what the pattern returns."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


class Matcher:
    """A graph to search: its copy without quantizers and dead nodes, made once for any number of patterns."""

    def __init__(self, graph: GraphModule) -> None:
        self._modules = dict(graph.named_modules(remove_duplicate=False))
        self._alive: set[Node] = set()
        for node in reversed(graph.graph.nodes):
            if node.op in ("placeholder", "output") or any(user in self._alive for user in node.users):
                self._alive.add(node)
        self._plain, self._origin = self._without_quantizers(graph)

    def find(self, pattern: GraphModule) -> list[Match]:
        """Every place of the pattern, in the graph's order; of places that overlap, the first."""
        matcher = _ByMeaning(pattern, self._modules)
        # a placeholder of the pattern may stand for a literal, which is no input
        return [
            Match(
                nodes=tuple(self._origin[gn] for pn, gn in found.nodes_map.items() if pn.op not in ("placeholder", "output")),
                inputs=tuple(self._origin[gn] for gn in found.placeholder_nodes if isinstance(gn, Node)),
                outputs=tuple(self._origin[gn] for gn in found.returning_nodes),
            )
            for found in matcher.match(self._plain)
        ]

    def quantizes(self, node: Node) -> bool:
        return node.op == "call_module" and is_quantizer(self._modules[str(node.target)])

    def readers(self, node: Node) -> list[Node]:
        """Who reads the node's value, quantizers looked through, dead nodes not counted."""
        found: list[Node] = []
        for user in node.users:
            if user in self._alive:
                found += self.readers(user) if self.quantizes(user) else [user]
        return found

    def _without_quantizers(self, graph: GraphModule) -> tuple[Graph, dict[Node, Node]]:
        """The graph with every quantizer's readers reading what it reads, and no dead nodes; and each node's original."""
        if len(self._alive) == len(graph.graph.nodes) and not any(self.quantizes(node) for node in graph.graph.nodes):
            return graph.graph, {node: node for node in graph.graph.nodes}
        plain, copies, origin = Graph(), dict[Node, Node](), dict[Node, Node]()
        for node in graph.graph.nodes:
            if node not in self._alive:
                continue
            if self.quantizes(node):
                copies[node] = copies[node.all_input_nodes[0]]
                continue
            copies[node] = plain.node_copy(node, copies.__getitem__)
            origin[copies[node]] = node
        return plain, origin


class _ByMeaning(SubgraphMatcher):
    """SubgraphMatcher by module class, with literals as wildcards."""

    def __init__(self, pattern: GraphModule, modules: dict[str, nn.Module]) -> None:
        super().__init__(pattern.graph)
        self.pattern_modules = dict(pattern.named_modules(remove_duplicate=False))
        self.modules = modules

    def _nodes_are_equal(self, pn: Node, gn: Node, node_name_match: str = "") -> bool:
        if pn.op == gn.op == "call_module":
            return isinstance(self.modules[str(gn.target)], type(self.pattern_modules[str(pn.target)]))
        return bool(super()._nodes_are_equal(pn, gn, node_name_match))

    def _match_attributes(self, pn: Node, gn: Node) -> bool:
        return True  # any parameter or buffer stands for any other

    def _match_literals(self, pn: Any, gn: Any, match: InternalMatch) -> bool:
        if isinstance(pn, Node):
            return bool(super()._match_literals(pn, gn, match))
        return not _holds_a_node(gn)


def _holds_a_node(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, list | tuple) and any(_holds_a_node(item) for item in value))
