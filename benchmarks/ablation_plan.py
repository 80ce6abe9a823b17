"""What the ablation runs, and by which rule its settings are chosen: the protocol as data (benchmarks/results/protocol.md says why).

A cell is one model, quantized one way, with one seed: it is prepared, calibrated, trained or not, and measured. Cells that a later table
needs again are the same cells. Tuning comes first, on seeds of its own; what follows takes the settings that it chose, by a rule that is
fixed here. Hence the plan grows: `plan` gives the cells that can be known from the results there are, in the order of their worth.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from crqat_fx.errors import UserError

Value = str | int | float | bool | None | tuple[float, ...]
Settings = Mapping[str, Value]

MODEL = "pico-v1"
SEEDS = (1, 2, 3, 4, 5)
TRIAL_SEED = 301  # of trials, which count nowhere
HEADLINE = "2-2-8"  # the widest at which PTQ falls under a tenth of full precision, and QAT ends under 60% of it
WIDTHS = ("4-4-8", "3-3-8", HEADLINE)
PUBLISHED = "conv-inputs"  # the target that the paper trains and counts
INTEGERS = "ort"

# of every cell; a training takes all of them but those in MEASURED
PROTOCOL: Settings = {
    "steps": 200,
    "batch": 16,
    "pictures": 8000,
    "texts": 40,
    "calibration": 256,
    "observer": "omse",
    "rate": 5e-4,
    "schedule": "constant",
    "warmup": 0,
    "weight_decay": 0.025,
    "clip": 10.0,
    "quantizer_rate": 0.1,
    "norm": "frozen",
    "reestimate": 0,  # frozen statistics are not estimated anew
    "ema": 0.1,
    "recalibrate": True,
    "kd_weight": 6.0,
    "pkd_factor": 1.0,
    "trkd_factor": 16.0,
    "evaluated": 250,
    "compared": 128,
}
MEASURED = ("evaluated", "compared")
QUICK: Settings = {"steps": 3, "batch": 2, "pictures": 8, "calibration": 4, "evaluated": 4, "compared": 2}

FULL_PRECISION = "fp32"
PTQ = {f"ptq-{observer}": observer for observer in ("minmax", "percentile", "omse")}
PTQ_CORRECTED = "ptq-omse-correct"
# a training by its name: what it changes of the protocol. `stages` is of the preparation
METHODS: Mapping[str, Settings] = {name: {"method": name} for name in ("qat", "cqat", "kd", "cr-qat")}
TRKD: Mapping[str, Settings] = {
    "no-trkd": {"method": "cr-qat", "relations": "none"},
    "region-text": {"method": "cr-qat", "relations": "region-text"},
    "region-region": {"method": "cr-qat", "relations": "region-region"},
}
THREE: Mapping[str, Settings] = {
    "cqat-3": {"method": "cqat", "stages": 3},
    "cr-qat-3": {"method": "cr-qat", "stages": 3},
    "cr-qat-3-neck": {"method": "cr-qat", "stages": 3, "neck_features": True},
}
# why does the order show, or not? Another rate; a second stage as long as all of QAT, the others as long; ranges kept; norms that move
WHY: Mapping[str, Settings] = {
    "qat-slow": {"method": "qat", "rate": 5e-4},
    "cr-qat-slow": {"method": "cr-qat", "rate": 5e-4},
    "cqat-slow": {"method": "cqat", "rate": 5e-4},
    "kd-slow": {"method": "kd", "rate": 5e-4},
    "cqat-300": {"method": "cqat", "steps": 300},
    "qat-300": {"method": "qat", "steps": 300},
    "cr-qat-300": {"method": "cr-qat", "steps": 300},
    "cqat-kept-ranges": {"method": "cqat", "recalibrate": False},
    "qat-norms": {"method": "qat", "norm": "train", "reestimate": 20},
    "cr-qat-norms": {"method": "cr-qat", "norm": "train", "reestimate": 20},
}
# norms corrected as stages are quantized (crqat_fx.correct_norms), and the constant rate given up
CORRECTED: Mapping[str, Settings] = {
    "qat-correct": {"method": "qat", "correct_norms": True},
    "qat-correct-decay": {"method": "qat", "correct_norms": True, "schedule": "linear"},
    "cr-qat-correct": {"method": "cr-qat", "correct_norms": True},
    "cr-qat-correct-decay": {"method": "cr-qat", "correct_norms": True, "schedule": "linear"},
}
PLUS = ("qat-correct-decay", "cr-qat-correct-decay")  # the method that came of it, and its rival without a curriculum: at the other widths
# and scales that learn: a tenth of the rate moves them by 2% in all
SCALES: Mapping[str, Settings] = {f"{name}-scales": {**CORRECTED[name], "quantizer_rate": 5.0} for name in PLUS}
PAST: Mapping[str, Settings] = {
    "qat-decay": {"method": "qat", "schedule": "linear"},
    "kd-decay": {"method": "kd", "schedule": "linear"},
    "cr-qat-decay": {"method": "cr-qat", "schedule": "linear"},
    "cr-qat-short": {"method": "cr-qat", "shares": (0.1, 0.9)},
    "cr-qat-short-decay": {"method": "cr-qat", "shares": (0.1, 0.9), "schedule": "linear"},
}
TRAININGS: Mapping[str, Settings] = {**METHODS, **TRKD, **THREE, **WHY, **CORRECTED, **SCALES, **PAST}


@dataclass(frozen=True)
class Cell:
    """`settings`: all that decides the result, beside recipe, target and seed."""

    name: str
    recipe: str
    target: str
    variant: str
    seed: int
    settings: Settings

    @property
    def trained(self) -> bool:
        return "method" in self.settings


@dataclass(frozen=True)
class Result:
    """What a cell gave. AP is in percent; `distortion` is by kind, then space."""

    cell: Cell
    ap: Mapping[str, float | None]
    distortion: Mapping[str, Mapping[str, float | None]]
    log: Mapping[str, tuple[float | None, ...]]  # of the training, by step
    seconds: Mapping[str, float]  # of the processor
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Tuning:
    """One choice: the candidate with the highest mean AP over seeds that nothing else uses. Equal ones: the first. One that is `BEHIND` the
    best with the first seed is out, and not run with the others."""

    method: str
    seeds: tuple[int, ...]
    candidates: tuple[Settings, ...]


BEHIND = 10.0  # AP
TUNING = (
    Tuning("qat", (101, 102), ({"rate": 2e-4}, {"rate": 5e-4}, {"rate": 1e-3}, {"rate": 2e-3}, {"rate": 4e-3})),
    Tuning("qat", (101, 102), ({"ema": 0.1}, {"ema": 0.3})),
    Tuning("cr-qat", (201, 202), ({"trkd_factor": 1.0}, {"trkd_factor": 16.0})),
)


@dataclass(frozen=True)
class Block:
    """Some variants of one recipe, seed by seed: all of one seed before the next, so that a stop leaves whole pairs."""

    recipe: str
    variants: tuple[str, ...]
    target: str = PUBLISHED
    seeds: tuple[int, ...] = field(default=SEEDS)


UNTRAINED = (
    Block(FULL_PRECISION, (FULL_PRECISION,), seeds=SEEDS[:1]),
    *(Block(recipe, tuple(PTQ), seeds=SEEDS[:1]) for recipe in WIDTHS),
)
OTHER_SEEDS = tuple(Block(recipe, tuple(PTQ), seeds=SEEDS[1:]) for recipe in WIDTHS)  # wait for no tuning
TRAINED = (
    Block(HEADLINE, tuple(METHODS)),
    Block(HEADLINE, tuple(TRKD)),
    Block(HEADLINE, tuple(THREE)),
    *OTHER_SEEDS,
    Block("3-3-8", tuple(METHODS)),
    Block("4-4-8", tuple(METHODS)),
    *(Block(recipe, (PTQ_CORRECTED,)) for recipe in WIDTHS),
    Block(HEADLINE, tuple(CORRECTED)),
    Block(HEADLINE, tuple(WHY)),
    Block(HEADLINE, tuple(PAST)),
    Block("3-3-8", PLUS),
    Block("4-4-8", PLUS),
    Block("4-8-8", ("ptq-omse", "qat", "cr-qat")),
    Block("4-8-8-int", ("ptq-omse", "qat", "cr-qat"), INTEGERS),
    Block("4-4-8", ("ptq-omse", "qat", "cr-qat"), INTEGERS),
    Block(HEADLINE, tuple(SCALES)),
    *(Block(recipe, ("cr-qat-correct-decay-scales",)) for recipe in ("3-3-8", "4-4-8")),
    Block(f"{HEADLINE}-ch", ("ptq-omse", "qat", "cr-qat")),
    Block("3-3-8-ch", ("ptq-omse", "qat", "cr-qat")),
    Block(f"{HEADLINE}-odd", ("ptq-omse", PTQ_CORRECTED, *PLUS)),
)


def plan(results: Mapping[str, Result], protocol: Settings = PROTOCOL) -> list[Cell]:
    """The cells that can be known, in the order in which they are to be run."""
    cells = [cell for block in UNTRAINED for cell in _of_block(block, protocol)]
    settings = protocol
    for tuning in TUNING:
        cells += tuning_cells(tuning, settings, results)
        chosen = choose(tuning, settings, results)
        if chosen is None:
            break
        settings = chosen
    else:
        cells += [cell for block in TRAINED for cell in _of_block(block, settings)]
    cells += [cell for block in OTHER_SEEDS for cell in _of_block(block, settings)]  # while tuning has less to do than there are jobs
    return list({cell.name: cell for cell in cells}.values())


def tuning_cells(tuning: Tuning, settings: Settings, results: Mapping[str, Result]) -> list[Cell]:
    """Seed by seed, like everything; of the first seed alone until that is measured."""
    first, *others = tuning.seeds
    candidates = _kept(tuning, settings, results)
    return [tuning_cell(tuning, settings, candidate, first) for candidate in tuning.candidates] + [
        tuning_cell(tuning, settings, candidate, seed) for seed in others for candidate in candidates
    ]


def choose(tuning: Tuning, settings: Settings, results: Mapping[str, Result]) -> Settings | None:
    """The settings with the best candidate in them; None until all are measured."""
    if any(cell.name not in results for cell in tuning_cells(tuning, settings, results)):
        return None
    kept = _kept(tuning, settings, results)
    means = [statistics.fmean(_tuned(tuning, settings, candidate, seed, results) for seed in tuning.seeds) for candidate in kept]
    return {**settings, **kept[means.index(max(means))]}


def _kept(tuning: Tuning, settings: Settings, results: Mapping[str, Result]) -> list[Settings]:
    """The candidates that are worth their other seeds: none before all have their first."""
    first = tuning.seeds[0]
    if any(tuning_cell(tuning, settings, candidate, first).name not in results for candidate in tuning.candidates):
        return []
    values = [_tuned(tuning, settings, candidate, first, results) for candidate in tuning.candidates]
    return [candidate for candidate, value in zip(tuning.candidates, values, strict=True) if value > max(values) - BEHIND]


def _tuned(tuning: Tuning, settings: Settings, candidate: Settings, seed: int, results: Mapping[str, Result]) -> float:
    return results[tuning_cell(tuning, settings, candidate, seed).name].ap["all"] or 0.0


def trial_cell(name: str, changes: Sequence[str], results: Mapping[str, Result]) -> Cell:
    """RECIPE/TARGET/VARIANT on the seed of trials, with settings changed: NAME=VALUE each, the value JSON or a bare word."""
    asked = " ".join((name, *changes))
    try:
        recipe, target, variant = name.split("/")
        changed = dict(change.split("=") for change in changes)
    except ValueError:
        raise UserError(f"{asked!r} is no trial", remedy="give RECIPE/TARGET/VARIANT [NAME=VALUE ...]") from None
    if variant not in (FULL_PRECISION, *PTQ, PTQ_CORRECTED, *TRAININGS):
        raise UserError(f"unknown variant {variant!r}", remedy=f"choose among {', '.join((*PTQ, PTQ_CORRECTED, *TRAININGS))}")
    settings: Settings | None = PROTOCOL
    for tuning in TUNING:
        settings = None if settings is None else choose(tuning, settings, results)
    if settings is None:
        raise UserError("the settings are not tuned yet", remedy="run the cells of tuning/ first")
    cell = cell_of(recipe, target, variant, TRIAL_SEED, settings)
    others = TRAININGS.values() if cell.trained else ()
    known = {key: value for own in (*others, cell.settings) for key, value in own.items()}
    for setting in changed:
        if setting not in known:
            raise UserError(f"unknown setting {setting!r}", remedy=f"choose among {', '.join(sorted(known))}")
    values = {setting: _value(setting, text, known[setting]) for setting, text in changed.items()}
    return replace(cell, name=f"trial/{asked}", settings={**cell.settings, **values})


def _value(setting: str, text: str, known: Value) -> Value:
    """What a trial gives a setting, of the kind that it has."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(known, float) and type(value) is int:
        value = float(value)
    if isinstance(value, list) and isinstance(known, tuple):
        value = tuple(value)
    if type(value) is not type(known):
        raise UserError(f"{setting} is {text}", remedy=f"give it as it is known: {json.dumps(known)}")
    return value


def quick_cells() -> list[Cell]:
    """One tiny cell of each kind."""
    protocol = {**PROTOCOL, **QUICK}
    kinds = [(FULL_PRECISION, FULL_PRECISION), *((HEADLINE, name) for name in (PTQ_CORRECTED, "qat", "cr-qat-3-neck", "qat-correct"))]
    return [cell_of(recipe, PUBLISHED, variant, SEEDS[0], protocol) for recipe, variant in kinds]


def cell_of(recipe: str, target: str, variant: str, seed: int, protocol: Settings) -> Cell:
    """A cell by what it is called."""
    measured = {name: protocol[name] for name in MEASURED}
    if variant == FULL_PRECISION:
        settings: Settings = measured
    elif variant in PTQ:
        settings = {**measured, "calibration": protocol["calibration"], "observer": PTQ[variant]}
    elif variant == PTQ_CORRECTED:
        settings = {**measured, "calibration": protocol["calibration"], "observer": protocol["observer"], "correct_norms": True}
    else:
        settings = {**protocol, **TRAININGS[variant]}
    return Cell(f"{recipe}/{target}/{variant}.{seed}", recipe, target, variant, seed, settings)


def _of_block(block: Block, protocol: Settings) -> Iterator[Cell]:
    for seed in block.seeds:
        for variant in block.variants:
            yield cell_of(block.recipe, block.target, variant, seed, protocol)


def tuning_cell(tuning: Tuning, settings: Settings, candidate: Settings, seed: int) -> Cell:
    """Named by all that tuning moves, so that a candidate which is the choice so far is the cell that there is."""
    moved = {**settings, **candidate}
    kind = [each for each in TUNING if each.method == tuning.method]
    names = sorted({name for each in kind for one in each.candidates for name in one})
    shown = ",".join([tuning.method, *(f"{name}={moved[name]:g}" for name in names)])
    return Cell(f"tuning/{shown}.{seed}", HEADLINE, PUBLISHED, tuning.method, seed, {**moved, **METHODS[tuning.method]})
