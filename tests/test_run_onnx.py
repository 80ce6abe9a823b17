"""The example that runs an exported file without this package finds what `detect` finds."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from onnx_files import NAMES, write_onnx

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "run_onnx.py"
CONF = 0.3
SCORE, BOX = 5.1e-4, 5.2e-2  # half the last digit that it prints, and rounding


@pytest.mark.parametrize(
    ("metadata", "picture_size"),
    [({}, (80, 120)), ({"input": "uint8"}, (200, 60)), ({"size": (64, 96)}, (96, 64)), ({"multiple": 32, "size": (64, 64)}, (40, 30))],
)
def test_the_example_finds_what_detect_finds(tmp_path, metadata, picture_size):
    model = write_onnx(tmp_path / "model.onnx", **metadata)
    coarse = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), cv2.resize(coarse, picture_size[::-1], interpolation=cv2.INTER_CUBIC))
    shown = subprocess.run([sys.executable, EXAMPLE, model, tmp_path / "a.png", str(CONF)], capture_output=True, text=True, check=True)
    command = [
        sys.executable,
        "-m",
        "crqat_fx",
        "detect",
        model,
        tmp_path / "a.png",
        f"--conf={CONF}",
        f"--out={tmp_path / 'out'}",
        "--json",
    ]
    detected = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["detections"]
    assert len(detected) > 5
    lines = [line.split(" ", 1) for line in shown.stdout.splitlines()]
    found = [(name, float(score), ast.literal_eval(f"[{box}")) for score, rest in lines for name, _, box in [rest.rpartition(" [")]]
    assert len(found) == len(detected)
    assert {name for name, _, _ in found} <= set(NAMES)
    rest = list(found)
    for one in detected:
        left, top, width, height = one["bbox"]
        corners = np.array([left, top, left + width, top + height])
        same = [
            other
            for other in rest
            if other[0] == one["category_name"] and abs(other[1] - one["score"]) < SCORE and np.abs(other[2] - corners).max() < BOX
        ]
        assert same, one
        rest.remove(same[0])


def test_the_example_is_short_and_needs_no_more_than_it_says():
    source = EXAMPLE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
    names = [alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names]
    assert sorted(names) == ["cv2", "json", "numpy", "onnxruntime", "sys"]
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
