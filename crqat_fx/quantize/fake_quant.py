"""Learnable quantizers as modules: LSQ (symmetric), LSQ+ (asymmetric, a learned whole zero point), PACT, and a scale that is fixed.

    code = clip(nearest(x / s) + z, lowest, highest),   value = (code - z) s        nearest: a whole number, or an odd one

What is learned is log s, so that a scale is positive whatever the optimizer does, and z, which is kept in [lowest, highest]. Both gradients
are LSQ's, scaled by g = 1 / sqrt(N highest): N counts the weights that the scale serves, or an activation's elements of one sample.

A quantizer learns its size (channels, heads) from the first tensor it sees or from the state it loads, and takes its first scale from its
observer: `observing = True`, some forwards, `initialise()`. Rounding without a scale is refused.
"""

import functools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase

from crqat_fx.errors import UserError
from crqat_fx.quantize.observers import Observer, make_observer
from crqat_fx.quantize.rounding import Grid, fake_quantize, from_logarithm
from passes.spec import QuantSpec

METHODS = ("lsq", "pact")


class FakeQuantize(FakeQuantizeBase):
    """A quantizer of one tensor. `enabled`: it rounds, else it passes its input on. `observing`: its observer sees the input."""

    is_quantizer: ClassVar[bool] = True
    is_dynamic: ClassVar[bool] = False  # read by torch.ao: a dynamic quantizer stands before its reader, never behind its producer
    learns: ClassVar[bool] = True
    shifts: ClassVar[bool] = False  # learns a zero point
    clips: ClassVar[bool] = False  # its scale sees the gradient of what was clipped alone
    dtype: torch.dtype
    qscheme: torch.qscheme
    log_scale: nn.Parameter | None
    zero_point: nn.Parameter | None
    fixed_scale: Tensor
    fixed_zero: Tensor
    flags: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        observer: str = "omse",
        *,
        fixed: tuple[float, int] | None = None,
        weight: bool | None = None,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # the parent's would register flags of its own
        device = (factory_kwargs or {}).get("device")
        axis = spec.channel_axis
        self.spec = spec
        self.weight = axis == 0 if weight is None else weight
        self.fixed = fixed
        self.observer: Observer = make_observer(observer, spec, weight=self.weight)
        self.quant_min, self.quant_max = spec.lowest, spec.highest
        self.grid = Grid(spec.lowest, spec.highest, axis, self.clips, spec.odd)
        self.ch_axis = -1 if axis is None else axis
        self.dtype = torch.qint8 if spec.symmetric else torch.quint8
        self.qscheme = _scheme(spec)
        size = () if axis is None else (0,)
        learned = nn.Parameter(torch.zeros(size, device=device)) if fixed is None else None
        self.register_parameter("log_scale", learned)
        shifted = fixed is None and self.shifts
        self.register_parameter("zero_point", nn.Parameter(torch.zeros(size, device=device)) if shifted else None)
        if fixed is not None:
            self.register_buffer("fixed_scale", torch.tensor(float(fixed[0]), device=device))
            self.register_buffer("fixed_zero", torch.tensor(float(fixed[1]), device=device))
        self._enabled, self._initialised, self.observing = True, fixed is not None, False
        self.register_buffer("flags", torch.tensor([self._enabled, self._initialised], dtype=torch.uint8, device=device))

    @property
    def enabled(self) -> bool:
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)
        self.flags[0] = int(self._enabled)

    @property
    def initialised(self) -> bool:
        return self._initialised

    @property
    def scale(self) -> Tensor:
        """Positive; one for the tensor (no axes) or one an index of the channel axis."""
        if self.log_scale is None:
            return self.fixed_scale
        return from_logarithm(self.log_scale)

    @property
    def zero_points(self) -> Tensor:
        """Whole, int32, shaped as the scale."""
        zero = self._zero()
        if zero is None:
            return torch.zeros_like(self.scale, dtype=torch.int32, requires_grad=False)
        return zero.detach().clamp(self.quant_min, self.quant_max).round().to(torch.int32)

    @property
    def activation_post_process(self) -> Observer:
        """torch.ao's name for the observer."""
        return self.observer

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # torch.ao passes nothing, either
        return self.scale.detach(), self.zero_points

    def enable_fake_quant(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def enable_observer(self, enabled: bool = True) -> None:
        self.observing = enabled

    def observe(self, x: Tensor) -> None:
        self.observer.observe(x)

    def initialise(self) -> None:
        """Takes scale and zero point from the observer, which then forgets what it saw."""
        scale, zero = self.observer.quantization()
        self.observer.reset()
        if self.log_scale is None:
            return
        self.log_scale.data = scale.log().to(self.log_scale.device)
        if self.zero_point is not None:
            self.zero_point.data = zero.to(self.zero_point.device)
        self._initialised = True
        self.flags[1] = 1

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """x, rounded. With `factor`, one a channel and never 0: x times it, rounded, and divided by it again. That is for a weight that
        one convolution alone reads: the gradient of the result is written over."""
        if self.observing:
            self.observe(x if factor is None else x * factor.view([-1 if axis == self.ch_axis else 1 for axis in range(x.ndim)]))
        if not self._enabled or x.numel() == 0:
            return x
        if not self._initialised:
            raise UserError("a quantizer has no scale yet", remedy="calibrate the model first")
        learned = self.log_scale
        return fake_quantize(
            x,
            self.fixed_scale if learned is None else learned,
            self._zero(),
            self.grid,
            self.gradient_scale(x),
            factor=factor,
            logarithm=learned is not None,
            over=factor is not None,
        )

    def _zero(self) -> Tensor | None:
        return self.zero_point if self.fixed is None or self.fixed[1] == 0 else self.fixed_zero

    def gradient_scale(self, x: Tensor) -> float:
        """1 / sqrt(N p): N of a weight is what one scale serves, of an activation what it serves in one sample."""
        served = x.numel() if self.spec.channel_axis is None else x.numel() // x.shape[self.spec.channel_axis]
        samples = 1 if self.weight else x.shape[0]
        return 1 / math.sqrt(max(served // samples, 1) * self.quant_max)

    def extra_repr(self) -> str:
        fixed = "" if self.fixed is None else f", fixed {self.fixed[0]:.6g} {self.fixed[1]}"
        axis = "" if self.spec.channel_axis is None else f", axis {self.spec.channel_axis}"
        return f"{self.spec.bits} bit{', odd' if self.spec.odd else ''}{axis}{fixed}"

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            saved = state_dict.get(prefix + name)
            if self.spec.channel_axis is not None and isinstance(saved, Tensor) and saved.ndim == 1:
                parameter.data = parameter.data.new_zeros(saved.shape)  # the same parameter, so that an optimizer keeps it
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._enabled, self._initialised = (bool(flag) for flag in self.flags.tolist())


class LSQ(FakeQuantize):
    """Symmetric: the zero point is 0."""


class LSQPlus(FakeQuantize):
    """Asymmetric: the zero point is learned, in steps."""

    shifts = True


class PACT(FakeQuantize):
    """clip(x, 0, a) with a learned a, the highest code's value; a symmetric tensor is clipped at both ends. What is clipped moves a."""

    clips = True

    def observe(self, x: Tensor) -> None:
        super().observe(x if self.spec.symmetric else x.clamp(min=0))

    def gradient_scale(self, x: Tensor) -> float:
        return 1.0


class FixedScale(FakeQuantize):
    """Nothing is learned: scale and zero point are given, the sigmoid's 1/255 and 0."""

    learns = False


@functools.cache
def fake_quantizer(
    spec: QuantSpec,
    method: str = "lsq",
    observer: str = "omse",
    fixed: tuple[float, int] | None = None,
    *,
    weight: bool | None = None,
    dynamic: bool = False,
) -> type[FakeQuantize]:
    """The quantizer class for one way to quantize: to be called without arguments, or given to a torch.ao QConfig.

    torch.ao takes two quantizers of one tensor for the same where their class and dtype are, so each way has a class, and one only.
    `weight` says what the tensor is where a channel axis of 0 does not; `dynamic` makes torch.ao place it before its reader.
    """
    if method not in METHODS:
        raise UserError(f"{method!r} is no way to quantize", remedy=f"give one of {', '.join(METHODS)}")
    base = FixedScale if fixed is not None else PACT if method == "pact" else LSQ if spec.symmetric else LSQPlus

    def build(self: FakeQuantize, factory_kwargs: dict[str, Any] | None = None) -> None:
        base.__init__(self, spec, observer, fixed=fixed, weight=weight, factory_kwargs=factory_kwargs)

    return type(base.__name__, (base,), {"__init__": build, "__module__": __name__, "__doc__": base.__doc__, "is_dynamic": dynamic})


def _scheme(spec: QuantSpec) -> torch.qscheme:
    if spec.channel_axis is None:
        return torch.per_tensor_symmetric if spec.symmetric else torch.per_tensor_affine
    return torch.per_channel_symmetric if spec.symmetric else torch.per_channel_affine
