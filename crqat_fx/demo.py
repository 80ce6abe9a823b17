"""The whole product on what the package carries: the shipped v2 model and the drawn task, with no download and no file of the user's.

    out/fp32.onnx               the shipped model as it is written: what the others are compared with
    out/RECIPE/prepared.pt      with quantizers, their ranges set on pictures, not trained; ptq.onnx is that, exported
    out/RECIPE/run/             trained by the curriculum, the shipped model as its teacher; cr-qat.onnx is that, exported
    out/study.json              what was measured of all of them, in onnxruntime
    out/report.html             that as a page

All of these are files as the commands write them, and as they take them.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from crqat_fx.checkpoint import load_model
from crqat_fx.data.opening import SHAPES, open_pictures
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.errors import UserError
from crqat_fx.export import export
from crqat_fx.findings import STUDY, Study
from crqat_fx.progress import Progress
from crqat_fx.qat import PREPARED, QatSettings, train_file
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import load_prepared, prepare
from crqat_fx.report import write_report
from crqat_fx.study import Contender, StudySettings, study
from crqat_fx.train import LAST

MODEL = "pico-v2"
RECIPES = {"8-8-8-int": False, "4-8-8-int": True, "4-4-8": True}  # and whether it is trained as well
RATE = 5e-4  # for a few hundred steps; the published training takes a hundred times as many at less
REPORT = "report.html"

Begin = Callable[[str], AbstractContextManager[Progress]]  # of a deed, by what it is called; its progress is told to what comes back


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the command `demo`: for under ten minutes on two cores."""

    steps: int = 240  # of each training
    pictures: int = 500  # that AP is measured on; in training a fifth of them
    calibration: int = 128  # pictures that ranges are set on
    compared: int = 64  # pictures that drift is measured on; 0: none
    rounds: int = 9  # of the bench

    def __post_init__(self) -> None:
        for name, least in {"steps": 2, "pictures": 1, "calibration": 1, "rounds": 1}.items():  # a curriculum has two phases
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}", where=f"--{name}", remedy=f"give a number from {least}")


@dataclass(frozen=True)
class QuickSettings(DemoSettings):
    """Of `demo --quick`: for under two minutes, to see it work and not to judge by."""

    steps: int = 18
    pictures: int = 60
    calibration: int = 32
    compared: int = 8
    rounds: int = 5


@contextmanager
def _untold(_what: str) -> Iterator[Progress]:
    yield lambda _done, _total, _at: None


def demo(out: Path, settings: DemoSettings | None = None, begin: Begin = _untold) -> Study:
    """Quantizes the shipped model by each recipe, trains it where a recipe asks for it, exports every form, verifies, scores and times
    them, and writes the report. What an earlier demo left in `out` is replaced."""
    asked = settings or DemoSettings()
    _make_way(out)
    deeds = _numbered(begin, 1 + len(RECIPES) + sum(RECIPES.values()))
    contenders = [Contender("FP32", MODEL, out / "fp32.onnx")]
    for recipe, trained in RECIPES.items():
        with deeds(f"PTQ at {recipe}") as progress:
            contenders.append(_calibrated(out / recipe, recipe, asked, progress))
        if trained:
            with deeds(f"CR-QAT at {recipe}") as progress:
                contenders.append(_trained(out / recipe, recipe, asked, progress))
    with deeds("verify, evaluate and time all in onnxruntime") as progress:
        model, _ = load_model(MODEL)
        export(model, out / "fp32.onnx", vocabulary=ShapesTask().vocabulary, form="straight", size=ShapesTask.size)
        noise = min(asked.compared, StudySettings.noise)
        measured = StudySettings(pictures=asked.pictures, compared=asked.compared, noise=noise, rounds=asked.rounds)
        found = study(contenders, SHAPES, measured, title=f"{MODEL} on the drawn task", progress=progress)
        found.save(out / STUDY)
        write_report(found, out / REPORT)
    return found


def _calibrated(folder: Path, recipe: str, settings: DemoSettings, progress: Progress) -> Contender:
    model, _ = load_model(MODEL)
    task = ShapesTask()
    prepared = prepare(model, recipe=recipe, vocabulary=task.vocabulary, size=task.size, take_over=True)
    shown = open_pictures(SHAPES, task.size, settings.calibration)
    calibrate(prepared, picture_batches(prepared, shown), count=settings.calibration, progress=progress)
    prepared.save(folder / PREPARED)
    export(prepared, folder / "ptq.onnx")
    return Contender(f"PTQ {recipe}", str(folder / PREPARED), folder / "ptq.onnx")


def _trained(folder: Path, recipe: str, settings: DemoSettings, progress: Progress) -> Contender:
    training = QatSettings(
        steps=settings.steps, rate=RATE, norm="frozen", teacher=MODEL, size=ShapesTask.size, calibration=settings.calibration,
        ap_pictures=settings.pictures // 5, watch_every=max(1, settings.steps // 12),
    )  # fmt: skip
    result = train_file(folder / PREPARED, training, folder / "run", progress=progress)
    if result.interrupted:
        raise KeyboardInterrupt
    export(load_prepared(result.model), folder / "cr-qat.onnx")
    return Contender(f"CR-QAT {recipe}", str(result.model), folder / "cr-qat.onnx", run=folder / "run")


def _numbered(begin: Begin, total: int) -> Begin:
    """Says of each deed which of how many it is."""
    waiting = iter(range(1, total + 1))
    return lambda what: begin(f"{next(waiting)} of {total}: {what}")


def _make_way(out: Path) -> None:
    """Removes an earlier demo's runs, which training would not replace, and its report, which is not to stand beside others' models."""
    runs = [out / recipe / "run" for recipe, trained in RECIPES.items() if trained and (out / recipe / "run").exists()]
    for run in runs:
        if not (run / LAST).is_file():
            raise UserError("is in the way, and no run of training", where=run, remedy="remove it, or name another folder with --out")
    for run in runs:
        shutil.rmtree(run)
    for name in (STUDY, REPORT):
        (out / name).unlink(missing_ok=True)
