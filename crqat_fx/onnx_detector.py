"""The detector on a file that `crqat-fx export` wrote, in onnxruntime and numpy alone.

    pictures ─ letterbox ─▶ images [B,3,H,W] or [B,H,W,3] ─ onnxruntime ─▶ boxes, scores                ─ postprocess_decoded ─▶ Detections
                            text [1,N,D], where it is asked for            logits_8, ..., bins_8, ...   ─ postprocess
                                                                           detections, counts           ─ postprocess_kept

Which of these a file is, its metadata says (`crqat_fx.metadata`); its inputs and outputs are held against that before anything runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

from crqat_fx.detect import DetectSettings, open_vocabulary, split_names
from crqat_fx.detections import Detections, Selection, check_picture, pick, postprocess, postprocess_decoded, postprocess_kept
from crqat_fx.errors import UserError
from crqat_fx.metadata import FULL, IMAGES, TEXT, Metadata
from crqat_fx.onnx_session import EXPORT, FAILURES, open_session, reason_of, summing_whole
from crqat_fx.pictures import PADDING, Placement, letterbox
from crqat_fx.vocabulary import Vocabulary, rows_of

_BOX, _BINS, _ROW = 4, 64, 6  # numbers a box, bins a cell, numbers a detection
_TYPES = {"float": "tensor(float)", "uint8": "tensor(uint8)"}

Shape = tuple[int | None, ...]  # None: of any length


@dataclass(frozen=True)
class OnnxModel:
    """An exported file before it is known how it is to be run."""

    path: Path
    metadata: Metadata
    weights: ClassVar[str] = "only"

    @property
    def takes_text(self) -> bool:
        return self.metadata.text == "runtime"

    def carried_settings(self) -> dict[str, Any]:
        """What the file says of the settings: its picture size and, where it has NMS in it, what that keeps."""
        kept = self.metadata.nms
        return {"size": max(self.metadata.size)} | ({} if kept is None else {"conf": kept.conf, "iou": kept.iou, "max": kept.max})

    def detector(self, settings: DetectSettings, vocabulary: Vocabulary | None = None) -> "OnnxDetector":
        """`vocabulary` is the data's, for a file that takes one; that of the settings goes before it."""
        if settings.device != "cpu":
            raise UserError(f"runs on the processor, not on {settings.device}", where=self.path, remedy="leave --device out")
        names = None
        if self.takes_text:
            vocabulary = open_vocabulary(vocabulary, settings, self.path)
        elif settings.vocabulary is not None:
            raise UserError(
                "has its vocabulary folded into it", where=self.path, remedy="leave --vocabulary out, or export with --runtime-text"
            )
        else:
            vocabulary = None
            names = None if settings.text is None else split_names(settings.text)
        return OnnxDetector(
            self.path, vocabulary, settings.size, settings.conf, settings.iou, settings.max, names=names, threads=settings.threads
        )


def read_onnx(path: str | Path) -> OnnxModel:
    """The file's metadata, checked."""
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL  # its metadata alone is wanted
    return OnnxModel(Path(path), read_metadata(open_session(path, 1, options), path))


def read_metadata(session: InferenceSession, path: str | Path) -> Metadata:
    try:
        strings = session.get_modelmeta().custom_metadata_map
    except FAILURES as error:  # not UTF-8, say
        raise UserError(f"its metadata cannot be read ({reason_of(error)})", where=path, remedy=EXPORT) from error
    return Metadata.read(strings, path)


class OnnxDetector:
    """Detects with an exported file. Pictures of any size are letterboxed to `size`; those of one call run as one batch, or as batches of
    the file's own size.

    `vocabulary` is for a file that takes its text as an input, and only for that. `names` are those to look for, among all that the file or
    the vocabulary knows. A file with NMS in it has settled what it keeps: less can be asked of it, not more, and None takes it all.
    """

    def __init__(
        self,
        path: str | Path,
        vocabulary: Vocabulary | None = None,
        size: int | None = None,
        conf: float | None = None,
        iou: float | None = None,
        max_detections: int | None = None,
        *,
        names: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._session = open_session(self.path, threads)
        self.metadata = read_metadata(self._session, self.path)
        if self.metadata.cpu == FULL:
            self._session = open_session(self.path, threads, summing_whole())
        self._inputs = checked_inputs(self._session, self.metadata, self.path)
        self._outputs = checked_outputs(self._session, self.metadata, self.path)
        self.canvas = _canvas(self.metadata, size, self.path)
        self.selection = _selection(self.metadata, conf, iou, max_detections, self.path)
        self._text = self._embeddings(vocabulary)
        known = self.metadata.names if vocabulary is None else vocabulary.names
        self._texts = len(known)
        self._rows = None if names is None else np.array(rows_of(names, known), np.int64)  # of the names to look for
        self.names = known if names is None else tuple(names)

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        for picture in pictures:
            check_picture(picture)
        found: list[Detections] = []
        for group in self._batches(pictures):
            boxed, placements = zip(*(letterbox(picture, self.canvas) for picture in group), strict=True)
            outputs = self._run(np.stack(boxed))
            found += [self._found([output[row] for output in outputs], placement) for row, placement in enumerate(placements)]
        return found

    def _embeddings(self, vocabulary: Vocabulary | None) -> np.ndarray | None:
        """What to feed as text [1, N, D]."""
        if self.metadata.text == "constant":
            if vocabulary is not None:
                raise UserError("has its vocabulary folded into it", where=self.path, remedy="give none, or export with --runtime-text")
            return None
        if vocabulary is None:
            raise UserError("takes its text as an input", where=self.path, remedy="give a vocabulary")
        vocabulary.check_width(self.metadata.text_width, self.path)
        texts = self._inputs[TEXT][1]
        if texts not in (None, len(vocabulary)):
            raise UserError(f"takes {texts} texts and is given {len(vocabulary)}", where=self.path, remedy="give as many")
        return vocabulary.embeddings[np.newaxis]

    def _batches(self, pictures: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
        step = self._inputs[IMAGES][0] or max(len(pictures), 1)
        return (pictures[first : first + step] for first in range(0, len(pictures), step))

    def _run(self, pictures: np.ndarray) -> list[np.ndarray]:
        """The outputs for uint8 pictures [b, H, W, 3], b rows of each. Where the file's batch is fixed, grey pictures fill it up."""
        count = len(pictures)
        batch = self._inputs[IMAGES][0] or count
        if count < batch:
            pictures = np.concatenate([pictures, np.full((batch - count, *pictures.shape[1:]), PADDING, np.uint8)])
        feed = {IMAGES: pictures if self.metadata.input == "uint8" else as_floats(pictures)}
        if self._text is not None:
            feed[TEXT] = self._text if self._inputs[TEXT][0] == 1 else np.repeat(self._text, batch, axis=0)
        try:
            outputs: list[np.ndarray] = self._session.run(list(self._outputs), feed)
        except FAILURES as error:
            raise UserError(f"cannot be run by onnxruntime ({reason_of(error)})", where=self.path, remedy=EXPORT) from error
        self._check(outputs, batch)
        return [output[:count] for output in outputs]

    def _check(self, outputs: Sequence[np.ndarray], batch: int) -> None:
        for (name, wanted), output in zip(_shapes(self.metadata, self.canvas, batch, self._texts).items(), outputs, strict=True):
            if not _fits(output.shape, wanted):
                what = f"its output {name} is of shape {list(output.shape)}, where {_shown(wanted)} belongs"
                raise UserError(what, where=self.path, remedy=EXPORT)
        if self.metadata.outputs == "nms":
            rows, counts = outputs
            labels = rows[..., -1][np.arange(rows.shape[1]) < counts[:, np.newaxis]]
            if not ((counts >= 0) & (counts <= rows.shape[1])).all() or not ((labels >= 0) & (labels < self._texts)).all():
                raise UserError("its NMS gives counts or labels that cannot be", where=self.path, remedy=EXPORT)

    def _found(self, outputs: Sequence[np.ndarray], placement: Placement) -> Detections:
        """The detections of one picture."""
        if self.metadata.outputs == "decoded":
            boxes, scores = outputs
            chosen = scores if self._rows is None else scores[:, self._rows]
            return postprocess_decoded(boxes, chosen, self.metadata.strides, placement, self.selection)
        if self.metadata.outputs == "raw":
            logits, bins = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
            picked = [pick(level if self._rows is None else level[self._rows], self.selection.floor) for level in logits]
            return postprocess(picked, bins, placement, self.selection)
        rows, count = outputs
        return postprocess_kept(self._looked_for(rows[: int(count)]), placement, self.selection)

    def _looked_for(self, rows: np.ndarray) -> np.ndarray:
        """Of NMS's rows those of the names to look for, labelled by their place among them."""
        if self._rows is None:
            return rows
        slots = np.full(self._texts, -1, np.float32)
        slots[self._rows] = np.arange(len(self._rows))
        relabelled = np.column_stack([rows[:, :-1], slots[rows[:, -1].astype(np.int64)]])
        return relabelled[relabelled[:, -1] >= 0]


def as_floats(pictures: np.ndarray) -> np.ndarray:
    """uint8 pictures [B, H, W, 3] as float32 [B, 3, H, W] in [0, 1]."""
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def checked_inputs(session: InferenceSession, metadata: Metadata, path: Path) -> Mapping[str, Shape]:
    """The file's inputs with their shapes, as its metadata promises them."""
    height, width = metadata.size if metadata.multiple is None else (None, None)
    images: Shape = (None, height, width, 3) if metadata.input == "uint8" else (None, 3, height, width)
    promised = {IMAGES: (_TYPES[metadata.input], images)}
    if metadata.text == "runtime":
        promised[TEXT] = (_TYPES["float"], (None, None, metadata.text_width))
    return _checked(session.get_inputs(), promised, "input", path)


def checked_outputs(session: InferenceSession, metadata: Metadata, path: Path) -> Mapping[str, Shape]:
    """The file's outputs with their shapes, as its metadata promises them."""
    canvas = metadata.size if metadata.multiple is None else None
    texts = None if metadata.text == "runtime" else len(metadata.names)
    counts = {"counts": "tensor(int64)"} if metadata.outputs == "nms" else {}
    shapes = _shapes(metadata, canvas, None, texts)
    promised = {name: (counts.get(name, _TYPES["float"]), shape) for name, shape in shapes.items()}
    return _checked(session.get_outputs(), promised, "output", path)


def _checked(given: Sequence[Any], promised: Mapping[str, tuple[str, Shape]], kind: str, path: Path) -> Mapping[str, Shape]:
    try:
        told = [(one.name, one.type, tuple(side if isinstance(side, int) and side > 0 else None for side in one.shape)) for one in given]
    except UnicodeDecodeError as error:
        raise UserError(f"names its {kind}s in bytes that are no text", where=path, remedy=EXPORT) from error
    names = [name for name, _, _ in told]
    if names != list(promised):
        what = f"has the {kind}s {', '.join(names) or 'none'}, and its metadata promises {', '.join(promised)}"
        raise UserError(what, where=path, remedy=EXPORT)
    for (name, element, shape), wanted in zip(told, promised.values(), strict=True):
        may_be = len(shape) == len(wanted[1]) and all(None in pair or pair[0] == pair[1] for pair in zip(shape, wanted[1], strict=True))
        if element != wanted[0] or not may_be:
            what = f"its {kind} {name} is {element} {_shown(shape)}, and its metadata promises {wanted[0]} {_shown(wanted[1])}"
            raise UserError(what, where=path, remedy=EXPORT)
    return {name: shape for name, _, shape in told}


def _shapes(metadata: Metadata, canvas: tuple[int, int] | None, batch: int | None, texts: int | None) -> dict[str, Shape]:
    """The outputs in order, each with its shape as far as it is known."""
    if metadata.outputs == "nms":
        return {"detections": (batch, None, _ROW), "counts": (batch,)}
    cells: list[tuple[int | None, int | None]]
    cells = [(None, None) if canvas is None else (canvas[0] // stride, canvas[1] // stride) for stride in metadata.strides]
    if metadata.outputs == "decoded":
        anchors = None if canvas is None else sum((height or 0) * (width or 0) for height, width in cells)
        return {"boxes": (batch, anchors, _BOX), "scores": (batch, anchors, texts)}
    logits: dict[str, Shape] = {f"logits_{stride}": (batch, texts, *sides) for stride, sides in zip(metadata.strides, cells, strict=True)}
    return logits | {f"bins_{stride}": (batch, _BINS, *sides) for stride, sides in zip(metadata.strides, cells, strict=True)}


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(side in (None, length) for length, side in zip(shape, wanted, strict=True))


def _shown(shape: Shape) -> str:
    return f"[{', '.join('any' if side is None else str(side) for side in shape)}]"


def _canvas(metadata: Metadata, size: int | None, path: Path) -> tuple[int, int]:
    """The letterbox that pictures are laid into."""
    if metadata.multiple is None:
        if size not in (None, max(metadata.size)):
            height, width = metadata.size
            remedy = "leave --size out, or export with --size or --dynamic size"
            raise UserError(f"is for pictures of {height} x {width} px, not of {size}", where=path, remedy=remedy)
        return metadata.size
    side = metadata.size[0] if size is None else size
    if side < metadata.multiple or side % metadata.multiple:
        raise UserError(f"size is {side}", where=path, remedy=f"give a multiple of {metadata.multiple}")
    return side, side


def _selection(metadata: Metadata, conf: float | None, iou: float | None, most: int | None, path: Path) -> Selection:
    settled = metadata.nms
    given = {"conf": conf, "iou": iou, "max": most}
    chosen = Selection(**({} if settled is None else asdict(settled)) | {name: value for name, value in given.items() if value is not None})
    if settled is None:
        return chosen
    for name, wider in (("conf", chosen.conf < settled.conf), ("iou", chosen.iou != settled.iou), ("max", chosen.max > settled.max)):
        if wider:
            what = f"has NMS in it, with {name} {getattr(settled, name):g}: {getattr(chosen, name):g} cannot be had of it"
            raise UserError(what, where=path, remedy=f"leave --{name} out, or export without --nms")
    return chosen
