"""The ladder holds on random networks and on the shipped models; and each rung sees what it is there to see."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from onnx import numpy_helper
from random_graphs import Net, Plan, inputs_of, plans, recipe_of

from crqat_fx.checkpoint import load_model
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.export import export, lowered_model
from crqat_fx.lower import Lowered, lower
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.trials import Trial
from crqat_fx.verify import Difference, Verification, _compared, accuracy, verify, verify_file
from passes.fx.collapse_match import RoundedBySelf

BATCH = 2


def made(plan: Plan, target: str) -> tuple[Prepared, Lowered, onnx.ModelProto]:
    prepared = prepare(Net(plan).eval(), [inputs_of(plan, 2, 1), inputs_of(plan, 3, 2)], recipe_of(plan), target)
    calibrate(prepared, [inputs_of(plan, 4, seed) for seed in (3, 4)], "minmax", 8)
    lowered = lower(prepared)
    example = dict(zip(("images", "text"), inputs_of(plan, BATCH, 5), strict=True))
    model = lowered_model(lowered, [tuple(example[name] for name in lowered.inputs)])
    return prepared, lowered, ir.to_proto(model)


def judged(plan: Plan, prepared: Prepared, lowered: Lowered, model: onnx.ModelProto) -> Verification:
    taken = {each.name for each in model.graph.input}

    def feeds(inputs: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
        given = dict(zip(("images", "text"), (each.numpy() for each in inputs), strict=True))
        return {name: value for name, value in given.items() if name in taken}

    def expected(output: torch.Tensor) -> dict[str, np.ndarray]:
        return {model.graph.output[0].name: output.numpy()}

    return verify(prepared, lowered, model, [Trial(inputs_of(plan, BATCH, 6))], feeds, expected, threads=1)


# a failing network is small as it is: none is looked for that is smaller
@settings(max_examples=100, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.parametrize("target", ["ort", "conv-inputs"])
@given(plan=plans())
def test_rungs_one_to_three_hold_on_random_networks(plan: Plan, target: str) -> None:
    found = judged(plan, *made(plan, target))
    assert [rung.passed for rung in found.rungs[:3]] == [True, True, True], found.departs
    assert all(rung.tensors > 4 for rung in found.rungs[:4])


# --- every rung sees what it is there to see ---

PLAN = Plan(("convolution", "split", "residual", "attention"), (8, 12, 8, 16), 4, 8, True, 11)


@pytest.fixture(scope="module")
def whole() -> tuple[Prepared, Lowered, onnx.ModelProto]:
    return made(PLAN, "ort")


def rewritten(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    """The model with another value under an initializer's name."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    (held,) = [each for each in changed.graph.initializer if each.name == name]
    value = numpy_helper.to_array(held)
    held.CopyFrom(numpy_helper.from_array(change(value.copy()).astype(value.dtype), name))
    return changed


def one_code_more(codes: np.ndarray) -> np.ndarray:
    codes.flat[3] += 1 if codes.flat[3] < 3 else -1
    return codes


def test_the_ladder_holds_on_what_was_exported(whole: tuple[Prepared, Lowered, onnx.ModelProto]) -> None:
    found = judged(PLAN, *whole)
    assert found.passed
    assert found.departs is None
    assert len(found.rungs) == 5


SCALE = "quant.blocks.0.activate.SiLU.output.scale"
ZERO = "quant.blocks.0.conv.output.zero_point"
WEIGHT = "blocks.0.conv.weight_codes"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (SCALE, lambda scale: scale * 1.01),
        (ZERO, lambda zero: zero + 1),
        (WEIGHT, one_code_more),
        ("blocks.0.conv.bias_codes", lambda b: b + 1),
    ],
    ids=["a scale off by 1%", "a zero point off by 1", "one code changed", "a bias off by 1"],
)
def test_rung_one_names_what_is_stored_wrong(
    whole: tuple[Prepared, Lowered, onnx.ModelProto], name: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    prepared, lowered, model = whole
    first = judged(PLAN, prepared, lowered, rewritten(model, name, change)).rungs[0]
    assert (first.passed, first.departs) == (False, name)


@pytest.mark.parametrize(
    ("name", "change", "departs"),
    [
        (SCALE, lambda scale: scale * 1.01, "quant.blocks.0.activate.SiLU.output.codes"),
        (ZERO, lambda zero: zero + 1, "quant.blocks.0.conv.output.codes"),
        (WEIGHT, lambda codes: codes[::-1], "quant.blocks.0.conv.output.codes"),
    ],
    ids=["a scale off by 1%", "a zero point off by 1", "channels swapped"],
)
def test_rung_three_names_the_first_tensor_that_departs(
    whole: tuple[Prepared, Lowered, onnx.ModelProto], name: str, change: Callable[[np.ndarray], np.ndarray], departs: str
) -> None:
    prepared, lowered, model = whole
    found = judged(PLAN, prepared, lowered, rewritten(model, name, change))
    assert [rung.passed for rung in found.rungs[1:4]] == [True, False, False]
    assert found.rungs[2].departs == departs


def test_rung_three_sees_a_swapped_concat(whole: tuple[Prepared, Lowered, onnx.ModelProto]) -> None:
    prepared, lowered, model = whole
    swapped = onnx.ModelProto()
    swapped.CopyFrom(model)
    concat = next(node for node in swapped.graph.node if node.op_type == "Concat" and len(node.input) == 3)
    concat.input[0], concat.input[1] = concat.input[1], concat.input[0]
    found = judged(PLAN, prepared, lowered, swapped)
    assert found.rungs[0].passed
    assert not found.rungs[2].passed


def test_rung_two_sees_a_lowered_graph_that_departs(whole: tuple[Prepared, Lowered, onnx.ModelProto]) -> None:
    prepared, _, model = whole
    lowered = lower(prepared)
    with torch.no_grad():
        lowered.graph.get_buffer("blocks.0.conv.weight_codes")[0, 0, 0, 0] ^= 1
    found = judged(PLAN, prepared, lowered, model)
    assert not found.rungs[1].passed
    assert "blocks.0.conv" in str(found.rungs[1].departs)


def test_a_code_off_by_one_step_far_from_a_tie_departs() -> None:
    assert Difference("x", (99_999, 1, 0, 0)).within(1e-4)
    assert not Difference("x", (99_999, 1, 0, 0), astray=1).within(1e-4)
    assert not Difference("x", (99_999, 0, 1, 0)).within(1e-4)
    assert not Difference("x", (99_980, 20, 0, 0)).within(1e-4)
    assert not Difference("x", (9, 1, 0, 0)).within(0.0)


def test_a_tie_of_a_function_of_a_code_counts_once_however_often_the_code_is_there() -> None:
    levels = np.array([2.500005] * 20 + [7.1] * 80, np.float32)
    want, found = np.round(levels).astype(np.uint8), np.array([2] * 20 + [7] * 80, np.uint8)
    tie = _compared("x", want, found, levels, ties_alone=True)
    assert (tie.steps, tie.astray, tie.repeated) == ((80, 20, 0, 0), 0, 19)
    assert tie.within(1e-4)
    table = _compared("x", want, found, levels - 0.2)  # off by a step where no tie is: every one counts
    assert (table.astray, table.repeated) == (0, 0)
    assert not table.within(1e-4)
    assert _compared("x", want, found, levels - 0.2, ties_alone=True).astray == 20


def test_rung_three_sees_what_comes_behind_the_last_codes(whole: tuple[Prepared, Lowered, onnx.ModelProto]) -> None:
    prepared, lowered, model = whole
    negated = onnx.ModelProto()
    negated.CopyFrom(model)
    (output,) = negated.graph.output
    maker = next(node for node in negated.graph.node if output.name in node.output)
    maker.output[0] = "before"
    negated.graph.node.append(onnx.helper.make_node("Neg", ["before"], [output.name]))
    found = judged(PLAN, prepared, lowered, negated)
    assert (found.rungs[2].passed, found.rungs[2].departs) == (False, output.name)


def test_a_tensor_that_is_not_in_the_file_departs(whole: tuple[Prepared, Lowered, onnx.ModelProto]) -> None:
    prepared, lowered, model = whole
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    name = "quant.blocks.0.conv.output.codes"
    for node in renamed.graph.node:
        for names in (node.input, node.output):
            for index, value in enumerate(names):
                if value == name:
                    names[index] = "another"
    found = judged(PLAN, prepared, lowered, renamed)
    assert (found.rungs[2].passed, found.rungs[2].departs) == (False, name)


@pytest.mark.parametrize(("shipped", "recipe"), [("pico-v1", "8-8-8-int"), ("pico-v2", "4-4-8-int"), ("pico-v2", "2-2-8-odd-int")])
def test_the_ladder_holds_on_the_shipped_models(tmp_path: Path, shipped: str, recipe: str) -> None:
    model, _ = load_model(shipped)
    task = ShapesTask()
    prepared = prepare(model, recipe=recipe, vocabulary=task.vocabulary, size=task.size)
    shown = [task.draw("calibration", index).image for index in range(4)]
    calibrate(prepared, picture_batches(prepared, shown), "minmax", 4)
    export(prepared, tmp_path / "model.onnx", input="uint8")
    found = verify_file(prepared, tmp_path / "model.onnx", shown[:1], count=1, threads=1)
    assert found.passed, found.departs


def test_rung_one_does_not_take_a_collapsed_product_on_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(self: RoundedBySelf, weight: torch.Tensor, bits: int) -> None:
        original(self, weight / 2, bits)

    original = RoundedBySelf.__init__
    monkeypatch.setattr(RoundedBySelf, "__init__", halved)
    model, _ = load_model("pico-v2")
    task = ShapesTask()
    prepared = prepare(model, recipe="8-8-8-int", vocabulary=task.vocabulary, size=64)
    shown = [task.draw("calibration", 0).image]
    calibrate(prepared, picture_batches(prepared, shown), "minmax", 1)
    export(prepared, tmp_path / "model.onnx")
    first = verify_file(prepared, tmp_path / "model.onnx", shown, count=1, threads=1).rungs[0]
    assert not first.passed
    assert "cls_contrasts" in str(first.departs)


def test_accuracy_is_judged_at_a_fifth_of_a_point() -> None:
    assert accuracy(50.0, 50.1).passed
    assert not accuracy(50.0, 49.7).passed
