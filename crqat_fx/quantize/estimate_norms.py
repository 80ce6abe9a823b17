"""Gives norms the statistics of some batches: averaged weights have never seen any, and averaged statistics are of other weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


@torch.no_grad()
def estimate_norms(model: nn.Module, examples: Iterable[tuple[Tensor, ...]]) -> None:
    """The norms that are trained get the mean over the batches of their means and variances. Frozen ones keep theirs."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    counters = [norm.get_buffer("num_batches_tracked") for norm in norms]
    kept = [(norm.momentum, counter.clone()) for norm, counter in zip(norms, counters, strict=True)]
    training = model.training
    model.train()
    for norm, counter in zip(norms, counters, strict=True):
        norm.momentum = None  # the plain mean of what comes
        counter.zero_()
    for inputs in examples:
        model(*inputs)
    for norm, counter, (momentum, tracked) in zip(norms, counters, kept, strict=True):
        norm.momentum = momentum
        counter.copy_(tracked)
    model.train(training)
