import contextlib
import copy
import functools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import EMBEDDINGS, NAMES, Rectangles, assert_same, logged, saved, stop_after, tiny_model
from torch import Tensor, nn

from crqat_fx.checkpoint import load_model
from crqat_fx.correct_norms import correct_norms, correctable
from crqat_fx.curriculum import Phase
from crqat_fx.data.batch import Batch, Truth
from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.errors import UserError
from crqat_fx.evaluate import evaluate
from crqat_fx.models.yolo_world import YoloWorld
from crqat_fx.qat import QatCourse, QatSettings, tapped, teacher_graph, train_file, train_prepared
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.estimate_norms import estimate_norms
from crqat_fx.quantize.prepare import load_prepared, prepare
from crqat_fx.quantize.prepared import Prepared, read_saved
from crqat_fx.quantize.watch import codes_of, watching
from crqat_fx.settings import resolve
from crqat_fx.torch_detector import TorchDetector
from crqat_fx.train import TrainingState, accumulate_gradients, settings_of, take_step
from crqat_fx.vocabulary import Vocabulary

CPU = torch.device("cpu")
BACKBONE, NECK_HEAD = "backbone", "neck-head"
SETTINGS = QatSettings(
    steps=5, batch=2, rate=1e-3, ema=1.0, observer="minmax", calibration=4, reestimate=1, log_every=1, save_every=2, watch_every=4, size=64
)


def lively(model: YoloWorld) -> YoloWorld:
    """The model with regions that differ from place to place, which a fresh one's do not: its norms know what passes them."""
    batch = Rectangles(4).at(1000)
    estimate_norms(model, [(batch.images / 255, batch.text)])
    return model.eval()


def prepared_file(path: Path, recipe: str = "8-8-8", stages: int = 2, version: int = 1) -> Path:
    """A calibrated model of the tests' task."""
    vocabulary = Vocabulary(NAMES, EMBEDDINGS.numpy())
    made = prepare(lively(tiny_model(version=version)), None, recipe, "conv-inputs", vocabulary=vocabulary, size=64, stages=stages)
    calibrate(made, ((batch.images / 255, batch.text) for batch in map(Rectangles(4).at, range(2))), "minmax")
    made.save(path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_file(tmp_path_factory.mktemp("prepared") / "p.pt")


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_file(tmp_path_factory.mktemp("coarse") / "p.pt", recipe="4-4-8")


@functools.cache
def loaded(file: Path) -> Prepared:
    return load_prepared(file)


def fresh(file: Path) -> Prepared:
    """The model of the file, as it is there: loading it once is enough for all tests."""
    prepared = copy.copy(loaded(file))
    prepared.graph = copy.deepcopy(prepared.graph)
    prepared.calibrations = dict(prepared.calibrations)
    prepared.set_phase(prepared.phase)
    return prepared


@pytest.fixture
def prepared(file: Path) -> Prepared:
    return fresh(file)


def result_of(folder: Path) -> dict[str, Any]:
    found = read_saved(folder / "prepared.pt")
    return {"state": found.state, "average": found.average, "calibrations": {name: vars(each) for name, each in found.calibrations.items()}}


def teacher(seed: int = 0, version: int = 1) -> YoloWorld:
    return lively(tiny_model(seed, version))


def course_of(prepared: Prepared, settings: QatSettings = SETTINGS, source: Any = None) -> tuple[QatCourse, TrainingState]:
    course = QatCourse(prepared, settings, source or Rectangles(), CPU, teacher=teacher())
    return course, TrainingState(course, CPU, "rectangles")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, file: Path) -> Path:
    """A run over a border, at step 2, that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    train_prepared(fresh(file), Rectangles(), SETTINGS, folder, teacher=teacher())
    return folder


# --- the run and what it leaves ---


def test_a_run_leaves_a_prepared_model_with_its_average_and_its_raw_weights(straight: Path) -> None:
    names = ["last.pt", "log.jsonl", "prepared.pt", "quantizers.jsonl", "settings.yaml", "started.pt", "tensorboard"]
    assert sorted(path.name for path in straight.iterdir()) == names
    raw, average = load_prepared(straight / "prepared.pt", raw=True), load_prepared(straight / "prepared.pt")
    assert (raw.weights, average.weights) == ("raw", "average")
    assert average.phase == Phase((BACKBONE, NECK_HEAD), (BACKBONE, NECK_HEAD))
    state = saved(straight)
    assert_same(dict(raw.graph.state_dict()), dict(state["model"]))
    scales = [name for name in state["model"] if name.endswith(("log_scale", "zero_point"))]
    assert len(scales) > 100
    for name, value in average.graph.state_dict().items():
        if "running" not in name and "batches_tracked" not in name:
            assert torch.equal(value, state["average"][name]), name
    assert sum(not torch.equal(state["model"][name], state["average"][name]) for name in scales) > 50


def test_a_run_keeps_the_model_that_it_began_with(straight: Path, file: Path) -> None:
    began, given = load_prepared(straight / "started.pt"), fresh(file)
    assert began.weights == "only"
    assert all(quantizer.enabled for quantizer in began.quantizers().values())
    assert_same(dict(began.graph.state_dict()), dict(given.graph.state_dict()))


def test_a_run_killed_before_that_model_was_written_keeps_it_as_it_goes_on(tmp_path: Path, file: Path, monkeypatch: Any) -> None:
    def killed(course: QatCourse, out: Path) -> None:
        raise InterruptedError

    settings = replace(SETTINGS, steps=1, method="qat")
    with monkeypatch.context() as patched:
        patched.setattr(QatCourse, "begin", killed)
        with pytest.raises(InterruptedError):
            train_prepared(fresh(file), Rectangles(), settings, tmp_path)
    train_prepared(fresh(file), Rectangles(), settings, tmp_path, resume=True)
    assert_same(dict(load_prepared(tmp_path / "started.pt").graph.state_dict()), dict(fresh(file).graph.state_dict()))


def test_a_file_without_an_average_has_no_raw_weights_to_ask_for(file: Path) -> None:
    assert fresh(file).weights == "only"
    with pytest.raises(UserError, match=r"no average.*leave out --raw"):
        load_prepared(file, raw=True)


def test_every_phase_logs_its_own_losses_and_ends_a_line_at_its_border(straight: Path, tmp_path: Path, file: Path) -> None:
    lines = logged(straight)
    of_all = {"step", "loss", "cls", "box", "dfl", "gradient_norm", "rate"}
    assert [set(line) - of_all for line in lines] == [{"pkd"}] * 2 + [{"pkd", "trkd"}] * 3
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line.get(name, 0) for name in ("cls", "box", "dfl", "pkd", "trkd")))
    train_prepared(fresh(file), Rectangles(), replace(SETTINGS, log_every=4), tmp_path, teacher=teacher())
    assert [line["step"] for line in logged(tmp_path)] == [2, 4, 5]


def test_the_log_of_quantizers_speaks_of_those_that_are_on(straight: Path, file: Path) -> None:
    (line,) = [json.loads(text) for text in (straight / "quantizers.jsonl").read_text().splitlines()]
    assert line["step"] == 4
    quantizers = loaded(file).quantizers()
    assert {name.removeprefix("scale/") for name in line if name.startswith("scale/")} == set(quantizers)
    assert {name.removeprefix("zero_point/") for name in line if name.startswith("zero_point/")} == {
        name for name, each in quantizers.items() if each.shifts
    }
    weights = {name for name, each in quantizers.items() if each.weight}
    assert {name.removeprefix("flipped/") for name in line if name.startswith("flipped/")} == weights
    assert all(0 <= value <= 1 for name, value in line.items() if name.startswith(("clipped/", "flipped/")))


@pytest.mark.parametrize(("method", "terms"), [("qat", set()), ("cqat", set()), ("kd", {"pkd", "trkd"})])
def test_the_baselines_run_in_the_same_loop(tmp_path: Path, file: Path, method: str, terms: set[str]) -> None:
    settings = replace(SETTINGS, method=method, steps=3, watch_every=100)
    taught = teacher() if terms else None
    train_prepared(fresh(file), Rectangles(), settings, tmp_path, teacher=taught)
    lines = logged(tmp_path)
    assert len(lines) == 3
    assert all(set(line) & {"pkd", "trkd"} == terms for line in lines)


class Same(Rectangles):
    """One batch for ever."""

    def at(self, step: int) -> Batch:
        return super().at(0)


def test_the_student_comes_to_resemble_its_teacher(tmp_path: Path, coarse: Path) -> None:
    """The first four steps against the last four: .40 to .54 on six tries (three batches, two processors), 1.5 where nothing teaches."""
    changed = {"method": "kd", "steps": 24, "rate": 1e-3, "batch": 4, "log_every": 4, "norm": "frozen", "pkd_factor": 1000.0}
    rare = {"save_every": 100, "watch_every": 100}
    train_prepared(fresh(coarse), Same(4), replace(SETTINGS, **changed, **rare), tmp_path, teacher=teacher())
    lines = logged(tmp_path)
    assert lines[-1]["pkd"] < 0.8 * lines[0]["pkd"]


# --- stopping and going on ---


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_interrupted_and_resumed_ends_in_the_same_bits(tmp_path: Path, file: Path, straight: Path, stop: int) -> None:
    """Within the first phase, at the border, and within the second."""
    first = train_prepared(fresh(file), Rectangles(), SETTINGS, tmp_path, teacher=teacher(), progress=stop_after(stop))
    assert (first.interrupted, first.steps) == (True, stop)
    torch.manual_seed(99)
    resumed = resolve(QatSettings, {}, carried=settings_of(tmp_path)).values
    assert resumed == SETTINGS
    train_prepared(fresh(file), Rectangles(), resumed, tmp_path, teacher=teacher(), resume=True)
    assert_same(saved(tmp_path), saved(straight))
    assert logged(tmp_path) == logged(straight)
    assert (tmp_path / "quantizers.jsonl").read_text() == (straight / "quantizers.jsonl").read_text()
    assert_same(result_of(tmp_path), result_of(straight))


def test_a_run_killed_at_a_random_moment_and_resumed_ends_in_the_same_bits(tmp_path: Path, file: Path, straight: Path) -> None:
    """The process waits for a line before each batch of a step; it is killed at some moment of a step in the middle."""
    stop = random.Random().randrange(1, 5)
    with subprocess.Popen(
        [sys.executable, __file__, str(file), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        for _ in range(stop):
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("\n")
        time.sleep(random.Random().uniform(0, 0.3))
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
    assert process.returncode != 0
    assert saved(tmp_path)["step"] < 5
    train_prepared(fresh(file), Rectangles(), SETTINGS, tmp_path, teacher=teacher(), resume=True)
    assert_same(saved(tmp_path), saved(straight))
    assert logged(tmp_path) == logged(straight)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, file: Path) -> None:
    settings = replace(SETTINGS, steps=3)
    train_prepared(fresh(file), Rectangles(), settings, tmp_path, teacher=teacher())
    before = saved(tmp_path), result_of(tmp_path)
    assert train_prepared(fresh(file), Rectangles(), settings, tmp_path, teacher=teacher(), resume=True).steps == 3
    assert_same(saved(tmp_path), before[0])
    assert_same(result_of(tmp_path), before[1])


# --- phases ---


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def in_stage(prepared: Prepared, stage: str) -> set[str]:
    """Names of what belongs to a stage."""
    found = set()
    nodes = next(each.nodes for each in prepared.stages if each.name == stage)
    for name in prepared.graph.state_dict():
        if any(name == str(node.target) or name.startswith(f"{node.target}.") for node in nodes if node.op in ("call_module", "get_attr")):
            found.add(name)
    return found


def test_what_a_phase_leaves_float_is_frozen_and_what_it_opens_starts_afresh(prepared: Prepared) -> None:
    course, state = course_of(prepared)
    later, before = in_stage(prepared, NECK_HEAD), snapshot(prepared.graph)
    for step in range(2):
        course.open(state)
        take_step(state, [Rectangles().at(step)])
    moved = {
        name for name, value in snapshot(prepared.graph).items() if not torch.equal(value, before[name]) and not name.endswith("flags")
    }
    assert moved
    assert not moved & later
    assert all(not each.enabled for each in prepared.quantizers([NECK_HEAD]).values())
    owner = {parameter: name for name, parameter in prepared.graph.named_parameters()}
    assert {owner[parameter] in later for parameter in state.optimizer.state} == {False}
    followed, moments = state.average, {p: value["step"].item() for p, value in state.optimizer.state.items()}
    assert set(moments.values()) == {2.0}

    course.open(state)
    assert state.average is not followed
    assert state.average.updates == 0
    assert_same(state.average.state(), snapshot(prepared.graph), "average")
    assert all(each.enabled for each in prepared.quantizers().values())
    take_step(state, [Rectangles().at(2)])
    counts = {owner[parameter] in later: value["step"].item() for parameter, value in state.optimizer.state.items()}
    assert counts == {False: 3.0, True: 1.0}


def test_moments_of_what_was_frozen_for_a_while_start_again(prepared: Prepared) -> None:
    shifts = [(BACKBONE, 0.25), (NECK_HEAD, 0.25), (BACKBONE, 0.5)]
    phases = tuple({"quantized": [BACKBONE, NECK_HEAD], "trained": [stage], "share": share} for stage, share in shifts)
    course, state = course_of(prepared, replace(SETTINGS, steps=4, phases=phases))
    later = in_stage(prepared, NECK_HEAD)
    for step in range(3):
        course.open(state)
        take_step(state, [Rectangles().at(step)])
    owner = {parameter: name for name, parameter in prepared.graph.named_parameters()}
    assert {value["step"].item() for parameter, value in state.optimizer.state.items() if owner[parameter] not in later} == {1.0}


@pytest.mark.parametrize("recalibrate", [True, False])
def test_a_phase_sets_the_ranges_of_the_stages_it_quantizes_on_the_student_as_it_is(
    file: Path, prepared: Prepared, recalibrate: bool
) -> None:
    course, state = course_of(prepared, replace(SETTINGS, recalibrate=recalibrate, observer="minmax"))
    for step in range(2):
        course.open(state)
        take_step(state, [Rectangles().at(step)])
    before = snapshot(prepared.graph)
    course.open(state)
    ranges = {name for name in before if name.endswith(("log_scale", "zero_point"))}
    moved = {name for name, value in prepared.graph.state_dict().items() if name in ranges and not torch.equal(value, before[name])}
    if not recalibrate:
        assert not moved
        return
    assert moved
    assert moved <= in_stage(prepared, NECK_HEAD)

    other = fresh(file)
    other.graph.load_state_dict(before)
    other.set_phase(Phase((BACKBONE, NECK_HEAD), (BACKBONE, NECK_HEAD)))
    batches = (Rectangles().at(step) for step in (2, 3))
    calibrate(other, ((batch.images / 255, batch.text) for batch in batches), "minmax", 4, stages=[NECK_HEAD])
    for name in ranges:
        torch.testing.assert_close(prepared.graph.state_dict()[name], other.graph.state_dict()[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_phase_corrects_the_norms_of_the_stages_it_quantizes_where_that_is_asked_for(coarse: Path) -> None:
    prepared = fresh(coarse)
    course, state = course_of(prepared, replace(SETTINGS, correct_norms=True, norm="frozen"))
    own = {stage: set(correctable(prepared, [stage]).values()) for stage in (BACKBONE, NECK_HEAD)}
    assert all(own.values())

    def corrected() -> list[bool]:
        return [any(layer.corrected for layer in own[stage]) for stage in (BACKBONE, NECK_HEAD)]

    assert corrected() == [False, False]
    course.open(state)
    assert corrected() == [True, False]
    assert_same(state.average.state(), snapshot(prepared.graph), "average")
    for step in range(2):
        take_step(state, [Rectangles().at(step)])
    before = [layer.ratio.clone() for layer in own[BACKBONE]]
    course.open(state)
    assert corrected() == [True, True]
    assert all(torch.equal(layer.ratio, ratio) for layer, ratio in zip(own[BACKBONE], before, strict=True))
    assert_same(state.average.state(), snapshot(prepared.graph), "average")


def test_what_was_corrected_before_is_corrected_anew_where_its_ranges_are_set_anew(coarse: Path) -> None:
    prepared = fresh(coarse)
    correct_norms(prepared, ((batch.images / 255, batch.text) for batch in map(Rectangles(4).at, range(2))), 4)
    course, state = course_of(prepared, replace(SETTINGS, norm="frozen"))
    course.open(state)
    own = list(correctable(prepared, [NECK_HEAD]).values())
    before = [layer.ratio.clone() for layer in own]
    for step in range(2):
        take_step(state, [Rectangles().at(step)])
    course.open(state)
    assert any(layer.corrected for layer in own)
    assert not all(torch.equal(layer.ratio, ratio) for layer, ratio in zip(own, before, strict=True))


def test_corrected_norms_whose_statistics_are_trained_are_given_up(coarse: Path) -> None:
    prepared = fresh(coarse)
    assert correct_norms(prepared, ((batch.images / 255, batch.text) for batch in map(Rectangles(4).at, range(2))), 4)
    course, state = course_of(prepared)  # the backbone first: neck and head have still float norms that are right
    course.open(state)
    left = {layer.corrected for layer in correctable(prepared, [BACKBONE]).values()}
    assert left == {False}
    assert any(layer.corrected for layer in correctable(prepared, [NECK_HEAD]).values())


def test_a_corrected_run_resumed_ends_in_the_same_bits(tmp_path: Path, coarse: Path) -> None:
    settings = replace(SETTINGS, correct_norms=True, norm="frozen")
    train_prepared(fresh(coarse), Rectangles(), settings, tmp_path / "straight", teacher=teacher())
    train_prepared(fresh(coarse), Rectangles(), settings, tmp_path / "stopped", teacher=teacher(), progress=stop_after(3))
    train_prepared(fresh(coarse), Rectangles(), settings, tmp_path / "stopped", teacher=teacher(), resume=True)
    assert_same(saved(tmp_path / "stopped"), saved(tmp_path / "straight"))
    assert_same(result_of(tmp_path / "stopped"), result_of(tmp_path / "straight"))
    assert any(layer.corrected for layer in correctable(load_prepared(tmp_path / "stopped" / "prepared.pt")).values())


def test_the_average_looks_back_a_share_of_its_phase(prepared: Prepared) -> None:
    course, _ = course_of(prepared, replace(SETTINGS, steps=300, ema=0.2))
    assert [course.average(step).momentum for step in (0, 1, 100, 101, 300)] == pytest.approx([1 / 20] * 3 + [1 / 40] * 2)
    assert course.average(300).horizon == pytest.approx(8)


def test_norms_of_the_average_get_the_mean_statistics_of_some_batches(tmp_path: Path, prepared: Prepared) -> None:
    course, state = course_of(prepared, replace(SETTINGS, steps=1, method="qat", reestimate=3))
    course.open(state)
    take_step(state, [Rectangles().at(0)])
    raw = snapshot(prepared.graph)
    course.write(tmp_path, state)
    assert_same(snapshot(prepared.graph), raw, "the model")
    prepared.graph.load_state_dict(result_of(tmp_path)["average"])
    stem = next(module for module in prepared.graph.modules() if isinstance(module, ConvBn2d))
    outputs = [stem._conv_forward(Rectangles().at(step).images / 255, stem.weight, stem.bias) for step in (1, 2, 3)]
    assert stem.weight_fake_quant is None
    means = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    variances = torch.stack([output.var((0, 2, 3)) for output in outputs]).mean(0)
    torch.testing.assert_close(stem.bn.running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stem.bn.running_var, variances, rtol=1e-4, atol=1e-5)


def test_batches_are_read_to_estimate_norms_on_only_where_the_phase_that_is_open_trains_them(tmp_path: Path, prepared: Prepared) -> None:
    read: list[int] = []
    half = {"quantized": BOTH, "trained": BOTH, "share": 0.5}
    phases = half | {"norm": "frozen"}, half | {"norm": "train"}
    course, state = course_of(prepared, replace(SETTINGS, steps=2, reestimate=2, phases=phases), Rectangles(before=read.append))
    course.open(state)
    take_step(state, [Rectangles().at(0)])
    course.write(tmp_path, state)
    assert read == []
    assert_same(result_of(tmp_path)["average"], dict(state.average.state()))
    course.open(state)
    course.write(tmp_path, state)
    assert read == [1, 2]


def test_frozen_norms_keep_their_statistics_in_the_result(tmp_path: Path, file: Path) -> None:
    train_prepared(fresh(file), Rectangles(), replace(SETTINGS, steps=2, method="qat", norm="frozen"), tmp_path)
    before, after = fresh(file).graph.state_dict(), result_of(tmp_path)["average"]
    assert all(torch.equal(after[name], value) for name, value in before.items() if "running" in name)


def test_scales_learn_at_a_share_of_the_rate_and_only_weights_decay(prepared: Prepared) -> None:
    course, state = course_of(prepared, replace(SETTINGS, quantizer_rate=0.25, weight_decay=0.1, batch=2))
    decayed, free, ranges = state.optimizer.param_groups
    learned = {parameter for each in prepared.quantizers().values() for parameter in each.parameters()}
    assert set(ranges["params"]) == learned
    everything = [parameter for group in (decayed, free, ranges) for parameter in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(prepared.graph.parameters()))
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert decayed["weight_decay"] == pytest.approx(0.1 * 2 / 64)
    assert free["weight_decay"] == ranges["weight_decay"] == 0
    course.open(state)
    take_step(state, [Rectangles().at(0)])
    assert [group["lr"] for group in (decayed, free, ranges)] == pytest.approx([1e-3, 1e-3, 2.5e-4])


class Drawn:
    """Pictures of the tests' task with their truth, as a set to be evaluated on."""

    def __init__(self, count: int) -> None:
        self.batches = [Rectangles(1).at(step) for step in range(count)]
        boxes = [
            (number, box, label)
            for number, batch in enumerate(self.batches)
            for box, label in zip(batch.truth.boxes[0].tolist(), batch.truth.labels[0].tolist(), strict=True)
        ]
        self.coco = {
            "images": [{"id": number, "width": 64, "height": 64} for number in range(count)],
            "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES)],
            "annotations": [
                {"id": number, "image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": 1000.0, "iscrowd": 0}
                for number, (image, (x1, y1, x2, y2), label) in enumerate(boxes, 1)
            ],
        }

    def __len__(self) -> int:
        return len(self.batches)

    def picture(self, index: int) -> np.ndarray:
        return self.batches[index].images[0].permute(1, 2, 0).contiguous().numpy()


def test_ap_is_logged_as_each_phase_opens_and_ends_and_changes_nothing(tmp_path: Path, file: Path, straight: Path) -> None:
    scoring = replace(SETTINGS, ap_pictures=4)
    first = train_prepared(fresh(file), Rectangles(), scoring, tmp_path, teacher=teacher(), scored=(Drawn(6), None), progress=stop_after(2))
    assert [(line["step"], *(name for name in line if name.startswith("ap"))) for line in first.ap] == [(1, "ap_opening"), (2, "ap")]
    result = train_prepared(fresh(file), Rectangles(), scoring, tmp_path, teacher=teacher(), scored=(Drawn(6), None), resume=True)
    places = [(line["step"], *(name for name in line if name.startswith("ap"))) for line in result.ap]
    assert places == [(1, "ap_opening"), (2, "ap"), (3, "ap_opening"), (5, "ap")]
    assert all(0 <= line.get("ap", line.get("ap_opening")) <= 100 for line in result.ap)
    for part in ("model", "average", "optimizer", "random"):
        assert_same(saved(tmp_path)[part], saved(straight)[part], part)
    assert_same(result_of(tmp_path), result_of(straight))


def test_a_phases_ap_is_that_of_the_model_as_it_then_stands(tmp_path: Path) -> None:
    """Before the first step with the first stage alone in codes, after the last step what the run leaves: by an evaluation apart."""
    made = prepare(load_model("pico-v1")[0], None, "8-8-8", "conv-inputs", vocabulary=ShapesTask().vocabulary, size=96)
    task = ShapesTask(size=96)
    calibrate(made, picture_batches(made, (task.draw("calibration", index).image for index in range(4))), "minmax", 4)
    made.save(tmp_path / "p.pt")
    settings = replace(SETTINGS, method="cqat", steps=2, size=96, rate=1e-4, pictures=8, texts=8, ap_pictures=6, shares=(0.5, 0.5))
    result = train_file(tmp_path / "p.pt", settings, tmp_path / "run")
    opened, *_, ended = (line.get("ap", line.get("ap_opening")) for line in result.ap)

    def ap(prepared: Prepared) -> float | None:
        return evaluate(TorchDetector(prepared.graph, task.vocabulary, 96), ShapesSet(task, "val", 6)).scores.ap

    began, left = load_prepared(tmp_path / "run" / "started.pt"), load_prepared(tmp_path / "run" / "prepared.pt")
    began.set_phase(Phase((BACKBONE,), (BACKBONE,)))
    assert opened == pytest.approx(ap(began))
    assert ended == pytest.approx(ap(left))
    assert opened > 20
    assert ended != opened


# --- a step ---


def test_a_teacher_graph_gives_what_the_teacher_gives_and_its_features_beside_it() -> None:
    model = teacher(3)
    images, text = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), EMBEDDINGS.expand(2, 4, 16)
    levels = model.backbone(images)
    graph = teacher_graph(teacher(3), 2)
    for whole in (True, False):
        outputs, (features,) = tapped(graph, [BACKBONE], whole=whole)(images, text)
        for found, wanted in zip(features, levels, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        assert len(outputs) == (3 if whole else 0)
    part = tapped(graph, [BACKBONE], whole=False)
    assert len(part.graph.nodes) < len(graph.graph.nodes) / 2
    for found, wanted in zip(outputs_of(tapped(graph, [])(images, text)[0]), outputs_of(model(images, text)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def outputs_of(nested: Any) -> list[Tensor]:
    return [level for group in nested for level in group]


def losses_at(prepared: Prepared, settings: QatSettings, step: int = 0) -> dict[str, float]:
    course, state = course_of(prepared, settings)
    course.open(state)
    losses = course.losses(Rectangles().at(step), 1)
    return {name: term.item() for name, term in losses.terms.items()}


def test_the_weight_and_the_factors_multiply_the_teachers_losses_alone(file: Path) -> None:
    base = replace(SETTINGS, method="kd", kd_weight=1.0, trkd_factor=1.0)
    plain = losses_at(fresh(file), base)
    scaled = losses_at(fresh(file), replace(base, kd_weight=6.0, pkd_factor=2.0, trkd_factor=16.0))
    assert scaled["pkd"] == pytest.approx(12 * plain["pkd"])
    assert scaled["trkd"] == pytest.approx(96 * plain["trkd"])
    assert [scaled[name] for name in ("cls", "box", "dfl")] == [plain[name] for name in ("cls", "box", "dfl")]


def test_relations_are_full_halved_or_left_out(file: Path) -> None:
    kinds = ("full", "region-text", "region-region", "none")
    found = {kind: losses_at(fresh(file), replace(SETTINGS, method="kd", relations=kind)) for kind in kinds}
    assert "trkd" not in found["none"]
    assert len({found[kind]["trkd"] for kind in ("full", "region-text", "region-region")}) == 3


def test_three_stages_may_teach_the_neck_by_its_features(tmp_path: Path) -> None:
    file = prepared_file(tmp_path / "p.pt", stages=3)
    settings = replace(SETTINGS, steps=3, neck_features=True, watch_every=100)
    train_prepared(fresh(file), Rectangles(), settings, tmp_path / "run", teacher=teacher())
    terms = [set(line) & {"pkd", "neck-pkd", "trkd"} for line in logged(tmp_path / "run")]
    assert terms == [{"pkd"}, {"pkd", "neck-pkd"}, {"pkd", "neck-pkd", "trkd"}]


def test_two_accumulated_batches_give_the_tasks_gradients_of_the_doubled_one(file: Path) -> None:
    halves = [Rectangles().at(3), Rectangles().at(4)]
    truth = Truth(*(torch.cat([getattr(half.truth, name) for half in halves]) for name in ("boxes", "labels", "valid")))
    whole = Batch(torch.cat([half.images for half in halves]), torch.cat([half.text for half in halves]), truth)
    results = []
    for batches in (halves, [whole]):
        prepared = fresh(file)
        course, state = course_of(prepared, replace(SETTINGS, method="kd", norm="frozen", kd_weight=0.0))
        course.open(state)
        terms = accumulate_gradients(state, batches)
        results.append((terms, {name: p.grad for name, p in prepared.graph.named_parameters() if p.grad is not None}))
    (terms, gradients), (whole_terms, whole_gradients) = results
    for name in ("cls", "box", "dfl"):
        assert terms[name].item() == pytest.approx(whole_terms[name].item(), rel=1e-5)
    weights = [name for name in whole_gradients if not name.endswith(("log_scale", "zero_point"))]
    for name in weights:
        wanted = whole_gradients[name]
        torch.testing.assert_close(gradients[name], wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item() + 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_float32_quantizers(tmp_path: Path, file: Path, precision: str) -> None:
    settings = replace(SETTINGS, precision=precision, method="kd", norm="frozen", steps=1)
    train_prepared(fresh(file), Rectangles(), settings, tmp_path, teacher=teacher())
    plain = sum(losses_at(fresh(file), replace(SETTINGS, method="kd", norm="frozen")).values())
    assert logged(tmp_path)[0]["loss"] == pytest.approx(plain, rel=0.15)
    assert logged(tmp_path)[0]["loss"] != plain
    assert all(value.dtype == torch.float32 for value in saved(tmp_path)["model"].values() if value.is_floating_point())


def test_a_step_in_fp16_moves_the_weights_that_one_in_fp32_does(file: Path) -> None:
    """From a gradient scale at which nothing overflows: a step that does is left out."""
    moved = []
    for precision in ("fp32", "fp16"):
        prepared = fresh(file)
        course, state = course_of(prepared, replace(SETTINGS, precision=precision, method="kd", norm="frozen"))
        state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=precision == "fp16")
        before = {name: value.detach().clone() for name, value in prepared.graph.named_parameters()}
        course.open(state)
        take_step(state, [Rectangles().at(0)])
        moved.append({name for name, value in prepared.graph.named_parameters() if not torch.equal(value, before[name])})
    assert len(moved[0]) > 200
    assert len(moved[0] - moved[1]) < 0.05 * len(moved[0])


def test_codes_and_clipped_shares_are_those_of_the_rounding(prepared: Prepared) -> None:
    prepared.set_phase(Phase((BACKBONE, NECK_HEAD), (BACKBONE, NECK_HEAD)))
    for each in prepared.quantizers().values():
        x = torch.randn(4, 6, 5, 8, generator=torch.Generator().manual_seed(2)) * 3
        if each.spec.channel_axis is not None:
            shape = list(x.shape)
            shape[each.spec.channel_axis] = each.scale.numel()
            x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        codes, clipped = codes_of(each, x)
        form = [-1 if index == axis else 1 for index in range(x.ndim)] if (axis := each.spec.channel_axis) is not None else []
        scale, zero = each.scale.detach().view(form), each.zero_points.view(form)
        torch.testing.assert_close((codes - zero) * scale, each(x).detach())
        asked = (x / scale).round() + zero
        assert clipped.item() == pytest.approx(((asked < each.quant_min) | (asked > each.quant_max)).float().mean().item())


def test_a_flipped_code_is_one_that_differs_after_the_step(prepared: Prepared) -> None:
    prepared.set_phase(Phase((BACKBONE, NECK_HEAD), (BACKBONE, NECK_HEAD)))
    path, layer = next((name, module) for name, module in prepared.graph.named_modules() if getattr(module, "weight_fake_quant", None))
    with watching(prepared) as found, torch.no_grad():
        layer.weight[0, 0, 0, 0] += 2 * layer.weight.abs().max() * (1 if layer.weight[0, 0, 0, 0] < 0 else -1)
    flipped = {name: value for name, value in found.items() if name.startswith("flipped/") and value}
    assert flipped == {f"flipped/{path}.weight_fake_quant": pytest.approx(1 / layer.weight.numel())}


# --- from files ---


def test_an_uncalibrated_model_is_calibrated_first(tmp_path: Path) -> None:
    bare = prepare(tiny_model().eval(), None, "4-4-8", "conv-inputs", size=64)
    train_prepared(bare, Rectangles(), replace(SETTINGS, steps=2, method="qat"), tmp_path)
    assert load_prepared(tmp_path / "prepared.pt").calibrated


# --- what can be wrong ---


def refused(what: str, prepared: Prepared, out: Path, settings: QatSettings = SETTINGS, **given: Any) -> None:
    source = given.pop("source", Rectangles())
    with pytest.raises(UserError, match=what):
        train_prepared(prepared, source, settings, out, **({"teacher": teacher()} | given))
    assert not (out / "prepared.pt").exists()


def test_a_method_that_teaches_needs_a_teacher(prepared: Prepared, tmp_path: Path) -> None:
    refused("--teacher: cr-qat needs a teacher", prepared, tmp_path, teacher=None)


def wider(config: Any) -> YoloWorld:
    return YoloWorld(replace(config, widen=0.25))


def other_texts(config: Any) -> YoloWorld:
    return YoloWorld(replace(config, text_width=24))


@pytest.mark.parametrize(
    ("change", "what"), [(wider, r"channels are \(64, 128, 256\), the student's \(32,"), (other_texts, "text width are 24")]
)
def test_a_teacher_of_another_shape_is_refused_at_the_start(
    prepared: Prepared, tmp_path: Path, change: Callable[[Any], YoloWorld], what: str
) -> None:
    refused(what, prepared, tmp_path, teacher=change(prepared.config))
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_another_architecture_that_fits_is_told(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    assert prepared.config is not None
    QatCourse(prepared, SETTINGS, Rectangles(), CPU, teacher=YoloWorld(replace(prepared.config, class_width=80)).eval())
    assert f"class_width 80 (the student's {prepared.config.class_width})" in caplog.text
    caplog.clear()
    course_of(prepared)
    assert caplog.text == ""


def test_a_run_is_not_resumed_with_another_teacher_or_model(straight: Path, file: Path, coarse: Path) -> None:
    with pytest.raises(UserError, match="was trained with another teacher"):
        train_prepared(fresh(file), Rectangles(), SETTINGS, straight, teacher=teacher(5), resume=True)
    with pytest.raises(UserError, match="was trained with another prepared model"):
        train_prepared(fresh(coarse), Rectangles(), SETTINGS, straight, teacher=teacher(), resume=True)


BOTH = [BACKBONE, NECK_HEAD]


@pytest.mark.parametrize(
    ("phase", "what"),
    [
        ({"quantized": ["neck"], "trained": ["neck"]}, "unknown stage 'neck'"),
        ({"quantized": BOTH, "trained": []}, "phase 1 trains nothing"),
        ({"quantized": BOTH, "trained": BOTH, "losses": ["task", "neck-pkd"]}, "by neck-pkd, which a model of the stages"),
        ({"quantized": BOTH, "trained": BOTH, "share": 0.5}, "the shares add up to 0.5"),
    ],
)
def test_phases_that_this_model_cannot_go_through_are_refused(prepared: Prepared, tmp_path: Path, phase: dict[str, Any], what: str) -> None:
    refused(what, prepared, tmp_path, replace(SETTINGS, phases=(phase,)))
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_one_stage_has_no_features_to_compare(tmp_path: Path) -> None:
    whole = load_prepared(prepared_file(tmp_path / "p.pt", stages=1))
    phase = {"quantized": ["whole"], "trained": ["whole"], "losses": ["task", "pkd"]}
    refused("compares features by pkd", whole, tmp_path / "run", replace(SETTINGS, phases=(phase,)))


def test_relations_can_be_left_out_of_phases_of_ones_own(tmp_path: Path, file: Path) -> None:
    phase = {"quantized": BOTH, "trained": BOTH, "losses": ["task", "pkd", "trkd"]}
    settings = replace(SETTINGS, steps=1, phases=(phase,), relations="none")
    train_prepared(fresh(file), Rectangles(), settings, tmp_path, teacher=teacher())
    assert {"pkd", "trkd"} & logged(tmp_path)[0].keys() == {"pkd"}


def test_an_ap_of_nothing_is_refused_at_the_start(prepared: Prepared, tmp_path: Path) -> None:
    scoring = replace(SETTINGS, ap_pictures=4)
    refused("ap_pictures is 4, of no set", prepared, tmp_path, scoring)
    other = Vocabulary(("red", "green", "blue", "grey"), EMBEDDINGS.numpy())
    refused("lacks 1 of the data set's 4 categories: yellow", prepared, tmp_path, scoring, scored=(Drawn(4), other))
    narrow = Vocabulary(NAMES, EMBEDDINGS[:, :8].numpy())
    refused("8", prepared, tmp_path, scoring, scored=(Drawn(4), narrow))
    late = Drawn(4)
    late.coco["annotations"] = [each for each in late.coco["annotations"] if each["image_id"] >= 2]
    refused("the first 2 pictures hold no object", prepared, tmp_path, replace(SETTINGS, ap_pictures=2), scored=(late, None))
    assert list(tmp_path.iterdir()) == []


def test_a_method_brings_its_own_settings_where_none_are_given() -> None:
    def chosen(**given: Any) -> tuple[str, str, bool]:
        found = QatSettings(**given)
        return found.schedule, found.norm, found.correct_norms

    assert chosen() == chosen(method="qat") == ("constant", "train", False)
    assert chosen(method="cr-qat-plus") == ("linear", "frozen", True)
    assert chosen(method="cr-qat", norm="frozen", correct_norms=True) == ("constant", "frozen", True)
    assert resolve(QatSettings, {"method": "cr-qat-plus"}).values == QatSettings(method="cr-qat-plus")
    assert {phase.correct_norms for phase in QatSettings(method="cr-qat-plus").plan((BACKBONE, NECK_HEAD))} == {True}


@pytest.mark.parametrize(("name", "value"), [("schedule", "constant"), ("norm", "train"), ("correct_norms", False)])
def test_cr_qat_plus_is_all_that_it_is_made_of(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name} is {str(value).lower()}, and cr-qat-plus is a method with"):
        QatSettings(method="cr-qat-plus", **{name: value})
    resolve(QatSettings, {"method": "cr-qat"}).write(tmp_path / "settings.yaml")  # of another run, and taken for this
    with pytest.raises(UserError, match="is a method with"):
        resolve(QatSettings, {"method": "cr-qat-plus"}, tmp_path / "settings.yaml")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("method", "cr-qat, cr-qat-plus"),
        ("schedule", "linear, constant"),
        ("relations", "full, region-text"),
        ("norm", "train, frozen"),
        ("precision", "fp32, bf16"),
    ],
)
def test_a_word_that_a_setting_does_not_know_is_refused_where_a_program_gives_it(name: str, known: str) -> None:
    given: dict[str, Any] = {name: "other"}
    with pytest.raises(UserError, match=f"^{name} is 'other'; give one of {known}"):
        QatSettings(**given)


def test_phases_of_ones_own_take_what_they_leave_out_from_the_settings() -> None:
    phase = {"quantized": BOTH, "trained": BOTH}
    (found,) = QatSettings(method="cr-qat-plus", phases=(phase,), ema=0.3, recalibrate=False).plan((BACKBONE, NECK_HEAD))
    assert (found.norm, found.correct_norms, found.ema, found.recalibrate) == ("frozen", True, 0.3, False)
    (found,) = QatSettings(phases=({**phase, "norm": "frozen", "ema": 0.2},)).plan((BACKBONE, NECK_HEAD))
    assert (found.norm, found.correct_norms, found.ema) == ("frozen", False, 0.2)
    for name, value in (("shares", (1.0,)), ("neck_features", True)):
        with pytest.raises(UserError, match=f"{name} is given, and phases"):
            QatSettings(phases=(phase,), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("kd_weight", -1.0), ("pkd_factor", float("nan")), ("calibration", 0), ("watch_every", 0), ("shares", ("a",)), ("size", 100)],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        replace(SETTINGS, **{name: value})


def test_phases_of_a_run_file_come_back_from_its_settings_file(tmp_path: Path) -> None:
    phases = ({"quantized": [BACKBONE], "trained": [BACKBONE], "losses": ["task", "pkd"]},)
    (tmp_path / "run.yaml").write_text(json.dumps({"phases": list(phases), "kd-weight": 3}))
    resolved = resolve(QatSettings, {}, tmp_path / "run.yaml")
    assert resolved.values.plan((BACKBONE, NECK_HEAD)) == (Phase((BACKBONE,), (BACKBONE,), losses=("task", "pkd")),)
    resolved.write(tmp_path / "settings.yaml")
    assert resolve(QatSettings, {}, tmp_path / "settings.yaml").values == resolved.values


def run_and_wait(file: Path, folder: Path) -> None:
    """What the process that gets killed runs: it waits before the batch of every step, not before those that ranges are set on."""
    waited: set[int] = set()

    def wait(step: int) -> None:
        if step not in waited and sys._getframe(2).f_code.co_name == "_next_batches":
            waited.add(step)
            print("ready", flush=True)  # noqa: T201  # the other process reads it
            sys.stdin.readline()

    train_prepared(fresh(file), Rectangles(before=wait), SETTINGS, folder, teacher=teacher())


if __name__ == "__main__":
    run_and_wait(Path(sys.argv[1]), Path(sys.argv[2]))
