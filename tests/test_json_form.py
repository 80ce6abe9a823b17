"""Dataclasses go through JSON and come back equal; whatever else a file holds is refused, with its place."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from crqat_fx.errors import UserError
from crqat_fx.json_form import from_plain, load_json, save_json


@dataclass(frozen=True)
class Inner:
    low: float
    high: float | None = None

    def __post_init__(self) -> None:
        if self.high is not None and self.high < self.low:
            raise ValueError("its ends are the wrong way round")


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    kind: Literal["a", "b"]
    on: bool
    pair: tuple[int, float]
    many: tuple[Inner, ...] = ()
    by_name: Mapping[str, float | None] = field(default_factory=dict)
    place: Path | None = None
    inner: Inner | None = None


FULL = Outer("x", 3, "b", True, (1, 2.5), (Inner(0.5), Inner(1.0, 2.0)), {"one": 1.0, "none": None}, Path("a/b"), Inner(-1.0))
PLAIN: dict[str, Any] = {"name": "x", "count": 3, "kind": "b", "on": True, "pair": [1, 2.5]}


def test_a_dataclass_comes_back_as_it_was(tmp_path: Path) -> None:
    save_json(FULL, tmp_path / "f.json")
    assert load_json(Outer, tmp_path / "f.json") == FULL


def test_fields_with_a_default_may_be_left_out_and_whole_numbers_are_floats() -> None:
    found = from_plain(Outer, {**PLAIN, "pair": [1, 2], "by_name": {"one": 1}})
    assert found == Outer("x", 3, "b", True, (1, 2.0), by_name={"one": 1.0})
    assert type(found.pair[1]) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "3"}, "count is '3', not int"),
        ({"count": 3.0}, r"count is 3\.0, not int"),
        ({"count": True}, "count is True, not int"),
        ({"on": 1}, "on is 1, not bool"),
        ({"kind": "c"}, "kind is 'c'"),
        ({"kind": ["a"]}, "kind is"),
        ({"name": None}, "name is None, not str"),
        ({"pair": [1]}, r"pair is \[1\]"),
        ({"pair": [1, 2, 3]}, "pair is"),
        ({"pair": [1, True]}, r"pair\[1\] is True, not float"),
        ({"many": [{"low": 0.0}, {"low": "y"}]}, r"many\[1\].low is 'y'"),
        ({"many": [{"low": 2.0, "high": 1.0}]}, "the wrong way round"),
        ({"by_name": {"one": "1"}}, "by_name.one is '1'"),
        ({"by_name": [1]}, "by_name is"),
        ({"inner": {"low": 0.0, "middle": 1}}, "inner has an unknown field 'middle'"),
        ({"inner": {"high": 1.0}}, "inner has no low"),
        ({"inner": 3}, "inner is 3"),
        ({"place": 3}, "place is 3"),
        ({"more": 1}, "it has an unknown field 'more'"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(json.dumps({**PLAIN, **change}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"f\.json: is no outer \(.*{message}.*give a file that crqat-fx wrote"):
        load_json(Outer, tmp_path / "f.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + "0" * 400])
def test_a_number_that_is_not_finite_is_refused(number: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(f'{{"low": {number}}}', encoding="utf-8")
    with pytest.raises(UserError, match="is no inner"):
        load_json(Inner, tmp_path / "f.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        save_json(Inner(float("nan")), tmp_path / "g.json")
    assert not (tmp_path / "g.json").exists()


def test_a_whole_number_that_no_number_of_a_processor_holds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(json.dumps({**PLAIN, "count": 2**63}), encoding="utf-8")
    with pytest.raises(UserError, match="count is 9223372036854775808, not int"):
        load_json(Outer, tmp_path / "f.json")
    assert from_plain(Outer, {**PLAIN, "count": -(2**63)}).count == -(2**63)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "null", '"x"', "\udc00"])
def test_what_is_no_json_of_it_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError, match="is no outer") as refused:
        load_json(Outer, tmp_path / "f.json")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match=r"no\.json: cannot be read \(No such file"):
        load_json(Outer, "no.json")
