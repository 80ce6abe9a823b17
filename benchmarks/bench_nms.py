"""How long does NMS take? Median over rounds on one core, for the published 30,000 candidates over several vocabularies.

python benchmarks/bench_nms.py [--quick] [--json results.json]
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from crqat_fx.detections import nms

Candidates = tuple[np.ndarray, np.ndarray, np.ndarray]


def clustered(count: int, classes: int, seed: int = 0) -> Candidates:
    """Boxes on a 640 px picture, around as many objects as a busy picture has: most overlap, as a detector's candidates do."""
    generator = np.random.default_rng(seed)
    objects = generator.uniform(0, 640, (60, 2)), generator.uniform(20, 200, (60, 2))
    chosen = generator.integers(0, 60, count)
    centres = objects[0][chosen] + generator.normal(0, 12, (count, 2))
    sides = objects[1][chosen] * generator.uniform(0.8, 1.25, (count, 2))
    return _candidates(centres, sides, classes, generator)


def scattered(count: int, classes: int, seed: int = 0) -> Candidates:
    """Small boxes that hardly overlap: NMS has nothing to remove."""
    generator = np.random.default_rng(seed)
    return _candidates(generator.uniform(0, 640, (count, 2)), generator.uniform(2, 6, (count, 2)), classes, generator)


def equal(count: int, classes: int, seed: int = 0) -> Candidates:
    """One and the same box everywhere."""
    generator = np.random.default_rng(seed)
    return _candidates(np.full((count, 2), 320.0), np.full((count, 2), 100.0), classes, generator)


def _candidates(centres: np.ndarray, sides: np.ndarray, classes: int, generator: np.random.Generator) -> Candidates:
    boxes = np.concatenate((centres - sides / 2, centres + sides / 2), axis=1).astype(np.float32)
    count = len(boxes)
    return boxes, generator.random(count, dtype=np.float32), generator.integers(0, classes, count)


def milliseconds(deed: Callable[[], object], rounds: int) -> list[float]:
    deed()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        deed()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    count, rounds = (500, 1) if options.quick else (30_000, 15)
    results = []
    print(f"NMS of {count:,} candidates at IoU 0.7, one core, median of {rounds}")
    print(f"{'boxes':<10} {'classes':>7} {'max':>5} {'kept':>5} {'median':>9} {'slowest':>9}")
    for workload in (clustered, scattered, equal):
        for classes in (1, 80, 1203):
            for limit in (300, 1000):
                boxes, scores, labels = workload(count, classes)
                kept = len(nms(boxes, scores, labels, 0.7, limit))
                times = milliseconds(lambda b=boxes, s=scores, c=labels, m=limit: nms(b, s, c, 0.7, m), rounds)  # type: ignore[misc]
                median, slowest = statistics.median(times), max(times)
                print(f"{workload.__name__:<10} {classes:>7} {limit:>5} {kept:>5} {median:>6.1f} ms {slowest:>6.1f} ms")
                row = {"boxes": workload.__name__, "candidates": count, "classes": classes, "max": limit, "kept": kept}
                results.append({**row, "median_ms": round(median, 3), "slowest_ms": round(slowest, 3)})
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "nms", "rounds": rounds, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
