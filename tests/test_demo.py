"""The demo, small: what it leaves, what it says, and what becomes of an earlier one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from crqat_fx import demo as module
from crqat_fx.cli import app
from crqat_fx.demo import DemoSettings, demo
from crqat_fx.errors import UserError
from crqat_fx.findings import STUDY, load_study
from crqat_fx.model_files import read_model
from crqat_fx.onnx_detector import read_onnx
from crqat_fx.progress import Progress
from crqat_fx.quantize.prepared import Prepared

SMALL = {"steps": 2, "pictures": 6, "calibration": 4, "compared": 2, "rounds": 1}  # too little to judge by: the whole way alone
LABELS = ["FP32", "PTQ 8-8-8-int", "PTQ 4-8-8-int", "CR-QAT 4-8-8-int", "PTQ 4-4-8", "CR-QAT 4-4-8"]
AP = ["AP all", "AP base", "AP novel", "AP rare", "AP common", "AP frequent"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A demo's folder, what it printed as JSON, and what it said on the way."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "small.yaml").write_text("".join(f"{name}: {value}\n" for name, value in SMALL.items()))
    command = [sys.executable, "-m", "crqat_fx", "demo", "--out", "out", "--config", "small.yaml", "--json"]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads(done.stdout), done.stderr


def test_the_table_has_six_forms_of_the_model_with_accuracy_size_operations_and_speed(finished):
    rows = {row["model"]: row for row in finished[1]["table"]}
    assert list(rows) == LABELS
    assert all(isinstance(row[name], float) for row in rows.values() for name in (*AP, "MiB", "GBOPs", "times as fast"))
    assert rows["FP32"]["times as fast"] == 1
    for cost in ("MiB", "GBOPs"):
        assert rows["FP32"][cost] > rows["PTQ 8-8-8-int"][cost] > rows["PTQ 4-8-8-int"][cost]
        assert rows["PTQ 4-8-8-int"][cost] == rows["CR-QAT 4-8-8-int"][cost]


def test_every_file_computes_what_its_model_does(finished):
    study = load_study(finished[0] / STUDY)
    assert finished[1]["departed"] == []
    assert [model.ladder is not None and model.ladder.passed for model in study.models] == [False, *[True] * 5]


def test_every_model_stands_there_as_the_commands_take_it(finished):
    out = finished[0]
    assert read_onnx(out / "fp32.onnx").metadata.recipe is None
    for recipe, trained in (("8-8-8-int", False), ("4-8-8-int", True), ("4-4-8", True)):
        assert isinstance(read_model(out / recipe / "prepared.pt"), Prepared)
        assert read_onnx(out / recipe / "ptq.onnx").metadata.weights == ("int8" if recipe == "8-8-8-int" else "int4")
        assert (out / recipe / "run").exists() == trained
        if trained:
            model = read_model(out / recipe / "run" / "prepared.pt")
            assert isinstance(model, Prepared)
            assert model.weights == "average"
            assert read_onnx(out / recipe / "cr-qat.onnx").metadata.weights == "int4"
    assert (out / "settings.yaml").read_text().startswith("# crqat-fx demo\n")


def test_the_report_stands_beside_and_names_every_model(finished):
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert all(label in page for label in LABELS)


def test_the_closing_table_fits_a_terminal_of_eighty_characters(finished, tmp_path, monkeypatch):
    study = load_study(finished[0] / STUDY)
    monkeypatch.setattr(module, "demo", lambda *_: study)
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    table = [line for line in done.stdout.splitlines() if line.startswith(("┃", "│"))]
    assert all(len(line) <= 80 for line in table)
    words = {word for line in table for word in re.split(r"[ ┃│]+", line)}
    assert words >= {"CR-QAT", "4-8-8-int", "novel", "frequent", "MiB", "GBOPs", "times", "region", "text"}
    assert {f"{row['AP all']:.1f}" for row in finished[1]["table"]} <= words


def test_it_says_what_is_done_now_and_of_how_much(finished):
    lines = finished[2].splitlines()
    assert [line[:6] for line in lines if "done in" in line] == [f"{number} of 6" for number in range(1, 7)]
    assert any(line.startswith("3 of 6: CR-QAT at 4-8-8-int: 2 of 2 loss") for line in lines)


# --- an earlier demo, and an interrupted one ---


def test_an_earlier_demos_runs_and_report_make_way_before_the_first_deed(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)

    def stop(_what: str) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo(out, DemoSettings(), stop)
    assert not any((out / name).exists() for name in ("4-8-8-int/run", "4-4-8/run", "report.html", STUDY))
    assert (out / "4-8-8-int" / "prepared.pt").exists()


def test_a_folder_that_no_training_wrote_is_not_removed(tmp_path):
    (tmp_path / "4-4-8" / "run").mkdir(parents=True)
    (tmp_path / "4-4-8" / "run" / "thesis.txt").touch()
    with pytest.raises(UserError, match="is in the way"):
        demo(tmp_path)
    assert (tmp_path / "4-4-8" / "run" / "thesis.txt").exists()


def test_an_interrupt_while_it_trains_ends_it_with_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECIPES", {"4-8-8-int": True})

    @contextmanager
    def begin(what: str) -> Iterator[Progress]:
        def tell(done: int, total: int, at: str) -> None:
            if "CR-QAT" in what:
                signal.raise_signal(signal.SIGINT)

        yield tell

    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, DemoSettings(steps=3, calibration=2), begin)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"4-8-8-int/prepared.pt", "4-8-8-int/ptq.onnx", "4-8-8-int/run/last.pt"} <= left
    assert not [name for name in left if Path(name).name.startswith(".") or name in ("report.html", STUDY, "4-8-8-int/cr-qat.onnx")]


@pytest.mark.parametrize("wrong", [{"steps": 1}, {"pictures": 0}, {"calibration": 0}, {"rounds": 0}])
def test_settings_that_leave_nothing_to_compare_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        DemoSettings(**wrong)
