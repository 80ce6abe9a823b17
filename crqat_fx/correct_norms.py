"""Gives quantized layers the channels' means and deviations back that they had in float.

A rounded layer gives less than it gave, the next one rounds what is too small for its range, and so on: at two or three bits the last
layers' codes are nearly all one. So, in the order of the data, with m and d a channel's mean and deviation behind its norm:

    y'  =  r (y - m of rounded) + m of float,       r = d of float / d of rounded, in [1 / LARGEST, LARGEST]

which the layer then computes by itself (`ConvBn2d.correct`), but for the rounding of its new bias. What it reads has been put right before
it, in the same run. Ranges of activations stay as they were set: on float, which is what layers give again. "Float" is the graph with these
stages' quantizers off.

Corrected is a convolution with a norm and a scale for each channel of its weight. Norms whose statistics move in training correct
themselves: a loop of one's own that trains a corrected model keeps them frozen (`prepared.set_phase`), or calls `uncorrect_norms` first.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
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
CONSTANT = 1e-10  # a variance that is a smaller share of the mean's square is of a channel that rounding made one number


@dataclass(frozen=True)
class Moments:
    """Of the values [N,C,H,W] of each channel. What is added up are variances, not squares, whose rounding errors are as large."""

    count: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        variance, mean = torch.var_mean(values.float(), (0, 2, 3), correction=0)
        return cls(values.numel() // values.shape[1], mean.double(), variance.double())

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        share = other.count / count
        between = (other.mean - self.mean).square() * share * (1 - share)
        within = self.variance + (other.variance - self.variance) * share
        return Moments(count, self.mean + (other.mean - self.mean) * share, within + between)


@dataclass(frozen=True)
class _Layer:
    """What a layer is before it is corrected: its bias in float, and as it is rounded, and the steps of that."""

    module: ConvBn2d
    bias: Tensor
    rounded: Tensor
    steps: Tensor | None

    @classmethod
    def of(cls, module: ConvBn2d) -> "_Layer":
        bias, rounded = module.folded()[1], module.stored()[1]
        assert rounded is not None
        step = module.step()
        return cls(module, bias, rounded, None if step is None else step * module.weight_scale(None))

    def correction(self, of_float: Moments, of_rounded: Moments) -> tuple[Tensor, Tensor]:
        """The ratio, and the bias that the layer is to have then."""
        ratio = torch.sqrt(of_float.variance / of_rounded.variance)
        emptied = of_rounded.variance <= CONSTANT * of_rounded.mean.square()
        ratio = torch.where(emptied, 1, ratio).clamp(1 / LARGEST, LARGEST)
        return ratio.float(), (of_float.mean - ratio * (of_rounded.mean - self.rounded)).float()

    def put_right(self, values: Tensor, ratio: Tensor, bias: Tensor) -> Tensor:
        """What the corrected layer would have given in place of `values`."""
        if self.steps is not None:
            steps = ratio * self.steps
            bias = torch.round(bias / steps) * steps
        given, ratio, bias = (each.view(-1, 1, 1) for each in (self.rounded, ratio, bias))
        return ((values.float() - given) * ratio + bias).to(values.dtype)

    def correct(self, ratio: Tensor, bias: Tensor) -> None:
        beta = 0 if self.module.bn.bias is None else self.module.bn.bias.detach()
        self.module.correct(ratio, bias - beta - ratio * (self.bias - beta))


def correct_norms(
    prepared: Prepared,
    batches: Iterable[Example],
    count: int = PICTURES,
    *,
    stages: Collection[str] | None = None,
    progress: Progress | None = None,
) -> int:
    """Corrects the layers of some stages, or of all, whose weights are rounded in the present phase, on `count` samples of the batches of
    inputs, and returns how many there are. They must be calibrated. Phase and mode stay as they were; after an error all does."""
    if not prepared.calibrated:
        raise UserError("a quantizer has no scale yet", where="the prepared model", remedy="calibrate it first")
    modules = {node: module for node, module in correctable(prepared, stages).items() if module.rounds}
    before = {module: (module.ratio.clone(), module.shift.clone()) for module in modules.values()}
    with ExitStack() as after_an_error:
        after_an_error.callback(_record, prepared, modules)
        for module, kept in before.items():
            after_an_error.callback(module.correct, *kept)
        _uncorrect(prepared, modules)
        corrections = _measure(prepared, modules, first_samples(batches, count), count, stages, progress)
        after_an_error.pop_all()
    for layer, ratio, bias in corrections:
        layer.correct(ratio, bias)
    _record(prepared, modules)
    logger.info("corrected %d norms", len(modules))
    lost = [node for node, module in modules.items() if (module.ratio >= LARGEST).float().mean() > 0.5]
    if lost:  # what comes back behind such a layer is noise as large as what was there
        what = (
            "%d of %d norms cannot be corrected: rounding left nearly nothing of most channels, %s the first; other ranges may leave more"
        )
        logger.warning(what, len(lost), len(modules), node_paths(prepared.graph)[lost[0]])
    return len(modules)


def uncorrect_norms(prepared: Prepared, stages: Collection[str]) -> int:
    """Undoes it, for statistics that are about to move, and returns how many layers had been corrected."""
    modules = {node: module for node, module in correctable(prepared, stages).items() if module.corrected}
    _uncorrect(prepared, modules)
    return len(modules)


def _measure(
    prepared: Prepared,
    modules: Mapping[Node, ConvBn2d],
    samples: Iterable[tuple[Example, int]],
    count: int,
    stages: Collection[str] | None,
    progress: Progress | None,
) -> list[tuple[_Layer, Tensor, Tensor]]:
    """Of every layer the ratio and the bias that correct it, on all samples."""
    found: dict[Node, tuple[Moments, Moments]] = {}

    def put_right(node: Node, exact: Tensor, rounded: Tensor) -> Tensor:
        layer = layers.get(node)
        if layer is None:
            return rounded
        here = Moments.of(exact), Moments.of(rounded)
        before = found.get(node)
        found[node] = here if before is None else (before[0] + here[0], before[1] + here[1])
        return layer.put_right(rounded, *layer.correction(*here))

    with evaluating(prepared.graph), torch.no_grad():
        layers = {node: _Layer.of(module) for node, module in modules.items()}
        side_by_side = SideBySide(prepared.graph, put_right, stages)
        for inputs, seen in samples:
            side_by_side.run(*inputs)
            if progress is not None:
                progress(seen, count, "correcting norms")
        corrections = [(layers[node], *layers[node].correction(*moments)) for node, moments in found.items()]
    paths = node_paths(prepared.graph)
    for node, (_, ratio, bias) in zip(found, corrections, strict=True):
        if not bool(torch.isfinite(ratio).all() and torch.isfinite(bias).all()):
            raise UserError("has values that are not finite", where=paths[node], remedy="look for an overflow, or NaN weights, before it")
    return corrections


def _uncorrect(prepared: Prepared, modules: Mapping[Node, ConvBn2d]) -> None:
    for module in modules.values():
        module.uncorrect()
    _record(prepared, modules)


def _record(prepared: Prepared, modules: Mapping[Node, ConvBn2d]) -> None:
    """Writes down the scales of the weights that moved with their ratios: training moves them from there."""
    for node, module in modules.items():
        name = f"{node.target}.weight_fake_quant"
        quantizer = module.weight_fake_quant
        assert isinstance(quantizer, FakeQuantize)
        if name in prepared.calibrations:
            prepared.calibrations[name] = replace(prepared.calibrations[name], scale=quantizer.scale.detach().cpu().clone())


def correctable(prepared: Prepared, stages: Collection[str] | None = None) -> dict[Node, ConvBn2d]:
    """Layers that can be corrected, by the node that calls them."""
    prepared.refuse_unknown(stages or (), "the stages to correct")
    modules = {node: module_of(prepared.graph, node) for node in prepared.graph.graph.nodes if stages is None or node.meta[STAGE] in stages}
    return {node: module for node, module in modules.items() if isinstance(module, ConvBn2d) and module.correctable}
