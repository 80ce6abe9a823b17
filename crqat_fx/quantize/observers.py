"""What a quantizer's first scale is taken from: an observer sees tensors, remembers little, and finds the range the codes should span.

An activation is a stream: of any number of pictures its range or a histogram is kept. A weight is no sample: the tensor last seen is held,
and searched exactly. `moving-average` follows the ends of single batches, so that one odd picture counts for little.
"""

import re
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from crqat_fx.errors import UserError
from crqat_fx.quantize import range_search
from crqat_fx.quantize.histogram import BINS, BINS_OF_CHANNEL, StreamingHistogram, as_channels
from crqat_fx.quantize.range_search import Ends
from passes.spec import QuantSpec

OBSERVERS = ("omse", "minmax", "moving-average", "percentile", "percentile-99.9", "percentile-99.99", "percentile-99.999", "entropy")
PERCENTILE = 99.99
FOLLOWS = 0.1  # the weight of a batch in the moving average


class Observer(ABC):
    """Sees tensors (`observe`), finds scale and zero point (`quantization`), forgets (`reset`). The other attributes are for torch.ao."""

    eps = torch.finfo(torch.float32).eps

    lowest: Tensor  # of every channel, over all that was seen; of a weight over the tensor last seen
    highest: Tensor

    def __init__(self, spec: QuantSpec, *, weight: bool) -> None:
        self.spec = spec
        self.weight = weight
        self.quant_min, self.quant_max = spec.lowest, spec.highest
        self.reset()

    def reset(self) -> None:
        self.seen = False

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Half-precision values are seen as float32. A value that is not finite is refused: no range holds it."""
        if x.numel() == 0:
            return
        values = as_channels(x.detach().float(), self.spec.channel_axis)
        lowest, highest = _ends(values)
        if not bool((torch.isfinite(lowest) & torch.isfinite(highest)).all()):
            raise UserError("calibration met a value that is not finite", remedy="look for an overflow, or NaN weights, before this tensor")
        self._remember(values, lowest, highest)
        if self.seen and not self.weight:
            lowest, highest = torch.minimum(self.lowest, lowest), torch.maximum(self.highest, highest)
        self.lowest, self.highest, self.seen = lowest, highest, True

    @torch.no_grad()
    def quantization(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32: without axes, or one a channel."""
        if not self.seen:
            raise UserError("nothing was observed", remedy="run pictures through the model while it observes")
        lowest, highest = (end.double() for end in self._range())
        smallest = range_search.smallest_scale(self.lowest, self.highest, self.spec)
        scale, zero = range_search.quantization(lowest, highest, self.spec, smallest)
        shape = () if self.spec.channel_axis is None else (-1,)
        return scale.float().reshape(shape), zero.float().reshape(shape)

    @abstractmethod
    def _remember(self, values: Tensor, lowest: Tensor, highest: Tensor) -> None:
        """Takes in [before, channels, behind] and its ends a channel."""

    @abstractmethod
    def _range(self) -> Ends:
        """The two ends of every channel."""


def _ends(values: Tensor) -> Ends:
    if values.shape[1] == 1:
        lowest, highest = torch.aminmax(values)
        return lowest.reshape(1), highest.reshape(1)
    return values.amin((0, 2)), values.amax((0, 2))  # aminmax along an axis is no fast path


class MinMax(Observer):
    """The ends of all that was seen; of a weight those of the tensor last seen."""

    def _remember(self, values: Tensor, lowest: Tensor, highest: Tensor) -> None:
        return

    def _range(self) -> Ends:
        return self.lowest, self.highest


class MovingAverage(Observer):
    """The ends of each batch, averaged with weights that fade."""

    averages: Ends

    def _remember(self, values: Tensor, lowest: Tensor, highest: Tensor) -> None:
        if self.seen and not self.weight:
            lowest, highest = torch.lerp(self.averages[0], lowest, FOLLOWS), torch.lerp(self.averages[1], highest, FOLLOWS)
        self.averages = lowest, highest

    def _range(self) -> Ends:
        return self.averages


class HistogramObserver(Observer):
    """A stream, as a histogram; `method` says which range is taken from it."""

    def __init__(self, spec: QuantSpec, method: str, share: float) -> None:
        self.method = method
        self.share = share
        super().__init__(spec, weight=False)

    def reset(self) -> None:
        super().reset()
        self.histogram: StreamingHistogram | None = None

    def _remember(self, values: Tensor, lowest: Tensor, highest: Tensor) -> None:
        if self.histogram is None:
            bins = BINS if self.spec.channel_axis is None else BINS_OF_CHANNEL
            self.histogram = StreamingHistogram(values.shape[1], bins, values.device)
        self.histogram.add(values, lowest, highest)

    def _range(self) -> Ends:
        assert self.histogram is not None  # something was seen
        if self.method == "percentile":
            return range_search.percentile_of_histogram(self.histogram, self.share)
        if self.method == "entropy":
            return range_search.least_entropy_lost(self.histogram, self.spec)
        return range_search.least_error_of_histogram(self.histogram, self.spec)


class WeightObserver(Observer):
    """The tensor last seen, whole; `method` says which range is taken from it."""

    def __init__(self, spec: QuantSpec, method: str, share: float) -> None:
        self.method = method
        self.share = share
        super().__init__(spec, weight=True)

    def reset(self) -> None:
        super().reset()
        self.values: Tensor | None = None

    def _remember(self, values: Tensor, lowest: Tensor, highest: Tensor) -> None:
        self.values = values

    def _range(self) -> Ends:
        assert self.values is not None  # something was seen
        if self.method == "entropy":
            histogram = StreamingHistogram(self.values.shape[1], BINS_OF_CHANNEL, self.values.device)
            histogram.add(self.values, self.lowest, self.highest)
            return range_search.least_entropy_lost(histogram, self.spec)
        rows = self.values.transpose(0, 1).flatten(1)
        if self.method == "percentile":
            return range_search.percentile_of_values(rows, self.share)

        def error(scales: Tensor, zeros: Tensor) -> Tensor:
            return range_search.error_of_values(rows, scales, zeros, self.spec)

        return range_search.least_error(error, (self.lowest, self.highest), self.spec)


def make_observer(name: str, spec: QuantSpec, *, weight: bool = False) -> Observer:
    """The observer of that name for one tensor: a `weight`, or an activation. `percentile-99.9` cuts 0.1 % off at each end."""
    if name in ("minmax", "moving-average"):
        return (MinMax if name == "minmax" else MovingAverage)(spec, weight=weight)
    named = re.fullmatch(r"(omse|entropy|percentile)(?:(?<=percentile)-(\d+(?:\.\d+)?))?", name)
    if named is None:
        raise UserError(f"{name!r} is no observer", remedy=f"give one of {', '.join(OBSERVERS)}")
    share = float(named[2] or PERCENTILE) / 100
    if not 0.5 < share < 1:
        raise UserError(f"{name!r} keeps {named[2]} %", remedy="give a percentile above 50 and below 100")
    return (WeightObserver if weight else HistogramObserver)(spec, named[1], share)
