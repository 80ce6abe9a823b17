"""Rounds the bias of max-similarity attention to the steps of the product it is added to, as an integer kernel holds it.

    y = max_similarity(guide, embed) * c + b   becomes   y = max_similarity(guide, embed) * c + Dequantize(bias_codes)
    bias_codes = round(b / (s_x s_h c)), int32, one a head

s_h is the guide's step of the head, s_x the one step of the map, c > 0. So a convolution with the guide as its weight can take the bias in.
Another reader of the bias keeps the float. Left alone: operands that are not codes, or not of these steps; a bias of another shape, of
several parameters, that an input decides, or that two attentions share; one that has no 32-bit codes.
"""

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from passes.fx.codes import Dequantize
from passes.fx.fold_constants import value_of
from passes.fx.graph import FxPass, ancestors, module_of, node_paths
from passes.fx.lower_layers import LARGEST_BIAS, rounded_bias, step_of

logger = logging.getLogger(__name__)
HEADS = 1  # the axis of the guide's scales


@dataclass(frozen=True)
class _Found:
    added: Node
    bias: Node  # as it is added
    stored: Node  # the parameter
    value: Tensor  # [heads, 1]
    steps: Tensor  # [heads]


class RoundHeadBias(FxPass):
    """Rounds the bias of max-similarity attention to the steps of its product."""

    name = "round-head-bias"

    def __init__(self, similarity: Callable[..., Any]) -> None:
        self.similarity = similarity

    def rewrite(self, graph: GraphModule) -> int:
        paths = node_paths(graph)
        rewrites = 0
        for node in [each for each in graph.graph.nodes if each.target is self.similarity]:
            found = self._found(graph, node)
            if isinstance(found, str):
                logger.debug("%s: left %s: %s", self.name, paths[node], found)
                continue
            self._round(graph, found)
            rewrites += 1
        if rewrites:
            graph.graph.eliminate_dead_code()
        return rewrites

    def _found(self, graph: GraphModule, node: Node) -> _Found | str:
        if len(node.all_input_nodes) != 2 or len(node.args) != 2:
            return "it is not called with two tensors"
        guide, step = module_of(graph, node.all_input_nodes[0]), step_of(graph, node.all_input_nodes[1])
        if not isinstance(guide, Dequantize) or guide.axis != HEADS or step is None:
            return "it does not read a guide with a step a head, and a map with one"
        scaled = next(iter(node.users))
        if len(node.users) != 1 or scaled.target is not operator.mul or scaled.args[0] is not node or len(scaled.users) != 1:
            return "it is not scaled by a number alone"
        factor, added = scaled.args[1], next(iter(scaled.users))
        if not isinstance(factor, int | float) or factor <= 0 or added.target is not operator.add or added.args[0] is not scaled:
            return "it is not scaled by a positive number, and a bias added"
        bias = added.args[1]
        if not isinstance(bias, Node) or any(each.op == "placeholder" for each in ancestors([bias])):
            return "its bias depends on an input"
        if isinstance(module_of(graph, bias), Dequantize):
            return "its bias is rounded already"
        sources = [each for each in ancestors([bias]) if each.op == "get_attr"]
        if len(sources) != 1:
            return f"its bias is made of {len(sources)} parameters"
        stored = sources[0]
        owner, _, name = str(stored.target).rpartition(".")
        if hasattr(graph.get_submodule(owner), f"{name}_codes"):
            return "its bias is another attention's, too"
        value, steps = value_of(graph, bias), step * guide.scale * factor
        if value.shape != (len(steps), 1):
            return f"its bias has the shape {tuple(value.shape)}"
        if not bool((value.flatten().abs() / steps <= LARGEST_BIAS).all()):
            return "its bias has no 32-bit codes in the product's steps"
        return _Found(added, bias, stored, value, steps)

    def _round(self, graph: GraphModule, found: _Found) -> None:
        path = str(found.stored.target)
        owner, _, name = path.rpartition(".")
        store = graph.get_submodule(owner)
        rounded = rounded_bias(path, found.value.detach(), found.steps)
        store.register_buffer(f"{name}_codes", rounded.codes)
        store.add_module(f"{name}_values", rounded.values)
        with graph.graph.inserting_before(found.added):
            codes = graph.graph.get_attr(f"{path}_codes")
            values = graph.graph.call_module(f"{path}_values", (codes,))
        for each in (codes, values):
            each.meta = dict(found.stored.meta)
        found.added.update_arg(1, values)
