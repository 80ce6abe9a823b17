"""What must run without torch, in processes that cannot import it, nor anything else that the extra `runtime` does not bring."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import drawn_sets
import numpy as np
import pytest
from onnx_files import NAMES, vocabulary, write_nms, write_onnx

from crqat_fx.data.shapes import ShapesTask

FULL = ("torch", "torchvision", "onnx_ir", "onnxscript", "matplotlib", "tensorboardX", "transformers", "pycocotools", "PIL")
CODE = """
import sys

without, asked_for = sys.argv.pop(1).split(","), set()

class Missing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in without:
            asked_for.add(top)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from crqat_fx.__main__ import main
try:
    main()
except SystemExit as ended:
    if not ended.code and "torch" in asked_for:
        sys.exit("torch was asked for")
    raise
"""


def run(*arguments: object, without: tuple[str, ...] = FULL) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, ",".join(without), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def ran(*arguments: object) -> Any:
    done = run(*arguments, "--json", "--threads", 1)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    cv2.imwrite(str(path), cv2.resize(coarse, (90, 60), interpolation=cv2.INTER_CUBIC))
    return path


def test_detect_on_an_exported_file(tmp_path, picture):
    report = ran("detect", write_onnx(tmp_path / "m.onnx"), picture, "--out", tmp_path / "out", "--conf", 0.3)
    assert set(report["counts"]) <= set(NAMES)
    assert len(report["detections"]) > 5
    assert report["settings"]["size"] == {"value": 96, "from": "file"}
    assert (tmp_path / "out" / "picture.png").exists()
    assert "threads: 1  # flag" in (tmp_path / "out" / "settings.yaml").read_text()


def test_detect_by_a_vocabulary_of_the_users(tmp_path, picture):
    vocabulary(("boat", "kite")).save(tmp_path / "v.npz")
    model = write_onnx(tmp_path / "m.onnx", text="runtime", names=())
    report = ran("detect", model, picture, "--out", tmp_path / "out", "--vocabulary", tmp_path / "v.npz", "--text", "kite", "--conf", 0.01)
    assert set(report["counts"]) == {"kite"}


def test_detect_takes_what_nms_in_the_file_keeps(tmp_path, picture):
    report = ran("detect", write_nms(tmp_path / "m.onnx"), picture, "--out", tmp_path / "out")
    assert report["settings"]["conf"] == {"value": 0.2, "from": "file"}
    assert len(report["detections"]) == 3


def test_evaluate_on_the_drawn_task(tmp_path):
    model = write_onnx(tmp_path / "m.onnx", names=ShapesTask().names)
    report = ran("evaluate", model, "--data", "shapes", "--pictures", 3, "--out", tmp_path / "scores")
    assert report["vocabulary"] == {"names": 240, "from": "model"}
    assert report["pictures"] == 3
    assert report["detections"] == 900
    assert (tmp_path / "scores" / "evaluation.json").exists()


def test_evaluate_on_a_coco_set_with_its_vocabulary(tmp_path):
    drawn_sets.write_coco(tmp_path)
    drawn_sets.write_vocabulary(tmp_path / "v.npz", drawn_sets.NAMES)
    config = drawn_sets.write_data(tmp_path, val={"annotations": "annotations.json", "pictures": "pictures"}, vocabularies="v.npz")
    model = write_onnx(tmp_path / "m.onnx", text="runtime", names=())
    report = ran("evaluate", model, "--data", config.path)
    assert report["vocabulary"] == {"names": 3, "from": "data"}
    assert report["objects"] == 12
    assert report["detections"] > 0


def test_evaluate_on_an_lvis_set(tmp_path):
    drawn_sets.write_lvis(tmp_path)
    config = drawn_sets.write_data(tmp_path, val={"annotations": "annotations.json", "pictures": "pictures", "format": "lvis"})
    model = write_onnx(tmp_path / "m.onnx", names=("bow/bow weapon", "bow/bow decorative ribbons", "aerosol can"))
    report = ran("evaluate", model, "--data", config.path, "--metric", "lvis-fixed")
    assert report["metric"] == "lvis-fixed"
    assert set(report["frequency"]) == {"r", "c", "f"}


def test_evaluate_says_that_nms_in_the_file_limits_the_score(tmp_path):
    model = write_nms(tmp_path / "m.onnx", names=ShapesTask().names)
    done = run("evaluate", model, "--data", "shapes", "--pictures", 2)
    assert done.returncode == 0, done.stderr
    assert "has NMS in it: scored is what it keeps, above 0.2 and at most 8 a picture" in " ".join(done.stderr.split())


def test_bench_on_exported_files(tmp_path):
    models = [write_onnx(tmp_path / f"{outputs}.onnx", outputs=outputs) for outputs in ("decoded", "raw")]
    report = ran("bench", *models, "--rounds", 2, "--runs", 1)
    assert len(report["models"]) == 2


def test_shapes_draws_its_set(tmp_path):
    done = run("shapes", "--out", tmp_path / "set", "--train", 0, "--val", 2, "--calibration", 0, "--workers", 0)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "set" / "val" / "000001.png").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["--version"]])
def test_help_needs_nothing(arguments):
    done = run(*arguments, without=(*FULL, "onnxruntime", "onnx", "faster_coco_eval", "numpy", "cv2"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "without", "package", "extra"),
    [
        (["detect", "pico-v2", "{picture}"], FULL, "torch", "full"),
        (["evaluate", "pico-v1", "--data", "shapes"], FULL, "torch", "full"),
        (["prepare", "pico-v1"], FULL, "torch", "full"),
        (["inspect", "pico-v1"], FULL, "torch", "full"),
        (["detect", "{model}", "{picture}"], ("onnxruntime",), "onnxruntime", "runtime"),
        (["evaluate", "{model}", "--data", "shapes"], ("faster_coco_eval",), "faster_coco_eval", "runtime"),
    ],
)
def test_a_package_that_is_missing_is_one_line_that_says_what_to_install(tmp_path, picture, arguments, without, package, extra):
    model = write_onnx(tmp_path / "m.onnx")
    done = run(*(argument.format(picture=picture, model=model) for argument in arguments), without=without)
    assert done.returncode == 2
    assert done.stderr == f"crqat-fx: error: this needs {package}, which is not installed; pip install 'crqat-fx[{extra}]'\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{model}", "--data", "shapes", "--teacher", "pico-v2"], "m.onnx: gives no regions to compare"),
        (["evaluate", "{model}", "--data", "shapes", "--size", "160"], "is for pictures of 96 x 96 px, not of 160"),
        (["evaluate", "{model}", "--data", "shapes"], "the vocabulary of 4 names lacks 240"),
        (["detect", "{model}", "{picture}", "--vocabulary", "v.npz"], "has its vocabulary folded into it"),
        (["detect", "{model}", "{picture}", "--device", "cuda"], "runs on the processor, not on cuda"),
        (["detect", "{foreign}", "{picture}"], "crqat-fx did not write: its metadata lacks crqat_fx.format"),
        (["detect", "none.onnx", "{picture}"], "none.onnx: cannot be read"),
    ],
)
def test_what_does_not_fit_an_exported_file_is_one_line_and_status_2(tmp_path, picture, arguments, message):
    model = write_onnx(tmp_path / "m.onnx")
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(model.read_bytes().replace(b"crqat_fx.format", b"another.format_"))
    done = run(*(argument.format(picture=picture, model=model, foreign=foreign) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("crqat-fx: error: ")
    assert done.stderr.count("\n") == 1
