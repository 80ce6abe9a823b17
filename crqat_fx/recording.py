"""What verification holds against each other: the codes that a prepared model gives in evaluation, those of its lowered graph, and what a
file of it has to store.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from crqat_fx.lower import Lowered
from crqat_fx.models.yolo_world import Match
from crqat_fx.onnx_cuts import Codes
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.integer_bias import IntegerBias
from crqat_fx.quantize.prepared import Prepared
from passes.fx.codes import Quantize
from passes.fx.fold_constants import value_of
from passes.fx.graph import module_of
from passes.fx.placement import quantizes
from passes.fx.to_integer_codes import QUANTIZER


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
    """The codes of every quantizer of the prepared graph in evaluation, by its node."""
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
        result = super().run_node(n)
        module = module_of(self.prepared.graph, n)
        if isinstance(module, FakeQuantize):
            scale, zero = (_spread(each, module.spec.channel_axis, result.dim()) for each in (module.scale, module.zero_points))
            self.found[n.name] = (torch.round(result / scale) + zero).to(torch.int16).numpy()
        return result


def _layer(graph: GraphModule, node: Node) -> IntegerBias | None:
    """A layer that rounds its weight."""
    module = module_of(graph, node)
    return module if isinstance(module, IntegerBias) and isinstance(module.weight_fake_quant, FakeQuantize) else None


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
    while (layer := _layer(graph, convolution)) is None:
        convolution = convolution.all_input_nodes[0]
    assert lowered.vocabulary is not None  # the texts are constant where they were collapsed
    weight, bias = layer.folded()
    embeddings = nn.functional.normalize(torch.from_numpy(lowered.vocabulary.embeddings), dim=1)
    text = embeddings * graph.get_parameter(f"{head}.logit_scale").detach().exp()
    product = (text.double() @ weight.detach().double().flatten(1)).float()
    highest = 2 ** (min(8, prepared.target.weight_bits) - 1) - 1
    scale = product.abs().amax(1) / highest
    yield f"{match}.weight_scale", scale.numpy()
    yield f"{match}.weight_codes", torch.round(product / scale[:, None]).to(torch.int8).view(len(product), -1, 1, 1).numpy()
    shift = graph.get_parameter(f"{head}.bias").detach().double() + (0 if bias is None else text.double() @ bias.detach().double())
    step = layer.step()
    if step is not None:
        yield f"{match}.bias_codes", torch.round(shift.float() / (step * scale)).to(torch.int32).numpy()


def expected_in_file(prepared: Prepared, lowered: Lowered) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The name in the file, and the value, of everything that a file stores of a quantized model."""
    found = ((node, _layer(prepared.graph, node)) for node in prepared.graph.graph.nodes)
    layers = {f"{node.target}.weight_fake_quant": layer for node, layer in found if layer is not None}
    constants = {lowered.names[node]: node for node in lowered.graph.graph.nodes if node.op == "get_attr"}
    for name, quantizer in prepared.quantizers().items():
        if name in lowered.collapsed:
            continue
        if name in layers:
            path = name.removesuffix(".weight_fake_quant")
            weight, _ = layers[name].stored()
            scale = layers[name].weight_scale(layers[name].folded()[1])
            spread = _spread(scale, quantizer.spec.channel_axis, weight.dim())
            yield f"{path}.weight_codes", torch.round(weight.detach() / spread).to(torch.int8).numpy()
            yield f"{path}.weight_scale", scale.numpy()
        elif f"{name}.codes" not in constants:
            yield f"{name}.scale", quantizer.scale.detach().numpy()
            yield f"{name}.zero_point", quantizer.zero_points.numpy()
    remade = remade_products(prepared, lowered).values()
    for match in remade:
        yield from _collapsed_codes(prepared, lowered, match)
    for name, node in constants.items():
        if name.endswith("codes") and not name.startswith(tuple(f"{match}." for match in remade)):
            yield name, value_of(lowered.graph, node).numpy()
