"""From a model's outputs to boxes on the original picture, in numpy alone, so that any runtime can stand before it.

    logits [N,h,w] a stride   pick: those above the threshold's logit, before anything is converted
    bins [64,h,w] a stride    decoded where something was picked
       score = sigmoid(logit) > conf, every class of a place by itself, the best 30,000
       box   = ((i + .5) s -+ expected distance s), letterbox undone
       NMS at `iou` within each class, the best `max` kept, boxes clipped to the picture

As published, the letterbox is undone before NMS, and clipping comes last. Equal scores are ordered by their place in the outputs: stride by
stride, class by class, row by row. The published NMS separates classes by shifting their boxes apart, which can let boxes that reach beyond
the picture meet a neighbouring class; here classes never meet.

An exported file may have done part of this: `postprocess_decoded` goes on from boxes and scores, `postprocess_kept` from what NMS kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from crqat_fx.errors import UserError
from crqat_fx.pictures import Placement

STEP = 32  # of the picture size: the model's coarsest stride
LARGEST = 8192  # picture size
_FLOOR_SLACK = 1e-3  # of the logit: far more than float32 rounding; the scores themselves are compared afterwards


@dataclass(frozen=True)
class Detections:
    """What was found on one picture, best first."""

    boxes: np.ndarray  # float32 [k, 4], xyxy in pixels of the original picture
    scores: np.ndarray  # float32 [k]
    labels: np.ndarray  # int64 [k], a slot of the vocabulary

    def __len__(self) -> int:
        return len(self.scores)


class Detector(Protocol):
    """Anything that finds named things on pictures, whatever runs underneath."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """One for each uint8 RGB picture [H, W, 3]; sizes may differ."""


def check_size(size: int) -> None:
    if not STEP <= size <= LARGEST or size % STEP:
        raise UserError(f"size is {size}", remedy=f"give a multiple of {STEP} up to {LARGEST}, such as 640")


def check_picture(picture: np.ndarray) -> None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise UserError(f"a picture is {picture.dtype} of shape {list(picture.shape)}", remedy="give uint8 RGB [height, width, 3]")


@dataclass(frozen=True)
class Selection:
    """Which candidates become detections. The defaults are those of the published evaluation."""

    conf: float = 0.001
    iou: float = 0.7
    max: int = 300
    candidates: int = 30_000  # before NMS

    def __post_init__(self) -> None:
        for name, value in (("conf", self.conf), ("iou", self.iou)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}", remedy="give a number from 0 to 1")
        for name, count in (("max", self.max), ("candidates", self.candidates)):
            if count < 1:
                raise UserError(f"{name} is {count}", remedy="give a whole number of at least 1")

    @property
    def floor(self) -> float:
        """A logit below which no score passes `conf`."""
        if self.conf in (0, 1):
            return float("-inf") if self.conf == 0 else float("inf")
        return float(np.log(self.conf) - np.log1p(-self.conf)) - _FLOOR_SLACK


@dataclass(frozen=True)
class Picked:
    """Of one stride's logits [N, h, w], those not below a floor; NaNs among them, so that they cannot pass unseen."""

    logits: np.ndarray  # float32 [k]
    places: np.ndarray  # int64 [k], ascending, in the flattened logits


def pick(logits: np.ndarray, floor: float) -> Picked:
    flat = logits.reshape(-1)
    below = flat <= floor
    places = np.flatnonzero(np.logical_not(below, out=below))
    return Picked(flat[places].astype(np.float32, copy=False), places)


def postprocess(picked: Sequence[Picked], bins: Sequence[np.ndarray], placement: Placement, selection: Selection) -> Detections:
    """The detections of one picture, from each stride's picked logits and distance bins [4 * K, h, w]."""
    logits, labels, boxes = _candidates(picked, bins, placement.canvas, selection.candidates)
    return _select(boxes, sigmoid(logits), labels, placement, selection)


def postprocess_decoded(
    boxes: np.ndarray, scores: np.ndarray, strides: Sequence[int], placement: Placement, selection: Selection
) -> Detections:
    """The detections of one picture, from boxes [A, 4] xyxy in letterbox pixels and scores [A, N]: stride by stride, row by row."""
    flat = scores.reshape(-1)
    places = np.flatnonzero(np.logical_not(flat <= selection.conf))
    _refuse_nan(flat[places])
    anchors, labels = np.divmod(places, scores.shape[1])
    height, width = placement.canvas
    ends = np.cumsum([(height // stride) * (width // stride) for stride in strides])
    order = np.lexsort((anchors, labels, np.searchsorted(ends, anchors, side="right")))  # equal scores: as in the raw outputs
    best = order[_best(flat[places[order]], selection.candidates)]
    chosen = boxes[anchors[best]].astype(np.float32)
    _refuse_boundless(chosen)
    return _select(chosen, flat[places[best]], labels[best], placement, selection)


def postprocess_kept(kept: np.ndarray, placement: Placement, selection: Selection) -> Detections:
    """The detections of one picture, from rows [k, 6] that NMS kept, best first: a box xyxy in letterbox pixels, its score, its label."""
    _refuse_nan(kept[:, 4])
    _refuse_boundless(kept[:, :4])
    rows = kept[kept[:, 4] > selection.conf][: selection.max]
    return Detections(_clipped(_unboxed(rows[:, :4], placement), placement), rows[:, 4].copy(), rows[:, 5].astype(np.int64))


def _select(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, placement: Placement, selection: Selection) -> Detections:
    """What of the candidates, best first and with boxes in letterbox pixels, becomes detections."""
    passed = scores > selection.conf
    boxes, scores, labels = boxes[passed], scores[passed], labels[passed]
    boxes = _unboxed(boxes, placement)
    kept = nms(boxes, scores, labels, selection.iou, selection.max)
    return Detections(_clipped(boxes[kept], placement), scores[kept], labels[kept])


def _unboxed(boxes: np.ndarray, placement: Placement) -> np.ndarray:
    """Boxes in letterbox pixels as boxes in the original picture's."""
    moved = boxes - np.array((placement.left, placement.top) * 2, dtype=np.float32)
    return np.asarray(moved / np.array((placement.scale_x, placement.scale_y) * 2, dtype=np.float32))


def _clipped(boxes: np.ndarray, placement: Placement) -> np.ndarray:
    return np.asarray(np.clip(boxes, 0, np.array((placement.width, placement.height) * 2, dtype=np.float32)))


def _refuse_nan(scores: np.ndarray) -> None:
    if np.isnan(scores).any():
        raise UserError("the model's scores are not numbers (NaN)", remedy="check the checkpoint and what was done to it")


def _refuse_boundless(boxes: np.ndarray) -> None:
    if not np.isfinite(boxes).all():
        raise UserError("the model's boxes are not finite numbers", remedy="check the checkpoint and what was done to it")


def _candidates(
    picked: Sequence[Picked], bins: Sequence[np.ndarray], canvas: tuple[int, int], limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best `limit` of what was picked, best first: logits, labels, and boxes in letterbox pixels."""
    for found in picked:
        _refuse_nan(found.logits)
    best = [_best(level.logits, limit) for level in picked]
    level_of = np.repeat(np.arange(len(picked)), [len(chosen) for chosen in best])
    logits = np.concatenate([level.logits[chosen] for level, chosen in zip(picked, best, strict=True)])
    places = np.concatenate([level.places[chosen] for level, chosen in zip(picked, best, strict=True)])
    order = _best(logits, limit)
    logits, places, level_of = logits[order], places[order], level_of[order]
    labels = np.empty(len(order), dtype=np.int64)
    boxes = np.empty((len(order), 4), dtype=np.float32)
    for index, level in enumerate(bins):
        here = np.flatnonzero(level_of == index)
        labels[here], cells = np.divmod(places[here], level.shape[1] * level.shape[2])
        used, back = np.unique(cells, return_inverse=True)
        boxes[here] = decode_cells(level, used, canvas[0] / level.shape[1])[back]
    _refuse_boundless(boxes)
    return logits, labels, boxes


def _best(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices of the `limit` largest values, largest first, the earlier first among equals."""
    if len(values) <= limit:
        return np.argsort(-values, kind="stable")
    least = np.partition(values, len(values) - limit)[len(values) - limit]
    above = np.flatnonzero(values > least)
    chosen = np.sort(np.concatenate((above, np.flatnonzero(values == least)[: limit - len(above)])))
    return chosen[np.argsort(-values[chosen], kind="stable")]


def decode_cells(bins: np.ndarray, cells: np.ndarray, stride: float) -> np.ndarray:
    """Boxes xyxy in letterbox pixels of some cells (row-major) of one stride's distance bins [4 * K, h, w]."""
    width = bins.shape[2]
    chosen = bins.reshape(bins.shape[0], -1)[:, cells].T.reshape(len(cells), 4, bins.shape[0] // 4).astype(np.float32)
    with np.errstate(invalid="ignore"):  # infinite bins: told by the caller
        weights = np.exp(chosen - chosen.max(axis=2, keepdims=True))
    steps = np.arange(weights.shape[2], dtype=np.float32)
    distances = (weights @ steps) / weights.sum(axis=2)
    centres = np.stack((cells % width, cells // width), axis=1).astype(np.float32) + np.float32(0.5)
    corners = np.concatenate((centres - distances[:, :2], centres + distances[:, 2:]), axis=1)
    return (corners * np.float32(stride)).astype(np.float32, copy=False)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-np.logaddexp(np.float32(0), -logits)))


def nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou: float, limit: int) -> np.ndarray:
    """Indices of the kept boxes, best first and `limit` at most: a box goes when a better kept one of its class overlaps it by more than
    `iou`. The earlier is the better among equal scores. The loop runs over the kept alone."""
    count = len(scores)
    ranked = np.argsort(-scores, kind="stable")
    rank_of = np.argsort(labels[ranked], kind="stable")  # candidates class by class, best first in each, by their rank
    grouped = labels[ranked[rank_of]]
    ends = np.searchsorted(grouped, grouped, side="right").tolist()
    position_of = np.empty(count, dtype=np.int64)
    position_of[rank_of] = np.arange(count)
    positions = position_of.tolist()
    left, top, right, bottom = np.ascontiguousarray(boxes[ranked[rank_of]].T)
    area = (right - left) * (bottom - top)
    alive = np.ones(count, dtype=bool)  # by rank
    kept: list[int] = []
    rank = 0
    while len(kept) < limit and rank < count:
        rank += int(alive[rank:].argmax())
        if not alive[rank]:
            break
        kept.append(rank)
        place = positions[rank]
        rest = slice(place + 1, ends[place])
        rank += 1
        if rest.start == rest.stop:
            continue
        width = np.minimum(right[rest], right[place]) - np.maximum(left[rest], left[place])
        height = np.minimum(bottom[rest], bottom[place]) - np.maximum(top[rest], top[place])
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        alive[rank_of[rest][shared > iou * (area[rest] + area[place] - shared)]] = False
    return ranked[kept]
