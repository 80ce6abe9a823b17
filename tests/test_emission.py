"""A graph of torch.fx as ONNX: the same numbers in onnxruntime, at every size that it was emitted for."""

import numpy as np
import pytest
import torch
from checks import PLAIN, randomise, run_model
from onnx_ir.passes.common import CheckerPass
from torch import Tensor, nn
from torch.fx import symbolic_trace

from crqat_fx.emission import emit
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import MaxSigmoidAttention, build
from crqat_fx.pipelines import float_export_passes
from crqat_fx.trace import trace_unproved
from passes.fx.codes import Dequantize, Quantize
from passes.onnx.drop_unused import DropUnused
from passes.onnx.model import OPSET, format_model
from passes.spec import QuantSpec


def inputs(batch: int, height: int, width: int, texts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height)
    text = torch.randn(batch, texts, 512, generator=generator)
    return torch.rand(batch, 3, height, width, generator=generator), nn.functional.normalize(text, dim=2)


def same(model, graph, example: tuple[Tensor, ...], atol: float) -> None:
    feeds = {str(value.name): tensor.numpy() for value, tensor in zip(model.graph.inputs, example, strict=True)}
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(graph(*example))
    for got, wanted in zip(run_model(model, feeds, PLAIN).values(), expected, strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=atol)


@pytest.mark.parametrize("version", [1, 2])
def test_a_detector_gives_the_same_at_every_size_and_vocabulary(version: int):
    torch.manual_seed(version)
    model = build("pico", version).eval()
    randomise(model)
    graph = trace_unproved(model)
    float_export_passes()(graph)
    emitted = emit(graph, [inputs(1, 96, 160, 4), inputs(2, 160, 224, 11)], axes={"images": ("batch", None, "height", "width")})
    DropUnused()(emitted)
    assert [str(dim) for dim in emitted.graph.inputs[0].shape] == ["batch", "3", "height", "width"]
    for example in (inputs(1, 96, 160, 4), inputs(3, 64, 32, 7)):
        same(emitted, graph, example, 1e-4)


class Shapes(nn.Module):
    """What only gives numbers another shape."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.unflatten(1, (2, -1)).flatten(3).transpose(1, 2)
        z = y.permute(0, 2, 1, 3).flatten(1, 2).view_as(x.flatten(2)).unflatten(2, x.shape[2:])
        return torch.cat((z, x), 1).unsqueeze(1).squeeze(1)


def test_reshapes_of_reshapes_become_one():
    graph = symbolic_trace(Shapes())
    one = (torch.randn(1, 4, 3, 5),)
    emitted = emit(graph, [one])
    DropUnused()(emitted)
    assert sum(node.op_type == "Reshape" for node in emitted.graph) == 2
    same(emitted, graph, one, 0)


def test_open_axes_are_read_from_the_graph():
    graph = symbolic_trace(Shapes())
    emitted = emit(graph, [(torch.randn(1, 4, 3, 5),), (torch.randn(2, 4, 7, 6),)])
    DropUnused()(emitted)
    same(emitted, graph, (torch.randn(3, 4, 2, 9),), 0)


class Rounds(nn.Module):
    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        size = () if spec.channel_axis is None else (3,)
        scale, zero = torch.full(size, 0.1), torch.full(size, 0 if spec.symmetric else 3, dtype=torch.int32)
        self.write, self.read = Quantize(scale, zero, spec), Dequantize(scale, zero, spec.channel_axis, spec)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.write(x))


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        (QuantSpec(8), ["QuantizeLinear", "DequantizeLinear"]),
        (QuantSpec(4), ["QuantizeLinear", "Clip", "DequantizeLinear"]),
        (QuantSpec(8, symmetric=True), ["QuantizeLinear", "DequantizeLinear"]),
        (QuantSpec(7, symmetric=True, channel_axis=1), ["QuantizeLinear", "Clip", "DequantizeLinear"]),
    ],
)
def test_codes_of_fewer_bits_than_a_byte_are_clipped(spec: QuantSpec, kinds: list[str]):
    graph = trace_unproved(Rounds(spec), (Quantize, Dequantize))
    x = (torch.linspace(-20, 20, 2 * 3 * 50).reshape(2, 3, 50),)
    emitted = emit(graph, [x], ["y"])
    DropUnused()(emitted)
    assert [node.op_type for node in emitted.graph] == kinds
    same(emitted, graph, x, 0)


def test_odd_codes_are_stored_and_never_written_as_a_quantizer():
    graph = trace_unproved(Rounds(QuantSpec(2, symmetric=True, odd=True)), (Quantize, Dequantize))
    with pytest.raises(UserError, match="a quantizer of odd codes has no form in ONNX"):
        emit(graph, [(torch.randn(2, 3, 4),)])


def test_scales_of_one_tensor_have_no_axes():
    emitted = emit(trace_unproved(Rounds(QuantSpec(8)), (Quantize, Dequantize)), [(torch.randn(2, 3, 4),)])
    assert "write.scale" in emitted.graph.initializers
    assert all(value.const_value.shape == () for value in emitted.graph.initializers.values())


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveMaxPool2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


@pytest.mark.parametrize("sizes", [((7, 10),), ((7, 10), (9, 4))], ids=["one size", "any size"])
def test_adaptive_pools_take_windows_that_overlap(sizes: tuple[tuple[int, int], ...]):
    graph = symbolic_trace(Pools())
    emitted = emit(graph, [(torch.randn(2, 3, *size),) for size in sizes])
    DropUnused()(emitted)
    for size in (*sizes, *(((5, 8),) if len(sizes) > 1 else ())):
        same(emitted, graph, (torch.randn(2, 3, *size),), 0)


def test_names_are_the_paths_of_the_nodes():
    torch.manual_seed(0)
    module = MaxSigmoidAttention(8, 16).eval()
    graph = trace_unproved(module)
    example = (torch.randn(1, 8, 4, 4), torch.randn(1, 3, 16))
    emitted = emit(graph, [example], ["y"])
    DropUnused()(emitted)
    text = format_model(emitted)
    assert "max_similarity = ReduceMax" in text
    assert "guide_fc = Add(guide_fc.product, float32[8])" in text
    assert "return y: float[1, 8, 4, 4]" in text
    same(emitted, graph, example, 1e-5)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.erf(x)


def test_a_node_without_words_in_onnx_is_refused_by_name():
    with pytest.raises(UserError, match=r"special_erf: special_erf has no form in ONNX"):
        emit(symbolic_trace(Unknown()), [(torch.randn(2),)])


def test_what_is_emitted_passes_the_full_checker():
    emitted = emit(symbolic_trace(Shapes()), [(torch.randn(1, 4, 3, 5),)])
    CheckerPass(full_check=True)(emitted)  # raises
    assert emitted.graph.opset_imports[""] == OPSET
