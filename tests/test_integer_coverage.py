"""The published sizes run in integers from end to end: counted on the graph that onnxruntime really runs, at drawn weights.

Counts do not depend on the size of the pictures, so they are small. Of processor time a file of S takes about 5 s, M 7 s, L 10 s, a third
of it the checker after each pass; nothing is shared among them but the code.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from crqat_fx.coverage import Coverage, coverage
from crqat_fx.export import OUTPUTS, export
from crqat_fx.models.yolo_world import build
from crqat_fx.onnx_session import open_session
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.vocabulary import Vocabulary

SIZE, TEXTS = 64, 16
FLOATS = {
    *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Einsum"),
    *("Sigmoid", "QuickGelu", "Mul", "Add", "Softmax", "Resize", "Upsample", "ReduceL2", "Div"),
}


def made(preset: str, recipe: str) -> Prepared:
    torch.manual_seed(0)
    model = build(preset, 2).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):  # that activations neither fade nor grow
            module.weight.data.normal_(0, 1.4 / module.weight[0].numel() ** 0.5)
    generator = np.random.default_rng(0)
    drawn = generator.standard_normal((TEXTS, model.config.text_width), dtype=np.float32)
    texts = Vocabulary(tuple(map(str, range(TEXTS))), drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    prepared = prepare(model, recipe=recipe, vocabulary=texts, size=SIZE)
    picture = generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    calibrate(prepared, picture_batches(prepared, [picture]), "minmax", 1)
    return prepared


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of S, with two codes a byte and with one."""
    folder, prepared = tmp_path_factory.mktemp("s"), made("s", "4-8-8-int")
    packed = export(prepared, folder / "int4.onnx", outputs="raw").path
    return packed, export(prepared, folder / "int8.onnx", outputs="raw", weights="int8").path


def check(found: Coverage, convolutions: int, additions: int) -> None:
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


def test_every_product_of_s_is_an_integer_kernels(files: tuple[Path, Path]) -> None:
    check(coverage(files[0], size=SIZE), 71, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "recipe", "convolutions", "additions"), [("m", "4-4-8-int", 91, 12), ("l", "8-8-8-int", 111, 18)])
def test_every_product_of_the_larger_ones_is_an_integer_kernels(
    tmp_path: Path, preset: str, recipe: str, convolutions: int, additions: int
) -> None:
    path = export(made(preset, recipe), tmp_path / "model.onnx", outputs="raw").path
    check(coverage(path, size=SIZE), convolutions, additions)


def test_two_codes_a_byte_are_half_the_file_and_the_same_outputs(files: tuple[Path, Path]) -> None:
    packed, plain = files
    assert packed.stat().st_size <= 0.52 * plain.stat().st_size
    images = np.random.default_rng(1).random((1, 3, SIZE, SIZE), dtype=np.float32)
    outputs = [open_session(path, 1).run(None, {"images": images}) for path in files]
    assert outputs[0][0].std() > 0
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_with_float_edges_every_product_that_the_recipe_quantizes_is_an_integer_kernels(tmp_path: Path) -> None:
    found = coverage(export(made("pico", "4-4-8"), tmp_path / "model.onnx", outputs="raw").path, size=SIZE)
    assert 0 < found.wanted_macs == found.wanted_integer_macs < found.macs
    left = {one.reason for one in found.floats if one.macs}
    assert left == {"the recipe leaves it float"}
