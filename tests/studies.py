"""A study of a real run, as small as one can be: pico-v2, what was prepared of it, and what four steps of training made of that."""

from collections.abc import Sequence
from pathlib import Path

from crqat_fx.checkpoint import load_model
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.qat import QatSettings, train_file
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare

SIZE = 96
QUICK = ("--pictures", 2, "--compared", 3, "--noise", 1, "--shown", 2, "--rounds", 1, "--operators", 1, "--conf", 0.1, "--batch", 4)


def trained_run(folder: Path, shares: Sequence[float] = (0.5, 0.5)) -> Path:
    """A run's folder: four steps of CR-QAT of pico-v2 at 4-8-8-int, at a size that is small for it."""
    task = ShapesTask(size=SIZE)
    prepared = prepare(load_model("pico-v2")[0], None, "4-8-8-int", "ort", vocabulary=task.vocabulary, size=SIZE)
    calibrate(prepared, picture_batches(prepared, (task.draw("calibration", index).image for index in range(4))), "minmax", 4)
    prepared.save(folder / "prepared.pt")
    settings = QatSettings(
        steps=4, batch=2, texts=20, pictures=16, size=SIZE, teacher="pico-v2", observer="minmax", calibration=2, reestimate=1, log_every=1,
        watch_every=2, ap_pictures=1, shares=tuple(shares),
    )  # fmt: skip
    train_file(folder / "prepared.pt", settings, folder / "run")
    return folder / "run"
