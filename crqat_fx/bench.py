"""How fast are exported models, one beside the other?

Each model runs in a process of its own, since engines that share one take each other's threads. The processes take turns, round after
round, in an order that rotates, so that what slows the machine slows all; while one runs the others wait. A turn is a few runs after one
that warms the caches, its time their median; a ratio is taken within a round. Spread is the middle half of the rounds.
"""

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from crqat_fx import __version__
from crqat_fx.coverage import Coverage, covered
from crqat_fx.errors import UserError
from crqat_fx.onnx_profile import OperatorTime, operator_times, profile
from crqat_fx.onnx_run import Extent, made_up_inputs, run
from crqat_fx.onnx_session import open_session
from crqat_fx.processor import instruction_sets, processor_name
from crqat_fx.progress import Progress

Once = Callable[[], object]  # runs a model once
Start = Callable[[Path, Extent, int], Once]  # the file, what its open axes become, threads; called in the process that will run it

PATIENCE = 60.0  # seconds for a process to end


def start_onnxruntime(path: Path, extent: Extent, threads: int) -> Once:
    session = open_session(path, threads)
    feed = made_up_inputs(session, extent, path)
    run(session, feed, path)  # its mistakes are told here, once
    return lambda: session.run(None, feed)


@dataclass(frozen=True)
class BenchSettings:
    """Settings of the command `bench`."""

    threads: int = 1
    rounds: int = 15
    runs: int = 3
    size: int = 640
    batch: int = 1
    texts: int = 80


USUAL = BenchSettings()


@dataclass(frozen=True)
class Contender:
    """A model to time, and the engine that runs it."""

    name: str
    path: Path
    start: Start = start_onnxruntime  # by reference: a function at the top of a module
    beside: tuple[Path, ...] = ()  # other files that belong to the model

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in (self.path, *self.beside))


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
        return cls(median, low, high)

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


@dataclass(frozen=True)
class Timing:
    """What one model took: milliseconds a turn."""

    name: str
    path: Path
    bytes: int
    turns: tuple[float, ...]

    @property
    def milliseconds(self) -> Spread:
        return Spread.of(self.turns)

    def times_faster_than(self, other: "Timing") -> Spread:
        """The other's time over this one's, round by round."""
        return Spread.of([theirs / ours for ours, theirs in zip(self.turns, other.turns, strict=True)])


@dataclass(frozen=True)
class BenchReport:
    """Times in the order the models were given; the first is what the others are compared with."""

    timings: tuple[Timing, ...]
    settings: BenchSettings
    machine: Mapping[str, str]

    def __getitem__(self, name: str) -> Timing:
        return next(timing for timing in self.timings if timing.name == name)

    def as_json(self) -> dict[str, Any]:
        models = [
            {
                "name": timing.name,
                "path": str(timing.path),
                "bytes": timing.bytes,
                "ms": asdict(timing.milliseconds),
                "times_faster": asdict(timing.times_faster_than(self.timings[0])),
                "turns_ms": list(timing.turns),
            }
            for timing in self.timings
        ]
        return {"models": models, **asdict(self.settings), "machine": dict(self.machine)}


def bench(contenders: Sequence[Contender | str | Path], settings: BenchSettings = USUAL, progress: Progress | None = None) -> BenchReport:
    """Times models against each other; a path alone is run by onnxruntime."""
    given = [one if isinstance(one, Contender) else Contender(str(one), Path(one)) for one in contenders]
    if not given:
        raise UserError("no model to time", where="bench", remedy="name one ONNX file or more")
    for name in ("threads", "rounds", "runs", "size", "batch", "texts"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}", where=f"--{name}", remedy="give 1 or more")
    turns: list[list[float]] = [[] for _ in given]
    with ExitStack() as stack:
        runners = []
        for number, one in enumerate(given):
            if progress is not None:
                progress(0, settings.rounds, f"opening {one.name}, {number + 1} of {len(given)}")
            runners.append(stack.enter_context(_Runner(one, settings)))
        for turn in range(settings.rounds):
            for place in range(len(given)):
                index = (turn + place) % len(given)
                turns[index].append(runners[index].turn(settings.runs))
            if progress is not None:
                progress(turn + 1, settings.rounds, "")
    timings = tuple(Timing(one.name, one.path, one.bytes, tuple(each)) for one, each in zip(given, turns, strict=True))
    return BenchReport(timings, settings, machine())


@dataclass(frozen=True)
class Operators:
    """Where the time of one file goes, and how much of it runs in integers."""

    path: Path
    times: tuple[OperatorTime, ...]
    coverage: Coverage

    def as_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "times": [asdict(one) for one in self.times], "coverage": self.coverage.as_json()}


def operators_of(path: Path, settings: BenchSettings = USUAL) -> Operators:
    """From onnxruntime's profiler, which itself takes some time of every node."""
    profiled = profile(path, Extent(settings.size, settings.batch, settings.texts), settings.rounds, settings.threads)
    return Operators(path, operator_times(profiled), covered(profiled, path))


def machine() -> dict[str, str]:
    """What the figures depend on besides the models."""
    return {
        "processor": processor_name(),
        "isa": " ".join(instruction_sets()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "crqat-fx": __version__,
    }


def format_machine(known: Mapping[str, str]) -> str:
    versions = ("python", "onnxruntime", "numpy", "crqat-fx")
    return ", ".join([known["processor"], known["isa"], known["system"], *(f"{name} {known[name]}" for name in versions)])


class _Runner:
    """A contender in its own process."""

    def __init__(self, contender: Contender, settings: BenchSettings) -> None:
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, contender, settings), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> "_Runner":
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.join(PATIENCE)

    def turn(self, runs: int) -> float:
        """Milliseconds: the median of as many runs."""
        self.connection.send(runs)
        return statistics.median(self._answer())

    def _answer(self) -> list[float]:
        try:
            answer = self.connection.recv()
        except EOFError as error:
            self.process.join(PATIENCE)
            raise UserError(
                f"its process ended with status {self.process.exitcode}", where=self.contender.path, remedy="see what it wrote on stderr"
            ) from error
        if isinstance(answer, dict):
            raise UserError(**answer)
        times: list[float] = answer
        return times


def _serve(connection: Connection, contender: Contender, settings: BenchSettings) -> None:
    """The other process: runs the model as often as it is told, until nobody is there to tell."""
    try:
        once = contender.start(contender.path, Extent(settings.size, settings.batch, settings.texts), settings.threads)
    except UserError as error:
        connection.send({"what": error.what, "where": error.where, "remedy": error.remedy})
        return
    connection.send([])
    while True:
        try:
            runs = connection.recv()
        except EOFError:
            return
        connection.send(_times(once, runs))


def _times(once: Once, runs: int) -> list[float]:
    once()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        once()
        times.append((time.perf_counter() - start) * 1e3)
    return times
