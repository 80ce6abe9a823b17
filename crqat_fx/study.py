"""A study: several forms of one model measured alike, side by side: its float checkpoint, what was prepared of it, what was trained.

of models            AP by group, what it costs (counted), drift from the first, detections on a few pictures, what each quantizer does
of a training        loss and AP over its steps, from its log
of exported files    AP again, speed against each other, integer coverage, time by operator, the verification ladder
"""

import base64
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch import nn

from crqat_fx.bench import BenchSettings, bench, machine, operators_of
from crqat_fx.checkpoint import Checkpoint, model_of
from crqat_fx.cost import Measurement, measure, price
from crqat_fx.data.opening import SHAPES, open_evaluation, size_of_data
from crqat_fx.data.samples import EvaluationSet, FirstPictures
from crqat_fx.detections import Detector
from crqat_fx.distortion import Distortion, distortion
from crqat_fx.errors import UserError
from crqat_fx.evaluate import KEPT, EvaluateSettings, Metric, evaluate, picture_name, read_picture_or_skip
from crqat_fx.findings import (
    Accuracy,
    BoxPixels,
    Counted,
    Drift,
    Edge,
    Found,
    HeatPicture,
    Model,
    Picture,
    Quantization,
    Relation,
    Section,
    Speed,
    StageGraph,
    Study,
    Training,
)
from crqat_fx.graph_picture import blocks_of_view
from crqat_fx.graph_view import view
from crqat_fx.model_files import read_model
from crqat_fx.models.yolo_world import YoloWorld, YoloWorldConfig
from crqat_fx.noise import measure_noise
from crqat_fx.onnx_detector import OnnxDetector
from crqat_fx.pipelines import prepare_passes
from crqat_fx.prepared_inspection import inspect_prepared
from crqat_fx.progress import Progress
from crqat_fx.quantize.calibrate import picture_batches
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.recipe import name_of
from crqat_fx.run_history import training_of
from crqat_fx.torch_detector import TorchDetector, carried_settings
from crqat_fx.trace import trace
from crqat_fx.verify import verify_file
from crqat_fx.vocabulary import Vocabulary

JPEG_QUALITY = 88
LONGEST = 640  # pixels of a shown picture's longer side


@dataclass(frozen=True)
class Contender:
    """A model to be studied. `exported`: the .onnx that was exported of it with the vocabulary of the data, for what is measured of files.
    `raw`: of a trained one the raw weights. `run`: the folder of the training that it came out of."""

    label: str
    model: str  # a checkpoint, a shipped model's name, a prepared or a trained model
    exported: Path | None = None
    raw: bool = False
    run: Path | None = None


@dataclass(frozen=True)
class StudySettings:
    """How much is measured."""

    metric: Metric = "coco"
    pictures: int | None = None  # that AP is measured on; None: all of a set, 500 of the drawn task; 0: no AP
    engine: Literal["file", "torch"] = "file"  # that AP is measured in: onnxruntime where there is an exported file
    compared: int = 64  # pictures that drift is measured on; 0: none
    noise: int = 4  # pictures that quantizers are watched on; 0: none
    shown: int = 4  # pictures with boxes
    conf: float = 0.3  # lowest score that is shown
    verified: int = 1  # pictures of the ladder; 0: none
    rounds: int = 15  # of the bench; 0: no speed
    operators: int = 10  # runs that the time by operator is taken from; 0: neither that nor integer coverage
    batch: int = 8
    threads: int = 1  # of the bench
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {"pictures": 0, "compared": 0, "noise": 0, "shown": 0, "verified": 0, "rounds": 0, "operators": 0, "batch": 1, "threads": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"{name} is {value}", where=f"--{name}", remedy=f"give a number from {lowest}")
        if self.compared == 1:
            raise UserError("compared is 1", where="--compared", remedy="give at least 2 pictures, so that they can be correlated, or 0")
        if not 0 <= self.conf <= 1:
            raise UserError(f"conf is {self.conf}", where="--conf", remedy="give a number from 0 to 1")


USUAL = StudySettings()


def study(
    contenders: Sequence[Contender], data: str, settings: StudySettings = USUAL, *, title: str = "", progress: Progress | None = None
) -> Study:
    """Measures the contenders on `data`, a data.yaml or `shapes`. The first is a float model, which the others are compared with."""
    if not contenders:
        raise UserError("no model to study", remedy="name one or more")
    first = _open(contenders[0])
    if first.prepared is not None:
        raise UserError("is prepared: the others are compared with a float model", where=contenders[0].model, remedy="name a checkpoint")
    opened = [first, *(_open(each) for each in contenders[1:])]
    size = next((each.size for each in reversed(opened) if each.size is not None), size_of_data(data).get("size", 640))
    scored = settings.pictures or EvaluateSettings.pictures  # of the drawn task, which has as many pictures as it is asked for
    dataset, texts = open_evaluation(data, size, max(scored, settings.compared, settings.shown, settings.noise, settings.verified))
    vocabulary = texts or next((each.vocabulary for each in reversed(opened) if each.vocabulary is not None), None)
    if vocabulary is None:
        raise UserError("brings no vocabulary, nor does a model", where=data, remedy="name one in the data.yaml")
    for each in opened:
        vocabulary.check_width(each.config.text_width, each.contender.model)
        if each.prepared is not None:
            each.prepared.vocabulary = vocabulary
    task = _Task(
        dataset,
        dataset if settings.pictures is None and data != SHAPES else FirstPictures(dataset, scored),
        vocabulary,
        size,
        settings,
        progress,
    )
    models, heat = [], tuple[HeatPicture, ...]()
    for each in opened:
        found, pictures = _measured(each, first, task)
        models.append(found)
        heat = heat or pictures
    return Study(
        title=title,
        data=data,
        size=size,
        names=len(vocabulary),
        metric=settings.metric,
        models=tuple(_timed(contenders, models, task)),
        shown=tuple(task.shown_picture(index) for index in task.shown),
        heat=heat,
        graph=_stage_graph(opened[-1], models[-1]),
        conf=settings.conf,
        threads=settings.threads,
        machine=machine(),
    )


@dataclass(frozen=True)
class _Opened:
    """A contender with what is in its file."""

    contender: Contender
    prepared: Prepared | None
    module: nn.Module
    config: YoloWorldConfig
    vocabulary: Vocabulary | None
    size: int | None


def _open(contender: Contender) -> _Opened:
    source = read_model(contender.model, raw=contender.raw)
    if isinstance(source, Checkpoint):
        return _Opened(contender, None, model_of(source).eval(), source.config, source.vocabulary, carried_settings(source).get("size"))
    if not source.calibrated or source.config is None:
        raise UserError("its quantizers have no ranges", where=contender.model, remedy="prepare it again with --calibrate")
    return _Opened(contender, source, source.graph.eval(), source.config, source.vocabulary, source.size)


class _Task:
    """What all contenders are measured on, and how."""

    def __init__(
        self,
        dataset: EvaluationSet,
        scored: EvaluationSet,
        vocabulary: Vocabulary,
        size: int,
        settings: StudySettings,
        progress: Progress | None,
    ) -> None:
        self.dataset, self.scored = dataset, scored  # whole; what AP is measured on
        self.vocabulary, self.size, self.settings = vocabulary, size, settings
        self.progress = progress
        readable = (index for index in range(len(dataset)) if read_picture_or_skip(dataset, index) is not None)
        self.shown = tuple(itertools.islice(readable, settings.shown))
        self.counted: dict[YoloWorldConfig, Measurement] = {}

    def tell(self, what: str) -> Progress:
        """Progress of one deed."""

        def report(done: int, total: int, at: str) -> None:
            if self.progress is not None:
                self.progress(done, total, f"{what}: {at}")

        return report

    def detector(self, opened: _Opened, conf: float = EvaluateSettings.conf) -> Detector:
        settings = self.settings
        if settings.engine == "file" and opened.contender.exported is not None:
            return OnnxDetector(opened.contender.exported, None, self.size, conf, max_detections=KEPT[settings.metric])
        return TorchDetector(opened.module, self.vocabulary, self.size, conf, max_detections=KEPT[settings.metric], device=settings.device)

    def measurement(self, config: YoloWorldConfig) -> Measurement:
        if config not in self.counted:
            with torch.device("meta"):
                self.counted[config] = measure(YoloWorld(config), len(self.vocabulary), self.size)
        return self.counted[config]

    def pictures(self, count: int) -> Iterator[np.ndarray]:
        """The first readable ones."""
        found = (read_picture_or_skip(self.dataset, index) for index in range(len(self.dataset)))
        return itertools.islice((each for each in found if each is not None), count)

    def shown_picture(self, index: int) -> Picture:
        coco = self.dataset.coco
        names = {category["id"]: category["name"] for category in coco["categories"]}
        own = [each for each in coco["annotations"] if each["image_id"] == coco["images"][index]["id"] and not each.get("iscrowd", 0)]
        boxes = np.array([each["bbox"] for each in own], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return _picture(
            picture_name(self.dataset, index), self.dataset.picture(index), boxes, tuple(names[each["category_id"]] for each in own)
        )


def _measured(opened: _Opened, first: _Opened, task: _Task) -> tuple[Model, tuple[HeatPicture, ...]]:
    """What is measured of one contender alone, or against the first; and the heat pictures, of a contender that is not the first."""
    contender, prepared = opened.contender, opened.prepared
    missing: dict[Section, str] = {}
    drift, heat = None, tuple[HeatPicture, ...]()
    if opened is first:
        missing["drift"] = "the others are compared with it"
    elif not task.settings.compared:
        missing["drift"] = "not measured: give --compared a number of pictures"
    else:
        drift, heat = _drift(opened, first, task)
    model = Model(
        label=contender.label,
        file=contender.model,
        kind="float" if prepared is None else "quantized",
        recipe=None if prepared is None else name_of(prepared.recipe),
        target=None if prepared is None else prepared.target.name,
        weights="only" if prepared is None else prepared.weights,
        accuracy=_accuracy(opened, task, missing),
        counted=_counted(opened, task),
        drift=drift,
        training=_training(opened, missing),
        quantization=_quantization(opened, task, missing),
        found=tuple(_found(opened, task)),
        missing=missing,
    )
    return _of_file(opened, model, task), heat


def _accuracy(opened: _Opened, task: _Task, missing: dict[Section, str]) -> Accuracy | None:
    if task.settings.pictures == 0:
        missing["accuracy"] = "not measured: give --pictures a number, or leave --no-ap out"
        return None
    detector = task.detector(opened)
    tell = task.tell(f"{opened.contender.label}, AP")
    result = evaluate(detector, task.scored, task.settings.metric, batch_size=task.settings.batch, progress=tell)
    groups = {"all": result.scores, **result.split, **result.frequency}
    engine: Literal["torch", "onnxruntime"] = "onnxruntime" if isinstance(detector, OnnxDetector) else "torch"
    return Accuracy(engine, result.pictures, result.objects, {name: scores.ap for name, scores in groups.items()})


def _counted(opened: _Opened, task: _Task) -> Counted:
    prepared = opened.prepared
    measured = task.measurement(opened.config)
    report = price(measured) if prepared is None else price(measured, prepared.recipe, prepared.target.name)
    full, exported = report.total, report.export_total
    return Counted(exported.macs, exported.size_mib, exported.bops_t, full.size_mib, full.bops_t)


def _training(opened: _Opened, missing: dict[Section, str]) -> Training | None:
    run, prepared = opened.contender.run, opened.prepared
    if run is None or prepared is None:
        missing["training"] = "it was not trained here" if run is None else "it is no prepared model"
        return None
    return training_of(run, [stage.name for stage in prepared.stages])


def _quantization(opened: _Opened, task: _Task, missing: dict[Section, str]) -> Quantization | None:
    prepared, count = opened.prepared, task.settings.noise
    if prepared is None or not count:
        missing["quantization"] = "it has no quantizers" if prepared is None else "not measured: give --noise a number of pictures"
        return None
    prepared.graph.to(task.settings.device)
    batches = picture_batches(prepared, task.pictures(count), 1)
    noise = measure_noise(prepared, batches, total=count, progress=task.tell(f"{opened.contender.label}, noise"))
    report = inspect_prepared(prepared, opened.contender.model, noise)
    return Quantization(noise.pictures, report.quantizers, report.blocks)


def _stage_graph(opened: _Opened, model: Model) -> StageGraph:
    """The blocks of a model, in its stages."""
    prepared = opened.prepared
    if prepared is None:
        graph = trace(opened.module)
        prepare_passes()(graph)
        seen = view(graph)
    else:
        seen = view(prepared.graph, prepared.target)
    faces, reads = blocks_of_view(seen)
    edges = (Edge(source, reader, tuple(sorted(bits))) for reader, sources in enumerate(reads) for source, bits in sources.items())
    return StageGraph(model.label, tuple(faces), tuple(edges), bool(seen.quantizers))


def _drift(opened: _Opened, first: _Opened, task: _Task) -> tuple[Drift, tuple[HeatPicture, ...]]:
    settings = task.settings
    result = distortion(
        opened.module.to(settings.device), first.module.to(settings.device), task.dataset, task.vocabulary, size=task.size,
        limit=settings.compared, batch_size=settings.batch, device=settings.device,
        progress=task.tell(f"{opened.contender.label}, drift"),
    )  # fmt: skip
    heat = tuple(
        HeatPicture(
            picture=_picture(each.name, each.picture, each.boxes, each.names),
            points=tuple((float(x), float(y)) for x, y in each.points.tolist()),
            strides=tuple(each.strides.tolist()),
            teacher=_numbers(each.teacher),
        )
        for each in result.examples
    )
    values = tuple(_numbers(each.student) for each in result.examples)
    return Drift(result.anchors, _relation(result.region_text), _relation(result.region_region), values), heat


def _relation(found: Distortion) -> Relation:
    means = found.as_dict()
    return Relation(_numbers(found.embedding), _numbers(found.confidence), means["embedding"], means["confidence"], means["pearson"])


def _found(opened: _Opened, task: _Task) -> Iterator[Found]:
    detector = task.detector(opened, task.settings.conf)
    for index in task.shown:
        (one,) = detector.detect([task.dataset.picture(index)])
        yield Found(_boxes(one.boxes), tuple(one.scores.tolist()), tuple(detector.names[label] for label in one.labels))


# --- of exported files ---


def _of_file(opened: _Opened, model: Model, task: _Task) -> Model:
    """What an exported file adds, but for its speed."""
    settings, file = task.settings, opened.contender.exported
    opened.module.to("cpu")
    if file is None:
        told = "not measured: it was not exported; leave --no-export out"
        return dataclasses.replace(model, missing={**model.missing, "speed": told, "integers": told, "ladder": told})
    missing: dict[Section, str] = {}
    integers, ladder = None, None
    if settings.operators:
        task.tell(model.label)(0, settings.operators, "time by operator")
        measured = BenchSettings(settings.threads, settings.operators, size=task.size, texts=len(task.vocabulary))
        integers = dataclasses.replace(operators_of(file, measured), path=Path(file.name))
    else:
        missing["integers"] = "not measured: give --operators a number of runs"
    if opened.prepared is None:
        missing["ladder"] = "a file in floats has no codes to verify"
    elif settings.verified:
        ladder = verify_file(
            opened.prepared, file, task.pictures(settings.verified), vocabulary=task.vocabulary, count=settings.verified,
            progress=task.tell(f"{model.label}, verification"),
        )  # fmt: skip
    else:
        missing["ladder"] = "not measured: give --verified a number of pictures"
    return dataclasses.replace(model, integers=integers, ladder=ladder, missing={**model.missing, **missing})


def _timed(contenders: Sequence[Contender], models: Sequence[Model], task: _Task) -> Iterator[Model]:
    """The models with the speed of those that were exported, timed in turns: a ratio needs the first one's file."""
    settings = task.settings
    files = [each.exported for each in contenders if each.exported is not None]
    if not settings.rounds or contenders[0].exported is None:
        told = "not measured: " + ("give --rounds a number" if not settings.rounds else f"{contenders[0].label} was not exported")
        yield from (dataclasses.replace(model, missing={"speed": told, **model.missing}) for model in models)
        return
    measured = BenchSettings(settings.threads, settings.rounds, size=task.size, texts=len(task.vocabulary))
    timings = iter(bench(files, measured, task.tell("speed")).timings)
    first = None
    for contender, model in zip(contenders, models, strict=True):
        if contender.exported is None:
            yield model
            continue
        timing = next(timings)
        first = first or timing
        yield dataclasses.replace(model, speed=Speed(timing.milliseconds, timing.times_faster_than(first), timing.bytes))


# --- as plain data ---


def _picture(name: str, pixels: np.ndarray, boxes: np.ndarray, names: tuple[str, ...]) -> Picture:
    """A picture small enough to travel in a page; the boxes stay in its own pixels."""
    height, width = pixels.shape[:2]
    scale = LONGEST / max(height, width)
    shown = pixels if scale >= 1 else cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _there, encoded = cv2.imencode(".jpg", cv2.cvtColor(shown, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return Picture(name, width, height, base64.b64encode(encoded.tobytes()).decode("ascii"), _boxes(boxes), names)


def _boxes(boxes: np.ndarray) -> tuple[BoxPixels, ...]:
    return tuple((round(a, 2), round(b, 2), round(c, 2), round(d, 2)) for a, b, c, d in boxes.tolist())


def _numbers(values: Iterable[float]) -> tuple[float | None, ...]:
    return tuple(float(value) if np.isfinite(value) else None for value in values)
