"""What the inference benchmarks share: their options, files that are written once and timed in turns, tables, and results that are kept.

A benchmark is a few questions, each asked of each model, so that any of them can be asked alone. With --json the answers are written as
they come, beside those that the file holds already: what was stopped goes on with --only, and several runs fill one file.

A process that times a file imports the benchmark, and neither torch nor what is built on it: those are imported where files are written.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crqat_fx.bench import BenchReport, BenchSettings, Contender, Spread, Start, bench, format_machine, machine, start_onnxruntime

if TYPE_CHECKING:
    from workloads import Workload

QUICK = BenchSettings(rounds=1, runs=1, size=64, texts=5)


@dataclass(frozen=True)
class Entry:
    """One line of a table: what it is called, how its file is written, and the engine that runs it."""

    name: str
    write: Callable[["Workload", Path], Path]
    start: Start = start_onnxruntime


@dataclass
class Round:
    """One question asked of one model."""

    workload: "Workload"
    settings: BenchSettings
    folder: Path
    files: dict[tuple[str, str], Path] = field(default_factory=dict)  # of all rounds: by workload and entry

    def file(self, entry: Entry, workload: "Workload | None" = None) -> Path:
        """The entry's file, written where it is not yet."""
        chosen = workload or self.workload
        key = chosen.name, entry.name
        if key not in self.files:
            note(f"writing {chosen.name}, {entry.name}")
            name = "".join(letter if letter.isalnum() else "-" for letter in "-".join(key))
            self.files[key] = entry.write(chosen, self.folder / f"{name}.onnx")
        return self.files[key]

    def timed(self, entries: Sequence[Entry], workload: "Workload | None" = None) -> BenchReport:
        files = [self.file(one, workload) for one in entries]
        weights = [(file.with_suffix(".bin"),) if file.suffix == ".xml" else () for file in files]  # of OpenVINO's own format
        contenders = [Contender(one.name, file, one.start, beside) for one, file, beside in zip(entries, files, weights, strict=True)]

        def progress(done: int, total: int, text: str) -> None:
            if text or done in (total, *range(5, total, 5)):
                note(text or f"timed {done} of {total} rounds")

        return bench(contenders, self.settings, progress)


Answer = dict[str, Any]
Question = Callable[[Round], Answer]  # prints what it found, and returns it as plain data


def note(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def times(report: BenchReport, baselines: Sequence[str]) -> str:
    """Every file with its size and time, and how many times as fast as the baselines it is."""
    rows = [
        (
            one.name,
            f"{one.bytes / 2**20:.2f}",
            f"{one.milliseconds:.1f}",
            *(f"{one.times_faster_than(report[name]):.2f}" for name in baselines),
        )
        for one in report.timings
    ]
    return table(("", "MiB", "ms", *(f"times as fast as {name}" for name in baselines)), rows)


def against(what: str, found: Spread | float, wanted: float | None, most: bool = False) -> str:
    """A figure beside what is to be reached, if anything is: at least so much, or at `most`."""
    middle = found.median if isinstance(found, Spread) else found
    told = f"{what}: {found:.3f}" if most else f"{what}: {found:.2f}"
    if wanted is None:
        return told
    reached = middle <= wanted if most else middle >= wanted
    return f"{told}; {'at most' if most else 'at least'} {wanted} is asked, {'reached' if reached else 'NOT reached'}"


def ask(benchmark: str, doc: str, questions: Mapping[str, Question], tools: Sequence[str] = ()) -> None:
    """The command line of an inference benchmark."""
    from workloads import Workload

    from crqat_fx.models.yolo_world import SIZES

    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model, one tiny round: only to see that it runs")
    parser.add_argument("--models", default="s,m", help=f"sizes of the model, of {', '.join(SIZES)} (default: s,m)")
    parser.add_argument("--only", default=",".join(questions), help=f"questions, of {', '.join(questions)} (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="turns that each file gets (default: 15)")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="keep the figures as JSON, beside those that the file holds")
    options = parser.parse_args()
    models = ["pico"] if options.quick else _named(parser, "--models", options.models.lower(), SIZES)
    only = _named(parser, "--only", options.only, questions)
    settings = QUICK if options.quick else BenchSettings(options.threads, options.rounds)
    kept = json.loads(options.json.read_text(encoding="utf-8"))["answers"] if options.json and options.json.is_file() else {}
    where = {"machine": machine(), "tools": {name: version(name) for name in tools}}
    files: dict[tuple[str, str], Path] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for number, (size, name) in enumerate((size, name) for size in models for name in only):
            workload = Workload(size, 2, settings.size, settings.texts)
            note(f"{size}, {name}: {number + 1} of {len(models) * len(only)}")
            print(f"\n**{size}, {name}**, {settings.size} px, {settings.texts} texts\n")
            kept[f"{size}, {name}"] = {**questions[name](Round(workload, settings, folder, files)), **where}
            if options.json:
                options.json.write_text(json.dumps({"benchmark": benchmark, "answers": kept}, indent=2) + "\n", encoding="utf-8")
    told = "".join(f", {name} {number}" for name, number in where["tools"].items())
    turns = f"{settings.rounds} rounds; threads {settings.threads}"
    print(f"\nmedians, in brackets the quartiles, of {turns}; {format_machine(where['machine'])}{told}")


def _named(parser: argparse.ArgumentParser, flag: str, given: str, known: Mapping[str, object]) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"{flag}: {name!r} is none of {', '.join(known)}")
    return names
