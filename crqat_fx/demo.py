"""The main job on what the package carries: the shipped models and the drawn task, with no download and no file of the user's.

out/pictures     validation pictures of the drawn task
out/detections   the same with what the shipped v2 model finds
out/stages.svg   its graph, curriculum stages in colour
out/demo.json    the closing table
"""

import json
from pathlib import Path
from typing import Any

import cv2

from crqat_fx.checkpoint import load_model
from crqat_fx.cost import measure, price
from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.detect import TorchDetector, detect_pictures
from crqat_fx.evaluate import evaluate
from crqat_fx.files import written
from crqat_fx.graph_picture import save_picture
from crqat_fx.pictures import find_sources
from crqat_fx.pipelines import prepare_passes
from crqat_fx.progress import Progress
from crqat_fx.recipe import preset
from crqat_fx.shipped import SHIPPED
from crqat_fx.trace import trace

SHOWN = 12  # pictures drawn for looking at
DRAWN_ABOVE = 0.3  # score
RECIPES = ("8-8-8-int", "4-8-8-int", "4-4-8")


def demo(out: Path, *, pictures: int = 500, progress: Progress | None = None) -> dict[str, Any]:
    """Draws, detects, evaluates and counts; returns the closing table as JSON can write it."""
    report: dict[str, Any] = {"pictures": pictures, "accuracy": [], "cost": []}
    task = ShapesTask()
    dataset = ShapesSet(task, "val", pictures)
    for index in range(min(SHOWN, pictures)):
        with written(out / "pictures" / f"{index:06d}.png") as temporary:
            cv2.imwrite(str(temporary), cv2.cvtColor(dataset.picture(index), cv2.COLOR_RGB2BGR))
    for name in SHIPPED:
        model, checkpoint = load_model(name)
        scores = evaluate(TorchDetector(model, task.vocabulary, task.size), dataset, progress=progress)
        groups = {group: found.ap for group, found in (*scores.split.items(), *scores.frequency.items())}
        report["accuracy"].append({"model": name, "all": scores.scores.ap, **groups})
        measured = measure(model, len(task.names), task.size)
        full = price(measured)
        for label, counted in [("FP32", full), *((recipe, price(measured, preset(recipe))) for recipe in RECIPES)]:
            total = counted.export_total
            report["cost"].append({"model": name, "recipe": label, "gbops": total.bops / 1e9, "mib": total.size_mib})
    graph = trace(model)
    prepare_passes()(graph)
    save_picture(graph, out / "stages.svg", f"{name}: {checkpoint.path.name}")
    detector = TorchDetector(model, task.vocabulary, task.size, conf=DRAWN_ABOVE)
    detect_pictures(detector, find_sources([out / "pictures"]), out / "detections")
    with written(out / "demo.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return report
