"""Does the published ablation hold? Every method at every width, its parts, and what comes after it, by benchmarks/results/protocol.md.

python benchmarks/ablation.py [--jobs N] [--only GLOB ...] [--list | --render | --again | --quick | --trial CELL ...] [--results FOLDER]

Cells run in the order of their worth, each in one thread; a cell's result is a file, RESULTS/RECIPE/TARGET/VARIANT.SEED.json. What is
there is not run again, so that a run goes on where it stopped; to have a cell anew, delete its file. --only runs the cells whose name
matches (`*/cr-qat.1`), --list shows them all, --render writes the tables, RESULTS.md. --again runs them beside what is there, in
RESULTS-again: kernels of another processor round otherwise. --trial runs one on a seed that counts nowhere, with settings changed, and
keeps nothing: `--trial 2-2-8/conv-inputs/cr-qat steps=2000`. All of it takes 7 to 11 hours of one core with AVX-512, some 23 without.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes of --jobs

import argparse
import dataclasses
import fnmatch
import functools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from ablation_plan import MEASURED, MODEL, Cell, Result, plan, quick_cells, trial_cell
from ablation_tables import tables

import crqat_fx
from crqat_fx.checkpoint import load_model
from crqat_fx.correct_norms import correct_norms
from crqat_fx.data.samples import Sample
from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.data.shapes_batches import ShapesBatches
from crqat_fx.distortion import distortion
from crqat_fx.errors import UserError
from crqat_fx.evaluate import evaluate
from crqat_fx.files import written
from crqat_fx.json_form import load_json
from crqat_fx.models.yolo_world import YoloWorld
from crqat_fx.qat import PREPARED, QatSettings, train_prepared
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import load_prepared, prepare
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.runlog import LOG
from crqat_fx.torch_detector import TorchDetector

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "ablation"
OF_PREPARATION = ("stages",)
UNLOGGED = ("step", "steps_per_second")  # columns of a training's log that are left out


class DrawnOnce(ShapesTask):
    """Keeps what it draws: cells that follow each other in a process see many of the same pictures."""

    @cached_property
    def _kept(self) -> dict[tuple[str, int], Sample]:
        return {}

    def draw(self, split: str, index: int) -> Sample:
        if (split, index) not in self._kept:
            self._kept[split, index] = super().draw(split, index)
        return self._kept[split, index]


@functools.cache
def drawn_task() -> DrawnOnce:
    torch.set_num_threads(1)
    return DrawnOnce()


# --- a cell ---


def run_cell(cell: Cell) -> Result:
    task = drawn_task()
    started = time.process_time()
    teacher, _ = load_model(MODEL)
    model: torch.nn.Module = teacher
    log: dict[str, tuple[float | None, ...]] = {}
    if "observer" in cell.settings:
        prepared = prepared_for(cell, teacher, task)
        if cell.trained:
            prepared, log = trained(cell, prepared, task)
        model = prepared.graph
    finished = time.process_time()
    pictures = ShapesSet(task, "val", int_of(cell, "evaluated"))
    found = evaluate(TorchDetector(model.eval(), task.vocabulary, task.size), pictures)
    drift = distortion(
        model, load_model(MODEL)[0].eval(), pictures, task.vocabulary, size=task.size, limit=int_of(cell, "compared"), examples=0
    )
    return Result(
        cell=cell,
        ap={name: scores.ap for name, scores in {"all": found.scores, **found.split, **found.frequency}.items()},
        distortion={"region_text": drift.region_text.as_dict(), "region_region": drift.region_region.as_dict()},
        log=log,
        seconds={"prepared and trained": round(finished - started, 1), "measured": round(time.process_time() - finished, 1)},
        versions=versions(),
    )


def prepared_for(cell: Cell, model: YoloWorld, task: ShapesTask) -> Prepared:
    """Calibrated on pictures of the seed's own."""
    prepared = prepare(
        model, None, cell.recipe, cell.target, vocabulary=task.vocabulary, size=task.size,
        stages=cell.settings.get("stages", 2),  # type: ignore[arg-type]
    )  # fmt: skip
    count = int_of(cell, "calibration")
    drawn = [task.draw("calibration", index).image for index in range(cell.seed * count, (cell.seed + 1) * count)]
    calibrate(prepared, picture_batches(prepared, drawn), str(cell.settings["observer"]), count)
    if not cell.trained and cell.settings.get("correct_norms"):  # a training does so as its phases open
        correct_norms(prepared, picture_batches(prepared, drawn), count)
    return prepared


def trained(cell: Cell, prepared: Prepared, task: ShapesTask) -> tuple[Prepared, dict[str, tuple[float | None, ...]]]:
    """The average of a training on batches of the seed's own, and what the training logged."""
    settings = settings_of(cell, task)
    # the task keeps the pictures: the batches need not
    source = ShapesBatches(task, settings.pictures, settings.batch, settings.texts, seed=settings.seed, memory=0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train_prepared(prepared, source, settings, out, teacher=load_model(MODEL)[0])
        lines = [json.loads(line) for line in (out / LOG).read_text(encoding="utf-8").splitlines()]
        return load_prepared(out / PREPARED), columns(lines)


def settings_of(cell: Cell, task: ShapesTask) -> QatSettings:
    given: dict[str, Any] = {name: value for name, value in cell.settings.items() if name not in (*MEASURED, *OF_PREPARATION)}
    return QatSettings(**given, size=task.size, seed=cell.seed, threads=1)


def columns(lines: list[Mapping[str, float]]) -> dict[str, tuple[float | None, ...]]:
    """A log by column: a loss that acts in some phases alone is None in the others."""
    names = {name: None for line in lines for name in line if name not in UNLOGGED}
    found = {name: tuple(None if name not in line else float(f"{line[name]:.4g}") for line in lines) for name in names}
    return {"step": tuple(float(line["step"]) for line in lines), **found}


def int_of(cell: Cell, name: str) -> int:
    value = cell.settings[name]
    assert isinstance(value, int)
    return value


def versions() -> dict[str, str]:
    """What a result hangs on beside its cell. `processor`: the kernels that torch takes on it, which do not round alike."""
    return {
        "crqat-fx": crqat_fx.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


@functools.cache
def commit() -> str:
    """The last that changed the library, `+` after it where there are changes beside."""

    def git(*arguments: str) -> str:
        paths = ("--", "crqat_fx", "passes")
        return subprocess.run(["git", *arguments, *paths], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h", "--abbrev=12") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not run in a checkout"


# --- results ---


def save(result: Result, folder: Path) -> None:
    """One line a field: a log is no reading matter."""
    plain = dataclasses.asdict(result)
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in plain.items()]
    with written(path_of(result.cell, folder)) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def path_of(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.name}.json"


def read_results(folder: Path) -> dict[str, Result]:
    """By name. A file that was cut short counts as none: its cell is run again."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            result = load_json(Result, path)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        found[result.cell.name] = result
    return found


def again_in(folder: Path) -> Path:
    """Where the results of --again are kept."""
    return folder.with_name(f"{folder.name}-again")


def refuse_other_settings(cells: Iterable[Cell], results: Mapping[str, Result], folder: Path) -> None:
    """A result counts for its cell alone: one of an earlier plan must not pass for another."""
    for cell in cells:
        if cell.name in results and results[cell.name].cell != cell:
            raise UserError("is of a cell with other settings than the plan's", where=path_of(cell, folder), remedy="delete it")


# --- running ---


def is_asked(cell: Cell, only: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(cell.name, glob) for glob in only)


def run_cells(folder: Path, only: Sequence[str], jobs: int, again: bool = False) -> bool:
    """Runs what is missing, in the order of the plan, which grows with the results; whether every cell ended well."""
    kept = again_in(folder) if again else folder
    failed: set[str] = set()
    running: dict[Future[Result], Cell] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        while True:
            results = read_results(folder)
            cells = plan(results)
            refuse_other_settings(cells, results, folder)
            asked = [cell for cell in cells if is_asked(cell, only)]
            if not asked:
                raise UserError(f"no cell is called {' or '.join(only)}", where="--only", remedy="see them with --list; more follow tuning")
            done = results
            if again:
                asked = [cell for cell in asked if cell.name in results]
                done = read_results(kept)
                refuse_other_settings(cells, done, kept)
            busy = {cell.name for cell in running.values()} | failed
            missing = [cell for cell in asked if cell.name not in done and cell.name not in busy]
            running |= {pool.submit(run_cell, cell): cell for cell in missing[: jobs - len(running)]}
            if not running:
                return not failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    save(future.result(), kept)
                except UserError as error:
                    failed.add(cell.name)
                    print(f"{cell.name}: {error}", file=sys.stderr, flush=True)
                    continue
                tell(future.result())


def tell(result: Result) -> None:
    ap = "  ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in result.ap.items())
    print(f"{result.cell.name:48} AP {ap}  ({sum(result.seconds.values()):.0f} s)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, one thread each (default: 1)")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="the cells whose name matches")
    deed = parser.add_mutually_exclusive_group()
    deed.add_argument("--list", action="store_true", help="show the cells that are known so far")
    deed.add_argument("--render", action="store_true", help="write the tables beside the results' folder")
    deed.add_argument("--again", action="store_true", help="run them beside the results that there are, in a folder of its own")
    deed.add_argument("--quick", action="store_true", help="one tiny cell of each kind, kept nowhere: only to see that they run")
    deed.add_argument(
        "--trial", nargs="+", metavar="WORD", help="RECIPE/TARGET/VARIANT [NAME=VALUE ...]: one cell of another seed, kept nowhere"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}: give 1 or more")
    if options.quick:
        for cell in quick_cells():
            tell(run_cell(cell))
        return 0
    if options.trial is not None:
        name, *changes = options.trial
        cell = trial_cell(name, changes, read_results(options.results))
        if cell.trained:
            settings_of(cell, drawn_task())  # refuses what makes no sense before anything is prepared
        tell(run_cell(cell))
        return 0
    if options.list:
        results = read_results(options.results)
        for cell in plan(results):
            if is_asked(cell, options.only):
                print(f"{'done' if cell.name in results else '':6}{cell.name}")
        return 0
    if options.render:
        folders = (options.results, again_in(options.results))
        results, again = map(read_results, folders)
        cells = plan(results)
        for folder, kept in zip(folders, (results, again), strict=True):
            refuse_other_settings(cells, kept, folder)
        with written(options.results.with_suffix(".md")) as temporary:
            temporary.write_text(tables(results, again), encoding="utf-8")
        return 0
    return 0 if run_cells(options.results, options.only, options.jobs, options.again) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # what reads it, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
