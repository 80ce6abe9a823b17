"""The schedules: which passes run, in which order, and why each stands where it does. Read this file first."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor, nn
from torch.fx import GraphModule

from crqat_fx.models import yolo_world
from crqat_fx.recipe import TARGETS, WIDEST, Target
from crqat_fx.trace import LEAVES, LeafTracer
from passes.base import Pass, Pipeline
from passes.fx.fold_batchnorm import FoldBatchNorm
from passes.fx.mark_stages import MarkStages
from passes.fx.mark_whole import MarkWhole
from passes.fx.place_quantizers import Make, PlaceQuantizers
from passes.fx.share_scales import ShareScales
from passes.fx.split_silu import SplitSilu
from passes.spec import QuantSpec

LOGITS, BINS = 0, 1  # entries of the model's output; the regions, 2, are not counted


def _without_a_factory(spec: QuantSpec, known: float | None) -> nn.Module:
    raise ValueError("quantizers come from crqat_fx.quantize: give their factory as `make`")


def prepare_passes(stages: Literal[1, 2, 3] = 2) -> Pipeline[GraphModule]:
    """Before quantizers: a traced graph, every node marked with its stage. One stage is for models without a curriculum."""
    return Pipeline(
        # first: the patterns are met as they were traced, and every later node takes the stage of what it serves
        MarkWhole() if stages == 1 else mark_stages(stages),
    )


def quantizer_passes(
    target: Target = TARGETS["ort"],
    make: Make = _without_a_factory,
    share_scales: bool | None = None,
    inputs: Mapping[str, float] | None = None,
) -> Pipeline[GraphModule]:
    """After torch.ao has fused layers and swapped in those that learn: every quantizer that is not in a layer."""
    share = ShareScales(target, target.shared, lambda spec: spec.bits == WIDEST if share_scales is None else share_scales)
    return Pipeline(
        *([SplitSilu()] if "SiLU" in target.outputs else []),  # before quantizers are placed: both sides of it get one
        PlaceQuantizers(target, make, inputs),
        share,  # last: it joins quantizers that stand
    )


def float_export_passes() -> Pipeline[GraphModule]:
    """Before a full-precision export."""
    return Pipeline(
        FoldBatchNorm(),  # one node less a convolution, and a bias that the runtime adds for nothing
    )


SCHEDULES: Mapping[str, Callable[[], Pipeline[GraphModule]]] = {
    "prepare": prepare_passes,
    "quantize": quantizer_passes,
    "float-export": float_export_passes,
}


def passes_in_order() -> list[tuple[str, str, str]]:
    """For every pass of every schedule: the schedule, the pass, and what it does in one line."""
    return [
        (schedule, each.name, inspect.cleandoc(type(each).__doc__ or "").splitlines()[0])
        for schedule, make in SCHEDULES.items()
        for each in make().passes
    ]


def mark_stages(stages: Literal[2, 3] = 2) -> Pass[GraphModule]:
    """The partition of a YOLO-World, or of any detector with a pooling pyramid and max-similarity attention."""
    return MarkStages(pyramid=_pyramids(), outside=_guides(), counted=(LOGITS, BINS), stages=stages)


class PoolingPyramid(nn.Module):
    """The core of SPPF: a chain of three pools, every link of which reaches the concat."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.concat = yolo_world.Concat()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(x)
        z = self.pool(y)
        pyramid: Tensor = self.concat(x, y, z, self.pool(z))
        return pyramid


class MaxSimilarity(nn.Module):
    """The core of max-sigmoid attention."""

    def forward(self, guide: Tensor, embed: Tensor) -> Tensor:
        return yolo_world.max_similarity(guide, embed)  # by its module: a wrapped function is one node only where it was wrapped


@functools.cache
def _pyramids() -> tuple[GraphModule, ...]:
    """As this project's tracer writes it, and as plain symbolic_trace does."""
    return _traced(PoolingPyramid(), keep_leaves=True), _traced(PoolingPyramid(), keep_leaves=False)


@functools.cache
def _guides() -> tuple[GraphModule, ...]:
    return (_traced(MaxSimilarity(), keep_leaves=True),)


def _traced(pattern: nn.Module, keep_leaves: bool) -> GraphModule:
    tracer = LeafTracer(LEAVES if keep_leaves else ())
    return GraphModule(pattern, tracer.trace(pattern), type(pattern).__name__)
