"""What quantization takes away of each tensor: signal to quantization noise, in decibels.

    SQNR = 10 log10(sum of x^2 / sum of (x - x')^2)

end to end   x as the model computes it in float, x' as it does quantized: all noise on the way to a tensor, its own rounding included
local        x as it comes to one quantizer of the quantized model, x' as it leaves: what this rounding alone adds

Beside it stands the share of the values that come to a quantizer and lie outside of its range, so that it clips them.

The float model is the same graph with its quantizers off: what differs is quantization alone, also after training. Both run side by side,
node by node, so that only what is still to be read is in memory. Quantizers that a phase has turned off stay off.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from crqat_fx.errors import UserError
from crqat_fx.progress import Progress
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.quantize.watch import codes_of
from crqat_fx.trace import Example
from passes.fx.graph import STAGE, module_of, node_paths
from passes.fx.placement import quantizes

EXACT = 150.0  # decibels: as much as float32 tells apart; shown for a tensor that is the same, number by number


@dataclass
class Energy:
    """Of a tensor over everything that was run: its own, and that of what was added to it."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        self.signal += _energy(exact)
        self.noise += _energy(exact - rounded)

    @property
    def share(self) -> float:
        """Noise over signal: 0 where there is none."""
        return 0.0 if self.noise == 0 else math.inf if self.signal == 0 else self.noise / self.signal

    @property
    def db(self) -> float:
        return decibels(self.share)


def decibels(share: float) -> float:
    """Of a share of noise, within what can be told apart."""
    if share <= 0:
        return EXACT
    return max(-EXACT, min(EXACT, -10 * math.log10(share)))


@dataclass(frozen=True)
class Noise:
    """SQNR in decibels: end to end of every tensor by the path of its node in the prepared graph, local of every quantizer by its name; and
    by that name the share of values that it clips."""

    tensors: Mapping[str, float]
    local: Mapping[str, float]
    clipped: Mapping[str, float]
    pictures: int


@dataclass
class _Rounded:
    """What one quantizer did to everything that came to it."""

    energy: Energy = field(default_factory=Energy)
    values: int = 0
    outside: float = 0.0

    def add(self, quantizer: FakeQuantize, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.energy.add(inputs[0], output)
        self.values += output.numel()
        self.outside += output.numel() * float(codes_of(quantizer, *inputs)[1])

    @property
    def clipped(self) -> float:
        return self.outside / self.values if self.values else 0.0


def measure_noise(prepared: Prepared, batches: Iterable[Example], *, total: int | None = None, progress: Progress | None = None) -> Noise:
    """Runs the batches in float and as the phase quantizes. Phase and mode stay as they were. `total`: how many pictures there will be."""
    paths = node_paths(prepared.graph)
    tensors: dict[Node, Energy] = {}
    rounded: dict[str, _Rounded] = {}
    seen = 0

    def compare(node: Node, exact: Tensor, given: Tensor) -> Tensor:
        tensors.setdefault(node, Energy()).add(exact, given)
        return given

    with evaluating(prepared.graph), _watched(prepared.quantizers(), rounded), torch.no_grad():
        for inputs in batches:
            SideBySide(prepared.graph, compare).run(*inputs)
            seen += len(inputs[0])
            if progress is not None:
                progress(seen, max(total or seen, seen), "pictures in float and quantized")
    for node, energy in tensors.items():
        if not math.isfinite(energy.signal + energy.noise):
            raise UserError("has values that are not finite", where=paths[node], remedy="look for an overflow, or NaN weights, before it")
    return Noise(
        tensors={paths[node]: energy.db for node, energy in tensors.items()},
        local={name: each.energy.db for name, each in rounded.items()},
        clipped={name: each.clipped for name, each in rounded.items()},
        pictures=seen,
    )


def outputs_of(graph: nn.Module, inputs: Example) -> list[Tensor]:
    """Every tensor that a model returns, nested or not."""
    return [value for value in pytree.tree_leaves(graph(*inputs)) if isinstance(value, Tensor)]


@contextmanager
def evaluating(graph: GraphModule) -> Iterator[None]:
    training = graph.training
    graph.eval()
    try:
        yield
    finally:
        graph.train(training)


@contextmanager
def turned_on(quantizers: Mapping[str, FakeQuantize], wanted: Callable[[str], bool]) -> Iterator[None]:
    """Of the quantizers those that are `wanted` by name, the others off; as they were when the block ends."""
    before = {name: each.enabled for name, each in quantizers.items()}
    try:
        for name, each in quantizers.items():
            each.enabled = wanted(name)
        yield
    finally:
        for name, each in quantizers.items():
            each.enabled = before[name]


@contextmanager
def _watched(quantizers: Mapping[str, FakeQuantize], rounded: dict[str, _Rounded]) -> Iterator[None]:
    """Adds up what every quantizer that is on does to what it is given."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if isinstance(module, FakeQuantize) and module.enabled:
                rounded.setdefault(name, _Rounded()).add(module, inputs, output)

        return hook

    handles = [each.register_forward_hook(watch(name)) for name, each in quantizers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Pair:
    """A value in float and quantized."""

    exact: Any
    rounded: Any


class SideBySide(Interpreter):
    """Every node twice: on the float values with its quantizers off, and on the quantized ones. With `stages`, those of others once, as the
    quantized graph has them. `look` is shown both values of a node, and gives the quantized one that later nodes read."""

    def __init__(self, graph: GraphModule, look: Callable[[Node, Tensor, Tensor], Tensor], stages: Collection[str] | None = None) -> None:
        super().__init__(graph)
        self.graph_module = graph
        self.look = look
        self.stages = stages

    def run_node(self, n: Node) -> Any:
        if n.op == "output":
            return None  # all was seen where it was computed
        if n.op in ("placeholder", "get_attr"):
            value = super().run_node(n)
            return _Pair(value, value)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        call = getattr(self, n.op)
        rounded = call(n.target, *_half((args, kwargs), "rounded"))
        if self.stages is not None and n.meta[STAGE] not in self.stages:
            return _Pair(rounded, rounded)
        if quantizes(self.graph_module, n):
            exact = _half(args, "exact")[0]
        else:
            with _without_rounding(module_of(self.graph_module, n)):
                exact = call(n.target, *_half((args, kwargs), "exact"))
        if isinstance(exact, Tensor) and exact.is_floating_point():
            rounded = self.look(n, exact, rounded)
        return _Pair(exact, rounded)


def _half(arguments: Any, side: str) -> Any:
    return map_aggregate(arguments, lambda value: getattr(value, side) if isinstance(value, _Pair) else value)


@contextmanager
def _without_rounding(module: nn.Module | None) -> Iterator[None]:
    """A layer with its weight in float."""
    inside = {name: each for name, each in (module.named_modules() if module is not None else ()) if isinstance(each, FakeQuantize)}
    with turned_on(inside, lambda _: False):
        yield


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64) ** 2)
