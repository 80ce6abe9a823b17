"""The published sizes run in integers from end to end: counted on the graph that onnxruntime really runs, at drawn weights.

Counts do not depend on the size of the pictures, so they are small. Of processor time S takes 7 s, M 9 s, L 12 s, half of it the checker
after each pass; nothing is shared among them but the code.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from crqat_fx.coverage import Coverage, coverage
from crqat_fx.export import OUTPUTS, export
from crqat_fx.models.yolo_world import build
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.vocabulary import Vocabulary

SIZE, TEXTS = 64, 16
FLOATS = {
    *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Einsum"),
    *("Sigmoid", "QuickGelu", "Mul", "Add", "Softmax", "Resize", "Upsample", "ReduceL2", "Div"),
}


def exported(preset: str, recipe: str, folder: Path) -> Coverage:
    torch.manual_seed(0)
    model = build(preset, 2).eval()
    generator = np.random.default_rng(0)
    drawn = generator.standard_normal((TEXTS, model.config.text_width), dtype=np.float32)
    texts = Vocabulary(tuple(map(str, range(TEXTS))), drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    prepared = prepare(model, recipe=recipe, vocabulary=texts, size=SIZE)
    picture = generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    calibrate(prepared, picture_batches(prepared, [picture]), "minmax", 1)
    return coverage(export(prepared, folder / "model.onnx", outputs="raw").path, size=SIZE)


@pytest.mark.parametrize(
    ("preset", "recipe", "convolutions", "additions"),
    [
        ("s", "8-8-8-int", 71, 6),
        pytest.param("m", "4-4-8-int", 91, 12, marks=pytest.mark.slow),
        pytest.param("l", "4-8-8-int", 111, 18, marks=pytest.mark.slow),
    ],
)
def test_every_product_of_a_published_size_is_an_integer_kernels(
    tmp_path: Path, preset: str, recipe: str, convolutions: int, additions: int
) -> None:
    found = exported(preset, recipe, tmp_path)
    assert found.macs > 1e8
    assert found.integer_macs == found.macs == found.wanted_macs == found.wanted_integer_macs
    assert found.floats == ()
    assert not FLOATS & found.counts.keys()
    assert found.counts["QLinearConv"] == convolutions  # one a convolution: attention and match are among them
    assert found.counts["QLinearAdd"] == additions  # one a residual
    assert found.counts["QuantizeLinear"] == 1  # of the picture
    assert found.counts["DequantizeLinear"] == len(OUTPUTS)
    assert found.counts["Transpose"] == 1 + len(OUTPUTS)  # of the picture, and of each output: none is between products
    assert found.stray_transposes == ()


def test_with_float_edges_every_product_that_the_recipe_quantizes_is_an_integer_kernels(tmp_path: Path) -> None:
    found = exported("pico", "4-4-8", tmp_path)
    assert 0 < found.wanted_macs == found.wanted_integer_macs < found.macs
    left = {one.reason for one in found.floats if one.macs}
    assert left == {"the recipe leaves it float"}
