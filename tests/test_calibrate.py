"""Calibration: what is watched, how much of it, and that phase, mode and model stay as they were."""

import copy

import numpy as np
import pytest
import torch
from every_kind import RECIPE, EveryKind, inputs
from torch import nn

import crqat_fx
from crqat_fx import ShapesTask
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import Concat, build
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Phase
from crqat_fx.recipe import QuantRecipe, QuantRule
from passes.fx.graph import module_of
from passes.fx.placement import quantizes
from passes.spec import QuantSpec


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


def scales(made, observer, batches):
    calibrate(made, batches, observer)
    return {name: float(each.scale.detach().mean()) for name, each in made.quantizers().items() if each.learns and not each.weight}


@pytest.mark.parametrize("observer", ["percentile-90", "omse", "entropy"])
def test_what_nobody_but_the_output_reads_keeps_its_whole_range(observer):
    made = prepared()
    batches = [inputs(seed) for seed in range(3)]
    whole, cut = scales(made, "minmax", batches), scales(made, observer, batches)
    returned = {"quant.match.output", "quant.last.output", "quant.body.joining.concat.output"}
    assert all(cut[name] == whole[name] for name in returned)
    if observer == "percentile-90":  # what else is returned is read in codes, too: it is cut as all others
        assert {name for name in whole if cut[name] == whole[name]} == returned
    used = {name: calibration.observer for name, calibration in made.calibrations.items()}
    assert {name for name in whole if used[name] == "minmax"} == returned


def test_a_detectors_logits_and_bins_are_what_is_kept_whole():
    made = prepare(build("pico", 1), vocabulary=ShapesTask().vocabulary, size=96)
    calibrate(made, picture_batches(made, [np.full((96, 96, 3), 255, np.uint8)]), "percentile")
    kept = {name for name, calibration in made.calibrations.items() if calibration.observer == "minmax"}
    head = "quant.bbox_head.head_module"
    assert kept == {f"{head}.{part}.output" for level in range(3) for part in (f"cls_contrasts.{level}.match", f"reg_preds.{level}.2")}


def test_a_scale_that_others_read_as_well_is_no_outputs_own():
    class Joining(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other, self.concat = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), Concat()

        def forward(self, x):
            x = self.layer(x)
            return self.concat(x, self.other(x))

    torch.manual_seed(0)
    eight = QuantRecipe((QuantRule("*", QuantSpec(8, True, 0), QuantSpec(8)),))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1), Joining())).eval()
    made = prepare(model, [(torch.rand(2, 3, 4, 4),)], eight)
    (shared,) = (name for name in made.quantizers() if "concat" in name)
    assert sum(node.target == shared for node in made.graph.graph.nodes) == 3
    calibrate(made, [(torch.rand(2, 3, 4, 4),)], "percentile-90")
    assert made.calibrations[shared].observer == "percentile-90"


def test_entropy_keeps_the_ranges_of_attention_gates():
    model, _ = crqat_fx.load("pico-v1")
    task = ShapesTask()
    made = prepare(model, None, "8-8-8", "conv-inputs", vocabulary=task.vocabulary, size=160)
    pictures = [task.draw("calibration", index).image for index in range(2)]
    whole = scales(made, "minmax", picture_batches(made, pictures))
    cut = scales(made, "entropy", picture_batches(made, pictures))
    gates = [name for name in whole if "gate" in name]
    assert len(gates) == 4
    assert all(cut[name] > 0.9 * whole[name] for name in gates)


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
    with pytest.raises(UserError, match="unknown stage 'cellar'"):
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
