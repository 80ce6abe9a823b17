"""Which range of a tensor its codes should span: all of it, percentiles, the least squared error, the least entropy lost.

Each takes what was remembered of a tensor, a row a channel, and gives the two ends (lowest, highest) of every channel. An end that is cut
short clips; an end that is far out makes the steps coarse. Ends are searched separately: of an asymmetric tensor each has its own best.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from crqat_fx.quantize.histogram import StreamingHistogram
from passes.fx.codes import nearest
from passes.spec import QuantSpec

Ends = tuple[Tensor, Tensor]

FLAT = 2.0**-20  # no channel's scale is smaller than this share of the tensor's largest, so that a dead channel has a usable one
START = torch.exp2(-torch.arange(0, 8.25, 0.375, dtype=torch.float64))  # shares of an end that are tried first, the whole of it included
REFINED = torch.exp2(0.375 * torch.arange(-4, 5, dtype=torch.float64) / 5)  # then around the best; and once more, closer
CLOSER = torch.exp2(0.375 * torch.arange(-4, 5, dtype=torch.float64) / 25)
SMALLEST_GAIN = 0.01  # a lower error than min-max's by less is no reason to clip
ELEMENTS = 1 << 21  # what one step of a search may hold


def quantization(lowest: Tensor, highest: Tensor, spec: QuantSpec, smallest: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point, float64, for codes that span the range and zero with it: what is exactly zero stays so, but where codes
    are odd."""
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(torch.maximum(highest / spec.highest, lowest / spec.lowest), smallest)
        return scale, torch.zeros_like(scale)
    scale = torch.maximum((highest - lowest) / (spec.highest - spec.lowest), smallest)
    return scale, (spec.lowest - torch.round(lowest / scale)).clamp(spec.lowest, spec.highest)


def smallest_scale(lowest: Tensor, highest: Tensor, spec: QuantSpec) -> Tensor:
    """What no channel's scale falls below, from the ends of all channels; of zeros alone 1, or where no code is 0 next to nothing."""
    scales, _ = quantization(lowest.double(), highest.double(), spec, lowest.new_zeros((), dtype=torch.float64))
    largest = scales.max()
    return torch.where(largest > 0, largest * FLAT, FLAT if spec.odd else 1.0)


def least_error(error: Callable[[Tensor, Tensor], Tensor], ends: Ends, spec: QuantSpec, doubt: Tensor | float = 0.0) -> Ends:
    """The ends with the least `error(scales, zeros)`, [channels, candidates] each. Min-max stays where nothing is better than it by more
    than `doubt`, the share by which the error may be wrong, and a percent."""
    smallest = smallest_scale(*ends, spec)
    lowest, highest = ends[0].double().unsqueeze(1).clamp(max=0), ends[1].double().unsqueeze(1).clamp(min=0)

    def of(low: Tensor, high: Tensor) -> Tensor:
        return error(*quantization(lowest * low, highest * high, spec, smallest))

    whole = torch.ones_like(lowest)
    best_low, best_high, at_whole = whole, whole, of(whole, whole)
    least = at_whole
    for shares in (START, REFINED, CLOSER):
        around = shares.to(lowest.device)
        if spec.symmetric:
            low = high = best_low * around
        else:
            one = around.new_ones(1) if bool((lowest == 0).all()) else around  # nothing below zero: one end to search
            low = (best_low * one).repeat_interleave(len(around), dim=1)
            high = (best_high * around).repeat(1, len(one))
        low, high = low.clamp(max=1), high.clamp(max=1)
        errors = of(low, high)
        found = errors.argmin(1, keepdim=True)
        better = errors.gather(1, found) < least
        least = torch.where(better, errors.gather(1, found), least)
        best_low = torch.where(better, low.gather(1, found), best_low)
        best_high = torch.where(better, high.gather(1, found), best_high)
    clips = least < at_whole * (1 - SMALLEST_GAIN - doubt)
    return (lowest * torch.where(clips, best_low, whole)).squeeze(1), (highest * torch.where(clips, best_high, whole)).squeeze(1)


# --- of a histogram: values are taken as spread evenly over their bin ---


class Cumulated:
    """Sums of a histogram from the left, float64, to be read anywhere between two bins."""

    def __init__(self, histogram: StreamingHistogram) -> None:
        self.width = histogram.width.unsqueeze(1)
        self.left = histogram.first.unsqueeze(1) * self.width
        self.bins = histogram.bins
        self.counts = histogram.counts.double()
        centres = self.left + self.width * (torch.arange(self.bins, device=self.left.device) + 0.5)
        self.total = self.counts.sum(1, keepdim=True)
        self.squares = (self.counts * (centres.square() + self.width.square() / 12)).sum(1, keepdim=True)
        self.below = _from_left(self.counts)
        self.sums_below = _from_left(self.counts * centres)

    def up_to(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """How many values lie below each of `ends` [channels, k], and their sum."""
        position = ((ends - self.left) / self.width).clamp(0, self.bins)
        number = position.floor().clamp(max=self.bins - 1).long()
        inside = position - number
        part = self.counts.gather(1, number) * inside
        middle = self.left + self.width * (number + inside / 2)
        return self.below.gather(1, number) + part, self.sums_below.gather(1, number) + part * middle

    def error(self, scales: Tensor, zeros: Tensor, spec: QuantSpec) -> Tensor:
        """Of every candidate [channels, candidates] the summed squared error."""
        codes = torch.arange(spec.lowest, spec.highest + 1, spec.step, dtype=torch.float64, device=scales.device)
        per_step = max(1, ELEMENTS // (len(codes) * len(scales)))
        steps = zip(scales.split(per_step, 1), zeros.split(per_step, 1), strict=True)
        return torch.cat([self._error(scale, zero, codes) for scale, zero in steps], 1)

    def _error(self, scales: Tensor, zeros: Tensor, codes: Tensor) -> Tensor:
        values = (codes - zeros.unsqueeze(2)) * scales.unsqueeze(2)
        between = (values[..., 1:] + values[..., :-1]) / 2
        count, total = (each.view_as(between) for each in self.up_to(between.flatten(1)))
        nothing = torch.zeros_like(values[..., :1])
        count = torch.diff(torch.cat((nothing, count, nothing + self.total.unsqueeze(2)), 2))
        total = torch.diff(torch.cat((nothing, total, nothing + self.sums_below[:, -1:].unsqueeze(2)), 2))
        return self.squares + (values * (values * count - 2 * total)).sum(2)

    def quantile(self, share: float) -> Tensor:
        """Below which `share` of a channel's values lie."""
        wanted = self.total * share
        number = (torch.searchsorted(self.below, wanted, right=False) - 1).clamp(0, self.bins - 1)
        count = self.counts.gather(1, number)
        inside = torch.where(count > 0, (wanted - self.below.gather(1, number)) / count.clamp(min=1e-30), 0.0)
        return (self.left + self.width * (number + inside)).squeeze(1)


def _from_left(per_bin: Tensor) -> Tensor:
    return torch.cat((per_bin.new_zeros(len(per_bin), 1), per_bin.cumsum(1)), 1)


def least_error_of_histogram(histogram: StreamingHistogram, spec: QuantSpec) -> Ends:
    """The doubt is what the places of the values within their bins can change: of n values about 4 w / (s sqrt(n)) of their error."""
    cumulated = Cumulated(histogram)
    ends = histogram.lowest.double(), histogram.highest.double()
    scale, _ = quantization(*ends, spec, smallest_scale(*ends, spec))
    doubt = 4 * cumulated.width / (scale.unsqueeze(1) * cumulated.total.sqrt())
    return least_error(lambda scales, zeros: cumulated.error(scales, zeros, spec), ends, spec, doubt)


def percentile_of_histogram(histogram: StreamingHistogram, share: float) -> Ends:
    cumulated = Cumulated(histogram)
    lowest = torch.maximum(cumulated.quantile(1 - share), histogram.lowest.double())
    return lowest, torch.minimum(cumulated.quantile(share), histogram.highest.double())


def least_entropy_lost(histogram: StreamingHistogram, spec: QuantSpec) -> Ends:
    """The ends with the least Kullback-Leibler divergence of the quantized histogram from the whole, what is clipped piled up at the ends.

    A code's share is spread evenly over those of its bins that hold something. A range with fewer bins than codes is no candidate, nor one
    that holds nothing: rounding within a bin is not seen, and the less such a range keeps the less it would seem to lose, down to one bin
    that all else is piled on. First the upper end is searched, then the lower.
    """
    cumulated = _Entropies(histogram)
    smallest = smallest_scale(histogram.lowest, histogram.highest, spec)
    lowest, highest = histogram.lowest.double().unsqueeze(1).clamp(max=0), histogram.highest.double().unsqueeze(1).clamp(min=0)
    shares = torch.linspace(1, 1 / 64, 64, dtype=torch.float64, device=lowest.device)

    def best(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.broadcast_tensors(low, high)
        found = cumulated.lost(*quantization(low, high, spec, smallest), spec).argmin(1, keepdim=True)
        return low.gather(1, found), high.gather(1, found)

    if spec.symmetric:
        lowest, highest = best(lowest * shares, highest * shares)
    else:
        lowest, highest = best(lowest, highest * shares)
        lowest, highest = best(lowest * shares, highest)
    return lowest.squeeze(1), highest.squeeze(1)


class _Entropies:
    """Sums from the left of n, n log n and of the bins that hold something."""

    def __init__(self, histogram: StreamingHistogram) -> None:
        self.width = histogram.width.unsqueeze(1)
        self.left = histogram.first.unsqueeze(1) * self.width
        self.bins = histogram.bins
        self.counts = histogram.counts.double()
        self.below = _from_left(self.counts)
        self.logs_below = _from_left(torch.xlogy(self.counts, self.counts))
        self.held_below = _from_left((self.counts > 0).double())

    def lost(self, scales: Tensor, zeros: Tensor, spec: QuantSpec) -> Tensor:
        half = spec.step / 2
        borders = torch.arange(spec.lowest - half, spec.highest + spec.step, spec.step, dtype=torch.float64, device=scales.device)
        per_step = max(1, ELEMENTS // (len(borders) * len(scales)))
        steps = zip(scales.split(per_step, 1), zeros.split(per_step, 1), strict=True)
        return torch.cat([self._lost(scale, zero, borders) for scale, zero in steps], 1)

    def _lost(self, scales: Tensor, zeros: Tensor, borders: Tensor) -> Tensor:
        edges = (borders - zeros.unsqueeze(2)) * scales.unsqueeze(2)
        numbers = torch.round((edges - self.left.unsqueeze(2)) / self.width.unsqueeze(2)).clamp(0, self.bins).long()
        at = numbers.flatten(1)
        below, logs, held = (each.gather(1, at).view_as(edges) for each in (self.below, self.logs_below, self.held_below))
        total = self.below[:, -1:]
        mass, bins = torch.diff(below), torch.diff(held)
        under, over = below[..., 0], total - below[..., -1]
        own_logs = logs[..., -1] - logs[..., 0]
        first, last = numbers[..., 0].clamp(max=self.bins - 1), (numbers[..., -1] - 1).clamp(min=0)
        for edge, tail in ((first, under), (last, over)):
            count = self.counts.gather(1, edge)
            own_logs = own_logs + torch.xlogy(count + tail, count + tail) - torch.xlogy(count, count)
        piled = mass.clone()
        piled[..., 0] += under
        piled[..., -1] += over
        spread = torch.where(piled > 0, piled * torch.log(mass / bins.clamp(min=1)), 0.0)  # -inf where something is piled on nothing
        kept = total - under - over
        lost = (own_logs - spread.sum(2)) / total - torch.log(total) + torch.log(kept)
        told_apart = numbers[..., -1] - numbers[..., 0] >= len(borders) - 1
        return torch.where(told_apart & (kept > 0), lost, torch.inf)


# --- of a tensor that is held whole: exact ---


def error_of_values(values: Tensor, scales: Tensor, zeros: Tensor, spec: QuantSpec) -> Tensor:
    """Of every candidate [channels, candidates] the summed squared error on the values [channels, n]."""
    errors = torch.empty_like(scales)
    rows = max(1, (1 << 16) // max(values.shape[1], 1))
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        code = torch.empty_like(part)
        for candidate in range(scales.shape[1]):
            scale = scales[start : start + rows, candidate].to(part.dtype).unsqueeze(1)
            zero = zeros[start : start + rows, candidate].to(part.dtype).unsqueeze(1)
            nearest(torch.div(part, scale, out=code), spec.odd).add_(zero).clamp_(spec.lowest, spec.highest).sub_(zero).mul_(scale)
            errors[start : start + rows, candidate] = code.sub_(part).square_().sum(1)
    return errors


def percentile_of_values(values: Tensor, share: float) -> Ends:
    ordered = values.sort(1).values.double()
    place = share * (values.shape[1] - 1)
    return ordered[:, round(values.shape[1] - 1 - place)], ordered[:, round(place)]
