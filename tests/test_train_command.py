"""`crqat-fx train` as it is typed: the published configuration, several processes that are killed and go on, and what is given wrong."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drawn_sets import write_grounding, write_objects365, write_vocabulary
from test_qat import prepared_file, teacher
from test_train import logged, saved

from crqat_fx.__main__ import main
from crqat_fx.checkpoint import write_checkpoint
from crqat_fx.correct_norms import correctable
from crqat_fx.data.config import read_data, texts_needed
from crqat_fx.models.yolo_world import YoloWorld
from crqat_fx.qat import QatSettings, train_file
from crqat_fx.quantize.prepare import load_prepared
from crqat_fx.quantize.prepared import read_saved
from crqat_fx.settings import resolve

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "configs" / "o365_gqa_448.yaml"


def miniature(folder: Path, width: int = 16) -> Path:
    """Objects365 and a grounding set, in the formats of the published training, with one vocabulary."""
    folder.mkdir(exist_ok=True)
    for name in ("o365", "gqa"):
        (folder / name).mkdir()
    sets = {"objects365": write_objects365(folder / "o365"), "grounding": write_grounding(folder / "gqa")}
    train = [{"annotations": str(where), "pictures": str(pictures), "format": form} for form, (where, pictures) in sets.items()]
    (folder / "data.yaml").write_text(json.dumps({"train": train, "vocabularies": "v.npz"}))
    write_vocabulary(folder / "v.npz", texts_needed(read_data(folder / "data.yaml")), width)
    return folder / "data.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared model, its teacher and data; and what is wrong to give in their place."""
    folder = tmp_path_factory.mktemp("files")
    prepared_file(folder / "prepared.pt", recipe="4-4-8")
    for name, model in {"teacher": teacher(), "wider": YoloWorld(replace(teacher().config, widen=0.25))}.items():
        write_checkpoint(folder / f"{name}.pt", model.state_dict(), model.config)
    for name in ("mini", "again"):
        miniature(folder / name)
    miniature(folder / "narrow", width=8)
    (folder / "a-file").write_text("no folder", encoding="utf-8")
    (folder / "run.yaml").write_text(
        json.dumps({"steps": 4, "batch": 2, "texts": 6, "calibration": 4, "reestimate": 1, "norm": "frozen", "watch_every": 2})
    )
    return folder


def command(files: Path, out: Path, *more: object, config: Path | None = None, model: str = "prepared.pt") -> list[str]:
    given = {"--teacher": files / "teacher.pt", "--data": files / "mini" / "data.yaml", "--size": 64, "--out": out}
    flags = [str(part) for flag in given.items() if flag[0] not in more for part in flag]
    return ["train", str(files / model), *flags, "--config", str(config or files / "run.yaml"), *map(str, more)]


# --- the published configuration ---


def test_the_published_configuration_holds_what_is_published() -> None:
    settings = resolve(QatSettings, {}, PUBLISHED).values
    assert (settings.method, settings.shares, settings.relations) == ("cr-qat", (1 / 3, 2 / 3), "full")
    assert (settings.batch, settings.accumulate, settings.schedule, settings.warmup) == (48, 1, "constant", 0)
    assert (settings.kd_weight, settings.quantizer_rate, settings.calibration) == (6.0, 0.1, 256)
    assert settings.steps == round((1_742_292 + 621_000) / 48)


def test_the_published_configuration_trains_on_miniature_sets_of_its_formats(files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """All as published but for the size, the length, the paths and the processes that read; from the file to the trained model."""
    out = tmp_path / "run"
    arguments = command(files, out, "--steps", 3, "--workers", 0, "--log-every", 1, config=PUBLISHED)
    monkeypatch.setattr("sys.argv", ["crqat-fx", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    run, published = (resolve(QatSettings, {}, path).values for path in (out / "settings.yaml", PUBLISHED))
    differ = {field.name for field in dataclasses.fields(QatSettings) if getattr(run, field.name) != getattr(published, field.name)}
    assert differ == {"data", "teacher", "size", "steps", "workers", "log_every"}
    assert [set(line) & {"pkd", "trkd"} for line in logged(out)] == [{"pkd"}, {"pkd", "trkd"}, {"pkd", "trkd"}]
    began, left = read_saved(out / "started.pt"), read_saved(out / "prepared.pt")
    assert left.average is not None
    assert {each.pictures for each in left.calibrations.values()} == {8, 256}  # the backbone's of the file, the rest in this run
    changed = [name for name, value in began.state.items() if name.endswith(("weight", "log_scale")) and not value.equal(left.state[name])]
    assert len(changed) > 100


# --- several processes ---


def joined_processes(arguments: list[str]) -> subprocess.Popen[str]:
    """Two that torchrun starts."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "crqat_fx", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)


def children_of(process: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # of one that has just ended
            if f"\nPPid:\t{process}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc to find the processes in")
def test_two_processes_of_torchrun_that_are_killed_and_resumed_train_as_one(files: Path, tmp_path: Path) -> None:
    """Frozen statistics, corrected, at a rate at which what differs in the last digit has not grown."""
    flags = ("--method", "cr-qat-plus", "--steps", 6, "--rate", 1e-5, "--log-every", 1, "--save-every", 1)
    two, one = tmp_path / "two", tmp_path / "one"
    with joined_processes(command(files, two, *flags)) as first:
        while first.poll() is None and not ((two / "last.pt").exists() and saved(two)["step"] >= 1):
            time.sleep(0.05)
        workers = children_of(first.pid)
        for worker in workers:  # which torchrun starts in sessions of their own: they would outlive it
            os.kill(worker, signal.SIGKILL)
        told = first.communicate()[1]
    assert len(workers) == 2, told
    assert first.returncode != 0
    assert 1 <= saved(two)["step"] < 6
    with joined_processes(["train", str(files / "prepared.pt"), "--out", str(two), "--resume"]) as second:
        told = second.communicate()[1]
    assert second.returncode == 0, told
    assert told.count("averaged and raw weights are in") == 1

    settings = resolve(QatSettings, {}, two / "settings.yaml").values
    train_file(files / "prepared.pt", settings, one)
    assert [line["step"] for line in logged(two)] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(logged(one), logged(two), strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert other[name] == pytest.approx(value, rel=5e-3), name
    left = (path.name for path in two.iterdir())  # where it was killed as it wrote, also a part of a file, under a hidden name
    assert sorted(name for name in left if not name.startswith(".")) == sorted(path.name for path in one.iterdir())
    watched = [json.loads(line) for line in (two / "quantizers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in watched] == [2, 4, 6]
    assert all(len(line) > 100 for line in watched)
    trained = load_prepared(two / "prepared.pt")
    assert trained.weights == "average"
    assert all(layer.corrected for layer in correctable(trained).values())


# --- what is given wrong ---


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line that the command ends with."""
    monkeypatch.setattr("sys.argv", ["crqat-fx", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = [line for line in told.err.splitlines() if line.startswith("crqat-fx: error: ")]
    return line


def of_config(**given: object) -> Callable[[Path, Path], list[str]]:
    """The command with a run file of these settings."""

    def made(files: Path, folder: Path) -> list[str]:
        (folder / "own.yaml").write_text(json.dumps({"steps": 4, "batch": 2, "texts": 6, "calibration": 4} | given))
        return command(files, folder / "run", config=folder / "own.yaml")

    return made


def of_text(text: str) -> Callable[[Path, Path], list[str]]:
    def made(files: Path, folder: Path) -> list[str]:
        (folder / "own.yaml").write_text(text)
        return command(files, folder / "run", config=folder / "own.yaml")

    return made


def of_flags(*flags: object) -> Callable[[Path, Path], list[str]]:
    """The command with these flags; {files} and {folder} stand for where they are."""

    def made(files: Path, folder: Path) -> list[str]:
        return command(files, folder / "run", *(str(flag).format(files=files, folder=folder) for flag in flags))

    return made


def of_model(name: str) -> Callable[[Path, Path], list[str]]:
    return lambda files, folder: command(files, folder / "run", model=name)


WHOLE = {"quantized": ["backbone", "neck-head"], "trained": ["backbone", "neck-head"]}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (of_flags("--teacher", "{files}/none.pt"), "none.pt: does not exist; name a checkpoint, or check the spelling"),
        (of_flags("--teacher", "{files}/wider.pt"), "--teacher: the teacher's channels are (64, 128, 256), the student's (32, 64, 128)"),
        (of_flags("--teacher", "{files}/a-file"), "a-file: is a text file, not a checkpoint"),
        (of_flags("--teacher", "{files}/prepared.pt"), "prepared.pt: is a crqat-fx prepared file, not a checkpoint"),
        (of_model("teacher.pt"), "teacher.pt: is no prepared model; make one with `crqat-fx prepare`"),
        (of_model("none.pt"), "none.pt: does not exist; name a checkpoint, or check the spelling"),
        (of_flags("--out", "{files}/a-file/run"), "a-file/run/last.pt: cannot be written (Not a directory)"),
        (of_flags("--data", "{files}/narrow/data.yaml"), "narrow/data.yaml: its texts are 8 wide, the model's 16"),
        (of_flags("--data", "{files}/none.yaml"), "none.yaml: is no readable YAML (No such file or directory)"),
        (of_flags("--device", "cuda:7"), "device 'cuda:7' is of no use"),
        (of_flags("--device", "quantum"), "device 'quantum' is of no use"),
        (of_flags("--rate", "nan"), "rate is nan; give a finite number"),
        (of_flags("--method", "crqat"), "--method: method is 'crqat'; give one of cr-qat, cr-qat-plus, qat, cqat, kd"),
        (of_flags("--method", "cr-qat-plus", "--schedule", "constant"), "schedule is constant, and cr-qat-plus is a method with linear"),
        (of_flags("--method", "cr-qat-plus", "--keep-norms"), "correct_norms is false, and cr-qat-plus is a method with true"),
        (of_flags("--ap-pictures", 2), "data.yaml: names no set to evaluate on"),
        (of_flags("--resume"), "run: holds no last.pt to resume from"),
        (of_config(shares=[0.5, 0.4]), "the curriculum: the shares add up to 0.9; make them 1 together"),
        (of_config(shares=[1.0]), "shares: 1 shares for 2 phases"),
        (of_config(phases=[WHOLE | {"quantized": ["neck"]}]), "the phase: unknown stage 'neck'; choose among backbone, neck-head"),
        (of_config(phases=[WHOLE | {"losses": ["task", "kl"]}]), "the curriculum: unknown loss 'kl'"),
        (of_config(phases=[]), "the curriculum: there is no phase"),
        (of_config(kd_wieght=6), "own.yaml: unknown setting 'kd_wieght'; known here are"),
        (of_config(rate="high"), "own.yaml: rate is 'high'; give float"),
        (of_config(observer="best"), "'best' is no observer; give one of omse"),
        (of_text("rate: [1e-3"), "own.yaml: is no readable YAML"),
        (of_text("- rate"), "own.yaml: is not a mapping of settings"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    made: Callable[[Path, Path], list[str]],
    said: str,
) -> None:
    assert said in refused(made(files, tmp_path), capsys, monkeypatch)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def run(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that may be resumed."""
    settings = resolve(
        QatSettings, {"data": str(files / "mini" / "data.yaml"), "teacher": str(files / "teacher.pt"), "size": 64}, files / "run.yaml"
    )
    return train_file(files / "prepared.pt", settings.values, tmp_path_factory.mktemp("resumed") / "run").folder


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rate", 1e-3), "was trained with rate 0.0002, not 0.001; resume with the run's own settings"),
        (("--method", "kd"), "was trained with method cr-qat, not kd"),
        (("--steps", 9), "was trained with steps 4, not 9"),
        (("--data", "{files}/again/data.yaml"), "was trained with data"),
        (("--config", "{files}/other.yaml"), "was trained with ema 0.1, not 0.5"),
        (("--teacher", "{files}/wider.pt"), "--teacher: the teacher's channels are"),
    ],
)
def test_a_run_is_resumed_as_it_was_or_not_at_all(
    files: Path, run: Path, flags: tuple[object, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "other.yaml").write_text("ema: 0.5")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    given = (str(flag).format(files=files) for flag in flags)
    line = refused(["train", str(files / "prepared.pt"), "--out", str(run), "--resume", *given], capsys, monkeypatch)
    assert said in line
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_a_folder_that_holds_a_run_is_not_written_over(
    files: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "last.pt").read_bytes()
    line = refused(command(files, run), capsys, monkeypatch)
    assert "holds a run already (last.pt); give --resume to go on with it, or name another folder" in line
    assert (run / "last.pt").read_bytes() == before
