"""From a model to a file that onnxruntime runs: lowered, written as ONNX, rewritten by the passes of `pipelines.onnx_passes`.

    Prepared or YoloWorld ─ lower ─▶ torch.fx graph ─ emission ─▶ ONNX ─ file_ends ─▶ its inputs and outputs ─ onnx_passes ─▶ file

The same model and settings give the same bytes. What the file says of itself is `crqat_fx.metadata`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir
import torch

from crqat_fx import __version__
from crqat_fx.detections import STEP, Selection
from crqat_fx.emission import Axes, Example, emit
from crqat_fx.errors import UserError
from crqat_fx.file_ends import decode, suppress, take_bytes
from crqat_fx.files import written
from crqat_fx.lower import Lowered, lower, lower_float
from crqat_fx.metadata import IMAGES, TEXT, Input, Metadata, Outputs, Weights
from crqat_fx.models.yolo_world import STRIDES, YoloWorld
from crqat_fx.pipelines import half_passes, onnx_passes
from crqat_fx.progress import Progress
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.vocabulary import Vocabulary
from passes.base import PassError, Step
from passes.onnx.model import IR_VERSION

logger = logging.getLogger(__name__)

Form = Literal["straight", "tuned", "fp16"]
Storage = Literal["int4", "int8"]
Open = Literal["batch", "size"]

OUTPUTS = (*(f"logits_{stride}" for stride in STRIDES), *(f"bins_{stride}" for stride in STRIDES))
FOUND = Selection(conf=0.25)  # of a file that suppresses by itself: what `detect` shows
PACKED = 4  # bits of a code that two of fit into a byte


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    path: Path
    size_bytes: int
    metadata: Metadata
    steps: tuple[Step, ...]  # the passes that ran, of the graph and of the model


def export(
    source: Prepared | YoloWorld,
    out: str | Path,
    *,
    vocabulary: Vocabulary | None = None,
    runtime_text: bool = False,
    form: Form = "tuned",
    weights: Storage | None = None,
    size: int | None = None,
    dynamic: Sequence[Open] = (),
    outputs: Outputs = "decoded",
    input: Input = "float",  # noqa: A002  # as the option is called
    selection: Selection = FOUND,
    progress: Progress | None = None,
) -> Exported:
    """Writes a model as ONNX. Of a prepared one the integers, of a checkpoint's model the floats in a `form`.

    `vocabulary` is folded in, unless `runtime_text` leaves the text an input; None takes the prepared model's own. `weights` is storage
    alone: without it each weight takes the least that holds its codes. `dynamic` leaves the batch open, and the size in multiples of 32.
    """
    prepared = source if isinstance(source, Prepared) else None
    named = prepared.vocabulary if prepared is not None and vocabulary is None else vocabulary
    pixels = size or (640 if prepared is None else prepared.size)
    check(source, named, runtime_text, form, weights, pixels, dynamic, outputs, input)
    path = Path(out)
    with written(path) as temporary:  # first of all: a path that cannot be written is told before the work is done
        tell = _teller(progress, "lower", "emit", "rewrite", "write")
        tell()
        lowered = _lowered(source, None if runtime_text else named, form, pixels)
        assert lowered.config is not None  # of a detector, which was checked
        tell()
        metadata = Metadata(
            version=__version__,
            names=() if named is None else named.names,
            size=(pixels, pixels),
            outputs=outputs,
            input=input,
            text="runtime" if runtime_text else "constant",
            text_width=lowered.config.text_width,
            weights=_stored(source, weights, form),
            multiple=STEP if "size" in dynamic else None,
            strides=STRIDES,
            nms=selection if outputs == "nms" else None,
            recipe=None if prepared is None else prepared.recipe.as_plain(),
            target=None if prepared is None else prepared.target.name,
            cpu=None if prepared is None else prepared.cpu,
        )
        model, steps = detector_model(lowered, metadata, pixels, dynamic, progress=tell)
        tell()
        temporary.write_bytes(serialized(model))
    return Exported(path, path.stat().st_size, metadata, (*lowered.steps, *steps))


def _lowered(source: Prepared | YoloWorld, vocabulary: Vocabulary | None, form: Form, size: int) -> Lowered:
    if isinstance(source, Prepared):
        return lower(source, vocabulary)
    return lower_float(source, vocabulary, "tuned" if form == "tuned" else "straight", size=size)


def serialized(model: ir.Model) -> bytes:
    """The model's bytes, the same for the same model. What an initializer is stands in its tensor, and is not said a second time."""
    for value in model.graph.initializers.values():
        value.shape, value.type = None, None
    proto = ir.to_proto(model)
    return bytes(proto.SerializeToString(deterministic=True))


def check(
    source: Prepared | YoloWorld, vocabulary: Vocabulary | None, runtime_text: bool, form: str, weights: str | None, size: int,
    dynamic: Sequence[str], outputs: str, input: str,  # noqa: A002
) -> None:  # fmt: skip
    """Refuses what cannot be exported, before anything is computed."""
    for name, value, known in (("form", form, Form), ("outputs", outputs, Outputs), ("input", input, Input)):
        if value not in get_args(known):
            raise UserError(f"{name} is {value!r}", remedy=f"give one of {', '.join(get_args(known))}")
    for each in dynamic:
        if each not in get_args(Open):
            raise UserError(f"{each!r} cannot be left open", where="dynamic", remedy="give batch, size, or both")
    if size % STEP or size < STEP:
        raise UserError(f"size is {size}", remedy=f"give a multiple of {STEP}")
    if source.config is None:
        raise UserError(
            "is a module of your own, not a detector", where="export", remedy="use `crqat_fx.export.lowered_model` for its graph"
        )
    if vocabulary is None and not runtime_text:
        raise UserError(
            "no vocabulary is there to fold in",
            where="export",
            remedy="give one with --vocabulary, or leave the text an input with --runtime-text",
        )
    if weights is None:
        return
    if weights not in get_args(Storage):
        raise UserError(f"weights is {weights!r}", remedy=f"give one of {', '.join(get_args(Storage))}")
    if not isinstance(source, Prepared):
        raise UserError("a checkpoint has no codes to store", where="--weights", remedy="prepare it first with `crqat-fx prepare`")
    if weights == "int4" and not _narrow(source):
        raise UserError(
            "the codes of this recipe's weights do not fit 4 bits",
            where="--weights int4",
            remedy="store them as int8, or prepare with a 4-bit recipe",
        )


def _narrow(prepared: Prepared) -> bool:
    """Whether two codes of a weight fit a byte: of some weights at least, as edges may be wider in any recipe."""
    return any(quantizer.spec.bits <= PACKED for quantizer in prepared.quantizers().values() if quantizer.weight)


def _stored(source: Prepared | YoloWorld, weights: Storage | None, form: Form) -> Weights:
    if not isinstance(source, Prepared):
        return "float16" if form == "fp16" else "float32"
    return weights or ("int4" if _narrow(source) else "int8")


def detector_model(
    lowered: Lowered, metadata: Metadata, size: int, dynamic: Sequence[Open] = (), progress: Callable[[], None] | None = None
) -> tuple[ir.Model, tuple[Step, ...]]:
    """The model of a detector's lowered graph, with the ends and the words that its metadata name; and the passes that ran."""
    model = emit(lowered.graph, _examples(lowered, size, dynamic), OUTPUTS, names=lowered.names, axes=_axes(dynamic))
    if progress is not None:
        progress()
    steps = half_passes()(model).steps if metadata.weights == "float16" else ()  # before the ends: boxes in pixels take more than 16 bits
    if metadata.input == "uint8":
        take_bytes(model)
    if metadata.outputs != "raw":
        decode(model, metadata.strides)
    if metadata.nms is not None:
        suppress(model, metadata.nms, metadata.strides)
    model.metadata_props.update(metadata.as_strings())
    return model, (*steps, *_rewritten(model, metadata.weights, metadata.target))


def lowered_model(
    lowered: Lowered, examples: Sequence[Example], outputs: Sequence[str] | None = None, weights: Weights = "int8"
) -> ir.Model:
    """The model of any lowered graph. What is the same in all examples is fixed in it; outputs are `output_0` and so on unless named."""
    model = emit(lowered.graph, examples, outputs, names=lowered.names)
    _rewritten(model, weights, None if lowered.target is None else lowered.target.name)
    return model


def _rewritten(model: ir.Model, weights: Weights, target: str | None) -> tuple[Step, ...]:
    passes = onnx_passes(weights=weights, target=target)
    try:
        steps = passes(model).steps
    except PassError as error:
        raise UserError(
            error.reason, where=error.name, remedy="report this model: its graph has a form that the pass does not know"
        ) from error
    assert model.ir_version == IR_VERSION
    return steps


def _examples(lowered: Lowered, size: int, dynamic: Sequence[Open]) -> list[Example]:
    """Inputs of the shapes that the file shall take: one, or two that differ in all that stays open and agree in nothing by chance."""
    batches = (1, 2) if "batch" in dynamic else (1,)
    sizes = ((96, 160), (160, 224)) if "size" in dynamic else ((size, size),)
    texts = (4, 11) if TEXT in lowered.inputs else (1,)
    width = 1 if lowered.config is None else lowered.config.text_width
    examples: list[Example] = []
    for index in range(max(len(batches), len(sizes), len(texts))):
        batch, count = batches[min(index, len(batches) - 1)], texts[min(index, len(texts) - 1)]
        height, wide = sizes[min(index, len(sizes) - 1)]
        given = {IMAGES: torch.zeros(batch, 3, height, wide), TEXT: torch.zeros(batch, count, width)}
        examples.append(tuple(given[name] for name in lowered.inputs))
    return examples


def _axes(dynamic: Sequence[Open]) -> dict[str, Axes]:
    sides = ("height", "width") if "size" in dynamic else (None, None)
    batch = "batch" if "batch" in dynamic else None
    return {IMAGES: (batch, None, *sides), TEXT: (None if batch is None else "text_batch", "texts", None)}


def _teller(progress: Progress | None, *parts: str) -> Callable[[], None]:
    """Told at the start of each part, says which."""
    waiting = iter(enumerate(parts))

    def tell() -> None:
        done, part = next(waiting)
        if progress is not None:
            progress(done, len(parts), part)

    return tell
