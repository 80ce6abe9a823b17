"""A moving average of a model's weights and buffers, with the published ramp.

    average = average + w (value - average),   w = momentum + (1 - momentum) exp(-(t + 1) / horizon)   at update t = 0, 1, ...

The ramp lets the average follow the model early on, where a constant momentum would keep it at the start. Counters are copied.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MovingAverage:
    """Follows the tensors of `model`, which must stay the same objects (loading and stepping in place keep them so)."""

    def __init__(self, model: nn.Module, momentum: float, horizon: float) -> None:
        self.momentum = momentum
        self.horizon = horizon
        self.updates = 0
        self._live: dict[str, Tensor] = model.state_dict()
        self._mean = {name: value.clone() for name, value in self._live.items()}
        floating = [name for name, value in self._live.items() if value.is_floating_point()]
        counting = [name for name, value in self._live.items() if not value.is_floating_point()]
        self._floats = [self._mean[name] for name in floating], [self._live[name] for name in floating]
        self._counters = [self._mean[name] for name in counting], [self._live[name] for name in counting]

    def weight(self, update: int) -> float:
        """How much of the model's present state update `update` (from 0) takes in. A horizon of 0 leaves the ramp out."""
        ramp = math.exp(-(update + 1) / self.horizon) if self.horizon > 0 else 0.0
        return self.momentum + (1 - self.momentum) * ramp

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(*self._floats, self.weight(self.updates))
        if self._counters[0]:
            torch._foreach_copy_(*self._counters)
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        """The average, under the model's state-dict names."""
        return dict(self._mean)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Goes on from a saved average; names and shapes must be the model's."""
        for name, mean in self._mean.items():
            mean.copy_(state[name])
        self.updates = updates
