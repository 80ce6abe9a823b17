"""How long does `crqat-fx prepare` of an X checkpoint take, over loading the file with torch? Without calibration.

python benchmarks/bench_prepare.py [--quick] [--rounds 7] [--json results.json]

Twice: as whole processes, torch's import on both sides and the prepared file written, where at most 3 is to be reached; and within one
process, part by part. Passes and torch.ao together are to take less than 3 s. Wall time; the two sides take turns.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that are started

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from crqat_fx.checkpoint import load_model, write_checkpoint
from crqat_fx.models.yolo_world import build
from crqat_fx.quantize.prepare import prepare
from crqat_fx.vocabulary import Vocabulary

T = TypeVar("T")
TEXTS = 80


def write_files(folder: Path, preset: str) -> tuple[Path, Path]:
    """A checkpoint of this project's own, with drawn weights, and a vocabulary."""
    torch.manual_seed(0)
    model = build(preset, 1)
    write_checkpoint(folder / "model.pt", model, model.config)
    embeddings = np.random.default_rng(0).normal(size=(TEXTS, model.config.text_width)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    Vocabulary(tuple(f"thing {index}" for index in range(TEXTS)), embeddings).save(folder / "vocabulary.npz")
    return folder / "model.pt", folder / "vocabulary.npz"


def seconds_of(*command: str) -> float:
    """Of a whole process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - start


def whole_processes(model: Path, vocabulary: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of loading with torch, and of the command, in every round."""
    load = "-c", "import sys, torch; torch.load(sys.argv[1])", str(model)
    command = "-m", "crqat_fx", "prepare", str(model), "--vocabulary", str(vocabulary), "--out", str(model.with_name("prepared.pt"))
    seconds_of(*load)  # the file and torch are in the system's cache from here on
    pairs = [(seconds_of(*load), seconds_of(*command)) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def parts(path: Path, rounds: int) -> dict[str, float]:
    """Median seconds of each part within this process; `passes` is what of `prepare` passes and torch.ao take."""
    seconds: dict[str, list[float]] = {"torch.load": [], "load_model": [], "prepare": [], "passes": [], "save": []}

    def timed(name: str, deed: Callable[[], T]) -> T:
        start = time.perf_counter()
        done = deed()
        seconds[name].append(time.perf_counter() - start)
        return done

    for _ in range(rounds):
        timed("torch.load", lambda: torch.load(path))
        model, _ = timed("load_model", lambda: load_model(path))
        prepared = timed("prepare", lambda given=model: prepare(given, take_over=True))  # type: ignore[misc]
        seconds["passes"].append(sum(step.seconds for step in prepared.steps))
        timed("save", lambda given=prepared: given.save(path.with_name("prepared.pt")))  # type: ignore[misc]
    return {name: statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model, one round: only to see that it runs")
    parser.add_argument("--rounds", type=int, default=7, help="how often each side runs (default: 7)")
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    preset, rounds = ("pico", 1) if options.quick else ("x", options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary = write_files(Path(folder), preset)
        megabytes = model.stat().st_size / 1e6
        loads, commands = whole_processes(model, vocabulary, rounds)
        within = parts(model, rounds)
    ratios = sorted(command / load for load, command in zip(loads, commands, strict=True))
    print(f"v1-{preset}, {megabytes:.0f} MB, median of {rounds}")
    print(f"  process that loads it with torch {statistics.median(loads):>7.2f} s")
    print(f"  crqat-fx prepare                 {statistics.median(commands):>7.2f} s")
    print(f"  the command takes {statistics.median(ratios):.2f} times as long ({ratios[0]:.2f} to {ratios[-1]:.2f}), at most 3 asked")
    print("within one process:")
    for name, seconds in within.items():
        print(f"  {name:<12}{seconds * 1e3:>8.0f} ms")
    all_of_it = within["load_model"] + within["prepare"] + within["save"]
    print(f"  load_model, prepare and save take {all_of_it / within['torch.load']:.1f} times as long as torch.load")
    if options.json:
        figures = {"model": preset, "megabytes": megabytes, "load_s": loads, "prepare_s": commands, "ratios": ratios, "within_s": within}
        written = {"benchmark": "prepare", "torch": torch.__version__, "rounds": rounds, **figures}
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
