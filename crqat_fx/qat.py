"""Quantization-aware training: a prepared model learns its ranges and weights, phase by phase, and from a teacher where the phase says so.

    run/started.pt          the model that the run began with, its ranges set: what post-training quantization alone gives
    run/prepared.pt         the averaged weights, norms estimated anew, beside the raw ones: a prepared model
    run/quantizers.jsonl    every quantizer's scale, zero point, clipped and flipped codes, every `watch_every` steps
    run/log.jsonl           also the AP as a phase opens (`ap_opening`) and as it ends (`ap`), where `ap_pictures` asks for it

The loss of a batch of B pictures is

    B / (sum of scores) * (cls + box + dfl)  +  kd_weight * (pkd_factor * PKD + trkd_factor * TRKD)

The task's loss grows with the batch, as published; the others do not. What the published weight of 6 is meant beside is not known, and
decides the result: hence the factors, 1 for as it is written here, B for a loss that grows with the batch as well.

A phase opens so: its stages' quantizers are switched on, and set on the student as it then is; norms are corrected, where that is asked
for; parameters that begin to learn do so with fresh moments; the average starts again. Scales and zero points learn at a share of the rate,
and nothing pulls them to zero.
"""

import bisect
import copy
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from crqat_fx.assign import assign
from crqat_fx.checkpoint import load_model
from crqat_fx.correct_norms import correct_norms, correctable, uncorrect_norms
from crqat_fx.curriculum import (
    BACKBONE_FEATURES,
    EMA,
    NECK_FEATURES,
    RELATIONS,
    Method,
    Norm,
    Phase,
    borders,
    curriculum,
    newly_quantized,
    read_phases,
)
from crqat_fx.data.batch import Batch
from crqat_fx.data.opening import open_evaluation
from crqat_fx.data.samples import EvaluationSet, FirstPictures
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.data.training import DataSettings, open_for
from crqat_fx.distill import Relations, feature_loss, relation_loss
from crqat_fx.distributed import ALONE, Processes, synchronise_norms
from crqat_fx.ema import MovingAverage
from crqat_fx.errors import UserError
from crqat_fx.evaluate import category_slots, evaluate
from crqat_fx.losses import Losses, detection_loss
from crqat_fx.models.yolo_world import YoloWorld, anchor_points, decode_boxes, flatten_levels
from crqat_fx.noise import evaluating
from crqat_fx.pipelines import prepare_passes
from crqat_fx.progress import Progress
from crqat_fx.quantize.calibrate import PICTURES, calibrate
from crqat_fx.quantize.estimate_norms import estimate_norms
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.observers import make_observer
from crqat_fx.quantize.prepare import load_prepared
from crqat_fx.quantize.prepared import Calibration, Prepared, border
from crqat_fx.quantize.watch import watching
from crqat_fx.torch_detector import TorchDetector
from crqat_fx.trace import Example, trace
from crqat_fx.train import (
    BatchSource,
    Course,
    LoopSettings,
    TrainingState,
    TrainResult,
    autocast,
    parameter_groups,
    pictures_of,
    run,
    workplace,
)
from crqat_fx.vocabulary import Vocabulary
from passes.fx.fold_batchnorm import FoldBatchNorm
from passes.spec import QuantSpec

logger = logging.getLogger(__name__)

STARTED, PREPARED = "started.pt", "prepared.pt"
TAPPED = {BACKBONE_FEATURES: 0, NECK_FEATURES: 1}  # losses of features, and the stage whose they are
Scored = tuple[EvaluationSet, Vocabulary | None]  # a set, and the texts it is scored under; None takes the model's own
OF_OTHERS: Mapping[str, Any] = {"schedule": "constant", "norm": "train", "correct_norms": False}
OF_METHOD: Mapping[str, Mapping[str, Any]] = {"cr-qat-plus": {"schedule": "linear", "norm": "frozen", "correct_norms": True}}
RAMP = 0.2  # of an average's horizon: the published average's, 2,000 of 10,000 steps


@dataclass(frozen=True)
class QatSettings(LoopSettings, DataSettings):
    """Settings of a run. The defaults are the published ones where those are known."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = (*LoopSettings.MAY_CHANGE, "workers", "watch_every", "ap_pictures", "teacher")

    steps: int = 10_000
    rate: float = 2e-4  # not published
    schedule: Literal["linear", "constant"] = None  # type: ignore[assignment]  # None takes the method's, below
    warmup: int | None = 0
    method: Method = "cr-qat"
    teacher: str | None = None  # the full-precision checkpoint; methods that teach need one
    kd_weight: float = 6.0
    pkd_factor: float = 1.0
    trkd_factor: float = 16.0  # the batch: a mean error of cosines is nothing beside a loss that grows with it
    relations: Relations | Literal["none"] = "full"  # which of them TRKD compares
    neck_features: bool = False  # three stages: the neck is taught by its features
    shares: tuple[float, ...] | None = None  # of the steps, one a phase; None takes the published
    norm: Norm = None  # type: ignore[assignment]  # None takes the method's, below
    recalibrate: bool = True
    correct_norms: bool = None  # type: ignore[assignment]  # of stages as they are quantized, where frozen; None takes the method's
    ema: float = EMA
    phases: tuple[Any, ...] | None = None  # mappings of a phase's fields, in place of the method's; what one leaves out is as set here
    quantizer_rate: float = 0.1  # share of the rate, of scales and zero points
    observer: str = "omse"
    calibration: int = PICTURES  # pictures of the training that ranges are set on
    reestimate: int = 20  # batches that the average's norms are estimated on
    watch_every: int = 100
    ap_pictures: int = 0  # pictures that AP is scored on as a phase opens and as it ends; 0: no AP

    def __post_init__(self) -> None:
        for name, value in OF_METHOD.get(self.method, OF_OTHERS).items():
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, value)
            elif given != value and self.method in OF_METHOD:
                what = f"{name} is {_plain(given)}, and {self.method} is a method with {_plain(value)}"
                raise UserError(what, remedy="give it so or not at all; cr-qat takes either")
        super().__post_init__()
        self.check_data()
        for name in ("kd_weight", "pkd_factor", "trkd_factor", "quantizer_rate", "reestimate", "ap_pictures"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}", remedy="give 0 or more")
        for name in ("calibration", "watch_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", remedy="give a number above 0")
        make_observer(self.observer, QuantSpec(8, symmetric=False))  # refuses a name that there is not, before a phase asks for it
        for share in self.shares or ():
            if not isinstance(share, int | float) or isinstance(share, bool):
                raise UserError(f"shares holds {share!r}", remedy="give numbers that are 1 together")
        for name in ("shares", "neck_features"):
            if self.phases is not None and getattr(self, name):
                raise UserError(
                    f"{name} is given, and phases in place of the method's", remedy=f"leave out {name}: each phase says its own"
                )

    def plan(self, stages: tuple[str, ...]) -> tuple[Phase, ...]:
        """The phases for a model of these stages."""
        common: dict[str, Any] = {name: getattr(self, name) for name in ("norm", "recalibrate", "ema", "correct_norms")}
        if self.phases is not None:
            found = read_phases(self.phases, common)
        else:
            found = curriculum(self.method, stages, neck_features=self.neck_features, shares=self.shares, **common)
        if self.relations != "none":
            return found
        return tuple(replace(phase, losses=tuple(name for name in phase.losses if name != RELATIONS)) for phase in found)


def train_file(
    path: str | Path,
    settings: QatSettings,
    out: str | Path,
    *,
    origins: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> TrainResult:
    """`train_prepared` of a prepared model's file, with the data and the teacher that the settings name."""
    prepared = load_prepared(path)
    if prepared.config is None:
        raise _no_yolo_world(path)
    # the drawn task is the one that `evaluate` draws, whatever the order of its pictures
    batches, task = settings.steps * settings.accumulate, ShapesTask.seed
    source, _ = open_for(settings, batches, settings.batch, prepared.config.widen, task)
    if source.text_width != prepared.config.text_width:
        what = f"its texts are {source.text_width} wide, the model's {prepared.config.text_width}"
        raise UserError(what, where=settings.data, remedy="embed them with the model's own text encoder")
    scored = open_evaluation(settings.data, settings.size, settings.ap_pictures) if settings.ap_pictures else None
    teacher = None if settings.teacher is None else load_model(settings.teacher)[0]
    return train_prepared(
        prepared, source, settings, Path(out), teacher=teacher, scored=scored, origins=origins, progress=progress, resume=resume
    )


def train_prepared(
    prepared: Prepared,
    source: BatchSource,
    settings: QatSettings,
    out: Path,
    *,
    teacher: YoloWorld | None = None,
    scored: Scored | None = None,
    origins: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> TrainResult:
    """Trains a prepared YOLO-World in place from wherever `out` stands to `settings.steps`, and leaves `out/prepared.pt`.

    `teacher` is changed, and is not to be used again; methods that do not teach leave it unread. `scored` is what AP is
    scored on where the settings ask for it. An interrupt (Ctrl-C) ends the step under way, saves and returns.
    """
    with workplace(settings, out, resume) as (device, processes):
        course = QatCourse(prepared, settings, source, device, processes, teacher, scored)
        return run(course, source, out, device, processes, origins=origins, progress=progress, resume=resume)


class QatCourse(Course):
    """A prepared model's training, phase by phase."""

    settings: QatSettings
    model: GraphModule

    def __init__(
        self,
        prepared: Prepared,
        settings: QatSettings,
        source: BatchSource,
        device: torch.device,
        processes: Processes = ALONE,
        teacher: YoloWorld | None = None,
        scored: Scored | None = None,
    ) -> None:
        if prepared.config is None:
            raise _no_yolo_world("the prepared model")
        self.prepared = prepared
        self.settings = settings
        self.source = source
        self.device = device
        self.processes = processes
        self.phases = settings.plan(tuple(stage.name for stage in prepared.stages))
        self.opens = borders(self.phases, settings.steps)
        self.borders = self.opens[1:]
        self.index: int | None = None  # of the phase that is open
        self.model = prepared.graph.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.train()
        self.forward = self.model
        for number, phase in enumerate(self.phases, 1):
            self._check(number, phase)
        self.scored = self._scored_by(scored) if settings.ap_pictures else None
        self.teacher: GraphModule | None = None
        self.identities = {"prepared model": prepared.digest()}
        if any(phase.taught for phase in self.phases):
            self.teacher = teacher_graph(_fitting(teacher, prepared, settings.method), prepared.parts).to(device)
            self.identities["teacher"] = _digest(self.teacher)
        self.teaches: GraphModule | None = None  # the part of the teacher that the phase needs
        if not prepared.calibrated:
            calibrate(prepared, self._examples(0), settings.observer, settings.calibration)
        synchronise_norms(self.model, processes)
        processes.share(self.model)

    @property
    def identity(self) -> Mapping[str, str]:
        return self.identities

    def groups(self) -> list[dict[str, Any]]:
        """All parameters, also those that do not learn yet."""
        everything = tuple(stage.name for stage in self.prepared.stages)
        self.prepared.set_phase(Phase(everything, everything))
        ranges = {parameter for each in self.model.modules() if isinstance(each, FakeQuantize) for parameter in each.parameters()}
        groups = parameter_groups(self.model, self.settings)
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if parameter not in ranges]
        learned = [parameter for parameter in self.model.parameters() if parameter in ranges]
        return [*groups, {"params": learned, "weight_decay": 0.0, "scale": self.settings.quantizer_rate}]

    def average(self, step: int) -> MovingAverage:
        index = self._phase_of(step)
        length = self.opens[index + 1] - self.opens[index]
        horizon = max(self.phases[index].ema * length, 1.0)
        return MovingAverage(self.model, 1 / horizon, RAMP * horizon)

    # --- phases ---

    def _check(self, number: int, phase: Phase) -> None:
        """Refuses what this model has no stages for."""
        self.prepared.set_phase(phase)  # refuses stages that there are not
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError(f"phase {number} trains nothing", where="the curriculum", remedy="name stages that it trains")
        stages = tuple(stage.name for stage in self.prepared.stages)
        for name, place in TAPPED.items():
            if name in phase.losses and (place >= len(stages) or not border(self.model, stages[place])):
                raise UserError(
                    f"phase {number} compares features by {name}, which a model of the stages {', '.join(stages)} does not pass on",
                    where="the curriculum",
                    remedy="prepare the model with --stages 3, or leave the loss out" if place else "leave the loss out",
                )

    def _phase_of(self, step: int) -> int:
        """The phase that the step before belongs to."""
        return max(bisect.bisect_left(self.opens, step) - 1, 0)

    def carried(self) -> dict[str, Any]:
        return {"calibrations": {name: dict(vars(each)) for name, each in self.prepared.calibrations.items()}}

    def enter(self, step: int, carried: Mapping[str, Any]) -> None:
        self.prepared.calibrations = {name: Calibration(**each) for name, each in carried["calibrations"].items()}
        self._set(self._phase_of(step))

    def open(self, state: TrainingState) -> Mapping[str, float]:
        index = bisect.bisect_right(self.opens, state.step) - 1
        if index == self.index:
            return {}
        learning = {parameter for parameter in self.model.parameters() if parameter.requires_grad} if self.index is not None else set()
        phase = self.phases[index]
        self.prepared.set_phase(phase)
        stages = newly_quantized(self.phases, index)
        count = self.settings.calibration
        if phase.norm == "train" and uncorrect_norms(self.prepared, phase.trained):
            logger.warning("step %d: norms that had been corrected are trained from what they were: they correct themselves", state.step)
        # a correction is of the student as it was: as a later phase opens it is made again
        corrected = any(layer.corrected for layer in correctable(self.prepared, stages).values())
        with autocast(self.settings, self.device):
            if index and stages and phase.recalibrate:
                calibrate(self.prepared, self._examples(state.step), self.settings.observer, count, stages=stages)
            wanted = stages and (phase.correct_norms or (corrected and index))
            if wanted and not correct_norms(self.prepared, self._examples(state.step), count, stages=stages):
                logger.warning("step %d: no norm to correct in %s: none has a scale for each channel", state.step, ", ".join(stages))
        self.processes.share(self.model)
        self._set(index)
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter not in learning:
                state.optimizer.state.pop(parameter, None)
        state.average = self.average(state.step + 1)
        logger.info("step %d: %s quantized, %s", state.step, ", ".join(phase.quantized) or "nothing", " + ".join(phase.losses))
        return self._ap("ap_opening", state)

    def close(self, state: TrainingState) -> Mapping[str, float]:
        return self._ap("ap", state)

    def _set(self, index: int) -> None:
        phase = self.phases[index]
        self.prepared.set_phase(phase)
        stages = [stage.name for stage in self.prepared.stages]
        compared = [stages[place] for name, place in TAPPED.items() if name in phase.losses]
        off = [each for each in self.prepared.quantizers().values() if not each.enabled]
        unused = any(parameter.requires_grad for each in off for parameter in each.parameters())
        self.forward = self.processes.parallel(tapped(self.model, compared), self.device, unused)
        if self.teacher is not None:
            self.teaches = tapped(self.teacher, compared, whole=RELATIONS in phase.losses) if phase.taught else None
        self.index = index

    def _examples(self, step: int, part: tuple[int, int] = (0, 1)) -> Iterator[Example]:
        """Inputs of the student from a step on. Ranges are set on whole batches, the same in every process."""
        for batch in self.source.batches(step * self.settings.accumulate, part):
            moved = batch.to(self.device)
            yield pictures_of(moved), moved.text

    # --- a step ---

    def losses(self, batch: Batch, parts: int) -> Losses:
        images = pictures_of(batch)
        (logits, bins, regions), features = self.forward(images, batch.text)
        losses, _ = detection_loss(logits, bins, batch.truth, self.processes)
        assert self.index is not None
        phase = self.phases[self.index]
        if self.teaches is None:
            return losses
        with torch.no_grad():
            outputs, taught = self.teaches(images, batch.text)
        weight = self.settings.kd_weight / parts
        others: dict[str, Tensor] = {}
        taps = iter(zip(features, taught, strict=True))
        for name in TAPPED:
            if name in phase.losses:
                others[name] = weight * self.settings.pkd_factor * feature_loss(*next(taps), self.processes)
        if RELATIONS in phase.losses:
            assert self.settings.relations != "none"
            levels, boxes, of_teacher = outputs
            points, _ = anchor_points(levels)
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                given = assign(flatten_levels(levels).float().sigmoid(), decode_boxes(boxes), points, batch.truth)
            found = relation_loss(regions, of_teacher, batch.text, given, self.settings.relations, self.processes)
            others[RELATIONS] = weight * self.settings.trkd_factor * found
        return replace(losses, others=others)

    def watched(self, step: int) -> AbstractContextManager[dict[str, float]]:
        return watching(self.prepared) if step % self.settings.watch_every == 0 and self.processes.first else super().watched(step)

    # --- what comes out ---

    def begin(self, out: Path) -> None:
        self.prepared.save(out / STARTED)

    def result(self, out: Path) -> Path:
        return out / PREPARED

    def write(self, out: Path, state: TrainingState) -> None:
        with self._averaged(state) as average:
            pass
        if self.processes.first:
            self.prepared.save(self.result(out), average)

    @contextmanager
    def _averaged(self, state: TrainingState) -> Iterator[dict[str, Tensor]]:
        """The model is its average in this block, with norms estimated anew, and gets its own weights back; yields a copy of that state."""
        raw = {name: value.clone() for name, value in self.model.state_dict().items()}
        _fill(self.model, state.average.state())
        try:
            if self.settings.reestimate and state.step and self.prepared.phase.norm == "train":
                examples = self._examples(state.step, self.processes.part)
                with autocast(self.settings, self.device):
                    estimate_norms(self.model, itertools.islice(examples, self.settings.reestimate))
            yield {name: value.clone() for name, value in self.model.state_dict().items()}
        finally:
            _fill(self.model, raw)

    # --- how good it is ---

    def _scored_by(self, scored: Scored | None) -> tuple[EvaluationSet, Vocabulary]:
        """What AP is scored on: the first pictures, and the texts, which name every category."""
        assert self.prepared.config is not None
        if scored is None:
            raise UserError(f"ap_pictures is {self.settings.ap_pictures}, of no set", remedy="give `scored`, or leave it out")
        dataset, texts = scored
        vocabulary = texts or self.prepared.vocabulary
        if vocabulary is None:
            raise UserError("has no vocabulary to score it with", where="the prepared model", remedy="prepare it with one: --vocabulary")
        vocabulary.check_width(self.prepared.config.text_width, self.settings.data)
        first = FirstPictures(dataset, self.settings.ap_pictures)
        category_slots(vocabulary.names, first.coco)
        if not first.coco["annotations"]:
            raise UserError(f"the first {len(first)} pictures hold no object", where="--ap-pictures", remedy="score more of them")
        return first, vocabulary

    def _ap(self, name: str, state: TrainingState) -> dict[str, float]:
        """AP of what `write` would leave."""
        if self.scored is None:
            return {}
        found: dict[str, float] = {}
        with self._averaged(state):
            if self.processes.first:
                dataset, vocabulary = self.scored
                with evaluating(self.model):
                    detector = TorchDetector(self.model, vocabulary, self.prepared.size, device=self.device)
                    ap = evaluate(detector, dataset).scores.ap
                found = {} if ap is None else {name: ap}
            self.processes.wait()
        return found


# --- graphs ---


def tapped(graph: GraphModule, stages: list[str], *, whole: bool = True) -> GraphModule:
    """The graph with one more output: for each of the stages, what later ones read of it. Modules are shared. Without `whole` nothing else
    is computed, and the first output is empty."""
    copied = Graph()
    nodes: dict[Node, Node] = {}
    outputs = copied.graph_copy(graph.graph, nodes)
    taps = tuple(tuple(nodes[node] for node in border(graph, stage)) for stage in stages)
    copied.output((outputs if whole else (), taps))
    made = GraphModule(graph, copied)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def teacher_graph(teacher: YoloWorld, parts: Literal[1, 2, 3]) -> GraphModule:
    """The teacher as it runs fastest: marked, in evaluation, norms folded, nothing to learn."""
    graph = copy.deepcopy(trace(teacher.eval()))
    prepare_passes(parts)(graph)
    FoldBatchNorm()(graph)
    frozen: GraphModule = graph.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return frozen


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _no_yolo_world(where: object) -> UserError:
    return UserError("is no YOLO-World", where=where, remedy="train a module of your own in a loop of your own")


def _fitting(teacher: YoloWorld | None, prepared: Prepared, method: str) -> YoloWorld:
    """The teacher, or why it cannot teach this model."""
    remedy = "give the full-precision checkpoint that the model was prepared from"
    if teacher is None:
        raise UserError(f"{method} needs a teacher", where="--teacher", remedy=f"{remedy}, or --method qat")
    assert prepared.config is not None
    ours, theirs = prepared.config, teacher.config
    for what, wanted, given in (
        ("channels", ours.channels[2:], theirs.channels[2:]),
        ("text width", ours.text_width, theirs.text_width),
    ):
        if wanted != given:
            raise UserError(f"the teacher's {what} are {given}, the student's {wanted}", where="--teacher", remedy=remedy)
    own, other = (asdict(config) for config in (ours, theirs))
    if differing := [f"{name} {other[name]} (the student's {own[name]})" for name in own if own[name] != other[name]]:
        logger.warning("the teacher is of another architecture than the student: %s", ", ".join(differing))
    return teacher


@torch.no_grad()
def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Writes a state into the tensors that are there."""
    for name, value in model.state_dict().items():
        value.copy_(state[name])


def _digest(graph: nn.Module) -> str:
    """The same for the same weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in graph.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
