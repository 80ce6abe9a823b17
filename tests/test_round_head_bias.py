"""The head bias of max-similarity attention, stored in the steps of its product."""

import logging
import re

import pytest
import torch
from checks import randomise
from rounds import traced
from torch import nn

from passes.fx.graph import format_graph
from passes.fx.round_head_bias import RoundHeadBias

SCORE = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
STEPS = (0.0003, 0.0005, 0.0002)


class Whole(nn.Module):
    """What a prepared graph has before the bias."""

    is_quantizer = rounds_bias = True

    def __init__(self, steps):
        super().__init__()
        self.told = None if steps is None else torch.tensor(steps)

    def steps(self):
        return self.told

    def forward(self, bias):
        return torch.round(bias / self.told.unsqueeze(1)) * self.told.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, steps=STEPS, shape=(3,)):
        super().__init__()
        self.whole, self.bias = Whole(steps), nn.Parameter(torch.zeros(shape))
        randomise(self)

    def forward(self, score):
        return torch.sigmoid(score * 0.5 + self.whole(self.bias.unsqueeze(1)))


class ReadElsewhere(Attention):
    def forward(self, score):
        return super().forward(score), self.bias.sum()


class Shared(Attention):
    def __init__(self):
        super().__init__()
        self.other = Whole([2 * step for step in STEPS])

    def forward(self, score):
        return super().forward(score), torch.sigmoid(score + self.other(self.bias.unsqueeze(1)))


def test_the_bias_is_stored_as_codes_a_head():
    model = Attention()
    graph = traced(model, Whole)
    assert RoundHeadBias()(graph).rewrites == 1
    assert (
        format_graph(graph)
        == """score = input
mul = mul(score, 0.5)
whole.codes = Tensor[3, 1]
whole = Dequantize[bias, axis 0](whole.codes)
add = add(mul, whole)
sigmoid = sigmoid(add)
return sigmoid"""
    )
    codes = graph.get_buffer("whole.codes")
    assert codes.dtype == torch.int32
    assert torch.equal(codes.flatten(), torch.round(model.bias / torch.tensor(STEPS)).int())
    with torch.no_grad():
        assert torch.equal(graph(SCORE), model(SCORE))
    assert RoundHeadBias()(graph).rewrites == 0


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Attention(steps=None), "and no steps"),
        (Attention(shape=(1,)), r"the shape \(1, 1\), and 3 steps"),
        (Attention(steps=(0.03, 1e-12, 0.02)), "no 32-bit codes"),
    ],
    ids=["no steps", "another shape", "too many steps"],
)
def test_a_bias_without_codes_stays_float(model, why, caplog):
    graph = traced(model, Whole)
    with caplog.at_level(logging.DEBUG, "passes.fx.round_head_bias"):
        assert RoundHeadBias()(graph).rewrites == 0
    assert re.search(why, caplog.text)
    assert "whole" not in format_graph(graph)
    with torch.no_grad():
        assert torch.equal(graph(SCORE), torch.sigmoid(SCORE * 0.5 + model.bias.unsqueeze(1)))


def test_another_reader_of_the_bias_keeps_the_float():
    model = ReadElsewhere()
    graph = traced(model, Whole)
    assert RoundHeadBias()(graph).rewrites == 1
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(graph(SCORE), model(SCORE), strict=True))
        assert torch.equal(graph(SCORE)[1], model.bias.sum())


def test_a_bias_that_two_attentions_share_is_stored_in_the_steps_of_each():
    model = Shared()
    graph = traced(model, Whole)
    assert RoundHeadBias()(graph).rewrites == 2
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(graph(SCORE), model(SCORE), strict=True))
    assert not torch.equal(graph.get_buffer("whole.codes"), graph.get_buffer("other.codes"))
