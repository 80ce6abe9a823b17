"""Rounding to the codes that exist, and its gradients: one autograd function, three ways to compute it.

    code = clip(nearest(x / s) + z, lowest, highest)    before z is added; a division, never a product with 1 / s
    y = (code - z) s

    dy/dx = 1 where a code exists for x, else 0
    dy/ds = code - z - (x / s where a code exists, else 0);       dy/dz = 0 where a code exists, else -s

`nearest` gives a whole number, half to even, or of `odd` codes an odd one, half up. A code exists for x where nearest(x / s) + z needs no
clipping. z is rounded first, with the gradient of what is not rounded; a gradient that would push z out of [lowest, highest] is zero.

With `clips` (there is no z then) the gradient is PACT's, that of clip(x, lowest s, highest s) before it is rounded: dy/dx = 1 within the
ends, and dy/ds = code beyond them, else 0.

On a processor x is taken a block at a time, so that a block stays in its cache from the first operation to the last, and the backward
computes the codes again rather than keep them. On CUDA the plain form is compiled, once for all shapes. NaN comes out as NaN. No operation
here is one of those that autocast rounds to half precision.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from passes.fx.codes import nearest

logger = logging.getLogger(__name__)

BLOCK = 1 << 17  # elements a thread takes at a time: few enough to stay in its cache, so many that calling torch costs little beside
SHORTEST_ROW = 16  # below, a row of its own scale is no work for the blocked form

_keep_inside = torch.ops.aten.hardtanh_backward.grad_input  # gradient where lower < value < upper, else 0, in one go


Ends = tuple[float, float]
Sum = Tensor | float | None  # a number where one scale serves the whole tensor, None where nothing learns
Gradients = tuple[Tensor, Sum, Sum]


@dataclass(frozen=True)
class Grid:
    """The codes, which axis has a scale of its own, whether the gradient of the scale is PACT's, and whether codes are odd alone."""

    lowest: int
    highest: int
    axis: int | None = None
    clips: bool = False
    odd: bool = False


@dataclass(frozen=True)
class Kernels:
    """x, s, z, grid -> y; and dy, x, s, z, grid -> dx, s ds, dz. x is dense; z is not rounded yet, or None for 0.

    The backward is told whether anything but x learns, else it gives dx alone, and whether dx may be written over dy.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None, Grid], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor | None, Grid, bool, bool], Gradients]


def _dense(x: Tensor, axis: int | None) -> Tensor:
    """x without gaps: in rows along an axis, else in any order."""
    if x.is_contiguous() or (axis is None and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def _whole(zero: Tensor | None, grid: Grid) -> Tensor | None:
    return None if zero is None else zero.clamp(grid.lowest, grid.highest).round_()


def _whole_number(zero: Tensor | None, grid: Grid) -> float:
    if zero is None:
        return 0.0
    number: float = zero.item()
    return number if math.isnan(number) else float(round(min(max(number, grid.lowest), grid.highest)))


# --- blocked, for processors ---


def _flat(dense: Tensor) -> Tensor:
    return (dense if dense.is_contiguous() else dense.permute(0, 2, 3, 1)).view(-1)


def _as_rows(x: Tensor, axis: int) -> Tensor:
    """One row for each scale: the axis last but one, whatever is behind it in the row."""
    return x.view(x.shape[:axis].numel() * x.shape[axis], -1)


def _block() -> int:
    return BLOCK * torch.get_num_threads()


def _parts(flat: Tensor, size: int) -> Sequence[Tensor]:
    return (flat,) if len(flat) <= size else flat.split(size)


def _round_flat(x: Tensor, y: Tensor, scale: Tensor, lowest: float, highest: float) -> None:
    size = _block()
    blocks = [(x, y)] if x.numel() <= size else zip(_flat(x).split(size), _flat(y).split(size), strict=True)
    for values, out in blocks:
        torch.div(values, scale, out=out).round_().clamp_(lowest, highest).mul_(scale)


def _blocked_forward(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    if grid.axis is None:
        y = torch.empty_like(x)
        shift = _whole_number(zero, grid)
        _round_flat(x, y, scale, grid.lowest - shift, grid.highest - shift)
        return y
    rows = _as_rows(x, grid.axis)
    y = torch.empty_like(rows)
    scales, zeros = _of_rows(scale, len(rows)), _of_rows(_whole(zero, grid), len(rows))
    if rows.shape[1] >= BLOCK:
        shifts = [0.0] * len(rows) if zeros is None else zeros.flatten().tolist()
        for row, out, own, shift in zip(rows, y, scales, shifts, strict=True):
            _round_flat(row, out, own, grid.lowest - shift, grid.highest - shift)
        return y.view(x.shape)
    for values, out, own, shift in _row_blocks(rows, y, scales, zeros):
        torch.div(values, own, out=out).round_()
        if shift is None:
            out.clamp_(grid.lowest, grid.highest).mul_(own)
        else:
            out.add_(shift).clamp_(grid.lowest, grid.highest).sub_(shift).mul_(own)
    return y.view(x.shape)


@overload
def _of_rows(per_channel: Tensor, count: int) -> Tensor: ...


@overload
def _of_rows(per_channel: Tensor | None, count: int) -> Tensor | None: ...


def _of_rows(per_channel: Tensor | None, count: int) -> Tensor | None:
    """A column with the channel's value for each of `count` rows, in which the channels repeat."""
    if per_channel is None:
        return None
    return (per_channel if len(per_channel) == count else per_channel.repeat(count // len(per_channel))).unsqueeze(1)


def _row_blocks(rows: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Groups of whole rows of all tensors, about a block each; None where there is no tensor."""
    count = max(1, _block() // rows.shape[1])
    if len(rows) <= count:
        yield rows, *others
        return
    parts = rows.split(count)
    yield from zip(parts, *([None] * len(parts) if each is None else each.split(count) for each in others), strict=True)


def _scratch(values: Tensor, codes: Tensor | None) -> Tensor:
    """Memory for the codes of a block: that of the block before, as long as is needed."""
    if codes is None:
        return torch.empty_like(values)
    return codes if len(codes) == len(values) else codes[: len(values)]


def _keep_where_coded(dy: Tensor, code: Tensor, grid: Grid, ends: Ends, dx: Tensor) -> None:
    """Writes dx, which may be dy's own memory. `code` is x / s between the ends, rounded unless the grid clips."""
    margin = 0.0 if grid.clips else 0.5
    _keep_inside(dy, code, ends[0] - margin, ends[1] + margin, grad_input=dx)


def _flat_gradients(dy: Tensor, x: Tensor, dx: Tensor, scale: Tensor, shift: float | None, grid: Grid, learns: bool) -> tuple[float, float]:
    """Writes dx; returns s ds and dz."""
    size, step = _block(), scale.item()
    ends = (grid.lowest - (shift or 0.0), grid.highest - (shift or 0.0))
    code, levels, inside, outside = None, 0.0, 0.0, 0.0
    for gradient, values, out in zip(_parts(dy, size), _parts(x, size), _parts(dx, size), strict=True):
        code = _scratch(values, code)
        torch.div(values, scale, out=code)
        if not grid.clips:
            code.round_()
        _keep_where_coded(gradient, code, grid, ends, out)
        if not learns:
            continue
        (code.round_() if grid.clips else code).clamp_(*ends)
        levels += torch.dot(gradient, code).item()
        inside += torch.dot(out, code if grid.clips else values).item()
        if shift is not None:
            outside += gradient.sum().item() - out.sum().item()
    return (levels - inside) * step if grid.clips else levels * step - inside, -outside * step


def _blocked_backward(dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, learns: bool, over: bool) -> Gradients:
    if grid.axis is None:
        dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
        dx = torch.empty_like(x)
        shift = None if zero is None else _whole_number(zero, grid)
        total, dz = _flat_gradients(_flat(dy), _flat(x), _flat(dx), scale, shift, grid, learns)
        return dx, total, None if zero is None else dz
    rows, dys = _as_rows(x, grid.axis), _as_rows(dy.contiguous(), grid.axis)
    scales, zeros = _of_rows(scale, len(rows)), _of_rows(_whole(zero, grid), len(rows))
    if rows.shape[1] >= BLOCK:
        dx = torch.empty_like(rows)
        shifts = [None] * len(rows) if zeros is None else zeros.flatten().tolist()
        sums = [
            _flat_gradients(gradient, row, out, own, shift, grid, learns)
            for gradient, row, out, own, shift in zip(dys, rows, dx, scales.flatten(), shifts, strict=True)
        ]
        of_channels = scale.new_tensor(sums).view(-1, len(scale), 2).sum(0)
        return dx.view(x.shape), of_channels[:, 0], None if zero is None else of_channels[:, 1]
    dx = dys if over else torch.empty_like(rows)
    slopes, outsides = [], []
    code = level = None
    for values, gradient, out, own, shift in _row_blocks(rows, dys, dx, scales, zeros):
        code, level = _scratch(values, code), _scratch(values, level)
        torch.div(values, own, out=code)
        if not grid.clips:
            code.round_()
        if shift is not None:
            code.add_(shift)
        if not learns:
            _keep_where_coded(gradient, code, grid, (grid.lowest, grid.highest), out)
            continue
        torch.clamp(code, grid.lowest, grid.highest, out=level)
        if grid.clips:
            level.round_()
        if shift is not None:
            level.sub_(shift)
            outsides.append(gradient.sum(1))
        slope = _row_dots(gradient, level, torch.empty_like(level) if grid.clips else level)
        _keep_where_coded(gradient, code, grid, (grid.lowest, grid.highest), out)
        inside = _row_dots(out, level if grid.clips else values, code)
        steps = own.squeeze(1)
        slopes.append(slope.sub_(inside).mul_(steps) if grid.clips else slope.mul_(steps).sub_(inside))
        if shift is not None:
            outsides[-1] -= out.sum(1)
    if not learns:
        return dx.view(x.shape), None, None
    return dx.view(x.shape), _of_channels(slopes, scale), None if zero is None else -scale * _of_channels(outsides, scale)


def _row_dots(one: Tensor, other: Tensor, products: Tensor) -> Tensor:
    """The dot product of each row with the other's; `products` is memory for them, which may be the other's own."""
    return torch.mul(one, other, out=products).sum(1)


def _of_channels(blocks: list[Tensor], scale: Tensor) -> Tensor:
    """What was summed a row, summed a channel."""
    rows = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return rows if len(rows) == len(scale) else rows.view(-1, len(scale)).sum(0)


# --- the plain form, compiled on CUDA ---


def _plain_round(x: Tensor, scale: Tensor, zero: Tensor, lowest: int, highest: int, odd: bool) -> Tensor:
    return (torch.clamp(nearest(x / scale, odd) + zero, lowest, highest) - zero) * scale


def _plain_gradients(
    dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor, lowest: int, highest: int, clips: bool, odd: bool
) -> tuple[Tensor, Tensor, Tensor]:
    code = nearest(x / scale, odd) + zero
    inside = (x / scale > lowest) & (x / scale < highest) if clips else (code >= lowest) & (code <= highest)
    dx = torch.where(inside, dy, 0.0)
    level = torch.clamp(code, lowest, highest) - zero
    slope = ((dy * level - dx * (level if clips else x / scale)) * scale).sum((0, 2))
    return dx, slope, ((dx - dy) * scale).sum((0, 2))


def _in_three(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """x as [before, channels, behind], with scale and whole zero point to match, so that one compiled form serves every shape."""
    axis, whole = grid.axis, _whole(zero, grid)
    around = (1, 1, -1) if axis is None else (x.shape[:axis].numel(), x.shape[axis], x.shape[axis + 1 :].numel())
    wide = scale.reshape(-1, 1)
    return x.reshape(around), wide, torch.zeros_like(wide) if whole is None else whole.reshape(-1, 1)


def _kernels_around(rounds: Callable[..., Tensor], gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Kernels:
    def forward(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
        return rounds(*_in_three(x, scale, zero, grid), grid.lowest, grid.highest, grid.odd).view(x.shape)

    def backward(dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, learns: bool, over: bool) -> Gradients:
        values, own, shift = _in_three(x, scale, zero, grid)
        dx, slope, dz = gradients(dy.reshape(values.shape), values, own, shift, grid.lowest, grid.highest, grid.clips, grid.odd)
        return dx.view(x.shape), slope.view(scale.shape), None if zero is None else dz.view(scale.shape)

    return Kernels(forward, backward)


BLOCKED = Kernels(_blocked_forward, _blocked_backward)
PLAIN = _kernels_around(_plain_round, _plain_gradients)


@functools.cache
def compiled() -> Kernels:
    """The plain form through torch.compile: one kernel a direction. A division that rounds as the processor's does is asked for."""
    compiles = functools.partial(torch.compile, dynamic=True, options={"eager_numerics.division_rounding": True})
    return _kernels_around(compiles(_plain_round), compiles(_plain_gradients))


@functools.cache
def _for_cuda() -> Kernels:
    if importlib.util.find_spec("triton") is not None:
        return compiled()
    logger.warning("triton is not installed: quantizers run uncompiled on CUDA, several times slower")
    return PLAIN


def kernels_for(x: Tensor, grid: Grid) -> Kernels:
    if torch.compiler.is_compiling():
        return PLAIN
    if x.is_cuda:
        return _for_cuda()
    real = type(x) in (Tensor, nn.Parameter)  # a tensor of another class may stand for numbers that are not there
    if grid.odd:  # of weights alone, which are small beside activations
        return PLAIN
    long = grid.axis is None or x.shape[grid.axis + 1 :].numel() >= SHORTEST_ROW
    return BLOCKED if real and x.device.type == "cpu" and long else PLAIN


# --- the autograd function ---

SMALLEST_SCALE = 2.0**-100  # added to exp(log s): nothing beside a scale in use, and never nothing


def from_logarithm(log_scale: Tensor) -> Tensor:
    """A scale that is positive whatever its logarithm."""
    return log_scale.exp() + SMALLEST_SCALE


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        factor: Tensor | None,
        grid: Grid,
        gradient_scale: float,
        logarithm: bool,
        over: bool,
        kernels: Kernels,
    ) -> Tensor:
        x = _dense(x, grid.axis)
        true = from_logarithm(scale) if logarithm else scale
        steps = true if factor is None else true / factor
        ctx.save_for_backward(x, true, zero, factor, steps)
        ctx.options = grid, gradient_scale, logarithm, over, kernels
        return kernels.forward(x, steps, zero, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, scale, zero, factor, steps = ctx.saved_tensors
        grid, gradient_scale, logarithm, over, kernels = ctx.options
        learns = any(ctx.needs_input_grad[1:4])
        dx, slope, dz = kernels.backward(dy, x, steps, zero, grid, learns, over)
        none = None, None, None, None, None
        if not learns or slope is None:
            return dx, None, None, None, *none
        dfactor = -slope / factor if ctx.needs_input_grad[3] else None
        ds = slope * gradient_scale if logarithm else slope * gradient_scale / scale
        if isinstance(ds, float):
            ds = scale.new_tensor(ds)
        return dx, ds, None if dz is None else _inwards(dz * gradient_scale, zero, grid), dfactor, *none


def _inwards(dz: Tensor | float, zero: Tensor, grid: Grid) -> Tensor:
    """dz, and 0 where a step against it would leave the codes: at the lowest none is taken down, at the highest none up."""
    if isinstance(dz, float):
        at = zero.item()
        return zero.new_tensor(0.0 if (dz > 0 and at <= grid.lowest) or (dz < 0 and at >= grid.highest) else dz)
    return dz.masked_fill(torch.where(dz > 0, zero <= grid.lowest, (zero >= grid.highest) & (dz < 0)), 0)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    grid: Grid,
    gradient_scale: float = 1.0,
    kernels: Kernels | None = None,
    *,
    factor: Tensor | None = None,
    logarithm: bool = False,
    over: bool = False,
) -> Tensor:
    """x rounded to the grid. `scale` and `zero` have no axes, or one a channel; their gradients are scaled by `gradient_scale`.

    `factor`, one a channel and never 0, stands for what x is multiplied with before, and divided by after it is rounded: a normalisation's
    folded into a weight. Nothing is multiplied, though: round(x k / s) s / k rounds x with the scale s / k. `logarithm`: of the scale its
    logarithm is given. `over`: the gradient of x may be written over that of the result, because one operation alone reads the result, and
    gives its gradient to nobody else. Half-precision values are rounded in float32. The result has x's type; where autocast is on it stays
    float32, as that does elsewhere.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if factor is not None and grid.axis is None:  # one scale, and yet a step for each channel
        grid = replace(grid, axis=0)
        scale, zero = scale.expand(len(factor)), None if zero is None else zero.expand(len(factor))
    own = [each if each is None or each.dtype == wide.dtype else each.to(wide.dtype) for each in (scale, zero, factor)]
    chosen = kernels_for(wide, grid) if kernels is None else kernels
    y: Tensor = _FakeQuantize.apply(wide, *own, grid, gradient_scale, logarithm, over, chosen)  # type: ignore[no-untyped-call]
    if wide is x or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
        return y
    return y.to(x.dtype)
