"""What learning does to quantizers: scale, zero point, the share of values that are clipped, of weights the share of codes a step flips.

An activation's share is of what runs through in the step that is watched; a weight's is of its codes before and after it, folded as an
export stores them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.prepared import Prepared
from passes.fx.codes import nearest


@contextmanager
def watching(prepared: Prepared) -> Iterator[dict[str, float]]:
    """Watches what happens in the block, one step of training; fills what it yields at the block's end.

    A quantizer's numbers are `scale/<name>`, `zero_point/<name>`, `clipped/<name>` and, of a weight, `flipped/<name>`; the mean over what
    has several scales.
    """
    found: dict[str, float] = {}
    watched = {name: each for name, each in prepared.quantizers().items() if each.enabled}
    names = {each: name for name, each in watched.items()}
    clipped: dict[str, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, FakeQuantize)
        clipped[names[module]] = codes_of(module, *inputs)[1]

    hooks = [each.register_forward_pre_hook(look) for each in watched.values() if not each.weight]
    before = weight_codes(prepared)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    after = weight_codes(prepared)
    for name, (_, outside) in after.items():
        clipped[name] = outside
    for name, each in watched.items():
        found[f"scale/{name}"] = float(each.scale.detach().mean())
        if each.shifts:
            found[f"zero_point/{name}"] = float(each.zero_points.float().mean())
        if name in clipped:
            found[f"clipped/{name}"] = float(clipped[name])
        if name in after:
            found[f"flipped/{name}"] = float((after[name][0] != before[name][0]).float().mean())


@torch.no_grad()
def weight_codes(prepared: Prepared) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every weight whose quantizer is on, the codes and the share of them that is clipped."""
    names = {each: name for name, each in prepared.quantizers().items() if each.enabled and each.weight}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, FakeQuantize)
        found[names[module]] = codes_of(module, *inputs)

    hooks = [each.register_forward_pre_hook(look) for each in names]
    try:
        for module in prepared.graph.modules():
            quantizer = getattr(module, "weight_fake_quant", None)
            if quantizer not in names:
                continue
            if isinstance(module, ConvBn2d):
                module.folded()
            else:
                quantizer(module.weight)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def codes_of(quantizer: FakeQuantize, x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The codes of what a quantizer is called with, and the share of them that its ends clip."""
    axis = quantizer.spec.channel_axis

    def along(value: Tensor) -> Tensor:
        return value if axis is None else value.view([-1 if each == axis else 1 for each in range(x.ndim)])

    scaled = x.float() if factor is None else x.float() * along(factor)
    codes = nearest(scaled / along(quantizer.scale), quantizer.spec.odd) + along(quantizer.zero_points)
    inside = codes.clamp(quantizer.quant_min, quantizer.quant_max)
    return inside.to(torch.int16), (codes != inside).float().mean()
