"""Placing by a table: each rule of the pass on a graph of a few nodes, and what must stay as it is."""

import dataclasses

import pytest
import torch
from checks import check_pass
from every_kind import Marked
from torch import nn

from crqat_fx.models import yolo_world
from crqat_fx.models.yolo_world import Add, Concat, MatMul
from crqat_fx.recipe import TARGETS
from crqat_fx.trace import LEAVES, LeafTracer
from passes.base import PassError
from passes.fx.graph import STAGE, format_graph, node_paths
from passes.fx.place_quantizers import PlaceQuantizers
from passes.fx.placement import ACTIVATION
from passes.spec import QuantSpec

ORT, CONV_INPUTS = TARGETS["ort"], TARGETS["conv-inputs"]
X = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def traced(model, bits=4, **others):
    """With a spec of `bits` at every node; `others` by path, None for float."""
    model.eval()
    graph = torch.fx.GraphModule(model, LeafTracer((*LEAVES, Marked)).trace(model))
    for node, path in node_paths(graph).items():
        asked = others.get(path.replace(".", "_"), bits)
        node.meta[ACTIVATION] = QuantSpec(asked) if isinstance(asked, int) else asked
    return graph


class Layers(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        torch.manual_seed(0)
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def conv():
    return nn.Conv2d(4, 4, 1)


def test_quantizes_an_operand_for_its_reader_and_once_for_readers_that_ask_for_the_same():
    model = Layers(lambda m, x: (m.a(x), m.b(x), m.c(x), m.d(x)), a=conv(), b=conv(), c=conv(), d=conv())
    check_pass(
        PlaceQuantizers(CONV_INPUTS, Marked),
        traced(model, c=8, d=None),
        X,
        before="""
            x = input
            a = Conv2d[4->4, k1, bias](x)
            b = Conv2d[4->4, k1, bias](x)
            c = Conv2d[4->4, k1, bias](x)
            d = Conv2d[4->4, k1, bias](x)
            return (a, b, c, d)
        """,
        after="""
            x = input
            quant.c.input = Marked[u8](x)
            quant.a.input = Marked[u4](x)
            a = Conv2d[4->4, k1, bias](quant.a.input)
            b = Conv2d[4->4, k1, bias](quant.a.input)
            c = Conv2d[4->4, k1, bias](quant.c.input)
            d = Conv2d[4->4, k1, bias](x)
            return (a, b, c, d)
        """,
        rewrites=2,
    )


def test_names_a_quantizer_that_torch_ao_placed_after_its_first_reader():
    model = Layers(
        lambda m, x: m.b(m.activation_post_process_7(m.a(x))), a=conv(), b=conv(), activation_post_process_7=Marked(QuantSpec(4))
    )
    graph = traced(model, a=None)
    place = PlaceQuantizers(CONV_INPUTS, Marked)
    module = graph.activation_post_process_7
    assert place(graph).rewrites == 1
    assert graph.quant.b.input is module
    assert "activation_post_process" not in format_graph(graph)
    assert place(graph).rewrites == 0


def test_quantizes_both_operands_of_a_product_and_tells_them_apart():
    model = Layers(lambda m, x: m.product(x, x + 1), product=MatMul())
    check_pass(
        PlaceQuantizers(CONV_INPUTS, Marked),
        traced(model, product=QuantSpec(8, channel_axis=1)),
        X,
        before="""
            x = input
            add = add(x, 1)
            product = MatMul(x, add)
            return product
        """,
        after="""
            x = input
            quant.product.input.0 = Marked[u8, axis 1](x)
            add = add(x, 1)
            quant.product.input.1 = Marked[u8, axis 1](add)
            product = MatMul(quant.product.input.0, quant.product.input.1)
            return product
        """,
        rewrites=2,
    )


def test_quantizes_an_output_for_all_and_again_for_who_asks_for_less():
    model = Layers(lambda m, x: m.last(m.pool(m.add(m.first(x), x))), first=conv(), add=Add(), pool=nn.MaxPool2d(2), last=conv())
    check_pass(
        PlaceQuantizers(ORT, Marked),
        traced(model),
        X,
        before="""
            x = input
            first = Conv2d[4->4, k1, bias](x)
            add = Add(first, x)
            pool = MaxPool2d[k2, s2, p0](add)
            last = Conv2d[4->4, k1, bias](pool)
            return last
        """,
        after="""
            x = input
            quant.x.output = Marked[u4](x)
            first = Conv2d[4->4, k1, bias](quant.x.output)
            quant.first.output = Marked[u8](first)
            quant.add.input.0 = Marked[u4](quant.first.output)
            add = Add(quant.add.input.0, quant.x.output)
            quant.add.output = Marked[u4](add)
            pool = MaxPool2d[k2, s2, p0](quant.add.output)
            last = Conv2d[4->4, k1, bias](pool)
            quant.last.output = Marked[u8](last)
            return quant.last.output
        """,
        rewrites=5,
    )


def test_a_float_reader_of_codes_reads_the_widest_and_a_float_producer_is_quantized_for_who_asks():
    model = Layers(lambda m, x: (m.island(m.add(x, x)), m.outside(x), torch.exp(x)), add=Add(), island=conv(), outside=conv())
    check_pass(
        PlaceQuantizers(ORT, Marked),
        traced(model, island=None),
        X,
        before="""
            x = input
            add = Add(x, x)
            island = Conv2d[4->4, k1, bias](add)
            outside = Conv2d[4->4, k1, bias](x)
            exp = exp(x)
            return (island, outside, exp)
        """,
        after="""
            x = input
            quant.add.input = Marked[u4](x)
            add = Add(quant.add.input, quant.add.input)
            quant.add.output = Marked[u8](add)
            island = Conv2d[4->4, k1, bias](quant.add.output)
            outside = Conv2d[4->4, k1, bias](quant.add.input)
            quant.outside.output = Marked[u8](outside)
            exp = exp(x)
            return (island, quant.outside.output, exp)
        """,
        rewrites=3,
    )


def test_a_known_scale_is_given_where_the_table_or_the_caller_knows_it():
    model = Layers(lambda m, x: torch.sigmoid(m.first(x)), first=conv())
    check_pass(
        PlaceQuantizers(ORT, Marked, {"x": 1 / 255}),
        traced(model, bits=8),
        X,
        before="""
            x = input
            first = Conv2d[4->4, k1, bias](x)
            sigmoid = sigmoid(first)
            return sigmoid
        """,
        after="""
            x = input
            quant.x.output = Marked[u8, known](x)
            first = Conv2d[4->4, k1, bias](quant.x.output)
            quant.first.output = Marked[u8](first)
            sigmoid = sigmoid(quant.first.output)
            quant.sigmoid.output = Marked[u8, known](sigmoid)
            return quant.sigmoid.output
        """,
        rewrites=3,
    )


def test_what_takes_a_weights_place_is_symmetric_no_wider_than_a_weight_and_the_only_quantizer_of_its_tensor():
    def forward(m, x):
        guide = m.guide(x.mean(1)).unflatten(2, (2, 2)).transpose(1, 2)
        return yolo_world.max_similarity(guide, x.flatten(2).unflatten(1, (2, 2)))

    check_pass(
        PlaceQuantizers(ORT, Marked),
        traced(Layers(forward, guide=nn.Linear(6, 4)), bits=8),
        X,
        before="""
            x = input
            mean = x.mean(1)
            guide = Linear[6->4, bias](mean)
            unflatten = guide.unflatten(2, (2, 2))
            transpose = unflatten.transpose(1, 2)
            flatten = x.flatten(2)
            unflatten@2 = flatten.unflatten(1, (2, 2))
            max_similarity = max_similarity(transpose, unflatten@2)
            return max_similarity
        """,
        after="""
            x = input
            mean = x.mean(1)
            quant.mean.output = Marked[u8](mean)
            guide = Linear[6->4, bias](quant.mean.output)
            unflatten = guide.unflatten(2, (2, 2))
            transpose = unflatten.transpose(1, 2)
            quant.max_similarity.input.0 = Marked[s7, axis 1](transpose)
            flatten = x.flatten(2)
            unflatten@2 = flatten.unflatten(1, (2, 2))
            quant.max_similarity.input.1 = Marked[u8](unflatten@2)
            max_similarity = max_similarity(quant.max_similarity.input.0, quant.max_similarity.input.1)
            return max_similarity
        """,
        rewrites=3,
    )


def test_a_product_with_a_number_hands_codes_on_and_a_product_of_two_does_not():
    model = Layers(lambda m, x: (m.a(m.first(x) * 2), m.b(m.second(x) * x.exp())), first=conv(), second=conv(), a=conv(), b=conv())
    graph = traced(model)
    PlaceQuantizers(ORT, Marked)(graph)
    text = format_graph(graph)
    assert "quant.mul.output" not in text
    assert "quant.mul@2.output = Marked[u4](mul@2)" in text


def test_shapes_are_read_from_the_tensor_itself():
    graph = traced(Layers(lambda m, x: (m.first(x).view(x.shape[0], -1), x), first=conv()))
    PlaceQuantizers(ORT, Marked)(graph)
    assert "x.shape = x.shape" in format_graph(graph)
    model = Layers(lambda m, x: _viewed(m, m.first(x)), first=conv(), second=conv())
    graph = traced(model)
    PlaceQuantizers(ORT, Marked)(graph)
    assert "view_as = flatten.view_as(first)" in format_graph(graph)
    assert "flatten = quant.first.output.flatten(2)" in format_graph(graph)


def _viewed(m, y):
    return m.second(y.flatten(2).view_as(y))


@pytest.mark.parametrize(("table", "stage"), [(ORT, "early"), (CONV_INPUTS, "late")])
def test_a_quantizer_belongs_to_its_producers_stage_or_its_earliest_readers(table, stage):
    model = Layers(lambda m, x: (m.a(m.first(x)), m.b(m.first_of(x))), first=conv(), first_of=conv(), a=conv(), b=conv())
    graph = traced(model)
    for node in graph.graph.nodes:
        node.meta[STAGE] = "late" if node.name in ("a", "b", "output") else "early"
    PlaceQuantizers(table, Marked)(graph)
    found = [node for node in graph.graph.nodes if node.name.startswith("quant") and node.all_input_nodes[0].name == "first"]
    assert [node.meta[STAGE] for node in found] == [stage]


def test_of_readers_in_several_stages_the_earliest_counts():
    model = Layers(lambda m, x: _two(m, m.first(x)), first=conv(), a=conv(), b=conv())
    graph = traced(model)
    for node in graph.graph.nodes:
        node.meta[STAGE] = {"x": "one", "first": "one", "a": "two"}.get(node.name, "three")
    PlaceQuantizers(CONV_INPUTS, Marked)(graph)
    (quantizer,) = (node for node in graph.graph.nodes if node.target == "quant.a.input")
    assert quantizer.meta[STAGE] == "two"
    assert len(quantizer.users) == 2


def _two(m, y):
    return m.a(y), m.b(y)


@pytest.mark.parametrize("table", [ORT, CONV_INPUTS])
def test_leaves_a_graph_of_which_nothing_is_asked(table):
    check_pass(
        PlaceQuantizers(table, Marked),
        traced(Layers(lambda m, x: m.concat(m.first(x), x), first=conv(), concat=Concat()), bits=None),
        X,
        before="""
            x = input
            first = Conv2d[4->4, k1, bias](x)
            concat = Concat(first, x)
            return concat
        """,
    )


def test_a_model_with_a_module_where_quantizers_are_kept_is_refused():
    model = Layers(lambda m, x: m.quant(x), quant=nn.Sequential(conv()))
    with pytest.raises(PassError, match=r"has a module 'quant\.0'"):
        PlaceQuantizers(ORT, Marked)(traced(model))


def test_a_table_without_an_entry_places_nothing_for_it():
    model = Layers(lambda m, x: m.first(x), first=conv())
    table = dataclasses.replace(CONV_INPUTS, operands={})
    assert PlaceQuantizers(table, Marked)(traced(model)).rewrites == 0
