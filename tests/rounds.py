"""A quantizer whose steps a test chooses, written out as plain arithmetic: what passes over quantized graphs are tried on."""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from crqat_fx.trace import LEAVES, trace_unproved
from passes.spec import QuantSpec


class Rounds(nn.Module):
    is_quantizer = True

    def __init__(self, scale: float | list[float], zero: int = 0, bits: int = 8, axis: int | None = None, symmetric: bool = False) -> None:
        super().__init__()
        self.spec = QuantSpec(bits, symmetric, axis)
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_points", torch.full_like(self.scale, zero, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        around = [-1 if axis == self.spec.channel_axis else 1 for axis in range(x.ndim)]
        one = self.spec.channel_axis is None
        scale, zero = (each if one else each.view(around) for each in (self.scale, self.zero_points))
        level = torch.clamp(torch.round(x / scale), self.spec.lowest - zero, self.spec.highest - zero)
        return level * scale

    def extra_repr(self) -> str:
        return f"{'s' if self.spec.symmetric else 'u'}{self.spec.bits}"


def traced(model: nn.Module, *leaves: type[nn.Module]) -> GraphModule:
    """The model in evaluation as a graph, in which quantizers, and what a YOLO-World keeps whole, are one node; other `leaves` too."""
    return trace_unproved(model.eval(), (*LEAVES, Rounds, *leaves))
