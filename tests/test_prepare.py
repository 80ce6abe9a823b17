"""Prepared graphs: the goldens, the table behind them entry by entry, the check against the recipe, and what each target promises."""

import copy
import dataclasses
import functools
import logging
import warnings

import pytest
import torch
from checks import check_golden
from every_kind import RECIPE, EveryKind, inputs
from torch import nn

from crqat_fx import recipe as recipes
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import build
from crqat_fx.quantize.calibrate import calibrate
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.hold import hold_to_recipe
from crqat_fx.quantize.prepare import prepare
from crqat_fx.recipe import TARGETS, QuantRecipe, QuantRule, Target, preset, target_named
from crqat_fx.trace import yolo_world_examples
from passes.fx.graph import STAGE, module_of, node_paths
from passes.fx.placement import PATH, quantizes, spec_of
from passes.spec import QuantSpec


@functools.cache
def on_meta(size, version, recipe, target, cpu="any", stages=2):
    """Placement needs no numbers."""
    with torch.device("meta"):
        model = build(size, version)
    return prepare(model, [], recipe, target, cpu=cpu, stages=stages)


def rules_of(prepared):
    traced = {node.meta[PATH] for node in prepared.graph.graph.nodes if PATH in node.meta}
    return {path: prepared.recipe.rule_for(path) for path in traced}


# --- whole models ---


@pytest.mark.parametrize(
    ("version", "target", "recipe"),
    [(1, "conv-inputs", "4-4-8"), (2, "conv-inputs", "4-4-8"), (1, "ort", "4-8-8-int"), (2, "ort", "4-4-8-int")],
)
def test_the_prepared_graph_of_s_is_the_golden_one(version, target, recipe):
    check_golden(f"prepared-s-v{version}-{target}-{recipe}", on_meta("s", version, recipe, target).text())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("target", ["conv-inputs", "ort"])
def test_with_quantizers_off_it_computes_what_the_model_computes(version, target):
    torch.manual_seed(0)
    model = build("pico", version).eval()
    prepared = prepare(model, None, "4-8-8-int", target)
    for quantizer in prepared.quantizers().values():
        quantizer.enabled = False
    with torch.no_grad():
        for example in yolo_world_examples(model):
            for expected, got in zip(model(*example), prepared.graph(*example), strict=True):
                for one, other in zip(expected, got, strict=True):
                    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was():
    model = build("pico", 2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: id(value) for name, value in model.named_parameters()}
    prepared = prepare(model)
    with torch.no_grad():
        for value in prepared.graph.parameters():
            value.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert parameters == {name: id(value) for name, value in model.named_parameters()}
    assert model.training
    assert prepared.graph.training


def test_a_model_that_is_taken_over_gives_its_own_parameters_and_the_same_graph():
    torch.manual_seed(0)
    model = build("pico", 2)
    copied, taken = prepare(model), prepare(model, take_over=True)
    assert taken.text() == copied.text()
    own = {id(value) for value in model.parameters()}
    assert sum(id(value) in own for value in taken.graph.parameters()) == len(own)
    assert not any(id(value) in own for value in copied.graph.parameters())
    state = copied.graph.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in taken.graph.state_dict().items())


def test_the_default_is_what_runs_as_integers_everywhere():
    prepared = prepare(build("pico", 2))
    assert prepared.recipe == preset("4-8-8-int")
    assert prepared.target == target_named("ort")
    assert not prepared.floats()


def test_what_stays_float_is_told_with_the_reason():
    floats = dict(on_meta("s", 1, "4-4-8", "ort").floats())
    assert floats["backbone.image_model.stem.conv"] == "ConvBn2d: the recipe leaves it float"
    assert floats["neck.text_enhancer.query.0"] == "LayerNorm: the target ort has no quantizers for it"
    assert "backbone.image_model.stage1.0.conv" not in floats


def test_torch_ao_warns_nobody():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target in TARGETS:
            prepare(EveryKind(), [inputs()], RECIPE, target)
        with torch.device("meta"):
            model = EveryKind()
        prepare(model, [], RECIPE)


@pytest.mark.parametrize("target", ["conv-inputs", "ort"])
def test_names_say_what_is_quantized_and_do_not_depend_on_the_order_of_visits(target):
    prepared = on_meta("s", 1, "4-4-8", target)
    paths = node_paths(prepared.graph)
    for node in prepared.graph.graph.nodes:
        if not quantizes(prepared.graph, node):
            continue
        name = str(node.target)
        assert name.startswith("quant.")
        about, _, side = name.removeprefix("quant.").rpartition(".output" if name.endswith(".output") else ".input")
        near = [paths[node.all_input_nodes[0]]] if side == "" and name.endswith(".output") else [paths[user] for user in node.users]
        assert about in near, name


def test_an_unknown_processor_is_refused():
    with pytest.raises(UserError, match="choose one of any, vnni"):
        target_named("ort", "sse")


def test_a_recipe_by_the_name_of_nothing_in_the_model_is_refused():
    recipe = QuantRecipe((QuantRule("*", activation=QuantSpec(4)), QuantRule("*.steem.*")))
    with pytest.raises(UserError, match=r"'\*\.steem\.\*' matches nothing"):
        prepare(build("pico", 2), None, recipe)


# --- the two targets' promises ---


@pytest.mark.parametrize("version", [1, 2])
def test_conv_inputs_has_no_tensor_quantized_twice_in_a_row_and_nothing_behind_a_producer(version):
    prepared = on_meta("s", version, "4-8-8-int", "conv-inputs")
    graph = prepared.graph
    for node in graph.graph.nodes:
        if quantizes(graph, node):
            assert not quantizes(graph, node.all_input_nodes[0])
            assert len({spec_of(graph, user) for user in node.all_input_nodes[0].users if quantizes(graph, user)}) == sum(
                quantizes(graph, user) for user in node.all_input_nodes[0].users
            )


def test_ort_quantizes_both_sides_of_every_silu_and_its_sigmoid_at_a_known_scale():
    prepared = on_meta("s", 1, "4-4-8-int", "ort")
    graph, products = prepared.graph, 0
    for node in graph.graph.nodes:
        if getattr(node.target, "__name__", "") != "SiLU":
            continue
        products += 1
        before, gate = node.args
        assert spec_of(graph, before) == QuantSpec(8)
        assert module_of(graph, gate).fixed == (1 / 255, 0)
        assert gate.all_input_nodes[0].all_input_nodes == [before]
        (behind,) = node.users
        assert spec_of(graph, behind).bits in (4, 8)
    assert products == 57  # of every convolution with an activation


def test_ort_gives_guides_a_symmetric_scale_a_head_and_a_text_one_scale():
    prepared = on_meta("s", 1, "4-8-8-int", "ort")
    quantizers = prepared.quantizers()
    assert quantizers["quant.neck.top_down_layers.0.attn_block.max_similarity.input.0"].spec == QuantSpec(7, True, 1)
    assert quantizers["quant.bbox_head.head_module.cls_contrasts.2.match.input.0"].spec == QuantSpec(7, True)
    assert not any(name.endswith("max_similarity.input.1") for name in quantizers)  # the map's own quantizer serves


def test_ort_quantizes_a_tensor_at_the_widest_that_is_read_and_again_for_a_reader_of_less():
    prepared = on_meta("s", 2, "4-4-8-int", "ort")
    graph = prepared.graph
    paths = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    convolution = paths["neck.top_down_layers.0.attn_block.project_conv.conv"]
    narrow = convolution.args[0]
    wide = narrow.all_input_nodes[0]
    assert (spec_of(graph, narrow), spec_of(graph, wide)) == (QuantSpec(4), QuantSpec(8))
    assert paths["neck.top_down_layers.0.concat"].args[2] is narrow


def test_ort_refuses_activations_with_a_scale_a_channel_and_says_why():
    with pytest.raises(UserError, match=r"onnxruntime's integer kernels sum over it; use a recipe without -ch, or --target conv-inputs"):
        on_meta("pico", 2, "3-3-8-ch", "ort")
    assert on_meta("pico", 2, "3-3-8-ch", "conv-inputs").quantizers()


def test_ort_refuses_symmetric_activations():
    with pytest.raises(UserError, match="unsigned codes"):
        prepare(build("pico", 2), None, QuantRecipe((QuantRule("*", activation=QuantSpec(8, symmetric=True)),)), "ort")


@pytest.mark.parametrize("cpu", ["any", "vnni"])
def test_no_sum_of_two_products_leaves_sixteen_bits_except_where_the_processor_does_not_mind(cpu):
    prepared = on_meta("pico", 1, "8-8-8-int", "ort", cpu)
    signed = [each.spec for each in prepared.quantizers().values() if each.spec.symmetric]
    highest = max(each.spec.highest for each in prepared.quantizers().values() if not each.spec.symmetric)
    weights = sum(
        module_of(prepared.graph, node) is not None and hasattr(module_of(prepared.graph, node), "weight_fake_quant")
        for node in prepared.graph.graph.nodes
    )
    assert len(signed) == weights + 4 + 3  # guides and texts take a weight's place
    fits = [2 * highest * spec.lowest >= -(2**15) and 2 * highest * spec.highest < 2**15 for spec in signed]
    assert all(fits) if cpu == "any" else not any(fits)


def test_the_stage_of_a_quantizer_is_its_producers_or_its_earliest_readers():
    for target in ("ort", "conv-inputs"):
        prepared = on_meta("s", 1, "4-4-8-int", target, stages=3)
        order = [stage.name for stage in prepared.stages]
        assert order == ["backbone", "neck", "head"]
        for node in prepared.graph.graph.nodes:
            if not quantizes(prepared.graph, node):
                continue
            source = node.all_input_nodes[0]
            stage = source.meta[STAGE] if target == "ort" else min((user.meta[STAGE] for user in node.users), key=order.index)
            assert node.meta[STAGE] == stage, node.target


@pytest.mark.parametrize("target", ["conv-inputs", "ort"])
def test_the_border_is_the_backbones_three_outputs_before_their_quantizers(target):
    prepared = on_meta("s", 2, "4-4-8", target)
    paths = node_paths(prepared.graph)
    found = [paths[node] for node in prepared.border()]
    last = ".SiLU" if target == "ort" else ""
    layers = ("stage2.1.final_conv", "stage3.1.final_conv", "stage4.2.conv2")
    assert found == [f"backbone.image_model.{layer}.activate{last}" for layer in layers]


# --- the table, entry by entry ---


def _without(target: Target):
    """Every table that lacks one entry of this one."""
    for field in dataclasses.fields(target):
        value = getattr(target, field.name)
        if isinstance(value, dict):
            for key in value:
                yield f"{field.name}[{key}]", dataclasses.replace(target, **{field.name: {k: v for k, v in value.items() if k != key}})
        elif isinstance(value, frozenset | tuple):
            for key in sorted(value):
                yield (
                    f"{field.name}[{key}]",
                    dataclasses.replace(target, **{field.name: type(value)(each for each in value if each != key)}),
                )


def _every_kind(target):
    with torch.device("meta"):
        model = EveryKind()
    return prepare(model, [], RECIPE, target)


@pytest.mark.parametrize(
    ("target", "entry"), [(name, entry) for name, target in TARGETS.items() for entry, _ in _without(target)], ids=lambda value: str(value)
)
def test_removing_any_entry_of_a_table_changes_the_prepared_graph(target, entry, monkeypatch):
    expected = _every_kind(target).text()
    monkeypatch.setitem(recipes.TARGETS, target, dict(_without(TARGETS[target]))[entry])
    try:
        got = _every_kind(target).text()
    except UserError as error:
        got = str(error)
    assert got != expected


def test_a_module_of_ones_own_is_prepared_calibrated_and_trained():
    for target in TARGETS:
        model = EveryKind()
        prepared = prepare(model, [inputs(0), inputs(1)], RECIPE, target)
        assert [stage.name for stage in prepared.stages] == ["whole"]
        assert calibrate(prepared, [inputs(seed) for seed in range(4)], "minmax", count=6) == 6
        assert prepared.calibrated
        prepared.graph.train()
        sum(output.square().mean() for output in prepared.graph(*inputs(2))).backward()
        learning = [each for each in prepared.quantizers().values() if each.learns]
        assert all(torch.isfinite(each.log_scale.grad).all() for each in learning)
        assert any(each.log_scale.grad.abs().sum() > 0 for each in learning)


def test_a_layer_that_is_called_twice_is_refused_by_its_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    with pytest.raises(UserError, match="conv: is called 2 times"):
        prepare(Twice(), [(torch.rand(1, 3, 4, 4),)], QuantRecipe((QuantRule("*", activation=QuantSpec(8)),)))


def test_an_upsampling_that_mixes_values_hands_no_codes_on():
    class Mixing(nn.Module):
        def __init__(self, mode):
            super().__init__()
            self.conv, self.up, self.last = nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(self.up(self.conv(x)))

    recipe = QuantRecipe((QuantRule("*", QuantSpec(4, True, 0), QuantSpec(8)),))
    counts = {mode: len(prepare(Mixing(mode), [(torch.rand(1, 3, 4, 4),)], recipe).quantizers()) for mode in ("nearest", "bilinear")}
    assert counts["bilinear"] == counts["nearest"] + 1


# --- the check against the recipe can fail ---


def _bypass(graph, node):
    node.replace_all_uses_with(node.all_input_nodes[0])
    graph.graph.erase_node(node)


def _double(graph, node):
    with graph.graph.inserting_after(node):
        again = graph.graph.call_module(str(node.target), (node,))
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def _respec(graph, node):
    module = module_of(graph, node)
    module.spec = dataclasses.replace(module.spec, bits=5)


def _reaxis(graph, node):
    module = module_of(graph, node)
    module.spec = dataclasses.replace(module.spec, channel_axis=3)


@pytest.mark.parametrize("target", ["conv-inputs", "ort"])
@pytest.mark.parametrize("fault", [_bypass, _double, _respec, _reaxis])
def test_the_check_finds_what_is_missed_doubled_or_of_other_bits_and_names_the_node(target, fault):
    whole = _every_kind(target)
    hold_to_recipe(whole.graph, rules_of(whole), whole.target)
    count = sum(isinstance(module_of(whole.graph, node), FakeQuantize) for node in whole.graph.graph.nodes)
    assert count > 15
    for number in range(count):
        broken = copy.deepcopy(whole.graph)
        node = [each for each in broken.graph.nodes if isinstance(module_of(broken, each), FakeQuantize)][number]
        fault(broken, node)
        with pytest.raises(UserError) as caught:
            hold_to_recipe(broken, rules_of(whole), whole.target)
        named = [path for path in (*node_paths(broken).values(), str(node.target)) if str(caught.value).startswith(f"{path}: ")]
        assert named, str(caught.value)


def test_the_check_finds_a_weight_that_is_not_quantized_or_of_other_bits():
    whole = on_meta("pico", 2, "4-8-8-int", "ort")
    path = "backbone.image_model.stage1.0.conv"
    for weight in (None, QuantSpec(5, True, 0)):
        broken = copy.deepcopy(whole.graph)
        module = broken.get_submodule(path)
        if weight is None:
            module.weight_fake_quant = None
        else:
            module.weight_fake_quant.spec = weight
        with pytest.raises(UserError, match=f"^{path}: its weight has"):
            hold_to_recipe(broken, rules_of(whole), whole.target)


def test_the_check_finds_a_quantizer_where_the_recipe_leaves_it_float():
    whole = on_meta("pico", 2, "4-4-8", "conv-inputs")
    stem = "backbone.image_model.stem.conv"
    broken = copy.deepcopy(whole.graph)
    node = next(each for each in broken.graph.nodes if each.target == stem)
    some = next(each for each in broken.graph.nodes if quantizes(broken, each))
    with broken.graph.inserting_before(node):
        node.update_arg(0, broken.graph.call_module(str(some.target), (node.args[0],)))
    with pytest.raises(UserError, match=f"^{stem}: operand 0 has 4 bits, and the recipe asks for no quantizer"):
        hold_to_recipe(broken, rules_of(whole), whole.target)


def test_every_quantizer_is_of_our_own_making():
    for target in TARGETS:
        graph = on_meta("pico", 2, "4-4-8-int", target).graph
        foreign = [name for name, each in graph.named_modules() if "torch.ao.quantization" in type(each).__module__]
        assert not foreign
        assert any(isinstance(each, FakeQuantize) for each in graph.modules())


def test_passes_and_torch_ao_say_what_they_did(caplog):
    with caplog.at_level(logging.INFO):
        prepared = prepare(build("pico", 2), None, "4-4-8", "conv-inputs")
    names = [step.name for step in prepared.steps]
    assert names == ["mark-stages", "torch.ao", "place-quantizers", "share-scales"]
    rewrites = {step.name: step.rewrites for step in prepared.steps}
    assert rewrites["torch.ao"] == 64 + 56  # of weights, and before inputs
    assert rewrites["place-quantizers"] == 68
