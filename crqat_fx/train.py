"""The training loop: a course, a source of batches and settings in; a run folder out, from which a stopped run goes on bit for bit.

    run/settings.yaml   what the run was started with
    run/log.jsonl       losses, rate, gradient norm and speed, every `log_every` steps; the same under run/tensorboard/
    run/last.pt         everything needed to go on: model, average, optimizer, gradient scale, random state, step
    run/model.pt        of float training: the averaged weights as a checkpoint of this project

A step is: the losses of one batch (or of `accumulate` of them), backward, clip, AdamW, moving average. Batches are a function of the step
alone, so that the step's number is the position in the data. What is particular to a kind of training is its course; full-precision
training's is here. Processes that torchrun starts share each batch, and end in the weights that one alone would have come to.
"""

import dataclasses
import itertools
import logging
import math
import pickle
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from crqat_fx.checkpoint import write_checkpoint
from crqat_fx.data.batch import Batch
from crqat_fx.device import usable_device
from crqat_fx.distributed import ALONE, Processes, joined, own_device, synchronise_norms, without_exchange
from crqat_fx.ema import MovingAverage
from crqat_fx.errors import UserError
from crqat_fx.files import written
from crqat_fx.losses import Losses, detection_loss
from crqat_fx.models.yolo_world import YoloWorld
from crqat_fx.progress import Progress
from crqat_fx.runlog import DETAILS, LOG, RunLog, lines_of
from crqat_fx.settings import Resolved, refuse_other_words
from crqat_fx.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SETTINGS, LAST, MODEL = "settings.yaml", "last.pt", "model.pt"
REMEDY = f"start again with a lower rate or in fp32; {LAST} holds the last good state"  # where numbers are not finite
STATE_FORMAT = "crqat-fx training state 3"
NOMINAL_BATCH = 64  # of which the published weight decay is meant
WARMUP_SHARE = 0.03  # of the steps: the published 3 of 100 epochs
UNDECAYED = ("bias", "logit_scale")
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


class BatchSource(Protocol):
    @property
    def fingerprint(self) -> str:
        """The same for the same batches, another for others: a run is resumed with its own data alone."""

    @property
    def skipped(self) -> Mapping[str, int]:
        """What could not be used so far, counted by kind."""

    @property
    def repaired(self) -> Mapping[str, int]:
        """What had to be mended, counted by kind."""

    def batches(self, start_step: int, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Endless; the batch of a step is a function of the source's seed and the step alone. `part`: which of how many equal parts of
        each batch, in order."""


@dataclass(frozen=True)
class LoopSettings:
    """What every course is set by."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("device", "threads", "log_every", "save_every")  # on resuming

    steps: int = 100_000
    batch: int = 16  # pictures a batch, over all processes
    accumulate: int = 1  # batches a step
    rate: float = 2e-3
    weight_decay: float = 0.025  # for 64 pictures a step; scaled to this run's
    schedule: Literal["linear", "constant"] = "linear"
    warmup: int | None = None  # steps until the full rate; None takes `WARMUP_SHARE` of all
    final_rate: float = 0.01  # share of the rate at the last step of the linear schedule
    clip: float = 10.0  # largest norm of all gradients together
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "cpu"
    threads: int | None = None  # of the processor; None leaves PyTorch's own choice
    log_every: int = 20
    save_every: int = 500

    def __post_init__(self) -> None:
        refuse_other_words(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{field.name} is {value}", remedy="give a finite number")
        for name in ("batch", "accumulate", "log_every", "save_every", "clip", "rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}", remedy="give a number above 0")
        for name in ("steps", "weight_decay", "final_rate"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}", remedy="give 0 or more")
        if not 0 <= self.warmup_steps <= self.steps:
            remedy = f"give 0 to {self.steps}, or leave it out for {WARMUP_SHARE:.0%} of the steps"
            raise UserError(f"warmup is {self.warmup}, of {self.steps} steps in all", remedy=remedy)
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads is {self.threads}", remedy="give a number above 0")

    @property
    def warmup_steps(self) -> int:
        return round(WARMUP_SHARE * self.steps) if self.warmup is None else self.warmup


@dataclass(frozen=True)
class TrainSettings(LoopSettings):
    """Of full-precision training. The defaults are the published recipe but for its length: that is 100 epochs,
    `100 * pictures / (batch * accumulate)` steps. Of those its 3 epochs of warm-up are a share."""

    ema_momentum: float = 1e-4
    ema_horizon: float = 2_000.0  # updates in which the average's ramp falls by e
    half: bool = False  # model.pt in 16 bits

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ema_momentum <= 1:
            raise UserError(f"ema_momentum is {self.ema_momentum}", remedy="give a number above 0, at most 1")
        if self.ema_horizon < 0:
            raise UserError(f"ema_horizon is {self.ema_horizon}", remedy="give 0 or more")


@dataclass(frozen=True)
class TrainResult:
    folder: Path
    model: Path  # what the run is for
    steps: int  # done in all
    interrupted: bool
    seconds: float  # of this call
    losses: Mapping[str, float]  # as last logged; empty where nothing was
    ap: Sequence[Mapping[str, float]]  # lines of the log that hold one: as a phase opens (`ap_opening`), and as it ends (`ap`)
    skipped: Mapping[str, int]  # of the data: what could not be used
    repaired: Mapping[str, int]  # of the data: what had to be mended
    first: bool = True  # of several processes, the one that tells


class NonFiniteError(UserError):
    """Training met a number that is infinite or no number."""


# --- what is trained ---


class Course(ABC):
    """What is trained, and all that is particular to it: the loop asks for nothing else."""

    settings: LoopSettings
    model: nn.Module  # whose state a run saves and averages, on its device
    forward: nn.Module  # what `losses` calls: the model, alone or with other processes
    borders: tuple[int, ...] = ()  # steps at which something changes: the log ends a line there

    @property
    def identity(self) -> Mapping[str, str]:
        """What else a run is resumed with alone, by what it is called."""
        return {}

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's; `scale` is what a group multiplies the rate with."""

    @abstractmethod
    def average(self, step: int) -> MovingAverage:
        """A new average, as it is to follow the model when `step` steps are done."""

    @abstractmethod
    def losses(self, batch: Batch, parts: int) -> Losses:
        """What a batch costs, which is one of `parts` that a step adds up: a term that is no sum over its pictures counts for a part."""

    def carried(self) -> dict[str, Any]:
        """What else a state holds."""
        return {}

    def begin(self, out: Path) -> None:
        """Writes what else is to be kept of the model before its first step; one process does."""
        return

    def enter(self, step: int, carried: Mapping[str, Any]) -> None:
        """Takes up what stands after `step` steps, at least 1, when a run goes on."""
        return

    def open(self, state: "TrainingState") -> Mapping[str, float]:
        """Before every step: what its number changes; gives what the log is to say of that."""
        return {}

    def close(self, state: "TrainingState") -> Mapping[str, float]:
        """After the last step before a border: what the log is to say of what ends there."""
        return {}

    def watched(self, step: int) -> AbstractContextManager[dict[str, float]]:
        """Around the step that ends as number `step`: what it fills is written to `DETAILS`."""
        return nullcontext({})

    @abstractmethod
    def write(self, out: Path, state: "TrainingState") -> None:
        """Writes what the run is for, as it stands."""

    @abstractmethod
    def result(self, out: Path) -> Path:
        """Where `write` puts it."""


class FloatCourse(Course):
    """A full-precision model on the detection losses."""

    settings: TrainSettings
    model: YoloWorld

    def __init__(
        self,
        model: YoloWorld,
        settings: TrainSettings,
        device: torch.device,
        processes: Processes = ALONE,
        vocabulary: Vocabulary | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.settings = settings
        self.processes = processes
        self.vocabulary = vocabulary
        self.metadata = dict(metadata or {})
        self.model.train()
        synchronise_norms(self.model, processes)
        self.forward = processes.parallel(self.model, device)

    def groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self.settings)

    def average(self, step: int) -> MovingAverage:
        return MovingAverage(self.model, self.settings.ema_momentum, self.settings.ema_horizon)

    def losses(self, batch: Batch, parts: int) -> Losses:
        return losses_of(self.forward, batch, self.processes)

    def write(self, out: Path, state: "TrainingState") -> None:
        carried = {**self.metadata, "steps": state.step}
        average = state.average.state()
        half = self.settings.half
        write_checkpoint(self.result(out), average, self.model.config, vocabulary=self.vocabulary, half=half, metadata=carried)

    def result(self, out: Path) -> Path:
        return out / MODEL


# --- the parts of a step ---


def pictures_of(batch: Batch) -> Tensor:
    """The pictures as a model reads them."""
    return batch.images.to(torch.float32, memory_format=torch.channels_last) / 255


def losses_of(model: nn.Module, batch: Batch, processes: Processes = ALONE) -> Losses:
    """What one batch, on the model's device, costs."""
    logits, bins, _ = model(pictures_of(batch), batch.text)
    return detection_loss(logits, bins, batch.truth, processes)[0]


def rate_at(settings: LoopSettings, step: int) -> float:
    """The learning rate of step `step`, counted from 0."""
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.schedule == "constant":
        return settings.rate * warm
    done = step / max(settings.steps - 1, 1)
    return settings.rate * warm * (1 - (1 - settings.final_rate) * done)


def parameter_groups(model: nn.Module, settings: LoopSettings) -> list[dict[str, Any]]:
    """The published groups: weights decay; biases, norms and the logit scale do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            (free if isinstance(module, NORMS) or name in UNDECAYED else decayed).append(parameter)
    decay = settings.weight_decay * settings.batch * settings.accumulate / NOMINAL_BATCH
    return [{"params": decayed, "weight_decay": decay, "scale": 1.0}, {"params": free, "weight_decay": 0.0, "scale": 1.0}]


class TrainingState:
    """Everything a run needs to go on as if it had never stopped. The model's own tensors are part of it, not a copy.

    Of the random generators torch's are kept: the package draws from no other that is global. `data` is the batches' fingerprint.
    """

    def __init__(self, course: Course, device: torch.device, data: str, processes: Processes = ALONE) -> None:
        self.course = course
        self.model = course.model
        self.settings = course.settings
        self.device = device
        self.data = data
        self.processes = processes
        self.step = 0  # done
        self.optimizer = torch.optim.AdamW(course.groups(), lr=self.settings.rate, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.settings.precision == "fp16")
        self.average = course.average(0)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def save(self, path: Path) -> None:
        """Replaces what stands at `path`, unless a weight or an average is not finite: then what stands there stays."""
        for kind, tensors in (("tensor", self.model.state_dict()), ("average of", self.average.state())):
            wrong = _first_nonfinite_name(tensors)
            if wrong is not None:
                remedy = REMEDY if path.exists() else "give a model whose weights are finite"
                raise NonFiniteError(f"the {kind} {wrong} is not finite", where=f"step {self.step}", remedy=remedy)
        saved = {
            "format": STATE_FORMAT,
            "settings": dataclasses.asdict(self.settings),
            "data": self.data,
            "identity": dict(self.course.identity),
            "course": self.course.carried(),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state(),
            "average_updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        with written(path) as temporary:
            torch.save(saved, temporary)

    def load(self, path: Path) -> None:
        saved = _read_state(path)
        _refuse_other_settings(saved["settings"], self.settings, path)
        if saved["step"] > self.settings.steps:
            raise _damaged(path, f"it is at step {saved['step']} of {self.settings.steps}")
        if saved["data"] != self.data:
            raise UserError(
                f"was trained on other data (fingerprint {saved['data']}, not {self.data})",
                where=path,
                remedy="resume with the run's own data, as it was",
            )
        _refuse_other_model(saved, self.model.state_dict(), path)
        for name, value in self.course.identity.items():
            if saved["identity"].get(name) != value:
                raise UserError(f"was trained with another {name}", where=path, remedy=f"resume with the run's own {name}, as it was")
        self.model.load_state_dict(saved["model"])
        self.average = self.course.average(saved["step"])
        self.average.load(saved["average"], saved["average_updates"])
        self._load_optimizer(saved["optimizer"], path)
        try:
            self.scaler.load_state_dict(saved["scaler"])
            torch.set_rng_state(saved["random"])
            if self.device.type == "cuda" and saved["cuda_random"]:
                torch.cuda.set_rng_state_all(saved["cuda_random"])
        except (RuntimeError, TypeError, KeyError) as error:
            raise _damaged(path, "its gradient scale or random state is not what training writes") from error
        self.step = saved["step"]
        if self.step:
            try:
                self.course.enter(self.step, saved["course"])
            except (KeyError, TypeError) as error:
                raise _damaged(path, "its course is not what training writes") from error

    def _load_optimizer(self, saved: dict[str, Any], path: Path) -> None:
        try:
            self.optimizer.load_state_dict(saved)
            moments = [(value, parameter) for parameter, state in self.optimizer.state.items() for value in state.values()]
            fits = all(value.ndim == 0 or value.shape == parameter.shape for value, parameter in moments)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _other_optimizer(path) from error
        if not fits:
            raise _other_optimizer(path)


def take_step(state: TrainingState, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """One step of the optimizer and of the average; the losses and the gradients' norm before clipping, still on the device."""
    settings = state.settings
    rate = rate_at(settings, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    state.optimizer.zero_grad()
    terms = accumulate_gradients(state, batches)
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in state.parameters() if parameter.grad is not None])
    _stop_at_nonfinite(state, batches, terms, norm)
    nn.utils.clip_grads_with_norm_(state.parameters(), settings.clip, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.average.update()
    state.step += 1
    return {**terms, "gradient_norm": norm}


def accumulate_gradients(state: TrainingState, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The gradients and loss terms of all batches together, as if they were one; over several processes, of all their parts.

    Each batch's losses are over its own score sum. Weighted by it, added up, and divided by the sum of the score sums at the end, they are
    what the batches in one piece would have given (but for live batch statistics). Terms that are no such sum are averaged by it.
    """
    terms: dict[str, Tensor] = {}
    score_sum = torch.zeros((), device=state.device)
    share: Tensor | float = 1.0
    for number, batch in enumerate(batches, 1):
        with nullcontext() if number == len(batches) else without_exchange(state.course.forward):
            losses = _forward(state, batch, len(batches))
            weight = losses.score_sum.clamp(min=1) / len(batch.images) if len(batches) > 1 else 1.0
            state.scaler.scale(losses.total * weight).backward()
        for name, term in losses.terms.items():
            terms[name] = terms.get(name, 0) + term.detach() * weight
        score_sum += losses.score_sum
    if len(batches) > 1:
        share = sum(len(batch.images) for batch in batches) / score_sum.clamp(min=1)
        for parameter in state.parameters():
            if parameter.grad is not None:
                parameter.grad *= share
    return {name: state.processes.mean(term * share) for name, term in terms.items()}


def _forward(state: TrainingState, batch: Batch, parts: int = 1) -> Losses:
    with autocast(state.settings, state.device):
        return state.course.losses(batch, parts)


def autocast(settings: LoopSettings, device: torch.device) -> AbstractContextManager[None]:
    dtype = torch.float16 if settings.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=settings.precision != "fp32")


# --- the loop ---


def train(
    model: YoloWorld,
    source: BatchSource,
    settings: TrainSettings,
    out: Path,
    *,
    vocabulary: Vocabulary | None = None,
    metadata: Mapping[str, Any] | None = None,
    origins: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> TrainResult:
    """Trains a full-precision model in place from wherever `out` stands to `settings.steps`.

    `vocabulary` and `metadata` travel into `model.pt`; `origins` are where the settings came from, for `settings.yaml`. An interrupt
    (Ctrl-C) ends the step under way, saves and returns; a second one stops at once.
    """
    with workplace(settings, out, resume) as (device, processes):
        course = FloatCourse(model, settings, device, processes, vocabulary, metadata)
        return run(course, source, out, device, processes, origins=origins, progress=progress, resume=resume)


@contextmanager
def workplace(settings: LoopSettings, out: Path, resume: bool) -> Iterator[tuple[torch.device, Processes]]:
    """Where a run is to happen, checked before anything is built: its folder, this process' device, and the processes beside it."""
    with joined(settings.device) as processes:
        _refuse_wrong_folder(out, resume)
        if settings.batch % processes.count:
            what = f"batch is {settings.batch}, for {processes.count} processes"
            raise UserError(what, remedy="give a multiple of their number: each takes an equal part of every batch")
        device = usable_device(own_device(settings.device, processes))
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        processes.wait()  # until all have seen the folder as it was
        yield device, processes


def run(
    course: Course,
    source: BatchSource,
    out: Path,
    device: torch.device,
    processes: Processes = ALONE,
    *,
    origins: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> TrainResult:
    """The loop: from wherever `out` stands to the last step of the course. One process writes."""
    settings = course.settings
    state = TrainingState(course, device, source.fingerprint, processes)
    if resume:
        state.load(out / LAST)
    elif processes.first:
        state.save(out / LAST)  # first of all: from it alone a run can go on
    if processes.first and not state.step:
        course.begin(out)  # again where a run goes on that was killed before
    if processes.first and not (out / SETTINGS).exists():
        given = {field.name: "given" for field in dataclasses.fields(settings)}
        Resolved(settings, origins or given).write(out / SETTINGS)

    def save() -> None:
        if processes.first:
            state.save(out / LAST)
        course.write(out, state)
        processes.wait()

    started = logged_at = time.perf_counter()
    logged: dict[str, float] = {}
    window: list[dict[str, Tensor]] = []
    text = ""
    with RunLog(out, state.step) if processes.first else nullcontext() as log, _Interruption() as interruption:
        stream = source.batches(state.step * settings.accumulate, processes.part)
        while state.step < settings.steps and not processes.any(interruption.asked, device):
            opened = course.open(state)
            if log is not None and opened:
                log.write(state.step + 1, opened)  # of the step that it comes before: a run resumed there opens, and says, it again
                logged_at = time.perf_counter()
            batches = _next_batches(stream, state, interruption)
            if batches is None:
                break
            with course.watched(state.step + 1) as details:
                window.append(take_step(state, batches))
            if log is not None and details:
                log.write(state.step, details, DETAILS)
            if state.step % settings.log_every == 0 or state.step == settings.steps or state.step in course.borders:
                logged = _mean(window)
                speed = len(window) / (time.perf_counter() - logged_at)
                window.clear()
                rate = rate_at(settings, state.step - 1)
                closed = course.close(state) if state.step in course.borders else {}
                if log is not None:
                    log.write(state.step, {**logged, **closed, "rate": rate, "steps_per_second": speed})
                logged_at = time.perf_counter()
                text = _progress_text(logged, rate, speed, settings.steps - state.step)
            if progress is not None and processes.first:
                progress(state.step, settings.steps, text)
            if state.step % settings.save_every == 0 and state.step < settings.steps:
                save()
        save()
    stopped = state.step < settings.steps
    if stopped:
        logger.warning("%s: stopped at step %d of %d; resume to go on", out, state.step, settings.steps)
    return TrainResult(
        folder=out,
        model=course.result(out),
        steps=state.step,
        interrupted=stopped,
        seconds=time.perf_counter() - started,
        losses=logged,
        ap=tuple(line for line in lines_of(out / LOG) if {"ap", "ap_opening"} & line.keys()),
        skipped=dict(source.skipped),
        repaired=dict(source.repaired),
        first=processes.first,
    )


def settings_of(out: Path) -> dict[str, Any]:
    """The settings of the run in the folder `out`, by name, as its state holds them."""
    _refuse_wrong_folder(out, resume=True)
    return dict(_read_state(out / LAST)["settings"])


def _next_batches(stream: Iterator[Batch], state: TrainingState, interruption: "_Interruption") -> list[Batch] | None:
    """All batches of one step, or None where the wait for them was interrupted."""
    settings = state.settings
    interruption.waiting = state.processes.count == 1  # others would wait for this one in the step
    try:
        batches = list(itertools.islice(stream, settings.accumulate))
    except KeyboardInterrupt:
        return None
    finally:
        interruption.waiting = False
    if len(batches) < settings.accumulate:
        raise UserError(f"the data ended at step {state.step}", remedy="give a source of batches that does not end")
    for batch in batches:
        if len(batch.images) * state.processes.count != settings.batch:
            given = len(batch.images) * state.processes.count
            raise UserError(f"the data gives {given} pictures a batch, the settings say {settings.batch}", remedy="make both the same")
    return [batch.to(state.device) for batch in batches]


def _mean(window: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    names = list(window[0])  # the same in all: a line of the log ends where terms change
    means = torch.stack([torch.stack([step[name].float() for name in names]) for step in window]).mean(0).tolist()
    values = dict(zip(names, means, strict=True))
    return {"loss": sum(value for name, value in values.items() if name != "gradient_norm"), **values}


def _progress_text(values: Mapping[str, float], rate: float, speed: float, left: int) -> str:
    seconds = round(left / speed)
    clock = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    terms = ", ".join(f"{name} {value:.2f}" for name, value in values.items() if name not in ("loss", "gradient_norm"))
    return f"loss {values['loss']:.2f} ({terms}), rate {rate:.1e}, {speed:.2f} steps/s, {clock} left"


class _Interruption:
    """Turns the first Ctrl-C into a wish that the loop grants between two steps; while data is waited for it breaks off the wait."""

    def __init__(self) -> None:
        self.asked = False
        self.waiting = False
        self._previous: Any = None

    def __enter__(self) -> "_Interruption":
        if threading.current_thread() is threading.main_thread():  # the only one that may handle signals
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self.asked = True
        if self.waiting:
            raise KeyboardInterrupt


# --- what can be wrong ---


def _stop_at_nonfinite(state: TrainingState, batches: Sequence[Batch], terms: Mapping[str, Tensor], norm: Tensor) -> None:
    """Raises before the optimizer takes a step on numbers that are not finite."""
    if torch.isfinite(torch.stack([norm, *terms.values()])).all():
        return
    wrong = [name for name, term in terms.items() if not torch.isfinite(term)]
    if not wrong and state.scaler.is_enabled() and state.scaler.get_scale() > 1:
        return  # half precision overflowed: the scaler leaves this step out and lowers its scale
    what = f"the loss is not finite ({', '.join(wrong)})" if wrong else "the gradients are not finite"
    raise NonFiniteError(
        f"{what}; the first such tensor is {_first_nonfinite(state, batches)}",
        where=f"step {state.step + 1}",
        remedy=REMEDY,
    )


@torch.no_grad()
def _first_nonfinite(state: TrainingState, batches: Sequence[Batch]) -> str:
    """The name of the first tensor that is not finite, in the order in which a step computes them."""
    wrong = _first_nonfinite_name(dict(state.model.named_parameters()))
    if wrong is not None:
        return f"the parameter {wrong}"
    for batch in batches:
        found = _nonfinite_activation(state, batch)
        if found is not None:
            return found
    backwards = reversed(list(state.model.named_parameters()))
    wrong = _first_nonfinite_name({name: parameter.grad for name, parameter in backwards if parameter.grad is not None})
    return "the loss itself" if wrong is None else f"the gradient of {wrong}"


def _first_nonfinite_name(tensors: Mapping[str, Tensor]) -> str | None:
    """Which of the tensors is the first that is not finite; asks the device once."""
    if not tensors:
        return None
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    return next((name for name, good in zip(tensors, finite, strict=True) if not good), None)


def _nonfinite_activation(state: TrainingState, batch: Batch) -> str | None:
    for name, tensor in (("text", batch.text), ("boxes", batch.truth.boxes)):
        if not torch.isfinite(tensor).all():
            return f"the batch's {name}"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"the output of {name}")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in state.model.named_modules()]
    try:
        _forward(state, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else None


def _refuse_wrong_folder(out: Path, resume: bool) -> None:
    if resume and not (out / LAST).is_file():
        raise UserError(f"holds no {LAST} to resume from", where=out, remedy="name a run's folder, or leave out --resume")
    held = next((name for name in (LAST, SETTINGS, LOG, MODEL) if (out / name).exists()), None)
    if not resume and held is not None:
        resumed = "give --resume to go on with it, or " if held == LAST else ""  # only a state can be gone on with
        raise UserError(f"holds a run already ({held})", where=out, remedy=f"{resumed}name another folder")


def _refuse_other_settings(saved: Mapping[str, Any], settings: LoopSettings, path: Path) -> None:
    for name, value in dataclasses.asdict(settings).items():
        if name not in settings.MAY_CHANGE and saved.get(name) != value:
            raise UserError(
                f"was trained with {name} {saved.get(name)}, not {value}", where=path, remedy="resume with the run's own settings"
            )


def _refuse_other_model(saved: Mapping[str, Any], present: Mapping[str, Tensor], path: Path) -> None:
    for part in ("model", "average"):
        tensors = saved[part]
        name = next((name for name in (*present, *tensors) if name not in tensors or name not in present), None)
        name = name or next((name for name in present if tensors[name].shape != present[name].shape), None)
        if name is not None:
            raise UserError(f"belongs to another model ({name} differs)", where=path, remedy="resume with the model it was started with")


_OF_DAMAGED_BYTES = (ValueError, LookupError, TypeError, AttributeError, AssertionError)  # what an unpickler may trip over


def _read_state(path: Path) -> dict[str, Any]:
    remedy = f"give a folder whose {LAST} training wrote"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, OSError, pickle.UnpicklingError, *_OF_DAMAGED_BYTES) as error:
        raise UserError("cannot be read as a training state", where=path, remedy=remedy) from error
    if not isinstance(saved, dict) or saved.get("format") != STATE_FORMAT:
        raise UserError("is no training state of this version", where=path, remedy=remedy)
    for name, sound in _PARTS.items():
        if name not in saved:
            raise _damaged(path, f"it has no {name}")
        if not sound(saved[name]):
            raise _damaged(path, f"its {name} is not what training writes")
    return saved


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _are_tensors(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, Tensor) for one in value.values())


_PARTS: Mapping[str, Callable[[Any], bool]] = {  # of a state, and what tells a sound one
    "settings": _is_dict,
    "data": lambda value: isinstance(value, str),
    "identity": _is_dict,
    "course": _is_dict,
    "step": _is_count,
    "model": _are_tensors,
    "average": _are_tensors,
    "average_updates": _is_count,
    "optimizer": _is_dict,
    "scaler": lambda value: isinstance(value, dict) and all(isinstance(one, int | float) for one in value.values()),
    "random": lambda value: isinstance(value, Tensor),
    "cuda_random": lambda value: isinstance(value, list) and all(isinstance(one, Tensor) for one in value),
}


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"is damaged: {how}", where=path, remedy="start again, or put back a copy that is whole")


def _other_optimizer(path: Path) -> UserError:
    return UserError(
        "is damaged, or of a model with other parts frozen: its optimizer does not fit",
        where=path,
        remedy="resume with the model it was started with, frozen alike",
    )
