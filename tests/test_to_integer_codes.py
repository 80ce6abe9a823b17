"""Real integers between quantizers: what carries them, what does not, and that no value changes."""

import logging

import pytest
import torch
from checks import check_pass
from rounds import Rounds, traced
from torch import nn

from crqat_fx.models.yolo_world import Add, Concat
from passes.base import PassError
from passes.fx.codes import Dequantize, Quantize
from passes.fx.graph import module_of
from passes.fx.to_integer_codes import CODES, QUANTIZER, ToIntegerCodes

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Read(nn.Module):
    """Two readers of one quantizer."""

    def __init__(self, **steps):
        super().__init__()
        self.quant, self.conv, self.add = Rounds(**(steps or {"scale": 0.1, "zero": 9, "bits": 4})), nn.Conv2d(4, 4, 1), Add()

    def forward(self, x):
        y = self.quant(x)
        return self.add(self.conv(y), y)


def test_every_reader_in_float_gets_its_own_dequantize():
    graph = check_pass(
        ToIntegerCodes(),
        traced(Read()),
        X,
        before="""
            x = input
            quant = Rounds[u4](x)
            conv = Conv2d[4->4, k1, bias](quant)
            add = Add(conv, quant)
            return add
        """,
        after="""
            x = input
            quant = Quantize[4 bit](x)
            quant.values = Dequantize[4 bit](quant)
            conv = Conv2d[4->4, k1, bias](quant.values)
            quant.values@2 = Dequantize[4 bit](quant)
            add = Add(conv, quant.values@2)
            return add
        """,
        rewrites=1,
    )
    made = next(node for node in graph.graph.nodes if isinstance(module_of(graph, node), Quantize))
    assert (made.meta[CODES], made.meta[QUANTIZER]) == ("quant", "quant")
    assert not any(QUANTIZER in node.meta or CODES in node.meta for node in graph.graph.nodes if node is not made)


class Moves(nn.Module):
    """Everything that hands codes on, to a convolution at the end."""

    def __init__(self, **steps):
        super().__init__()
        self.quant, self.pool, self.up = (
            Rounds(**(steps or {"scale": 0.1, "zero": 9, "bits": 4})),
            nn.MaxPool2d(3, 1, 1),
            nn.Upsample(scale_factor=2),
        )
        self.relu, self.patches, self.conv = nn.ReLU(), nn.AdaptiveMaxPool2d(3), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        _, right = torch.split(self.quant(x), [2, 2], 1)
        up = self.up(self.pool(self.pool(right)))
        moved = self.relu(up).flatten(2).unflatten(2, (3, -1)).transpose(2, 3).permute(0, 1, 3, 2).unsqueeze(4).view_as(up)
        return self.conv(self.patches(moved))


def test_what_picks_or_moves_codes_works_on_codes():
    graph = check_pass(
        ToIntegerCodes(),
        traced(Moves()),
        X,
        before="""
            x = input
            quant = Rounds[u4](x)
            split = split(quant, [2, 2], dim=1)
            split[0] = split[0]
            split[1] = split[1]
            pool = MaxPool2d[k3, s1, p1](split[1])
            pool@2 = MaxPool2d[k3, s1, p1](pool)
            up = Upsample[scale_factor=2.0, mode='nearest'](pool@2)
            relu = ReLU(up)
            flatten = relu.flatten(2)
            unflatten = flatten.unflatten(2, (3, -1))
            transpose = unflatten.transpose(2, 3)
            permute = transpose.permute(0, 1, 3, 2)
            unsqueeze = permute.unsqueeze(4)
            view_as = unsqueeze.view_as(up)
            patches = AdaptiveMaxPool2d[output_size=3](view_as)
            conv = Conv2d[2->4, k1, bias](patches)
            return conv
        """,
        after="""
            x = input
            quant = Quantize[4 bit](x)
            split = split(quant, [2, 2], dim=1)
            split[0] = split[0]
            split[1] = split[1]
            pool = OnCodes[MaxPool2d](split[1])
            pool@2 = OnCodes[MaxPool2d](pool)
            up = OnCodes[Upsample](pool@2)
            relu.clamp = clamp(up, min=9)
            flatten = relu.clamp.flatten(2)
            unflatten = flatten.unflatten(2, (3, -1))
            transpose = unflatten.transpose(2, 3)
            permute = transpose.permute(0, 1, 3, 2)
            unsqueeze = permute.unsqueeze(4)
            view_as = unsqueeze.view_as(up)
            patches = OnCodes[AdaptiveMaxPool2d](view_as)
            quant.values = Dequantize[4 bit](patches)
            conv = Conv2d[2->4, k1, bias](quant.values)
            return conv
        """,
        rewrites=1,
    )
    carriers = [node for node in graph.graph.nodes if node.op in ("call_method", "call_function")]
    assert all(node.meta[CODES] == "quant" for node in carriers)


def test_leaves_in_float_what_moves_codes_with_a_scale_for_each_channel(caplog):
    model = traced(Moves(scale=[0.1, 0.2, 0.05, 0.3], bits=4, axis=1, symmetric=True))
    with caplog.at_level(logging.DEBUG, "passes.fx.to_integer_codes"), torch.no_grad():
        expected = model(X)
        assert ToIntegerCodes()(model).rewrites == 1
        assert torch.equal(model(X), expected)
    assert [str(node.target) for node in model.graph.nodes if CODES in node.meta] == ["quant"]
    assert "left split in float: its codes have a scale for each index of an axis" in caplog.text


class Joins(nn.Module):
    """Concats of one scale, of two, and of a float, with the quantizer of the first behind all."""

    def __init__(self):
        super().__init__()
        self.quant, self.other = Rounds(0.1, 9, 4), Rounds(0.2, 3, 4)
        self.same, self.mixed, self.partly = Concat(), Concat(), Concat()

    def forward(self, x):
        left, right = self.quant(x), self.quant(x * 2.0)
        return self.quant(self.same(left, right)), self.quant(self.mixed(left, self.other(x))), self.quant(self.partly(left, x))


def test_a_concat_of_one_scale_copies_codes_and_is_not_quantized_again():
    check_pass(
        ToIntegerCodes(),
        traced(Joins()),
        X,
        before="""
            x = input
            quant = Rounds[u4](x)
            mul = mul(x, 2.0)
            quant@2 = Rounds[u4](mul)
            same = Concat(quant, quant@2)
            quant@3 = Rounds[u4](same)
            other = Rounds[u4](x)
            mixed = Concat(quant, other)
            quant@4 = Rounds[u4](mixed)
            partly = Concat(quant, x)
            quant@5 = Rounds[u4](partly)
            return (quant@3, quant@4, quant@5)
        """,
        after="""
            x = input
            quant = Quantize[4 bit](x)
            mul = mul(x, 2.0)
            quant@2 = Quantize[4 bit](mul)
            same = Concat(quant, quant@2)
            other = Quantize[4 bit](x)
            quant.values = Dequantize[4 bit](quant)
            other.values = Dequantize[4 bit](other)
            mixed = Concat(quant.values, other.values)
            quant@3 = Quantize[4 bit](mixed)
            quant.values@2 = Dequantize[4 bit](quant)
            partly = Concat(quant.values@2, x)
            quant@4 = Quantize[4 bit](partly)
            quant.values@3 = Dequantize[4 bit](same)
            quant.values@4 = Dequantize[4 bit](quant@3)
            quant.values@5 = Dequantize[4 bit](quant@4)
            return (quant.values@3, quant.values@4, quant.values@5)
        """,
        rewrites=6,
    )


class Shapes(nn.Module):
    """Something asks for the shape of what is quantized: before, by `.shape` and by `view_as`, and for its type."""

    def __init__(self):
        super().__init__()
        self.conv, self.quant, self.last = nn.Conv2d(4, 4, 1), Rounds(0.1, 9, 4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        z = self.quant(y)
        flat = z.flatten(2)
        return self.last(flat.unflatten(2, y.shape[2:])), flat.view_as(y), x.to(z.dtype)


def test_what_asks_for_a_shape_alone_asks_the_codes():
    check_pass(
        ToIntegerCodes(),
        traced(Shapes()),
        X,
        before="""
            x = input
            conv = Conv2d[4->4, k1, bias](x)
            quant = Rounds[u4](conv)
            flatten = quant.flatten(2)
            conv.shape = conv.shape
            conv.shape[2:] = conv.shape[2:]
            unflatten = flatten.unflatten(2, conv.shape[2:])
            last = Conv2d[4->4, k1, bias](unflatten)
            view_as = flatten.view_as(conv)
            quant.dtype = quant.dtype
            to = x.to(quant.dtype)
            return (last, view_as, to)
        """,
        after="""
            x = input
            conv = Conv2d[4->4, k1, bias](x)
            quant = Quantize[4 bit](conv)
            flatten = quant.flatten(2)
            quant.shape = quant.shape
            quant.shape[2:] = quant.shape[2:]
            unflatten = flatten.unflatten(2, quant.shape[2:])
            quant.values = Dequantize[4 bit](unflatten)
            last = Conv2d[4->4, k1, bias](quant.values)
            view_as = flatten.view_as(quant)
            quant.values@2 = Dequantize[4 bit](quant)
            quant.values@2.dtype = quant.values@2.dtype
            to = x.to(quant.values@2.dtype)
            quant.values@3 = Dequantize[4 bit](view_as)
            return (last, quant.values@3, to)
        """,
        rewrites=1,
    )


class Narrower(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.norm = Rounds(0.05, 20), Rounds(0.4, 3, 4), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.narrow(self.wide(x) * 0.5))


def test_leaves_a_product_with_a_number_and_a_second_quantizer_in_float():
    check_pass(
        ToIntegerCodes(),
        traced(Narrower()),
        X,
        before="""
            x = input
            wide = Rounds[u8](x)
            mul = mul(wide, 0.5)
            narrow = Rounds[u4](mul)
            norm = LayerNorm[(6,), eps=1e-05, elementwise_affine=True, bias=True](narrow)
            return norm
        """,
        after="""
            x = input
            wide = Quantize[8 bit](x)
            wide.values = Dequantize[8 bit](wide)
            mul = mul(wide.values, 0.5)
            narrow = Quantize[4 bit](mul)
            narrow.values = Dequantize[4 bit](narrow)
            norm = LayerNorm[(6,), eps=1e-05, elementwise_affine=True, bias=True](narrow.values)
            return norm
        """,
        rewrites=2,
    )


def test_leaves_a_graph_without_quantizers():
    check_pass(
        ToIntegerCodes(),
        nn.Sequential(nn.ReLU()),
        X,
        before="""
            input = input
            0 = ReLU(input)
            return 0
        """,
    )


@pytest.mark.parametrize("damage", ["scale", "zero", "code"])
def test_a_wrong_step_shows(damage):
    graph = traced(Read())
    with torch.no_grad():
        expected = graph(X)
        ToIntegerCodes()(graph)
        made = graph.get_submodule("quant")
        values = graph.get_submodule("quant.values")
        assert isinstance(values, Dequantize)
        if damage == "scale":
            values.scale *= 1.01
        elif damage == "zero":
            values.zero_point += 1
        else:
            made.highest -= 1
        assert not torch.equal(graph(X), expected)


def test_a_quantizer_that_is_left_is_an_error():
    class Keeps(ToIntegerCodes):
        def rewrite(self, graph):
            return 0

    with pytest.raises(PassError, match="quant is a quantizer still"):
        Keeps()(traced(Read()))
