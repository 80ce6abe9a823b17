"""Quantize and Dequantize against plain arithmetic, at the ends of the codes and at ties."""

import pytest
import torch
from rounds import Rounds
from torch import nn

from crqat_fx.quantize.fake_quant import fake_quantizer
from passes.fx.codes import Dequantize, OnCodes, Quantize
from passes.spec import QuantSpec

U4, S4, ODD2, ODD3 = QuantSpec(4), QuantSpec(4, symmetric=True), QuantSpec(2, symmetric=True, odd=True), QuantSpec(3, True, odd=True)


def steps(scale, zero=0):
    return torch.tensor(scale), torch.full_like(torch.tensor(scale), zero, dtype=torch.int32)


@pytest.mark.parametrize(
    ("spec", "zero", "dtype", "codes"),
    [
        (U4, 5, torch.uint8, [0, 0, 3, 4, 5, 5, 7, 7, 15, 15]),
        (S4, 0, torch.int8, [-8, -8, -2, -1, 0, 0, 2, 2, 7, 7]),
        (ODD2, 0, torch.int8, [-3, -3, -1, -1, -1, 1, 1, 3, 3, 3]),
        (ODD3, 0, torch.int8, [-7, -7, -1, -1, -1, 1, 1, 3, 7, 7]),
    ],
)
def test_codes_are_rounded_half_to_even_or_to_odd_and_clipped(spec, zero, dtype, codes):
    x = torch.tensor([-1e9, -20.0, -2.0, -1.1, -0.5, 0.5, 1.5, 2.5, 20.0, 1e9])
    got = Quantize(*steps(1.0, zero), spec)(x)
    assert got.dtype == dtype
    assert got.tolist() == codes


def test_x_is_divided_by_the_scale_and_not_multiplied_with_its_inverse():
    scale = torch.tensor(0.3)
    x = (torch.arange(0, 255, dtype=torch.float32) + 0.5) * scale
    by_division, by_product = torch.round(x / scale), torch.round(x * (1 / scale))
    assert not torch.equal(by_division, by_product)  # else nothing could be told
    assert torch.equal(Quantize(scale, torch.tensor(0, dtype=torch.int32), QuantSpec(8))(x).float(), by_division)


@pytest.mark.parametrize(("axis", "symmetric"), [(None, False), (None, True), (0, True), (1, False), (1, True)])
def test_values_of_codes_are_what_a_quantizer_gives_and_have_the_same_codes_again(axis, symmetric):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 50)
    rounds = Rounds(0.37 if axis is None else [0.11, 0.37, 0.05], 0 if symmetric else 3, 4, axis, symmetric)
    quantize = Quantize(rounds.scale, rounds.zero_points, rounds.spec)
    dequantize = Dequantize(rounds.scale, rounds.zero_points, axis, rounds.spec)
    values = dequantize(quantize(x))
    assert torch.equal(values, rounds(x))
    assert torch.equal(quantize(values), quantize(x))
    assert len(values.unique()) > 10


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("change", ["contiguous", "channels_last", "transposed", "sliced"])
def test_codes_are_laid_out_as_the_trained_quantizer_leaves_values(axis, change):
    x = torch.randn(2, 4, 5, 6)
    laid = {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3),
        "sliced": x.to(memory_format=torch.channels_last)[:, :2],
    }[change]
    spec = QuantSpec(8, axis is not None, axis)
    quantizer = fake_quantizer(spec, weight=False)()
    quantizer.observe(laid)
    quantizer.initialise()
    with torch.no_grad():
        assert Quantize(quantizer.scale, quantizer.zero_points, spec)(laid).stride() == quantizer(laid).stride()


def test_the_codes_of_a_bias_need_no_spec():
    dequantize = Dequantize(*steps([0.5, 0.25]), 0, None)
    assert dequantize.dtype == torch.int32
    assert dequantize(torch.tensor([[2**29], [-3]], dtype=torch.int32)).tolist() == [[2.0**28], [-0.75]]


def test_steps_that_do_not_fit_the_axis_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\).*axis None"):
        Quantize(*steps([1.0, 2.0]), U4)
    with pytest.raises(ValueError, match="axis 0"):
        Dequantize(*steps(1.0), 0, None)


def test_a_pool_on_codes_pools_what_they_stand_for():
    x = torch.randint(-8, 8, (1, 2, 6, 6), dtype=torch.int8)
    pooled = OnCodes(nn.AdaptiveMaxPool2d(2))(x)
    assert pooled.dtype == torch.int8
    assert torch.equal(pooled.float(), nn.AdaptiveMaxPool2d(2)(x.float()))
