"""What `inspect` says of a prepared model, held against the quantizers themselves; and the views and pages that are drawn of it."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from prepared_models import RECIPES, calibrated_pico, pictures
from rich.console import Console

from crqat_fx.correct_norms import correctable
from crqat_fx.graph_page import draw_page, save_drawing
from crqat_fx.graph_picture import draw_view
from crqat_fx.graph_view import FLOAT_BITS, view
from crqat_fx.models.yolo_world import build
from crqat_fx.noise import measure_noise
from crqat_fx.prepared_inspection import inspect_prepared, owners_of_quantizers, shown, within
from crqat_fx.quantize.calibrate import picture_batches
from crqat_fx.quantize.integer_bias import HeadBias
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Phase
from passes.fx.graph import module_of
from passes.fx.placement import operands, quantizes, spec_of


@pytest.fixture(scope="module", params=RECIPES)
def prepared(request):
    return calibrated_pico(*request.param)


@pytest.fixture(scope="module")
def noise(prepared):
    return measure_noise(prepared, picture_batches(prepared, pictures(2), 1))


@pytest.fixture(scope="module")
def report(prepared, noise):
    return inspect_prepared(prepared, "p.pt", noise, "2 drawn pictures")


def text_of(report, depth):
    console = Console(width=300, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(shown(report, depth))
    return capture.get()


# --- the view ---


def test_a_view_has_every_node_that_computes_and_no_quantizer(prepared):
    seen = view(prepared.graph, prepared.target)
    computing = [node for node in prepared.graph.graph.nodes if not quantizes(prepared.graph, node)]
    assert len(seen.graph.graph.nodes) == len(computing)
    assert not any(quantizes(seen.graph, node) for node in seen.graph.graph.nodes)
    assert set(seen.blocks.values()) >= {"backbone.image_model.stem", "neck.top_down_layers.0", "bbox_head.head_module.cls_preds.2"}


def test_a_read_names_the_quantizer_that_stands_before_it_or_before_what_hands_its_codes_on(prepared):
    seen = view(prepared.graph, prepared.target)
    direct = handed_on = 0
    for reader in prepared.graph.graph.nodes:
        for _, source in operands(reader) if not quantizes(prepared.graph, reader) else ():
            (read, *_) = [each for each in seen.reads if (each.source, each.reader) == (seen.seen[source], seen.seen[reader])]
            if isinstance(module_of(prepared.graph, source), HeadBias):
                assert read.bits is None
            elif quantizes(prepared.graph, source):
                assert read.bits == spec_of(prepared.graph, source).bits
                direct += 1
            elif read.quantizer is not None:
                handed_on += 1
    assert direct > 40
    assert (handed_on > 40) == bool(prepared.target.carries)


def test_weights_without_a_quantizer_are_float_and_shapes_have_no_bits(prepared):
    seen = view(prepared.graph, prepared.target)
    stem = [node for node, block in seen.blocks.items() if block == "backbone.image_model.stem"]
    assert seen.bits_of_weights(stem) == ({FLOAT_BITS} if prepared.target.name == "conv-inputs" else {7})
    shapes = [read for read in seen.reads if read.reader.target is getattr]
    assert shapes
    assert all(read.bits is None for read in shapes)


def test_every_quantizer_is_in_one_block_that_of_its_layer_producer_or_reader(prepared):
    seen = view(prepared.graph, prepared.target)
    owners = owners_of_quantizers(prepared, seen)
    assert set(owners) == set(prepared.quantizers())
    assert owners["backbone.image_model.stage1.0.conv.weight_fake_quant"][1] == "backbone.image_model.stage1"
    if prepared.target.outputs:
        assert owners["quant.neck.top_down_concats.0.output"][1] == "neck.top_down_concats.0"
        assert owners["quant.images.output"][1] == "backbone.image_model.stem"
    else:
        between = "quant.neck.downsample_layers.1.conv.input"
        assert owners[between][1] == "neck.downsample_layers.1"


# --- the report ---


def test_the_range_of_every_quantizer_is_the_one_it_rounds_to(prepared, report):
    quantizers = prepared.quantizers()
    assert [each.name for each in report.quantizers] == list(quantizers)
    for each in report.quantizers:
        quantizer = quantizers[each.name]
        extreme = torch.tensor([-1e9, 1e9])  # far outside
        if quantizer.spec.channel_axis is None:
            lowest, highest = quantizer(extreme).tolist()
            assert each.range == pytest.approx((lowest, highest), rel=1e-5, abs=1e-7)
        scale, zero = quantizer.calculate_qparams()
        assert each.scale == pytest.approx((float(scale.min()), float(scale.max())))
        assert each.zero_point == (int(zero.min()), int(zero.max()))
        assert each.scales == scale.numel()
        assert (each.bits, each.symmetric) == (quantizer.spec.bits, quantizer.spec.symmetric)


def test_what_set_a_range_and_what_may_move_it_is_told_apart(prepared, report):
    by_name = {each.name: each for each in report.quantizers}
    weight = by_name["backbone.image_model.stage1.0.conv.weight_fake_quant"]
    assert (weight.of, weight.observer, weight.pictures, weight.learns) == ("weight", "minmax", 4, ("scale",))
    assert weight.moved == pytest.approx(1, abs=1e-4)
    learning = [each for each in report.quantizers if each.of == "activation" and each.learns]
    assert all(each.learns[0] == "scale" and (each.symmetric or each.learns == ("scale", "zero")) for each in learning)
    if prepared.target.name == "ort":
        known = by_name["quant.images.output"]
        assert (known.learns, known.observer, known.scale) == ((), None, pytest.approx((1 / 255, 1 / 255)))
        assert " known " in text_of(report, None)


def test_a_scale_that_training_moved_is_shown_beside_what_it_was_calibrated_to():
    prepared = calibrated_pico("4-4-8", "conv-inputs")
    name = "quant.backbone.image_model.stage2.0.conv.input"
    prepared.quantizers()[name].log_scale.data += 0.5
    layer = next(iter(correctable(prepared).values()))
    layer.correct(torch.full_like(layer.ratio, 2.0), layer.shift)
    prepared.set_phase(Phase(quantized=("backbone",), trained=("neck-head",)))
    report = inspect_prepared(prepared, "p.pt")
    (found,) = [each for each in report.quantizers if each.name == name]
    assert found.moved == pytest.approx(1.6487, rel=1e-3)
    assert (found.on, found.trained) == (True, False)
    (off,) = [each for each in report.quantizers if each.name == "bbox_head.head_module.cls_preds.0.0.conv.weight_fake_quant"]
    assert (off.on, off.trained) == (False, True)
    lines = text_of(report, None).splitlines()
    (line,) = [line for line in lines if line.startswith("0.conv.input ") and "then" in line]
    assert "minmax, then x 1.65" in line
    assert "(frozen)" in line
    assert any(line.split() == ["norms", "1", "corrected"] for line in lines)
    assert "No SQNR" in lines[-1]


def test_noise_stands_beside_each_quantizer_and_block(report, noise):
    for each in report.quantizers:
        assert each.local == noise.local[each.name]
        assert each.end_to_end is not None
    for block in report.blocks:
        own = [each for each in report.quantizers if each.block == block.block]
        assert block.quantizers == len(own)
        if own:
            assert block.local == min(each.local for each in own)
            assert block.worst in [each.name for each in own if each.local == block.local]
        assert block.end_to_end is not None
    assert sum(block.quantizers for block in report.blocks) == len(report.quantizers)


def test_the_report_is_json_and_its_stages_add_up(prepared, report):
    loaded = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert loaded["kind"] == "prepared"
    assert [stage["stage"] for stage in loaded["stages"]] == ["backbone", "neck-head"]
    assert sum(stage["nodes"] for stage in loaded["stages"]) == len(prepared.graph.graph.nodes)
    assert loaded["recipe"] == prepared.recipe.as_plain()
    assert loaded["parameters"] == sum(value.numel() for value in build("pico", 1).parameters())
    assert loaded["measured_on"] == "2 drawn pictures"


def test_depth_opens_stages_then_blocks_then_quantizers(report):
    stages, blocks, everything = (text_of(report, depth) for depth in (1, 2, None))
    assert "backbone.image_model.stage1" not in stages
    assert "backbone.image_model.stage1" in blocks
    name = within("backbone.image_model.stage1.1.blocks.0.conv1.conv.weight_fake_quant", "backbone.image_model.stage1")
    assert name == "1.blocks.0.conv1.conv.weight"
    assert f"\n{name} " in everything
    assert f"\n{name} " not in blocks
    assert "Local: what one quantizer adds" in stages


def test_a_model_without_ranges_is_shown_without_them():
    prepared = prepare(build("pico", 2).eval(), None, "4-8-8-int", "ort", size=64)
    report = inspect_prepared(prepared, "p.pt")
    assert all(each.scale is None and each.range is None for each in report.quantizers if each.learns)
    text = text_of(report, None)
    assert "not set: prepare it with --calibrate" in text
    assert draw_page(view(prepared.graph, prepared.target), "title", report).count("<section") > 25


def test_odd_codes_are_told():
    report = inspect_prepared(prepare(build("pico", 2).eval(), None, "2-2-8-odd", "conv-inputs", size=64), "p.pt")
    assert "*: weight 2 bits of odd codes, activation 2 bits" in text_of(report, 1)


# --- the picture and the page ---


def test_the_bits_of_every_line_between_blocks_stand_on_it(prepared):
    seen = view(prepared.graph, prepared.target)
    wanted = {}
    for read in seen.reads:
        if seen.blocks[read.source] != seen.blocks[read.reader]:
            bits = wanted.setdefault((seen.blocks[read.source], seen.blocks[read.reader]), set())
            bits.update(() if read.bits is None else (read.bits,))
    labels = re.findall(r'class="ink bits"[^>]*>([^<]+)<', draw_view(seen, "title"))
    assert sorted(labels) == sorted("/".join(map(str, sorted(bits))) for bits in wanted.values() if bits)
    assert any("32" in label for label in labels)


def test_a_box_shows_its_bits_and_the_worst_of_what_leaves_it(prepared, noise, report):
    drawn = draw_view(view(prepared.graph, prepared.target), "title", noise.tensors)
    (block,) = [each for each in report.blocks if each.block == "backbone.image_model.stage3"]
    weights, activations = "4", "4/8" if 8 in block.activation_bits and 4 in block.activation_bits else str(min(block.activation_bits))
    assert f"W{weights} A{activations} · {block.end_to_end:.1f} dB" in drawn


def test_pictures_follow_dark_and_light_and_take_the_focus(prepared):
    drawn = draw_view(view(prepared.graph, prepared.target), "title")
    assert "prefers-color-scheme: dark" in drawn
    assert drawn.count('tabindex="0"') == drawn.count('<g class="box"')


class Links(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.ids, self.links, self.loads, self.tags = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.loads += [value for key, value in attrs if key in ("src", "srcset", "data", "action")]
        self.loads += [given["href"]] if tag in ("link", "base", "use", "image") and "href" in given else []


def test_a_page_needs_nothing_from_elsewhere_and_every_link_leads_to_a_block(prepared, report):
    page = draw_page(view(prepared.graph, prepared.target), "a <b>", report)
    found = Links(page)
    assert not found.loads
    assert not {"script", "iframe", "link", "img"} & set(found.tags)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert len(set(found.ids)) == len(found.ids)
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    boxes = len(set(view(prepared.graph).blocks.values()))
    assert len([each for each in found.ids if re.fullmatch(r"b\d+", each)]) >= boxes
    assert "a &lt;b&gt;" in page
    assert "<b>" not in page


def test_a_page_shows_every_quantizer_once(prepared, report):
    page = draw_page(view(prepared.graph, prepared.target), "title", report)
    rows = re.findall(r"<tr><td>([^<]+)</td><td>\d+( signed)?</td>", page)
    assert len(rows) == len(report.quantizers)


def test_a_float_graph_has_a_page_too(tmp_path):
    from crqat_fx.pipelines import prepare_passes
    from crqat_fx.trace import trace_unproved

    with torch.device("meta"):
        graph = trace_unproved(build("pico", 2))
    prepare_passes(3)(graph)
    save_drawing(view(graph), tmp_path / "g.html", "title")
    save_drawing(view(graph), tmp_path / "g.svg", "title")
    page = (tmp_path / "g.html").read_text(encoding="utf-8")
    assert " dB" not in page
    assert 'class="ink bits"' not in page
    assert "bbox_head.head_module.cls_preds.2" in page
    assert (tmp_path / "g.svg").read_text(encoding="utf-8").startswith("<svg")
