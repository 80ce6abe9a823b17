"""An exported file keeps its contract: what goes in and comes out, what it says of itself, and that it computes in integers."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checks import OPTIMISED, PLAIN
from onnx import numpy_helper
from typer.testing import CliRunner

from crqat_fx.checkpoint import load_model
from crqat_fx.cli import app
from crqat_fx.correct_norms import correct_norms
from crqat_fx.coverage import coverage
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.detect import DetectSettings
from crqat_fx.detections import Selection
from crqat_fx.emission import TYPES
from crqat_fx.errors import UserError
from crqat_fx.export import OUTPUTS, Exported, export
from crqat_fx.lower import lower
from crqat_fx.metadata import Metadata
from crqat_fx.model_files import open_model
from crqat_fx.models.yolo_world import YoloWorld, decode_boxes, flatten_levels
from crqat_fx.onnx_cuts import cut
from crqat_fx.quantize.calibrate import calibrate
from crqat_fx.quantize.prepare import load_prepared, prepare
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.recording import record_lowered
from crqat_fx.torch_detector import TorchDetector
from crqat_fx.vocabulary import Vocabulary

SIZE = 96
TASK = ShapesTask(size=SIZE)
NAMES = 10
TEXTS = TASK.vocabulary.select(TASK.vocabulary.names[:NAMES])
EMBEDDINGS = torch.from_numpy(TEXTS.embeddings)[None]


def picture(index: int, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    """[1,3,H,W] in [0, 1], of whole bytes."""
    drawn = torch.from_numpy(TASK.draw("val", index).image).permute(2, 0, 1)[None].float()
    return torch.nn.functional.interpolate(drawn, (height, width)).round() / 255


def model(version: int) -> YoloWorld:
    return load_model(f"pico-v{version}")[0]


def prepared(version: int, recipe: str) -> Prepared:
    made = prepare(model(version), recipe=recipe, vocabulary=TEXTS, size=SIZE)
    calibrate(made, [(picture(0), EMBEDDINGS)], "minmax", 1)
    return made


@pytest.fixture(scope="module")
def narrow() -> Prepared:
    return prepared(2, "4-4-8-int")


@pytest.fixture(scope="module")
def refreshed() -> Prepared:
    """v1, whose text is refreshed from the pictures."""
    return prepared(1, "4-8-8-int")


@pytest.fixture(scope="module")
def folded(refreshed: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(refreshed, tmp_path_factory.mktemp("v1") / "folded.onnx", outputs="raw", dynamic=("batch",))


@pytest.fixture(scope="module")
def raw(narrow: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(narrow, tmp_path_factory.mktemp("export") / "raw.onnx", outputs="raw")


def run(path: Path, feeds: Mapping[str, torch.Tensor | np.ndarray], level: Any = PLAIN) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads, options.graph_optimization_level = 3, 1, level
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {key: np.asarray(value) for key, value in feeds.items()}), strict=True))


def levels(graph: torch.nn.Module, *inputs: torch.Tensor) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(graph(*inputs))
    return {name: value.numpy() for name, value in zip(OUTPUTS, found, strict=False)}


def equal(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert value.std() > 0
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def nearly(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    """Equal, but for sums that end in the middle between two codes: a step, in a few places."""
    for name, value in wanted.items():
        apart = np.abs(got[name] - value)
        assert apart.max() < 1.01 * np.diff(np.unique(value)).min()
        assert (apart > 0).mean() < 5e-3


def optimised(path: Path, folder: Path) -> onnx.GraphProto:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx").graph


def kinds(graph: onnx.GraphProto) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


# --- codes ---


def test_the_file_computes_what_the_lowered_graph_does(narrow: Prepared, raw: Exported):
    nearly(run(raw.path, {"images": picture(1)}), levels(lower(narrow, TEXTS).graph, picture(1)))


def test_v2_runs_in_integers_from_end_to_end(raw: Exported, tmp_path: Path):
    graph = optimised(raw.path, tmp_path)
    found = kinds(graph)
    floats = {"Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm", "Einsum", "Sigmoid", "QuickGelu", "Mul", "Add", "Resize", "Upsample"}
    assert not floats & found.keys()
    assert found["QuantizeLinear"] == 1
    assert found["DequantizeLinear"] == len(OUTPUTS)
    assert found["Transpose"] == 1 + len(OUTPUTS)
    convolutions = [node for node in graph.node if node.op_type == "QLinearConv"]
    assert len(convolutions) == 71
    for node in convolutions:
        assert node.domain == "com.microsoft"
        assert {each.name: each.i for each in node.attribute}["channels_last"] == 1


# of v1 with constant text, every operator on floats, with how many and why
V1_FLOATS = {
    "LayerNormalization": 2,  # of image pooling's keys and values: onnxruntime has no integer kernel
    "LogSoftmax": 1,  # of image pooling's attention: onnxruntime's integer softmax gives codes that are a step too low
    "Exp": 1,  # the rest of that softmax
    **dict.fromkeys(("ReduceL2", "Max", "Div"), 3),  # the norm of the regions, taken behind the match, a level each
    "Add": 3,  # the bias of the logits, behind that norm
}
V1_QUANTIZES = 1 + 2 + 1 + 3  # the picture; what the two norms and the softmax give; the logits, behind their norms
V1_DEQUANTIZES = 6 + 2 + 1 + 3  # the outputs; what the two norms and the softmax read; the regions, for their norms
V1_STRAYS = 3 + 2  # heads are put before tokens: of keys, values and their mix; of two guides


def test_v1_leaves_in_floats_what_has_no_integer_kernel_and_the_norm_behind_the_match(tmp_path: Path):
    file = export(prepared(1, "8-8-8-int"), tmp_path / "v1.onnx", outputs="raw")
    found = coverage(file.path)
    assert found.share == found.wanted_share == 1.0
    assert Counter(each.kind for each in found.floats) == V1_FLOATS
    assert found.counts["QuantizeLinear"] == V1_QUANTIZES
    assert found.counts["DequantizeLinear"] == V1_DEQUANTIZES
    assert len(found.stray_transposes) == V1_STRAYS
    assert not {"Conv", "MatMul", "Sigmoid", "Softmax", "Mul", "Resize"} & found.counts.keys()


def test_v1_of_an_open_batch_takes_the_best_text_in_floats(refreshed: Prepared, folded: Exported, tmp_path: Path):
    found = coverage(folded.path, size=SIZE)
    scores = {"ReduceMax": 3, "Concat": 2, "Mul": 2, "Add": 2}  # of two refreshed layers: each picture has guides of its own, 3 heads
    assert Counter(each.kind for each in found.floats) == Counter(V1_FLOATS) + Counter(scores)
    assert found.counts["QuantizeLinear"] == V1_QUANTIZES + 2
    nearly(run(folded.path, {"images": picture(1)}), levels(lower(refreshed, TEXTS).graph, picture(1)))


@pytest.mark.slow
def test_text_as_an_input_gives_the_codes_of_text_that_is_folded_in(refreshed: Prepared, folded: Exported, tmp_path: Path):
    runtime = export(refreshed, tmp_path / "runtime.onnx", outputs="raw", runtime_text=True, dynamic=("batch",))
    wanted = run(folded.path, {"images": picture(1)})
    equal(run(runtime.path, {"images": picture(1), "text": EMBEDDINGS}), wanted)
    fewer = run(runtime.path, {"images": picture(1), "text": EMBEDDINGS[:, :3]})
    assert fewer["logits_8"].shape == (1, 3, SIZE // 8, SIZE // 8)
    both = run(runtime.path, {"images": torch.cat((picture(1), picture(2))), "text": EMBEDDINGS})
    equal({name: value[:1] for name, value in both.items()}, wanted)


@pytest.mark.parametrize(("kind", "file", "collapsed"), [("refreshed", "folded", 0), ("narrow", "raw", 3)], ids=["v1", "v2"])
def test_text_as_an_input_gives_equal_codes_in_every_tensor_but_what_v2_makes_of_a_constant_one(
    kind: str, file: str, collapsed: int, request: pytest.FixtureRequest, tmp_path: Path
):
    made = request.getfixturevalue(kind)
    runtime_file = export(made, tmp_path / "runtime.onnx", outputs="raw", runtime_text=True)
    lowered = lower(made, None)
    with torch.no_grad():
        recorded, _ = record_lowered(lowered, (picture(1), EMBEDDINGS))
    codes, highest = {name: each.codes for name, each in recorded.items()}, {name: each.highest for name, each in recorded.items()}
    constant, runtime = (codes_of(each.path, codes, highest) for each in (request.getfixturevalue(file), runtime_file))
    product = {name for name in codes if collapsed and name.endswith("match.output.codes")}
    gone = {f"{name}.codes" for name in lower(made, TEXTS).collapsed}  # of the collapsed product, and of text whose use is stored
    assert len(product) == collapsed
    assert runtime.keys() == codes.keys()
    assert constant.keys() == codes.keys() - gone
    assert len(constant) > 150
    for name in constant.keys() - product:
        np.testing.assert_array_equal(constant[name], runtime[name], err_msg=name)


def codes_of(path: Path, codes: Mapping[str, np.ndarray], highest: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Every tensor's codes, stored or computed by onnxruntime without optimizations, by name."""
    file = onnx.load(path)
    feeds = {"images": picture(1).numpy(), "text": EMBEDDINGS.numpy()}
    given = {value.name: feeds[value.name] for value in file.graph.input}
    stored = {value.name: numpy_helper.to_array(value) for value in file.graph.initializer if value.name in codes}
    return {**stored, **cut(file, codes, highest, None).run(given, codes, optimised=False, threads=1).codes}


@pytest.mark.slow
def test_open_sizes_and_batches_give_the_codes_of_fixed_ones(narrow: Prepared, tmp_path: Path):
    file = export(narrow, tmp_path / "dynamic.onnx", outputs="raw", dynamic=("batch", "size"))
    assert file.metadata.multiple == 32
    graph = lower(narrow, TEXTS).graph
    for batch, height, width in ((1, SIZE, SIZE), (2, 64, 160), (2, 32, 64)):
        images = torch.cat([picture(index, height, width) for index in range(batch)])
        equal(run(file.path, {"images": images}), levels(graph, images))


def test_4_bit_storage_is_half_as_large_and_bit_identical(narrow: Prepared, raw: Exported, tmp_path: Path):
    assert raw.metadata.weights == "int4"  # without being told
    wide = export(narrow, tmp_path / "int8.onnx", outputs="raw", weights="int8")
    stored = {each.name: each for each in onnx.load(raw.path).graph.initializer}
    assert stored["backbone.image_model.stage1.0.conv.weight_codes"].data_type == onnx.TensorProto.INT4
    assert stored["backbone.image_model.stem.conv.weight_codes"].data_type == onnx.TensorProto.INT8  # an edge, of more bits
    weights = sum(np.prod(each.dims) for each in stored.values() if each.data_type == onnx.TensorProto.INT4)
    assert wide.size_bytes - raw.size_bytes > 0.45 * weights
    for level in (PLAIN, OPTIMISED):
        equal(run(raw.path, {"images": picture(1)}, level), run(wide.path, {"images": picture(1)}, level))


def test_odd_codes_are_stored_in_4_bits_and_give_what_the_model_computes(tmp_path: Path):
    made = prepared(2, "2-2-8-odd-int")
    file = export(made, tmp_path / "odd.onnx", outputs="raw")
    stored = {each.name: each for each in onnx.load(file.path).graph.initializer}
    packed = stored["backbone.image_model.stage1.0.conv.weight_codes"]
    assert packed.data_type == onnx.TensorProto.INT4
    assert np.unique(onnx.numpy_helper.to_array(packed).astype(int)).tolist() == [-3, -1, 1, 3]
    equal(run(file.path, {"images": picture(1)}), levels(lower(made, TEXTS).graph, picture(1)))
    made.save(tmp_path / "odd.pt")
    again = load_prepared(tmp_path / "odd.pt")
    equal(levels(again.graph.eval(), picture(1), EMBEDDINGS), levels(made.graph.eval(), picture(1), EMBEDDINGS))


def test_a_model_whose_norms_are_corrected_is_exported_as_it_computes(tmp_path: Path):
    made = prepared(2, "4-4-8-int")
    before = levels(made.graph.eval(), picture(1), EMBEDDINGS)
    assert correct_norms(made, [(picture(0), EMBEDDINGS)], 1)
    file = export(made, tmp_path / "corrected.onnx", outputs="raw")
    got = run(file.path, {"images": picture(1)})
    equal(got, levels(lower(made, TEXTS).graph, picture(1)))
    wanted = levels(made.graph.eval(), picture(1), EMBEDDINGS)
    bins = [name for name in got if name.startswith("bins")]  # logits are rounded once less in the file, where texts are folded in
    nearly({name: got[name] for name in bins}, {name: wanted[name] for name in bins})
    assert all(np.abs(got[name] - before[name]).mean() > 0.05 * before[name].std() for name in bins)


def test_exporting_twice_gives_the_same_bytes(narrow: Prepared, raw: Exported, tmp_path: Path):
    again = export(narrow, tmp_path / "again.onnx", outputs="raw")
    assert again.path.read_bytes() == raw.path.read_bytes()
    onnx.checker.check_model(onnx.load(again.path), full_check=True)


@pytest.mark.slow
def test_the_other_target_runs_in_floats_between_its_codes(tmp_path: Path):
    made = prepare(model(2), recipe="4-4-8", target="conv-inputs", vocabulary=TEXTS, size=SIZE)
    calibrate(made, [(picture(0), EMBEDDINGS)], "minmax", 1)
    file = export(made, tmp_path / "inputs.onnx", outputs="raw")
    wanted = levels(lower(made, TEXTS).graph, picture(1))
    for level in (PLAIN, OPTIMISED):
        for name, value in run(file.path, {"images": picture(1)}, level).items():
            assert np.abs(value - wanted[name]).mean() < (1e-3 if level is PLAIN else 0.1) * wanted[name].std()


# --- ends ---


@pytest.mark.parametrize(("version", "form"), [(1, "straight"), (2, "tuned")])
def test_floats_give_the_boxes_and_scores_of_the_model(version: int, form: Any, tmp_path: Path):
    loaded = model(version)
    file = export(loaded, tmp_path / "floats.onnx", vocabulary=TEXTS, form=form, size=SIZE)
    got = run(file.path, {"images": picture(1)}, OPTIMISED)
    with torch.no_grad():
        logits, bins, _ = loaded(picture(1), EMBEDDINGS)
    np.testing.assert_allclose(got["scores"], flatten_levels(logits).sigmoid().numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(got["boxes"], decode_boxes(bins).numpy(), rtol=0, atol=1e-3)
    assert file.metadata.weights == "float32"


def test_nms_gives_the_detections_of_the_model(tmp_path: Path):
    loaded, selection = model(2), Selection(conf=0.02, iou=0.5, max=20)
    path, opened = tmp_path / "nms.onnx", ("batch", "size")
    file = export(loaded, path, vocabulary=TEXTS, outputs="nms", selection=selection, size=SIZE, dynamic=opened)
    detector = TorchDetector(loaded, TEXTS, SIZE, selection.conf, selection.iou, selection.max)
    pictures = [TASK.draw("val", index).image for index in range(4)]
    images = torch.cat([picture(index) for index in range(4)])
    got = run(file.path, {"images": images})
    wanted = detector.detect(pictures)
    assert sum(map(len, wanted)) > 10
    assert max(map(len, wanted)) == selection.max or got["counts"].max() < selection.max
    for row, found in enumerate(wanted):
        kept = got["detections"][row, : got["counts"][row]]
        assert len(kept) == len(found)
        assert not got["detections"][row, len(found) :].any()
        np.testing.assert_allclose(kept[:, 4], found.scores, atol=1e-3)
        np.testing.assert_array_equal(kept[:, 5], found.labels)
        np.testing.assert_allclose(np.clip(kept[:, :4], 0, SIZE), found.boxes, atol=1e-3)


@pytest.mark.slow
def test_equal_scores_come_in_the_order_of_the_detector(narrow: Prepared, raw: Exported, tmp_path: Path):
    """Of a model in codes many scores are equal."""
    selection = Selection(conf=1e-7, iou=0.6, max=100)
    file = export(narrow, tmp_path / "nms.onnx", outputs="nms", selection=selection)
    settings = DetectSettings(size=SIZE, conf=selection.conf, iou=selection.iou, max=selection.max)
    (here,), (there,) = (open_model(path).detector(settings).detect([TASK.draw("val", 1).image]) for path in (file.path, raw.path))
    assert len(here) == selection.max
    assert len(set(here.scores.tolist())) < len(here)
    np.testing.assert_array_equal(here.labels, there.labels)
    np.testing.assert_allclose(here.boxes, there.boxes, atol=1e-3)


def test_bytes_give_the_codes_of_floats(narrow: Prepared, raw: Exported, tmp_path: Path):
    file = export(narrow, tmp_path / "bytes.onnx", outputs="raw", input="uint8")
    pixels = (picture(1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    equal(run(file.path, {"images": pixels}), run(raw.path, {"images": picture(1)}))
    assert "QuantizeLinear" not in kinds(optimised(file.path, tmp_path))


def test_16_bit_floats_stay_near(tmp_path: Path):
    loaded = model(2)
    half = export(loaded, tmp_path / "half.onnx", vocabulary=TEXTS, form="fp16", outputs="raw", size=SIZE)
    whole = levels(loaded, picture(1), EMBEDDINGS)
    for name, value in run(half.path, {"images": picture(1)}).items():
        assert value.dtype == np.float32
        assert np.abs(value - whole[name]).max() < 0.05 * np.abs(whole[name]).max()
    stored = {each.data_type for each in onnx.load(half.path).graph.initializer if np.prod(each.dims) > 64}
    assert stored == {TYPES[torch.float16].value}


# --- words ---


def test_the_file_says_what_it_is(narrow: Prepared, raw: Exported):
    file = onnx.load(raw.path)
    assert (file.opset_import[0].version, file.ir_version) == (21, 10)
    said = Metadata.read({each.key: each.value for each in file.metadata_props}, raw.path)
    assert said == raw.metadata
    assert (said.names, said.size, said.outputs, said.text, said.target) == (TEXTS.names, (SIZE, SIZE), "raw", "constant", "ort")
    assert said.recipe == narrow.recipe.as_plain()
    made = {output for node in file.graph.node for output in node.output}
    assert "quant.backbone.image_model.stem.conv.output.codes" in made
    assert [value.name for value in file.graph.output] == list(OUTPUTS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": "int2"}, "weights is 'int2'"),
        ({"outputs": "boxes"}, "outputs is 'boxes'"),
        ({"dynamic": ("width",)}, "'width' cannot be left open"),
        ({"size": 100}, "size is 100"),
        ({"vocabulary": Vocabulary(("a",), np.ones((1, 4), np.float32))}, "4 wide"),
    ],
)
def test_what_cannot_be_exported_is_refused(narrow: Prepared, changes: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        export(narrow, tmp_path / "no.onnx", **changes)
    assert not list(tmp_path.iterdir())


def test_4_bit_storage_of_wider_codes_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="do not fit 4 bits"):
        export(prepare(model(2), recipe="8-8-8-int", vocabulary=TEXTS, size=SIZE), tmp_path / "no.onnx", weights="int4")


def test_a_checkpoint_has_neither_codes_nor_a_text_of_its_own(tmp_path: Path):
    with pytest.raises(UserError, match="no codes to store"):
        export(model(2), tmp_path / "no.onnx", vocabulary=TEXTS, weights="int8")
    with pytest.raises(UserError, match="no vocabulary"):
        export(model(2), tmp_path / "no.onnx")


def test_quantizers_without_ranges_and_places_that_cannot_be_written_leave_nothing(narrow: Prepared, tmp_path: Path):
    with pytest.raises(UserError, match="not calibrated"):
        export(prepare(model(2), vocabulary=TEXTS, size=SIZE), tmp_path / "no.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        export(narrow, tmp_path / "folder.onnx", outputs="raw")
    assert [each.name for each in tmp_path.iterdir()] == ["folder.onnx"]


def test_the_command_shows_what_runs_in_integers(narrow: Prepared, tmp_path: Path):
    narrow.save(tmp_path / "prepared.pt")
    out = tmp_path / "model.onnx"
    result = CliRunner().invoke(app, ["export", str(tmp_path / "prepared.pt"), "--out", str(out), "--raw", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["bytes"] == out.stat().st_size
    assert report["coverage"]["wanted_share"] == 1
    assert report["coverage"]["stray_transposes"] == []
    assert report["settings"]["outputs"] == {"value": "raw", "from": "flag"}
    assert (tmp_path / "model.onnx.settings.yaml").is_file()


@pytest.mark.parametrize("form", ["tuned", "fp16"])
def test_the_command_shows_of_floats_that_nothing_runs_in_integers(form: str, tmp_path: Path):
    arguments = ["export", "pico-v1", "--form", form, "--size", str(SIZE), "--out", str(tmp_path / "model.onnx"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    covered = json.loads(result.stdout)["coverage"]
    assert covered["macs"] > 1e6
    assert covered["share"] == 0
    assert covered["wanted_share"] is None


def test_the_command_takes_the_average_of_a_trained_model_or_its_raw_weights(narrow: Prepared, raw: Exported, tmp_path: Path):
    average = {name: value * 1.25 if name.endswith("bn.bias") else value for name, value in narrow.graph.state_dict().items()}
    narrow.save(tmp_path / "trained.pt", average=average)
    taken = {}
    for flags in ([], ["--raw-weights"]):
        arguments = ["export", str(tmp_path / "trained.pt"), "--out", str(tmp_path / "model.onnx"), "--raw", "--json", *flags]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)["weights"]
        assert f"the {said} weights" in result.stderr
        taken[said] = (tmp_path / "model.onnx").read_bytes() == raw.path.read_bytes()
    assert taken == {"average": False, "raw": True}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--raw", "--nms"], "two kinds of outputs"),
        (["--dynamic", "width"], "'width' cannot be left open"),
        (["--weights", "int4"], "no codes"),
        (["--raw-weights"], "one set of weights"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: list[str], said: str, tmp_path: Path):
    result = CliRunner().invoke(app, ["export", "pico-v2", "--out", str(tmp_path / "no.onnx"), *arguments])
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)
    assert not list(tmp_path.iterdir())
