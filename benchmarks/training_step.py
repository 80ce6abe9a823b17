"""One training step of a detector, and forms of it timed against one another: a process each, turns taken, processor time.

A step is forward and backward. The sum of its outputs' mean squares stands for the loss: assignment, loss and optimizer cost every form the
same, and would only bring the ratios nearer to 1. Every form has a process to itself, as a training has: what one leaves in the allocator
or in a cache is no other's burden.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from crqat_fx.models.yolo_world import build
from crqat_fx.quantize.calibrate import calibrate
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Prepared


@dataclass(frozen=True)
class Workload:
    """A model of a preset, and what it is trained on."""

    preset: str = "s"
    version: int = 1
    size: int = 320
    batch: int = 2
    texts: int = 80

    def __str__(self) -> str:
        return f"v{self.version}-{self.preset}, {self.batch} pictures of {self.size} px, {self.texts} texts"

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(self.batch, 3, self.size, self.size, generator=generator)
        text = nn.functional.normalize(torch.randn(1, self.texts, 512, generator=generator), dim=2)
        return images, text.expand(self.batch, -1, -1)


@dataclass(frozen=True)
class Form:
    """The float model (no target), or a prepared one, all quantizers on. `change` is made to it once its ranges are set."""

    name: str
    target: str = ""
    recipe: str = ""
    change: Callable[[Prepared], None] | None = None

    def model(self, workload: Workload) -> nn.Module:
        torch.manual_seed(0)
        model = build(workload.preset, workload.version)
        if not self.target:
            return model.train()
        prepared = prepare(model, None, self.recipe, self.target)
        calibrate(prepared, [workload.inputs()], "minmax")
        if self.change is not None:
            self.change(prepared)
        return prepared.graph.train()


FLOAT = Form("float")


def step(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> float:
    logits, bins, _ = model(*inputs)
    loss = sum(level.square().mean() for level in (*logits, *bins))
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return loss.item()


def _serve(connection: Connection, form: Form, workload: Workload) -> None:
    """Makes the model, sends the loss of its first step, then takes a step and sends its seconds whenever it is told to."""
    torch.set_num_threads(1)
    model, inputs = form.model(workload), workload.inputs()
    connection.send(step(model, inputs))
    step(model, inputs)
    while connection.recv():
        start = time.process_time()
        step(model, inputs)
        connection.send(time.process_time() - start)


def measure(forms: Sequence[Form], workload: Workload, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each form in every round, which form begins moves on; and the loss of its first step."""
    context = multiprocessing.get_context("spawn")
    lines, processes = [], []
    for form in forms:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, form, workload), daemon=True)
        process.start()
        there.close()
        lines.append(here)
        processes.append(process)
    losses = {form.name: line.recv() for form, line in zip(forms, lines, strict=True)}
    seconds: dict[str, list[float]] = {form.name: [] for form in forms}
    for number in range(rounds):
        turns = [(number + turn) % len(forms) for turn in range(len(forms))]
        for turn in turns:
            lines[turn].send(True)
            seconds[forms[turn].name].append(lines[turn].recv())
    for line, process in zip(lines, processes, strict=True):
        line.send(False)
        process.join()
    return seconds, losses


@dataclass(frozen=True)
class Ratio:
    """How many times as long as another a form takes: of each round, the median, the middle half, and the ends."""

    median: float
    quartiles: tuple[float, float]
    ends: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.quartiles[0]:.2f} to {self.quartiles[1]:.2f})"


def ratio(seconds: Sequence[float], others: Sequence[float]) -> Ratio:
    found = sorted(own / other for own, other in zip(seconds, others, strict=True))
    low, _, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else [found[0]] * 3
    return Ratio(statistics.median(found), (low, high), (found[0], found[-1]))


@dataclass(frozen=True)
class Options:
    """What a benchmark of the step is asked for."""

    workload: Workload
    rounds: int
    json: Path | None

    @classmethod
    def read(cls, doc: str, rounds: int) -> "Options":
        """From the command line; `rounds` is the default."""
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--quick", action="store_true", help="the smallest model, two rounds: only to see that it runs")
        parser.add_argument("--version", type=int, choices=(1, 2), default=1, help="of YOLO-World (default: 1)")
        parser.add_argument("--rounds", type=int, default=rounds, help=f"how often each form runs (default: {rounds})")
        parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
        given = parser.parse_args()
        workload = Workload("pico", given.version, 64, 2, 5) if given.quick else Workload(version=given.version)
        return cls(workload, 2 if given.quick else given.rounds, given.json)

    def write(self, benchmark: str, results: Sequence[object]) -> None:
        if self.json is not None:
            told = {"benchmark": benchmark, "workload": asdict(self.workload), "rounds": self.rounds, "torch": torch.__version__}
            self.json.write_text(json.dumps({**told, "results": results}, indent=2) + "\n", encoding="utf-8")
