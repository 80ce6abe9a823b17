"""What accuracy is left without training? AP of a prepared, calibrated model, by recipe, target and observer; full precision beside.

python benchmarks/bench_ptq.py [--quick] [--model pico-v1] [--recipes 3-3-8,4-8-8-int] [--json results.json]

The drawn task: ranges are set on 256 of its calibration pictures, AP is counted on 500 of its validation pictures, of all categories, of
those that training knew (base) and of the others (novel). `+norms`: norms are corrected on the same pictures, too. Nothing is timed: one
thread, no chance in it, the same figures at every run.

With 8 bits everywhere and the target `conv-inputs` every observer is promised to stay within 0.6 AP of full precision; where one does not,
the table says missed and the exit status is 1. --quick is too little to tell, and does not. The promise leaves out the
percentiles with a number of their own, which are there to show what cutting more and less costs.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crqat_fx.checkpoint import load_model
from crqat_fx.correct_norms import correct_norms
from crqat_fx.data.samples import EvaluationSet
from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.evaluate import evaluate
from crqat_fx.quantize.calibrate import PICTURES, calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.shipped import SHIPPED
from crqat_fx.torch_detector import TorchDetector

TASK = ShapesTask()
PROMISED = ("8-8-8", "conv-inputs")
WITHIN = 0.6  # AP of full precision
PLACES = (
    PROMISED,
    ("4-8-8", "conv-inputs"),
    ("4-4-8", "conv-inputs"),
    ("3-3-8", "conv-inputs"),
    ("8-8-8-int", "ort"),
    ("4-8-8-int", "ort"),
    ("4-4-8-int", "ort"),
)
OBSERVERS = ("minmax", "moving-average", "percentile", "omse", "entropy")
OTHER_PERCENTILES = ("percentile-99.9", "percentile-99.999")
CORRECTED = tuple(f"{observer}+norms" for observer in OBSERVERS)


class Kept:
    """An EvaluationSet whose pictures are drawn once."""

    def __init__(self, source: EvaluationSet) -> None:
        self.coco = source.coco
        self.pictures = [source.picture(index) for index in range(len(source))]

    def __len__(self) -> int:
        return len(self.pictures)

    def picture(self, index: int) -> np.ndarray:
        return self.pictures[index]


def scored(model: nn.Module, validation: EvaluationSet) -> dict[str, float | None]:
    found = evaluate(TorchDetector(model, TASK.vocabulary, TASK.size), validation)
    novel, base = (found.split[name].ap if name in found.split else None for name in ("novel", "base"))
    return {"all": found.scores.ap, "base": base, "novel": novel}


def quantized(name: str, recipe: str, target: str, observer: str, pictures: Sequence[np.ndarray]) -> nn.Module:
    model, _ = load_model(name)
    prepared = prepare(model, recipe=recipe, target=target, vocabulary=TASK.vocabulary, size=TASK.size)
    calibrate(prepared, picture_batches(prepared, pictures), observer.removesuffix("+norms"), len(pictures))
    if observer in CORRECTED:
        correct_norms(prepared, picture_batches(prepared, pictures), len(pictures))
    return prepared.graph


def row(first: str, target: str, observer: str, ap: dict[str, float | None], verdict: str = "") -> str:
    figures = "".join(f"{'' if value is None else f'{value:.1f}':>7}" for value in ap.values())
    return f"{first:<12}{target:<14}{observer:<19}{figures}  {verdict}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one cell, few pictures: only to see that it runs")
    parser.add_argument("--model", choices=SHIPPED, default="pico-v1", help="a shipped model (default: pico-v1)")
    parser.add_argument("--recipes", metavar="A,B", help="these alone (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calibration = [TASK.draw("calibration", index).image for index in range(4 if options.quick else PICTURES)]
    validation = Kept(ShapesSet(TASK, "val", 8 if options.quick else 500))
    asked = options.recipes.split(",") if options.recipes else [recipe for recipe, _ in PLACES]
    if unknown := set(asked) - {recipe for recipe, _ in PLACES}:
        parser.error(f"unknown recipe {min(unknown)}; choose among {', '.join(recipe for recipe, _ in PLACES)}")
    places = PLACES[:1] if options.quick else [place for place in PLACES if place[0] in asked]
    observers = (*OBSERVERS[:1], *CORRECTED[:1]) if options.quick else (*OBSERVERS, *OTHER_PERCENTILES, *CORRECTED)

    print(f"{options.model}, AP on {len(validation)} pictures, ranges set on {len(calibration)}")
    print(f"{'recipe':<12}{'target':<14}{'observer':<19}{'all':>7}{'base':>7}{'novel':>7}")
    full = scored(load_model(options.model)[0], validation)
    print(row("FP32", "", "", full), flush=True)
    results: list[dict[str, Any]] = [{"recipe": "FP32", "target": None, "observer": None, "ap": full, "missed": False}]
    for recipe, target in places:
        for observer in observers:
            ap = scored(quantized(options.model, recipe, target, observer, calibration), validation)
            promised = not options.quick and (recipe, target) == PROMISED and observer in OBSERVERS
            missed = promised and (full["all"] or 0) - (ap["all"] or 0) > WITHIN
            verdict = "" if not promised else f"within {WITHIN} of FP32: {'missed' if missed else 'yes'}"
            print(row(recipe, target, observer, ap, verdict), flush=True)
            results.append({"recipe": recipe, "target": target, "observer": observer, "ap": ap, "missed": missed})
    if options.json:
        counts = {"pictures": len(validation), "calibration": len(calibration)}
        written = {"benchmark": "ptq", "model": options.model, **counts, "torch": torch.__version__, "results": results}
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 1 if any(result["missed"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
