"""A convolution and the match of what it gives with constant texts as one convolution."""

import logging
import re

import pytest
import torch
import torch.nn.functional as F
from checks import check_pass
from rounds import Rounds, traced
from torch import nn

from crqat_fx.models.yolo_world import Match
from passes.fx.collapse_match import CollapseMatch
from passes.fx.graph import format_graph

X = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(1))


class Learned(nn.Conv2d):
    """A convolution that rounds its weight."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight_fake_quant = Rounds(0.1, 0, 4, symmetric=True)

    def forward(self, x):
        return self._conv_forward(x, self.weight_fake_quant(self.weight), self.bias)


class Folding(Learned):
    """One that has a norm folded in."""

    def folded(self):
        return self.weight_fake_quant(self.weight * 2), self.bias + 1

    def forward(self, x):
        return self._conv_forward(x, *self.folded())


class Contrast(nn.Module):
    """With quantizers of the map (m), the texts (t) and the result (r), as `on` says."""

    def __init__(self, layer=None, on="", text=TEXT):
        super().__init__()
        self.layer, self.match = layer or nn.Conv2d(5, 6, 3, 2, 1), Match()
        self.text, self.bias = nn.Parameter(text.clone()), nn.Parameter(torch.tensor(0.7))
        self.of_map = Rounds(0.02, 120) if "m" in on else None
        self.of_text = Rounds(0.05, 0, 7, symmetric=True) if "t" in on else None
        self.of_result = Rounds(0.1, 120) if "r" in on else None

    def forward(self, x):
        y = self.layer(x)
        return self.matched(y, F.normalize(self.text, dim=2)).unflatten(2, y.shape[2:])

    def matched(self, y, text):
        y = y if self.of_map is None else self.of_map(y)
        result = self.match(text if self.of_text is None else self.of_text(text), y.flatten(2), self.bias)
        return result if self.of_result is None else self.of_result(result)


def test_a_float_pair_becomes_one_convolution():
    check_pass(
        CollapseMatch(Match, 7),
        traced(Contrast()),
        X,
        before="""
            x = input
            layer = Conv2d[5->6, k3, s2, p1, bias](x)
            text = Parameter[1, 7, 6]
            normalize = normalize(text, p=2.0, dim=2, eps=1e-12, out=None)
            flatten = layer.flatten(2)
            bias = Parameter[]
            match = Match(normalize, flatten, bias)
            layer.shape = layer.shape
            layer.shape[2:] = layer.shape[2:]
            unflatten = match.unflatten(2, layer.shape[2:])
            return unflatten
        """,
        after="""
            x = input
            match = Conv2d[5->7, k3, s2, p1, bias](x)
            return match
        """,
        rewrites=1,
        atol=2e-6,
    )


@pytest.mark.parametrize(("kind", "on"), [(Learned, "mtr"), (Folding, "mtr"), (Folding, "mt"), (Learned, "r")])
def test_of_a_quantized_pair_the_product_is_rounded_and_the_quantizers_between_go(kind, on):
    torch.manual_seed(0)
    model = Contrast(kind(5, 6, 1), on)
    graph, collapse = traced(model, kind), CollapseMatch(Match, 7)
    assert collapse(graph).rewrites == 1
    behind = "of_result = Rounds[u8](match)\nreturn of_result" if "r" in on else "return match"
    assert format_graph(graph) == f"x = input\nmatch = Conv2d[5->7, k1, bias](x)\n{behind}"
    names = {"m": "of_map", "t": "of_text"}
    assert collapse.gone == ("layer.weight_fake_quant", *(names[which] for which in "mt" if which in on))

    made = graph.get_submodule("match")
    weight, bias = model.layer.folded() if kind is Folding else (model.layer.weight_fake_quant(model.layer.weight), model.layer.bias)
    texts = F.normalize(TEXT[0], dim=1)
    product = texts @ weight.flatten(1)
    torch.testing.assert_close(made.weight.flatten(1), product, rtol=0, atol=1e-6)
    torch.testing.assert_close(made.bias, texts @ bias + 0.7, rtol=0, atol=1e-6)
    rounds = made.weight_fake_quant
    assert (rounds.spec.bits, rounds.spec.symmetric, rounds.spec.channel_axis) == (7, True, 0)
    torch.testing.assert_close(rounds.scale, product.abs().amax(1) / 63)
    rounded = rounds(made.weight)
    assert float((rounded - made.weight).abs().div(rounds.scale.view(-1, 1, 1, 1)).max()) <= 0.5 + 1e-5
    assert not torch.equal(rounded, made.weight)


def test_a_text_that_matches_nothing_has_a_scale_all_the_same():
    text = TEXT.clone()
    text[0, 3] = 0
    graph = traced(Contrast(Learned(5, 6, 1), "mtr", text), Learned)
    CollapseMatch(Match, 8)(graph)
    rounds = graph.get_submodule("match").weight_fake_quant
    assert rounds.scale[3] == 1
    assert rounds.spec.bits == 8


class Wide(Contrast):
    """What is matched is a function of the layer, of the texts, or of their product."""

    def __init__(self, change, layer=None):
        super().__init__(layer)
        self.change = change

    def forward(self, x):
        return self.change(self, x)


def texts_of_the_picture(self, x):
    y = self.layer(x)
    return self.matched(y, F.normalize(self.text * x.mean(), dim=2)).unflatten(2, y.shape[2:])


def scalar_of_the_picture(self, x):
    y = self.layer(x)
    return self.match(self.text, y.flatten(2), x.mean()).unflatten(2, y.shape[2:])


def another_reader_of_the_map(self, x):
    y = self.layer(x)
    return self.matched(y, self.text).unflatten(2, y.shape[2:]), y


def another_reader_of_the_result(self, x):
    y = self.layer(x)
    result = self.matched(y, self.text)
    return result.unflatten(2, y.shape[2:]), result


def a_function_between(self, x):
    y = torch.relu(self.layer(x))
    return self.matched(y, self.text).unflatten(2, y.shape[2:])


def another_shape(self, x):
    y = self.layer(x)
    return self.matched(y, self.text).unflatten(2, (2, -1))


def the_pictures_shape(self, x):
    return self.matched(self.layer(x), self.text).unflatten(2, x.shape[2:])


def batched_otherwise(self, x):
    y = self.layer(x).flatten(3)
    return self.match(self.text, y.flatten(2), self.bias).unflatten(2, y.shape[2:])


def keywords(self, x):
    y = self.layer(x)
    return self.match(self.text, regions=y.flatten(2), bias=self.bias).unflatten(2, y.shape[2:])


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Wide(texts_of_the_picture), "its texts, or its scalar, depend on an input"),
        (Wide(scalar_of_the_picture), "its texts, or its scalar, depend on an input"),
        (Wide(another_reader_of_the_map), "has another reader"),
        (Wide(another_reader_of_the_result), "is not unflattened"),
        (Wide(a_function_between), "made by no convolution"),
        (Wide(another_shape), "is not unflattened to the shape"),
        (Wide(the_pictures_shape), "is not unflattened to the shape"),
        (Wide(batched_otherwise), "made by no convolution"),
        (Wide(keywords), "is not called with three tensors"),
        (Contrast(nn.Conv2d(5, 6, 1, groups=1), text=TEXT.expand(2, -1, -1)), "more than one set of texts"),
        (Contrast(Learned(5, 6, 1)), "one of both is quantized"),
        (Contrast(nn.Conv2d(5, 6, 1), "mtr"), "one of both is quantized"),
    ],
    ids=lambda value: getattr(getattr(value, "change", None), "__name__", ""),
)
def test_leaves_a_chain_that_is_another(model, why, caplog):
    graph = traced(model, Learned)
    before = format_graph(graph)
    with caplog.at_level(logging.DEBUG, "passes.fx.collapse_match"):
        assert CollapseMatch(Match, 7)(graph).rewrites == 0
    assert format_graph(graph) == before
    assert re.search(why, caplog.text)


def test_leaves_a_convolution_with_groups(caplog):
    graph = traced(Contrast(nn.Conv2d(4, 6, 1, groups=2)))
    with caplog.at_level(logging.DEBUG, "passes.fx.collapse_match"):
        assert CollapseMatch(Match, 7)(graph).rewrites == 0
    assert "has groups" in caplog.text


def test_leaves_a_result_that_is_read_before_its_quantizer(caplog):
    class Reads(Contrast):
        def forward(self, x):
            y = self.layer(x)
            raw = self.match(self.of_text(self.text), self.of_map(y).flatten(2), self.bias)
            return self.of_result(raw).unflatten(2, y.shape[2:]), raw

    graph = traced(Reads(Learned(5, 6, 1), "mtr"), Learned)
    with caplog.at_level(logging.DEBUG, "passes.fx.collapse_match"):
        assert CollapseMatch(Match, 7)(graph).rewrites == 0
    assert "another reader than its quantizer" in caplog.text
