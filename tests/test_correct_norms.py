"""Norms that are corrected: channels get their float means and deviations back, codes stay, and nothing else changes."""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_models import SIZE, calibrated_pico, pictures
from torch import Tensor, nn

from crqat_fx import ShapesTask, load_prepared
from crqat_fx.checkpoint import load_model
from crqat_fx.correct_norms import CONSTANT, LARGEST, Moments, correct_norms, correctable, uncorrect_norms
from crqat_fx.curriculum import Phase
from crqat_fx.data.shapes import ShapesSet
from crqat_fx.errors import UserError
from crqat_fx.evaluate import evaluate
from crqat_fx.noise import turned_on
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.quantize.watch import weight_codes
from crqat_fx.recipe import QuantRecipe, QuantRule
from crqat_fx.torch_detector import TorchDetector
from passes.spec import QuantSpec

BACKBONE, NECK_HEAD = "backbone", "neck-head"
COUNT = 8


def coarse() -> Prepared:
    """A fresh one each time."""
    made = _made()
    copied = copy.copy(made)
    copied.graph = copy.deepcopy(made.graph)
    copied.calibrations = dict(made.calibrations)
    return copied


@functools.cache
def _made() -> Prepared:
    """With norms as of a trained model: their own scales and biases too."""
    prepared = calibrated_pico("3-3-8", "conv-inputs")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in correctable(prepared).values():
            layer.bn.weight.copy_(0.5 + torch.rand(layer.bn.weight.shape, generator=generator))
            layer.bn.bias.copy_(0.2 * torch.randn(layer.bn.bias.shape, generator=generator))
    calibrate(prepared, batches(prepared, 4, 4), "minmax", 4)
    return prepared


def batches(prepared: Prepared, count: int = COUNT, size: int = COUNT) -> Iterator[tuple[Tensor, ...]]:
    return picture_batches(prepared, pictures(count, "calibration"), size)


def moments(prepared: Prepared) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation of every channel behind a norm, as the model stands, over the pictures."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = output.double().mean((0, 2, 3)), output.double().std((0, 2, 3), correction=0)

        return hook

    handles = [each.register_forward_hook(keep(str(node.target))) for node, each in correctable(prepared).items()]
    with torch.no_grad():
        prepared.graph.eval()(*next(batches(prepared)))
    for handle in handles:
        handle.remove()
    return found


def in_float(prepared: Prepared) -> dict[str, tuple[Tensor, Tensor]]:
    with turned_on(prepared.quantizers(), lambda name: False):
        return moments(prepared)


def outputs(prepared: Prepared) -> list[Tensor]:
    with torch.no_grad():
        logits, bins, _ = prepared.graph.eval()(*next(batches(prepared)))
    return [*logits, *bins]


def departure(found: dict[str, tuple[Tensor, Tensor]], wanted: dict[str, tuple[Tensor, Tensor]]) -> float:
    """The mean difference of means and deviations, in deviations of the layer."""
    differences = [
        float((one - other).abs().mean() / wanted[name][1].mean())
        for name in wanted
        for one, other in zip(found[name], wanted[name], strict=True)
    ]
    return sum(differences) / len(differences)


@pytest.mark.parametrize("size", [COUNT, 3])  # all at once; 3, 3 and 2, of which each is put right by what is known so far
def test_channels_get_their_float_means_and_deviations_back(size: int) -> None:
    prepared = coarse()
    wanted = in_float(prepared)
    assert len(wanted) == 60
    before = departure(moments(prepared), wanted)
    assert correct_norms(prepared, batches(prepared, COUNT, size), COUNT) == 60
    after = departure(moments(prepared), wanted)
    assert after < before / 4  # what is left is that biases are rounded, which at 3 bits have large steps


def test_codes_of_weights_stay_and_their_scales_follow() -> None:
    prepared = coarse()
    before, scales = weight_codes(prepared), {name: each.scale.detach() for name, each in prepared.quantizers().items()}
    correct_norms(prepared, batches(prepared), COUNT)
    after = weight_codes(prepared)
    for name, (codes, _) in before.items():
        assert (codes != after[name][0]).float().mean() < 1e-3, name
    for node, layer in correctable(prepared).items():
        name = f"{node.target}.weight_fake_quant"
        torch.testing.assert_close(prepared.quantizers()[name].scale, scales[name] * layer.ratio)
        torch.testing.assert_close(prepared.calibrations[name].scale, prepared.quantizers()[name].scale.detach())
    others = {name for name, each in prepared.quantizers().items() if not torch.equal(each.scale, scales[name])}
    assert others <= {f"{node.target}.weight_fake_quant" for node in correctable(prepared)}


def test_in_float_the_model_is_what_it_was() -> None:
    prepared, untouched = coarse(), coarse()
    correct_norms(prepared, batches(prepared), COUNT)
    for each in (prepared, untouched):
        for quantizer in each.quantizers().values():
            quantizer.enabled = False
    for one, other in zip(outputs(prepared), outputs(untouched), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("parts", [(4, 4), (5, 2, 1)])
def test_moments_of_batches_add_up_to_those_of_all(parts: tuple[int, ...]) -> None:
    values = torch.randn(8, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-3, 0.0]).view(3, 1, 1) + 10
    whole = Moments.of(values)
    first, *others = map(Moments.of, values.split(parts))
    found = sum(others, start=first)
    assert found.count == whole.count == 8 * 35
    torch.testing.assert_close(found.mean, values.double().mean((0, 2, 3)))
    torch.testing.assert_close(found.variance, values.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-13)
    assert found.variance[2] <= CONSTANT * found.mean[2].square()


def test_every_batch_counts_and_no_more_are_read_than_needed() -> None:
    parts, first, last = coarse(), coarse(), coarse()
    told: list[tuple[int, int, str]] = []
    source = batches(parts, 2 * COUNT, COUNT // 2)
    correct_norms(parts, source, COUNT, progress=lambda *each: told.append(each))
    assert told == [(4, COUNT, "correcting norms"), (8, COUNT, "correcting norms")]
    assert len(list(source)) == 2
    for alone, batch in zip((first, last), batches(first, COUNT, COUNT // 2), strict=True):
        correct_norms(alone, [batch], COUNT // 2)
    ratios = [torch.cat([layer.ratio for layer in correctable(each).values()]).log() for each in (parts, first, last)]
    between = (ratios[1] + ratios[2]) / 2
    for alone in ratios[1:]:
        assert float((ratios[0] - between).abs().mean()) < 0.5 * float((alone - between).abs().mean())


def test_a_stage_alone_is_corrected_on_what_the_one_before_it_gives() -> None:
    prepared = coarse()
    prepared.set_phase(Phase((BACKBONE, NECK_HEAD), (BACKBONE, NECK_HEAD)))
    with turned_on(prepared.quantizers([NECK_HEAD]), lambda name: False):
        wanted = moments(prepared)  # behind the quantized backbone
    own = {str(node.target) for node in correctable(prepared, [NECK_HEAD])}
    before = {name: layer.ratio.clone() for name, layer in prepared.graph.named_modules() if isinstance(layer, ConvBn2d)}
    assert correct_norms(prepared, batches(prepared), COUNT, stages=[NECK_HEAD]) == len(own)
    found = moments(prepared)
    assert departure({name: found[name] for name in own}, {name: wanted[name] for name in own}) < 0.1
    moved = {name for name, ratio in before.items() if not torch.equal(ratio, prepared.graph.get_submodule(name).ratio)}
    assert moved == own


def test_corrected_twice_is_corrected_once_and_calibrating_forgets_it() -> None:
    prepared, untouched = coarse(), coarse()
    correct_norms(prepared, batches(prepared), COUNT)
    once = outputs(prepared)
    correct_norms(prepared, batches(prepared), COUNT)
    for one, other in zip(outputs(prepared), once, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    calibrate(prepared, batches(prepared), "minmax", COUNT)
    calibrate(untouched, batches(untouched), "minmax", COUNT)
    for name, value in untouched.graph.state_dict().items():
        torch.testing.assert_close(prepared.graph.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_it_can_be_undone() -> None:
    prepared = coarse()
    before = outputs(prepared)
    correct_norms(prepared, batches(prepared), COUNT)
    uncorrect_norms(prepared, [BACKBONE, NECK_HEAD])
    assert not any(layer.corrected for layer in correctable(prepared).values())
    for name, quantizer in prepared.quantizers().items():
        torch.testing.assert_close(prepared.calibrations[name].scale, quantizer.scale.detach(), msg=name)
    for one, other in zip(outputs(prepared), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_file_keeps_it(tmp_path: Path) -> None:
    prepared = coarse()
    correct_norms(prepared, batches(prepared), COUNT)
    prepared.save(tmp_path / "p.pt")
    for one, other in zip(outputs(load_prepared(tmp_path / "p.pt")), outputs(prepared), strict=True):
        assert torch.equal(one, other)


def test_a_channel_that_rounding_emptied_is_shifted_and_the_ratio_is_bounded() -> None:
    prepared = coarse()
    node, layer = next(iter(correctable(prepared).items()))
    assert layer.weight_fake_quant is not None
    with torch.no_grad():
        layer.weight_fake_quant.log_scale.add_(3.0)  # its codes are all 0 now
        layer.weight_fake_quant.log_scale[1] -= 7.0  # but these, a fiftieth of what they were
    wanted = in_float(prepared)[str(node.target)][0]
    correct_norms(prepared, batches(prepared, COUNT, 3), COUNT)
    others = torch.arange(len(wanted)) != 1
    assert (layer.ratio[others] == 1).all()
    assert layer.ratio[1] == LARGEST
    step = layer.step()
    assert step is not None
    half = (step * layer.weight_scale(None)).detach() / 2  # to which its bias is rounded
    assert ((moments(prepared)[str(node.target)][0] - wanted).abs() <= 1.01 * half)[others].all()


def test_layers_of_which_nearly_nothing_is_left_are_told(caplog: pytest.LogCaptureFixture) -> None:
    prepared = coarse()
    correct_norms(prepared, batches(prepared), COUNT)
    assert not caplog.records
    name = "quant.backbone.image_model.stage2.0.conv.input"
    prepared.quantizers()[name].log_scale.data -= 6.0
    correct_norms(prepared, batches(prepared), COUNT)
    (told,) = caplog.records
    assert "1 of 60 norms cannot be corrected" in told.getMessage()
    assert "backbone.image_model.stage2.0.conv" in told.getMessage()


def test_what_a_phase_leaves_float_is_left_alone() -> None:
    prepared = coarse()
    prepared.set_phase(Phase((BACKBONE,), (BACKBONE, NECK_HEAD)))
    assert correct_norms(prepared, batches(prepared), COUNT) == len(correctable(prepared, [BACKBONE]))
    assert not any(layer.corrected for layer in correctable(prepared, [NECK_HEAD]).values())


def test_a_weight_with_one_scale_for_all_channels_cannot_follow_and_is_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    examples = [(torch.randn(4, 3, 8, 8),)]
    for axis, count in ((0, 1), (None, 0)):
        rule = QuantRule("*", QuantSpec(4, symmetric=True, channel_axis=axis), QuantSpec(4))
        prepared = prepare(model, examples, QuantRecipe((rule,)), "conv-inputs")
        calibrate(prepared, examples, "minmax", 4)
        assert correct_norms(prepared, examples, 4) == count


def test_mistakes_are_told() -> None:
    prepared = coarse()
    correct_norms(prepared, batches(prepared), COUNT)
    before = outputs(prepared)
    for call in (correctable, uncorrect_norms, lambda each, stages: correct_norms(each, batches(each), COUNT, stages=stages)):
        with pytest.raises(UserError, match="unknown stage 'bakcbone'"):
            call(prepared, [NECK_HEAD, "bakcbone"])
    for wrong, count, what in (([], COUNT, "there was no picture"), (batches(prepared), 0, "on 0 pictures")):
        with pytest.raises(UserError, match=what):
            correct_norms(prepared, wrong, count)
        with pytest.raises(UserError, match=what):
            calibrate(prepared, wrong, "minmax", count)
        for one, other in zip(outputs(prepared), before, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.manual_seed(0)
    plain = prepare(load_model("pico-v1")[0], None, "3-3-8", "conv-inputs", vocabulary=ShapesTask().vocabulary, size=SIZE)
    with pytest.raises(UserError, match="no scale yet"):
        correct_norms(plain, batches(plain))
    uncorrect_norms(prepared, [BACKBONE, NECK_HEAD])
    list(correctable(prepared).values())[3].weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        correct_norms(prepared, batches(prepared), COUNT)
    assert not any(layer.corrected for layer in correctable(prepared).values())


def test_it_brings_back_what_three_bits_took_from_a_trained_model() -> None:
    """The shipped model on the drawn task, in the first 24 pictures: what nothing can be found with becomes half of full precision."""
    task = ShapesTask()
    prepared = prepare(load_model("pico-v1")[0], None, "3-3-8", "conv-inputs", vocabulary=task.vocabulary, size=task.size)
    taken = [task.draw("calibration", index).image for index in range(16)]
    calibrate(prepared, picture_batches(prepared, taken), "omse", 16)

    def ap() -> float:
        return float(evaluate(TorchDetector(prepared.graph.eval(), task.vocabulary, task.size), ShapesSet(task, "val", 24)).scores.ap or 0)

    assert ap() < 12
    correct_norms(prepared, picture_batches(prepared, taken), 16)
    assert ap() > 35
