"""What onnxruntime runs of a file, counted on small graphs whose figures are known."""

import json
import math
from pathlib import Path

import pytest
from onnx import helper
from small_onnx import coded, convolutions, drawn, scales, write_graph

from crqat_fx.coverage import coverage, covered, format_coverage
from crqat_fx.errors import UserError
from crqat_fx.onnx_profile import operator_times, profile

# widths are multiples of 16, to which float kernels pad channels, and would count the padding
STEM, TOWER, MATCH = 16 * 16 * 8 * 3, 16 * 16 * 16 * 8 * 9, 16 * 16 * 10 * 16  # of `convolutions`
EIGHT = {"bits": 8}


def recipe(*rules: dict[str, object]) -> dict[str, str]:
    return {"crqat_fx.recipe": json.dumps({"rules": rules})}


def macs_of(path: Path) -> list[int]:
    return [node.macs for node in profile(path).nodes if node.macs]


@pytest.mark.parametrize(
    ("node", "weight", "macs"),
    [
        (helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4), (16, 4, 3, 3), 8 * 8 * 16 * 4 * 9),
        (helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2]), (16, 4, 2, 2), 4 * 4 * 16 * 4 * 4),
        (helper.make_node("Conv", ["x", "w"], ["y"], group=2), (8, 2, 1, 1), 8 * 8 * 8 * 2),
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]), (4, 8, 2, 2), 8 * 8 * 4 * 8 * 4),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (4, 8, 5), 4 * 8 * 8 * 5),
        (helper.make_node("Einsum", ["x", "w"], ["y"], equation="bchw,nc->bnhw"), (5, 4), 8 * 8 * 5 * 4),
        (helper.make_node("Einsum", ["x", "w"], ["y"], equation="...hw, wk -> ...hk"), (8, 5), 4 * 8 * 8 * 5),
    ],
)
def test_counts_the_products_of_every_operator(tmp_path, node, weight, macs):
    path = write_graph(tmp_path / "one.onnx", [node], [drawn("w", *weight)], {"x": [1, 4, 8, 8]}, ["y"])
    assert macs_of(path) == [macs]


def test_counts_a_gemm_whose_first_side_is_transposed(tmp_path):
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["rows"]), helper.make_node("Gemm", ["rows", "w"], ["y"], transA=1)]
    shape = helper.make_tensor("shape", 7, [2], [6, 4])
    path = write_graph(tmp_path / "gemm.onnx", nodes, [shape, drawn("w", 6, 5)], {"x": [1, 1, 6, 4]}, ["y"])
    assert macs_of(path) == [6 * 4 * 5]


def test_nodes_of_one_name_or_none_are_told_apart(tmp_path):
    nodes = [helper.make_node("Conv", [source, "w"], [result], name) for source, result, name in (("x", "a", ""), ("a", "b", ""))]
    nodes += [helper.make_node("Conv", [source, "v"], [result], "same") for source, result in (("b", "c"), ("c", "y"))]
    path = write_graph(tmp_path / "n.onnx", nodes, [drawn("w", 16, 16, 1, 1), drawn("v", 16, 16, 2, 2)], {"x": [1, 16, 8, 8]}, ["y"])
    assert macs_of(path) == [8 * 8 * 256, 8 * 8 * 256, 7 * 7 * 1024, 6 * 6 * 1024]


def test_what_onnxruntime_writes_without_a_name_is_told_apart_by_its_place(tmp_path):
    """It has no Softmax of 16 bits, and writes each as five nodes of no name."""
    nodes = [helper.make_node("Cast", ["x"], ["half"], "half", to=10)]
    for number, source in ((0, "half"), (1, "product0")):
        nodes += [
            helper.make_node("Softmax", [source], [f"shares{number}"], f"softmax{number}"),
            helper.make_node("MatMul", [f"shares{number}", f"w{number}"], [f"product{number}"], f"product{number}"),
        ]
    nodes += [helper.make_node("Cast", ["product1"], ["y"], "whole", to=1)]
    weights = [helper.make_tensor(name, 10, shape, [0.5] * math.prod(shape)) for name, shape in (("w0", (8, 5)), ("w1", (5, 3)))]
    path = write_graph(tmp_path / "half.onnx", nodes, weights, {"x": [1, 4, 8, 8]}, ["y"])
    executed = profile(path, runs=2).nodes
    assert [node.macs for node in executed if node.macs] == [4 * 8 * 5 * 8, 4 * 8 * 3 * 5]
    assert [node.kind for node in executed].count("Exp") == 2
    assert len({node.name for node in executed}) == len(executed)
    assert all(len(node.microseconds) == 2 for node in executed)


def test_open_axes_take_what_is_asked(tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    path = write_graph(tmp_path / "open.onnx", [node], [drawn("w", 16, 3, 1, 1)], {"x": ["batch", 3, "height", "width"]}, ["y"])
    assert coverage(path, size=32, batch=2).macs == 2 * 32 * 32 * 48


def test_an_input_that_is_neither_pictures_nor_texts_is_refused(tmp_path):
    path = write_graph(tmp_path / "flat.onnx", [helper.make_node("Relu", ["x"], ["y"])], [], {"x": [4, 4]}, ["y"])
    with pytest.raises(UserError, match="'x' has 2 axes"):
        coverage(path)


def test_integer_kernels_are_told_from_floats(tmp_path):
    report = coverage(convolutions(tmp_path / "q.onnx"))
    assert (report.integer_macs, report.macs) == (STEM + TOWER, STEM + TOWER + MATCH)
    assert report.counts["QLinearConv"] == 2
    assert report.counts["QuantizeLinear"] == report.counts["DequantizeLinear"] == 1
    assert [(one.name, one.kind, one.macs, one.reason) for one in report.floats] == [
        ("match", "Einsum", MATCH, "the file carries no recipe")
    ]
    assert report.wanted_share is None


def test_what_the_recipe_leaves_float_is_not_wanted(tmp_path):
    metadata = recipe({"modules": "*", "activation": EIGHT}, {"modules": "match"})
    report = coverage(convolutions(tmp_path / "q.onnx", metadata=metadata))
    assert report.wanted_macs == STEM + TOWER
    assert report.wanted_share == 1.0
    assert [one.reason for one in report.floats] == ["the recipe leaves it float"]


def test_what_the_recipe_quantizes_and_no_integer_kernel_took_is_missed(tmp_path):
    report = coverage(convolutions(tmp_path / "q.onnx", metadata=recipe({"modules": "*", "activation": EIGHT})))
    assert report.wanted_share == pytest.approx((STEM + TOWER) / (STEM + TOWER + MATCH))
    assert [one.reason for one in report.floats] == ["the recipe quantizes it, but no integer kernel took it"]


def test_a_product_that_makes_an_output_goes_by_its_own_name(tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["logits"], "head.last")  # onnxruntime renames it to what it makes
    metadata = recipe({"modules": "*", "activation": EIGHT}, {"modules": "head.last"})
    report = coverage(write_graph(tmp_path / "o.onnx", [node], [drawn("w", 16, 3, 1, 1)], {"x": [1, 3, 8, 8]}, ["logits"], metadata))
    assert report.wanted_macs == 0
    assert ("head.last", "the recipe leaves it float") in [(one.name, one.reason) for one in report.floats]


def test_a_float_operator_between_codes_is_named_with_its_reason(tmp_path):
    between = [helper.make_node("Erf", ["stem.out"], ["erf"], "erf"), *coded("bent", "erf", "bent.out")]
    path = convolutions(tmp_path / "erf.onnx", between, "bent.out", scales("bent", 0.01))
    found = {one.kind: one.reason for one in coverage(path).floats}
    assert found["Erf"] == "onnxruntime has no integer kernel for it"


def test_what_stands_behind_the_last_product_is_told_as_such(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], "c"), helper.make_node("Erf", ["c"], ["y"], "last")]
    path = write_graph(tmp_path / "tail.onnx", nodes, [drawn("w", 16, 3, 1, 1)], {"x": [1, 3, 8, 8]}, ["y"])
    assert {one.kind: one.reason for one in coverage(path).floats}["Erf"] == "behind the last product, towards the outputs"


def test_a_transpose_between_products_is_stray_and_one_at_the_edge_is_not(tmp_path):
    clean = coverage(convolutions(tmp_path / "clean.onnx"))
    assert clean.counts["Transpose"] >= 1  # the input's, to channels last
    assert all("stem" not in name for name in clean.stray_transposes)
    swap = [helper.make_node("Transpose", ["stem.out"], ["swapped"], "swap", perm=[0, 1, 3, 2])]
    stray = coverage(convolutions(tmp_path / "stray.onnx", swap, "swapped"))
    assert len(stray.stray_transposes) > len(clean.stray_transposes)


def test_the_table_says_each_figure(tmp_path):
    report = coverage(convolutions(tmp_path / "q.onnx", metadata=recipe({"modules": "*", "activation": EIGHT})))
    text = format_coverage(report)
    assert f"{report.share:.1%}" in text
    assert "1 Einsum: the recipe quantizes it, but no integer kernel took it" in text
    assert report.as_json()["wanted_share"] == report.wanted_share


def test_time_by_operator_has_every_node_once_and_the_same_products(tmp_path):
    profiled = profile(convolutions(tmp_path / "q.onnx"), runs=3, threads=1)
    times = operator_times(profiled)
    assert sum(one.nodes for one in times) == len(profiled.nodes)
    assert sum(one.macs for one in times) == covered(profiled).macs
    assert [one.milliseconds for one in times] == sorted((one.milliseconds for one in times), reverse=True)
    assert all(len(node.microseconds) == 3 for node in profiled.nodes)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a"])
def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.onnx"):
        coverage(path)


def test_a_recipe_that_is_no_json_is_refused(tmp_path):
    path = convolutions(tmp_path / "q.onnx", metadata={"crqat_fx.recipe": "{"})
    with pytest.raises(UserError, match=r"crqat_fx\.recipe is no JSON"):
        coverage(path)
