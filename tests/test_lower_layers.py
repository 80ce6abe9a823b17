"""Layers as functions of codes: what is stored, the bias's steps, and everything whose bias or weight stays float."""

import logging

import pytest
import torch
import torch.nn.functional as F
from checks import check_pass
from rounds import Rounds, traced
from torch import nn
from torch.fx import symbolic_trace

from passes.base import PassError
from passes.fx.codes import Dequantize
from passes.fx.graph import format_graph
from passes.fx.lower_layers import LARGEST_BIAS, LowerLayers
from passes.fx.to_integer_codes import ToIntegerCodes

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Learned(nn.Conv2d):
    """A convolution that rounds its weight."""

    def __init__(self, *sizes, scale=(0.05, 0.1, 0.2), axis=0, **options):
        super().__init__(*sizes, **options)
        self.weight_fake_quant = Rounds(list(scale) if axis == 0 else scale, 0, 4, axis, symmetric=True)

    def forward(self, x):
        return self._conv_forward(x, self.weight_fake_quant(self.weight), self.bias)


class Reads(nn.Module):
    def __init__(self, layer, between=None, **steps):
        super().__init__()
        self.quant, self.conv = Rounds(**(steps or {"scale": 0.02, "zero": 100})), layer
        self.between = between or (lambda x: x)

    def forward(self, x):
        return self.conv(self.between(self.quant(x)))


def lowered(model):
    """With the quantizers of activations as codes; a layer is one node."""
    graph = traced(model, Learned)
    ToIntegerCodes()(graph)
    return graph


def test_a_layer_that_is_not_quantized_keeps_its_floats():
    check_pass(
        LowerLayers(),
        nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False), nn.Flatten(2), nn.Linear(9, 5)),
        X,
        before="""
            input = input
            0 = Conv2d[4->6, k3, s2, p1, g2](input)
            1 = Flatten[start_dim=2, end_dim=-1](0)
            2 = Linear[9->5, bias](1)
            return 2
        """,
        after="""
            input = input
            0.weight = Tensor[6, 2, 3, 3]
            0.conv2d = conv2d(input, 0.weight, None, (2, 2), (1, 1), (1, 1), 2)
            1 = Flatten[start_dim=2, end_dim=-1](0.conv2d)
            2.weight = Tensor[5, 9]
            2.bias = Tensor[5]
            2.linear = linear(1, 2.weight, 2.bias)
            return 2.linear
        """,
        rewrites=2,
    )


def test_a_quantized_layer_stores_codes_of_its_weight_and_of_its_bias():
    torch.manual_seed(0)
    model = Reads(Learned(4, 3, 3, padding=1))
    graph = lowered(model)
    assert LowerLayers()(graph).rewrites == 1
    assert (
        format_graph(graph)
        == """x = input
quant = Quantize[8 bit](x)
quant.values = Dequantize[8 bit](quant)
conv.weight_codes = Tensor[3, 4, 3, 3]
conv.weight = Dequantize[4 bit, symmetric, axis 0](conv.weight_codes)
conv.bias_codes = Tensor[3]
conv.bias = Dequantize[bias, axis 0](conv.bias_codes)
conv.conv2d = conv2d(quant.values, conv.weight, conv.bias, (1, 1), (1, 1), (1, 1), 1)
return conv.conv2d"""
    )
    layer, store = model.conv, graph.get_submodule("conv")
    scales = layer.weight_fake_quant.scale
    assert store.weight_codes.dtype == torch.int8
    assert torch.equal(store.weight_codes.float(), torch.clamp(torch.round(layer.weight / scales.view(-1, 1, 1, 1)), -8, 7))
    grid = torch.tensor(0.02) * scales
    assert store.bias_codes.dtype == torch.int32
    assert torch.equal(store.bias_codes, torch.round(layer.bias / grid).int())
    with torch.no_grad():
        layer.bias.copy_(torch.round(layer.bias / grid) * grid)
        assert torch.equal(graph(X), model(X))
    assert LowerLayers()(graph).rewrites == 0


def test_the_number_between_codes_and_layer_counts_into_the_biass_steps():
    model = Reads(Learned(4, 3, 1), between=lambda x: x * 0.25)
    graph = lowered(model)
    LowerLayers()(graph)
    assert torch.equal(graph.get_submodule("conv.bias").scale, torch.tensor(0.02) * 0.25 * model.conv.weight_fake_quant.scale)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Reads(Learned(4, 3, 1), between=lambda x: x * -0.25), "a negative number"),
        (Reads(Learned(4, 3, 1), between=torch.relu), "a function between"),
        (Reads(Learned(4, 3, 1), scale=[0.1, 0.2, 0.1, 0.3], axis=1), "several scales"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bias_stays_float_where_its_input_has_not_one_step(model, why, caplog):
    graph = lowered(model)
    with caplog.at_level(logging.DEBUG, "passes.fx.lower_layers"), torch.no_grad():
        LowerLayers()(graph)
        assert torch.equal(graph(X), model(X)), why
    store = graph.get_submodule("conv")
    assert torch.equal(store.bias, model.conv.bias)
    assert store.weight_codes.dtype == torch.int8
    assert "left the bias of conv in float" in caplog.text


def test_a_scale_for_the_whole_weight_serves_every_bias():
    model = Reads(Learned(4, 3, 1, scale=0.1, axis=None))
    graph = lowered(model)
    LowerLayers()(graph)
    assert graph.get_submodule("conv.weight").axis is None
    assert graph.get_submodule("conv.bias").scale.tolist() == [pytest.approx(0.002)] * 3


def test_a_dead_channels_scale_is_raised_until_its_bias_fits():
    torch.manual_seed(0)
    layer = Learned(4, 3, 1, scale=(0.1, 1e-12, 0.1))
    with torch.no_grad():
        layer.weight[1] *= 1e-11
        layer.bias.copy_(torch.tensor([0.5, -0.7, 0.1]))
    model = Reads(layer)
    graph = lowered(model)
    with torch.no_grad():
        LowerLayers()(graph)
        scale = graph.get_submodule("conv.weight").scale
        assert scale.tolist() == [pytest.approx(0.1), pytest.approx(0.7 / (0.02 * LARGEST_BIAS)), pytest.approx(0.1)]
        assert graph.get_submodule("conv").bias_codes[1] == -LARGEST_BIAS
        torch.testing.assert_close(graph(X)[:, 1], model(X)[:, 1], rtol=1e-6, atol=0)


def test_a_bias_that_is_not_finite_is_refused():
    layer = Learned(4, 3, 1)
    layer.bias.data[1] = torch.nan
    with pytest.raises(PassError, match="the bias of conv is not finite"):
        LowerLayers()(lowered(Reads(layer)))


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        (nn.Conv2d(4, 3, 3, padding="same"), "conv2d(input, 0.weight, 0.bias, (1, 1), (1, 1), (1, 1), 1)"),
        (nn.Conv2d(4, 3, 3, padding="valid", dilation=2), "conv2d(input, 0.weight, 0.bias, (1, 1), (0, 0), (2, 2), 1)"),
        (nn.Conv2d(4, 3, (1, 3), padding=(0, 1)), "conv2d(input, 0.weight, 0.bias, (1, 1), (0, 1), (1, 1), 1)"),
        (nn.Conv2d(4, 3, 2, padding="same"), "conv2d(0.pad, 0.weight, 0.bias, (1, 1), (0, 0), (1, 1), 1)"),
        (nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), "conv2d(0.pad, 0.weight, 0.bias, (1, 1), (0, 0), (1, 1), 1)"),
    ],
    ids=["same", "valid", "two sides", "uneven", "reflect"],
)
def test_padding_is_in_numbers_and_what_these_do_not_know_is_a_node(layer, line):
    graph = symbolic_trace(nn.Sequential(layer).eval())
    with torch.no_grad():
        expected = graph(X)
        LowerLayers()(graph)
        assert line in format_graph(graph)
        assert torch.equal(graph(X), expected)


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_leaves_other_layers_subclasses_and_layers_with_hooks(caplog):
    hooked = nn.Conv2d(4, 4, 1)
    hooked.register_forward_hook(lambda module, args, result: result * 3)
    with caplog.at_level(logging.DEBUG, "passes.fx.lower_layers"):
        check_pass(
            LowerLayers(),
            traced(nn.Sequential(Own(4, 4, 1), hooked, nn.ConvTranspose2d(4, 4, 2)), Own),
            X,
            before="""
                input = input
                0 = Own[4->4, k1, bias](input)
                1 = Conv2d[4->4, k1, bias](0)
                2 = ConvTranspose2d[4, 4, kernel_size=(2, 2), stride=(1, 1)](1)
                return 2
            """,
        )
    assert "left 0: a Own of its own" in caplog.text
    assert "left 1: a Conv2d with hooks" in caplog.text


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(self.layer(x)) + self.layer.weight.sum()


def test_a_layer_called_twice_and_read_beside_has_one_weight():
    check_pass(
        LowerLayers(),
        Twice(nn.Conv2d(4, 4, 1)),
        X,
        before="""
            x = input
            layer = Conv2d[4->4, k1, bias](x)
            layer@2 = Conv2d[4->4, k1, bias](layer)
            layer.weight = Parameter[4, 4, 1, 1]
            sum = layer.weight.sum()
            add = add(layer@2, sum)
            return add
        """,
        after="""
            x = input
            layer.weight = Tensor[4, 4, 1, 1]
            layer.bias = Tensor[4]
            layer.conv2d = conv2d(x, layer.weight, layer.bias, (1, 1), (0, 0), (1, 1), 1)
            layer.weight@2 = Tensor[4, 4, 1, 1]
            layer.bias@2 = Tensor[4]
            layer.conv2d@2 = conv2d(layer.conv2d, layer.weight@2, layer.bias@2, (1, 1), (0, 0), (1, 1), 1)
            layer.weight@3 = Tensor[4, 4, 1, 1]
            sum = layer.weight@3.sum()
            add = add(layer.conv2d@2, sum)
            return add
        """,
        rewrites=2,
    )


def test_refuses_codes_of_a_weight_that_is_read_beside_its_layer():
    with pytest.raises(PassError, match=r"layer\.weight is read beside the layer"):
        LowerLayers()(traced(Twice(Learned(4, 3, 1)), Learned))


@pytest.mark.parametrize("damage", ["weight", "bias", "scale"])
def test_one_changed_code_or_scale_shows(damage):
    graph = lowered(Reads(Learned(4, 3, 3)))
    with torch.no_grad():
        LowerLayers()(graph)
        expected = graph(X)
        store, values = graph.get_submodule("conv"), graph.get_submodule("conv.weight")
        assert isinstance(values, Dequantize)
        if damage == "scale":
            values.scale *= 1.01
        else:
            codes = store.get_buffer(f"{damage}_codes")
            codes.view(-1)[0] += 1
        assert not torch.equal(graph(X), expected)


def test_a_linear_layer_computes_what_it_did():
    graph = symbolic_trace(nn.Sequential(nn.Linear(6, 3)).eval())
    with torch.no_grad():
        expected = graph(X)
        LowerLayers()(graph)
        assert torch.equal(graph(X), expected)
        assert any(node.target is F.linear for node in graph.graph.nodes)
