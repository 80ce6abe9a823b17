"""A study as data: its table, and the JSON that it is kept as, which may come from anywhere."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crqat_fx.bench import Spread
from crqat_fx.errors import UserError
from crqat_fx.findings import (
    Accuracy,
    Counted,
    Drift,
    Edge,
    Found,
    HeatPicture,
    Model,
    Picture,
    Relation,
    Speed,
    StageGraph,
    Study,
    TrainingPhase,
    closing_table,
    load_study,
    turned_table,
)
from crqat_fx.graph_picture import Face

RELATION = Relation((0.1, None), (0.2, 0.3), 0.1, 0.25, 0.9)
PICTURE = Picture("p", 32, 16, "AAAA", ((0.0, 0.0, 8.0, 8.0),), ("cat",))
FLOAT = Model(
    "FP32", "m.pt", "float", accuracy=Accuracy("torch", 5, 9, {"all": 80.0, "novel": None}), counted=Counted(10, 4.0, 0.2, 5.0, 0.3),
    speed=Speed(Spread(8.0, 7.0, 9.0), Spread(1.0, 1.0, 1.0), 100), found=(Found((), (), ()),), missing={"ladder": "floats"},
)  # fmt: skip
QUANTIZED = Model(
    "PTQ", "p.pt", "quantized", "4-8-8-int", "ort", drift=Drift(7, RELATION, RELATION, ((0.5,),)),
    found=(Found(((1.0, 2.0, 3.0, 4.0),), (0.5,), ("cat",)),),
)  # fmt: skip
STUDY = Study(
    "a study", "shapes", 160, 240, "coco", (FLOAT, QUANTIZED), (PICTURE,), (HeatPicture(PICTURE, ((4.0, 4.0),), (8.0,), (None,)),),
    StageGraph("PTQ", (Face("a", ("x",), "told", "backbone"), Face("b", (), "", "")), (Edge(0, 1, (4, 8)),), True), 1, {"processor": "p"},
)  # fmt: skip


def test_a_study_comes_back_as_it_was(tmp_path: Path) -> None:
    STUDY.save(tmp_path / "study.json")
    assert load_study(tmp_path / "study.json") == STUDY


def test_the_closing_table_has_a_column_for_what_any_model_has_and_a_gap_where_one_lacks_it() -> None:
    head, rows = closing_table(STUDY)
    assert head == ["model", "AP all", "AP novel", "MiB", "GBOPs", "times as fast", "region-text", "region-region"]
    assert rows == [["FP32", 80.0, None, 4.0, 200.0, 1.0, None, None], ["PTQ", None, None, None, None, None, 0.1, 0.1]]


def test_the_turned_table_has_a_row_a_figure_with_its_digits() -> None:
    head, rows = turned_table(STUDY)
    assert head == ["", "FP32", "PTQ"]
    assert rows == [
        ["AP all", "80.0", "-"], ["AP novel", "-", "-"], ["MiB", "4.00", "-"], ["GBOPs", "200", "-"], ["times as fast", "1.00", "-"],
        ["region text", "-", "0.1000"], ["region region", "-", "0.1000"],
    ]  # fmt: skip


def test_a_study_without_models_is_none() -> None:
    with pytest.raises(ValueError, match="no model"):
        replace(STUDY, models=())


@pytest.mark.parametrize(("first", "last"), [(3, 3), (-1, 4), (5, 2)])
def test_a_phase_without_a_step_is_none(first: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"from step {first} to {last}"):
        TrainingPhase(first, last, (), (), ())


def changed(value: Any, *path: Any, to: Any) -> Any:
    """Plain data with another value at the end of a path."""
    if not path:
        return to
    here, *rest = path
    copied = list(value) if isinstance(value, list) else dict(value)
    copied[here] = changed(copied[here] if rest else None, *rest, to=to)
    return copied


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "crqat-fx study 9", "format"),
        (("models",), [], "no model"),
        (("models", 0, "kind"), "odd", "kind"),
        (("models", 0, "missing"), {"odd": "x"}, "odd"),
        (("models", 1, "found"), [], "0 lists of boxes for 1 pictures"),
        (("models", 1, "found", 0, "scores"), [], "not a score"),
        (("models", 1, "drift", "heat"), [[0.5, 0.5]], "other anchors"),
        (("heat", 0, "strides"), [], "not a stride"),
        (("shown", 0, "width"), 0, "has no size"),
        (("shown", 0, "names"), [], "not a name for every box"),
        (("graph", "edges", 0, "reader"), 2, "no box 0 that a box 2"),
        (("graph", "edges", 0, "source"), -1, "no box -1"),
        (("graph", "boxes", 0, "leads_to"), "javascript:alert(1)", "one that leads out of it"),
        (("graph", "boxes"), [], "the graph has no box"),
    ],
)
def test_a_doctored_study_is_refused(path: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    STUDY.save(tmp_path / "good.json")
    plain = json.loads((tmp_path / "good.json").read_text(encoding="utf-8"))
    (tmp_path / "study.json").write_text(json.dumps(changed(plain, *path, to=value)), encoding="utf-8")
    with pytest.raises(UserError, match=rf"study\.json: is no study \(.*{message}"):
        load_study(tmp_path / "study.json")
