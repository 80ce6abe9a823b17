"""The schedules: which passes run, in which order, and why each stands where it does. Read this file first."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from crqat_fx.models import yolo_world
from crqat_fx.recipe import TARGETS, WIDEST, Target
from crqat_fx.trace import LEAVES, LeafTracer
from passes.base import Pass, Pipeline
from passes.fx.bind_input import BindInput
from passes.fx.collapse_match import CollapseMatch
from passes.fx.fold_batchnorm import FoldBatchNorm
from passes.fx.fold_constants import FoldConstants
from passes.fx.keep_outputs import KeepOutputs
from passes.fx.lower_layers import LowerLayers
from passes.fx.mark_stages import MarkStages
from passes.fx.mark_whole import MarkWhole
from passes.fx.place_quantizers import Make, PlaceQuantizers
from passes.fx.round_head_bias import RoundHeadBias
from passes.fx.share_scales import ShareScales
from passes.fx.split_silu import SplitSilu
from passes.fx.to_integer_codes import ToIntegerCodes
from passes.onnx.channels_last_attention import ChannelsLastAttention
from passes.onnx.channels_last_match import ChannelsLastMatch
from passes.onnx.channels_last_patches import ChannelsLastPatches
from passes.onnx.derive_bias_scales import DeriveBiasScales
from passes.onnx.drop_unused import DropUnused
from passes.onnx.float_softmax import FloatSoftmax
from passes.onnx.fold_factor import FoldFactor
from passes.onnx.half_precision import HalfPrecision
from passes.onnx.linear_as_convolution import LinearAsConvolution
from passes.onnx.merge_equal import MergeEqual
from passes.onnx.pack_int4 import PackInt4
from passes.onnx.pad_stem import PadStem
from passes.onnx.requantize_by_concat import RequantizeByConcat
from passes.onnx.saturate_codes import SaturateCodes
from passes.onnx.shed_annotations import ShedAnnotations
from passes.onnx.split_heads import SplitHeads
from passes.onnx.tile_upsample import TileUpsample
from passes.spec import QuantSpec

LOGITS, BINS = 0, 1  # entries of the model's output; the regions, 2, are not counted
TEXT = "text"  # the model's second input


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


def lowering_passes(text: Tensor | None = None, *, detector: bool = True, weight_bits: int = WIDEST) -> Pipeline[GraphModule]:
    """From a prepared graph to integer codes. `text` [1,N,D]: a vocabulary for good; None: an input. A `detector` is a YOLO-World."""
    return Pipeline(
        *_known(text, detector),
        CollapseMatch(yolo_world.Match, weight_bits),  # before anything has codes: what it rounds is a product of floats
        RoundHeadBias(),  # while the quantizers stand that tell its steps
        ToIntegerCodes(),  # before the layers: their biases are rounded in the steps of the codes they read
        LowerLayers(),
        FoldConstants(),  # last: all that depends on the text alone is codes by now, and is stored as such
    )


def float_export_passes(text: Tensor | None = None, *, detector: bool = True, tuned: bool = False) -> Pipeline[GraphModule]:
    """Before a full-precision export: as the model is written, or `tuned` to the fewest products that give the same."""
    return Pipeline(
        *_known(text, detector),
        FoldBatchNorm(),  # one node less a convolution, and a bias that the runtime adds for nothing
        *([CollapseMatch(yolo_world.Match, WIDEST)] if tuned else []),  # behind folded norms: it meets convolutions alone
        LowerLayers(),  # the form that all exports share
        FoldConstants(),
    )


def half_passes() -> Pipeline[ir.Model]:
    """Over an emitted model in floats, for one in 16 bits."""
    return Pipeline(DropUnused(), HalfPrecision())


def onnx_passes(*, weights: str = "int8", target: str | None = None) -> Pipeline[ir.Model]:
    """Over an emitted model, float or integer, to the form that its runtime is fastest with. Outputs stay what they are."""
    ours: list[Pass[ir.Model]] = [
        ChannelsLastAttention(),  # before products of heads are split: it has forms of its own for them
        ChannelsLastMatch(),
        ChannelsLastPatches(),
        LinearAsConvolution(),  # after both: a guide that is constant has no linear layer
        FoldFactor(),  # after attention, which folds its own
        FloatSoftmax(),
        SaturateCodes(),
        RequantizeByConcat(),
        TileUpsample(),
        PadStem(),
    ]
    return Pipeline(
        DropUnused(),  # first: shapes that were asked for, reshapes that were looked through, and the names of outputs
        *(ours if target == "ort" else []),  # kernels of onnxruntime; elsewhere codes stand before products alone
        SplitHeads(),  # right for any runtime: what is left of products with a scale a head
        *([PackInt4()] if weights == "int4" else []),  # after the passes that change codes
        MergeEqual(),  # what was written more than once
        DeriveBiasScales(),
        ShedAnnotations(),  # last: passes go by shapes and types
    )


def _known(text: Tensor | None, detector: bool) -> list[Pass[GraphModule]]:
    """What an export of a detector knows and training does not: nobody reads the regions, and the text may be constant."""
    outputs: list[Pass[GraphModule]] = [KeepOutputs((LOGITS, BINS), of=3)] if detector else []
    return outputs if text is None else [*outputs, BindInput(TEXT, text)]


SCHEDULES: Mapping[str, Callable[[], Pipeline[GraphModule] | Pipeline[ir.Model]]] = {
    "prepare": prepare_passes,
    "quantize": quantizer_passes,
    "lowering": functools.partial(lowering_passes, torch.zeros(1, 1, 1)),
    "float-export": functools.partial(float_export_passes, torch.zeros(1, 1, 1), tuned=True),
    "half": half_passes,
    "onnx": functools.partial(onnx_passes, weights="int4", target="ort"),
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
