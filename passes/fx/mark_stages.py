"""Marks every node with the stage of the curriculum it belongs to, by subgraph matching and reachability: no name is read.

    backbone   what the end of the pooling pyramid reads, and that end: the pyramid followed to where it fans out
    head       of the rest, the nodes from which exactly one of the counted outputs is reached
    neck       the rest
    two stages: backbone | neck-head (neck and head are one); three stages: backbone | neck | head

1. A quantizer belongs to its earliest reader.
2. A node that no counted output needs goes with the latest stage it reads; if it reads none, a parameter say, with its earliest reader.
3. No value flows from a later stage to an earlier one.

A node that only asks for a value's shape is no reader of it where readers are counted: it neither hides the pyramid nor ends it.
Left alone: the graph itself; only `node.meta["stage"]` is written. What the partition assumes is checked, and a graph that breaks it is
refused. The patterns and which outputs are counted come from above: this pass knows no model.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch.fx import GraphModule, Node

from passes.base import PassError
from passes.fx.graph import STAGE, FxPass, ancestors, node_paths, nodes_in
from passes.fx.matcher import Matcher

logger = logging.getLogger(__name__)
TWO_STAGES = ("backbone", "neck-head", "neck-head")  # what each of the three parts is called
THREE_STAGES = ("backbone", "neck", "head")
BACKBONE, NECK, HEAD = range(3)


@dataclass(frozen=True)
class Stage:
    """A unit of the curriculum: its nodes in the graph's order."""

    name: str
    nodes: tuple[Node, ...]


class MarkStages(FxPass):
    """Marks every node with its curriculum stage: backbone | neck-head, or backbone | neck | head."""

    name = "mark-stages"

    def __init__(
        self, pyramid: Sequence[GraphModule], outside: Sequence[GraphModule], counted: tuple[int, ...], stages: Literal[2, 3] = 2
    ) -> None:
        """`pyramid`: spellings of the core that ends the backbone, of which one is found once. `outside`: spellings of what must be
        found, and not in the backbone. `counted`: which entries of the graph's output the head is told by."""
        if stages not in (2, 3):
            raise ValueError(f"stages is {stages!r}: give 2 (backbone | neck-head) or 3 (backbone | neck | head)")
        self.pyramid, self.outside, self.counted = tuple(pyramid), tuple(outside), counted
        self.names = TWO_STAGES if stages == 2 else THREE_STAGES

    def rewrite(self, graph: GraphModule) -> int:
        matcher = Matcher(graph)
        end = self._end_of_backbone(graph, matcher)
        backbone = ancestors([end])
        self._check_outside(graph, matcher, backbone)
        outputs = self._counted_outputs(graph)
        reached = _reached_outputs(graph, outputs)
        if reached[end] != 2 ** len(outputs) - 1:
            lost = next(output for bit, output in enumerate(outputs) if not reached[end] >> bit & 1)
            raise self._refusal(graph, f"the end of the backbone, {{}}, does not reach the output {node_paths(graph)[lost]}", end)
        parts: dict[Node, int] = {}
        for node in graph.graph.nodes:
            if node in backbone:
                parts[node] = BACKBONE
            elif reached[node] == 0:
                parts[node] = max((parts[source] for source in node.all_input_nodes), default=BACKBONE)
            else:
                parts[node] = HEAD if reached[node].bit_count() == 1 else NECK
        for output in outputs:
            if parts[output] != HEAD:
                raise self._refusal(graph, "the counted output {} also feeds another one, so that no head can be told", output)
        if NECK not in parts.values():
            raise self._refusal(graph, "nothing is left for the neck between {} and the outputs", end)
        for node in reversed(graph.graph.nodes):
            uncounted_source = not reached[node] and not node.all_input_nodes
            if node.users and (matcher.quantizes(node) or uncounted_source):
                parts[node] = min(parts[user] for user in node.users)
        changed = [node for node, part in parts.items() if node.meta.get(STAGE) != self.names[part]]
        for node in changed:
            node.meta[STAGE] = self.names[parts[node]]
        return len(changed)

    def ensures(self, graph: GraphModule) -> None:
        order = {name: number for number, name in enumerate(dict.fromkeys(self.names))}
        for node in graph.graph.nodes:
            if node.meta.get(STAGE) not in order:
                raise self._refusal(graph, f"{{}} is marked {node.meta.get(STAGE)}, not one of {', '.join(order)}", node)
        for node in graph.graph.nodes:
            for source in node.all_input_nodes:
                if order[source.meta[STAGE]] > order[node.meta[STAGE]]:
                    raise self._refusal(graph, f"{{}} ({node.meta[STAGE]}) reads {source.meta[STAGE]}", node)

    def _end_of_backbone(self, graph: GraphModule, matcher: Matcher) -> Node:
        """The core's output, followed along single readers to the value that several read."""
        found = [match for pattern in self.pyramid for match in matcher.find(pattern)]
        if len(found) != 1:
            names = ", ".join(dict.fromkeys(type(pattern).__name__ for pattern in self.pyramid))
            raise PassError(self.name, f"found {len(found)} places of {names}, the core that ends the backbone: exactly one is needed")
        end = found[0].outputs[0]
        while len(following := matcher.readers(end)) == 1 and following[0].op != "output":
            end = following[0]
        if len(following) < 2:
            raise self._refusal(graph, "the backbone's end is where the pyramid fans out, but {} has no two readers", end)
        if logger.isEnabledFor(logging.DEBUG):
            paths = node_paths(graph)
            after = ", ".join(paths[node] for node in following)
            logger.debug("%s: the backbone ends with %s, which %s read", self.name, paths[end], after)
        return end

    def _check_outside(self, graph: GraphModule, matcher: Matcher, backbone: set[Node]) -> None:
        found = [match for pattern in self.outside for match in matcher.find(pattern)]
        if self.outside and not found:
            names = ", ".join(dict.fromkeys(type(pattern).__name__ for pattern in self.outside))
            raise PassError(self.name, f"found no {names}, which must lie outside the backbone")
        for match in found:
            for node in match.nodes:
                if node in backbone:
                    raise self._refusal(graph, "{} must lie outside the backbone, but the backbone's end reads it", node)

    def _counted_outputs(self, graph: GraphModule) -> list[Node]:
        returned = graph.graph.output_node().args[0]
        entries = returned if isinstance(returned, tuple | list) else (returned,)
        if max(self.counted) >= len(entries):
            raise PassError(self.name, f"counts outputs {self.counted}, but the graph returns {len(entries)}")
        outputs = [node for index in self.counted for node in nodes_in(entries[index])]
        if len(set(outputs)) < 2:
            raise PassError(self.name, f"the head is told by several outputs, but the graph returns {len(set(outputs))} that count")
        return outputs

    def _refusal(self, graph: GraphModule, reason: str, node: Node) -> PassError:
        return PassError(self.name, reason.format(node_paths(graph)[node]))


def stages_of(graph: GraphModule) -> tuple[Stage, ...]:
    """The stages of a marked graph, in the order in which data flows through them."""
    nodes: dict[str, list[Node]] = {}
    for node in graph.graph.nodes:
        if STAGE not in node.meta:
            raise ValueError(f"{node.name} has no stage: run mark-stages first")
        nodes.setdefault(node.meta[STAGE], []).append(node)
    names = [name for name in dict.fromkeys((*TWO_STAGES, *THREE_STAGES)) if name in nodes]
    return tuple(Stage(name, tuple(nodes[name])) for name in names)


def _reached_outputs(graph: GraphModule, outputs: Sequence[Node]) -> dict[Node, int]:
    """For every node a bit for each of the outputs that it reaches."""
    reached = dict.fromkeys(graph.graph.nodes, 0)
    for bit, output in enumerate(outputs):
        reached[output] |= 1 << bit
    for node in reversed(graph.graph.nodes):
        for source in node.all_input_nodes:
            reached[source] |= reached[node]
    return reached
