"""Biases in whole steps: which layers know what they read, what evaluation computes with, and what training leaves as it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from every_kind import RECIPE, EveryKind, inputs
from prepared_models import calibrated_pico
from torch import nn

from crqat_fx.lower import lower
from crqat_fx.models import yolo_world
from crqat_fx.quantize.calibrate import calibrate
from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.integer_bias import Conv2d, HeadBias, IntegerBias, Linear
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Phase
from crqat_fx.recipe import QuantRecipe, QuantRule
from passes.fx.codes import Quantize
from passes.fx.lower_layers import LARGEST_BIAS
from passes.spec import QuantSpec

HEAD = "quant.add.input.1"


def own(target="ort"):
    made = prepare(EveryKind(), [inputs(0)], RECIPE, target)
    calibrate(made, [inputs(seed) for seed in range(3)], "minmax", count=6)
    made.graph.eval()
    return made


def biased(graph):
    return {name: each for name, each in graph.named_modules() if isinstance(each, IntegerBias | HeadBias)}


def in_float(made):
    """A copy whose biases are not rounded."""
    copied = copy.copy(made)
    copied.graph = copy.deepcopy(made.graph)
    for each in biased(copied.graph).values():
        if isinstance(each, HeadBias):
            each.steps = lambda: None
        else:
            each.source = None
    return copied


# --- who reads what ---


def test_a_layer_knows_the_quantizer_that_it_reads_through_what_moves_codes_and_products_with_a_number():
    made = own()
    layers = biased(made.graph)
    named = {id(each): name for name, each in made.quantizers().items()}
    found = {
        name: (named[id(each.source.quantizer)], each.source.factors)
        for name, each in layers.items()
        if not isinstance(each, HeadBias) and each.source is not None
    }
    assert found == {
        "body.stem": ("quant.images.output", ()),
        "body.joining.first": ("quant.body.joining.first.input", ()),
        "body.joining.second": ("quant.body.joining.other_concat.output", (2.0,)),
        "third": ("quant.body.joining.other_concat.output", ()),
        "guide": ("quant.guide.input", ()),
        "regions": ("quant.regions.input", ()),
        "last": ("quant.other_gate.output", ()),
    }
    assert layers.keys() - found.keys() == {HEAD}


def test_links_are_no_part_of_the_state_and_follow_a_copy():
    made = own()
    copied = copy.deepcopy(made.graph)
    assert copied.state_dict().keys() == made.graph.state_dict().keys()
    quantizers = {each for each in copied.modules() if isinstance(each, FakeQuantize)}
    for each in biased(copied).values():
        assert (each.read[0] if isinstance(each, HeadBias) else each.source.quantizer) in quantizers
    assert not [name for name in made.quantizers() if "source" in name]
    assert HEAD not in made.text()  # it has no state, and follows from the rest


# --- evaluation ---


def prepared_layer(layer, x, weight_bits=8, odd=False):
    recipe = QuantRecipe((QuantRule("*", QuantSpec(weight_bits, True, 0, odd), QuantSpec(4)),))
    made = prepare(nn.Sequential(*layer).eval(), [(x,)], recipe, "ort")
    calibrate(made, [(x,)], "minmax")
    return made, made.graph.get_submodule("0")


def norm(channels):
    made = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for each in (made.weight, made.bias, made.running_mean, made.running_var):
            each.uniform_(0.5, 1.5)
    return made


PICTURE, ROWS = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0)), torch.rand(2, 4, 3)
LAYERS = [
    ((nn.Conv2d(3, 8, 3, padding=1), norm(8)), PICTURE, ConvBn2d),
    ((nn.Conv2d(3, 8, 3, padding=1),), PICTURE, Conv2d),
    ((nn.Linear(3, 8),), ROWS, Linear),
]


@pytest.mark.parametrize(("layers", "x", "kind"), LAYERS, ids=lambda value: getattr(value, "__name__", ""))
def test_evaluation_adds_whole_steps(layers, x, kind):
    made, layer = prepared_layer(copy.deepcopy(layers), x)
    assert type(layer) is kind
    quantizer = made.graph.get_submodule("quant.input.output")
    steps = (quantizer.scale * layer.weight_fake_quant.scale).detach()
    weight, bias = (each.detach() for each in layer.folded())
    whole = torch.round(bias / steps) * steps
    assert not torch.equal(whole, bias)
    apply = F.linear if kind is Linear else layer._conv_forward
    with torch.no_grad():
        assert torch.equal(layer.eval()(quantizer(x)), apply(quantizer(x), weight, bias=whole))


@pytest.mark.parametrize("off", ["quant.input.output", "weight"])
def test_with_a_quantizer_off_the_bias_is_as_it_was(off):
    made, layer = prepared_layer((nn.Conv2d(3, 8, 3),), PICTURE)
    (layer.weight_fake_quant if off == "weight" else made.graph.get_submodule(off)).enabled = False
    assert torch.equal(layer.stored()[1], layer.bias)


def test_what_reads_no_codes_keeps_its_bias():
    recipe = QuantRecipe((QuantRule("*", QuantSpec(8, True, 0), None),))
    made = prepare(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), [(PICTURE,)], recipe, "ort")
    calibrate(made, [(PICTURE,)], "minmax")
    layer = made.graph.get_submodule("0")
    assert (layer.source, layer.stored()[1]) == (None, layer.bias)


def test_the_scale_of_a_dead_channel_is_raised_until_its_bias_has_a_code():
    convolution = nn.Conv2d(3, 8, 1)
    with torch.no_grad():
        convolution.weight[2] *= 1e-11
    made, layer = prepared_layer((convolution,), PICTURE)
    with torch.no_grad():
        layer.weight_fake_quant.log_scale[2] = -28
    step, own_scale = made.graph.get_submodule("quant.input.output").scale, layer.weight_fake_quant.scale
    scale = layer.weight_scale(layer.bias)
    assert (scale > own_scale).tolist() == [index == 2 for index in range(8)]
    assert scale[2] == layer.bias[2].abs() / (step * LARGEST_BIAS)
    weight, bias = layer.stored()
    assert layer.folded()[0][2].any()
    assert not weight[2].any()
    assert torch.equal(weight[:2], layer.folded()[0][:2])
    assert bias[2] == torch.round(layer.bias[2] / (step * scale[2])) * (step * scale[2])


def test_the_weight_of_a_dead_channel_has_odd_codes_where_all_do():
    convolution = nn.Conv2d(3, 8, 1)
    with torch.no_grad():
        convolution.weight[2] *= 1e-11
    _, layer = prepared_layer((convolution,), PICTURE, 2, odd=True)
    with torch.no_grad():
        layer.weight_fake_quant.log_scale[2] = -28
    weight, _ = layer.stored()
    scale = layer.weight_scale(layer.bias)
    assert scale[2] > layer.weight_fake_quant.scale[2]
    assert torch.equal(weight[2].abs(), scale[2].expand_as(weight[2]))  # -1 and 1
    rounds = Quantize(scale, torch.zeros_like(scale, dtype=torch.int32), layer.weight_fake_quant.spec)
    assert torch.equal(rounds(weight) * scale.view(-1, 1, 1, 1), weight)


def test_the_bias_of_attention_is_in_steps_of_its_product():
    made = own()
    head, bias = made.graph.get_submodule(HEAD), made.graph.bias.detach()
    guide, source = made.graph.get_submodule("quant.max_similarity.input.0"), made.graph.get_submodule("quant.max_similarity.input.1")
    steps = (source.scale * guide.scale * 0.5).detach().unsqueeze(1)
    assert torch.equal(head(bias), torch.round(bias / steps) * steps)
    assert not torch.equal(head(bias), bias)
    far = bias * 1e12  # no 32 bits hold its code
    assert torch.equal(head(far), far)
    guide.enabled = False
    assert torch.equal(head(bias), bias)


# --- training ---


@pytest.mark.parametrize(("layers", "x", "kind"), LAYERS, ids=lambda value: getattr(value, "__name__", ""))
def test_with_frozen_statistics_training_computes_what_evaluation_does_and_the_gradient_goes_straight_through(layers, x, kind):
    made, _ = prepared_layer(copy.deepcopy(layers), x)
    plain = in_float(made)
    gradients = []
    for model in (made, plain):
        model.set_phase(Phase(("whole",), ("whole",), "frozen"))
        with torch.no_grad():
            evaluated = model.graph.eval()(x)
        y = model.graph.train()(x)
        assert torch.equal(y, evaluated)
        before = model.graph.get_submodule("0")(x)  # without the quantizer behind, whose gradient follows what is clipped
        before.backward(torch.ones_like(before))
        gradients.append({name: value.grad for name, value in model.graph.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    learned = "0.bn.bias" if kind is ConvBn2d else "0.bias"
    assert gradients[0][learned].abs().min() > 0
    for name, found in gradients[0].items():
        assert (found is None) == (gradients[1][name] is None)
        assert found is None or torch.equal(found, gradients[1][name]), name


def test_training_with_live_norms_is_as_if_no_bias_were_ever_rounded():
    made = calibrated_pico("4-8-8-int", "ort")
    made.set_phase(Phase(tuple(stage.name for stage in made.stages), tuple(stage.name for stage in made.stages), "train"))
    for name, parameter in made.graph.named_parameters():
        if name.endswith("attn_block.bias"):
            nn.init.uniform_(parameter)  # a fresh one is zero, which is a whole step
    images, text = torch.rand(2, 3, 64, 64), torch.from_numpy(made.vocabulary.embeddings[:5]).expand(2, -1, -1)
    found = []
    for model in (made, in_float(made)):
        logits, bins, _ = model.graph.train()(images, text)
        sum(each.square().mean() for each in (*logits, *bins)).backward()
        found.append((*logits, *bins, *(each.grad for each in model.graph.parameters() if each.grad is not None)))
    assert len(found[0]) > 200
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with torch.no_grad():
        one, other = (model.graph.eval()(images, text)[0][0] for model in (made, in_float(made)))
    assert not torch.equal(one, other)


def test_a_stage_that_is_not_trained_rounds_its_biases_and_the_others_do_not():
    made = calibrated_pico("4-8-8-int", "ort")
    first, second = (stage.name for stage in made.stages)
    for trained in (first, second):
        made.set_phase(Phase((first, second), (trained,), "train"))
        frozen = {(name.startswith("backbone."), each.frozen) for name, each in biased(made.graph).items()}
        assert frozen == {(True, trained != first), (False, trained != second)}


# --- which attention has its bias rounded ---


class Attention(nn.Module):
    def __init__(self, factor=0.5):
        super().__init__()
        self.guide, self.map = nn.Linear(6, 8), nn.Conv2d(3, 8, 1)
        self.bias, self.other, self.factor = nn.Parameter(torch.randn(2, 1)), nn.Parameter(torch.randn(2, 1)), factor

    def product(self, images, text):
        guide = self.guide(text).unflatten(2, (2, -1)).transpose(1, 2)
        return yolo_world.max_similarity(guide, self.map(images).unflatten(1, (2, -1)).flatten(3))

    def forward(self, images, text):
        return torch.sigmoid(self.product(images, text) * self.factor + self.bias)


class OfTwo(Attention):
    def forward(self, images, text):
        return torch.sigmoid(self.product(images, text) * self.factor + self.bias * self.other)


class FromInput(Attention):
    def forward(self, images, text):
        return torch.sigmoid(self.product(images, text) * self.factor + text.mean((1, 2), keepdim=True))


class Unscaled(Attention):
    def forward(self, images, text):
        return torch.sigmoid(self.product(images, text) + self.bias)


class ReadTwice(Attention):
    def forward(self, images, text):
        score = self.product(images, text) * self.factor
        return torch.sigmoid(score + self.bias), score


PER_HEAD, FOR_ALL = QuantSpec(8, channel_axis=1), QuantSpec(8)


@pytest.mark.parametrize(
    ("model", "target", "activation", "expected"),
    [
        (Attention(), "ort", PER_HEAD, True),
        (OfTwo(), "ort", PER_HEAD, True),
        (Attention(), "conv-inputs", FOR_ALL, False),  # a step for the whole guide
        (Attention(), "conv-inputs", PER_HEAD, False),  # a map with several
        (Attention(-0.5), "ort", PER_HEAD, False),
        (FromInput(), "ort", PER_HEAD, False),
        (Unscaled(), "ort", PER_HEAD, False),
        (ReadTwice(), "ort", PER_HEAD, False),
    ],
)
def test_an_attention_with_a_step_a_head_a_positive_scale_and_a_bias_of_its_own(model, target, activation, expected):
    weight = QuantSpec(8, True, 0)
    recipe = QuantRecipe((QuantRule("*", weight, QuantSpec(8)), QuantRule("max_similarity", activation=activation)))
    example = torch.rand(2, 3, 4, 4), torch.randn(2, 5, 6)
    made = prepare(model.eval(), [example], recipe, target)
    assert any(isinstance(each, HeadBias) for each in made.graph.modules()) == expected
    calibrate(made, [example], "minmax")
    lowered = lower(made)
    with torch.no_grad():
        wanted, got = made.graph.eval()(*example), lowered.graph(*example)
    for one, other in zip(wanted, got, strict=True) if isinstance(got, tuple) else [(wanted, got)]:
        assert torch.equal(one, other)
