"""What an exported detector is run on to be verified, and what it has to put out.

It is run on pictures at its usual size and batch. Where it leaves axes open, some of the pictures come again at another size, in a batch of
two, and with fewer texts.

A file with NMS in it is judged twice: the boxes and scores that its NMS reads, against the model's; and its detections, against those that
`crqat_fx.detections` finds in these boxes and scores, row by row. A picture is left out where an overlap lies at the limit, so that either
of two selections is right.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from crqat_fx.detections import Selection, postprocess_decoded
from crqat_fx.metadata import IMAGES, TEXT, Metadata
from crqat_fx.models.yolo_world import decode_boxes, flatten_levels
from crqat_fx.onnx_detector import as_floats
from crqat_fx.pictures import Placement, letterbox
from crqat_fx.vocabulary import Vocabulary

Array = npt.NDArray[np.generic]
Rows = npt.NDArray[np.float32]  # [K, 6]: box, score, label; zeros behind the last
Picture = npt.NDArray[np.uint8]

SMALL = (64, 128)  # height and width of the other size: no square, and quick
AT_LIMIT = 1e-5  # of an overlap: how near to the limit two correct sums may decide differently
DECODED = ("boxes", "scores")


@dataclass(frozen=True)
class Axes:
    """What a file's axes are in one run."""

    batch: int
    canvas: tuple[int, int]  # height, width
    texts: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.canvas[0]} x {self.canvas[1]} px, {self.texts} texts"


@dataclass(frozen=True)
class Trial:
    """Inputs of the prepared model; `axes` says which where they are not the file's usual ones."""

    inputs: tuple[Tensor, ...]
    axes: Axes | None = None


@dataclass(frozen=True)
class Selected:
    """One picture's detections, as the boxes and scores give them and as the file does. `at_limit`: an overlap lies so near to the limit
    that either of two selections is right."""

    wanted: Rows
    found: Rows
    count: int  # that the file tells
    at_limit: bool

    @property
    def wanted_count(self) -> int:
        return int((self.wanted[:, 4] > 0).sum())


class DetectorTrials:
    """The runs of one file. `model` puts out boxes and scores too, where its NMS hides them."""

    def __init__(self, model: onnx.ModelProto, metadata: Metadata, texts: Vocabulary) -> None:
        self.model, self.metadata, self.texts = model, metadata, texts
        self.inputs = {each.name: each for each in model.graph.input}
        self.batch = self.inputs[IMAGES].type.tensor_type.shape.dim[0].dim_value or None  # None: open
        if metadata.outputs == "nms":
            model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in DECODED)

    @property
    def axes(self) -> tuple[Axes, ...]:
        """The usual ones, and where something is open others."""
        usual = Axes(self.batch or 1, self.metadata.size, len(self.texts))
        small = usual.canvas if self.metadata.multiple is None else SMALL
        fewer = usual.texts if self.metadata.text == "constant" else -(-usual.texts // 2)
        others = (dataclasses.replace(usual, canvas=small), Axes(self.batch or 2, small, fewer))
        return tuple(dict.fromkeys((usual, *others)))

    def runs(self, pictures: int) -> int:
        """How many trials so many pictures make."""
        return -(-pictures // self.axes[0].batch) + len(self.axes) - 1

    def trials(self, pictures: Iterable[Picture]) -> Iterator[Trial]:
        usual, *others = self.axes
        waiting, first = iter(pictures), list[Picture]()
        for group in iter(lambda: list(itertools.islice(waiting, usual.batch)), []):
            first = first if len(first) > 1 else [*first, *group]
            yield Trial(self._inputs(group, usual))
        for axes in others if first else ():
            yield Trial(self._inputs(first[: axes.batch], axes), axes)

    def _inputs(self, pictures: list[Picture], axes: Axes) -> tuple[Tensor, ...]:
        filled = [*pictures, *[pictures[-1][:, ::-1]] * (axes.batch - len(pictures))]  # not the same again: it would hide an exchange
        boxed = np.stack([letterbox(picture, axes.canvas)[0] for picture in filled])
        text = torch.from_numpy(self.texts.embeddings[: axes.texts]).expand(axes.batch, -1, -1)
        return torch.from_numpy(as_floats(boxed)), text

    def feeds(self, inputs: tuple[Tensor, ...]) -> dict[str, Array]:
        """The file's inputs."""
        images, text = (each.numpy() for each in inputs)
        as_bytes = np.ascontiguousarray((images * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))
        given = {IMAGES: as_bytes if self.metadata.input == "uint8" else images, TEXT: text}
        return {name: given[name] for name in self.inputs}

    def expected(self, outputs: Any) -> dict[str, Array]:
        """The file's outputs, or what its NMS reads, of what the lowered graph puts out."""
        logits, bins = outputs
        if self.metadata.outputs != "raw":
            return dict(zip(DECODED, (decode_boxes(bins).numpy(), flatten_levels(logits).sigmoid().numpy()), strict=True))
        by_level = zip(self.metadata.strides, logits, bins, strict=True)
        return {
            f"{kind}_{stride}": level.numpy() for stride, *pair in by_level for kind, level in zip(("logits", "bins"), pair, strict=True)
        }

    def selected(self, inputs: tuple[Tensor, ...], outputs: Mapping[str, Array]) -> Iterator[Selected]:
        """Of a file with NMS in it, picture by picture, what its boxes and scores give and what it gives."""
        chosen = self.metadata.nms
        if chosen is None:
            return
        height, width = inputs[0].shape[2:]
        rows = np.array(outputs["detections"])
        rows[..., :4] = rows[..., :4].clip(0, np.array((width, height) * 2))  # detections end at the picture's border, a file's do not
        given = zip(*(outputs[name] for name in DECODED), rows, outputs["counts"], strict=True)
        for boxes, scores, found, count in given:
            lower, wanted, higher = (
                self._found(boxes, scores, dataclasses.replace(chosen, iou=min(max(chosen.iou + by, 0), 1)), (height, width))
                for by in (-AT_LIMIT, 0, AT_LIMIT)
            )
            yield Selected(wanted, found, int(count), not (np.array_equal(lower, wanted) and np.array_equal(wanted, higher)))

    def _found(self, boxes: Array, scores: Array, selection: Selection, canvas: tuple[int, int]) -> Rows:
        every = dataclasses.replace(selection, candidates=max(scores.size, 1))  # a file knows no limit on candidates
        whole = Placement(*canvas, 1, 1, 0, 0, canvas)
        found = postprocess_decoded(boxes, scores, self.metadata.strides, whole, every)
        rows = np.zeros((selection.max, 6), np.float32)
        rows[: len(found)] = np.column_stack((found.boxes, found.scores, found.labels))
        return rows
