"""How far a model's regions drift from its teacher's, measured as in CR-QAT.

At the positions that the teacher's task-aligned assignment gives to a text c of a picture, the same for both models:

    embedding space     M_c = [t_c; r_1; ...; r_n], rows L2-normalised, S_c = M_c M_c^T
    confidence space    p_i = sigmoid(logits at position i) over all texts; S_c[0, i] = p_i[c], S_c[i, j] = cos(p_i, p_j)

    region-text distortion      mean |S_c(student) - S_c(teacher)| over the first row, without its corner
    region-region distortion    the same over the rest, without its diagonal

Each is a mean over the texts of a picture, then over pictures; Pearson's r over pictures tells how far confidences follow embeddings.
A region is the model's `regions` output: what meets the text, so in v2 after the head's BatchNorm. A text with a single position has no
region-region relation.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crqat_fx.assign import assign
from crqat_fx.data.batch import Batch, collate
from crqat_fx.data.samples import EvaluationSet, Sample
from crqat_fx.errors import UserError
from crqat_fx.evaluate import EvaluateSettings, batches, category_slots, picture_name, read_picture_or_skip
from crqat_fx.models.yolo_world import anchor_points, decode_boxes, flatten_levels
from crqat_fx.pictures import letterbox
from crqat_fx.progress import Progress
from crqat_fx.vocabulary import Vocabulary

EXAMPLES = 4  # pictures kept to be drawn
BINS = 100  # of a histogram
RANGES = {"embedding": (-1.0, 1.0), "confidence": (0.0, 1.0)}  # of what is measured in a space
SPACES = tuple(RANGES)


@dataclass(frozen=True)
class Distortion:
    """Mean absolute errors of one kind of relation, a value a picture; NaN for a picture without such a relation."""

    embedding: np.ndarray  # float64 [pictures]
    confidence: np.ndarray  # float64 [pictures]

    @property
    def pearson(self) -> float:
        """Of the two spaces over the pictures."""
        return pearson(self.embedding, self.confidence)

    def as_dict(self) -> dict[str, float | None]:
        values = {"embedding": _mean(self.embedding), "confidence": _mean(self.confidence), "pearson": self.pearson}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass(frozen=True)
class Histogram:
    """How the relations of one kind are distributed in both models, over all pictures."""

    edges: np.ndarray  # float64 [bins + 1]
    teacher: np.ndarray  # int64 [bins]
    student: np.ndarray  # int64 [bins]


@dataclass(frozen=True)
class Example:
    """A picture with its anchors, each with its mean cosine similarity to the other anchors of its class."""

    name: str
    picture: np.ndarray  # uint8 [H, W, 3], RGB, as the models saw it
    boxes: np.ndarray  # float32 [g, 4], the truth, xyxy
    names: tuple[str, ...]  # [g]
    points: np.ndarray  # float32 [n, 2], the anchors' centres
    strides: np.ndarray  # float32 [n]
    teacher: np.ndarray  # float32 [n]
    student: np.ndarray  # float32 [n]


@dataclass(frozen=True)
class DistortionResult:
    """What a comparison found. The pictures are those with at least one anchor."""

    pictures: tuple[str, ...]
    anchors: int
    region_text: Distortion
    region_region: Distortion
    histograms: dict[str, dict[str, Histogram]]  # "region_text" | "region_region" -> "embedding" | "confidence"
    examples: tuple[Example, ...]
    skipped: tuple[str, ...] = ()  # pictures that could not be read

    def as_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can write."""
        columns = {f"{kind}_{space}": getattr(getattr(self, kind), space).tolist() for kind, space in itertools.product(KINDS, SPACES)}
        return {
            "pictures": len(self.pictures),
            "anchors": self.anchors,
            "region_text": self.region_text.as_dict(),
            "region_region": self.region_region.as_dict(),
            "skipped": list(self.skipped),
            "per_picture": [
                {"picture": name, **{key: None if math.isnan(values[row]) else values[row] for key, values in columns.items()}}
                for row, name in enumerate(self.pictures)
            ],
        }


# --- relations ---


def embedding_relations(text: Tensor, regions: Tensor) -> Tensor:
    """Cosine similarities [n+1, n+1] of a text [D] and the regions [n, D] given to it, the text first."""
    rows = F.normalize(torch.cat([text.unsqueeze(0), regions]).float(), dim=1)
    return rows @ rows.T


def confidence_relations(scores: Tensor, slot: int) -> Tensor:
    """The relations [n+1, n+1] of positions in terms of their scores [n, N]: the score of text `slot`, and cosine similarities."""
    rows = F.normalize(scores.float(), dim=1)
    relations = scores.new_ones(len(scores) + 1, len(scores) + 1, dtype=torch.float32)
    relations[1:, 1:] = rows @ rows.T
    relations[0, 1:] = relations[1:, 0] = scores[:, slot].float()
    return relations


def region_text(relations: Tensor) -> Tensor:
    """The region-text entries [n] of [n+1, n+1] relations."""
    return relations[0, 1:]


def region_region(relations: Tensor) -> Tensor:
    """The region-region entries [n (n-1) / 2] of [n+1, n+1] relations, each pair once."""
    count = len(relations) - 1
    row, column = torch.triu_indices(count, count, 1, device=relations.device)
    return relations[1:, 1:][row, column]


def mean_to_others(relations: Tensor) -> Tensor:
    """For each region of [n+1, n+1] relations the mean similarity to the others [n]; NaN where it is alone."""
    pairs = relations[1:, 1:]
    return (pairs.sum(1) - pairs.diagonal()) / (len(pairs) - 1)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r of the places where both are numbers; NaN where it is not defined."""
    known = ~(np.isnan(x) | np.isnan(y))
    if known.sum() < 2:
        return math.nan
    x, y = x[known] - x[known].mean(), y[known] - y[known].mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan


KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {"region_text": region_text, "region_region": region_region}


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


# --- measurement ---


def distortion(
    student: nn.Module,
    teacher: nn.Module,
    dataset: EvaluationSet,
    vocabulary: Vocabulary,
    *,
    size: int = 640,
    limit: int = EvaluateSettings.compared,
    batch_size: int = 8,
    examples: int = EXAMPLES,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> DistortionResult:
    """Compares two models of YOLO-World's contract, both in evaluation mode and on `device`, on the set's first `limit` pictures. The texts
    are all of the set's categories."""
    for name, model in (("student", student), ("teacher", teacher)):
        if model.training:
            raise ValueError(f"the {name} is in training mode: call eval() first")
        refuse_other_width(name, model, vocabulary)
    embeddings = vocabulary.embeddings[category_slots(vocabulary.names, dataset.coco)]
    truths = _Truths(dataset)
    measurement = _Measurement(examples)
    total = min(limit, len(dataset))
    for indices in batches(total, batch_size):
        names, samples = [], []
        for index in indices:
            picture = read_picture_or_skip(dataset, index)
            if picture is None:
                measurement.skipped.append(picture_name(dataset, index))
                continue
            names.append(picture_name(dataset, index))
            samples.append(truths.sample(index, picture, size))
        if samples:
            batch = collate(samples, [embeddings] * len(samples)).to(device)
            _compare(student, teacher, batch, names, samples, measurement)
        if progress is not None:
            progress(indices.stop, total, "pictures")
    return measurement.result()


def refuse_other_width(name: str, model: nn.Module, vocabulary: Vocabulary) -> None:
    """Raises where the model called `name` says in its `config` that it takes texts of another width than the vocabulary's."""
    width = getattr(getattr(model, "config", None), "text_width", vocabulary.width)
    if width != vocabulary.width:
        raise UserError(
            f"the {name} takes texts {width} wide, the vocabulary's are {vocabulary.width} wide",
            remedy="compare models of one text encoder, with its vocabulary",
        )


class _Truths:
    """The annotated objects of a set, picture by picture. A crowd is no object and stays out."""

    def __init__(self, dataset: EvaluationSet) -> None:
        self.ids = [image["id"] for image in dataset.coco["images"]]
        self.texts = tuple(category["name"] for category in dataset.coco["categories"])
        self.slots = {category["id"]: slot for slot, category in enumerate(dataset.coco["categories"])}
        self.objects: dict[int, list[dict[str, Any]]] = {}
        for annotation in dataset.coco["annotations"]:
            if not annotation.get("iscrowd", 0):
                self.objects.setdefault(annotation["image_id"], []).append(annotation)

    def sample(self, index: int, picture: np.ndarray, size: int) -> Sample:
        """The picture and its objects as the models see them."""
        canvas, placement = letterbox(picture, size)
        objects = self.objects.get(self.ids[index], [])
        boxes = np.array([item["bbox"] for item in objects], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes *= np.array((placement.scale_x, placement.scale_y) * 2, np.float32)
        boxes += np.array((placement.left, placement.top) * 2, np.float32)
        return Sample(canvas, boxes, np.array([self.slots[item["category_id"]] for item in objects], np.int64), self.texts)


class _Measurement:
    """What has been measured so far."""

    def __init__(self, examples: int) -> None:
        self.wanted_examples = examples
        self.names: list[str] = []
        self.skipped: list[str] = []
        self.examples: list[Example] = []
        self.anchors = 0
        self.errors: dict[tuple[str, str], list[float]] = {key: [] for key in itertools.product(KINDS, SPACES)}
        self.counts = {key: np.zeros((2, BINS), np.int64) for key in self.errors}

    def add_picture(self, name: str, relations: Mapping[str, Sequence[tuple[Tensor, ...]]]) -> None:
        """`relations` holds for each space the pair of the teacher's and the student's, for every text of the picture."""
        self.names.append(name)
        self.anchors += sum(len(of_teacher) - 1 for of_teacher, _ in relations["embedding"])
        for (kind, space), errors in self.errors.items():
            read = KINDS[kind]
            pairs = [(read(of_teacher), read(of_student)) for of_teacher, of_student in relations[space]]
            means = [float((of_student - of_teacher).abs().mean()) for of_teacher, of_student in pairs if len(of_teacher)]
            if not all(math.isfinite(mean) for mean in means):
                raise UserError(
                    f"a model's {space} relations are not numbers", where=name, remedy="check the checkpoint and what was done to it"
                )
            errors.append(sum(means) / len(means) if means else math.nan)
            for row, values in enumerate(zip(*pairs, strict=True)):
                self.counts[kind, space][row] += np.histogram(torch.cat(values).clamp(*RANGES[space]).cpu().numpy(), BINS, RANGES[space])[0]

    def result(self) -> DistortionResult:
        if not self.names:
            raise UserError("no picture gives the teacher a position to compare", remedy="give a set with annotated objects")
        return DistortionResult(
            pictures=tuple(self.names),
            anchors=self.anchors,
            region_text=self._distortion("region_text"),
            region_region=self._distortion("region_region"),
            histograms={
                kind: {space: Histogram(np.linspace(*RANGES[space], BINS + 1), *self.counts[kind, space]) for space in SPACES}
                for kind in KINDS
            },
            examples=tuple(self.examples),
            skipped=tuple(self.skipped),
        )

    def _distortion(self, kind: str) -> Distortion:
        return Distortion(**{space: np.array(self.errors[kind, space]) for space in SPACES})


@torch.no_grad()
def _compare(
    student: nn.Module, teacher: nn.Module, batch: Batch, names: Sequence[str], samples: Sequence[Sample], measurement: _Measurement
) -> None:
    """Runs both models on a batch and measures its pictures that have an anchor."""
    images = batch.images.float() / 255
    levels, bins, regions = teacher(images, batch.text)
    points, strides = anchor_points(levels)
    logits = flatten_levels(levels).float()
    assignment = assign(logits.sigmoid(), decode_boxes(bins), points, batch.truth)
    other_levels, _, other_regions = student(images, batch.text)
    other_logits = flatten_levels(other_levels).float()
    regions, other_regions = flatten_levels(regions), flatten_levels(other_regions)
    for row, (name, sample) in enumerate(zip(names, samples, strict=True)):
        positions = assignment.positive[row].nonzero().squeeze(1)
        if not len(positions):
            continue
        labels = assignment.labels[row, positions]
        order = labels.argsort(stable=True)  # anchors class by class
        positions, labels = positions[order], labels[order]
        slots, counts = labels.unique_consecutive(return_counts=True)
        embedding, confidence = [], []
        for slot, chosen in zip(slots.tolist(), positions.split(counts.tolist()), strict=True):
            text = batch.text[row, slot]
            embedding.append(tuple(embedding_relations(text, of_model[row, chosen]) for of_model in (regions, other_regions)))
            confidence.append(tuple(confidence_relations(of_model[row, chosen].sigmoid(), slot) for of_model in (logits, other_logits)))
        measurement.add_picture(name, {"embedding": embedding, "confidence": confidence})
        if len(measurement.examples) < measurement.wanted_examples and int(counts.max()) > 1:
            of_teacher, of_student = (torch.cat([mean_to_others(pair[model]) for pair in embedding]).cpu().numpy() for model in (0, 1))
            measurement.examples.append(
                Example(
                    name=name,
                    picture=sample.image,
                    boxes=sample.boxes,
                    names=tuple(sample.texts[label] for label in sample.labels),
                    points=points[positions].cpu().numpy(),
                    strides=strides[positions].cpu().numpy(),
                    teacher=of_teacher,
                    student=of_student,
                )
            )
