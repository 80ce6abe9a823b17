"""The head bias of max-similarity attention in the steps of its product."""

import logging
import re

import pytest
import torch
from checks import randomise
from rounds import Rounds, traced
from torch import nn

from crqat_fx.models import yolo_world
from passes.fx.graph import format_graph
from passes.fx.round_head_bias import RoundHeadBias
from passes.fx.to_integer_codes import ToIntegerCodes

GUIDE, EMBED = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 3, 5, 4), (2, 3, 4, 6)))
PER_HEAD = {"scale": [0.03, 0.05, 0.02], "bits": 7, "axis": 1, "symmetric": True}


class Attention(nn.Module):
    def __init__(self, guide=PER_HEAD, embed=None, factor=0.5, shape=(3,)):
        super().__init__()
        self.guide, self.embed, self.factor = Rounds(**guide), Rounds(**(embed or {"scale": 0.02, "zero": 120})), factor
        self.bias, self.other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        randomise(self)

    def forward(self, texts, regions):
        score = yolo_world.max_similarity(self.guide(texts), self.embed(regions)) * self.factor
        return torch.sigmoid(score + self.bias.unsqueeze(1))


def coded(model):
    graph = traced(model)
    ToIntegerCodes()(graph)
    return graph


def test_the_bias_is_stored_as_codes_a_head():
    model = Attention()
    graph = coded(model)
    assert RoundHeadBias(yolo_world.max_similarity)(graph).rewrites == 1
    assert (
        format_graph(graph)
        == """texts = input
regions = input
guide = Quantize[7 bit, symmetric, axis 1](texts)
embed = Quantize[8 bit](regions)
guide.values = Dequantize[7 bit, symmetric, axis 1](guide)
embed.values = Dequantize[8 bit](embed)
max_similarity = max_similarity(guide.values, embed.values)
mul = mul(max_similarity, 0.5)
bias_codes = Tensor[3, 1]
bias_values = Dequantize[bias, axis 0](bias_codes)
add = add(mul, bias_values)
sigmoid = sigmoid(add)
return sigmoid"""
    )
    steps = torch.tensor(0.02) * torch.tensor(PER_HEAD["scale"]) * 0.5
    assert graph.bias_codes.dtype == torch.int32
    assert torch.equal(graph.bias_codes.flatten(), torch.round(model.bias / steps).int())
    with torch.no_grad():
        model.bias.copy_(torch.round(model.bias / steps) * steps)
        assert torch.equal(graph(GUIDE, EMBED), model(GUIDE, EMBED))
    assert RoundHeadBias(yolo_world.max_similarity)(graph).rewrites == 0


class ReadElsewhere(Attention):
    def forward(self, texts, regions):
        return super().forward(texts, regions), self.bias.sum()


class Shared(Attention):
    def forward(self, texts, regions):
        return super().forward(texts, regions), super().forward(texts * 2.0, regions)


class FromInput(Attention):
    def forward(self, texts, regions):
        return yolo_world.max_similarity(self.guide(texts), self.embed(regions)) * self.factor + texts.mean((2, 3), keepdim=True)[:, :, 0]


class FromTwo(Attention):
    def forward(self, texts, regions):
        return yolo_world.max_similarity(self.guide(texts), self.embed(regions)) * self.factor + (self.bias * self.other).unsqueeze(1)


class Unscaled(Attention):
    def forward(self, texts, regions):
        return yolo_world.max_similarity(self.guide(texts), self.embed(regions)) + self.bias.unsqueeze(1)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Attention(guide={"scale": 0.03, "bits": 7, "symmetric": True}), "does not read a guide with a step a head"),
        (Attention(embed={**PER_HEAD}), "and a map with one"),
        (Attention(factor=-0.5), "not scaled by a positive number"),
        (Attention(shape=(1,)), r"the shape \(1, 1\)"),
        (Attention(guide={**PER_HEAD, "scale": [0.03, 1e-12, 0.02]}), "no 32-bit codes"),
        (FromInput(), "depends on an input"),
        (FromTwo(), "made of 2 parameters"),
        (Unscaled(), "not scaled"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_leaves_other_attention_as_it_is(model, why, caplog):
    graph = coded(model)
    before = format_graph(graph)
    with caplog.at_level(logging.DEBUG, "passes.fx.round_head_bias"):
        assert RoundHeadBias(yolo_world.max_similarity)(graph).rewrites == 0
    assert format_graph(graph) == before
    assert re.search(why, caplog.text)


def test_another_reader_of_the_bias_keeps_the_float():
    model = ReadElsewhere()
    graph = coded(model)
    assert RoundHeadBias(yolo_world.max_similarity)(graph).rewrites == 1
    with torch.no_grad():
        score, bias = graph(GUIDE, EMBED)
        assert torch.equal(bias, model.bias.sum())
        assert not torch.equal(score, model(GUIDE, EMBED)[0])
        torch.testing.assert_close(score, model(GUIDE, EMBED)[0], rtol=0, atol=0.02 * 0.05)


def test_a_bias_that_two_attentions_share_is_rounded_for_the_first_alone(caplog):
    graph = coded(Shared())
    with caplog.at_level(logging.DEBUG, "passes.fx.round_head_bias"):
        assert RoundHeadBias(yolo_world.max_similarity)(graph).rewrites == 1
    assert "its bias is another attention's, too" in caplog.text
