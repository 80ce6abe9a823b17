"""The convolution that trains folded: against convolution and BatchNorm apart, at gamma = 0, and with statistics that stay."""

import copy

import pytest
import torch
from checks import randomise
from torch import nn

from crqat_fx.errors import UserError
from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.fake_quant import fake_quantizer
from passes.spec import QuantSpec


class Halves(nn.Module):
    """Rounds to halves, and lets gradients through: a quantizer that needs no calibration."""

    def forward(self, x, factor=None):
        if factor is not None:
            wide = factor.view(-1, 1, 1, 1)
            return self(x * wide) / wide
        return x + ((x * 2).round() / 2 - x).detach()


def pair(**options):
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(4, 6, 3, padding=1, **options), nn.BatchNorm2d(6, eps=1e-3, momentum=0.3)
    randomise(nn.Sequential(conv, bn))
    with torch.no_grad():
        conv.weight.mul_(8)
    return conv, bn


def quantized(**options):
    conv, bn = pair(**options)
    module = ConvBn2d(conv, bn)
    module.weight_fake_quant = Halves()
    return module


def picture(seed=1):
    return torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{"bias": False}, {"bias": True}, {"bias": False, "groups": 2, "stride": 2}])
def test_float_it_computes_what_convolution_and_norm_compute_and_keeps_the_same_statistics(options):
    conv, bn = pair(**options)
    module = ConvBn2d(copy.deepcopy(conv), copy.deepcopy(bn))
    x = picture()
    for mode in (True, False):
        for each in (module, conv, bn):
            each.train(mode)
        torch.testing.assert_close(module(x), bn(conv(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.bn.running_mean, bn.running_mean)
    torch.testing.assert_close(module.bn.running_var, bn.running_var)
    assert int(module.bn.num_batches_tracked) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_evaluation_is_one_convolution_with_the_folded_weight_quantized(bias):
    module = quantized(bias=bias).eval()
    bn = module.bn
    factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    weight = ((module.weight * factor.view(-1, 1, 1, 1)) * 2).round() / 2
    before = 0 if module.bias is None else module.bias
    shift = bn.bias + factor * (before - bn.running_mean)
    x = picture()
    torch.testing.assert_close(module(x), nn.functional.conv2d(x, weight, shift, padding=1), rtol=1e-5, atol=1e-5)
    folded_weight, folded_bias = module.folded()
    assert torch.equal(folded_weight, weight)
    assert torch.equal(module(x), nn.functional.conv2d(x, folded_weight, folded_bias, padding=1))


def test_training_normalises_what_the_quantized_folded_weight_gives():
    module = quantized(bias=False).train()
    x = picture()
    factor = (module.bn.weight / torch.sqrt(module.bn.running_var + module.bn.eps)).view(-1, 1, 1, 1).detach()
    weight = ((module.weight.detach() * factor) * 2).round() / 2 / factor
    y = nn.functional.conv2d(x, weight, padding=1)
    expected = (y - y.mean((0, 2, 3), keepdim=True)) / torch.sqrt(y.var((0, 2, 3), unbiased=False, keepdim=True) + module.bn.eps)
    expected = expected * module.bn.weight.view(-1, 1, 1) + module.bn.bias.view(-1, 1, 1)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, None])
def test_training_learns_as_the_folded_weight_quantized_and_unfolded_does(axis):
    module = ConvBn2d(*pair(bias=False)).train()
    quantizer = fake_quantizer(QuantSpec(4, True, axis), observer="minmax", weight=True)()
    factor = (module.bn.weight / torch.sqrt(module.bn.running_var + module.bn.eps)).detach().view(-1, 1, 1, 1)
    quantizer.observe(module.weight.detach() * factor)
    quantizer.initialise()
    quantizer.log_scale.data -= 0.5  # some is clipped
    apart = copy.deepcopy(module), copy.deepcopy(quantizer)
    module.weight_fake_quant = quantizer
    (module(picture()) * picture(2)[:, :1]).sum().backward()
    other, rounds = apart
    weight = rounds(other.weight * factor) / factor
    (other.bn(nn.functional.conv2d(picture(), weight, padding=1)) * picture(2)[:, :1]).sum().backward()
    found, expected = (module.weight.grad, quantizer.log_scale.grad), (other.weight.grad, rounds.log_scale.grad)
    for own, defined in zip(found, expected, strict=True):
        assert defined.abs().max() > 1e-4
        torch.testing.assert_close(own, defined, rtol=1e-4, atol=1e-6 * defined.abs().max().item())


def test_gamma_of_zero_gives_finite_numbers_and_gradients_and_can_be_left_again():
    module = quantized(bias=False).train()
    with torch.no_grad():
        module.bn.weight[:2] = 0
    for frozen in (False, True):
        module.frozen = frozen
        module.zero_grad()
        x = picture().requires_grad_()
        y = module(x)
        (y * picture(2)[:, :1]).sum().backward()
        for value in (y, x.grad, module.weight.grad, module.bn.weight.grad, module.bn.bias.grad):
            assert torch.isfinite(value).all()
        assert (module.bn.weight.grad[:2] != 0).all()
    assert torch.isfinite(module.bn.running_var).all()
    assert (module.bn.running_var[:2] > 0.1).all()  # of the float weight's output, not of zeros


def test_frozen_statistics_stay_and_are_used_also_after_train():
    module = quantized(bias=False)
    module.frozen = True
    before = copy.deepcopy(module.bn.state_dict())
    x = picture()
    evaluated = module.eval()(x)
    module.train()
    for _ in range(3):
        assert torch.equal(module(x), evaluated)
    assert all(torch.equal(value, before[name]) for name, value in module.bn.state_dict().items())
    module.frozen = False
    module(x)
    assert not torch.equal(module.bn.running_mean, before["running_mean"])


def test_frozen_the_norm_is_still_trained_through_the_fold():
    module = quantized(bias=False).train()
    module.frozen = True
    module(picture()).square().sum().backward()
    for parameter in (module.weight, module.bn.weight, module.bn.bias):
        assert parameter.grad.abs().sum() > 0


def test_a_norm_without_running_statistics_is_refused():
    with pytest.raises(UserError, match="track_running_stats=True"):
        ConvBn2d(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))


def test_a_norm_without_its_own_scale_folds_too():
    conv, bn = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)
    randomise(nn.Sequential(conv, bn))
    module = ConvBn2d(conv, bn).eval()
    x = picture()
    torch.testing.assert_close(module(x), bn.eval()(conv(x)), rtol=1e-5, atol=1e-5)
