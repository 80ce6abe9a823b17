"""Stores the bias of max-similarity attention as an integer kernel holds it.

    y = score + Rounds(b)   becomes   y = score + Dequantize(codes)
    codes = round(b / steps), int32, one a head

`Rounds` is a module whose class says `rounds_bias = True`; its `steps()` are those of the product that b is added to. So a convolution
with the guide as its weight can take the bias in. Another reader of b keeps the float. Left in float: a bias of another shape than
[heads, 1], or without 32-bit codes in these steps.
"""

import logging
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.fx.fold_constants import value_of
from passes.fx.graph import FxPass, module_of, node_paths
from passes.fx.lower_layers import LARGEST_BIAS, rounded_bias

logger = logging.getLogger(__name__)
CODES = "codes"  # of the bias, kept by what gives their values


class RoundHeadBias(FxPass):
    """Stores the bias of max-similarity attention as codes."""

    name = "round-head-bias"

    def rewrite(self, graph: GraphModule) -> int:
        paths = node_paths(graph)
        rewrites = 0
        for node in [each for each in graph.graph.nodes if _rounds_bias(module_of(graph, each))]:
            (bias,) = node.all_input_nodes
            rounds: Any = module_of(graph, node)  # as its class says
            value, steps = value_of(graph, bias).detach(), rounds.steps()
            reason = _reason_against(value, steps)
            if reason:
                logger.debug("%s: left %s: %s", self.name, paths[node], reason)
                node.replace_all_uses_with(bias)
            else:
                self._store(graph, node, value, steps)
                rewrites += 1
            graph.graph.erase_node(node)
        if rewrites:
            graph.graph.eliminate_dead_code()
        return rewrites

    def _store(self, graph: GraphModule, node: Node, value: Tensor, steps: Tensor) -> None:
        path = str(node.target)
        rounded = rounded_bias(path, value, steps)
        rounded.values.register_buffer(CODES, rounded.codes)
        graph.set_submodule(path, rounded.values)
        with graph.graph.inserting_before(node):
            codes = graph.graph.get_attr(f"{path}.{CODES}")
            values = graph.graph.call_module(path, (codes,))
        codes.meta, values.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(values)


def _rounds_bias(module: nn.Module | None) -> bool:
    return getattr(type(module), "rounds_bias", False) is True


def _reason_against(value: Tensor, steps: Tensor | None) -> str:
    if steps is None or value.shape != (len(steps), 1):
        return f"a bias of the shape {tuple(value.shape)}, and {'no' if steps is None else len(steps)} steps"
    if not bool((value.flatten().abs() / steps <= LARGEST_BIAS).all()):
        return "its bias has no 32-bit codes in the product's steps"
    return ""
