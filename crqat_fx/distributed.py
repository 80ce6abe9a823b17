"""Several processes that train as one: what they add up, differentiably, so that each has the gradients of the whole batch.

    total(x) = sum of x over the processes        in backward: the sum of all gradients of it

Every process takes an equal part of each batch. Its losses are made so that their mean over the processes is the loss of the whole batch;
DistributedDataParallel takes that mean of the gradients. Statistics of norms that are trained are those of the whole batch:

    d = x - running mean,   mean = running mean + total(sum d) / n,   variance = total(sum d^2) / n - (total(sum d) / n)^2

which is torch's SyncBatchNorm, that has no form for processors, in one reduction. The running mean is the same in every process and near
the batch's, so that the difference of squares loses nothing.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from crqat_fx.errors import UserError

PATIENCE = timedelta(minutes=30)  # that a process waits for the others: the first one may be writing a large file


@dataclass(frozen=True)
class Processes:
    """Those that train together, and which of them this is."""

    rank: int = 0
    count: int = 1
    local: int = 0  # among those of this machine

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """This process' part of a batch: which, and of how many."""
        return self.rank, self.count

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same in each."""
        if self.count == 1:
            return value
        summed: Tensor = _Total.apply(value)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return summed

    def mean(self, value: Tensor) -> Tensor:
        return self.total(value) / self.count if self.count > 1 else value

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def any(self, wish: bool, device: torch.device) -> bool:
        """Whether one of the processes has the wish."""
        if self.count == 1:
            return wish
        return bool(self.total(torch.tensor(float(wish), device=device)) > 0)

    def share(self, module: nn.Module) -> None:
        """Gives every process the first one's parameters and buffers."""
        if self.count == 1:
            return
        with torch.no_grad():
            for value in module.state_dict().values():
                dist.broadcast(value, 0)

    def parallel(self, module: nn.Module, device: torch.device, unused: bool = False) -> nn.Module:
        """The module, called through DistributedDataParallel. `unused`: some parameters that learn are read by no loss."""
        if self.count == 1:
            return module
        places = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(module, places, broadcast_buffers=False, find_unused_parameters=unused)


ALONE = Processes()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, joined while the block lasts, unless they are already; outside torchrun this one alone."""
    count = _of_environment("WORLD_SIZE", 1)
    if count == 1:
        yield ALONE
        return
    processes = Processes(_of_environment("RANK", 0), count, _of_environment("LOCAL_RANK", 0))
    if dist.is_initialized():
        yield processes
        return
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot be joined ({error})", where="torchrun", remedy="start them all with torchrun") from error
    try:
        yield processes
    finally:
        dist.destroy_process_group()


def own_device(device: str, processes: Processes) -> str:
    """This process' own GPU, where there is one for each."""
    return f"cuda:{processes.local}" if processes.count > 1 and device == "cuda" else device


def without_exchange(module: nn.Module) -> AbstractContextManager[None]:
    """Gradients are kept to oneself in this context: more are to come before they are exchanged."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def synchronise_norms(model: nn.Module, processes: Processes) -> None:
    """Has every BatchNorm of the model train on the statistics of all processes. Modules, names and state stay what they are."""
    if processes.count == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = functools.partial(_normalised, module, processes)  # type: ignore[method-assign]  # of this one alone


def _normalised(norm: _BatchNorm, processes: Processes, x: Tensor) -> Tensor:
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        plain: Tensor = type(norm).forward(norm, x)
        return plain
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    axes = [axis for axis in range(x.ndim) if axis != 1]
    along = [1, -1, *[1] * (x.ndim - 2)]
    with torch.autocast(x.device.type, enabled=False):
        count = processes.count * x.numel() // x.shape[1]
        before = norm.running_mean.clone()
        distance = wide - before.view(along)
        sums = processes.total(torch.stack([distance.sum(axes), distance.square().sum(axes)])) / count
        variance = sums[1] - sums[0].square()
        mean = before + sums[0]
        _follow(norm, mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        y = (wide - mean.view(along)) * torch.rsqrt(variance + norm.eps).view(along)
        if norm.affine:
            y = y * norm.weight.view(along) + norm.bias.view(along)
    return y.to(x.dtype)


def _follow(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """The running statistics, as torch's own."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    weight = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked or 1)
    norm.running_mean.lerp_(mean, weight)
    norm.running_var.lerp_(variance, weight)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        summed = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed


def _of_environment(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}", where="the environment", remedy="start the processes with torchrun")
    return int(text)
