"""What verification holds against each other: the codes that a prepared model gives in evaluation, those of its lowered graph, and what a
file of it has to store.

An integer layer's bias is an int32 multiple of its input's step times its weight's. The prepared model has it in floating point: here it is
rounded, by formulas of this module's own and not by the lowering's, so that both can be compared code by code.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from crqat_fx.lower import Lowered
from crqat_fx.models.yolo_world import Match, max_similarity
from crqat_fx.onnx_cuts import Codes
from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.recipe import TARGETS
from passes.fx.codes import Quantize
from passes.fx.fold_constants import value_of
from passes.fx.graph import module_of
from passes.fx.placement import carries, quantizes
from passes.fx.to_integer_codes import QUANTIZER

ROOM = 2.0**30  # a bias's code stays below it


@dataclass(frozen=True)
class Record:
    """One quantizer's codes in one run, and the values in steps before they were rounded."""

    codes: Codes
    levels: npt.NDArray[np.float32] | None  # None: a constant, which the file stores
    quantizer: str | None  # the prepared graph's node; None: lowering made it
    highest: int = 0  # the highest code that there is


def record_lowered(lowered: Lowered, inputs: tuple[Tensor, ...]) -> tuple[dict[str, Record], Any]:
    """The codes of every Quantize of the lowered graph, by its name in the file; and what the graph puts out."""
    found: dict[str, Record] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            module = module_of(lowered.graph, n)
            if isinstance(module, Quantize):
                x = self.env[n.all_input_nodes[0]]
                levels = x / module.spread(module.scale, x.dim())
                found[lowered.names[n]] = Record(result.numpy(), levels.numpy(), n.meta.get(QUANTIZER), module.highest)
            elif n.op == "get_attr" and QUANTIZER in n.meta:
                found[lowered.names[n]] = Record(result.numpy(), None, n.meta[QUANTIZER])
            return result

    outputs = Recorder(lowered.graph).run(*inputs[: len(lowered.inputs)])  # a text that is known is the last input
    return found, outputs


def record_prepared(prepared: Prepared, inputs: tuple[Tensor, ...]) -> dict[str, Codes]:
    """The codes of every quantizer of the prepared graph in evaluation, by its node, biases rounded as an integer kernel has them."""
    training = prepared.graph.training
    prepared.graph.eval()
    recorder = _PreparedRecorder(prepared)
    try:
        recorder.run(*inputs)
    finally:
        prepared.graph.train(training)
    return recorder.found


class _PreparedRecorder(Interpreter):
    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.graph)
        self.prepared = prepared
        self.found: dict[str, Codes] = {}

    def run_node(self, n: Node) -> Any:
        module = module_of(self.prepared.graph, n)
        if _rounds(module):
            return _layer(self.prepared, n)(self.env[n.all_input_nodes[0]])
        steps = _head_steps(self.prepared, n)
        if steps is not None:
            score, bias = (self.env[each] for each in n.all_input_nodes)
            return score + torch.round(bias / steps) * steps
        result = super().run_node(n)
        if isinstance(module, FakeQuantize):
            scale, zero = (_spread(each, module.spec.channel_axis, result.dim()) for each in (module.scale, module.zero_points))
            self.found[n.name] = (torch.round(result / scale) + zero).to(torch.int16).numpy()
        return result


@dataclass(frozen=True)
class _Layer:
    """A layer that rounds its weight, as evaluation applies it; its bias in steps of the product where its input has a step."""

    module: nn.Conv2d | nn.Linear
    weight: Tensor
    scale: Tensor  # of the weight
    axis: int | None  # of the scale
    bias: Tensor | None

    @property
    def spread(self) -> Tensor:
        return _spread(self.scale, self.axis, self.weight.dim())

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.module, nn.Linear):
            return nn.functional.linear(x, self.weight, self.bias)
        made: Tensor = self.module._conv_forward(x, self.weight, self.bias)
        return made


def _rounds(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear) and isinstance(getattr(module, "weight_fake_quant", None), FakeQuantize)


def _layer(prepared: Prepared, node: Node) -> _Layer:
    module = module_of(prepared.graph, node)
    assert isinstance(module, nn.Conv2d | nn.Linear)
    quantizer = module.weight_fake_quant
    assert isinstance(quantizer, FakeQuantize)
    axis = quantizer.spec.channel_axis
    weight, bias = module.folded() if isinstance(module, ConvBn2d) else (quantizer(module.weight), module.bias)
    weight, scale = weight.detach(), quantizer.scale.detach()
    step = _step(prepared, node.all_input_nodes[0])
    if bias is None or step is None:
        return _Layer(module, weight, scale, axis, bias)
    least = bias.detach().abs() / (step * ROOM)
    scale = torch.maximum(scale, least if axis == 0 else least.max())  # a dead channel's, that its bias has a code
    spread, along = _spread(scale, axis, weight.dim()), step * scale
    return _Layer(module, torch.round(weight / spread) * spread, scale, axis, torch.round(bias.detach() / along) * along)


def _step(prepared: Prepared, node: Node) -> Tensor | None:
    """The one step of the codes that a value is read from, products with a number looked through."""
    factor = 1.0
    while not quantizes(prepared.graph, node):
        if node.target is operator.mul and isinstance(node.args[1], int | float):
            factor *= node.args[1]
        elif not carries(prepared.graph, TARGETS["ort"], node):
            return None
        node = node.all_input_nodes[0]
    quantizer = module_of(prepared.graph, node)
    assert isinstance(quantizer, FakeQuantize)
    return None if quantizer.spec.channel_axis is not None else quantizer.scale.detach() * factor


def _head_steps(prepared: Prepared, node: Node) -> Tensor | None:
    """For the sum of an attention score and its bias: the steps of the product, one a head."""
    scaled = node.args[0] if node.target is operator.add else None
    if not isinstance(scaled, Node) or scaled.target is not operator.mul:
        return None
    product, factor = scaled.args
    if not isinstance(product, Node) or product.target is not max_similarity:
        return None
    guide, step = module_of(prepared.graph, product.all_input_nodes[0]), _step(prepared, product.all_input_nodes[1])
    if not isinstance(guide, FakeQuantize) or guide.spec.channel_axis is None or step is None:
        return None
    if not isinstance(factor, int | float):
        return None
    return (step * guide.scale.detach() * factor).unsqueeze(1)


def _spread(values: Tensor, axis: int | None, dimensions: int) -> Tensor:
    return values if axis is None else values.view([-1 if each == axis else 1 for each in range(dimensions)])


def remade_products(prepared: Prepared, lowered: Lowered) -> dict[str, str]:
    """Matches that were collapsed with the convolution before them: the quantizer's node of their output, and their path."""
    found = {}
    for node in prepared.graph.graph.nodes:
        source = node.all_input_nodes[0] if quantizes(prepared.graph, node) else None
        if source is None or not isinstance(module_of(prepared.graph, source), Match):
            continue
        if hasattr(lowered.graph.get_submodule(str(source.target)), "weight_codes"):
            found[node.name] = str(source.target)
    return found


def _collapsed_codes(prepared: Prepared, lowered: Lowered, match: str) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """What the file stores of a collapsed match: text (W x + b) + c as one convolution, from the prepared model's own parameters."""
    graph, head = prepared.graph, match.rpartition(".")[0]
    (node,) = [each for each in graph.graph.nodes if each.target == match]
    convolution = node.args[1]
    while not _rounds(module_of(graph, convolution)):
        convolution = convolution.all_input_nodes[0]
    layer = module_of(graph, convolution)
    assert isinstance(layer, nn.Conv2d)
    assert lowered.vocabulary is not None  # the texts are constant where they were collapsed
    quantizer = layer.weight_fake_quant
    assert isinstance(quantizer, FakeQuantize)
    weight, bias = layer.folded() if isinstance(layer, ConvBn2d) else (quantizer(layer.weight), layer.bias)
    embeddings = nn.functional.normalize(torch.from_numpy(lowered.vocabulary.embeddings), dim=1)
    text = embeddings * graph.get_parameter(f"{head}.logit_scale").detach().exp()
    product = (text.double() @ weight.detach().double().flatten(1)).float()
    highest = 2 ** (min(8, prepared.target.weight_bits) - 1) - 1
    scale = product.abs().amax(1) / highest
    yield f"{match}.weight_scale", scale.numpy()
    yield f"{match}.weight_codes", torch.round(product / scale[:, None]).to(torch.int8).view(len(product), -1, 1, 1).numpy()
    shift = graph.get_parameter(f"{head}.bias").detach().double() + (0 if bias is None else text.double() @ bias.detach().double())
    step = _step(prepared, convolution.all_input_nodes[0])
    if step is not None:
        yield f"{match}.bias_codes", torch.round(shift.float() / (step * scale)).to(torch.int32).numpy()


def expected_in_file(prepared: Prepared, lowered: Lowered) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The name in the file, and the value, of everything that a file stores of a quantized model."""
    layers = {f"{node.target}.weight_fake_quant": node for node in prepared.graph.graph.nodes if _rounds(module_of(prepared.graph, node))}
    constants = {lowered.names[node]: node for node in lowered.graph.graph.nodes if node.op == "get_attr"}
    for name, quantizer in prepared.quantizers().items():
        if name in lowered.collapsed:
            continue
        if name in layers:
            path = name.removesuffix(".weight_fake_quant")
            layer = _layer(prepared, layers[name])
            yield f"{path}.weight_codes", torch.round(layer.weight / layer.spread).to(torch.int8).numpy()
            yield f"{path}.weight_scale", layer.scale.numpy()
        elif f"{name}.codes" not in constants:
            yield f"{name}.scale", quantizer.scale.detach().numpy()
            yield f"{name}.zero_point", quantizer.zero_points.numpy()
    remade = remade_products(prepared, lowered).values()
    for match in remade:
        yield from _collapsed_codes(prepared, lowered, match)
    for name, node in constants.items():
        if name.endswith("codes") and not name.startswith(tuple(f"{match}." for match in remade)):
            yield name, value_of(lowered.graph, node).numpy()
