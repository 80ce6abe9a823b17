"""What `export` and `verify` are given wrong is one line on stderr and exit status 2, and leaves no file behind, whole or half."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from crqat_fx.__main__ import main
from crqat_fx.checkpoint import load_model
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.export import export
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.vocabulary import Vocabulary

SIZE = 64
QUANTIZER = "quant.backbone.image_model.stem.conv.output"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared model with its file, the same without ranges, and what is wrong to give with them."""
    folder = tmp_path_factory.mktemp("files")
    task = ShapesTask(size=SIZE)
    texts = task.vocabulary.select(task.vocabulary.names[:4])
    prepared = prepare(load_model("pico-v2")[0], recipe="4-8-8-int", vocabulary=texts, size=SIZE)
    prepared.save(folder / "uncalibrated.pt")
    calibrate(prepared, picture_batches(prepared, [task.draw("calibration", 0).image]), "minmax", 1)
    prepared.save(folder / "prepared.pt")
    export(prepared, folder / "model.onnx", outputs="raw")
    Vocabulary(("a", "b"), np.eye(2, 8, dtype=np.float32)).save(folder / "narrow.npz")
    texts.select(texts.names[:3]).save(folder / "fewer.npz")
    (folder / "a-file").write_text("no folder", encoding="utf-8")
    (folder / "a-folder").mkdir()
    return folder


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line that the command ends with."""
    monkeypatch.setattr("sys.argv", ["crqat-fx", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = [line for line in told.err.splitlines() if line.startswith("crqat-fx: error: ")]
    assert len(lines) == 1
    assert told.err.rstrip().splitlines()[-1] == lines[0]
    return lines[0]


def scale_of(content: dict[str, Any], value: float) -> None:
    """The log of a scale becomes `value`."""
    content["state"][f"{QUANTIZER}.log_scale"].fill_(value)


def within(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def doctor(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return doctor


@pytest.mark.parametrize(
    ("doctor", "said"),
    [
        (within(lambda content: content.update(format_version=99)), "is a prepared model of format 99, and this release reads"),
        (within(lambda content: content.update(target="tensorrt")), "unknown target, processor or method (tensorrt"),
        (within(lambda content: scale_of(content, math.nan)), f"{QUANTIZER}.log_scale is of another kind, or not finite"),
        (within(lambda content: scale_of(content, -1000.0)), f"{QUANTIZER}: the quantizer has a scale of zero"),
        (within(lambda content: scale_of(content, 1000.0)), f"{QUANTIZER}: the quantizer has a scale that is not finite"),
    ],
    ids=["another format", "another target", "a scale that is NaN", "a scale of zero", "a scale without bound"],
)
def test_export_refuses_a_prepared_model_that_gives_no_codes(
    files: Path, tmp_path: Path, doctor: Callable[[Path], None], said: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prepared.pt"
    path.write_bytes((files / "prepared.pt").read_bytes())
    doctor(path)
    assert said in refused(["export", path, "--out", tmp_path / "out" / "model.onnx"], capsys, monkeypatch)
    assert {each.name for each in tmp_path.rglob("*")} <= {"prepared.pt", "out"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{files}/uncalibrated.pt"], "the quantizer is not calibrated: it has no scale; calibrate the model"),
        (["{files}/prepared.pt", "--vocabulary", "{files}/narrow.npz"], "the vocabulary is 8 wide, and the model reads texts of 512"),
        (["pico-v2", "--vocabulary", "{files}/narrow.npz"], "the vocabulary is 8 wide, and the model reads texts of 512"),
        (["{files}/prepared.pt", "--out", "{files}/a-file/model.onnx"], "a-file/model.onnx: cannot be written"),
        (["{files}/prepared.pt", "--out", "{files}/a-folder"], "a-folder: is a folder, not a file"),
        (["pico-v2", "--weights", "int4"], "a checkpoint has no codes to store"),
    ],
    ids=["uncalibrated", "narrow vocabulary", "of a checkpoint too", "a path under a file", "a folder", "int4 of floats"],
)
def test_export_refuses_and_leaves_nothing(
    files: Path, tmp_path: Path, arguments: list[str], said: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    monkeypatch.chdir(tmp_path)
    given = [each.format(files=files) for each in arguments]
    assert said in refused(["export", *given], capsys, monkeypatch)
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before


def saying(key: str, value: object) -> Callable[[onnx.ModelProto], None]:
    """The file's metadata say `value` under `key`; None: nothing."""

    def change(model: onnx.ModelProto) -> None:
        said = {each.key: each.value for each in model.metadata_props} | {f"crqat_fx.{key}": value}
        onnx.helper.set_model_props(model, {name: text for name, text in said.items() if text is not None})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (saying("format", "2"), "is of format '2'"),
        (saying("recipe", None), "is a file in floats: there are no codes to verify"),
        (saying("target", "conv-inputs"), "is of another target than the prepared model"),
        (saying("recipe", json.dumps({"rules": [{"modules": "*"}]})), "is of another recipe than the prepared model"),
        (saying("cpu", "vnni"), "is of another processor than the prepared model"),
        (saying("names", json.dumps(["a", "b", "c", "d"])), "is of another vocabulary than the prepared model's"),
    ],
    ids=["format", "no recipe", "target", "recipe", "processor", "vocabulary"],
)
def test_verify_refuses_a_file_that_is_not_of_the_prepared_model(
    files: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], None], said: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(files / "model.onnx")
    change(model)
    onnx.save(model, tmp_path / "model.onnx")
    assert said in refused(["verify", files / "prepared.pt", tmp_path / "model.onnx", "shapes", "--count", 1], capsys, monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prepared.pt", "none.onnx", "shapes"], "none.onnx: cannot be read"),
        (["prepared.pt", "prepared.pt", "shapes"], "prepared.pt: cannot be opened by onnxruntime"),
        (["prepared.pt", "model.onnx", "shapes", "--vocabulary", "narrow.npz"], "embeddings are 8 wide and the model reads 512"),
        (["prepared.pt", "model.onnx", "shapes", "--vocabulary", "fewer.npz"], "is of another vocabulary than the prepared model's"),
        (["prepared.pt", "model.onnx", "a-folder"], "a-folder"),
        (["uncalibrated.pt", "model.onnx", "shapes"], "the quantizer is not calibrated"),
    ],
)
def test_verify_refuses_in_one_line(files: Path, arguments: list[str], said: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    assert said in refused(["verify", *arguments, "--count", 1], capsys, monkeypatch)
