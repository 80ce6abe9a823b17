"""Quantizers round as ONNX does, and their gradients are those of the definition, written out below for autograd."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase, QConfig
from torch.ao.quantization.qconfig import qconfig_equals

from crqat_fx.errors import UserError
from crqat_fx.quantize import rounding
from crqat_fx.quantize.fake_quant import LSQ, PACT, FakeQuantize, FixedScale, LSQPlus, fake_quantizer
from crqat_fx.quantize.rounding import BLOCKED, PLAIN, Grid, Kernels, fake_quantize, kernels_for
from crqat_fx.quantize.watch import codes_of
from passes.fx.graph import describe, is_quantizer
from passes.spec import QuantSpec

# --- the definition, for autograd ---


class StraightThrough(torch.autograd.Function):
    """round, or to the nearest odd number, with the gradient of what is not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, odd: bool = False) -> Tensor:
        return torch.round((x - 1) / 2) * 2 + 1 if odd else torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None


def reference(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, gradient_scale: float) -> Tensor:
    shape = [1] * x.ndim
    if grid.axis is not None:
        shape[grid.axis] = -1
    s = ScaledGradient.apply(scale, gradient_scale).reshape(shape if grid.axis is not None else ())
    z = torch.zeros_like(s).detach()
    if zero is not None:
        z = StraightThrough.apply(ScaledGradient.apply(zero, gradient_scale).clamp(grid.lowest, grid.highest)).reshape(s.shape)
    if grid.clips:
        x = torch.clamp(x, min=s * grid.lowest, max=s * grid.highest)
        s = s.detach()  # PACT: the rounding is no part of the gradient
    code = torch.clamp(StraightThrough.apply(x / s, grid.odd) + z, grid.lowest, grid.highest)
    return (code - z) * s


def gradients(run: Callable[..., Tensor], x: Tensor, scale: Tensor, zero: Tensor | None, dy: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, scale, zero) if leaf is not None]
    y = run(*leaves, *([None] if zero is None else []))
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


CASES = {
    "weights, a scale a channel": ((6, 5, 3, 3), QuantSpec(4, True, 0)),
    "weights of a point convolution": ((48, 33, 1, 1), QuantSpec(2, True, 0)),
    "weights, one scale": ((6, 5, 3, 3), QuantSpec(8, True)),
    "weights of 2 bits, odd": ((6, 5, 3, 3), QuantSpec(2, True, 0, odd=True)),
    "weights of 3 bits, odd, one scale": ((6, 5, 3, 3), QuantSpec(3, True, odd=True)),
    "an activation": ((2, 5, 17, 19), QuantSpec(4)),
    "an activation over several blocks": ((2, 3, 160, 161), QuantSpec(8)),
    "an activation a channel": ((2, 5, 17, 19), QuantSpec(3, False, 1)),
    "a channel longer than a block": ((2, 2, 370, 361), QuantSpec(3, False, 1)),
    "heads of an operand": ((2, 4, 13, 8), QuantSpec(8, False, 1)),
    "symmetric heads": ((1, 4, 13, 8), QuantSpec(8, True, 1)),
    "the last axis": ((3, 7, 9), QuantSpec(5, False, 2)),
    "a vector": ((50,), QuantSpec(6)),
    "a number": ((), QuantSpec(6)),
}


def drawn(shape: tuple[int, ...], spec: QuantSpec, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Values of which a fifth or so is clipped, scales and zero points between codes."""
    generator = torch.Generator().manual_seed(seed)
    size = () if spec.channel_axis is None else (shape[spec.channel_axis],)
    scale = torch.rand(size, generator=generator, dtype=torch.float64) + 0.3
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale.mean() * 2.0 ** (spec.bits - 1)
    zero = None if spec.symmetric else torch.rand(size, generator=generator, dtype=torch.float64) * spec.highest
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), scale.to(dtype), None if zero is None else zero.to(dtype), dy.to(dtype)


def bound_of_sums(x: Tensor, scale: Tensor, dy: Tensor, spec: QuantSpec) -> float:
    """What the magnitudes behind the sums add up to: the sums themselves cancel."""
    return float((dy.abs() * ((x / scale.mean()).abs() + spec.highest - spec.lowest)).sum())


@pytest.mark.parametrize("clips", [False, True], ids=["lsq", "pact"])
@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        *(pytest.param(case, PLAIN, id=f"{case}, plain") for case in CASES),
        *(pytest.param(case, BLOCKED, id=f"{case}, blocked") for case, (_, spec) in CASES.items() if not spec.odd),
    ],
)
def test_forward_and_gradients_are_those_of_the_definition(case: str, clips: bool, kernels: Kernels) -> None:
    shape, spec = CASES[case]
    grid = Grid(spec.lowest, spec.highest, spec.channel_axis, clips, spec.odd)
    for dtype in (torch.float64, torch.float32):
        x, scale, zero, dy = drawn(shape, spec, dtype)
        if clips:
            zero = None
        found = gradients(lambda *leaves: fake_quantize(*leaves, grid, 0.3, kernels), x, scale, zero, dy)
        expected = gradients(lambda *leaves: reference(*leaves, grid, 0.3), x, scale, zero, dy)
        precision = 1e-12 if dtype == torch.float64 else 1e-6
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=precision, atol=0)
        for own, defined in zip(found[2:], expected[2:], strict=True):
            assert own.shape == defined.shape
            torch.testing.assert_close(own, defined, rtol=precision, atol=precision * bound_of_sums(x, scale, dy, spec))


@pytest.mark.parametrize(("kernels", "odd"), [(BLOCKED, False), (PLAIN, False), (PLAIN, True)], ids=["blocked", "plain", "odd"])
@pytest.mark.parametrize("axis", [0, None])
def test_a_factor_is_multiplied_before_and_divided_by_after(axis: int | None, odd: bool, kernels: Kernels) -> None:
    grid = Grid(-7, 7, axis, odd=True) if odd else Grid(-8, 7, axis)
    x, scale, _, dy = drawn((6, 5, 3, 3), QuantSpec(4, True, axis), torch.float64)
    factor = torch.tensor([0.3, -2.0, 1.0, 5.0, -0.1, 1e-3], dtype=torch.float64)
    wide = factor.view(-1, 1, 1, 1)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x / wide, scale, factor)]
    defined = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = fake_quantize(leaves[0], leaves[1], None, grid, 0.3, kernels, factor=leaves[2])
    column = defined[2].view(-1, 1, 1, 1)
    expected = reference(defined[0] * column, defined[1], None, grid, 0.3) / column
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
    y.backward(dy)
    expected.backward(dy)
    for own, other in zip(leaves, defined, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clips", [False, True], ids=["lsq", "pact"])
@pytest.mark.parametrize("kernels", [BLOCKED, PLAIN], ids=["blocked", "plain"])
@pytest.mark.parametrize("spec", [QuantSpec(4, True, 0), QuantSpec(4, False, 1)], ids=str)
def test_writing_over_the_gradient_changes_none(spec: QuantSpec, kernels: Kernels, clips: bool) -> None:
    x, scale, zero, dy = drawn((6, 5, 7, 7), spec, torch.float64)
    grid, zero = Grid(spec.lowest, spec.highest, spec.channel_axis, clips), None if clips else zero
    apart = gradients(lambda *leaves: fake_quantize(*leaves, grid, 0.3, kernels), x, scale, zero, dy.clone())
    over = gradients(lambda *leaves: fake_quantize(*leaves, grid, 0.3, kernels, over=True), x, scale, zero, dy.clone())
    for one, other in zip(over, apart, strict=True):
        assert torch.equal(one, other)


def test_only_a_gradient_that_may_be_is_written_over() -> None:
    x, scale, _, dy = drawn((6, 5, 7, 7), QuantSpec(4, True, 0), torch.float64)
    for over in (False, True):
        given = dy.clone()
        leaf = x.clone().requires_grad_()
        fake_quantize(leaf, scale, None, Grid(-8, 7, 0), over=over).backward(given)
        assert torch.equal(given, dy) is not over
        assert torch.equal(given, leaf.grad) is over


@pytest.mark.parametrize("kernels", [BLOCKED, PLAIN], ids=["blocked", "plain"])
def test_the_logarithm_learns_as_the_scale_that_it_stands_for(kernels: Kernels) -> None:
    x, scale, zero, dy = drawn((2, 5, 17, 19), QuantSpec(4, False, 1), torch.float64)
    logarithm = scale.log().requires_grad_()
    defined = scale.log().requires_grad_()
    fake_quantize(x, logarithm, zero, Grid(0, 15, 1), 0.3, kernels, logarithm=True).backward(dy)
    scaled = ScaledGradient.apply(defined, 0.3).exp()
    reference(x, scaled, zero, Grid(0, 15, 1), 1.0).backward(dy)
    torch.testing.assert_close(logarithm.grad, defined.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, True, 0), QuantSpec(8, False, 1)], ids=str)
@pytest.mark.parametrize("kernels", [BLOCKED, PLAIN], ids=["blocked", "plain"])
def test_what_is_frozen_has_no_gradient_and_lets_the_others_through(spec: QuantSpec, kernels: Kernels) -> None:
    x, scale, zero, dy = drawn((4, 3, 9, 9), spec, torch.float64)
    grid = Grid(spec.lowest, spec.highest, spec.channel_axis)
    learning = gradients(lambda *leaves: fake_quantize(*leaves, grid, kernels=kernels), x, scale, zero, dy)
    leaf = x.clone().requires_grad_()
    fake_quantize(leaf, scale, zero, grid, kernels=kernels).backward(dy)
    assert torch.equal(leaf.grad, learning[1])
    alone = scale.clone().requires_grad_()
    fake_quantize(x, alone, zero, grid, kernels=kernels).backward(dy)
    assert torch.equal(alone.grad, learning[2])


def test_the_scale_gradient_is_the_published_one() -> None:
    x, scale, _, dy = drawn((4, 50), QuantSpec(3, True), torch.float64)
    found = gradients(lambda *leaves: fake_quantize(*leaves, Grid(-4, 3), 0.25), x, scale, None, dy)
    v = x / scale
    code = torch.round(v)
    slope = torch.where(code < -4, -4.0, torch.where(code > 3, 3.0, code - v))
    torch.testing.assert_close(found[2], 0.25 * (dy * slope).sum(), rtol=1e-12, atol=0)
    assert (code < -4).any()
    assert (code > 3).any()
    assert ((code >= -4) & (code <= 3)).any()


def as_onnx(x: np.ndarray, scale: np.float32, zero: int, lowest: int, highest: int) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear, float32 throughout."""
    code = np.clip(np.rint(x / scale) + np.float32(zero), np.float32(lowest), np.float32(highest))
    return (code - np.float32(zero)) * scale


@pytest.mark.parametrize("kernels", [BLOCKED, PLAIN], ids=["blocked", "plain"])
def test_rounds_as_onnx_does_to_the_last_bit(kernels: Kernels) -> None:
    scale = np.float32(0.0371)
    halves = (np.arange(-30, 300, dtype=np.float32) + np.float32(0.5)) * scale
    x = np.concatenate([halves, np.random.default_rng(0).normal(4, 3, 5000).astype(np.float32)])
    assert (np.rint(x / scale) != np.rint(x * (np.float32(1) / scale))).any(), "a product with 1 / s would show"
    assert (np.rint(x / scale) + 3 != np.rint(x / scale + np.float32(3))).any(), "rounding after z would show"
    y = fake_quantize(torch.from_numpy(x), torch.tensor(scale), torch.tensor(3.2), Grid(0, 255), kernels=kernels)
    np.testing.assert_array_equal(y.numpy(), as_onnx(x, scale, 3, 0, 255))


def test_ties_go_to_the_even_code_before_the_zero_point_is_added() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert fake_quantize(x, torch.tensor(1.0), torch.tensor(5.0), Grid(0, 15)).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_keeps_the_layout_and_takes_gradients_in_any(layout: torch.memory_format) -> None:
    x, scale, zero, dy = drawn((2, 5, 17, 19), QuantSpec(4), torch.float64)
    x = x.to(memory_format=layout)
    grid = Grid(0, 15)
    for gradient in (dy, dy.to(memory_format=torch.channels_last), dy[:, :1, :1, :1].expand_as(dy)):
        found = gradients(lambda *leaves: fake_quantize(*leaves, grid), x, scale, zero, gradient)
        assert found[0].is_contiguous(memory_format=layout)
        for own, defined in zip(found, gradients(lambda *leaves: reference(*leaves, grid, 1.0), x, scale, zero, gradient), strict=True):
            torch.testing.assert_close(own, defined, rtol=1e-12, atol=1e-9)


def test_takes_a_view_with_gaps() -> None:
    x, scale, zero, dy = drawn((2, 5, 17, 40), QuantSpec(4), torch.float64)
    dy = dy[..., ::2]
    for grid, s, z in ((Grid(0, 15), scale, zero), (Grid(0, 15, 1), scale.repeat(5), zero.repeat(5))):
        found = gradients(lambda x, s, z, grid=grid: fake_quantize(x[..., ::2], s, z, grid), x, s, z, dy)
        expected = gradients(lambda x, s, z, grid=grid: reference(x[..., ::2], s, z, grid, 1.0), x, s, z, dy)
        for own, defined in zip(found, expected, strict=True):
            torch.testing.assert_close(own, defined, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("kernels", [BLOCKED, PLAIN], ids=["blocked", "plain"])
@pytest.mark.parametrize("axis", [None, 1])
def test_nan_is_never_hidden(axis: int | None, kernels: Kernels) -> None:
    size = () if axis is None else (3,)
    x = torch.randn(2, 3, 8, 8)
    x[1, 2, 3, 3] = torch.nan
    grid = Grid(0, 15, axis)
    scale, zero = torch.full(size, 0.3, requires_grad=True), torch.full(size, 4.0, requires_grad=True)
    y = fake_quantize(x, scale, zero, grid, kernels=kernels)
    assert torch.equal(torch.isnan(y), torch.isnan(x))
    y.sum().backward()
    assert torch.isnan(scale.grad).any()
    healthy = torch.randn(2, 3, 8, 8)
    for broken_scale, broken_zero in ((torch.nan, 4.0), (0.3, torch.nan)):
        s, z = torch.full(size, broken_scale, requires_grad=True), torch.full(size, broken_zero, requires_grad=True)
        y = fake_quantize(healthy, s, z, grid, kernels=kernels)
        assert torch.isnan(y).all()
        y.sum().backward()
        assert torch.isnan(s.grad).all()


def test_infinite_values_are_clipped_to_the_ends() -> None:
    x = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38])
    assert fake_quantize(x, torch.tensor(2.0**-100), torch.tensor(3.0), Grid(0, 15)).mul(2.0**100).tolist() == [12, -3, 12, -3]


@pytest.mark.parametrize(("zero", "pushes"), [(-0.4, 1.0), (15.3, -1.0)])
def test_a_zero_point_at_its_limit_is_pushed_back_but_never_further(zero: float, pushes: float) -> None:
    for direction in (1.0, -1.0):
        z = torch.tensor(zero, requires_grad=True)
        x = torch.tensor([100.0, -100.0])
        fake_quantize(x, torch.tensor(1.0), z, Grid(0, 15)).backward(torch.full((2,), direction))
        # both values are clipped: dy/dz = -s each
        assert z.grad.item() == (-2 * direction if direction == pushes else 0)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_block_follows_the_threads_and_changes_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(rounding, "BLOCK", 100)
    for shape, spec in (((2, 3, 20, 21), QuantSpec(4)), ((40, 3, 3, 3), QuantSpec(4, True, 0)), ((2, 3, 20, 21), QuantSpec(4, False, 1))):
        x, scale, zero, dy = drawn(shape, spec, torch.float64)
        grid = Grid(spec.lowest, spec.highest, spec.channel_axis)
        found = gradients(lambda *leaves, grid=grid: fake_quantize(*leaves, grid), x, scale, zero, dy)
        expected = gradients(lambda *leaves, grid=grid: reference(*leaves, grid, 1.0), x, scale, zero, dy)
        for own, defined in zip(found, expected, strict=True):
            torch.testing.assert_close(own, defined, rtol=1e-12, atol=1e-9)


def test_takes_no_memory_beyond_its_result_and_a_block() -> None:
    x = torch.randn(1 << 20, requires_grad=True)
    scale, zero = torch.tensor(0.1, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = fake_quantize(x, scale, zero, Grid(0, 15))
    allocated = [event.self_cpu_memory_usage for event in profile.key_averages()]
    assert sum(size for size in allocated if size > 0) < x.nbytes * 1.1
    saved = {tensor.data_ptr() for tensor in y.grad_fn.saved_tensors if tensor is not None and tensor.numel() > 1}
    assert saved <= {x.data_ptr()}, "the input alone is kept for the backward"


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, True, 0), QuantSpec(8, False, 1)], ids=str)
def test_reads_no_number_back_from_a_device(spec: QuantSpec) -> None:
    """A meta tensor has no numbers: .item(), .tolist() or a truth value raise."""
    quantizer = prepared(spec, torch.randn(4, 3, 8, 8)).to("meta")
    x = torch.empty(4, 3, 8, 8, device="meta", requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert y.is_meta
    assert quantizer.log_scale.grad.shape == quantizer.log_scale.shape


def test_one_compiled_form_serves_every_shape() -> None:
    seen = []

    def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(module)
        return module.forward

    torch._dynamo.reset()
    forward = torch.compile(rounding._plain_round, dynamic=True, fullgraph=True, backend=counting)
    backward = torch.compile(rounding._plain_gradients, dynamic=True, fullgraph=True, backend=counting)
    kernels = rounding._kernels_around(forward, backward)
    for shape in ((2, 3, 20, 21), (4, 3, 10, 11), (2, 3, 7, 30), (3, 3, 4, 5)):
        x, scale, zero, dy = drawn(shape, QuantSpec(4), torch.float64)
        found = gradients(lambda *leaves: fake_quantize(*leaves, Grid(0, 15), kernels=kernels), x, scale, zero, dy)
        expected = gradients(lambda *leaves: fake_quantize(*leaves, Grid(0, 15), kernels=BLOCKED), x, scale, zero, dy)
        for own, blocked in zip(found, expected, strict=True):
            torch.testing.assert_close(own, blocked, rtol=1e-12, atol=1e-9)
    assert len(seen) == 2


def test_blocks_are_for_the_processor() -> None:
    assert kernels_for(torch.empty(2, 3, 8, 8), Grid(-8, 7, 1)) is BLOCKED
    assert kernels_for(torch.empty(2, 3, 8, 8), Grid(-3, 3, 1, odd=True)) is PLAIN
    assert kernels_for(torch.empty(2, 3, 8, 8), Grid(-8, 7, 3)) is PLAIN  # rows of one element
    assert kernels_for(torch.empty(2, 3, 8, 8, device="meta"), Grid(-8, 7)) is PLAIN


# --- modules ---


def prepared(spec: QuantSpec, x: Tensor, **options: Any) -> FakeQuantize:
    """A quantizer that was calibrated on x."""
    quantizer = fake_quantizer(spec, **options)()
    quantizer.observing, quantizer.enabled = True, False
    quantizer(x)
    quantizer.initialise()
    quantizer.observing, quantizer.enabled = False, True
    return quantizer


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_calibrated_quantizer_yields_its_codes_and_no_other(bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, symmetric)
    x = 3 * torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(bits)) - 1.5
    quantizer = prepared(spec, x, observer="minmax")
    code = quantizer(x) / quantizer.scale + quantizer.zero_points
    torch.testing.assert_close(code, code.round(), rtol=0, atol=1e-4)
    assert code.min() >= spec.lowest - 1e-4
    assert code.max() <= spec.highest + 1e-4
    assert len(code.round().unique()) > (spec.highest - spec.lowest) * 0.9
    assert (quantizer(x) - x).abs().max() <= quantizer.scale * 1.001  # half a step, and half of one that the whole zero point moved


@pytest.mark.parametrize("axis", [0, None])
def test_odd_codes_of_a_tensor_of_zeros_are_next_to_nothing(axis: int | None) -> None:
    x = torch.zeros(4, 8, 3, 3)
    assert prepared(QuantSpec(2, True, axis, odd=True), x)(x).abs().max() < 1e-6
    x[1] = 1.0
    rounded = prepared(QuantSpec(2, True, 0, odd=True), x)(x)
    assert rounded[[0, 2, 3]].abs().max() < 1e-6
    torch.testing.assert_close(rounded[1], x[1])


def test_odd_codes_lie_evenly_around_zero_and_lose_less_than_those_that_do_not() -> None:
    x = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    odd, even = (prepared(QuantSpec(2, True, 0, odd=odd), x) for odd in (True, False))
    codes = odd(x) / odd.scale.view(-1, 1, 1, 1)
    assert codes.round().unique().tolist() == [-3, -1, 1, 3]
    assert torch.equal(odd(odd(x)), odd(x))
    assert (odd(x) - x).square().mean() < 0.8 * (even(x) - x).square().mean()  # 0.12 and 0.19 of a normal tensor's squares


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, True, 0), QuantSpec(3, False, 1)], ids=str)
def test_zero_stays_exactly_zero(spec: QuantSpec) -> None:
    quantizer = prepared(spec, torch.rand(4, 3, 8, 8) + 1)
    assert torch.equal(quantizer(torch.zeros(4, 3, 8, 8)), torch.zeros(4, 3, 8, 8))


def test_scales_stay_positive_whatever_the_optimizer_does() -> None:
    quantizer = prepared(QuantSpec(4, True, 0), torch.randn(5, 3, 3, 3))
    for step in (-1e3, -5.0, 30.0):
        quantizer.log_scale.data.add_(step)
        assert (quantizer.scale > 0).all()
        assert torch.isfinite(quantizer(torch.randn(5, 3, 3, 3))).all()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=10.0)
    for _ in range(20):
        optimizer.zero_grad()
        quantizer(torch.randn(5, 3, 3, 3)).square().sum().backward()
        optimizer.step()
        assert (quantizer.scale > 0).all()


def test_the_floor_under_a_scale_changes_no_scale_in_use() -> None:
    quantizer = prepared(QuantSpec(4), torch.randn(1, 3, 8, 8))
    for exponent in range(-75, 30):
        quantizer.log_scale.data.fill_(exponent * math.log(2))
        assert quantizer.scale.item() == quantizer.log_scale.exp().item()


@pytest.mark.parametrize(
    ("spec", "options", "served"),
    [
        (QuantSpec(4), {}, 3 * 8 * 8),
        (QuantSpec(8, True), {}, 3 * 8 * 8),
        (QuantSpec(8, True), {"weight": True}, 4 * 3 * 8 * 8),
        (QuantSpec(4, True, 0), {}, 3 * 8 * 8),
        (QuantSpec(3, False, 1), {}, 8 * 8),
    ],
)
def test_the_gradient_of_the_scale_is_scaled_by_what_it_serves(spec: QuantSpec, options: dict[str, Any], served: int) -> None:
    quantizer = prepared(spec, torch.randn(4, 3, 8, 8), **options)
    assert quantizer.gradient_scale(torch.empty(4, 3, 8, 8)) == pytest.approx(1 / math.sqrt(served * spec.highest), rel=1e-12)
    x = torch.randn(4, 3, 8, 8)
    quantizer(x).square().sum().backward()
    scale, zero = quantizer.scale.detach(), None if quantizer.zero_point is None else quantizer.zero_point.detach()
    dy = 2 * quantizer(x).detach()
    expected = gradients(lambda *leaves: reference(*leaves, quantizer.grid, 1 / math.sqrt(served * spec.highest)), x, scale, zero, dy)
    torch.testing.assert_close(quantizer.log_scale.grad, expected[2] * scale, rtol=1e-4, atol=1e-5)
    if zero is not None:
        torch.testing.assert_close(quantizer.zero_point.grad, expected[3], rtol=1e-4, atol=1e-5)


def test_an_activations_gradient_does_not_depend_on_the_batch() -> None:
    quantizer = prepared(QuantSpec(4), torch.randn(2, 3, 8, 8))
    assert quantizer.gradient_scale(torch.empty(2, 3, 8, 8)) == quantizer.gradient_scale(torch.empty(64, 3, 8, 8))


@pytest.mark.parametrize("spec", [QuantSpec(2, True, 0), QuantSpec(2, True, 0, odd=True), QuantSpec(3), QuantSpec(4, False, 1)], ids=str)
def test_learning_lowers_the_error(spec: QuantSpec) -> None:
    x = nn.functional.silu(torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * 2)
    quantizer = prepared(spec, x, observer="minmax")
    before = (quantizer(x) - x).square().mean().item()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert (quantizer(x) - x).square().mean().item() < 0.8 * before


def test_a_learned_zero_point_stays_among_the_codes() -> None:
    quantizer = prepared(QuantSpec(4), torch.rand(1, 3, 8, 8))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=50.0)
    for sign in (1.0, -1.0):
        for _ in range(10):
            optimizer.zero_grad()
            (sign * quantizer(torch.randn(1, 3, 8, 8) * 50)).sum().backward()
            optimizer.step()
            assert 0 <= quantizer.zero_points.item() <= 15
            assert quantizer.zero_points.dtype == torch.int32


def test_pact_clips_below_zero_and_learns_where_to_clip_above() -> None:
    x = torch.tensor([[-3.0, 0.4, 1.0, 7.0, 9.0]])
    quantizer = prepared(QuantSpec(4), torch.tensor([[-9.0, 6.0]]), method="pact", observer="minmax")
    assert isinstance(quantizer, PACT)
    assert quantizer.zero_points.item() == 0
    assert quantizer.scale.item() == pytest.approx(6 / 15)
    y = quantizer(x)
    assert y[0, 0].item() == 0
    assert y[0, 3].item() == pytest.approx(6)
    assert y[0, 4].item() == pytest.approx(6)
    y.sum().backward()
    assert quantizer.log_scale.grad.item() == pytest.approx(2 * 6, rel=1e-5)  # d alpha/d log s = alpha, once for each of the two clipped


def test_a_fixed_scale_learns_nothing_and_needs_no_calibration() -> None:
    quantizer = fake_quantizer(QuantSpec(8), fixed=(1 / 255, 0))()
    assert isinstance(quantizer, FixedScale)
    assert not quantizer.learns
    assert quantizer.initialised
    assert list(quantizer.parameters()) == []
    assert quantizer.scale.item() == np.float32(1 / 255)
    x = torch.sigmoid(torch.randn(2, 3, 9, 9)).requires_grad_()
    y = quantizer(x)
    np.testing.assert_array_equal(y.detach().numpy(), as_onnx(x.detach().numpy(), np.float32(1 / 255), 0, 0, 255))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    shifted = fake_quantizer(QuantSpec(4), fixed=(0.5, 4))()
    assert shifted.zero_points.item() == 4
    assert shifted(torch.tensor([-9.0, 9.0])).tolist() == [-2.0, 5.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_in_float32(dtype: torch.dtype) -> None:
    quantizer = prepared(QuantSpec(8), torch.randn(2, 3, 30, 30))
    x = torch.randn(2, 3, 30, 30).to(dtype)
    assert quantizer(x).dtype == dtype
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = quantizer(x.requires_grad_())
        assert y.dtype == torch.float32, "as autocast's own float32 operations"
        assert torch.equal(y, quantizer(x.float()))
        y.sum().backward()  # inside, as the backward must not round either
    inside = quantizer.log_scale.grad.clone()
    quantizer.log_scale.grad = None
    quantizer(x.float()).sum().backward()
    assert torch.equal(inside, quantizer.log_scale.grad)


def test_a_factor_is_seen_by_the_observer_and_rounded_with() -> None:
    x, factor = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, -3.0, 0.5, 2.0, 0.1])
    folded = prepared(QuantSpec(4, True, 0), x * factor.view(-1, 1, 1, 1))
    quantizer = fake_quantizer(QuantSpec(4, True, 0))()
    quantizer.observing, quantizer.enabled = True, False
    assert quantizer(x, factor) is x
    quantizer.initialise()
    quantizer.observing, quantizer.enabled = False, True
    assert torch.equal(quantizer.scale, folded.scale)
    torch.testing.assert_close(quantizer(x, factor) * factor.view(-1, 1, 1, 1), folded(x * factor.view(-1, 1, 1, 1)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(3, True, 0), QuantSpec(2, True, 0, odd=True)], ids=str)
def test_codes_that_are_watched_are_those_it_rounds_to(spec: QuantSpec) -> None:
    x = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = prepared(spec, x)
    scale, zero = (value if value.ndim == 0 else value.view(-1, 1, 1, 1) for value in quantizer.calculate_qparams())
    codes, clipped = codes_of(quantizer, x)
    torch.testing.assert_close((codes - zero) * scale, quantizer(x).detach())
    beyond = (x / scale + zero - codes).abs() > spec.step / 2 + 1e-3
    assert 0 < clipped < 0.3
    assert clipped == beyond.float().mean()


def test_a_quantizer_that_is_off_passes_its_input_on() -> None:
    quantizer = fake_quantizer(QuantSpec(4))()
    quantizer.enabled = False
    x = torch.randn(2, 3)
    assert quantizer(x) is x


def test_rounding_without_a_scale_is_refused() -> None:
    with pytest.raises(UserError, match="calibrate"):
        fake_quantizer(QuantSpec(4))()(torch.randn(2, 3))
    with pytest.raises(UserError, match="nothing was observed"):
        fake_quantizer(QuantSpec(4))().initialise()


def test_nothing_is_rounded_where_there_is_nothing() -> None:
    for spec in (QuantSpec(4), QuantSpec(4, False, 1)):
        assert prepared(spec, torch.randn(2, 3, 4, 4))(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, True, 0), QuantSpec(8, False, 1)], ids=str)
def test_a_state_restores_a_quantizer_that_has_seen_nothing(spec: QuantSpec) -> None:
    x = torch.randn(6, 5, 8, 8)
    original = prepared(spec, x)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.37)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    restored = fake_quantizer(spec)()
    optimizer = torch.optim.SGD(restored.parameters(), lr=0.1)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.initialised
    assert restored.enabled
    assert torch.equal(restored(x), original(x))
    assert torch.equal(restored.zero_points, original.zero_points)
    assert {id(parameter) for parameter in optimizer.param_groups[0]["params"]} == {id(parameter) for parameter in restored.parameters()}
    restored(x).square().sum().backward()
    before = restored.log_scale.detach().clone()
    optimizer.step()
    assert not torch.equal(before, restored.log_scale)


def test_a_state_holds_what_is_off_and_what_was_never_calibrated() -> None:
    quantizer = fake_quantizer(QuantSpec(4, False, 1))()
    quantizer.enabled = False
    restored = fake_quantizer(QuantSpec(4, False, 1))()
    restored.load_state_dict(quantizer.state_dict())
    assert not restored.enabled
    assert not restored.initialised


def test_a_state_of_another_kind_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        fake_quantizer(QuantSpec(4))().load_state_dict(prepared(QuantSpec(4, False, 1), torch.randn(2, 3, 4, 4)).state_dict())
    with pytest.raises(RuntimeError, match="zero_point"):
        fake_quantizer(QuantSpec(4, True))().load_state_dict(prepared(QuantSpec(4), torch.randn(2, 3, 4, 4)).state_dict())


def test_a_copy_stands_alone() -> None:
    quantizer = prepared(QuantSpec(4), torch.randn(2, 3, 8, 8))
    twin = copy.deepcopy(quantizer)
    twin.log_scale.data.add_(1)
    twin.enabled = False
    assert quantizer.enabled
    assert not torch.equal(twin.scale, quantizer.scale)


def test_calibrating_forgets_what_was_seen() -> None:
    quantizer = prepared(QuantSpec(4), torch.randn(2, 3, 8, 8))
    with pytest.raises(UserError, match="nothing was observed"):
        quantizer.initialise()


# --- what torch.ao reads ---


def test_each_way_to_quantize_has_one_class() -> None:
    assert fake_quantizer(QuantSpec(4)) is fake_quantizer(QuantSpec(4))
    ways = [QuantSpec(4), QuantSpec(8), QuantSpec(4, True), QuantSpec(4, False, 1)]
    classes = {fake_quantizer(spec) for spec in ways} | {fake_quantizer(QuantSpec(4), "pact"), fake_quantizer(QuantSpec(4), dynamic=True)}
    assert len(classes) == 6
    assert [fake_quantizer(QuantSpec(4, symmetric)).__mro__[1] for symmetric in (False, True)] == [LSQPlus, LSQ]


def test_torch_ao_finds_what_it_reads() -> None:
    kind = fake_quantizer(QuantSpec(4, True, 0))
    quantizer = kind.with_args(factory_kwargs=None)()
    assert isinstance(quantizer, FakeQuantizeBase)
    assert type(quantizer) is kind
    assert (quantizer.dtype, quantizer.qscheme, quantizer.ch_axis) == (torch.qint8, torch.per_channel_symmetric, 0)
    observer = quantizer.activation_post_process
    assert (observer.quant_min, observer.quant_max) == (-8, 7)
    assert observer.eps > 0
    assert fake_quantizer(QuantSpec(4))().dtype == torch.quint8
    assert not kind.is_dynamic
    assert fake_quantizer(QuantSpec(4), dynamic=True).is_dynamic
    assert kind(factory_kwargs={"device": "meta"}).log_scale.is_meta
    other = fake_quantizer(QuantSpec(4))
    assert qconfig_equals(QConfig(other, kind), QConfig(other, kind))
    assert not qconfig_equals(QConfig(other, kind), QConfig(kind, other))
    scale, zero = prepared(QuantSpec(4, True, 0), torch.randn(5, 3, 3, 3)).calculate_qparams()
    assert scale.shape == (5,)
    assert not scale.requires_grad
    assert torch.equal(zero, torch.zeros(5, dtype=torch.int32))


def test_passes_look_through_it_and_print_what_does_not_change() -> None:
    quantizer = fake_quantizer(QuantSpec(4, False, 1))()
    assert is_quantizer(quantizer)
    assert describe(quantizer) == "LSQPlus[4 bit, axis 1]"
    assert describe(prepared(QuantSpec(4, False, 1), torch.randn(2, 3, 4, 4))) == describe(quantizer)
    assert describe(fake_quantizer(QuantSpec(8), fixed=(1 / 255, 0))()) == "FixedScale[8 bit, fixed 0.00392157 0]"


def test_an_unknown_way_to_quantize_is_refused() -> None:
    with pytest.raises(UserError, match="'lsqq' is no way to quantize; give one of lsq, pact"):
        fake_quantizer(QuantSpec(4), "lsqq")
