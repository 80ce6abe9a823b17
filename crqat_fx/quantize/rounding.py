"""Rounding to the codes that exist, and its gradients: one autograd function, three ways to compute it.

    code = clip(round(x / s) + z, lowest, highest)      round half to even, before z is added; a division, never a product with 1 / s
    y = (code - z) s

    dy/dx = 1 where a code exists for x, else 0
    dy/ds = code - z - (x / s where a code exists, else 0);       dy/dz = 0 where a code exists, else -s

A code exists for x where round(x / s) + z needs no clipping. z is rounded first, with the gradient of what is not rounded; a gradient that
would push z out of [lowest, highest] is zero.

With `clips` (there is no z then) the gradient is PACT's, that of clip(x, lowest s, highest s) before it is rounded: dy/dx = 1 within the
ends, and dy/ds = code beyond them, else 0.

On a processor x is taken a block at a time, so that a block stays in its cache from the first operation to the last, and the backward
computes the codes again rather than keep them. On CUDA the plain form is compiled, once for all shapes. NaN comes out as NaN.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

BLOCK = 1 << 17  # elements a thread takes at a time: few enough to stay in its cache, so many that calling torch costs little beside
SHORTEST_ROW = 16  # below, a row of its own scale is no work for the blocked form

_keep_inside = torch.ops.aten.hardtanh_backward.grad_input  # gradient where lower < value < upper, else 0, in one go


Ends = tuple[float, float]
Gradients = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Grid:
    """The codes, which axis has a scale of its own, and whether the gradient of the scale is PACT's."""

    lowest: int
    highest: int
    axis: int | None = None
    clips: bool = False


@dataclass(frozen=True)
class Kernels:
    """x, s, z, grid -> y; and dy, x, s, z, grid -> dx, ds, dz, the last two where something learns. z is whole, or None for 0."""

    forward: Callable[[Tensor, Tensor, Tensor | None, Grid], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor | None, Grid, bool], Gradients]


# --- blocked, for processors ---


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)) else x.contiguous()


def _flat(dense: Tensor) -> Tensor:
    return (dense if dense.is_contiguous() else dense.permute(0, 2, 3, 1)).view(-1)


def _as_rows(x: Tensor, axis: int) -> Tensor:
    """One row for each scale: the axis last but one, whatever is behind it in the row."""
    return x.contiguous().view(x.shape[:axis].numel() * x.shape[axis], -1)


def _block() -> int:
    return BLOCK * torch.get_num_threads()


def _parts(flat: Tensor, size: int) -> Sequence[Tensor]:
    return (flat,) if len(flat) <= size else flat.split(size)


def _round_flat(x: Tensor, y: Tensor, scale: Tensor, lowest: float, highest: float) -> None:
    size = _block()
    for values, out in zip(_parts(x, size), _parts(y, size), strict=True):
        torch.div(values, scale, out=out).round_().clamp_(lowest, highest).mul_(scale)


def _blocked_forward(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    if grid.axis is None:
        x = _dense(x)
        y = torch.empty_like(x)
        shift = 0 if zero is None else zero.item()
        _round_flat(_flat(x), _flat(y), scale, grid.lowest - shift, grid.highest - shift)
        return y
    rows = _as_rows(x, grid.axis)
    y = torch.empty_like(rows)
    scales, zeros = _of_rows(scale, len(rows)), _of_rows(zero, len(rows))
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


def _keep_where_coded(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, grid: Grid, ends: Ends, code: Tensor, out: Tensor
) -> None:
    """Writes dx to `out`, and to `code` x / s, rounded unless the grid clips."""
    torch.div(x, scale, out=code)
    if not grid.clips:
        code.round_()
    if shift is not None:
        code.add_(shift)
    margin = 0.0 if grid.clips else 0.5
    _keep_inside(dy, code, ends[0] - margin, ends[1] + margin, grad_input=out)


def _flat_gradients(dy: Tensor, x: Tensor, dx: Tensor, scale: Tensor, shift: float | None, grid: Grid, learns: bool) -> tuple[float, float]:
    """Writes dx; returns ds, and the sum of dy where no code exists."""
    size = _block()
    ends = (grid.lowest - (shift or 0.0), grid.highest - (shift or 0.0))
    code, levels, inside, outside = None, 0.0, 0.0, 0.0
    for gradient, values, out in zip(_parts(dy, size), _parts(x, size), _parts(dx, size), strict=True):
        code = _scratch(values, code)
        _keep_where_coded(gradient, values, scale, None, grid, ends, code, out)
        if not learns:
            continue
        (code.round_() if grid.clips else code).clamp_(*ends)
        levels += torch.dot(gradient, code).item()
        inside += torch.dot(out, code if grid.clips else values).item()
        if shift is not None:
            outside += gradient.sum().item() - out.sum().item()
    return levels - inside / (1.0 if grid.clips else scale.item()), outside


def _blocked_backward(dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, learns: bool) -> Gradients:
    if grid.axis is None:
        x = _dense(x)
        dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
        dx = torch.empty_like(x)
        ds, outside = _flat_gradients(_flat(dy), _flat(x), _flat(dx), scale, None if zero is None else zero.item(), grid, learns)
        return dx, scale.new_tensor(ds), None if zero is None else scale * -outside
    rows, dys = _as_rows(x, grid.axis), _as_rows(dy, grid.axis)
    dx = torch.empty_like(rows)
    scales, zeros = _of_rows(scale, len(rows)), _of_rows(zero, len(rows))
    if rows.shape[1] >= BLOCK:
        shifts = [None] * len(rows) if zeros is None else zeros.flatten().tolist()
        sums = [
            _flat_gradients(gradient, row, out, own, shift, grid, learns)
            for gradient, row, out, own, shift in zip(dys, rows, dx, scales.flatten(), shifts, strict=True)
        ]
        of_channels = scale.new_tensor(sums).view(-1, len(scale), 2).sum(0)
        return dx.view(x.shape), of_channels[:, 0], None if zero is None else -scale * of_channels[:, 1]
    code = None
    levels, outsides = [], []
    for values, gradient, out, own, shift in _row_blocks(rows, dys, dx, scales, zeros):
        code = _scratch(values, code)
        _keep_where_coded(gradient, values, own, shift, grid, (grid.lowest, grid.highest), code, out)
        if not learns:
            continue
        (code.round_() if grid.clips else code).clamp_(grid.lowest, grid.highest)
        if shift is not None:
            code.sub_(shift)
            outsides.append(gradient.sum(1) - out.sum(1))
        inside = torch.linalg.vecdot(out, code) if grid.clips else torch.linalg.vecdot(out, values).div_(own.squeeze(1))
        levels.append(torch.linalg.vecdot(gradient, code).sub_(inside))
    if not learns:
        return dx.view(x.shape), None, None
    return dx.view(x.shape), _of_channels(levels, scale), None if zero is None else -scale * _of_channels(outsides, scale)


def _of_channels(blocks: list[Tensor], scale: Tensor) -> Tensor:
    """What was summed a row, summed a channel."""
    rows = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return rows if len(rows) == len(scale) else rows.view(-1, len(scale)).sum(0)


# --- the plain form, compiled on CUDA ---


def _plain_round(x: Tensor, scale: Tensor, zero: Tensor, lowest: int, highest: int) -> Tensor:
    return (torch.clamp(torch.round(x / scale) + zero, lowest, highest) - zero) * scale


def _plain_gradients(
    dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor, lowest: int, highest: int, clips: bool
) -> tuple[Tensor, Tensor, Tensor]:
    code = torch.round(x / scale) + zero
    inside = (x / scale > lowest) & (x / scale < highest) if clips else (code >= lowest) & (code <= highest)
    dx = torch.where(inside, dy, 0.0)
    level = torch.clamp(code, lowest, highest) - zero
    ds = (dy * level - dx * (level if clips else x / scale)).sum((0, 2))
    return dx, ds, ((dx - dy) * scale).sum((0, 2))


def _in_three(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """x as [before, channels, behind], with scale and zero point to match, so that one compiled form serves every shape."""
    around = (1, 1, -1) if axis is None else (x.shape[:axis].numel(), x.shape[axis], x.shape[axis + 1 :].numel())
    wide = scale.reshape(-1, 1)
    return x.reshape(around), wide, torch.zeros_like(wide) if zero is None else zero.reshape(-1, 1)


def _kernels_around(rounds: Callable[..., Tensor], gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Kernels:
    def forward(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
        return rounds(*_in_three(x, scale, zero, grid.axis), grid.lowest, grid.highest).view(x.shape)

    def backward(dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, learns: bool) -> Gradients:
        values, own, shift = _in_three(x, scale, zero, grid.axis)
        dx, ds, dz = gradients(dy.reshape(values.shape), values, own, shift, grid.lowest, grid.highest, grid.clips)
        return dx.view(x.shape), ds.view(scale.shape), None if zero is None else dz.view(scale.shape)

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


def kernels_for(x: Tensor, axis: int | None) -> Kernels:
    if torch.compiler.is_compiling():
        return PLAIN
    if x.is_cuda:
        return _for_cuda()
    real = type(x) in (Tensor, nn.Parameter)  # a tensor of another class may stand for numbers that are not there
    in_blocks = real and x.device.type == "cpu" and (axis is None or x.shape[axis + 1 :].numel() >= SHORTEST_ROW)
    return BLOCKED if in_blocks else PLAIN


# --- the autograd function ---

SMALLEST_SCALE = 2.0**-100  # added to exp(log s): nothing beside a scale in use, and never nothing


def from_logarithm(log_scale: Tensor) -> Tensor:
    """A scale that is positive whatever its logarithm."""
    return log_scale.exp() + SMALLEST_SCALE


@contextmanager
def _float32(device: str) -> Iterator[None]:
    """Autocast is off within."""
    if _autocast(device):
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield


def _autocast(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


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
        kernels: Kernels,
    ) -> Tensor:
        true = from_logarithm(scale) if logarithm else scale
        steps = true if factor is None else true / factor
        whole = None if zero is None else zero.clamp(grid.lowest, grid.highest).round_()
        ctx.save_for_backward(x, true, zero, whole, factor, steps)
        ctx.options = grid, gradient_scale, logarithm, kernels
        return kernels.forward(x, steps, whole, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, scale, zero, whole, factor, steps = ctx.saved_tensors
        grid, gradient_scale, logarithm, kernels = ctx.options
        learns = any(ctx.needs_input_grad[1:4])
        with _float32(x.device.type):
            dx, ds, dz = kernels.backward(dy, x, steps, whole, grid, learns)
        none = None, None, None, None
        if not learns or ds is None:
            return dx, None, None, None, *none
        dfactor = None
        if factor is not None:
            ds = ds / factor
            dfactor = -ds * steps
        ds = ds * (scale * gradient_scale) if logarithm else ds * gradient_scale
        if dz is None:
            return dx, ds, None, dfactor, *none
        # a step goes against the gradient: at the lowest code none is taken down, at the highest none up
        outwards = torch.where(dz > 0, zero <= grid.lowest, (zero >= grid.highest) & (dz < 0))
        return dx, ds, (dz * gradient_scale).masked_fill_(outwards, 0), dfactor, *none


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
) -> Tensor:
    """x rounded to the grid. `scale` and `zero` have no axes, or one a channel; their gradients are scaled by `gradient_scale`.

    `factor`, one a channel and never 0, stands for what x is multiplied with before, and divided by after it is rounded: a normalisation's
    folded into a weight. Nothing is multiplied, though: round(x k / s) s / k rounds x with the scale s / k. `logarithm`: of the scale its
    logarithm is given. Half-precision values are rounded in float32. The result has x's type; where autocast is on it stays float32, as
    that does elsewhere.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    chosen = kernels_for(wide, grid.axis) if kernels is None else kernels
    own = [None if each is None else each.to(wide.dtype) for each in (scale, zero, factor)]
    device = x.device.type
    with _float32(device):
        y: Tensor = _FakeQuantize.apply(wide, *own, grid, gradient_scale, logarithm, chosen)  # type: ignore[no-untyped-call]
    return y if _autocast(device) else y.to(x.dtype)
