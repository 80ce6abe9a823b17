"""What a study of one or several models found, as data: written to JSON and read back, so that a report can be drawn again at any time.

Whatever was not measured is None, and `missing` of the model says why and what to do about it, by section.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from crqat_fx.bench import Operators, Spread
from crqat_fx.json_form import load_json, save_json
from crqat_fx.verify import Verification

FORMAT = "crqat-fx study 1"
GROUPS = {"all": "all", "base": "base", "novel": "novel", "r": "rare", "c": "common", "f": "frequent"}  # of AP, and what they are called
RELATIONS = ("region_text", "region_region")

Section = Literal["accuracy", "speed", "drift", "training", "quantization", "integers", "ladder"]
BoxPixels = tuple[float, float, float, float]  # xyxy


@dataclass(frozen=True)
class Accuracy:
    """AP in percent, by group: those of `GROUPS` that the set has."""

    engine: Literal["torch", "onnxruntime"]
    pictures: int
    objects: int
    ap: Mapping[str, float | None]


@dataclass(frozen=True)
class Counted:
    """Counted on the graph: as an export runs it, and by the published convention."""

    macs: int
    size_mib: float
    bops_t: float
    published_size_mib: float
    published_bops_t: float


@dataclass(frozen=True)
class Speed:
    """Of the exported file in onnxruntime. `ratio`: times as fast as the first model's file."""

    milliseconds: Spread
    ratio: Spread
    bytes: int


@dataclass(frozen=True)
class Relation:
    """Mean absolute errors of one kind of relation against the first model, a value a picture; None for a picture without any."""

    embedding: tuple[float | None, ...]
    confidence: tuple[float | None, ...]
    mean_embedding: float | None
    mean_confidence: float | None
    pearson: float | None


@dataclass(frozen=True)
class Drift:
    """How far the regions of a model stand from those of the first."""

    anchors: int
    region_text: Relation
    region_region: Relation
    heat: tuple[tuple[float | None, ...], ...]  # of every heat picture, a value an anchor


@dataclass(frozen=True)
class Picture:
    """`jpeg` is base64. The boxes are the annotated objects."""

    name: str
    width: int
    height: int
    jpeg: str
    boxes: tuple[BoxPixels, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class HeatPicture:
    """A picture as models see it, with the first model's anchors: each one's mean similarity to the others of its class."""

    picture: Picture
    points: tuple[tuple[float, float], ...]
    strides: tuple[float, ...]
    teacher: tuple[float | None, ...]


@dataclass(frozen=True)
class Found:
    """What a model found on one of the shown pictures, best first."""

    boxes: tuple[BoxPixels, ...]
    scores: tuple[float, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """One of the models compared, and what was found of it."""

    label: str
    file: str
    kind: Literal["float", "quantized"]
    recipe: str | None = None  # as it is called, or where it stands
    target: str | None = None
    weights: str = "only"  # of a trained one: average or raw
    accuracy: Accuracy | None = None
    counted: Counted | None = None
    speed: Speed | None = None
    drift: Drift | None = None
    found: tuple[Found, ...] = ()  # one for each shown picture
    integers: Operators | None = None
    ladder: Verification | None = None
    missing: Mapping[Section, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """The first model is what the others are compared with."""

    title: str
    data: str
    size: int
    names: int  # of the vocabulary
    models: tuple[Model, ...]
    shown: tuple[Picture, ...] = ()
    heat: tuple[HeatPicture, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    format: str = FORMAT

    def save(self, path: str | Path) -> None:
        save_json(self, path)


def load_study(path: str | Path) -> Study:
    """A study that was saved."""
    return load_json(Study, path)


def closing_table(study: Study) -> tuple[list[str], list[list[str | float | None]]]:
    """Its head, and a row a model: AP of every group, size, bit operations, how many times as fast as the first, both distortions."""
    groups = list(dict.fromkeys(group for model in study.models if model.accuracy for group in model.accuracy.ap))
    head = [
        "model",
        *(f"AP {GROUPS.get(group, group)}" for group in groups),
        "MiB",
        "GBOPs",
        "times as fast",
        "region-text",
        "region-region",
    ]
    rows: list[list[str | float | None]] = []
    for model in study.models:
        ap = model.accuracy.ap if model.accuracy else {}
        cost = model.counted
        row: list[str | float | None] = [model.label, *(ap.get(group) for group in groups)]
        row += [None, None] if cost is None else [cost.size_mib, cost.bops_t * 1e3]
        row.append(None if model.speed is None else model.speed.ratio.median)
        row += [getattr(model.drift, name).mean_embedding if model.drift else None for name in RELATIONS]
        rows.append(row)
    return head, rows
