"""Whole models lowered: no code differs from the prepared model's in evaluation, both forms of text agree, and what is refused."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import randomise
from every_kind import RECIPE, EveryKind, inputs
from torch.fx import Interpreter

from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.errors import UserError
from crqat_fx.lower import lower, lower_float
from crqat_fx.models.yolo_world import build
from crqat_fx.quantize.calibrate import calibrate
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Phase
from crqat_fx.vocabulary import Vocabulary
from passes.fx.codes import Dequantize
from passes.fx.graph import module_of, node_paths
from passes.fx.placement import kinds, quantizes
from passes.fx.to_integer_codes import CODES, QUANTIZER

HANDS_ON = {"split", "getitem", "flatten", "unflatten", "transpose", "permute", "view_as", "unsqueeze"}
HANDS_ON |= {"MaxPool2d", "AdaptiveMaxPool2d", "Upsample", "Concat", "ReLU"}


@functools.cache
def drawn(batch=2, height=64, width=96):
    """Drawn pictures."""
    pictures = ShapesSet(ShapesTask(), "val", batch)
    both = np.stack([pictures.picture(index)[:height, :width] for index in range(batch)])
    return torch.from_numpy(both).permute(0, 3, 1, 2).float() / 255


def vocabulary(width, texts=7):
    rows = torch.randn(texts, width, generator=torch.Generator().manual_seed(3))
    return Vocabulary(tuple(f"name {index}" for index in range(texts)), F.normalize(rows, dim=1).numpy())


def text_of(known, batch):
    return torch.from_numpy(known.embeddings).expand(batch, -1, -1)


@functools.cache
def prepared(size, version, recipe, target):
    torch.manual_seed(0)
    model = build(size, version).eval()
    randomise(model)
    made = prepare(model, None, recipe, target)
    pictures = drawn(2, 64, 64)
    calibrate(made, [(pictures, text_of(vocabulary(model.config.text_width), 2))], "minmax", count=2)
    made.graph.eval()
    return made


class Values(Interpreter):
    """Runs a graph and keeps what every node gave, by name."""

    def __init__(self, graph):
        super().__init__(graph)
        self.values = {}

    def run_node(self, node):
        value = super().run_node(node)
        self.values[node.name] = value
        return value


def run(graph, *examples):
    values = Values(graph)
    with torch.no_grad():
        return values.run(*examples), values.values


def differing(graph, lowered, examples):
    """How many codes were compared with those of a prepared graph, how many differ, and the outputs of both."""
    wanted, values = run(graph, *examples)
    got, codes = run(lowered, *examples)
    quantizers = {node.name: graph.get_submodule(str(node.target)) for node in graph.graph.nodes if quantizes(graph, node)}
    compared, wrong = 0, 0
    for node in lowered.graph.nodes:
        if QUANTIZER not in node.meta:
            continue
        quantizer, value, given = quantizers[node.meta[QUANTIZER]], values[node.meta[QUANTIZER]], codes[node.name]
        around = [-1 if axis == quantizer.spec.channel_axis else 1 for axis in range(value.ndim)]
        scale, zero = quantizer.scale.detach(), quantizer.zero_points
        scale, zero = (scale, zero) if scale.ndim == 0 else (scale.view(around), zero.view(around))
        assert given.dtype == (torch.int8 if quantizer.spec.symmetric else torch.uint8)
        compared, wrong = compared + given.numel(), wrong + int((torch.round(value / scale) + zero != given).sum())
    return compared, wrong, wanted, got


PICO_1, PICO_2 = ("pico", 1, "8-8-8-int", "ort"), ("pico", 2, "4-8-8-int", "ort")
EDGES_2, CHANNELS_2 = ("pico", 2, "4-4-8", "ort"), ("pico", 2, "3-3-8-ch", "conv-inputs")
MODELS = [
    *(("pico", version, recipe, "ort") for version in (1, 2) for recipe in ("4-4-8-int", "4-8-8-int", "8-8-8-int", "4-4-8")),
    *(("pico", version, recipe, "conv-inputs") for version in (1, 2) for recipe in ("4-4-8", "4-8-8-int")),
    CHANNELS_2,
    *(("pico", 2, "2-2-8-odd-int", target) for target in ("ort", "conv-inputs")),
    ("s", 2, "4-8-8-int", "ort"),
]


@functools.cache
def runtime(*case):
    """Lowered with the text as an input: to be read only."""
    return lower(prepared(*case))


@functools.cache
def constant(*case):
    made = prepared(*case)
    return lower(made, vocabulary(made.config.text_width))


def texts(case, batch):
    return text_of(vocabulary(prepared(*case).config.text_width), batch)


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_no_code_differs_from_the_prepared_models(case):
    made, lowered = prepared(*case), runtime(*case)
    pictures = drawn() if case[0] == "pico" else drawn(1, 32, 64)
    compared, wrong, wanted, got = differing(prepared(*case).graph, lowered.graph, (pictures, texts(case, len(pictures))))
    assert (wrong, lowered.collapsed) == (0, {})
    assert compared > 10_000
    standing = {node.meta[QUANTIZER] for node in lowered.graph.graph.nodes if QUANTIZER in node.meta}
    quantizers = [node for node in made.graph.graph.nodes if isinstance(module_of(made.graph, node), FakeQuantize)]
    missing = [node for node in quantizers if node.name not in standing]
    assert all(kinds(made.graph, node.all_input_nodes[0])[0] == "Concat" for node in missing)  # of one scale: a copy
    assert len(got) == 2
    for expected, given in zip((*wanted[0], *wanted[1]), (*got[0], *got[1]), strict=True):
        assert torch.equal(expected, given)


@pytest.mark.parametrize("case", [PICO_1, PICO_2, CHANNELS_2], ids=str)
def test_constant_text_and_runtime_text_give_the_same_codes(case):
    known, asked = constant(*case), runtime(*case)
    assert (known.inputs, asked.inputs) == (("images",), ("images", "text"))
    _, one = run(known.graph, drawn())
    _, other = run(asked.graph, drawn(), texts(case, 2))
    names = {name: node.name for node, name in asked.names.items()}
    compared = 0
    for node, name in known.names.items():
        if QUANTIZER not in node.meta or (case[1] == 2 and name.endswith("match.output.codes")):  # that is collapsed
            continue
        assert torch.equal(one[node.name].expand_as(other[names[name]]), other[names[name]]), name
        compared += 1
    assert compared > 50


@pytest.mark.parametrize("case", [PICO_2, EDGES_2], ids=str)
def test_the_collapsed_match_is_close_to_what_it_stands_for(case):
    """The map and the text are not rounded any more where they were, and the product is."""
    lowered, quantized = constant(*case), case is PICO_2
    wanted, _ = run(prepared(*case).graph, drawn(), texts(case, 2))
    got, _ = run(lowered.graph, drawn())
    for expected, given in zip(wanted[0], got[0], strict=True):
        assert float((expected - given).abs().mean()) < (0.05 if quantized else 1e-5) * float(expected.std())
    for expected, given in zip(wanted[1], got[1], strict=True):
        assert torch.equal(expected, given)
    gone = {"quant.bbox_head.head_module.cls_contrasts.1.match.input.0", "quant.bbox_head.head_module.cls_preds.1.2.output"}
    gone |= {"bbox_head.head_module.cls_preds.1.2.weight_fake_quant"}
    assert (gone <= set(lowered.collapsed)) == quantized
    assert "quant.bbox_head.head_module.cls_contrasts.1.match.output" not in lowered.collapsed


def own(target="ort"):
    """A module of one's own, prepared and calibrated."""
    made = prepare(EveryKind(), [inputs(0)], RECIPE, target)
    calibrate(made, [inputs(seed) for seed in range(3)], "minmax", count=6)
    made.graph.eval()
    return made


@pytest.mark.parametrize("target", ["ort", "conv-inputs"])
def test_a_module_of_ones_own_is_lowered_without_a_code_that_differs(target):
    made = own(target)
    lowered = lower(made)
    compared, wrong, wanted, got = differing(made.graph, lowered.graph, inputs(5))
    assert (wrong, lowered.collapsed, lowered.inputs) == (0, {}, ("images", "text"))
    assert compared > 1000
    assert all(torch.equal(expected, given) for expected, given in zip(wanted, got, strict=True))


def test_a_lowered_graph_flows_in_integers():
    graph = constant(*PICO_1).graph
    _, values = run(graph, drawn())
    for node in graph.graph.nodes:
        value = values[node.name]
        if CODES in node.meta and isinstance(value, torch.Tensor):
            assert value.dtype in (torch.uint8, torch.int8), node.name
        if getattr(node.target, "__name__", "") == "conv2d":
            assert all(isinstance(module_of(graph, each), Dequantize) for each in node.all_input_nodes), node.name
    assert not any(quantizes(graph, node) for node in graph.graph.nodes)
    assert not any(hasattr(module, "weight_fake_quant") for module in graph.modules())


def test_names_are_unique_and_say_where_a_value_stands():
    lowered = runtime(*PICO_1)
    assert len(set(lowered.names.values())) == len(lowered.graph.graph.nodes)
    paths = {node.name: path for node, path in node_paths(prepared(*PICO_1).graph).items()}
    for node, name in lowered.names.items():
        if QUANTIZER in node.meta:
            assert name == f"{paths[node.meta[QUANTIZER]]}.codes"
    assert {
        "images",
        "quant.images.output",
        "backbone.image_model.stem.conv",
        "backbone.image_model.stem.conv.weight_codes",
        "backbone.image_model.stem.conv.weight",
        "backbone.image_model.stem.conv.bias_codes",
        "quant.backbone.image_model.stem.conv.output.codes",
        "quant.backbone.image_model.stem.conv.output",
        "quant.backbone.image_model.stem.conv.output#2",
        "backbone.image_model.stage4.2.pool@2.codes",
        "quant.neck.top_down_layers.0.attn_block.add.input.1.codes",
    } <= set(lowered.names.values())


def test_what_the_text_decides_alone_is_stored_as_codes():
    names = {node.op: set() for node in constant(*PICO_1).graph.graph.nodes}
    for node, name in constant(*PICO_1).names.items():
        names[node.op].add(name)
    assert {
        "quant.neck.top_down_layers.0.attn_block.max_similarity.input.0.codes",
        "quant.bbox_head.head_module.cls_contrasts.0.match.input.0.codes",
        "quant.neck.text_enhancer.query.1.output.codes",
    } <= names["get_attr"]
    assert "quant.neck.bottom_up_layers.0.attn_block.max_similarity.input.0.codes" in names["call_module"]  # of the refreshed text


def test_the_model_that_is_lowered_stays_as_it_was():
    made = prepared(*PICO_2)
    text, state = made.text(), copy.deepcopy(made.graph.state_dict())
    lower(made, vocabulary(made.config.text_width))
    assert made.text() == text
    assert all(torch.equal(value, state[name]) for name, value in made.graph.state_dict().items())


@pytest.mark.parametrize("damage", ["scale", "zero", "weight", "bias", "concat"])
def test_one_wrong_number_shows(damage):
    graph = copy.deepcopy(runtime(*PICO_2).graph)
    layer = graph.get_submodule("backbone.image_model.stage2.0.conv")
    quantize = graph.get_submodule("quant.backbone.image_model.stage2.0.conv.output")
    if damage == "scale":
        quantize.scale *= 1.01
    elif damage == "zero":
        quantize.zero_point += 1
    elif damage == "weight":
        layer.weight_codes[0, 0, 1, 1] += 1
    elif damage == "bias":
        layer.bias_codes[0] += int(quantize.scale / graph.get_submodule("backbone.image_model.stage2.0.conv.bias").scale[0])  # one step
    else:
        concat = next(node for node in graph.graph.nodes if node.target == "backbone.image_model.stage1.1.concat")
        concat.args = (concat.args[1], concat.args[0], *concat.args[2:])
    _, wrong, _, _ = differing(prepared(*PICO_2).graph, graph, (drawn(1, 32, 64), texts(PICO_2, 1)))
    assert wrong > 0


# --- floats ---


@pytest.mark.parametrize(
    ("version", "form", "fixed"), [(1, "straight", True), (1, "tuned", False), (2, "straight", False), (2, "tuned", True)]
)
def test_a_float_form_computes_what_the_model_does(version, form, fixed):
    torch.manual_seed(0)
    model = build("pico", version).eval()
    randomise(model)
    known = vocabulary(model.config.text_width)
    lowered = lower_float(model, known if fixed else None, form, size=64)
    assert lowered.inputs == (("images",) if fixed else ("images", "text"))
    collapsed = [node for node, name in lowered.names.items() if name.endswith(".match") and node.target is F.conv2d]
    assert len(collapsed) == (3 if (version, form, fixed) == (2, "tuned", True) else 0)
    with torch.no_grad():
        wanted = model(drawn(), text_of(known, 2))
        got = lowered.graph(drawn()) if fixed else lowered.graph(drawn(), text_of(known, 2))
    for expected, given in zip((*wanted[0], *wanted[1]), (*got[0], *got[1]), strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_float_module_of_ones_own_is_lowered():
    lowered = lower_float(EveryKind(), examples=[inputs(0)])
    with torch.no_grad():
        for expected, given in zip(EveryKind().eval()(*inputs(1)), lowered.graph(*inputs(1)), strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_form_is_refused():
    with pytest.raises(UserError, match="'fast' is no form of a float graph; give one of straight, tuned"):
        lower_float(build("pico", 2), None, "fast")


# --- what is refused ---


@pytest.fixture(scope="module")
def healthy():
    return own()


def damaged(healthy, name, change):
    made = copy.copy(healthy)
    made.graph = copy.deepcopy(healthy.graph)
    with torch.no_grad():
        change(made.quantizers()[name])
    return made


@pytest.mark.parametrize("name", ["quant.sigmoid.output", "quant.gate.output", "body.stem.weight_fake_quant"])
@pytest.mark.parametrize(
    ("value", "why"),
    [(float("nan"), "has a scale that is not finite"), (float("inf"), "has a scale that is not finite"), (0.0, "has a scale of zero")],
)
def test_a_scale_that_is_none_is_refused_by_its_quantizer(healthy, name, value, why):
    def change(quantizer):
        if quantizer.log_scale is None:
            quantizer.fixed_scale.fill_(value)
        else:
            quantizer.log_scale.view(-1)[0] = float(np.log(value)) if value else -float("inf")

    with pytest.raises(UserError, match=why) as told:
        lower(damaged(healthy, name, change))
    assert told.value.where == name
    assert "\n" not in str(told.value)


def test_a_zero_point_that_is_none_is_refused(healthy):
    with pytest.raises(UserError, match="zero point that is not finite"):
        lower(damaged(healthy, "quant.gate.output", lambda quantizer: quantizer.zero_point.fill_(float("nan"))))


def test_an_uncalibrated_quantizer_is_refused_by_name():
    made = prepare(EveryKind(), [inputs(0)], RECIPE)
    with pytest.raises(UserError, match="the quantizer is not calibrated: it has no scale; calibrate the model") as told:
        lower(made)
    assert told.value.where in made.quantizers()


def test_a_model_in_the_middle_of_its_curriculum_is_refused(healthy):
    made = damaged(healthy, "quant.gate.output", lambda quantizer: None)
    made.set_phase(Phase(quantized=(), trained=("whole",)))
    with pytest.raises(UserError, match="is switched off"):
        lower(made)


def test_a_vocabulary_of_another_width_is_refused():
    made = prepared(*PICO_2)
    with pytest.raises(UserError, match=r"the vocabulary is 12 wide, and the model reads texts of \d+; embed"):
        lower(made, vocabulary(12))
    with pytest.raises(UserError, match="a model of your own has no input that is known to be text"):
        lower(dataclasses.replace(made, config=None), vocabulary(12))
