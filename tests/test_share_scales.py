"""One scale for what a concat joins: within a block and a stage, at the bits that are wanted, and nowhere else."""

import dataclasses

import pytest
import torch
from checks import check_pass
from every_kind import Marked
from torch import nn
from torch.fx import GraphModule

from crqat_fx.models.yolo_world import Concat, build
from crqat_fx.quantize.prepare import prepare
from crqat_fx.recipe import TARGETS, preset
from crqat_fx.trace import LEAVES, LeafTracer
from passes.fx.graph import STAGE, format_graph, module_of
from passes.fx.placement import quantizes
from passes.fx.share_scales import ShareScales
from passes.spec import QuantSpec

ORT = TARGETS["ort"]
EIGHT = QuantSpec(8)
X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def sharing(wanted=lambda spec: True):
    return ShareScales(ORT, ORT.shared, wanted)


class Block(nn.Module):
    """Two concats that have an input in common; what `changed` names has another spec."""

    def __init__(self, changed, axis):
        super().__init__()
        self.first, self.second = Concat(axis), Concat(axis)
        for name in ("a", "b", "c", "q1", "q2"):
            self.add_module(name, Marked(QuantSpec(5) if name == changed else EIGHT))

    def forward(self, x):
        a, b, c = self.a(x + 1), self.b(x + 2).flatten(2).unflatten(2, (4, 4)), self.c(x + 3)
        return self.q1(self.first(a, b)), self.q2(self.second(b, c))


class Part(nn.Module):
    def __init__(self, changed, axis):
        super().__init__()
        self.block, self.other = Block(changed, axis), Marked(EIGHT)

    def forward(self, x):
        one, two = self.block(x)
        return self.other(one.relu()), two


class Whole(nn.Module):
    def __init__(self, changed="", axis=1):
        super().__init__()
        self.part, self.outer, self.q = Part(changed, axis), Concat(), Marked(EIGHT)

    def forward(self, x):
        one, two = self.part(x)
        return self.q(self.outer(one, two))


def traced(changed="", axis=1):
    model = Whole(changed, axis).eval()
    return GraphModule(model, LeafTracer((*LEAVES, Marked)).trace(model))


BEFORE = """
    x = input
    part.block.add = add(x, 1)
    part.block.a = Marked[u8](part.block.add)
    part.block.add@2 = add(x, 2)
    part.block.b = Marked[u8](part.block.add@2)
    part.block.flatten = part.block.b.flatten(2)
    part.block.unflatten = part.block.flatten.unflatten(2, (4, 4))
    part.block.add@3 = add(x, 3)
    part.block.c = Marked[u8](part.block.add@3)
    part.block.first = Concat(part.block.a, part.block.unflatten)
    part.block.q1 = Marked[u8](part.block.first)
    part.block.second = Concat(part.block.unflatten, part.block.c)
    part.block.q2 = Marked[u8](part.block.second)
    part.relu = part.block.q1.relu()
    part.other = Marked[u8](part.relu)
    outer = Concat(part.other, part.block.q2)
    q = Marked[u8](outer)
    return q
"""
AFTER = """
    x = input
    part.block.add = add(x, 1)
    part.block.q1 = Marked[u8](part.block.add)
    part.block.add@2 = add(x, 2)
    part.block.q1@2 = Marked[u8](part.block.add@2)
    part.block.flatten = part.block.q1@2.flatten(2)
    part.block.unflatten = part.block.flatten.unflatten(2, (4, 4))
    part.block.add@3 = add(x, 3)
    part.block.q1@3 = Marked[u8](part.block.add@3)
    part.block.first = Concat(part.block.q1, part.block.unflatten)
    part.block.q1@4 = Marked[u8](part.block.first)
    part.block.second = Concat(part.block.unflatten, part.block.q1@3)
    part.block.q1@5 = Marked[u8](part.block.second)
    part.relu = part.block.q1@4.relu()
    part.other = Marked[u8](part.relu)
    outer = Concat(part.other, part.block.q1@5)
    q = Marked[u8](outer)
    return q
"""


def test_concats_that_have_an_input_in_common_share_one_scale_and_one_across_blocks_none():
    graph = check_pass(sharing(), traced(), X, before=BEFORE, after=AFTER, rewrites=4)
    assert set(dict(graph.named_modules())) >= {"part.block.q1", "part.other", "q"}
    assert "part.block.a" not in dict(graph.named_modules())


def test_leaves_concats_along_another_axis_than_the_channels():
    check_pass(sharing(), traced(axis=2), X, before=BEFORE)


def test_leaves_what_is_not_wanted():
    check_pass(sharing(lambda spec: spec.bits < 8), traced(), X, before=BEFORE)


def test_leaves_a_member_of_other_bits():
    graph = traced(changed="a")
    assert sharing()(graph).rewrites == 3
    assert "part.block.a = Marked[u5]" in format_graph(graph)


def test_leaves_a_scale_that_is_known():
    graph = traced()
    graph.part.block.a.fixed = (1 / 255, 0)
    assert sharing()(graph).rewrites == 3
    assert "part.block.a = Marked" in format_graph(graph)


def test_leaves_a_concat_that_reads_another_stage():
    graph = traced()
    for node in graph.graph.nodes:
        node.meta[STAGE] = "early" if node.name == "part_block_a" else "late"
    assert sharing()(graph).rewrites == 2
    assert "part.block.a = Marked" in format_graph(graph)


def test_leaves_a_concat_with_an_input_that_has_no_quantizer():
    graph = traced()
    node = next(each for each in graph.graph.nodes if each.name == "part_block_a")
    node.replace_all_uses_with(node.all_input_nodes[0])
    graph.graph.erase_node(node)
    assert sharing()(graph).rewrites == 2


# --- in the whole model ---


def prepared(recipe="8-8-8-int", share=None, version=1):
    with torch.device("meta"):
        model = build("pico", version)
    return prepare(model, [], dataclasses.replace(preset(recipe), share_scales=share), "ort")


def groups(made):
    found = {}
    for node in made.graph.graph.nodes:
        if quantizes(made.graph, node):
            found.setdefault(str(node.target), []).append(node)
    return {name: nodes for name, nodes in found.items() if len(nodes) > 1}


@pytest.mark.parametrize("version", [1, 2])
def test_every_c2f_and_the_pyramid_share_and_no_scale_crosses_a_stage_or_a_layer(version):
    shared = groups(prepared(version=version))
    layers = [f"backbone.image_model.stage{stage}.1" for stage in (1, 2, 3, 4)]
    layers += ["backbone.image_model.stage4.2"]
    layers += [f"neck.{part}.{level}" for part in ("top_down_layers", "bottom_up_layers") for level in (0, 1)]
    assert set(shared) == {f"quant.{layer}.concat.output" for layer in layers}
    for name, nodes in shared.items():
        layer = name.removeprefix("quant.").removesuffix(".concat.output")
        assert len({node.meta[STAGE] for node in nodes}) == 1
        owners = [[str(path) for path, _ in node.all_input_nodes[0].meta["nn_module_stack"].values()] for node in nodes]
        assert all(any(path == layer for path in stack) for stack in owners)


@pytest.mark.parametrize(
    ("recipe", "share", "count"),
    [("8-8-8", None, 9), ("4-8-8", None, 9), ("4-4-8", None, 0), ("6-6-6", None, 0), ("4-4-8", True, 9), ("8-8-8", False, 0)],
)
def test_sharing_is_the_recipes_switch_and_off_by_default_below_eight_bits(recipe, share, count):
    assert len(groups(prepared(recipe, share))) == count


def test_a_shared_scale_makes_the_concat_a_copy_of_codes():
    made = prepared()
    concat = next(node for node in made.graph.graph.nodes if node.target == "backbone.image_model.stage3.1.concat")
    (behind,) = concat.users
    for source in concat.all_input_nodes:
        while not quantizes(made.graph, source):
            source = source.all_input_nodes[0]
        assert module_of(made.graph, source) is module_of(made.graph, behind)
