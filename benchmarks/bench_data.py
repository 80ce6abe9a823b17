"""Does the data keep ahead of training? Pictures a second of the drawn task on two processes, and of the mosaic pipeline on one core.

    drawn              the drawn task at 160 px, two processes that already run
    drawn, with start  the same, the start of the processes counted
    drawn and written  as `crqat-fx shapes` writes them, start, PNG and annotations counted
    drawn batches      training batches of pictures that are kept, one core
    mosaic             a data.yaml of 640 x 480 px JPEG files to training batches at 640 px, 80 texts a picture, one core

Where a median is below what the project promises, it says missed and the exit status is 1; --quick is too short to tell, and does not.

python benchmarks/bench_data.py [--quick] [--json results.json]
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml

from crqat_fx.data.config import read_data
from crqat_fx.data.loader import DetectionBatches
from crqat_fx.data.shapes import ShapesTask, write_coco
from crqat_fx.data.shapes_batches import ShapesBatches

PROCESSES = 2
CHUNK = 25
BATCH = 16
TASK = ShapesTask()


@dataclass(frozen=True)
class Workload:
    """`deed` makes `pictures` pictures; `wanted` is how many a second the project promises."""

    name: str
    pictures: int
    deed: Callable[[], object]
    wanted: float | None = None


def draw_chunk(first: int) -> int:
    for index in range(first, first + CHUNK):
        TASK.draw("train", index)
    return CHUNK


def new_pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,))


def draw(pool: ProcessPoolExecutor, pictures: int) -> None:
    assert sum(pool.map(draw_chunk, range(0, pictures, CHUNK))) == pictures


def draw_with_start(pictures: int) -> None:
    with new_pool() as pool:
        draw(pool, pictures)


def draw_and_write(pictures: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_coco(TASK, Path(folder) / "set", {"train": pictures}, workers=PROCESSES)


def photo_set(folder: Path, pictures: int) -> Path:
    """A detection set of the size and file format that photographs have, and its data.yaml."""
    task = ShapesTask(size=640)
    task.vocabulary.save(folder / "vocabulary.npz")
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index in range(pictures):
        sample = task.draw("train", index)
        name = f"{index}.jpg"
        cv2.imwrite(str(folder / name), cv2.cvtColor(sample.image[80:560], cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
        images.append({"id": index, "file_name": name, "width": 640, "height": 480})
        boxes = np.clip(sample.boxes - (0, 80, 0, 80), 0, (640, 480, 640, 480))
        for (left, top, right, bottom), label in zip(boxes.tolist(), sample.labels.tolist(), strict=True):
            if bottom - top >= 1:
                box = [left, top, right - left, bottom - top]
                annotations.append({"id": len(annotations) + 1, "image_id": index, "category_id": label, "bbox": box})
    categories = [{"id": label, "name": name} for label, name in enumerate(task.names)]
    (folder / "train.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories}), encoding="utf-8"
    )
    data = folder / "data.yaml"
    data.write_text(yaml.safe_dump({"vocabularies": "vocabulary.npz", "train": {"annotations": "train.json", "pictures": "."}}), "utf-8")
    return data


@contextmanager
def workloads(quick: bool) -> Iterator[list[Workload]]:
    drawn, files, batches = (50, 8, 1) if quick else (1000, 128, 8)
    with tempfile.TemporaryDirectory() as folder, new_pool() as pool:
        kept = ShapesBatches(TASK, count=BATCH * batches, batch=BATCH)
        for step in range(batches):
            kept.at(step)
        mosaic = DetectionBatches(read_data(photo_set(Path(folder), files)), batch=BATCH, texts=80)
        draw(pool, PROCESSES * CHUNK)
        yield [
            Workload("drawn", drawn, lambda: draw(pool, drawn), 100),
            Workload("drawn, with start", drawn, lambda: draw_with_start(drawn), 100),
            Workload("drawn and written", drawn, lambda: draw_and_write(drawn)),
            Workload("drawn batches", BATCH * batches, lambda: [kept.at(step) for step in range(batches)]),
            Workload("mosaic", BATCH * batches, lambda: list(itertools.islice(mosaic.batches(), batches)), 25),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rounds = 1 if options.quick else 5
    with workloads(options.quick) as todo:
        rates: dict[str, list[float]] = {workload.name: [] for workload in todo}
        for _ in range(rounds):
            for workload in todo:
                start = time.perf_counter()
                workload.deed()
                rates[workload.name].append(workload.pictures / (time.perf_counter() - start))
    print(f"pictures a second, median of {rounds}")
    print(f"{'':<18} {'median':>8} {'slowest':>8} {'wanted':>8}")
    results, missed_any = [], False
    for workload in todo:
        median, slowest = statistics.median(rates[workload.name]), min(rates[workload.name])
        missed = not options.quick and workload.wanted is not None and median < workload.wanted
        print(f"{workload.name:<18} {median:>8.1f} {slowest:>8.1f} {workload.wanted or '':>8}{'  missed' if missed else ''}")
        results.append({"workload": workload.name, "median": round(median, 2), "slowest": round(slowest, 2), "wanted": workload.wanted})
        missed_any |= missed
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "data", "rounds": rounds, "results": results}, indent=2) + "\n", encoding="utf-8")
    if missed_any:
        sys.exit(1)


if __name__ == "__main__":
    main()
