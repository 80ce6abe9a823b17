"""A small YOLO-World, prepared and calibrated, and pictures for it: for tests of what looks at prepared models."""

import copy
import functools
from collections.abc import Iterator

import numpy as np
import torch

from crqat_fx.data.shapes import ShapesTask
from crqat_fx.models.yolo_world import build
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Prepared

SIZE = 64
RECIPES = (("4-4-8", "conv-inputs"), ("4-8-8-int", "ort"))


def pictures(count: int, split: str = "val") -> Iterator[np.ndarray]:
    task = ShapesTask(size=SIZE)
    return (task.draw(split, index).image for index in range(count))


def calibrated_pico(recipe: str, target: str) -> Prepared:
    """A fresh one each time."""
    made = _made(recipe, target)
    copied = copy.copy(made)
    copied.graph = copy.deepcopy(made.graph)
    copied.calibrations = dict(made.calibrations)
    return copied


@functools.cache
def _made(recipe: str, target: str) -> Prepared:
    torch.manual_seed(0)
    model = build("pico", 1).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics as of a trained model, so that folding shows
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.3, 0.8)
    prepared = prepare(model, None, recipe, target, vocabulary=ShapesTask().vocabulary, size=SIZE)
    calibrate(prepared, picture_batches(prepared, pictures(4, "calibration")), "minmax", 4)
    return prepared
