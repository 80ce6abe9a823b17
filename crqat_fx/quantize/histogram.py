"""A histogram that is read as a stream: its memory does not grow with what it sees, its range does.

A bin is [k w, (k + 1) w) for a whole k and a width w that is a power of two. Where the range outgrows the bins, w is doubled until it fits,
and two old bins fall into one new bin whole: nothing is spread, so a stream leaves the histogram that all of it at once would have left.
With a channel axis every index has bins and a width of its own.
"""

import torch
from torch import Tensor

BINS = 4096  # for a tensor; at least half of them are in use
BINS_OF_CHANNEL = 2048
BLOCK = 1 << 16
FINEST = 22  # a bin is no finer than 2^-22 of the largest magnitude: its number is exact in float32
NOTHING = -100  # the exponent of the width while all was zero


def as_channels(x: Tensor, axis: int | None) -> Tensor:
    """[before, channels, behind], a tensor without an axis as one channel."""
    if axis is None:
        return x.reshape(1, 1, -1)
    return x.reshape(x.shape[:axis].numel(), x.shape[axis], x.shape[axis + 1 :].numel())


class StreamingHistogram:
    """`counts` [channels, bins], and of each channel the exponent of the width, the number k of the first bin, and the range seen."""

    def __init__(self, channels: int, bins: int, device: torch.device) -> None:
        self.bins = bins
        self.counts = torch.zeros(channels, bins, device=device)
        self.exponent = torch.full((channels,), NOTHING, dtype=torch.float64, device=device)
        self.first = torch.zeros(channels, dtype=torch.float64, device=device)
        self.lowest = torch.full((channels,), torch.inf, device=device)
        self.highest = torch.full((channels,), -torch.inf, device=device)

    @property
    def width(self) -> Tensor:
        """Of every channel's bins, float64."""
        return torch.exp2(self.exponent)

    def add(self, values: Tensor, lowest: Tensor, highest: Tensor) -> None:
        """Counts finite float32 values [before, channels, behind]; their range a channel is known to the caller."""
        self.lowest, self.highest = torch.minimum(self.lowest, lowest), torch.maximum(self.highest, highest)
        self._make_room()
        inverse, first = torch.exp2(-self.exponent).float().unsqueeze(1), self.first.float().unsqueeze(1)
        # a channel's values of all samples at once: to clear and add its bins costs more than to count
        rows = values.transpose(0, 1).flatten(1)
        group = max(1, BLOCK // max(rows.shape[1], 1))
        for start in range(0, len(rows), group):
            channels = slice(start, start + group)
            counts = self.counts[channels]
            offsets = torch.arange(len(counts), dtype=torch.int32, device=values.device).unsqueeze(1) * self.bins
            for part in rows[channels].split(BLOCK, dim=1):
                numbers = (part * inverse[channels]).floor_().sub_(first[channels]).to(torch.int32)
                if len(counts) > 1:
                    numbers = numbers + offsets
                counts += torch.bincount(numbers.flatten(), minlength=counts.numel()).view_as(counts)

    def _make_room(self) -> None:
        lowest, highest, width = self.lowest.double(), self.highest.double(), self.width
        fits = (torch.floor(lowest / width) >= self.first) & (torch.floor(highest / width) < self.first + self.bins)
        if bool(fits.all()):
            return
        largest = torch.maximum(lowest.abs(), highest.abs())
        needed = torch.maximum(torch.log2((highest - lowest) / (self.bins - 1)), torch.log2(largest) - FINEST).ceil()
        needed = torch.where(largest > 0, needed.clamp(min=NOTHING), NOTHING)
        needed += (highest - lowest) / torch.exp2(needed) > self.bins - 1  # a logarithm that was rounded down
        exponent = torch.maximum(self.exponent, needed)
        first = torch.floor(lowest / torch.exp2(exponent))
        old = self.first.unsqueeze(1) + torch.arange(self.bins, device=first.device)
        new = torch.floor(old * torch.exp2(self.exponent - exponent).unsqueeze(1)) - first.unsqueeze(1)
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, new.clamp(0, self.bins - 1).long(), self.counts)
        self.exponent, self.first = exponent, first
