"""Integer codes and the values they stand for, as modules: what a lowered graph has in the place of quantizers.

    codes = clip(nearest(x / scale) + zero_point, lowest, highest)      a division, which 1 / scale would not give
    x'    = (codes - zero_point) scale

Symmetric codes are int8, others uint8, and those of a bias int32. `OnCodes` runs on codes what torch has for floating numbers alone.
"""

import torch
from torch import Tensor, nn

from passes.spec import QuantSpec


def dtype_of(spec: QuantSpec) -> torch.dtype:
    return torch.int8 if spec.symmetric else torch.uint8


def nearest(levels: Tensor, odd: bool = False) -> Tensor:
    """Rounds in place to whole numbers, half to even, or to odd ones, half up."""
    return levels.div_(2).floor_().mul_(2).add_(1) if odd else levels.round_()


class _Steps(nn.Module):
    """Scale and zero point: of no axes, or one for each index of `axis`."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, axis: int | None) -> None:
        super().__init__()
        if scale.shape != zero_point.shape or scale.ndim != (axis is not None):
            raise ValueError(f"a scale {tuple(scale.shape)} and a zero point {tuple(zero_point.shape)} for axis {axis}")
        self.axis = axis
        self.register_buffer("scale", scale.detach().to(torch.float32))
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32))

    def spread(self, values: Tensor, dimensions: int) -> Tensor:
        """Values as `scale` has them, in the shape that meets a tensor of so many dimensions."""
        return values if self.axis is None else values.view([-1 if axis == self.axis else 1 for axis in range(dimensions)])


class Quantize(_Steps):
    """From values to codes."""

    def __init__(self, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> None:
        super().__init__(scale, zero_point, spec.channel_axis)
        self.spec = spec
        self.lowest, self.highest, self.dtype = spec.lowest, spec.highest, dtype_of(spec)

    def forward(self, x: Tensor) -> Tensor:
        # laid out as a quantizer that is trained leaves it: kernels of torch sum in an order that follows the layout
        last = x.ndim == 4 and self.axis is None and x.is_contiguous(memory_format=torch.channels_last)
        x = x if last else x.contiguous()
        levels = nearest(torch.div(x, self.spread(self.scale, x.ndim)), self.spec.odd)
        return levels.add_(self.spread(self.zero_point, x.ndim)).clamp_(self.lowest, self.highest).to(self.dtype)

    def extra_repr(self) -> str:
        return _described(self.spec, self.axis)


class Dequantize(_Steps):
    """From codes to values. Without a `spec` the codes are a bias's."""

    def __init__(self, scale: Tensor, zero_point: Tensor, axis: int | None, spec: QuantSpec | None) -> None:
        super().__init__(scale, zero_point, axis)
        self.spec = spec
        self.dtype = torch.int32 if spec is None else dtype_of(spec)

    def forward(self, codes: Tensor) -> Tensor:
        levels = codes.to(torch.int32) - self.spread(self.zero_point, codes.ndim)
        return levels.to(torch.float32).mul_(self.spread(self.scale, codes.ndim))

    def extra_repr(self) -> str:
        return _described(self.spec, self.axis)


class OnCodes(nn.Module):
    """A module that picks among its inputs, such as a pool, run on codes: torch may have it for floating numbers alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, codes: Tensor) -> Tensor:
        picked: Tensor = self.module(codes.to(torch.float32))
        return picked.to(codes.dtype)

    def extra_repr(self) -> str:
        return type(self.module).__name__


def _described(spec: QuantSpec | None, axis: int | None) -> str:
    of = "bias" if spec is None else f"{spec.bits} bit{', symmetric' if spec.symmetric else ''}{', odd' if spec.odd else ''}"
    return of if axis is None else f"{of}, axis {axis}"
