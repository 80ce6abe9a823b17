"""Biases as integer kernels have them: whole numbers of the steps of the product that they are added to.

    b' = round(b / (s_x s_w)) s_x s_w          of a layer: s_x is the step of the codes that it reads, s_w its weight's, one a channel
    b' = round(b / (s_x s_h c)) s_x s_h c      of max-similarity attention: s_h is its guide's step of a head, c what it is scaled by

So in evaluation, and in training wherever statistics are frozen; the gradient of b' is b's. Where norms are trained there is no bias yet
that an export would store: it stays as it is. So it does where the quantizers of x or of the weight are off, or x has none.

A channel whose |b| is more than 2^30 of its steps is dead, its weight nothing beside its bias: s_w is raised until the bias fits, and the
weight rounded anew.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn import qat

from crqat_fx.quantize.fake_quant import FakeQuantize
from passes.fx.codes import nearest
from passes.fx.lower_layers import LARGEST_BIAS, raised_scale


@dataclass(frozen=True)
class Source:
    """The quantizer that a value was rounded by, to one step, and the numbers that it was multiplied with since."""

    quantizer: FakeQuantize
    factors: tuple[float, ...] = ()

    def step(self) -> Tensor | None:
        """None where the quantizer is off."""
        if not _is_on(self.quantizer):
            return None
        step = self.quantizer.scale.detach()
        for factor in self.factors:
            step = step * factor
        return step


class IntegerBias(nn.Module):
    """What layers that round their weight have in common. `source` is held, and is no part of the layer: the graph calls it."""

    frozen = False  # as in evaluation, whatever the mode
    source: Source | None = None
    weight: Tensor
    bias: Tensor | None
    weight_fake_quant: nn.Module | None

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """The weight, rounded, and the bias, which is not."""
        return self.weight if self.weight_fake_quant is None else self.weight_fake_quant(self.weight), self.bias

    def used(self) -> tuple[Tensor, Tensor | None]:
        """What a layer without a norm computes with in its mode."""
        return self.folded() if self.training and not self.frozen else self.stored()

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as an integer kernel has them, and evaluation computes with."""
        weight, bias = self.folded()
        step = self.step()
        if bias is None or step is None:
            return weight, bias
        with torch.no_grad():
            scale, raised = self._scale(), self.weight_scale(bias)
            steps = step * raised
            whole = torch.round(bias / steps) * steps
            dead = raised > scale
        if dead.device.type != "cpu" or dead.any():  # elsewhere, asking would wait for the device
            dead, raised = (each.view(-1, *[1] * (weight.dim() - 1)) if each.ndim else each for each in (dead, raised))
            weight = torch.where(dead, nearest(weight.detach() / raised, self._quantizer().spec.odd) * raised, weight)
        return weight, _straight_through(whole, bias)

    def step(self) -> Tensor | None:
        """Of the codes that the layer reads; None where its product has no steps for a bias."""
        quantizer = self.weight_fake_quant
        if self.source is None or not isinstance(quantizer, FakeQuantize) or not _is_on(quantizer):
            return None
        return self.source.step() if quantizer.spec.channel_axis in (None, 0) else None

    def weight_scale(self, bias: Tensor | None) -> Tensor:
        """Of the weight as it is stored, one a channel or one for all."""
        scale, step = self._scale(), self.step()
        return scale if bias is None or step is None else raised_scale(scale, bias.detach(), step)

    def _scale(self) -> Tensor:
        return self._quantizer().scale.detach()

    def _quantizer(self) -> FakeQuantize:
        assert isinstance(self.weight_fake_quant, FakeQuantize)  # who asks has looked
        return self.weight_fake_quant


class Conv2d(IntegerBias, qat.Conv2d):
    """A convolution that rounds its weight."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self._conv_forward(x, *self.used())
        return made


class Linear(IntegerBias, qat.Linear):  # type: ignore[misc]  # torch types its bias as always there
    """A linear layer that rounds its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.used())


class HeadBias(nn.Module):
    """Rounds the bias of max-similarity attention, [heads, 1]. One that has no 32-bit code in its steps stays as it is."""

    is_quantizer: ClassVar[bool] = True
    rounds_bias: ClassVar[bool] = True
    frozen = False

    def __init__(self, guide: FakeQuantize, source: Source, factor: float) -> None:
        super().__init__()
        self.read = guide, source, factor  # in a tuple: the quantizers are no part of this

    def steps(self) -> Tensor | None:
        """Of the product, one a head; None where a quantizer is off."""
        guide, source, factor = self.read
        step = source.step()
        return step * guide.scale.detach() * factor if step is not None and _is_on(guide) else None

    def forward(self, bias: Tensor) -> Tensor:
        steps = self.steps() if not self.training or self.frozen else None
        if steps is None or bias.shape != (len(steps), 1):
            return bias
        with torch.no_grad():
            levels = bias / steps.unsqueeze(1)
            whole = torch.where((levels.abs() <= LARGEST_BIAS).all(), torch.round(levels) * steps.unsqueeze(1), bias)
        return _straight_through(whole, bias)


def _is_on(quantizer: FakeQuantize) -> bool:
    return quantizer.enabled and quantizer.initialised


def _straight_through(value: Tensor, learned: Tensor) -> Tensor:
    """A value, to the last bit, whose gradient goes to what is learned."""
    return value + (learned - learned.detach())
