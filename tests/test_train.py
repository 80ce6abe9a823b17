import contextlib
import dataclasses
import json
import math
import random
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from torch import Tensor, nn

from crqat_fx.checkpoint import load_model
from crqat_fx.data.batch import Batch, Truth
from crqat_fx.ema import MovingAverage
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import YoloWorld, YoloWorldConfig, build, initialise_head
from crqat_fx.pretrain import PretrainSettings
from crqat_fx.runlog import RunLog
from crqat_fx.settings import Resolved, resolve
from crqat_fx.train import (
    NOMINAL_BATCH,
    FloatCourse,
    NonFiniteError,
    TrainingState,
    TrainResult,
    TrainSettings,
    accumulate_gradients,
    losses_of,
    parameter_groups,
    rate_at,
    settings_of,
    take_step,
    train,
)
from crqat_fx.vocabulary import Vocabulary

CPU = torch.device("cpu")
CONFIG = YoloWorldConfig(version=1, deepen=0.33, widen=0.125, class_width=16, pool_width=16, pool_heads=2, text_width=16)
SETTINGS = TrainSettings(steps=8, batch=2, warmup=2, ema_horizon=4.0, log_every=1, save_every=3, device="cpu")
COLOURS = torch.tensor([[230, 30, 30], [30, 200, 40], [40, 60, 230], [220, 220, 30]], dtype=torch.uint8)
SAVED = (
    "format", "settings", "data", "identity", "course", "step", "model", "average", "average_updates", "optimizer", "scaler", "random",
    "cuda_random",
)  # fmt: skip
NAMES = ("red", "green", "blue", "yellow")
EMBEDDINGS = nn.functional.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(5)), dim=1)


class Rectangles:
    """Two coloured rectangles a picture of 64 px; batch `step` is a function of the step. `before(step)` runs before a batch is given."""

    def __init__(
        self, batch: int = 2, before: Callable[[int], None] = lambda step: None, end: int | None = None, fingerprint: str = "rectangles"
    ) -> None:
        self.batch = batch
        self.before = before
        self.end = end
        self.fingerprint = fingerprint
        self.skipped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()

    def batches(self, start_step: int, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        assert part == (0, 1)
        step = start_step
        while step != self.end:
            self.before(step)
            yield self.at(step)
            step += 1

    def at(self, step: int) -> Batch:
        rng = np.random.default_rng([7, step])
        images = torch.full((self.batch, 3, 64, 64), 114, dtype=torch.uint8)
        corners = rng.integers(0, 32, (self.batch, 2, 2))
        boxes = np.concatenate([corners, corners + rng.integers(12, 32, (self.batch, 2, 2))], 2)
        labels = rng.integers(0, 4, (self.batch, 2))
        for picture in range(self.batch):
            for (x1, y1, x2, y2), label in zip(boxes[picture], labels[picture], strict=True):
                images[picture, :, y1:y2, x1:x2] = COLOURS[label][:, None, None]
        truth = Truth(torch.from_numpy(boxes).float(), torch.from_numpy(labels), torch.ones(self.batch, 2, dtype=torch.bool))
        return Batch(images, EMBEDDINGS.expand(self.batch, 4, 16).clone(), truth)


def tiny_model(seed: int = 0, version: int = 1) -> YoloWorld:
    torch.manual_seed(seed)
    model = YoloWorld(replace(CONFIG, version=version))
    initialise_head(model, texts=4, size=64)
    return model


def state_of(model: YoloWorld, settings: TrainSettings = SETTINGS) -> TrainingState:
    training = model.training
    state = TrainingState(FloatCourse(model, settings, CPU), CPU, "rectangles")
    model.train(training)
    return state


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.pt", weights_only=True)


def assert_same(first: Any, second: Any, where: str = "last.pt") -> None:
    """Bit for bit, all the way down."""
    assert type(first) is type(second), where
    if isinstance(first, Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    else:
        assert first == second, where


def logged(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "steps_per_second"} for line in lines]


def scalars(folder: Path) -> dict[tuple[int, str], float]:
    """What TensorBoard shows of a run: every event file in the order of their names; a new session hides what lies after its start."""
    shown: dict[tuple[int, str], float] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            body = content[12 : 12 + length]
            assert struct.unpack("<I", content[8:12]) == (masked_crc32c(content[:8]),)
            assert struct.unpack("<I", content[12 + length : 16 + length]) == (masked_crc32c(body),)
            event = Event.FromString(body)
            if event.session_log.status == SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in shown
                shown[event.step, value.tag] = value.simple_value
            content = content[16 + length :]
    return shown


def assert_tensorboard_shows_the_log(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    expected = {(line["step"], name): value for line in lines for name, value in line.items() if name != "step"}
    assert scalars(folder) == pytest.approx(expected, rel=1e-6)


def stop_after(step: int) -> Callable[[int, int, str], None]:
    def interrupt(done: int, total: int, text: str) -> None:
        if done == step:
            signal.raise_signal(signal.SIGINT)

    return interrupt


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `SETTINGS` that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    train(tiny_model(), Rectangles(), SETTINGS, folder)
    return folder


# --- the loop and what it leaves ---


def test_the_loss_falls_and_the_averaged_model_has_learnt(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=60, batch=4, warmup=5, log_every=10, save_every=100)
    model, held_out = tiny_model(), Rectangles(8).at(10_000)
    before = losses_of(tiny_model().train(), held_out).total.item()
    train(model, Rectangles(4), settings, tmp_path)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    averaged, _ = load_model(tmp_path / "model.pt")
    assert losses_of(averaged.train(), held_out).total.item() < 0.6 * before


def test_a_run_folder_holds_settings_log_state_and_averaged_model(straight: Path) -> None:
    assert sorted(path.name for path in straight.iterdir()) == ["last.pt", "log.jsonl", "model.pt", "settings.yaml", "tensorboard"]
    assert resolve(TrainSettings, {}, straight / "settings.yaml").values == SETTINGS
    assert [line["step"] for line in logged(straight)] == list(range(1, 9))
    assert logged(straight)[0].keys() == {"step", "loss", "cls", "box", "dfl", "gradient_norm", "rate"}
    state = saved(straight)
    assert tuple(state) == SAVED
    assert state["step"] == state["average_updates"] == 8
    model, checkpoint = load_model(straight / "model.pt")
    assert checkpoint.config == CONFIG
    assert_same(dict(model.state_dict()), state["average"])
    assert any(not torch.equal(value, state["model"][name]) for name, value in state["average"].items())


def test_vocabulary_and_metadata_travel_into_the_model(tmp_path: Path) -> None:
    vocabulary = Vocabulary(NAMES, EMBEDDINGS.numpy())
    train(tiny_model(), Rectangles(), replace(SETTINGS, steps=1, warmup=0), tmp_path, vocabulary=vocabulary, metadata={"size": 64})
    _, checkpoint = load_model(tmp_path / "model.pt")
    assert checkpoint.vocabulary is not None
    assert checkpoint.vocabulary.names == NAMES
    assert checkpoint.extra["size"] == 64


def test_tensorboard_shows_every_logged_number_at_its_step(straight: Path) -> None:
    assert_tensorboard_shows_the_log(straight)
    assert {step for step, _ in scalars(straight)} == set(range(1, 9))
    assert {name for _, name in scalars(straight)} == {"loss", "cls", "box", "dfl", "gradient_norm", "rate", "steps_per_second"}


def test_the_result_counts_what_the_data_skipped_and_repaired_in_plain_values(tmp_path: Path) -> None:
    source = Rectangles(before=lambda step: source.skipped.update({"picture that cannot be read": 1}))
    source.repaired["box beyond the picture"] = 4
    result = train(tiny_model(), source, replace(SETTINGS, steps=3), tmp_path)
    assert result.skipped == {"picture that cannot be read": 3}
    assert result.repaired == {"box beyond the picture": 4}
    plain = json.loads(json.dumps(dataclasses.asdict(result), default=str))
    assert (plain["skipped"], plain["repaired"]) == (result.skipped, result.repaired)


def test_progress_names_loss_speed_and_time_left_at_every_step(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    train(tiny_model(), Rectangles(), replace(SETTINGS, steps=4), tmp_path, progress=lambda *call: seen.append(call))
    assert [call[:2] for call in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for _, _, text in seen:
        assert text.startswith("loss ")
        assert "steps/s" in text
        assert text.endswith(" left")


def test_bf16_trains_with_float32_weights_and_nearly_the_same_first_loss(tmp_path: Path, straight: Path) -> None:
    train(tiny_model(), Rectangles(), replace(SETTINGS, steps=3, precision="bf16"), tmp_path)
    assert logged(tmp_path)[0]["loss"] == pytest.approx(logged(straight)[0]["loss"], rel=0.03)
    assert logged(tmp_path)[0]["loss"] != logged(straight)[0]["loss"]
    assert all(value.dtype == torch.float32 for name, value in saved(tmp_path)["model"].items() if "num_batches" not in name)


def test_fp16_clips_the_gradients_of_the_loss_and_not_of_its_scaled_copy() -> None:
    norms, clipped = [], []
    for precision in ("fp32", "fp16"):
        state = state_of(tiny_model().train(), replace(SETTINGS, precision=precision, clip=0.5))
        if precision == "fp16":
            state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        norms.append(take_step(state, [Rectangles().at(0)])["gradient_norm"].item())
        clipped.append(nn.utils.get_total_norm([p.grad for p in state.parameters() if p.grad is not None]).item())
    assert norms[1] == pytest.approx(norms[0], rel=0.1)
    assert norms[1] != norms[0]
    assert min(norms) > 0.5
    assert clipped == pytest.approx([0.5, 0.5], rel=1e-4)


def test_fp16_leaves_out_a_step_whose_gradients_overflow_and_lowers_the_scale() -> None:
    state = state_of(tiny_model(), replace(SETTINGS, precision="fp16"))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = {name: value.clone() for name, value in state.model.named_parameters()}
    take_step(state, [Rectangles().at(0)])
    assert state.scaler.get_scale() == 2.0**29
    assert all(torch.equal(value, before[name]) for name, value in state.model.named_parameters())
    state.scaler.update(2.0**4)
    take_step(state, [Rectangles().at(1)])
    assert state.scaler.get_scale() == 2.0**4
    assert any(not torch.equal(value, before[name]) for name, value in state.model.named_parameters())


# --- stopping and going on ---


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_interrupted_and_resumed_ends_in_the_same_bits(tmp_path: Path, straight: Path, stop: int) -> None:
    first = train(tiny_model(), Rectangles(), SETTINGS, tmp_path, progress=stop_after(stop))
    assert (first.interrupted, first.steps) == (True, stop)
    torch.manual_seed(99)
    second = train(tiny_model(seed=1), Rectangles(), SETTINGS, tmp_path, resume=True)
    assert (second.interrupted, second.steps) == (False, 8)
    assert_same(saved(tmp_path), saved(straight))
    assert logged(tmp_path) == logged(straight)
    assert_tensorboard_shows_the_log(tmp_path)


def dropping(model: YoloWorld) -> YoloWorld:
    """The model with dropout after its stem."""
    model.backbone.image_model.stem.register_forward_hook(
        lambda module, inputs, output: nn.functional.dropout(output, 0.2, module.training)
    )
    return model


def test_a_model_that_draws_random_numbers_goes_on_with_those_it_would_have_drawn(tmp_path: Path, straight: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(dropping(tiny_model()), Rectangles(), SETTINGS, whole)
    train(dropping(tiny_model()), Rectangles(), SETTINGS, parts, progress=stop_after(4))
    train(dropping(tiny_model(seed=1)), Rectangles(), SETTINGS, parts, resume=True)
    assert_same(saved(parts), saved(whole))
    assert not torch.equal(saved(whole)["random"], saved(straight)["random"])


def test_fp16_goes_on_with_the_gradient_scale_it_had_come_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some gradients overflow at a scale of 64, which is then halved; not at 4."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=64.0))
    settings, whole, parts = replace(SETTINGS, precision="fp16"), tmp_path / "whole", tmp_path / "parts"
    train(tiny_model(), Rectangles(), settings, whole)
    train(tiny_model(), Rectangles(), settings, parts, progress=stop_after(6))
    reached = saved(parts)["scaler"]
    assert reached["scale"] < 64
    assert reached["_growth_tracker"] > 0
    train(tiny_model(seed=1), Rectangles(), settings, parts, resume=True)
    assert_same(saved(parts), saved(whole))


def test_a_run_goes_on_without_its_settings_file_which_is_written_again(tmp_path: Path, straight: Path) -> None:
    train(tiny_model(), Rectangles(), SETTINGS, tmp_path, progress=stop_after(2))
    (tmp_path / "settings.yaml").unlink()
    resumed = resolve(TrainSettings, {}, carried=settings_of(tmp_path)).values
    assert resumed == SETTINGS
    train(tiny_model(), Rectangles(), resumed, tmp_path, resume=True)
    assert_same(saved(tmp_path), saved(straight))
    assert resolve(TrainSettings, {}, tmp_path / "settings.yaml").values == SETTINGS


def test_a_run_killed_before_anything_but_its_state_was_written_can_go_on(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(resolved: Resolved[TrainSettings], path: Path) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(Resolved, "write", killed)
        with pytest.raises(SystemExit):
            train(tiny_model(), Rectangles(), SETTINGS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    train(tiny_model(), Rectangles(), resolve(TrainSettings, {}, carried=settings_of(tmp_path)).values, tmp_path, resume=True)
    assert_same(saved(tmp_path), saved(straight))


def test_an_interrupt_while_waiting_for_data_saves_the_last_whole_step(tmp_path: Path) -> None:
    settings = replace(SETTINGS, accumulate=2)
    waiting = Rectangles(before=lambda step: signal.raise_signal(signal.SIGINT) if step == 7 else None)  # the second batch of step 4
    result = train(tiny_model(), waiting, settings, tmp_path / "stopped")
    assert (result.interrupted, result.steps, saved(tmp_path / "stopped")["step"]) == (True, 3, 3)
    train(tiny_model(), Rectangles(), settings, tmp_path / "stopped", resume=True)
    train(tiny_model(), Rectangles(), settings, tmp_path / "straight")
    assert_same(saved(tmp_path / "stopped"), saved(tmp_path / "straight"))


def test_the_interrupt_handler_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(tiny_model(), Rectangles(), replace(SETTINGS, steps=1, warmup=0), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_killed_at_a_random_moment_and_resumed_ends_in_the_same_bits(tmp_path: Path, straight: Path) -> None:
    """The process waits for a line before each batch; it is killed at some moment of a step in the middle."""
    stop = random.Random().randrange(2, 7)
    with subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        for _ in range(stop):
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("\n")
        time.sleep(random.Random().uniform(0, 0.1))
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
    assert process.returncode != 0
    assert saved(tmp_path)["step"] < 8
    train(tiny_model(), Rectangles(), SETTINGS, tmp_path, resume=True)
    assert_same(saved(tmp_path), saved(straight))
    assert logged(tmp_path) == logged(straight)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=2)
    train(tiny_model(), Rectangles(), settings, tmp_path)
    before = saved(tmp_path)
    assert train(tiny_model(), Rectangles(), settings, tmp_path, resume=True).steps == 2
    assert_same(saved(tmp_path), before)


def test_a_log_opened_again_within_a_second_hides_only_what_came_after_its_step(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step)})
    with RunLog(tmp_path, 2) as log:
        log.write(3, {"loss": 30.0})
    with RunLog(tmp_path, 3) as log:
        log.write(10, {"loss": 100.0})
    with RunLog(tmp_path, 10) as log:
        log.write(11, {"loss": 110.0})
    assert scalars(tmp_path) == {(1, "loss"): 1.0, (2, "loss"): 2.0, (3, "loss"): 30.0, (10, "loss"): 100.0, (11, "loss"): 110.0}
    assert_tensorboard_shows_the_log(tmp_path)


def test_opening_the_log_drops_later_and_broken_lines(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    with RunLog(tmp_path, 2) as log:
        log.write(3, {"loss": 1.5})
    assert logged(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.5}]


# --- the parts ---


def test_the_average_equals_its_formula_on_weights_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = MovingAverage(model, momentum=0.01, horizon=5)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for t in range(12):
        model(torch.randn(8, 3, generator=generator))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        average.update()
        weight = 0.01 + 0.99 * math.exp(-(t + 1) / 5)
        for name, value in model.state_dict().items():
            expected[name] = (1 - weight) * expected[name] + weight * value.double()
    found = average.state()
    assert found.keys() == expected.keys()
    for name in found:
        if name == "1.num_batches_tracked":
            assert found[name] == 12
        else:
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)


def test_an_average_without_ramp_has_a_constant_momentum() -> None:
    average = MovingAverage(nn.Linear(1, 1), momentum=0.01, horizon=0)
    assert [average.weight(update) for update in (0, 1, 1000)] == [0.01] * 3


@pytest.mark.parametrize("version", [1, 2])
def test_only_weights_of_convolutions_and_linear_layers_decay(version: int) -> None:
    model = build("pico", version)
    settings = TrainSettings(batch=8, accumulate=4, weight_decay=0.1)
    decayed, free = parameter_groups(model, settings)
    assert decayed["weight_decay"] == pytest.approx(0.1 * 8 * 4 / 64)
    assert free["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(names[id(parameter)] for group in (decayed, free) for parameter in group["params"]) == sorted(names.values())
    for parameter in decayed["params"]:
        assert parameter.ndim >= 2, names[id(parameter)]
    for parameter in free["params"]:
        assert parameter.ndim <= 1, names[id(parameter)]
    kinds = {names[id(parameter)].rsplit(".", 1)[1] for parameter in free["params"]}
    assert kinds == {"weight", "bias", "logit_scale"}


def test_frozen_parameters_are_in_no_group() -> None:
    model = tiny_model()
    model.backbone.requires_grad_(False)
    grouped = {id(parameter) for group in parameter_groups(model, SETTINGS) for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in (*model.neck.parameters(), *model.bbox_head.parameters())}


def test_the_defaults_are_the_published_recipe() -> None:
    settings = TrainSettings()
    assert (settings.rate, settings.weight_decay, NOMINAL_BATCH, settings.clip) == (2e-3, 0.025, 64, 10)
    assert (settings.ema_momentum, settings.ema_horizon) == (1e-4, 2000)
    assert (settings.schedule, settings.final_rate) == ("linear", 0.01)


@pytest.mark.parametrize(("steps", "warmup"), [(100_000, 3_000), (100, 3), (0, 0)])
def test_warmup_is_the_published_share_of_the_steps_unless_told(steps: int, warmup: int) -> None:
    settings = TrainSettings(steps=steps, rate=1.0, schedule="constant")
    assert [step for step in range(steps) if rate_at(settings, step) == 1][:1] == ([warmup - 1] if steps else [])
    assert settings.warmup_steps == warmup
    assert TrainSettings(steps=steps, warmup=0).warmup_steps == 0


def test_the_linear_schedule_warms_up_and_ends_at_its_final_share() -> None:
    settings = TrainSettings(steps=101, warmup=10, rate=1.0, final_rate=0.01)
    assert rate_at(settings, 0) == pytest.approx(0.1)
    assert rate_at(settings, 9) == pytest.approx(1 - 0.99 * 0.09)
    assert rate_at(settings, 50) == pytest.approx(1 - 0.99 * 0.5)
    assert rate_at(settings, 100) == pytest.approx(0.01)


def test_the_constant_schedule_stays_at_the_rate_after_warmup() -> None:
    settings = TrainSettings(steps=100, warmup=4, rate=2.0, schedule="constant")
    assert [rate_at(settings, step) for step in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_two_accumulated_batches_give_the_losses_and_gradients_of_the_doubled_one() -> None:
    halves = [Rectangles().at(3), Rectangles().at(4)]
    truth = Truth(*(torch.cat([getattr(half.truth, name) for half in halves]) for name in ("boxes", "labels", "valid")))
    whole = Batch(torch.cat([half.images for half in halves]), torch.cat([half.text for half in halves]), truth)
    results = []
    for batches in (halves, [whole]):
        state = state_of(tiny_model().eval())
        with torch.no_grad():  # boxes that overlap the truth, so that the two halves' score sums differ and count
            for level in range(3):
                state.model.bbox_head.head_module.reg_preds[level][2].bias.view(4, 16)[:, 1] += 4
                state.model.bbox_head.head_module.cls_contrasts[level].bias.zero_()
        terms = accumulate_gradients(state, batches)
        results.append((terms, {name: p.grad for name, p in state.model.named_parameters() if p.grad is not None}))
    sums = [losses_of(state.model, half).score_sum.item() for half in halves]
    assert min(sums) > 1
    assert max(sums) > 1.1 * min(sums)
    (terms, gradients), (whole_terms, whole_gradients) = results
    for name, term in whole_terms.items():
        assert terms[name].item() == pytest.approx(term.item(), rel=1e-5)
    assert gradients.keys() == whole_gradients.keys()
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9)


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported() -> None:
    state = state_of(tiny_model().train(), replace(SETTINGS, clip=0.5))
    reported = take_step(state, [Rectangles().at(0)])
    assert reported["gradient_norm"] > 0.5
    assert nn.utils.get_total_norm([p.grad for p in state.parameters() if p.grad is not None]).item() == pytest.approx(0.5, rel=1e-4)


# --- what can be wrong ---


def poisoned_batch(step: int) -> Batch:
    batch = Rectangles().at(step)
    return batch if step < 4 else replace(batch, text=batch.text * float("nan"))


def overflow(model: YoloWorld) -> None:
    with torch.no_grad():
        model.backbone.image_model.stage3[1].final_conv.bn.weight.fill_(3e38)


def spoil_parameter(model: YoloWorld) -> None:
    with torch.no_grad():
        model.neck.top_down_layers[0].attn_block.guide_fc.bias[1] = float("inf")


def spoil_gradient(model: YoloWorld) -> None:
    model.backbone.image_model.stem.conv.weight.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (
            overflow,
            "the loss is not finite (cls, box, dfl); the first such tensor is the output of backbone.image_model.stage3.1.final_conv.bn",
        ),
        (spoil_parameter, "the first such tensor is the parameter neck.top_down_layers.0.attn_block.guide_fc.bias"),
        (spoil_gradient, "the gradients are not finite; the first such tensor is the gradient of backbone.image_model.stem.conv.weight"),
    ],
)
def test_a_number_that_is_not_finite_stops_training_with_the_step_and_the_tensors_name(
    tmp_path: Path, spoil: Callable[[YoloWorld], None], what: str
) -> None:
    model = tiny_model()

    def spoil_after_four(done: int, total: int, text: str) -> None:
        if done == 4:
            spoil(model)

    with pytest.raises(NonFiniteError) as caught:
        train(model, Rectangles(), SETTINGS, tmp_path, progress=spoil_after_four)
    assert str(caught.value).startswith("step 5: ")
    assert what in str(caught.value)
    assert saved(tmp_path)["step"] == 3
    assert all(torch.isfinite(value).all() for value in saved(tmp_path)["model"].values())
    assert train(tiny_model(), Rectangles(), SETTINGS, tmp_path, resume=True).steps == 8


@pytest.mark.parametrize("moment", [3, 8])
def test_a_state_that_is_not_finite_replaces_no_good_one(tmp_path: Path, moment: int) -> None:
    """A step whose gradients were good may still leave weights that are not; at the steps that save there is no next one to tell."""
    model = tiny_model()

    def spoil(done: int, total: int, text: str) -> None:
        if done == moment:
            spoil_parameter(model)

    with pytest.raises(NonFiniteError) as caught:
        train(model, Rectangles(), SETTINGS, tmp_path, progress=spoil)
    assert str(caught.value).startswith(f"step {moment}: the tensor neck.top_down_layers.0.attn_block.guide_fc.bias is not finite")
    assert "last.pt holds the last good state" in str(caught.value)
    assert saved(tmp_path)["step"] == {3: 0, 8: 6}[moment]
    assert all(torch.isfinite(value).all() for part in ("model", "average") for value in saved(tmp_path)[part].values())
    assert train(tiny_model(), Rectangles(), SETTINGS, tmp_path, resume=True).steps == 8


def test_an_average_that_is_not_finite_replaces_no_good_one(tmp_path: Path) -> None:
    state = state_of(tiny_model())
    state.save(tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    state.step = 5
    state.average.state()["backbone.image_model.stem.bn.running_var"][0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 5: the average of backbone\.image_model\.stem\.bn\.running_var is not finite"):
        state.save(tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_model_that_starts_with_weights_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    spoil_parameter(model)
    refused("step 0: the tensor neck.top_down_layers.0", "give a model whose weights are finite", out=tmp_path, model=model)
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_not_finite_is_named() -> None:
    batch = Rectangles().at(0)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is not finite \(cls.*the batch's text"):
        take_step(state_of(tiny_model().train()), [replace(batch, text=batch.text * float("nan"))])


def test_fp16_stops_where_no_scale_helps() -> None:
    model = tiny_model().train()
    spoil_gradient(model)
    state = state_of(model, replace(SETTINGS, precision="fp16"))
    for step in range(16):  # from a scale of 65,536 down to 1
        take_step(state, [Rectangles().at(step)])
    with pytest.raises(NonFiniteError, match=r"step 17: the gradients are not finite.*stem\.conv\.weight"):
        take_step(state, [Rectangles().at(16)])


def refused(*words: str, **changes: Any) -> None:
    given: dict[str, Any] = {"model": tiny_model(), "source": Rectangles(), "settings": SETTINGS, **changes}
    with pytest.raises(UserError) as caught:
        train(given.pop("model"), given.pop("source"), given.pop("settings"), given.pop("out"), **given)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_that_holds_a_run_is_not_overwritten(straight: Path) -> None:
    before = (straight / "last.pt").read_bytes()
    refused(str(straight), "holds a run already", "--resume", out=straight)
    assert (straight / "last.pt").read_bytes() == before


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    refused(str(tmp_path), "last.pt", out=tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_resumed_with_other_settings(straight: Path) -> None:
    refused("rate 0.002, not 0.1", out=straight, resume=True, settings=replace(SETTINGS, rate=0.1))


def test_a_run_is_not_resumed_with_another_model(straight: Path) -> None:
    refused("another model (bbox_head.head_module.cls_contrasts.0.norm", out=straight, resume=True, model=tiny_model(version=2))


def test_a_run_is_not_resumed_with_other_widths(straight: Path) -> None:
    model = YoloWorld(replace(CONFIG, text_width=24))
    refused("another model (neck.top_down_layers.0.attn_block.guide_fc.weight differs)", out=straight, resume=True, model=model)


def test_a_run_is_not_resumed_with_other_parts_frozen(straight: Path) -> None:
    model = tiny_model()
    model.backbone.requires_grad_(False)
    refused("other parts frozen: its optimizer does not fit", out=straight, resume=True, model=model)


def test_a_run_is_not_resumed_with_other_data(straight: Path) -> None:
    before = (straight / "last.pt").read_bytes()
    refused("fingerprint rectangles, not triangles", out=straight, resume=True, source=Rectangles(fingerprint="triangles"))
    assert (straight / "last.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no state at all", b"PK\x03\x04 cut off"])
def test_a_broken_state_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.pt").write_bytes(content)
    refused("last.pt: cannot be read as a training state", out=tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"\x80\x02)R.", b"\x80\x02K\x01Q.", b"\x80\x02K\x01K\x02R.", b"\x80\x02]}s."])
def test_a_state_whose_bytes_make_no_sense_inside_a_whole_archive_is_refused(tmp_path: Path, straight: Path, content: bytes) -> None:
    with zipfile.ZipFile(straight / "last.pt") as whole, zipfile.ZipFile(tmp_path / "last.pt", "w") as damaged:
        for name in whole.namelist():
            damaged.writestr(name, content if name.endswith("/data.pkl") else whole.read(name))
    refused("last.pt: cannot be read as a training state", out=tmp_path, resume=True)


def test_a_file_that_is_no_training_state_is_refused(tmp_path: Path, straight: Path) -> None:
    (tmp_path / "last.pt").write_bytes((straight / "model.pt").read_bytes())
    refused("is no training state", out=tmp_path, resume=True)


@pytest.mark.parametrize("name", [field for field in SAVED if field != "format"])
def test_a_state_with_a_part_missing_is_damaged(tmp_path: Path, straight: Path, name: str) -> None:
    torch.save({key: value for key, value in saved(straight).items() if key != name}, tmp_path / "last.pt")
    refused(f"last.pt: is damaged: it has no {name}", out=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("step", -5, "its step"),
        ("step", 2.5, "its step"),
        ("step", True, "its step"),
        ("step", 9, "it is at step 9 of 8"),
        ("average_updates", "many", "its average_updates"),
        ("average_updates", -1, "its average_updates"),
        ("data", 7, "its data"),
        ("settings", [], "its settings"),
        ("model", {"backbone": 1}, "its model"),
        ("average", None, "its average"),
        ("scaler", {"scale": "large"}, "its scaler"),
        ("random", torch.zeros(3), "random state"),
        ("cuda_random", 0, "its cuda_random"),
        ("optimizer", {}, "its optimizer does not fit"),
    ],
)
def test_a_state_with_a_part_that_makes_no_sense_is_damaged(tmp_path: Path, straight: Path, name: str, value: object, words: str) -> None:
    torch.save({**saved(straight), name: value}, tmp_path / "last.pt")
    refused("last.pt: is damaged", words, out=tmp_path, resume=True)


def test_moments_of_another_shape_are_damage(tmp_path: Path, straight: Path) -> None:
    state = saved(straight)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(5)
    torch.save(state, tmp_path / "last.pt")
    refused("last.pt: is damaged", "its optimizer does not fit", out=tmp_path, resume=True)


def test_what_is_left_of_a_run_without_its_state_is_not_said_to_be_resumable(tmp_path: Path, straight: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes((straight / "log.jsonl").read_bytes())
    with pytest.raises(UserError) as caught:
        train(tiny_model(), Rectangles(), SETTINGS, tmp_path)
    assert "holds a run already (log.jsonl)" in str(caught.value)
    assert "--resume" not in str(caught.value)
    with pytest.raises(UserError, match=r"holds no last\.pt"):
        settings_of(tmp_path)


def test_data_of_another_batch_size_is_refused(tmp_path: Path) -> None:
    refused("3 pictures a batch", "settings say 2", out=tmp_path, source=Rectangles(batch=3))


def test_data_that_ends_is_refused(tmp_path: Path) -> None:
    refused("the data ended at step 2", out=tmp_path, source=Rectangles(end=2))


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused("'abacus'", out=tmp_path, settings=replace(SETTINGS, device="abacus"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1),
        ("batch", 0),
        ("rate", 0.0),
        ("warmup", -2),
        ("warmup", 9),
        ("ema_momentum", 0.0),
        ("clip", -1.0),
        *[(field.name, value) for field in dataclasses.fields(SETTINGS) if field.type is float for value in (math.nan, math.inf)],
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        replace(SETTINGS, **{name: value})


@pytest.mark.parametrize("name", ["pico_v1.yaml", "pico_v2.yaml"])
def test_the_drawn_tasks_configurations_resolve(name: str) -> None:
    path = Path(__file__).parents[1] / "configs" / name
    settings = resolve(PretrainSettings, {}, path).values
    assert (settings.batch, settings.size, settings.texts, settings.half) == (16, 160, 40, True)
    assert settings.version == int(name[6])


def run_and_wait(folder: Path) -> TrainResult:
    """What the process that gets killed runs."""

    def wait(step: int) -> None:
        print("ready", flush=True)  # noqa: T201  # the other process reads it
        sys.stdin.readline()

    return train(tiny_model(), Rectangles(before=wait), SETTINGS, folder)


if __name__ == "__main__":
    run_and_wait(Path(sys.argv[1]))
