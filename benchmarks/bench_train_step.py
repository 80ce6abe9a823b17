"""What does teaching cost? A step of CR-QAT's last phase beside one of plain QAT, and TRKD's share of it.

python benchmarks/bench_train_step.py [--quick] [--rounds 7] [--size 320] [--batch 4] [--target ort] [--norm train] [--json results.json]

YOLO-World v1-S at 4-4-8 with 80 texts, freshly drawn weights, teacher of the same size; one thread. The steps take turns in every round,
and what counts is the median of the ratios of one round. TRKD is timed alone, forward and backward, at 500 positives.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from crqat_fx.assign import Assignment
from crqat_fx.data.batch import Batch, Truth
from crqat_fx.distill import feature_loss, relation_loss
from crqat_fx.models.yolo_world import STRIDES, build
from crqat_fx.qat import QatCourse, QatSettings
from crqat_fx.quantize.calibrate import calibrate
from crqat_fx.quantize.prepare import prepare
from crqat_fx.train import TrainingState, take_step

TEXTS, POSITIVES, BOXES = 80, 500, 13
CPU = torch.device("cpu")


class Fixed:
    """The same batch at every step."""

    fingerprint = "fixed"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.skipped: dict[str, int] = {}
        self.repaired: dict[str, int] = {}

    def batches(self, start_step: int, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        while True:
            yield self.batch


def made_up_batch(size: int, count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, BOXES, 2, generator=generator) * size / 2
    sides = torch.rand(count, BOXES, 2, generator=generator) * size / 4 + size / 4
    truth = Truth(
        torch.cat([corners, corners + sides], 2),
        torch.randint(TEXTS, (count, BOXES), generator=generator),
        torch.ones(count, BOXES, dtype=torch.bool),
    )
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    text = nn.functional.normalize(torch.randn(count, TEXTS, 512, generator=generator), dim=2)
    return Batch(images, text, truth)


def stepper(method: str, batch: Batch, target: str, norm: str, model: str) -> Callable[[], None]:
    """Takes one step of training."""
    torch.manual_seed(0)
    size, count = batch.images.shape[2], len(batch.images)
    prepared = prepare(build(model, 1).eval(), None, "4-4-8", target, size=size)
    calibrate(prepared, [(batch.images / 255, batch.text)], "minmax", count)
    settings = QatSettings(steps=10_000, batch=count, size=size, method=method, norm=norm, kd_weight=6.0)
    course = QatCourse(prepared, settings, Fixed(batch), CPU, teacher=build(model, 1).eval())
    state = TrainingState(course, CPU, "fixed")

    def step() -> None:
        course.open(state)
        take_step(state, [batch])

    return step


def relations(size: int, count: int) -> Callable[[], None]:
    """TRKD, forward and backward, at so many positives of so many texts."""
    generator = torch.Generator().manual_seed(0)
    levels = [(size // stride, size // stride) for stride in STRIDES]
    student, teacher = ([torch.randn(count, 512, *level, generator=generator) for level in levels] for _ in range(2))
    for level in student:
        level.requires_grad_()
    cells = sum(height * width for height, width in levels)
    positive = torch.zeros(count * cells, dtype=torch.bool)
    positive[torch.randperm(count * cells, generator=generator)[:POSITIVES]] = True
    positive = positive.view(count, cells)
    labels = torch.randint(TEXTS, (count, cells), generator=generator) * positive
    zeros = torch.zeros(count, cells)
    given = Assignment(positive, labels, zeros.unsqueeze(2).expand(-1, -1, 4), zeros, labels)
    text = torch.randn(count, TEXTS, 512, generator=generator)

    def work() -> None:
        relation_loss(student, teacher, text, given).backward()

    return work


def features(size: int, count: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(count, 64 * 2**level, size // stride, size // stride) for level, stride in enumerate(STRIDES, 1)]
    student, teacher = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    leaves: list[Tensor] = [level.requires_grad_() for level in student]

    def work() -> None:
        feature_loss(leaves, teacher).backward()

    return work


def seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--target", default="ort")
    parser.add_argument("--norm", default="train")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size, count, rounds, model = (64, 2, 1, "pico") if arguments.quick else (arguments.size, arguments.batch, arguments.rounds, "s")
    batch = made_up_batch(size, count)
    works = {method: stepper(method, batch, arguments.target, arguments.norm, model) for method in ("qat", "kd")}
    works |= {"TRKD": relations(max(size, 128), count), "PKD": features(size, count)}
    for work in works.values():
        work()  # once to warm up
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))

    def ratio(name: str, to: str) -> float:
        return statistics.median(one / other for one, other in zip(times[name], times[to], strict=True))

    report = {
        "qat step, s": statistics.median(times["qat"]),
        "cr-qat step, s": statistics.median(times["kd"]),
        "cr-qat / qat": ratio("kd", "qat"),
        "TRKD / cr-qat step": ratio("TRKD", "kd"),
        "PKD / cr-qat step": ratio("PKD", "kd"),
    }
    for name, value in report.items():
        print(f"{name:24} {value:8.4f}")
    if arguments.json:
        settings = {"size": size, "batch": count, "rounds": rounds, "target": arguments.target, "norm": arguments.norm}
        arguments.json.write_text(json.dumps(report | settings, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
