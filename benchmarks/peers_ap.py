"""How fast is AP counted, and is it the same number? crqat_fx.evaluate against pycocotools, interleaved, on the same detections.

python benchmarks/peers_ap.py [--quick] [--json results.json]

The set is the drawn task's validation pictures over its 240 classes; the detections are its truth, shifted, dropped, misnamed, and clutter.
"""

import argparse
import contextlib
import copy
import io
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.detections import Detections
from crqat_fx.evaluate import score

DETECTIONS = 300  # a picture


def imagined(coco: Mapping[str, Any], size: int, classes: int, seed: int = 0) -> list[Detections]:
    """Detections for every picture of a set: some of the truth, moved, and boxes that are nothing."""
    generator = np.random.default_rng(seed)
    truth: dict[int, list[tuple[list[float], int]]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        truth[annotation["image_id"]].append((annotation["bbox"], annotation["category_id"] - 1))
    found = []
    for image in coco["images"]:
        corners = generator.uniform(0, size, (DETECTIONS, 2))
        boxes = np.concatenate([corners, corners + generator.uniform(5, size / 2, (DETECTIONS, 2))], 1)
        labels, scores = generator.integers(0, classes, DETECTIONS), generator.random(DETECTIONS) ** 3
        for row, ((left, top, width, height), label) in enumerate(truth[image["id"]]):
            boxes[row] = np.array([left, top, left + width, top + height]) + generator.normal(0, 2, 4)
            labels[row], scores[row] = label if generator.random() < 0.8 else labels[row], generator.random() ** 0.5
        order = np.argsort(-scores)
        found.append(Detections(boxes[order].astype(np.float32), scores[order].astype(np.float32), labels[order]))
    return found


def by_pycocotools(coco: Mapping[str, Any], found: Sequence[Detections]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **copy.deepcopy(dict(coco))}
        truth.createIndex()
        rows = np.concatenate(
            [
                np.column_stack(
                    [np.full(len(one), image["id"]), one.boxes[:, :2], one.boxes[:, 2:] - one.boxes[:, :2], one.scores, one.labels + 1]
                )
                for image, one in zip(coco["images"], found, strict=True)
            ]
        )
        judged = COCOeval(truth, truth.loadRes(rows.astype(np.float64)), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return float(judged.stats[0]) * 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    task = ShapesTask()
    coco = ShapesSet(task, "val", 20 if options.quick else 500).coco
    found = imagined(coco, task.size, len(task.names))
    ours, theirs, ratios = 0.0, 0.0, []
    for _ in range(1 if options.quick else 5):
        start = time.perf_counter()
        ours = score(found, task.names, coco).scores.ap or 0.0
        middle = time.perf_counter()
        theirs = by_pycocotools(coco, found)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    median, least, most = statistics.median(ratios), min(ratios), max(ratios)
    print(
        f"AP of {len(coco['images'])} pictures x {len(task.names)} classes x {DETECTIONS} detections: {ours:.6f}, pycocotools {theirs:.6f}"
    )
    print(f"pycocotools takes {median:.1f} times as long ({least:.1f} to {most:.1f} over {len(ratios)} rounds)")
    if abs(ours - theirs) > 1e-6:
        raise SystemExit("the two disagree")
    if options.json:
        figures = {"benchmark": "ap", "ours": ours, "pycocotools": theirs, "ratios": ratios}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
