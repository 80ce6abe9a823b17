"""The command line as a user meets it: separate processes, exit statuses, what stands on stdout and stderr."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import crqat_fx
from crqat_fx.checkpoint import write_checkpoint
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.models.yolo_world import build
from crqat_fx.vocabulary import Vocabulary

COMMANDS = (
    *("detect", "embed", "inspect", "shapes", "evaluate", "passes", "cost", "prepare", "sensitivity", "train", "export", "verify", "bench"),
    *("pretrain", "demo"),
)


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "crqat_fx", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "pico.pt"
    module = build("pico", 2)
    write_checkpoint(path, module, module.config, vocabulary=ShapesTask().vocabulary, metadata={"size": 96})
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    return path


def test_help_lists_every_command_and_each_explains_itself():
    shown = run("--help")
    assert shown.returncode == 0
    assert all(f" {command} " in shown.stdout for command in COMMANDS)
    for command in COMMANDS:
        own = run(command, "--help")
        assert own.returncode == 0
        assert "--json" in own.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["detect", "--help"]])
def test_help_and_version_import_no_torch(arguments):
    code = (
        "import sys; sys.argv = ['crqat-fx', *sys.argv[1:]]\n"
        "from crqat_fx.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'cv2', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert shown.stderr.strip() == "[]"


def test_the_version_is_the_packages():
    assert run("--version").stdout.strip() == f"crqat-fx {crqat_fx.__version__}"


def test_names_that_look_like_markup_and_files_named_in_no_encoding_are_shown_as_they_are(model, picture, tmp_path):
    names = ("[/x] 1", "[red]cat[/red]", ":cat:", "\u732b")
    Vocabulary(names, ShapesTask().vocabulary.embeddings[:4]).save(tmp_path / "v.npz")
    odd = tmp_path / os.fsdecode(b"\xff\xfe.png")
    odd.write_bytes(picture.read_bytes())
    for more in ((), ("--json",)):
        environment = os.environ | {"PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "crqat_fx", "detect", model, odd, "--vocabulary", tmp_path / "v.npz", "--conf", "0"]
        done = subprocess.run([*command, "--out", tmp_path / "out", *more], capture_output=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        if more:
            assert {one["category_name"] for one in json.loads(done.stdout)["detections"]} == set(names)
        else:
            assert b"[red]cat[/red]" in done.stdout
            assert b":cat:" in done.stdout


def test_every_result_has_its_settings_beside_it(model, tmp_path):
    assert run("shapes", "--out", tmp_path / "set", "--train", 0, "--val", 3, "--calibration", 0, "--workers", 0).returncode == 0
    assert "val: 3  # flag" in (tmp_path / "set" / "settings.yaml").read_text()
    assert run("inspect", model, "--graph", tmp_path / "g.svg", "--stages", 3).returncode == 0
    assert "stages: 3  # flag" in (tmp_path / "g.svg.settings.yaml").read_text()
    scored = run("evaluate", model, "--data", tmp_path / "set" / "data.yaml", "--out", tmp_path / "scores")
    assert scored.returncode == 0, scored.stderr
    assert (tmp_path / "scores" / "settings.yaml").read_text().startswith(f"# crqat-fx evaluate {model} --data")
    assert json.loads((tmp_path / "scores" / "evaluation.json").read_text())["vocabulary"] == {"names": 240, "from": "data"}


def test_a_preset_is_inspected_and_counted_without_a_file(tmp_path):
    seen = run("inspect", "yolo-world-v1-s", "--json", "--graph", tmp_path / "s.svg")
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout)["parameters"] == 13_383_480
    assert (tmp_path / "s.svg").exists()


def test_detect_draws_writes_its_settings_and_takes_the_size_from_the_file(model, picture, tmp_path):
    out = tmp_path / "out"
    done = run("detect", model, picture, "--out", out, "--conf", 0.001, "--text", _two_names(), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["pictures"] == 1
    assert report["settings"]["size"] == {"value": 96, "from": "file"}
    assert report["settings"]["conf"] == {"value": 0.001, "from": "flag"}
    assert report["detections"] == json.loads((out / "detections.json").read_text())
    assert {one["category_name"] for one in report["detections"]} <= set(ShapesTask().names[:2])
    assert (out / "picture.png").exists()
    assert "size: 96  # file" in (out / "settings.yaml").read_text()


def _two_names() -> str:
    return ", ".join(ShapesTask().names[:2])


def test_settings_beside_a_result_repeat_it(model, picture, tmp_path):
    first = run("detect", model, picture, "--out", tmp_path / "a", "--conf", 0.001, "--size", 64)
    assert first.returncode == 0, first.stderr
    again = run("detect", model, picture, "--out", tmp_path / "b", "--config", tmp_path / "a" / "settings.yaml")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a" / "detections.json").read_bytes() == (tmp_path / "b" / "detections.json").read_bytes()
    assert "size: 64  # config" in (tmp_path / "b" / "settings.yaml").read_text()


def test_a_picture_that_cannot_be_read_is_named_and_the_status_is_one(model, picture, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    done = run("detect", model, tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "1 skipped: broken.png" in done.stderr
    assert (tmp_path / "out" / "picture.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere.pt"], "nowhere.pt"),
        (["inspect", "text.txt"], "text.txt"),
        (["detect", "{model}", "nothing-here.jpg"], "nothing-here.jpg"),
        (["detect", "{model}", "{picture}", "--conf", "2"], "conf is 2"),
        (["detect", "{model}", "{picture}", "--size", "100"], "size is 100"),
        (["detect", "{model}", "{picture}", "--text", "unicorn"], "unicorn"),
        (["detect", "{model}", "{picture}", "--config", "text.txt"], "text.txt"),
        (["detect", "{model}", "{picture}", "--out", "text.txt"], "text.txt"),
        (["detect", "{model}", "{picture}", "--device", "toaster"], "toaster"),
        (["evaluate", "{model}", "--data", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate", "{model}", "--data", "shapes", "--metric", "vibes"], "metric is 'vibes'"),
        (["evaluate", "{model}", "--data", "shapes", "--plots", "p"], "--teacher"),
        (["cost", "yolo-world-v3-q"], "yolo-world-v3-q"),
        (["cost", "yolo-world-v1-l", "--recipe", "1-2-3"], "1-2-3"),
        (["cost", "yolo-world-v1-l", "--target", "toaster"], "toaster"),
        (["prepare", "{model}", "--recipe", "9-9-9"], "9-9-9"),
        (["prepare", "{model}", "--calibrate", "nowhere"], "nowhere"),
        (["prepare", "{model}", "--correct-norms"], "--correct-norms: norms are corrected on pictures; name some with --calibrate"),
        (["prepare", "{model}", "--calibrate", "shapes", "--observer", "eyes"], "eyes"),
        (["pretrain", "--out", "run", "--model", "huge"], "model is 'huge'"),
        (["pretrain", "--out", "run", "--resume"], "run"),
        (["shapes", "--out", "full"], "full"),
        (["inspect", "{model}", "--graph", "graph.pdf"], "graph.pdf"),
        (["inspect", "{model}", "--stages", "4"], "stages is 4"),
        (["embed", "text.txt"], "--encoder"),
        (["cost", "pico-v2", "--vocabulary", "narrow.npz"], "8 wide"),
        (["evaluate", "{model}", "--data", "shapes", "--teacher", "nowhere.pt"], "nowhere.pt"),
        (["embed", "text.txt", "--encoder", "nowhere"], "nowhere"),
    ],
)
def test_a_users_mistake_is_one_line_on_stderr_and_status_two(model, picture, tmp_path, arguments, message):
    work = tmp_path / "work"
    (work / "full").mkdir(parents=True)
    (work / "full" / "file").write_text("")
    (work / "text.txt").write_text("some text\nmore\n")
    Vocabulary(("cat",), np.ones((1, 8), np.float32)).save(work / "narrow.npz")
    before = sorted(work.rglob("*"))
    done = run(*(argument.format(model=model, picture=picture) for argument in arguments), cwd=work)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("crqat-fx: error: ")
    assert message in lines[0]
    assert sorted(work.rglob("*")) == before


def test_inspect_evaluate_and_cost_answer_in_json(model, tmp_path):
    seen = json.loads(run("inspect", model, "--json", "--graph", tmp_path / "stages.svg").stdout)
    assert (seen["size"], seen["version"], seen["vocabulary"]["count"]) == ("pico", 2, 240)
    assert (tmp_path / "stages.svg").read_text().startswith("<svg")
    scored = run("evaluate", model, "--data", "shapes", "--pictures", 8, "--teacher", model, "--plots", tmp_path / "plots", "--json")
    assert scored.returncode == 0, scored.stderr
    report = json.loads(scored.stdout)
    assert report["pictures"] == 8
    assert set(report["split"]) == {"base", "novel"}
    assert report["distortion"]["region_text"]["embedding"] == 0
    assert (tmp_path / "plots" / "scatter.png").exists()
    counted = json.loads(run("cost", "yolo-world-v1-m", "--recipe", "4-4-8", "--target", "conv-inputs", "--json").stdout)
    assert {"parameters", "macs", "bops_t", "size_mib", "fp32_bops_t", "fp32_size_mib"} <= set(counted)


def test_a_drawn_set_on_disk_scores_as_the_streamed_one_does(model, tmp_path):
    done = run("shapes", "--out", tmp_path / "set", "--train", 0, "--calibration", 0, "--val", 8, "--workers", 0)
    assert done.returncode == 0, done.stderr
    streamed, read = (
        json.loads(run("evaluate", model, "--data", *data, "--size", 160, "--json").stdout)
        for data in (("shapes", "--pictures", 8), (tmp_path / "set" / "data.yaml",))
    )
    assert streamed["scores"] == read["scores"]
    assert streamed["objects"] == read["objects"]


def test_a_model_is_prepared_calibrated_and_then_evaluated_as_it_is(model, tmp_path):
    out = tmp_path / "prepared.pt"
    done = run(
        "prepare", model, "--recipe", "8-8-8", "--target", "conv-inputs", "--calibrate", "shapes", "--pictures", 4, "--correct-norms",
        "--out", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["calibrated"]
    assert report["corrected"] == 60
    assert [stage["stage"] for stage in report["stages"]] == ["backbone", "neck-head"]
    assert all(stage["quantizers"] > 0 for stage in report["stages"])
    assert any("stem" in one["path"] for one in report["float"])
    assert "recipe: 8-8-8  # flag" in (tmp_path / "prepared.pt.settings.yaml").read_text()
    scored = run("evaluate", out, "--data", "shapes", "--pictures", 4, "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["settings"]["size"] == {"value": 96, "from": "file"}


def test_a_prepared_model_without_ranges_is_refused_where_it_would_run(model, picture, tmp_path):
    assert run("prepare", model, "--out", tmp_path / "prepared.pt").returncode == 0
    done = run("detect", tmp_path / "prepared.pt", picture, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "its quantizers have no ranges" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_another_width_is_refused(model, picture, tmp_path):
    Vocabulary(("cat",), np.ones((1, 8), np.float32)).save(tmp_path / "v.npz")
    done = run("detect", model, picture, "--vocabulary", tmp_path / "v.npz", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "8 wide" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_api_hands_out_functions_where_modules_have_their_names():
    for name in crqat_fx.__all__:
        assert getattr(crqat_fx, name) is not None
    importlib.import_module("crqat_fx.trace")
    assert crqat_fx.trace is importlib.import_module("crqat_fx.trace").trace
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = crqat_fx.nothing
