"""The main job on what the package carries: the shipped models and the drawn task, with no download and no file of the user's.

out/pictures     validation pictures of the drawn task
out/detections   the same with what the shipped v2 model finds
out/stages.svg   its graph, curriculum stages in colour
out/fp32.onnx    it as exported in floats, as the comparison
out/prepared.pt  it with quantizers of the default recipe, their ranges set, not trained
out/int4.onnx    that in integers, its weights packed; verified against it, evaluated and timed in onnxruntime
out/demo.json    the closing tables
"""

import json
from pathlib import Path
from typing import Any

import cv2

from crqat_fx.bench import bench
from crqat_fx.checkpoint import load_model
from crqat_fx.cost import measure, price
from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.detect import detect_pictures
from crqat_fx.evaluate import evaluate
from crqat_fx.export import export
from crqat_fx.files import written
from crqat_fx.graph_picture import save_picture
from crqat_fx.onnx_detector import OnnxDetector
from crqat_fx.pictures import find_sources
from crqat_fx.pipelines import prepare_passes
from crqat_fx.progress import Progress
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.recipe import DEFAULT_RECIPE, preset
from crqat_fx.shipped import SHIPPED
from crqat_fx.torch_detector import TorchDetector
from crqat_fx.trace import trace
from crqat_fx.verify import verify_file

SHOWN = 12  # pictures drawn for looking at
DRAWN_ABOVE = 0.3  # score
RECIPES = ("8-8-8-int", "4-8-8-int", "4-4-8")
CALIBRATED_ON, VERIFIED_ON = 128, 2  # pictures


def demo(out: Path, *, pictures: int = 500, progress: Progress | None = None) -> dict[str, Any]:
    """Draws, detects, evaluates, counts, quantizes, exports, verifies and times; returns the closing tables as JSON can write them."""
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
    report |= _exported(name, task, dataset, out, progress)
    with written(out / "demo.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return report


def _exported(name: str, task: ShapesTask, dataset: ShapesSet, out: Path, progress: Progress | None) -> dict[str, Any]:
    """A shipped model in floats and in integers, both as onnxruntime runs them."""
    model, _ = load_model(name)
    prepared = prepare(model, recipe=DEFAULT_RECIPE, vocabulary=task.vocabulary, size=task.size)
    shown = (task.draw("calibration", index).image for index in range(CALIBRATED_ON))
    calibrate(prepared, picture_batches(prepared, shown), "omse", CALIBRATED_ON, progress=progress)
    prepared.save(out / "prepared.pt")
    files = [out / "fp32.onnx", out / "int4.onnx"]
    export(model, files[0], vocabulary=task.vocabulary, form="straight", size=task.size)
    export(prepared, files[1])
    looked_at = (dataset.picture(index) for index in range(min(VERIFIED_ON, len(dataset))))
    ladder = verify_file(prepared, files[1], looked_at, count=VERIFIED_ON, progress=progress)
    timed = bench(files, progress=progress)
    rows = []
    for file, timing in zip(files, timed.timings, strict=True):
        scores = evaluate(OnnxDetector(file), dataset, progress=progress)
        ratio = timing.times_faster_than(timed.timings[0]).median
        rows.append({"file": file.name, "mib": file.stat().st_size / 2**20, "ap": scores.scores.ap, "times as fast": ratio})
    return {"exported": rows, "recipe": DEFAULT_RECIPE, "verified": ladder.as_dict()}
