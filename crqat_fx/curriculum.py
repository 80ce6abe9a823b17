"""Which stages are quantized, trained and taught, and when: a training is a list of phases, and a phase is data.

    method         phases                                   losses
    qat            everything at once                       the task's
    kd             everything at once                       the task's, every stage taught by the teacher
    cqat           stage k quantizes and trains 1 .. k      the task's
    cr-qat         the same                                 the task's, stages 1 .. k taught
    cr-qat-plus    the same                                 the same; norms frozen, and corrected as stages are quantized; the rate decays

The last is none of the paper's: what `benchmarks/results/ablation.md` found beyond it.

What lies behind the stages of a phase stays in full precision, and frozen. A stage that has been taught once is taught on.

    stages                   taught by
    backbone, neck-head      pkd     trkd
    backbone, neck, head     pkd     neck-pkd, if asked for     trkd
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from crqat_fx.errors import UserError

Method = Literal["cr-qat", "cr-qat-plus", "qat", "cqat", "kd"]
Norm = Literal["train", "frozen"]

TASK, BACKBONE_FEATURES, NECK_FEATURES, RELATIONS = "task", "pkd", "neck-pkd", "trkd"
LOSSES = (TASK, BACKBONE_FEATURES, NECK_FEATURES, RELATIONS)
BY_STAGES, TAUGHT = ("cr-qat", "cr-qat-plus", "cqat"), ("cr-qat", "cr-qat-plus", "kd")  # methods
SHARES: Mapping[int, tuple[float, ...]] = {1: (1.0,), 2: (1 / 3, 2 / 3), 3: (1 / 3, 1 / 3, 1 / 3)}  # of the steps; two are published
EMA = 0.1


@dataclass(frozen=True)
class Phase:
    """Which stages are quantized and which are trained, on what losses and for how long."""

    quantized: tuple[str, ...]
    trained: tuple[str, ...]
    norm: Norm = "train"  # whether the norms of trained stages keep their statistics; those of frozen stages always do
    losses: tuple[str, ...] = (TASK,)
    share: float = 1.0  # of the steps
    recalibrate: bool = True  # stages that the phase quantizes anew get their ranges from the student as it is when the phase opens
    ema: float = EMA  # how far back the average looks, as a share of the phase; it starts again with the phase
    correct_norms: bool = False  # stages that the phase quantizes anew get their channels' float means and deviations back

    def __post_init__(self) -> None:
        for name in self.losses:
            if name not in LOSSES:
                raise _wrong(f"unknown loss {name!r}", f"choose among {', '.join(LOSSES)}")
        if TASK not in self.losses:
            raise _wrong(f"the losses {', '.join(self.losses) or 'of a phase'} lack {TASK!r}", f"add {TASK}")
        if self.norm not in get_args(Norm):
            raise _wrong(f"norm is {self.norm!r}", f"give {' or '.join(get_args(Norm))}")
        if self.correct_norms and self.norm != "frozen":
            raise _wrong(
                "norms are to be corrected whose statistics train, and correct themselves",
                "freeze them (norm: frozen), or keep them (--keep-norms)",
            )
        if not 0 < self.share <= 1:
            raise _wrong(f"share is {self.share}", "give a number above 0, at most 1")
        if not 0 <= self.ema <= 1:
            raise _wrong(f"ema is {self.ema}", "give a share of the phase, 0 to 1")

    @property
    def taught(self) -> bool:
        return any(name != TASK for name in self.losses)


def curriculum(
    method: Method,
    stages: Sequence[str],
    *,
    neck_features: bool = False,
    norm: Norm = "train",
    recalibrate: bool = True,
    ema: float = EMA,
    correct_norms: bool = False,
    shares: Sequence[float] | None = None,
) -> tuple[Phase, ...]:
    """The phases of a method for a model of these stages, in the order of the data."""
    if method not in get_args(Method):
        raise UserError(f"unknown method {method!r}", where="--method", remedy=f"choose among {', '.join(get_args(Method))}")
    if neck_features and (len(stages) != 3 or method not in TAUGHT):
        raise UserError(
            "neck features are taught where a curriculum has three stages and a teacher",
            where="neck_features",
            remedy="prepare the model with --stages 3 and train it with cr-qat, cr-qat-plus or kd, or leave it out",
        )
    taught = method in TAUGHT
    ends = range(1, len(stages) + 1) if method in BY_STAGES else (len(stages),)
    parts = SHARES.get(len(ends)) if shares is None else tuple(shares)
    if parts is None or len(parts) != len(ends):
        raise UserError(f"{len(parts or ())} shares for {len(ends)} phases", where="shares", remedy="give one for each phase")
    phases = []
    for end, share in zip(ends, parts, strict=True):
        units = tuple(stages[:end])
        losses = (TASK, *_teaching(stages, end, neck_features)) if taught else (TASK,)
        phases.append(Phase(units, units, norm, losses, share, recalibrate, ema, correct_norms))
    return tuple(phases)


def _teaching(stages: Sequence[str], end: int, neck_features: bool) -> list[str]:
    """The losses of the first `end` stages: features but for the last of all, whose regions are related to texts."""
    names: list[str] = []
    for number in range(end):
        if number == len(stages) - 1:
            names.append(RELATIONS)
        elif number == 0:
            names.append(BACKBONE_FEATURES)
        elif neck_features:
            names.append(NECK_FEATURES)
    return names


def read_phases(given: Sequence[Any], common: Mapping[str, Any] | None = None) -> tuple[Phase, ...]:
    """Phases out of plain data, as a run file holds them. `common` are values of the fields that a phase leaves out."""
    known = {field.name: field for field in dataclasses.fields(Phase)}
    phases = []
    for number, entry in enumerate(given, 1):
        if not isinstance(entry, Mapping):
            raise _wrong(f"phase {number} is {entry!r:.60}", f"give a mapping of {', '.join(known)}")
        unknown = next((name for name in entry if name not in known), None)
        if unknown is not None:
            raise _wrong(f"phase {number} has an unknown key {unknown!r}", f"known are {', '.join(known)}")
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list | tuple) else value for name, value in entry.items()}
        for name, value in values.items():
            if not _fits(value, known[name].type):
                raise _wrong(f"phase {number}: {name} is {entry[name]!r}", f"give {_kind(known[name].type)}")
        for name in ("quantized", "trained"):
            if name not in values:
                raise _wrong(f"phase {number} has no {name!r}", "name its stages")
        phases.append(Phase(**{**(common or {}), **values}))
    return tuple(phases)


def _fits(value: Any, kind: Any) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is Norm:
        return isinstance(value, str)
    return isinstance(value, tuple) and all(isinstance(each, str) for each in value)


def _kind(kind: Any) -> str:
    return {bool: "true or false", float: "a number", Norm: "train or frozen"}.get(kind, "a list of names")


def borders(phases: Sequence[Phase], steps: int) -> tuple[int, ...]:
    """The step at which each phase opens, and at last the end of all."""
    if not phases:
        raise _wrong("there is no phase", "give one at least")
    total = math.fsum(phase.share for phase in phases)
    if abs(total - 1) > 1e-6:
        raise _wrong(f"the shares add up to {total:g}", "make them 1 together")
    ends = (0, *(round(steps * done) for done in itertools.accumulate(phase.share for phase in phases)))
    if steps and any(first == last for first, last in itertools.pairwise(ends)):
        raise _wrong(f"{steps} steps leave a phase without one", "train for more steps, or with fewer phases")
    return ends


def newly_quantized(phases: Sequence[Phase], index: int) -> tuple[str, ...]:
    """The stages that a phase quantizes and the one before it does not."""
    before = phases[index - 1].quantized if index else ()
    return tuple(stage for stage in phases[index].quantized if stage not in before)


def _wrong(what: str, remedy: str) -> UserError:
    return UserError(what, where="the curriculum", remedy=remedy)
