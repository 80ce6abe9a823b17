"""Finds a small traced module inside a graph: torch.fx's SubgraphMatcher, taught to compare what a graph means and not how it is named.

A module matches a module of its class or a subclass, whatever either is called. Literals (axes, sizes, paddings) are not compared, nor
whether they are given, at the end or by name, or left out; but none stands for a tensor, and an input of the pattern is a tensor.
Quantizers and dead nodes are looked through, and who only asks for a value's shape does not read it: the answer is an input here. As in
torch.fx, what lies strictly inside a match has no reader outside it, and tensors are given as in the pattern, by position or by name.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.utils.matcher_utils import InternalMatch, SubgraphMatcher

from passes.fx.graph import asks_about, is_quantizer, living, nodes_in, readers_of_values

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Match:
    """Where a pattern was found: `nodes` in the pattern's order, what they read, and what the pattern returns."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


class Matcher:
    """A graph to search: its plain copy, without quantizers and dead nodes, made once for any number of patterns."""

    def __init__(self, graph: GraphModule) -> None:
        self._modules = dict(graph.named_modules(remove_duplicate=False))
        self._alive = living(graph)
        self._plain, self._origin = self._copied(graph)

    def find(self, pattern: GraphModule) -> list[Match]:
        """Every place of the pattern, in the graph's order; of places that overlap, the first. Why others are none is said at DEBUG."""
        matcher = _ByMeaning(pattern, self._modules)
        return [
            Match(
                nodes=tuple(self._origin[gn] for pn, gn in found.nodes_map.items() if pn.op not in ("placeholder", "output")),
                inputs=tuple(self._origin[gn] for gn in found.placeholder_nodes),
                outputs=tuple(self._origin[gn] for gn in found.returning_nodes),
            )
            for found in matcher.match(self._plain)
        ]

    def quantizes(self, node: Node) -> bool:
        return node.op == "call_module" and is_quantizer(self._modules[str(node.target)])

    def readers(self, node: Node) -> list[Node]:
        """Who reads the node's numbers, quantizers looked through, dead nodes not counted."""
        found: list[Node] = []
        for user in readers_of_values(node):
            if user in self._alive:
                found += self.readers(user) if self.quantizes(user) else [user]
        return found

    def _copied(self, graph: GraphModule) -> tuple[Graph, dict[Node, Node]]:
        """The graph with every quantizer's readers reading what it reads, and no dead nodes; and each node's original."""
        plain, copies, origin = Graph(), dict[Node, Node](), dict[Node, Node]()
        for node in graph.graph.nodes:
            if node not in self._alive:
                continue
            if self.quantizes(node):
                copies[node] = copies[node.all_input_nodes[0]]
                continue
            # a shape reads no numbers: as an input of its own it is no reader of the value
            copies[node] = plain.placeholder(node.name) if asks_about(node) else _plainly(plain, node, copies.__getitem__)
            origin[copies[node]] = node
        return plain, origin


class _ByMeaning(SubgraphMatcher):
    """SubgraphMatcher by module class, with literals as wildcards."""

    def __init__(self, pattern: GraphModule, modules: dict[str, nn.Module]) -> None:
        plain, copies = Graph(pattern), dict[Node, Node]()
        for node in pattern.graph.nodes:
            copies[node] = _plainly(plain, node, copies.__getitem__)
        super().__init__(plain)
        self.name = type(pattern).__name__
        self.pattern_modules = dict(pattern.named_modules(remove_duplicate=False))
        self.modules = modules
        self.failed: tuple[Node, Node] | None = None  # where the place at hand first differs: of the pattern, of the graph

    def _nodes_are_equal(self, pn: Node, gn: Node, node_name_match: str = "") -> bool:
        if pn.op == gn.op == "call_module":
            return isinstance(self.modules[str(gn.target)], type(self.pattern_modules[str(pn.target)]))
        return bool(super()._nodes_are_equal(pn, gn, node_name_match))

    def _match_attributes(self, pn: Node, gn: Node) -> bool:
        return True  # any parameter or buffer stands for any other

    def _match_literals(self, pn: Any, gn: Any, match: InternalMatch) -> bool:
        return not nodes_in(pn) and not nodes_in(gn)

    def _match_nodes(self, pn: Node, gn: Node, match: InternalMatch, node_name_match: str = "") -> bool:
        if pn in self.pattern_anchors:
            self.failed = None
        if super()._match_nodes(pn, gn, match, node_name_match):
            return True
        self.failed = self.failed or (pn, gn)  # the innermost comparison ends first
        if pn in self.pattern_anchors:
            wanted, given = self.failed
            logger.debug("no %s at %s: %s is not as %s is there", self.name, _called(gn), _called(given), _called(wanted))
        return False

    def _is_contained(self, nodes_map: dict[Node, Node]) -> bool:
        contained = bool(super()._is_contained(nodes_map))
        if not contained:
            places = ", ".join(_called(gn) for pn, gn in nodes_map.items() if pn.op != "placeholder")
            logger.debug("no %s at %s: something else reads what is inside", self.name, places)
        return contained


def _plainly(graph: Graph, node: Node, copied: Callable[[Node], Node]) -> Node:
    """A copy in `graph` whose arguments are given in one way: no literals at the end or by name, names in alphabetical order."""
    copy = graph.node_copy(node, copied)
    if copy.op in ("call_function", "call_method", "call_module"):
        args = list(copy.args)
        while args and not nodes_in(args[-1]):
            args.pop()
        copy.args = tuple(args)
        copy.kwargs = {name: value for name, value in sorted(copy.kwargs.items()) if nodes_in(value)}
    return copy


def _called(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
