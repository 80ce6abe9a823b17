"""What a study of one or several models found, as data: written to JSON and read back, so that a report can be drawn again at any time.

Whatever was not measured is None, and `missing` of the model says why and what to do about it, by section.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from crqat_fx.bench import Operators, Spread
from crqat_fx.evaluate import Metric
from crqat_fx.graph_picture import Face
from crqat_fx.json_form import load_json, save_json
from crqat_fx.prepared_inspection import BlockFacts, QuantizerFacts
from crqat_fx.verify import Verification

STUDY = "study.json"  # as it is called where it lies beside its report
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

    def check(self, pictures: "Sequence[HeatPicture]") -> None:
        """ValueError where its values are of other pictures."""
        if [len(each) for each in self.heat] != [len(each.points) for each in pictures]:
            raise ValueError("similarities of other anchors than those of the heat pictures")


@dataclass(frozen=True)
class Quantization:
    """What the quantizers of a model do to its tensors, measured on some pictures; in the order of the data."""

    pictures: int
    quantizers: tuple[QuantizerFacts, ...]
    blocks: tuple[BlockFacts, ...]


@dataclass(frozen=True)
class Edge:
    """One box of a graph reads another one, both by their place, in these bits; 32 is float."""

    source: int
    reader: int
    bits: tuple[int, ...]


@dataclass(frozen=True)
class StageGraph:
    """The blocks of a model's graph, each in its stage, and who reads whom."""

    label: str  # the model's
    boxes: tuple[Face, ...]
    edges: tuple[Edge, ...]
    quantized: bool

    def __post_init__(self) -> None:
        if not self.boxes or any(box.leads_to is not None for box in self.boxes):
            raise ValueError("the graph has no box, or one that leads out of it")
        for edge in self.edges:
            if not {edge.source, edge.reader} <= set(range(len(self.boxes))) or edge.source == edge.reader:
                raise ValueError(f"the graph has no box {edge.source} that a box {edge.reader} could read")


@dataclass(frozen=True)
class Curve:
    """A value at some of a training's steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise ValueError(f"a curve has {len(self.values)} values for {len(self.steps)} steps")


@dataclass(frozen=True)
class TrainingPhase:
    """From one step to another; which stages were quantized and trained, and on what losses."""

    first: int
    last: int
    quantized: tuple[str, ...]
    trained: tuple[str, ...]
    losses: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise ValueError(f"a phase goes from step {self.first} to {self.last}")


@dataclass(frozen=True)
class Training:
    """How a model was trained: what the run's log says, by what the log calls it, and what was watched of its quantizers."""

    method: str
    teacher: str | None
    planned: int  # steps
    phases: tuple[TrainingPhase, ...]
    log: Mapping[str, Curve]
    watched: Mapping[str, Curve]  # means over quantizers: clipped and flipped shares


@dataclass(frozen=True)
class Picture:
    """`jpeg` is base64. The boxes are the annotated objects."""

    name: str
    width: int
    height: int
    jpeg: str
    boxes: tuple[BoxPixels, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 1 or len(self.boxes) != len(self.names):
            raise ValueError(f"the picture {self.name[:40]!r} has no size, or not a name for every box")


@dataclass(frozen=True)
class HeatPicture:
    """A picture as models see it, with the first model's anchors: each one's mean similarity to the others of its class."""

    picture: Picture
    points: tuple[tuple[float, float], ...]
    strides: tuple[float, ...]
    teacher: tuple[float | None, ...]

    def __post_init__(self) -> None:
        if not len(self.points) == len(self.strides) == len(self.teacher):
            raise ValueError(f"the heat picture {self.picture.name[:40]!r} has not a stride and a value for every point")


@dataclass(frozen=True)
class Found:
    """What a model found on one of the shown pictures, best first."""

    boxes: tuple[BoxPixels, ...]
    scores: tuple[float, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.boxes) == len(self.scores) == len(self.names):
            raise ValueError("a list of boxes has not a score and a name for every one")


@dataclass(frozen=True)
class Model:
    """One of the models compared, and what was found of it."""

    label: str
    file: str
    kind: Literal["float", "quantized"]
    recipe: str | None = None  # as it is called; None is float, or a recipe of its own
    target: str | None = None
    weights: str = "only"  # of a trained one: average or raw
    accuracy: Accuracy | None = None
    counted: Counted | None = None
    speed: Speed | None = None
    drift: Drift | None = None
    training: Training | None = None
    quantization: Quantization | None = None
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
    metric: Metric
    models: tuple[Model, ...]
    shown: tuple[Picture, ...] = ()
    heat: tuple[HeatPicture, ...] = ()
    graph: StageGraph | None = None
    threads: int = 1  # that speed was measured with
    machine: Mapping[str, str] = field(default_factory=dict)
    conf: float = 0.3  # lowest score of what is shown
    format: Literal["crqat-fx study 1"] = "crqat-fx study 1"

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("it has no model")
        for model in self.models:
            if len(model.found) != len(self.shown):
                raise ValueError(f"{model.label[:40]!r} has {len(model.found)} lists of boxes for {len(self.shown)} pictures")
            if model.drift is not None:
                model.drift.check(self.heat)

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


def told(figure: str, value: str | float | None) -> str:
    """A value of the closing table as text, with the digits that its column bears."""
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    if figure.startswith("AP"):
        return f"{value:.1f}"
    if figure.startswith("region"):
        return f"{value:.4f}"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def turned_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """The closing table as a terminal has room for it: a row a figure, a column a model."""
    head, rows = closing_table(study)
    # a terminal breaks lines at blanks
    figures = [[name.replace("-", " "), *(told(name, row[place]) for row in rows)] for place, name in enumerate(head)]
    return ["", *figures[0][1:]], figures[1:]
