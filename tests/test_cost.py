"""The cost of a graph: published figures to the last printed digit, and everything else against counts made another way."""

import functools
import itertools
import json
import math

import pytest
import torch
from published import PARAMETERS
from torch import nn

from crqat_fx.cost import Cost, Measurement, cost, format_report, measure, model_on_paper, on_meta, price
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import ConvModule, build
from crqat_fx.recipe import QuantRecipe, QuantRule, preset
from crqat_fx.trace import trace, trace_unproved
from passes.spec import QuantSpec

# size, vocabulary -> MiB in float, at 4-4-8; BOPs T in float, at 4-4-8: as printed
PUBLISHED = {
    ("m", 80): ("110.88", "15.11", "44.56", "2.05"),
    ("m", 1203): ("110.88", "15.11", "51.82", "7.10"),
    ("l", 80): ("181.4", "24.32", "90.60", "3.09"),
    ("l", 1203): ("181.4", "24.32", "98.39", "8.18"),
}
CELLS = (64 // 8) ** 2 + (64 // 16) ** 2 + (64 // 32) ** 2  # of three levels at 64 pixels


@functools.cache
def measured(name: str, vocabulary: int = 80, size: int = 64) -> Measurement:
    return measure(model_on_paper(f"yolo-world-{name}"), vocabulary, size)


def printed(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(("size", "vocabulary"), PUBLISHED)
def test_reproduces_the_published_figures_to_the_last_printed_digit(size, vocabulary):
    total = price(measured(f"v1-{size}", vocabulary, 640), preset("4-4-8"), "conv-inputs").total
    figures = (total.fp32_size_mib, total.size_mib, total.fp32_bops_t, total.bops_t)
    expected = PUBLISHED[size, vocabulary]
    assert tuple(printed(value, text) for value, text in zip(figures, expected, strict=True)) == expected


@pytest.mark.parametrize(("version", "size"), PARAMETERS)
def test_counts_every_parameter_once(version, size):
    assert price(measured(f"v{version}-{size}")).total.parameters == PARAMETERS[version, size]


@pytest.mark.parametrize("version", [1, 2])
def test_the_macs_are_those_of_the_layers_as_they_run(version):
    torch.manual_seed(0)
    model, texts = build("pico", version).eval(), 5
    counted = []

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            counted.append(output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size))
        elif isinstance(module, nn.Linear):
            counted.append(output.numel() * module.in_features)

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64), torch.rand(1, texts, 512))
    layers = sum(counted)
    p3, p4, p5 = model.config.channels[2:]
    matching = CELLS * 512 * texts
    guides = sum(cells * channels // 2 * texts for cells, channels in ((16, p4), (64, p3), (16, p4), (4, p5)))
    pooling = 2 * texts * 27 * model.config.pool_width if version == 1 else 0
    assert cost(model, vocabulary=texts, size=64).total.macs == layers + matching + guides + pooling


def test_without_a_recipe_everything_is_float():
    report = price(measured("v1-pico"))
    for each in (report.total, report.export_total, *report.blocks.values(), *report.export.values()):
        assert each.bops == each.macs * 32 * 32
        assert each.bits == each.fp32_bits == each.parameters * 32


def test_weights_and_graph_do_not_matter_and_the_model_is_left_as_it_was():
    model = build("pico", 2).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    graph = trace(model)
    on_paper = price(measured("v2-pico"), preset("4-4-8"))
    assert cost(model, preset("4-4-8"), size=64) == on_paper
    assert cost(graph, preset("4-4-8"), size=64) == on_paper
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(value.is_meta for value in itertools.chain(model.state_dict().values(), graph.state_dict().values()))


def test_on_meta_holds_no_numbers_and_keeps_what_is_shared():
    pair = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    pair.append(pair[0])
    copied = on_meta(pair)
    assert all(value.is_meta for value in copied.state_dict().values())
    assert copied[0] is copied[2]
    assert not any(value.is_meta for value in pair.state_dict().values())


@pytest.mark.parametrize("target", ["ort", "conv-inputs"])
def test_one_rule_costs_what_its_bits_and_scales_say(target):
    model = model_on_paper("yolo-world-v2-pico")
    path = "backbone.image_model.stage1.0.conv"
    inputs, outputs = model.config.channels[:2]
    weight, activation = QuantSpec(3, symmetric=True, channel_axis=0), QuantSpec(5, channel_axis=1)
    plain = price(measured("v2-pico")).total
    ruled = price(measured("v2-pico"), QuantRecipe((QuantRule(path, weight, activation),)), target).total
    elements, macs = inputs * outputs * 9, inputs * outputs * 9 * (64 // 4) ** 2
    scales_of_activation, held = (inputs, 3) if target == "conv-inputs" else (outputs, 4)
    assert plain.bits - ruled.bits == elements * (32 - held) - 32 * outputs - 2 * 32 * scales_of_activation
    assert plain.bops - ruled.bops == macs * (32 * 32 - 3 * 5)
    assert (ruled.macs, ruled.parameters, ruled.fp32_bits) == (plain.macs, plain.parameters, plain.fp32_bits)


def test_a_product_of_activations_takes_their_bits_twice_and_a_scale_a_head():
    path = "neck.bottom_up_layers.1.attn_block.max_similarity"
    recipe = QuantRecipe((QuantRule(path, activation=QuantSpec(8, channel_axis=1)),))
    here = measured("v1-s")
    plain, ruled = price(here).total, price(here, recipe, "conv-inputs").total
    assert plain.bops - ruled.bops == 2 * 2 * 256 * 80 * (32 * 32 - 8 * 8)
    assert ruled.bits - plain.bits == 2 * 8 * 2 * 32  # two operands of eight heads, a scale and a zero point each


@pytest.mark.parametrize(("bits", "held"), [(2, 4), (3, 4), (4, 4), (5, 8), (6, 8), (7, 8), (8, 8)])
def test_integer_kernels_take_at_most_7_bits_of_a_weight_and_files_hold_4_or_8(bits, held):
    path, spec = "backbone.image_model.stage1.0.conv", QuantSpec(bits, symmetric=True)
    here, elements, macs = measured("v2-pico"), 8 * 16 * 9, 8 * 16 * 9 * (64 // 4) ** 2
    plain = price(here).total
    recipe = QuantRecipe((QuantRule(path, spec, QuantSpec(8)),))
    published, ort = price(here, recipe, "conv-inputs").total, price(here, recipe, "ort").total
    assert plain.bops - published.bops == macs * (32 * 32 - bits * 8)
    assert plain.bops - ort.bops == macs * (32 * 32 - min(bits, 7) * 8)
    scalars = 3 * 32  # of the weight a scale, of the activation a scale and a zero point
    assert plain.bits - published.bits == elements * (32 - bits) - scalars
    assert plain.bits - ort.bits == elements * (32 - held) - scalars


@pytest.mark.parametrize(("target", "bits"), [("ort", 7 * 8), ("conv-inputs", 8 * 8)])
def test_an_operand_in_a_weights_place_is_held_to_its_bits(target, bits):
    path = "neck.bottom_up_layers.1.attn_block.max_similarity"
    here, recipe = measured("v1-s"), QuantRecipe((QuantRule(path, activation=QuantSpec(8)),))
    assert price(here).total.bops - price(here, recipe, target).total.bops == 2 * 2 * 256 * 80 * (32 * 32 - bits)


def test_an_export_of_v2_stores_what_folding_leaves():
    texts = 7
    model = build("pico", 2)
    export = price(measured("v2-pico", texts)).export_total
    collapsed = sum((tower[2].in_channels + 1) * texts for tower in model.bbox_head.head_module.cls_preds)
    layers = (*model.neck.top_down_layers, *model.neck.bottom_up_layers)
    guides = sum(layer.mid * texts + layer.attn_block.heads for layer in layers)
    last = {tower[2] for tower in model.bbox_head.head_module.cls_preds}
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module not in last]
    kept = sum(module.weight.numel() + module.out_channels for module in convolutions)
    assert export.parameters == collapsed + guides + kept


def test_an_export_of_v2_runs_one_1x1_convolution_of_the_vocabularys_width():
    texts = 7
    plain = price(measured("v2-pico", texts))
    width = 64  # of pico's classification towers
    for level, cells in enumerate((64, 16, 4)):
        tower, contrast = (f"bbox_head.head_module.{part}.{level}" for part in ("cls_preds", "cls_contrasts"))
        saved = plain.blocks[tower].macs + plain.blocks[contrast].macs - plain.export[tower].macs
        assert saved == cells * (width * 512 + 512 * texts - width * texts)
        assert contrast not in plain.export
    for layer, mid in (("top_down_layers.0", 32), ("top_down_layers.1", 16), ("bottom_up_layers.0", 32), ("bottom_up_layers.1", 64)):
        assert plain.blocks[f"neck.{layer}"].macs - plain.export[f"neck.{layer}"].macs == 512 * mid * texts


def test_an_export_of_v1_keeps_the_matching_and_the_guides_that_the_picture_changes():
    texts = 7
    report = price(measured("v1-pico", texts))
    for level, cells in enumerate((64, 16, 4)):
        contrast = f"bbox_head.head_module.cls_contrasts.{level}"
        assert report.export[contrast].macs == report.blocks[contrast].macs == cells * 512 * texts
        assert report.export[contrast].parameters == 512 * texts + 1
    for layer in (0, 1):
        assert report.export[f"neck.bottom_up_layers.{layer}"].macs == report.blocks[f"neck.bottom_up_layers.{layer}"].macs
    width = 64
    saved = report.blocks["neck.text_enhancer"].macs - report.export["neck.text_enhancer"].macs
    assert saved == 512 * width * texts


def test_constants_of_an_export_are_stored_at_the_bits_of_the_product_that_reads_them():
    texts, path = 7, "neck.top_down_layers.0.attn_block.max_similarity"
    here = measured("v2-pico", texts)
    plain = price(here).export_total
    ruled = price(here, QuantRecipe((QuantRule(path, activation=QuantSpec(8)),)), "conv-inputs").export_total
    assert plain.bits - ruled.bits == 32 * texts * (32 - 8) - 2 * 32 - 2 * 32  # 32 wide; one (scale, zero point) each of guide and embed


def test_macs_of_maps_grow_with_the_area():
    small, large = (price(measured("v2-pico", 80, size)).blocks["backbone.image_model.stage3"] for size in (64, 128))
    assert large.macs == 4 * small.macs
    assert large.parameters == small.parameters


def test_the_blocks_are_those_of_the_architecture_and_add_up():
    report = price(measured("v1-s"), preset("4-4-8"))
    assert [name for name in report.blocks if name.startswith("backbone")] == [
        f"backbone.image_model.{part}" for part in ("stem", "stage1", "stage2", "stage3", "stage4")
    ]
    assert {"neck.top_down_layers.0", "neck.text_enhancer", "bbox_head.head_module.cls_preds.2"} <= set(report.blocks)
    assert sum(each.macs for each in report.blocks.values()) == report.total.macs
    assert report.total == sum(report.blocks.values(), Cost())


def test_fewer_bits_cost_less():
    here = measured("v2-pico")
    names = ("2-2-8", "3-3-8", "4-4-8", "6-6-6", "8-8-8")
    totals = [price(here, preset(name)).total for name in names]
    assert [each.bits for each in totals] == sorted(each.bits for each in totals)
    assert price(here, preset("4-4-8-int")).total.bops < price(here, preset("4-4-8")).total.bops
    assert price(here, preset("4-4-8-ch")).total.bits > price(here, preset("4-4-8")).total.bits


def test_the_json_has_the_promised_keys_in_total_and_per_block():
    report = price(measured("v2-pico"), preset("4-4-8"))
    loaded = json.loads(json.dumps(report.as_json()))
    keys = {"parameters", "macs", "bops_t", "size_mib", "fp32_bops_t", "fp32_size_mib"}
    assert keys <= set(loaded)
    assert keys == set(loaded["export"])
    assert all(keys <= set(block) and keys == set(block["export"]) for block in loaded["blocks"].values())
    assert loaded["bops_t"] == report.total.bops / 1e12
    assert loaded["size_mib"] == report.total.bits / 8 / 2**20
    assert loaded["fp32_size_mib"] == report.total.parameters * 4 / 2**20


def test_the_table_has_a_row_a_block_and_both_totals():
    report = price(measured("v1-l", 80, 640), preset("4-4-8"), "conv-inputs")
    lines = format_report(report).splitlines()
    assert len(lines) == 2 + len(report.blocks) + 2
    assert lines[-2].split() == ["total", "47,553,954", "88.48", "3.09", "24.32", "88.45", "3.09", "24.74"]
    assert lines[-1].split() == ["total", "in", "float", "47,553,954", "88.48", "90.60", "181.40", "88.45", "90.58", "180.88"]


# --- graphs that are not what the presets give ---


class ReadsBehindTheNorm(ConvModule):
    """Folding the norm makes the convolution the one that is asked for its shape: under another path."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.activate(y).view(y.shape)


def test_a_graph_that_folding_renames_costs_the_same():
    model = model_on_paper("yolo-world-v1-pico")
    for block in (model.neck.downsample_layers[0], model.backbone.image_model.stem):
        block.__class__ = ReadsBehindTheNorm
    recipe = QuantRecipe((QuantRule("*", QuantSpec(4, channel_axis=0), QuantSpec(4)), QuantRule("*.stem.*", QuantSpec(8), QuantSpec(8))))
    here = measure(model, size=64)
    assert price(here, recipe) == price(measured("v1-pico"), recipe)
    assert {here.folded.paths[node] for node in here.folded.graph.graph.nodes} < {*here.plain.paths.values()}


def test_a_rule_that_names_a_norm_reaches_nothing_once_it_is_folded():
    recipe = QuantRecipe((QuantRule("*.cls_contrasts.0.norm", QuantSpec(8), QuantSpec(8)),))
    assert price(measured("v2-pico"), recipe).export == price(measured("v2-pico")).export


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_type_costs_what_it_costs_in_float32(dtype):
    assert cost(build("pico", 2).to(dtype), preset("4-4-8"), size=64) == price(measured("v2-pico"), preset("4-4-8"))


@pytest.mark.parametrize("version", [1, 2])
def test_a_graph_without_the_modules_that_are_counted_is_refused(version):
    plain = torch.fx.symbolic_trace(model_on_paper(f"yolo-world-v{version}-pico"))
    with pytest.raises(UserError, match=r"holds no Match.*trace the model with crqat_fx\.trace"):
        cost(plain, size=64)


def test_a_graph_with_quantizers_is_refused():
    class Round(nn.Module):
        is_quantizer = True

        def forward(self, x):
            return x

    graph = trace(build("pico", 2))
    graph.add_submodule("round", Round())
    first = graph.graph.find_nodes(op="call_module")[0]
    with graph.graph.inserting_after(first):
        graph.graph.call_module("round", (first,))
    graph.recompile()
    with pytest.raises(UserError, match="the graph: holds quantizers; give the float model"):
        cost(graph, size=64)


def test_dead_nodes_cost_nothing():
    graph = trace(build("pico", 2))
    for node in graph.graph.find_nodes(op="call_module")[:4]:
        with graph.graph.inserting_after(node):
            graph.graph.call_module(node.target, node.args)
    graph.recompile()
    nodes = len(graph.graph.nodes)
    assert cost(graph, preset("4-4-8"), size=64) == price(measured("v2-pico"), preset("4-4-8"))
    assert len(graph.graph.nodes) == nodes


def test_a_vocabulary_of_a_million_is_counted_at_once():
    few, many = (price(measured("v1-pico", texts)).total.macs for texts in (32, 1_000_000))
    a_text = price(measured("v1-pico", 33)).total.macs - few
    assert many == few + (1_000_000 - 32) * a_text


def last_of_tower(change):
    """v2's export, and the same with the last convolution of the first class tower changed."""
    model = model_on_paper("yolo-world-v2-pico")
    tower = model.bbox_head.head_module.cls_preds[0]
    change(tower)
    graph = trace_unproved(model)
    return graph, cost(graph, vocabulary=7, size=64)


def runs_its_matching(report) -> bool:
    return "bbox_head.head_module.cls_contrasts.0" in report.export


@pytest.mark.parametrize(
    ("last", "collapses"),
    [
        (nn.Conv2d(64, 512, 1), True),
        (nn.Conv2d(64, 512, 1, groups=2), False),
        (nn.Conv2d(64, 512, 3, padding=1), False),
        (nn.Conv2d(64, 512, (1, 3), padding=(0, 1)), False),
    ],
    ids=["1x1", "groups", "3x3", "1x3"],
)
def test_only_a_1x1_convolution_of_one_group_collapses(last, collapses):
    _, report = last_of_tower(lambda tower: tower.__setitem__(2, last.to("meta")))
    assert runs_its_matching(report) is not collapses


def test_a_convolution_that_something_else_reads_does_not_collapse():
    graph, plain = last_of_tower(lambda tower: None)
    assert not runs_its_matching(plain)
    (last,) = graph.graph.find_nodes(op="call_module", target="bbox_head.head_module.cls_preds.0.2")
    (other,) = graph.graph.find_nodes(op="call_module", target="bbox_head.head_module.reg_preds.0.2")
    readers = list(other.users)
    with graph.graph.inserting_after(max(last, other)):
        scaled = graph.graph.call_function(torch.add, (other, graph.graph.call_method("mean", (last,))))
    scaled.prepend(scaled.args[1])
    for reader in readers:
        reader.replace_input_with(other, scaled)
    graph.recompile()
    assert runs_its_matching(cost(graph, vocabulary=7, size=64))


@pytest.mark.parametrize("target", ["ort", "conv-inputs"])
def test_a_collapsed_convolution_has_a_scale_for_each_text(target):
    recipe = QuantRecipe((QuantRule("*.cls_preds.*.2", activation=QuantSpec(8, channel_axis=1)),))
    here = measured("v2-pico", 7)
    scales = 3 * (7 if target == "ort" else 64)  # of its output, or of its input
    assert price(here, recipe, target).export_total.bits - price(here).export_total.bits == scales * 2 * 32


def test_what_is_shared_is_stored_once():
    model = model_on_paper("yolo-world-v2-pico")
    towers = model.bbox_head.head_module.reg_preds
    plain = cost(model, size=64)
    towers[1][2].weight = towers[0][2].weight
    shared = cost(model, size=64)
    elements = towers[0][2].weight.numel()
    for one, other in ((plain.total, shared.total), (plain.export_total, shared.export_total)):
        assert one.parameters - other.parameters == elements
        assert one.bits - other.bits == 32 * elements
        assert one.macs == other.macs


def test_a_constant_that_is_no_parameter_is_not_counted_as_one():
    model = model_on_paper("yolo-world-v2-pico")
    plain = cost(model, size=64).total.parameters
    graph = trace_unproved(model)
    graph.register_buffer("shift", torch.zeros(64, device="meta"))
    output = graph.graph.output_node()
    (logits, bins, regions) = output.args[0]
    with graph.graph.inserting_before(output):
        shifted = graph.graph.call_function(
            torch.add, (bins[0], graph.graph.call_method("view", (graph.graph.get_attr("shift"), 64, 1, 1)))
        )
    output.args = ((logits, (shifted, *bins[1:]), regions),)
    graph.recompile()
    assert cost(graph, size=64).total.parameters == plain


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (
            QuantRule("*.stem.conv", QuantSpec(4, channel_axis=4)),
            r"channel_axis is 4, .* at backbone\.image_model\.stem\.conv has the shape \[8, 3, 3, 3\]; give an axis from 0 to 3",
        ),
        (
            QuantRule("*.stem.conv", activation=QuantSpec(4, channel_axis=9)),
            r"channel_axis is 9, .* at backbone\.image_model\.stem\.conv has the shape \[1, (3|8), ",
        ),
        (QuantRule("*.guide_fc", activation=QuantSpec(4, channel_axis=3)), r"channel_axis is 3, .*guide_fc has the shape"),
    ],
)
@pytest.mark.parametrize("target", ["ort", "conv-inputs"])
def test_an_axis_that_a_tensor_does_not_have_is_a_mistake_with_path_axis_and_shape(rule, reason, target):
    with pytest.raises(UserError, match=f"^recipe: {reason}"):
        price(measured("v2-pico"), QuantRecipe((rule,)), target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": 0}, "a vocabulary of 0 texts"),
        ({"vocabulary": 99_999_999_999}, "a vocabulary of 99999999999 texts; give a number from 1 to 1,000,000"),
        ({"size": 100}, "size is 100"),
        ({"size": 0}, "size is 0"),
        ({"target": "gpu"}, "unknown target 'gpu'"),
        ({"recipe": QuantRecipe((QuantRule("*.no_such_layer"),))}, "matches nothing"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        cost(model_on_paper("yolo-world-v2-pico"), **{"size": 64} | arguments)


def test_a_graph_that_is_no_detector_is_refused():
    with pytest.raises(UserError, match="not pictures and text"):
        cost(torch.fx.symbolic_trace(nn.Linear(3, 3)), size=64)


def test_a_presets_name_is_a_model_without_weights():
    model = model_on_paper("yolo-world-v2-xl")
    assert model.config.version == 2
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model_on_paper("model.pt") is None
    assert model_on_paper("yolo-world-v3-s") is None
    with pytest.raises(UserError, match="choose one of pico, nano"):
        model_on_paper("yolo-world-v1-huge")
