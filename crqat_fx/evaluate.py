"""How good a detector's boxes are: COCO's AP, and LVIS' Fixed AP.

Only a detector's names and detections are read, whatever runs underneath. Its labels are joined with the set's categories by name, so
the vocabulary at test time is free to differ from the one in training: every category needs its name in it; names that are no category
are allowed, and what is found under them is left out. Categories that share a name share its detections.

    coco         101-point AP over the IoUs .50:.05:.95, at most 100 detections a class and picture, crowds ignored
    lvis-fixed   the same over each class's 10,000 best detections of the whole set, with no cap a picture. The truth is federated: in a
                 picture where a class is neither present nor verified absent its detections are left out, and where it is present but
                 not exhaustively annotated its unmatched detections are

Classes do not meet in these definitions, so the counting library is asked about one class at a time, with only the pictures that speak
of it: the same numbers, no table of every picture by every class, and detections become Python objects one class at a time.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from crqat_fx.data.samples import EvaluationSet
from crqat_fx.detect import DetectSettings
from crqat_fx.detections import Detections, Detector
from crqat_fx.errors import UserError
from crqat_fx.progress import Progress

logger = logging.getLogger(__name__)

Metric = Literal["coco", "lvis-fixed"]

KEPT: Mapping[Metric, int] = {"coco": 300, "lvis-fixed": 1000}  # detections a picture that a detector keeps, as published
FIXED_PER_CLASS = 10_000  # detections of the whole set, for Fixed AP


@dataclass(frozen=True)
class EvaluateSettings:
    """Settings of the command `evaluate`. The defaults are the published ones."""

    metric: Metric = "coco"
    pictures: int = 500  # of the drawn task; a data.yaml names its own
    vocabulary: Path | None = None  # in place of the one that the data or the model's file brings
    conf: float = 0.001
    iou: float = 0.7
    max: int | None = None  # None takes the metric's number
    size: int = 640
    batch: int = 8
    device: str = "cpu"
    threads: int | None = None  # of the processor; None leaves the runtime's own choice
    compared: int = 512  # pictures that are compared with a teacher, as published

    def __post_init__(self) -> None:
        _ = self.detecting  # checks its values
        if self.compared < 2:
            raise UserError(f"compared is {self.compared}", remedy="give at least 2 pictures, so that they can be correlated")

    @property
    def detecting(self) -> DetectSettings:
        """How the detector is to be opened."""
        most = KEPT[self.metric] if self.max is None else self.max
        return DetectSettings(self.vocabulary, None, self.conf, self.iou, most, self.size, self.batch, self.device, self.threads)


@dataclass(frozen=True)
class Scores:
    """Means over some classes, in percent. None where no class has an object to find."""

    ap: float | None
    ap50: float | None
    ap75: float | None
    small: float | None  # AP of objects under 32 x 32 pixels of area
    medium: float | None
    large: float | None  # from 96 x 96
    ar: float | None  # average recall


@dataclass(frozen=True)
class ClassScores:
    """One category's scores, and what they rest on."""

    name: str
    scores: Scores
    objects: int
    detections: int
    frequency: str | None
    split: str | None


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found. `frequency` and `split` are empty where the set's categories do not carry them."""

    metric: Metric
    scores: Scores
    frequency: Mapping[str, Scores]
    split: Mapping[str, Scores]
    classes: tuple[ClassScores, ...]
    pictures: int
    objects: int
    detections: int
    skipped: tuple[str, ...] = ()  # pictures that could not be read; their objects are not counted

    def as_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can write."""
        return asdict(self)


def evaluate(
    detector: Detector,
    dataset: EvaluationSet,
    metric: Metric = "coco",
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Looks at every picture of the set and scores what was found. A picture that cannot be read is left out, and named in the result."""
    category_slots(detector.names, dataset.coco)  # before minutes of detecting
    _refuse_unfit_truth(dataset.coco, metric)
    found: list[Detections | None] = []
    skipped: list[str] = []
    for indices in batches(len(dataset), batch_size):
        pictures = {index: picture for index in indices if (picture := read_picture_or_skip(dataset, index)) is not None}
        skipped += [picture_name(dataset, index) for index in indices if index not in pictures]
        detections = dict(zip(pictures, detector.detect(list(pictures.values())) if pictures else [], strict=True))
        found += [detections.get(index) for index in indices]
        if progress is not None:
            progress(len(found), len(dataset), "pictures")
    return score(found, detector.names, dataset.coco, metric, skipped=tuple(skipped), progress=progress)


def score(
    detections: Sequence[Detections | None],
    names: Sequence[str],
    coco: Mapping[str, Any],
    metric: Metric = "coco",
    *,
    skipped: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> EvaluationResult:
    """Scores the detections in each of `coco["images"]`, in their order; `names` is what the labels index. None leaves a picture out."""
    _refuse_unfit_truth(coco, metric)
    if len(detections) != len(coco["images"]):
        raise ValueError(f"{len(detections)} pictures' detections for {len(coco['images'])} pictures")
    categories = coco["categories"]
    truth = _truth_table(coco, [found is not None for found in detections])
    if not len(truth.category):
        raise UserError("the pictures to be evaluated hold no annotated object", remedy="give a set with boxes")
    table = _detection_table(detections, category_slots(names, coco), [image["id"] for image in coco["images"]])
    not_exhaustive = None
    if metric == "lvis-fixed":
        table = _judged(_best_of_each_class(table, len(categories)), truth, coco)
        not_exhaustive = {image["id"]: frozenset(image["not_exhaustive_category_ids"]) for image in coco["images"]}
    per_class = []
    for index, category in enumerate(categories):
        per_class.append(_count_class(truth.of_class(index), table.of_class(index), category["id"], not_exhaustive))
        if progress is not None:
            progress(index + 1, len(categories), "classes")
    precision = np.stack([counted[0] for counted in per_class], 2)
    recall = np.stack([counted[1] for counted in per_class], 1)
    objects, found = (np.bincount(boxes.category, minlength=len(categories)) for boxes in (truth, table))
    return EvaluationResult(
        metric=metric,
        scores=_scores(precision, recall),
        frequency=_group_scores(precision, recall, categories, "frequency", ("r", "c", "f")),
        split=_group_scores(precision, recall, categories, "split", ("base", "novel")),
        classes=tuple(
            ClassScores(
                name=category["name"],
                scores=_scores(precision[:, :, [index]], recall[:, [index]]),
                objects=int(objects[index]),
                detections=int(found[index]),
                frequency=category.get("frequency"),
                split=category.get("split"),
            )
            for index, category in enumerate(categories)
        ),
        pictures=len(detections) - detections.count(None),
        objects=len(truth.category),
        detections=len(table.category),
        skipped=skipped,
    )


def category_slots(names: Sequence[str], coco: Mapping[str, Any]) -> np.ndarray:
    """For each category the index of its name among `names`."""
    slot = {name: index for index, name in enumerate(names)}
    slots = [slot.get(category["name"], -1) for category in coco["categories"]]
    missing = [category["name"] for category, index in zip(coco["categories"], slots, strict=True) if index < 0]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise UserError(
            f"the vocabulary of {len(names)} names lacks {len(missing)} of the data set's {len(slots)} categories: {shown}",
            remedy="give a vocabulary that holds them (`crqat-fx embed` makes one from a list of names)",
        )
    return np.array(slots, np.int64)


def read_picture_or_skip(dataset: EvaluationSet, index: int) -> np.ndarray | None:
    """The picture, or None and a line in the log where it is missing or broken."""
    try:
        return dataset.picture(index)
    except UserError as error:
        logger.warning("left out: %s", error)
        return None


def picture_name(dataset: EvaluationSet, index: int) -> str:
    image = dataset.coco["images"][index]
    return str(image.get("file_name", image["id"]))


def batches(count: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, count)) for first in range(0, count, size))


# --- tables of boxes ---


@dataclass(frozen=True)
class _Boxes:
    """Boxes of all pictures, sorted by category and, within one, by picture as the set lists them."""

    category: np.ndarray  # int64 [n], index into the categories
    picture: np.ndarray  # int64 [n], the picture's id
    xywh: np.ndarray  # float64 [n, 4]
    value: np.ndarray  # float64 [n]: a detection's score, an object's area
    crowd: np.ndarray  # bool [n]

    def of_class(self, index: int) -> "_Boxes":
        return self.where(slice(*np.searchsorted(self.category, [index, index + 1])))

    def where(self, rows: Any) -> "_Boxes":
        return _Boxes(self.category[rows], self.picture[rows], self.xywh[rows], self.value[rows], self.crowd[rows])


def _truth_table(coco: Mapping[str, Any], seen: Sequence[bool]) -> _Boxes:
    pictures = {image["id"] for image, was_seen in zip(coco["images"], seen, strict=True) if was_seen}
    index = {category["id"]: index for index, category in enumerate(coco["categories"])}
    rows = [annotation for annotation in coco["annotations"] if annotation["image_id"] in pictures]
    xywh = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    boxes = _Boxes(
        category=np.array([index[row["category_id"]] for row in rows], np.int64),
        picture=np.array([row["image_id"] for row in rows], np.int64),
        xywh=xywh,
        value=np.array([row.get("area", box[2] * box[3]) for row, box in zip(rows, xywh, strict=True)], np.float64),
        crowd=np.array([bool(row.get("iscrowd", 0)) for row in rows], bool),
    )
    return boxes.where(np.argsort(boxes.category, kind="stable"))


def _detection_table(detections: Sequence[Detections | None], slots: np.ndarray, pictures: Sequence[int]) -> _Boxes:
    """The detections under each category's name; a name of several categories gives them to each."""
    some = [(picture, found) for picture, found in zip(pictures, detections, strict=True) if found is not None and len(found)]
    if not some:
        return _Boxes(*(np.zeros(shape, kind) for shape, kind in ((0, int), (0, int), ((0, 4), float), (0, float), (0, bool))))
    labels = np.concatenate([found.labels for _, found in some])
    by_label = np.argsort(labels, kind="stable")
    starts, stops = (np.searchsorted(labels, slots, side, sorter=by_label) for side in ("left", "right"))
    rows = np.concatenate([by_label[start:stop] for start, stop in zip(starts, stops, strict=True)])
    xyxy = np.concatenate([found.boxes for _, found in some])[rows].astype(np.float64)
    return _Boxes(
        category=np.repeat(np.arange(len(slots)), stops - starts),
        picture=np.repeat([picture for picture, _ in some], [len(found) for _, found in some])[rows],
        xywh=np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], 1),
        value=np.concatenate([found.scores for _, found in some])[rows].astype(np.float64),
        crowd=np.zeros(len(rows), bool),
    )


# --- what is particular to LVIS ---


def _refuse_unfit_truth(coco: Mapping[str, Any], metric: Metric) -> None:
    if metric not in get_args(Metric):
        raise UserError(f"unknown metric {metric!r}", remedy=f"choose one of {', '.join(get_args(Metric))}")
    if not coco["images"] or not coco["categories"]:
        raise UserError("the data set has no pictures or no categories", remedy="give a set with both")
    if metric == "coco":
        return
    if not all("neg_category_ids" in image and "not_exhaustive_category_ids" in image for image in coco["images"]):
        raise UserError(
            "lvis-fixed reads neg_category_ids and not_exhaustive_category_ids of every picture, and this set lacks them",
            remedy="give LVIS v1 annotations, or --metric coco for a set that is annotated exhaustively",
        )


def _best_of_each_class(table: _Boxes, classes: int) -> _Boxes:
    """Each class's best detections of the whole set, in the order they stood in. Of equal scores the earlier picture's stays."""
    keep = np.ones(len(table.category), bool)
    starts = np.searchsorted(table.category, np.arange(classes + 1))
    for start, stop in itertools.pairwise(starts.tolist()):
        if stop - start > FIXED_PER_CLASS:
            worst = np.argsort(-table.value[start:stop], kind="stable")[FIXED_PER_CLASS:]
            keep[start + worst] = False
    return table.where(keep)


def _judged(table: _Boxes, truth: _Boxes, coco: Mapping[str, Any]) -> _Boxes:
    """The detections in pictures whose annotators looked for their class, so that the rest never become Python objects."""
    index = {category["id"]: index for index, category in enumerate(coco["categories"])}
    absent = [(image["id"], index[category]) for image in coco["images"] for category in image["neg_category_ids"] if category in index]
    negative = np.array(absent, np.int64).reshape(-1, 2)
    picture = np.concatenate([truth.picture, negative[:, 0], table.picture])
    category = np.concatenate([truth.category, negative[:, 1], table.category])
    pair = np.unique(picture, return_inverse=True)[1] * len(index) + category
    looked_for, detected = np.split(pair, [len(pair) - len(table.category)])
    return table.where(np.isin(detected, looked_for))


# --- counting ---


def _count_class(
    truth: _Boxes, table: _Boxes, category: int, not_exhaustive: Mapping[int, frozenset[int]] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Precision [10 IoUs, 101 recalls, 4 areas] and recall [10 IoUs, 4 areas] of one class; -1 where there is nothing to find.

    `not_exhaustive` makes it LVIS: each picture's classes whose unmatched detections say nothing.
    """
    pictures: list[dict[str, Any]] = [{"id": picture} for picture in np.union1d(truth.picture, table.picture).tolist()]
    categories = [{"id": 1, "frequency": "f"}]  # the library asks for one; frequencies are averaged here
    if not_exhaustive is not None:
        for picture in pictures:
            picture["neg_category_ids"] = [1]  # what is left by `_judged` counts
            picture["not_exhaustive_category_ids"] = [1] if category in not_exhaustive[picture["id"]] else []
    objects = [
        {"id": row, "image_id": picture, "category_id": 1, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for row, (picture, box, area, crowd) in enumerate(_rows(truth), 1)
    ]
    found = [
        {"id": row, "image_id": picture, "category_id": 1, "bbox": box, "area": box[2] * box[3], "score": value}
        for row, (picture, box, value, _) in enumerate(_rows(table), 1)
    ]
    counter = COCOeval_faster(
        COCO({"images": pictures, "categories": categories, "annotations": objects}),
        COCO({"images": pictures, "categories": categories, "annotations": found}),
        iouType="bbox",
        print_function=logger.debug,
        lvis_style=not_exhaustive is not None,
    )
    if not_exhaustive is not None:
        counter.params.maxDets = [max(len(found), 1)]
    counter.evaluate()
    counter.accumulate()
    return counter.eval["precision"][:, :, 0, :, -1], counter.eval["recall"][:, 0, :, -1]


def _rows(boxes: _Boxes) -> Iterator[tuple[int, list[float], float, bool]]:
    return zip(boxes.picture.tolist(), boxes.xywh.tolist(), boxes.value.tolist(), boxes.crowd.tolist(), strict=True)


def _scores(precision: np.ndarray, recall: np.ndarray) -> Scores:
    everything, small, medium, large = (precision[..., area] for area in range(4))
    return Scores(
        ap=_percent(everything),
        ap50=_percent(everything[0]),
        ap75=_percent(everything[5]),
        small=_percent(small),
        medium=_percent(medium),
        large=_percent(large),
        ar=_percent(recall[..., 0]),
    )


def _percent(values: np.ndarray) -> float | None:
    counted = values[values > -1]
    return float(counted.mean()) * 100 if counted.size else None


def _group_scores(
    precision: np.ndarray, recall: np.ndarray, categories: Sequence[Mapping[str, Any]], key: str, order: Sequence[str]
) -> dict[str, Scores]:
    """The scores of the classes that share a value of `key`, the known values first and in their order."""
    values = [category.get(key) for category in categories]
    present = {value for value in values if value is not None}
    groups = [value for value in order if value in present] + sorted(present - set(order))
    return {
        group: _scores(precision[:, :, chosen], recall[:, chosen])
        for group in groups
        if (chosen := [index for index, value in enumerate(values) if value == group])
    }
