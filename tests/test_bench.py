"""Models timed against each other: how rounds become figures, and what the processes do. Nothing here looks at a clock."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_onnx import convolutions

from crqat_fx.bench import BenchReport, BenchSettings, Contender, Once, Spread, Timing, bench, format_machine, machine, operators_of
from crqat_fx.errors import UserError
from crqat_fx.onnx_run import Extent

SMALL = BenchSettings(rounds=3, runs=2)
WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = None; sys.argv = ['crqat-fx', *sys.argv[1:]]\nfrom crqat_fx.__main__ import main\nmain()\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convolutions(tmp_path_factory.mktemp("bench") / "q.onnx")


def timing(name: str, *turns: float) -> Timing:
    return Timing(name, Path(name), 1, turns)


def start_and_note(path: Path, extent: Extent, threads: int) -> Once:
    """A contender that writes down each of its runs."""

    def once() -> None:
        with path.open("a", encoding="utf-8") as log:
            log.write(f"{os.getpid()} {extent.size} {threads}\n")

    return once


def start_and_die(path: Path, extent: Extent, threads: int) -> Once:
    os._exit(3)


def test_a_spread_is_the_median_and_the_quartiles():
    assert Spread.of([4, 1, 2, 3, 5]) == Spread(3, 2, 4)
    assert f"{Spread(3, 2, 4):.1f}" == "3.0 (2.0 to 4.0)"


def test_a_ratio_is_taken_within_each_round():
    slow, fast = timing("slow", 10, 40, 20), timing("fast", 5, 10, 10)  # the machine was busy in the second round
    assert fast.times_faster_than(slow) == Spread.of([2, 4, 2])
    assert slow.times_faster_than(slow) == Spread(1, 1, 1)


def test_a_report_finds_a_model_by_its_name_and_is_plain_data():
    report = BenchReport((timing("slow", 10, 10), timing("fast", 5, 5)), SMALL, machine())
    assert report["fast"].milliseconds.median == 5
    plain = json.loads(json.dumps(report.as_json()))
    assert [one["times_faster"]["median"] for one in plain["models"]] == [1, 2]
    assert plain["rounds"] == 3


def test_every_model_runs_in_its_own_process_as_often_as_asked(tmp_path):
    contenders = [Contender(name, tmp_path / name, start_and_note) for name in ("a", "b")]
    for one in contenders:
        one.path.touch()
    said: list[tuple[int, int]] = []
    report = bench(contenders, BenchSettings(rounds=4, runs=2, size=64, threads=2), lambda done, total, _: said.append((done, total)))
    runs = [one.path.read_text(encoding="utf-8").split() for one in contenders]
    processes = [set(each[::3]) for each in runs]
    assert [len(each) for each in processes] == [1, 1]
    assert processes[0] != processes[1]
    assert str(os.getpid()) not in processes[0] | processes[1]
    assert [len(each) // 3 for each in runs] == [4 * (1 + 2)] * 2  # one of a turn is not counted
    assert runs[0][1:3] == ["64", "2"]
    assert [len(one.turns) for one in report.timings] == [4, 4]
    assert said[-1] == (4, 4)


def test_the_size_of_a_model_is_that_of_all_its_files(tmp_path):
    graph, weights = tmp_path / "model.xml", tmp_path / "model.bin"
    graph.write_bytes(b"12")
    weights.write_bytes(b"345")
    assert Contender("openvino", graph, beside=(weights,)).bytes == 5


def test_two_files_are_timed_by_onnxruntime(model):
    report = bench([model, model], SMALL)
    assert [len(one.turns) for one in report.timings] == [3, 3]
    assert all(turn > 0 for one in report.timings for turn in one.turns)
    assert report.timings[0].bytes == model.stat().st_size


def test_a_model_that_cannot_be_opened_is_named(model, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad\.onnx: cannot be opened by onnxruntime"):
        bench([model, tmp_path / "bad.onnx"], SMALL)


def test_a_process_that_dies_is_named_with_its_status(tmp_path):
    with pytest.raises(UserError, match="dying: its process ended with status 3"):
        bench([Contender("dying", tmp_path / "dying", start_and_die)], SMALL)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"runs": 0}, {"threads": 0}, {"texts": -1}, {"batch": 0}, {"size": 0}])
def test_settings_below_one_are_refused(model, wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        bench([model], BenchSettings(**wrong))


def test_no_model_is_refused():
    with pytest.raises(UserError, match="no model to time"):
        bench([])


def test_the_machine_is_told_with_its_versions():
    import numpy
    import onnxruntime

    text = format_machine(machine())
    assert f"onnxruntime {onnxruntime.__version__}" in text
    assert f"numpy {numpy.__version__}" in text


def test_operators_of_a_file_come_with_its_coverage(model):
    found = operators_of(model, SMALL)
    assert sum(one.macs for one in found.times) == found.coverage.macs
    assert json.loads(json.dumps(found.as_json()))["coverage"]["counts"] == dict(found.coverage.counts)


def test_the_command_needs_no_torch_and_prints_json(model):
    arguments = ["bench", model, model, "--rounds", "2", "--runs", "1", "--operators", "--json"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [len(one["turns_ms"]) for one in report["models"]] == [2, 2]
    assert report["settings"]["rounds"] == {"value": 2, "from": "flag"}
    assert len(report["operators"]) == 2


def test_the_command_refuses_what_is_no_model_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "crqat_fx", "bench", str(tmp_path / "none.onnx")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "none.onnx" in line and "cannot be read" in line]
