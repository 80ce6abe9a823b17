"""What a training run left on record of its way: its phases, out of its settings, and the curves of its log.

Lines that cannot be read (the one that was being written when a run was killed) and numbers that are not finite are left out.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crqat_fx.curriculum import borders
from crqat_fx.errors import UserError
from crqat_fx.findings import Curve, Training, TrainingPhase
from crqat_fx.qat import QatSettings
from crqat_fx.runlog import DETAILS, LOG, lines_of
from crqat_fx.settings import resolve
from crqat_fx.train import SETTINGS

WEIGHT = "weight_fake_quant"  # how a quantizer's name ends that rounds a weight
WATCHED = {"clipped": ("activations", "weights"), "flipped": ("weights",)}  # shares, and what they are told of


def settings_of_run(folder: Path) -> QatSettings:
    """What a run was started with."""
    path = folder / SETTINGS
    if not path.is_file():
        raise UserError(f"holds no {SETTINGS}", where=folder, remedy="name a folder that `crqat-fx train` wrote")
    return resolve(QatSettings, {}, path).values


def training_of(folder: Path, stages: Sequence[str]) -> Training:
    """The way of the run in a folder; `stages` are those of its model."""
    settings = settings_of_run(folder)
    phases = settings.plan(tuple(stages))
    opens = borders(phases, settings.steps)
    return Training(
        method=settings.method,
        teacher=settings.teacher if any(phase.taught for phase in phases) else None,
        planned=settings.steps,
        phases=tuple(
            TrainingPhase(first, last, phase.quantized, phase.trained, phase.losses)
            for phase, first, last in zip(phases, opens, opens[1:], strict=False)
        ),
        log=_curves(lines_of(folder / LOG)),
        watched=_curves(_shares(line) for line in lines_of(folder / DETAILS)),
    )


def _shares(line: dict[str, Any]) -> dict[str, Any]:
    """The means over quantizers of what is watched of each."""
    found: dict[str, list[float]] = {}
    for key, value in line.items():
        share, _, name = key.partition("/")
        kind = "weights" if name.endswith(WEIGHT) else "activations"
        if kind in WATCHED.get(share, ()) and _is_number(value):
            found.setdefault(f"{share} {kind}", []).append(value)
    return {"step": line["step"], **{name: statistics.fmean(values) for name, values in found.items()}}


def _curves(lines: Iterator[dict[str, Any]]) -> dict[str, Curve]:
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and _is_number(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(float(value))
    return {name: Curve(tuple(steps), tuple(values)) for name, (steps, values) in found.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
