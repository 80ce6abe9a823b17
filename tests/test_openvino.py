"""A file of the target `conv-inputs` runs in OpenVINO as in onnxruntime, tensor by tensor, its convolutions in bytes.

From the picture on one sum that ends in the middle between two codes would cascade: so the file is cut at its quantizers, as verification
does it, and each piece fed the codes of the lowered graph.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from crqat_fx.checkpoint import load_model
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.export import OUTPUTS, export
from crqat_fx.lower import lower
from crqat_fx.onnx_cuts import cut
from crqat_fx.onnx_detector import as_floats
from crqat_fx.processor import sums_products_whole
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.recording import record_lowered

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[bench]'")

SIZE = 96
TASK = ShapesTask(size=SIZE)
TEXTS = TASK.vocabulary.select(TASK.vocabulary.names[:10])
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}  # by default its floats may have 16 bits


def told(node: "openvino.Node", what: str) -> str:
    return str(node.get_rt_info()[what].value)


def is_one(node: "openvino.Node") -> bool:
    return told(node, "layerType") == "Convolution"


WHOLE = pytest.mark.skipif(not sums_products_whole(), reason="without VNNI OpenVINO's sums of 8-bit weights saturate")


@pytest.mark.parametrize(("version", "recipe", "edges"), [pytest.param(1, "8-8-8-int", 0, marks=WHOLE), (2, "4-4-8", 7)])
def test_openvino_gives_the_codes_and_outputs_of_the_lowered_graph(version: int, recipe: str, edges: int, tmp_path: Path) -> None:
    prepared = prepare(load_model(f"pico-v{version}")[0], recipe=recipe, target="conv-inputs", vocabulary=TEXTS, size=SIZE)
    calibrate(prepared, picture_batches(prepared, [TASK.draw("calibration", 0).image]), "minmax", 1)
    path = export(prepared, tmp_path / "model.onnx", outputs="raw").path
    images = as_floats(TASK.draw("val", 0).image[np.newaxis])
    with torch.no_grad():
        recorded, outputs = record_lowered(lower(prepared, TEXTS), (torch.from_numpy(images),))
    codes = {name: record.codes for name, record in recorded.items() if record.levels is not None}
    highest = {name: recorded[name].highest for name in codes}
    whole = cut(onnx.load(path), codes, highest, None).run({"images": images}, codes, optimised=True, threads=1)
    pieces = cut(onnx.load(path), codes, highest, whole.shapes)
    assert len(pieces.values) > 50
    onnx.save(pieces.model, tmp_path / "pieces.onnx")
    compiled = openvino.Core().compile_model(tmp_path / "pieces.onnx", "CPU", SETTINGS)
    fed = pieces.feeds(codes, {each.get_any_name() for each in compiled.inputs})
    given = compiled({"images": images, **fed})
    found = pieces.found({name: given[name] for name in pieces.asked}, codes)
    for name, theirs in found.codes.items():
        apart = np.abs(theirs.astype(np.int32) - codes[name])
        assert apart.max() <= 1, name
        assert (apart > 0).sum() <= max(4, 1e-3 * apart.size), name
    for name, ours in zip(OUTPUTS, torch.utils._pytree.tree_leaves(outputs), strict=True):
        np.testing.assert_allclose(found.outputs[name], ours.numpy(), rtol=0, atol=1e-3 * np.abs(ours.numpy()).max(), err_msg=name)
    running = openvino.Core().compile_model(path, "CPU", SETTINGS).get_runtime_model().get_ops()
    convolutions = {node.get_friendly_name().partition("/")[0]: told(node, "runtimePrecision") for node in running if is_one(node)}
    assert len(convolutions) > 60
    assert set(convolutions.values()) <= {"u8", "i8", "f32"}
    floats = {name for name, precision in convolutions.items() if precision == "f32"}
    assert len(floats) == edges
    assert all(prepared.recipe.rule_for(name).activation is None for name in floats)
