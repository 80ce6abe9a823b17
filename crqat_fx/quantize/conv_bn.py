"""A convolution and the BatchNorm behind it as one module, so that the weight that is quantized is the one an export stores.

    k = r gamma / sqrt(running variance + eps)
    frozen, or evaluation:   y = conv(x, Q(k W)) + R(beta + t + k (b - running mean))   the folded convolution, number by number
    training statistics:     y = BatchNorm(conv(x, Q(k W) / k) + b)                     one convolution; the batch's statistics

R is what an integer kernel does to a bias (`crqat_fx.quantize.integer_bias`). A channel whose gamma is 0 is learned through its float
weight while statistics are trained: there is nothing to divide by, and an export stores zeros for it whichever weight was taken (of odd
codes, next to nothing). `frozen` statistics stay as they are, also after `.train()`.

`ratio` r and `shift` t, one a channel, correct what quantization did to a channel's deviation and mean (`crqat_fx.correct_norms`): 1 and 0
unless they were set, and while the weight's quantizer is off.
"""

from typing import Self

import torch
from torch import Tensor, nn

from crqat_fx.errors import UserError
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.integer_bias import IntegerBias


class ConvBn2d(IntegerBias, nn.Conv2d):
    """Conv2d and BatchNorm2d; without a `weight_fake_quant` it is float."""

    ratio: Tensor
    shift: Tensor

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        """Takes over the parameters of both."""
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]  # torch types it as any tuple
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",  # the weight is there already: none is drawn
        )
        if bn.running_mean is None or bn.running_var is None:
            raise UserError(
                "a BatchNorm2d without running statistics follows a convolution: it cannot be folded",
                where="the model",
                remedy="give it track_running_stats=True",
            )
        self.weight, self.bias = conv.weight, conv.bias
        self.bn = bn
        self.weight_fake_quant = None
        self.register_buffer("ratio", torch.ones_like(bn.running_mean))
        self.register_buffer("shift", torch.zeros_like(bn.running_mean))
        self.train(conv.training)

    @classmethod
    def fuse(cls, is_qat: bool, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> "ConvBn2d":
        """What torch.ao calls to fuse."""
        return cls(conv, bn)

    @classmethod
    def from_float(cls, module: Self) -> Self:
        """What torch.ao calls on a fused module whose `qconfig` says how to quantize its weight."""
        learning = cls(module, module.bn)
        learning.weight_fake_quant = module.qconfig.weight()  # type: ignore[operator,union-attr]  # torch.ao puts it there
        return learning

    def folded(self) -> tuple[Tensor, Tensor]:
        """The weight, quantized, and the bias, which evaluation and an export then round."""
        factor = self._factor()
        mean = self.bn.get_buffer("running_mean")
        shift = -mean if self.bias is None else self.bias - mean
        bias = shift * factor
        if self.bn.bias is not None:
            bias = bias + self.bn.bias
        return self._quantized(self._spread(factor) * self.weight), bias + self.shift if self.rounds else bias

    @property
    def rounds(self) -> bool:
        """Whether the weight is rounded now."""
        return isinstance(self.weight_fake_quant, FakeQuantize) and self.weight_fake_quant.enabled

    @property
    def correctable(self) -> bool:
        """Whether the weight has a scale for each channel, which can follow."""
        quantizer = self.weight_fake_quant
        return isinstance(quantizer, FakeQuantize) and quantizer.log_scale is not None and quantizer.spec.channel_axis == 0

    @torch.no_grad()
    def correct(self, ratio: Tensor, shift: Tensor) -> None:
        """Sets what corrects the rounded layer. The weight keeps its codes: its scales move with the ratio."""
        quantizer = self.weight_fake_quant
        assert isinstance(quantizer, FakeQuantize)  # who corrects has asked whether it can
        assert quantizer.log_scale is not None
        quantizer.log_scale.add_(torch.log(ratio / self.ratio))
        self.ratio.copy_(ratio)
        self.shift.copy_(shift)

    def uncorrect(self) -> None:
        if self.corrected:
            self.correct(torch.ones_like(self.ratio), torch.zeros_like(self.shift))

    @property
    def corrected(self) -> bool:
        return bool((self.ratio != 1).any() or (self.shift != 0).any())

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.frozen:
            folded: Tensor = self._conv_forward(x, *self.stored())
            return folded
        weight = self.weight if self.weight_fake_quant is None else self._measured_in_factors()
        normalised: Tensor = self.bn(self._conv_forward(x, weight, self.bias))
        return normalised

    def _measured_in_factors(self) -> Tensor:
        """Q(k W) / k. No gradient flows through k: it is what the weight is measured in, and all that is left of it is a rounding error."""
        with torch.no_grad():
            factor = self._factor()
        if factor.device.type == "cpu" and factor.all():  # elsewhere, asking would wait for the device
            return self._quantized(self.weight, factor)
        none = factor == 0
        return torch.where(self._spread(none), self.weight, self._quantized(self.weight, factor.masked_fill(none, 1)))

    def _factor(self) -> Tensor:
        """k, one a channel."""
        deviation = torch.sqrt(self.bn.get_buffer("running_var") + self.bn.eps)
        factor = deviation.reciprocal() if self.bn.weight is None else self.bn.weight / deviation
        return factor * self.ratio if self.rounds else factor

    def _spread(self, factor: Tensor) -> Tensor:
        return factor.view(-1, *[1] * (self.weight.dim() - 1))

    def _quantized(self, weight: Tensor, factor: Tensor | None = None) -> Tensor:
        if self.weight_fake_quant is None:
            return weight
        quantized: Tensor = self.weight_fake_quant(weight, factor)
        return quantized
