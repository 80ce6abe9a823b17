"""Tells every layer that rounds its weight which quantizer it reads, and puts a HeadBias before the bias of max-similarity attention.

    Conv2d(q(x) * 2)                                knows q and 2
    max_similarity(q_g(guide), q_x(map)) * c + b    becomes   max_similarity(q_g(guide), q_x(map)) * c + HeadBias(b)

A value is read from a quantizer through what only picks among its codes, and then through products with a positive number: so the lowered
graph reads it. Left alone: what is read from no quantizer, or from one with several steps; an attention whose guide has no step a head,
that is not scaled by a positive number, or whose bias an input decides.
"""

import operator
from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from crqat_fx.models.yolo_world import max_similarity
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.integer_bias import HeadBias, IntegerBias, Source
from crqat_fx.recipe import HEAD_AXIS
from passes.fx.graph import ancestors, module_of, node_paths
from passes.fx.place_quantizers import ROOT
from passes.fx.placement import ACTIVATION, kinds, knows, operands
from passes.fx.to_integer_codes import CLAMPS, JOINS, PICKS


def link_biases(graph: GraphModule) -> None:
    """Once, when all quantizers stand."""
    paths = node_paths(graph)
    for node in list(graph.graph.nodes):
        module = module_of(graph, node)
        if isinstance(module, IntegerBias):
            module.source = _source(graph, node.all_input_nodes[0])
        elif node.target is max_similarity:
            _round_head_bias(graph, node, paths)
    graph.recompile()


def _source(graph: GraphModule, node: Node) -> Source | None:
    if node.target in (operator.mul, torch.mul):
        factors = [value for value in node.args if isinstance(value, int | float) and value > 0]
        inner = _source(graph, node.all_input_nodes[0]) if len(factors) == 1 else None
        return None if inner is None else Source(inner.quantizer, (*inner.factors, factors[0]))
    quantizer = _quantizer(graph, node)
    return None if quantizer is None or quantizer.spec.channel_axis is not None else Source(quantizer)


def _quantizer(graph: GraphModule, node: Node) -> FakeQuantize | None:
    """The quantizer whose codes a value is."""
    module, named = module_of(graph, node), kinds(graph, node)
    if isinstance(module, FakeQuantize):
        return module
    sources = [source for _, source in operands(node)]
    if knows(JOINS, named):
        found = {_quantizer(graph, source) for source in sources}
        return found.pop() if len(found) == 1 else None
    return _quantizer(graph, sources[0]) if knows(PICKS | CLAMPS, named) else None


def _round_head_bias(graph: GraphModule, node: Node, paths: Mapping[Node, str]) -> None:
    scaled = next(iter(node.users))
    if len(node.users) != 1 or scaled.target is not operator.mul or scaled.args[0] is not node or len(scaled.users) != 1:
        return
    factor, added = scaled.args[1], next(iter(scaled.users))
    if not isinstance(factor, int | float) or factor <= 0 or added.target is not operator.add or added.args[0] is not scaled:
        return
    guide, source = module_of(graph, node.all_input_nodes[0]), _source(graph, node.all_input_nodes[1])
    if not isinstance(guide, FakeQuantize) or guide.spec.channel_axis != HEAD_AXIS or source is None:
        return
    bias = added.args[1]
    if not isinstance(bias, Node) or any(each.op == "placeholder" for each in ancestors([bias])):
        return
    name = f"{ROOT}.{paths[added]}.input.1"
    graph.add_submodule(name, HeadBias(guide, source, factor).train(graph.training))
    with graph.graph.inserting_before(added):
        rounded = graph.graph.call_module(name, (bias,))
    rounded.meta = {key: value for key, value in added.meta.items() if key != ACTIVATION}
    added.update_arg(1, rounded)
