"""Operators of floats and of codes stand side by side by the work that they do."""

import json

import pytest
from small_onnx import convolutions
from typer.testing import CliRunner

from crqat_fx.cli import app
from crqat_fx.onnx_profile import OperatorTime, operator_times, profile
from crqat_fx.work import ALL, OTHER, PRODUCTS, by_work, work_of

FLOATS = (OperatorTime("Conv", 2, 1000, 8.0), OperatorTime("QuickGelu", 2, 0, 1.0), OperatorTime("Add", 1, 0, 0.5))
CODES = (
    OperatorTime("QLinearConv", 2, 1000, 2.5),
    OperatorTime("QLinearMul", 2, 0, 1.5),
    OperatorTime("QLinearSigmoid", 2, 0, 2.0),
    OperatorTime("QuantizeLinear", 1, 0, 0.25),
    OperatorTime("Erf", 1, 0, 0.125),
)


def test_kinds_of_work_are_compared_whatever_the_operators_are_called():
    found = {one.name: one for one in by_work([FLOATS, CODES])}
    assert list(found) == ["activations and gates", PRODUCTS, "floats to codes and back", OTHER, "joins and sums", ALL]
    assert found[PRODUCTS].milliseconds == (8.0, 2.5)
    assert found[PRODUCTS].times_faster(1) == 3.2
    assert found[PRODUCTS].above_ceiling(1) == 0.5
    assert found["activations and gates"].milliseconds == (1.0, 3.5)
    assert found["activations and gates"].above_ceiling(1) == 3.25
    assert found["activations and gates"].operators == ("2 QuickGelu 1.00", "2 QLinearSigmoid 2.00, 2 QLinearMul 1.50")
    assert found["joins and sums"].times_faster(1) is None
    assert found["joins and sums"].above_ceiling(1) == -0.125
    assert found[ALL].milliseconds == (9.5, 6.375)


def test_what_is_above_the_ceiling_adds_up():
    *parts, whole = by_work([FLOATS, CODES])
    assert sum(one.above_ceiling(1) for one in parts) == whole.above_ceiling(1)


def test_every_operator_of_a_file_is_counted_once(tmp_path):
    times = operator_times(profile(convolutions(tmp_path / "q.onnx"), runs=2, threads=1))
    *parts, whole = by_work([times, times])
    assert sum(one.milliseconds[0] for one in parts) == pytest.approx(whole.milliseconds[0])
    assert all(one.times_faster(1) in (1, None) for one in parts)
    assert {work_of(one) for one in times} == {one.name for one in parts}


def test_the_command_holds_each_file_against_the_first(tmp_path):
    path = str(convolutions(tmp_path / "q.onnx"))
    arguments = ["bench", path, path, path, "--rounds", "1", "--runs", "1", "--operators"]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.exit_code == 0
    assert shown.stdout.count("where the time goes") == 2
    assert PRODUCTS in shown.stdout
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert told["work"][-1]["work"] == ALL
    assert [len(told["work"][-1][key]) for key in ("ms", "times_faster", "ms_above_a_quarter")] == [3, 2, 2]
