"""Gives quantized layers the channels' means and deviations back that they had in float.

A rounded layer gives less than it gave, the next one rounds what is too small for its range, and so on: at two or three bits the last
layers' codes are nearly all one. So, in the order of the data, with m and d a channel's mean and deviation behind its norm:

    y'  =  r (y - m of rounded) + m of float,       r = d of float / d of rounded, in [1 / LARGEST, LARGEST]

which the layer then computes by itself (`ConvBn2d.correct`). What it reads has been put right before it, in the same run. Ranges of
activations stay as they were set: on float, which is what layers give again. "Float" is the graph with these stages' quantizers off.

Corrected is a convolution with a norm and a scale for each channel of its weight. Norms whose statistics move in training correct
themselves, and want none of this.
"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from crqat_fx.errors import UserError
from crqat_fx.noise import SideBySide, evaluating
from crqat_fx.progress import Progress
from crqat_fx.quantize.calibrate import PICTURES, first_samples
from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.trace import Example
from passes.fx.graph import STAGE, module_of, node_paths

logger = logging.getLogger(__name__)

LARGEST = 8.0  # a channel of which rounding left less is lost, and no factor brings it back


@dataclass
class Moments:
    """Sums over the values [N,C,H,W] of each channel, in double precision."""

    count: int
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        count = values.numel() // values.shape[1]
        variance, mean = torch.var_mean(values.float(), (0, 2, 3), correction=0)
        mean = mean.double()
        return cls(count, count * mean, count * (variance.double() + mean.square()))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def deviation(self) -> Tensor:
        return (self.squares / self.count - self.mean.square()).clamp(min=0).sqrt()


def correct_norms(
    prepared: Prepared,
    batches: Iterable[Example],
    count: int = PICTURES,
    *,
    stages: Collection[str] | None = None,
    progress: Progress | None = None,
) -> int:
    """Corrects the layers of some stages, or of all, on `count` samples of the batches of inputs, and returns how many there are. They must
    be calibrated, and on in the present phase. Phase and mode stay as they were."""
    layers = correctable(prepared, stages)
    for layer in layers.values():
        layer.uncorrect()
    found: dict[Node, tuple[Moments, Moments]] = {}

    def put_right(node: Node, exact: Tensor, rounded: Tensor) -> Tensor:
        if node not in layers:
            return rounded
        here = Moments.of(exact), Moments.of(rounded)
        before = found.get(node)
        found[node] = here if before is None else (before[0] + here[0], before[1] + here[1])
        ratio, wanted, given = (each.to(rounded.dtype).view(-1, 1, 1) for each in _correction(*here))
        return (rounded - given) * ratio + wanted

    with evaluating(prepared.graph), torch.no_grad():
        side_by_side = SideBySide(prepared.graph, put_right, stages)
        for inputs, seen in first_samples(batches, count):
            side_by_side.run(*inputs)
            if progress is not None:
                progress(seen, count, "correcting norms")
    paths = node_paths(prepared.graph)
    for node, moments in found.items():
        ratio, wanted, given = _correction(*moments)
        if not (torch.isfinite(ratio) & torch.isfinite(wanted) & torch.isfinite(given)).all():
            raise UserError("has values that are not finite", where=paths[node], remedy="look for an overflow, or NaN weights, before it")
        layer = layers[node]
        beta = 0 if layer.bn.bias is None else layer.bn.bias.detach().double()
        layer.correct(ratio.float(), (wanted + (ratio - 1) * beta - ratio * given).float())
        name = f"{node.target}.weight_fake_quant"
        assert isinstance(layer.weight_fake_quant, FakeQuantize)
        if name in prepared.calibrations:  # where training moves it from
            scale = layer.weight_fake_quant.scale.detach().cpu().clone()
            prepared.calibrations[name] = replace(prepared.calibrations[name], scale=scale)
    logger.info("corrected %d norms", len(found))
    return len(found)


def uncorrect_norms(prepared: Prepared, stages: Collection[str]) -> None:
    """Undoes it, for statistics that are about to move."""
    for layer in correctable(prepared, stages).values():
        layer.uncorrect()


def correctable(prepared: Prepared, stages: Collection[str] | None = None) -> dict[Node, ConvBn2d]:
    """Layers that can be corrected, by the node that calls them."""
    modules = {node: module_of(prepared.graph, node) for node in prepared.graph.graph.nodes if stages is None or node.meta[STAGE] in stages}
    return {node: module for node, module in modules.items() if isinstance(module, ConvBn2d) and module.correctable}


def _correction(of_float: Moments, of_rounded: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """The ratio, and the means that are wanted and given."""
    deviation = of_rounded.deviation
    ratio = torch.where(deviation > 0, of_float.deviation / deviation, 1).clamp(1 / LARGEST, LARGEST)
    return ratio, of_float.mean, of_rounded.mean
