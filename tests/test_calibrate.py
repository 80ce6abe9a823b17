"""Calibration: what is watched, how much of it, and that phase, mode and model stay as they were."""

import copy

import numpy as np
import pytest
import torch
from every_kind import RECIPE, EveryKind, inputs

import crqat_fx
from crqat_fx import ShapesTask
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import build
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Phase
from passes.fx.graph import module_of
from passes.fx.placement import quantizes


def prepared(target="ort", model=None):
    torch.manual_seed(0)
    return prepare((model or EveryKind()).train(), [inputs()], RECIPE, target)


def watched(made, batches):
    """What flows into each activation quantizer, in float."""
    for quantizer in made.quantizers().values():
        quantizer.enabled = False
    seen = {}

    class Watching(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if quantizes(made.graph, n):
                seen.setdefault(str(n.target), []).append(value.flatten())
            return value

    with torch.no_grad():
        for batch in batches:
            Watching(made.graph.eval()).run(*batch)
    return {name: torch.cat(values) for name, values in seen.items()}


@pytest.mark.parametrize("target", ["ort", "conv-inputs"])
def test_min_max_spans_exactly_what_flowed_in_float_through_each_tensor(target):
    made = prepared(target)
    batches = [inputs(seed) for seed in range(3)]
    calibrate(made, batches, "minmax")
    flowed = watched(copy.deepcopy(made), batches)
    assert flowed
    for name, quantizer in made.quantizers().items():
        if name not in flowed or not quantizer.learns or quantizer.spec.symmetric or quantizer.spec.channel_axis is not None:
            continue
        steps = quantizer.spec.highest
        lowest, highest = min(float(flowed[name].min()), 0.0), max(float(flowed[name].max()), 0.0)
        assert float(quantizer.scale.detach()) * steps == pytest.approx(highest - lowest, rel=0.51 / steps + 1e-4), name


def test_weights_are_fitted_to_what_evaluation_folds():
    made = prepared()
    module = made.graph.body.joining.first
    with torch.no_grad():
        module.bn.weight.mul_(3)
        module.bn.running_var.fill_(0.25)
    calibrate(made, [inputs()], "minmax")
    factor = (module.bn.weight / torch.sqrt(module.bn.running_var + module.bn.eps)).view(-1, 1, 1, 1)
    widest = (module.weight * factor).detach().abs().amax((1, 2, 3))
    quantizer = module.weight_fake_quant
    reached = quantizer.scale.detach() * -quantizer.spec.lowest
    assert (reached >= widest * 0.98).all()
    assert (reached <= widest * 1.05).all()


def test_counts_samples_and_reads_no_batch_more_than_it_needs():
    made, told, drawn = prepared(), [], []

    def batches():
        for seed in range(10):
            drawn.append(seed)
            yield inputs(seed)

    seen = calibrate(made, batches(), "minmax", count=5, progress=lambda done, total, text: told.append((done, total)))
    assert seen == 5
    assert drawn == [0, 1, 2]
    assert told == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("observer", ["omse", "minmax", "moving-average", "percentile", "entropy"])
def test_every_observer_sets_every_quantizer(observer):
    made = prepared()
    assert not made.calibrated
    calibrate(made, [inputs(0), inputs(1)], observer)
    assert made.calibrated
    with torch.no_grad():
        assert all(torch.isfinite(output).all() for output in made.graph.eval()(*inputs(2)))


def test_phase_mode_and_weights_stay_as_they_were():
    made = prepared()
    phase = Phase(quantized=(), trained=("whole",))
    made.set_phase(phase)
    before = {name: value.clone() for name, value in made.graph.named_parameters() if "log_scale" not in name and "zero_point" not in name}
    statistics = {name: value.clone() for name, value in made.graph.named_buffers() if "running" in name}
    calibrate(made, [inputs()], "minmax")
    assert made.graph.training
    assert made.phase == phase
    assert not any(quantizer.enabled or quantizer.observing for quantizer in made.quantizers().values())
    assert all(torch.equal(value, dict(made.graph.named_parameters())[name]) for name, value in before.items())
    assert all(torch.equal(value, dict(made.graph.named_buffers())[name]) for name, value in statistics.items())


def test_after_a_failure_nothing_watches_any_longer():
    made = prepared()

    def broken():
        yield inputs()
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        calibrate(made, broken(), "minmax")
    assert not any(quantizer.observing for quantizer in made.quantizers().values())
    assert all(quantizer.enabled for quantizer in made.quantizers().values())
    assert made.graph.training


def test_one_stage_is_set_by_what_the_quantizers_before_it_let_through():
    model, _ = crqat_fx.load("pico-v1")
    task = ShapesTask()
    made = prepare(model, None, "2-2-8", "conv-inputs", vocabulary=task.vocabulary, size=160)
    pictures = [task.draw("calibration", index).image for index in range(2)]
    calibrate(made, picture_batches(made, pictures), "minmax")
    scales = {name: float(each.scale.detach().mean()) for name, each in made.quantizers().items()}
    calibrate(made, picture_batches(made, pictures), "minmax", stages=("neck-head",))
    moved = {name for name, each in made.quantizers().items() if float(each.scale.detach().mean()) != scales[name]}
    assert moved
    assert moved <= set(made.quantizers(["neck-head"]))


def test_pictures_are_letterboxed_and_read_with_the_models_own_vocabulary():
    task = ShapesTask()
    made = prepare(build("pico", 2), vocabulary=task.vocabulary, size=96)
    pictures = [np.full((50, 80, 3), 255, np.uint8)] * 5
    batches = list(picture_batches(made, pictures, size=2))
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 96, 96), (2, 3, 96, 96), (1, 3, 96, 96)]
    images, text = batches[0]
    assert float(images.max()) == 1
    assert torch.equal(text[1], torch.from_numpy(task.vocabulary.embeddings))


def test_mistakes_are_told():
    made = prepared()
    with pytest.raises(UserError, match="no picture to calibrate on"):
        calibrate(made, [])
    with pytest.raises(UserError, match="calibration on 0 pictures"):
        calibrate(made, [inputs()], count=0)
    with pytest.raises(UserError, match="no quantizer is in cellar"):
        calibrate(made, [inputs()], stages=("cellar",))
    with pytest.raises(UserError, match="has no vocabulary"):
        next(picture_batches(made, []))
    with pytest.raises(UserError):
        calibrate(made, [inputs()], "guess")


def test_without_calibration_it_says_so():
    made = prepared()
    with pytest.raises(UserError, match="calibrate the model first"):
        made.graph.eval()(*inputs())


def test_the_graph_that_ort_runs_keeps_its_known_scales():
    made = prepared()
    calibrate(made, [inputs()], "minmax")
    fixed = [node for node in made.graph.graph.nodes if getattr(module_of(made.graph, node), "fixed", None)]
    assert len(fixed) == 4  # three sigmoids of SiLU and gates, and one in a row
    assert all(float(module_of(made.graph, node).scale.detach()) == pytest.approx(1 / 255) for node in fixed)
