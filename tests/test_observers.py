"""Observers find the range that they say, from streams whose memory does not grow."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crqat_fx.errors import UserError
from crqat_fx.quantize import range_search
from crqat_fx.quantize.histogram import BINS, StreamingHistogram
from crqat_fx.quantize.observers import FOLLOWS, OBSERVERS, HistogramObserver, Observer, make_observer
from crqat_fx.quantize.rounding import Grid, fake_quantize
from passes.spec import QuantSpec


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


TENSORS = {
    "normal": lambda: torch.randn(4, 6, 20, 20, generator=seed()),
    "silu": lambda: nn.functional.silu(torch.randn(4, 6, 20, 20, generator=seed()) * 3),
    "heavy tails": lambda: torch.randn(4, 6, 20, 20, generator=seed()) / torch.rand(4, 6, 20, 20, generator=seed(1)).clamp(min=1e-3),
    "one outlier": lambda: torch.cat([torch.randn(4, 6, 399, generator=seed()), torch.full((4, 6, 1), 300.0)], 2).view(4, 6, 20, 20),
    "uniform": lambda: torch.rand(4, 6, 20, 20, generator=seed()),
    "all below zero": lambda: -1 - torch.rand(4, 6, 20, 20, generator=seed()),
    "far from zero": lambda: 5 + torch.rand(4, 6, 20, 20, generator=seed()),
    "two values": lambda: torch.randint(0, 2, (4, 6, 20, 20), generator=seed()).float(),
    "a constant": lambda: torch.full((4, 6, 20, 20), 0.7),
    "zeros": lambda: torch.zeros(4, 6, 20, 20),
    "very small": lambda: torch.randn(4, 6, 20, 20, generator=seed()) * 1e-20,
    "very large": lambda: torch.randn(4, 6, 20, 20, generator=seed()) * 1e15,
    "channels of many sizes": lambda: torch.randn(4, 6, 20, 20, generator=seed()) * torch.tensor([1e-6, 1e-3, 1, 7, 1e3, 0]).view(-1, 1, 1),
}


def error(x: Tensor, observer: Observer) -> Tensor:
    """The squared error, a channel, that the scale and zero point it finds make."""
    scale, zero = observer.quantization()
    spec = observer.spec
    y = fake_quantize(x.double(), scale.double(), zero.double(), Grid(spec.lowest, spec.highest, spec.channel_axis, odd=spec.odd))
    squared = (y - x.double()).square()
    return squared.sum() if spec.channel_axis is None else squared.sum([axis for axis in range(x.ndim) if axis != spec.channel_axis])


def watched(name: str, spec: QuantSpec, *batches: Tensor, weight: bool = False) -> Observer:
    observer = make_observer(name, spec, weight=weight)
    for batch in batches:
        observer.observe(batch)
    return observer


@pytest.mark.parametrize("weight", [False, True], ids=["activation", "weight"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("tensor", TENSORS)
def test_the_least_error_is_never_above_that_of_min_max(tensor: str, bits: int, weight: bool) -> None:
    x = TENSORS[tensor]()
    for symmetric in (False, True):
        for axis in (None, 0 if weight else 1):
            spec = QuantSpec(bits, symmetric, axis)
            least = error(x, watched("omse", spec, x, weight=weight))
            assert (least <= error(x, watched("minmax", spec, x, weight=weight)) * (1 + 1e-6)).all()
    if weight and bits <= 3:
        spec = QuantSpec(bits, True, 0, odd=True)
        assert (error(x, watched("omse", spec, x, weight=True)) <= error(x, watched("minmax", spec, x, weight=True)) * (1 + 1e-6)).all()


@pytest.mark.parametrize("weight", [False, True], ids=["activation", "weight"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tensor", ["normal", "silu", "heavy tails", "one outlier"])
def test_the_least_error_is_found_within_a_percent_or_two(tensor: str, symmetric: bool, weight: bool) -> None:
    """Beside a search over many more ranges on the values themselves, min and max each on their own."""
    x = TENSORS[tensor]()
    spec = QuantSpec(4, symmetric)
    rows = x.reshape(1, -1)
    shares = torch.exp2(-torch.arange(0, 8, 0.1, dtype=torch.float64))
    low, high = (shares, shares) if symmetric else (each.flatten() for each in torch.meshgrid(shares, shares, indexing="ij"))
    ends = x.min().double().reshape(1), x.max().double().reshape(1)
    smallest = range_search.smallest_scale(*ends, spec)
    scales, zeros = range_search.quantization(ends[0].unsqueeze(1) * low, ends[1].unsqueeze(1) * high, spec, smallest)
    best = range_search.error_of_values(rows, scales, zeros, spec).min()
    assert error(x, watched("omse", spec, x, weight=weight)) <= best * 1.02
    if tensor in ("normal", "silu"):
        assert best < error(x, watched("minmax", spec, x)) * 0.9, "there is something to find"


def test_min_and_max_are_searched_each_on_its_own() -> None:
    x = torch.cat([torch.rand(50000, generator=seed()) * 4, -torch.rand(50000, generator=seed(1)) * 0.3, torch.tensor([-40.0])])
    observer = watched("omse", QuantSpec(4), x)
    lowest, highest = observer._range()
    assert lowest.item() > -1.5
    assert highest.item() > 3.5
    mirrored = watched("omse", QuantSpec(4), -x)
    lowest, highest = mirrored._range()
    assert lowest.item() < -3.5
    assert highest.item() < 1.5


def test_silu_keeps_its_lower_end() -> None:
    x = nn.functional.silu(torch.randn(100_000, generator=seed()) * 4)
    scale, zero = watched("omse", QuantSpec(8), x).quantization()
    assert -0.33 < ((0 - zero) * scale).item() < -0.24


# --- percentiles, entropy, averages ---


@pytest.mark.parametrize(
    ("name", "share"), [("percentile", 99.99), ("percentile-99.9", 99.9), ("percentile-99.999", 99.999), ("percentile-95", 95)]
)
@pytest.mark.parametrize("weight", [False, True], ids=["activation", "weight"])
def test_a_percentile_cuts_each_side_on_its_own(name: str, share: float, weight: bool) -> None:
    x = torch.randn(300_000, generator=seed()).exp()  # a long upper side, a short lower one
    x = torch.cat([x - 1, torch.full((3,), 1e3)])
    lowest, highest = watched(name, QuantSpec(8), x, weight=weight)._range()
    bin_of = (1e3 + 1) / BINS * 2  # of the stream's histogram
    assert lowest.item() == pytest.approx(np.percentile(x.numpy(), 100 - share), abs=1e-3 if weight else bin_of)
    assert highest.item() == pytest.approx(np.percentile(x.numpy(), share), abs=0.02 * 60 if weight else bin_of)
    assert highest.item() < x.max().item()


def test_a_percentile_is_taken_of_every_channel() -> None:
    x = torch.randn(2, 3, 100, 100, generator=seed()) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    lowest, highest = watched("percentile-99.9", QuantSpec(4, False, 1), x)._range()
    expected = np.percentile(x.transpose(0, 1).flatten(1).numpy(), (0.1, 99.9), axis=1)
    np.testing.assert_allclose(lowest, expected[0], rtol=0.03)
    np.testing.assert_allclose(highest, expected[1], rtol=0.03)


def divergence(counts: np.ndarray, first: int, last: int, levels: int) -> float:
    """KL(P || Q): P the counts with the tails piled on the bins first and last - 1; Q those bins merged into `levels` and spread again."""
    p = counts[first:last].astype(float).copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    q = np.zeros_like(p)
    for part in np.array_split(np.arange(last - first), levels):
        held = counts[first:last][part] > 0
        q[part[held]] = counts[first:last][part].sum() / max(held.sum(), 1)
    p, q = p / p.sum(), q / q.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(p > 0, p * np.log(p / q), 0).sum())


def test_the_entropy_lost_is_the_divergence_of_the_definition() -> None:
    generator = np.random.default_rng(0)
    counts = generator.poisson(200 * np.exp(-np.arange(64) / 9)).astype(np.float32)
    counts[63] = 0  # of 64 bins a range of 63 takes 63 or 64
    histogram = StreamingHistogram(1, 64, torch.device("cpu"))
    values = torch.from_numpy(np.repeat(np.arange(64) + 0.5, counts.astype(int))).float()
    histogram.add(values.view(1, 1, -1), torch.tensor([0.0]), torch.tensor([62.9]))
    np.testing.assert_array_equal(histogram.counts.numpy()[0], counts)
    spec = QuantSpec(3)
    entropies = range_search._Entropies(histogram)
    for last in (64, 48, 40, 24, 16):
        scale = torch.tensor([[last / 8]], dtype=torch.float64)  # eight codes, their cells from 0 to `last`
        zero = torch.full((1, 1), -0.5, dtype=torch.float64)
        assert entropies.lost(scale, zero, spec).item() == pytest.approx(divergence(counts, 0, last, 8), rel=1e-9)


def test_the_entropy_lost_by_odd_codes_is_that_of_their_cells() -> None:
    histogram = StreamingHistogram(1, 64, torch.device("cpu"))
    histogram.add(torch.rand(1, 1, 5000, generator=seed()) ** 2 * 64, torch.tensor([0.0]), torch.tensor([63.5]))
    entropies = range_search._Entropies(histogram)
    for last in (64, 40, 16):  # eight cells of two steps each, from 0 to `last`, and of one step
        odd = entropies.lost(torch.full((1, 1), last / 16.0).double(), torch.full((1, 1), -8.0).double(), QuantSpec(3, True, odd=True))
        even = entropies.lost(torch.full((1, 1), last / 8.0).double(), torch.full((1, 1), -0.5).double(), QuantSpec(3))
        assert odd.item() == even.item()


def test_entropy_gives_up_a_lone_outlier_and_keeps_a_dense_range() -> None:
    x = torch.randn(200_000, generator=seed())
    _, highest = watched("entropy", QuantSpec(8), torch.cat([x, torch.tensor([60.0])]))._range()
    assert highest.item() < 12
    lowest, highest = watched("entropy", QuantSpec(8), torch.rand(200_000, generator=seed()) - 0.5)._range()
    assert highest.item() > 0.45
    assert lowest.item() < -0.45


@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4), QuantSpec(8, True), QuantSpec(8, False, 1)], ids=str)
@pytest.mark.parametrize(
    "tensor",
    [
        lambda x: 0.06 + 0.94 * torch.sigmoid(2 * x),  # a gate: nothing near zero
        lambda x: 5 + torch.sigmoid(x),
        lambda x: -5 - torch.sigmoid(x),
        lambda x: torch.sign(x) * (3 + torch.sigmoid(x)),
    ],
    ids=["gate", "far above zero", "far below zero", "two peaks"],
)
def test_entropy_never_chooses_a_range_without_the_values(tensor: Callable[[Tensor], Tensor], spec: QuantSpec) -> None:
    """Where all of them are piled on one bin, or on none, nothing is told apart that could be lost."""
    x = tensor(torch.randn(4, 6, 100, 100, generator=seed()))
    scale, zero = watched("entropy", spec, x).quantization()
    grid = Grid(spec.lowest, spec.highest, spec.channel_axis)
    assert (fake_quantize(x, scale, zero, grid) - x).abs().mean() < (0.05 if spec.bits == 8 else 0.3)


def test_a_moving_average_follows_the_ends_of_batches() -> None:
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([0.0, 11.0])]
    lowest, highest = watched("moving-average", QuantSpec(4), *batches)._range()
    expected = (-1.0, 2.0)
    for ends in ((-3.0, 1.0), (0.0, 11.0)):
        expected = tuple(old + FOLLOWS * (new - old) for old, new in zip(expected, ends, strict=True))
    assert (lowest.item(), highest.item()) == pytest.approx(expected)


def test_min_max_holds_all_that_was_seen() -> None:
    lowest, highest = watched("minmax", QuantSpec(4, False, 1), torch.tensor([[1.0, -2.0]]), torch.tensor([[-3.0, 0.5]]))._range()
    assert lowest.tolist() == [-3.0, -2.0]
    assert highest.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_weight_is_the_tensor_last_seen(name: str) -> None:
    old, new = torch.randn(5, 3, 3, 3, generator=seed()) * 100, torch.randn(5, 3, 3, 3, generator=seed(1))
    both = watched(name, QuantSpec(4, True, 0), old, new, weight=True)
    alone = watched(name, QuantSpec(4, True, 0), new, weight=True)
    assert torch.equal(both.quantization()[0], alone.quantization()[0])


# --- streams ---


@pytest.mark.parametrize("channels", [1, 3])
def test_a_stream_leaves_the_histogram_that_all_of_it_at_once_would(channels: int) -> None:
    batches = [torch.randn(2, channels, 500, generator=seed(i)) * 3.0 ** (i - 3) + i for i in range(7)]
    batches.insert(0, torch.zeros(2, channels, 5))
    stream, whole = (StreamingHistogram(channels, 256, torch.device("cpu")) for _ in range(2))
    for batch in batches:
        stream.add(batch, batch.amin((0, 2)), batch.amax((0, 2)))
    everything = torch.cat([batch.transpose(0, 1).flatten(1) for batch in batches], 1).unsqueeze(0)
    whole.add(everything, everything.amin((0, 2)), everything.amax((0, 2)))
    assert torch.equal(stream.exponent, whole.exponent)
    for channel in range(channels):
        of_stream, of_whole = (
            {number + int(each.first[channel]): count for number, count in enumerate(each.counts[channel].tolist()) if count}
            for each in (stream, whole)
        )
        assert of_stream == of_whole
    assert stream.counts.sum() == everything.numel()


def test_counts_are_those_of_numpy() -> None:
    x = torch.randn(1, 2, 10_000, generator=seed())
    histogram = StreamingHistogram(2, 512, torch.device("cpu"))
    histogram.add(x, x.amin((0, 2)), x.amax((0, 2)))
    for channel in range(2):
        width, first = float(histogram.width[channel]), float(histogram.first[channel])
        edges = (first + np.arange(513)) * width
        np.testing.assert_array_equal(histogram.counts[channel].numpy(), np.histogram(x[0, channel].double().numpy(), edges)[0])
        assert (x[0, channel].max() - x[0, channel].min()) / width > 200, "about half the bins and more are in use"


@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4, False, 1)], ids=str)
def test_memory_does_not_grow_with_what_is_seen(spec: QuantSpec) -> None:
    observer = make_observer("omse", spec)
    assert isinstance(observer, HistogramObserver)
    sizes = []
    for picture in range(12):
        observer.observe(torch.randn(2, 3, 40, 40, generator=seed(picture)) * 1.5**picture)
        sizes.append(sum(value.nbytes for value in vars(observer.histogram).values() if isinstance(value, Tensor)))
    assert len(set(sizes)) == 1
    observer.reset()
    assert observer.histogram is None


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "moving-average"])  # which depends on the batches
def test_a_stream_in_parts_finds_the_range_of_the_whole(name: str) -> None:
    x = nn.functional.silu(torch.randn(8, 4, 30, 30, generator=seed()) * 2)
    for spec in (QuantSpec(4), QuantSpec(4, False, 1)):
        whole, parts = watched(name, spec, x).quantization(), watched(name, spec, *x.split(1)).quantization()
        torch.testing.assert_close(parts[0], whole[0], rtol=1e-3, atol=0)
        assert torch.equal(parts[1], whole[1])


# --- scales ---


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("tensor", TENSORS)
def test_every_scale_is_positive_and_every_zero_point_a_code(tensor: str, name: str) -> None:
    x = TENSORS[tensor]()
    ways = ((QuantSpec(4), False), (QuantSpec(8, False, 1), False), (QuantSpec(4, True, 0), True), (QuantSpec(8, True), False))
    for spec, weight in ways:
        scale, zero = watched(name, spec, x, weight=weight).quantization()
        assert scale.shape == zero.shape == (() if spec.channel_axis is None else (x.shape[spec.channel_axis],))
        assert (scale > 0).all()
        assert torch.isfinite(scale).all()
        assert scale.dtype == torch.float32
        assert torch.equal(zero, zero.round())
        assert (zero >= spec.lowest).all()
        assert (zero <= spec.highest).all()
        assert not spec.symmetric or (zero == 0).all()


def test_a_dead_channel_takes_a_usable_scale() -> None:
    x = torch.randn(3, 4, 3, 3, generator=seed())
    x[1] = 0
    x[2] *= 1e-30
    largest = watched("minmax", QuantSpec(4, True, 0), x, weight=True).quantization()[0].max()
    for name in OBSERVERS:
        scale, _ = watched(name, QuantSpec(4, True, 0), x, weight=True).quantization()
        assert scale[1] == scale[2] == largest * 2.0**-20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", OBSERVERS)
def test_a_value_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    x = torch.randn(2, 3, 4, 4)
    x[1, 2, 3, 3] = bad
    for spec in (QuantSpec(4), QuantSpec(4, False, 1)):
        with pytest.raises(UserError, match="not finite"):
            make_observer(name, spec).observe(x)


def test_half_precision_is_seen_as_it_is() -> None:
    x = torch.randn(2, 3, 40, 40).bfloat16()
    for name in OBSERVERS:
        assert torch.equal(watched(name, QuantSpec(4), x).quantization()[0], watched(name, QuantSpec(4), x.float()).quantization()[0])


@pytest.mark.parametrize("name", ["omsee", "percentile-", "percentile-abc", "percentile-40", "percentile-100", "minmax-3", "omse-99", ""])
def test_an_unknown_observer_is_refused(name: str) -> None:
    with pytest.raises(UserError):
        make_observer(name, QuantSpec(4))
