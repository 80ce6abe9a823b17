"""A run's folder read back: its phases where they lay, its curves without what cannot be read."""

import json
from pathlib import Path

import pytest

from crqat_fx.errors import UserError
from crqat_fx.findings import Curve, TrainingPhase
from crqat_fx.qat import QatSettings
from crqat_fx.run_history import settings_of_run, training_of
from crqat_fx.settings import Resolved, resolve

STAGES = ("backbone", "neck-head")


def folder_of(path: Path, settings: QatSettings, log: str = "", details: str = "") -> Path:
    Resolved(settings, resolve(QatSettings, {}).origins).write(path / "settings.yaml")
    (path / "log.jsonl").write_text(log, encoding="utf-8")
    (path / "quantizers.jsonl").write_text(details, encoding="utf-8")
    return path


def test_phases_stand_where_the_run_had_them(tmp_path: Path) -> None:
    found = training_of(folder_of(tmp_path, QatSettings(steps=30, teacher="t.pt")), STAGES)
    assert (found.method, found.teacher, found.planned) == ("cr-qat", "t.pt", 30)
    assert found.phases == (
        TrainingPhase(0, 10, ("backbone",), ("backbone",), ("task", "pkd")),
        TrainingPhase(10, 30, STAGES, STAGES, ("task", "pkd", "trkd")),
    )
    assert found.log == found.watched == {}


def test_a_run_that_nobody_taught_names_no_teacher(tmp_path: Path) -> None:
    found = training_of(folder_of(tmp_path, QatSettings(steps=30, method="qat", teacher="t.pt")), STAGES)
    assert found.teacher is None
    assert [(phase.first, phase.last) for phase in found.phases] == [(0, 30)]


def test_a_curve_has_the_steps_that_logged_it_and_nothing_that_is_no_number(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "loss": 3, "pkd": 0.5},
        {"step": 4, "loss": float("nan"), "ap": 60.0},
        {"step": 6, "loss": True, "note": "x"},
        {"step": 8, "loss": 2.5},
    ]
    text = "\n".join([*map(json.dumps, lines), "", "[1]", '{"loss": 9}', '{"step": "9", "loss": 9}', '{"step": 10, "loss": 1.'])
    found = training_of(folder_of(tmp_path, QatSettings(teacher="t"), text), STAGES)
    assert found.log == {"loss": Curve((2, 8), (3.0, 2.5)), "pkd": Curve((2,), (0.5,)), "ap": Curve((4,), (60.0,))}


def test_what_is_watched_of_quantizers_is_told_as_means(tmp_path: Path) -> None:
    line = {
        "step": 5, "scale/a.weight_fake_quant": 9.0, "clipped/a.weight_fake_quant": 0.1, "clipped/b.weight_fake_quant": 0.3,
        "flipped/a.weight_fake_quant": 0.5, "clipped/quant.a.output": 0.04, "zero_point/quant.a.output": 3.0,
    }  # fmt: skip
    found = training_of(folder_of(tmp_path, QatSettings(teacher="t"), details=json.dumps(line)), STAGES)
    assert {name: curve.values for name, curve in found.watched.items()} == {
        "clipped weights": (0.2,), "flipped weights": (0.5,), "clipped activations": (0.04,),
    }  # fmt: skip


def test_a_folder_without_settings_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no settings\.yaml; name a folder that `crqat-fx train` wrote"):
        settings_of_run(tmp_path)
