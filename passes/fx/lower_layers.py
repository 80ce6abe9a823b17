"""Writes convolutions and linear layers as functions of what an integer kernel stores: codes of the weight, a bias in the product's steps.

    y = Conv2d(x)   becomes   y = conv2d(x, Dequantize(weight_codes), Dequantize(bias_codes), stride, padding, dilation, groups)
    weight = Q(W) = s_w codes           of a convolution that has a norm folded in: of what it gives as `folded()`
    bias_codes = round(b / (s_x s_w))   int32; s_x is the step of the codes that x is dequantized from

1. Where |b| / (s_x s_w) would leave 30 bits, s_w is raised until it fits, and the weight rounded anew: such a channel is dead, its weight
   nothing beside its bias.
2. A product with a positive number between the codes and the layer is looked through: s_x is their step times the number.
3. Padding that a convolution's function does not know ("reflect", or "same" where it is uneven) becomes a node of its own before it.
4. The bias stays float where x is not read from codes of one scale, or the weight has none; weight and bias where the weight is not
   quantized.

Left alone: other layers; and subclasses of these two that do not quantize a weight, or layers with hooks, which may compute something else.
A layer that is called several times keeps its bias in float.
Under the layer's path the graph then has its codes (`weight_codes`, `bias_codes`) and their Dequantize (`weight`, `bias`), or the floats.
"""

import logging
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.base import PassError
from passes.fx.codes import Dequantize, Quantize
from passes.fx.graph import FxPass, module_of

logger = logging.getLogger(__name__)
LARGEST_BIAS = 2**30  # as many codes are left for the products it is added to


class LowerLayers(FxPass):
    """Writes convolutions and linear layers as functions of integer codes."""

    name = "lower-layers"

    def rewrite(self, graph: GraphModule) -> int:
        found = [node for node in graph.graph.nodes if node.op == "call_module" and self._is_layer(graph, node)]
        layers = {str(node.target): module_of(graph, node) for node in found}
        calls = Counter(node.target for node in found)
        for path, layer in layers.items():
            self._check_read_by_calls_alone(graph, path, layer)
        for node in found:
            path = str(node.target)
            layer = layers[path]
            assert isinstance(layer, nn.Conv2d | nn.Linear)  # what was looked for
            if module_of(graph, node) is layer:
                step = step_of(graph, node.all_input_nodes[0]) if calls[path] == 1 else None
                graph.set_submodule(path, _store(path, layer, step))
            _call(graph, node, path, layer)
        graph.delete_all_unused_submodules()
        return len(found)

    def _is_layer(self, graph: GraphModule, node: Node) -> bool:
        module = module_of(graph, node)
        if not isinstance(module, nn.Conv2d | nn.Linear):
            return False
        known = type(module) in (nn.Conv2d, nn.Linear) or hasattr(module, "weight_fake_quant")
        if not known or module._forward_hooks or module._forward_pre_hooks:
            logger.debug("%s: left %s: a %s%s", self.name, node.target, type(module).__name__, " with hooks" if known else " of its own")
            return False
        return True

    def _check_read_by_calls_alone(self, graph: GraphModule, path: str, layer: nn.Module | None) -> None:
        read = [node for node in graph.graph.find_nodes(op="get_attr") if str(node.target).startswith(f"{path}.")]
        if read and getattr(layer, "weight_fake_quant", None) is not None:
            raise PassError(self.name, f"{read[0].target} is read beside the layer, and is kept as codes: give the reader a copy")


def _call(graph: GraphModule, node: Node, path: str, layer: nn.Conv2d | nn.Linear) -> None:
    """Puts the function in the place of the layer's call."""
    store = graph.get_submodule(path)
    with graph.graph.inserting_before(node):
        read = [_read(graph, node, path, name) if hasattr(store, name) else None for name in ("weight", "bias")]
        if isinstance(layer, nn.Conv2d):
            x, padding = _padded(graph, node, layer)
            made = graph.graph.call_function(F.conv2d, (x, *read, layer.stride, padding, layer.dilation, layer.groups))
        else:
            made = graph.graph.call_function(F.linear, (node.all_input_nodes[0], *read))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.graph.erase_node(node)


def weight_and_bias(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor | None]:
    """As evaluation uses them."""
    folded: Callable[[], tuple[Tensor, Tensor]] | None = getattr(layer, "folded", None)
    if folded is not None:
        return folded()
    quantizer = getattr(layer, "weight_fake_quant", None)
    return layer.weight if quantizer is None else quantizer(layer.weight), layer.bias


@torch.no_grad()
def _store(path: str, layer: nn.Conv2d | nn.Linear, step: Tensor | None) -> nn.Module:
    """What the layer keeps, as a module without a forward of its own."""
    weight, bias = weight_and_bias(layer)
    store = nn.Module()
    quantizer = getattr(layer, "weight_fake_quant", None)
    if quantizer is None:
        store.register_buffer("weight", weight.detach().clone())
        if bias is not None:
            store.register_buffer("bias", bias.detach().clone())
        return store
    spec, scale, zero_point = quantizer.spec, quantizer.scale.detach(), quantizer.zero_points
    if spec.channel_axis not in (None, 0):
        step = None
    if bias is not None and step is not None:
        scale = raised_scale(scale, bias, step)
    rounds = Quantize(scale, zero_point, spec)
    store.register_buffer("weight_codes", rounds(weight))
    store.add_module("weight", Dequantize(scale, zero_point, spec.channel_axis, spec))
    if bias is None:
        return store
    if step is None:
        logger.debug("lower-layers: left the bias of %s in float: its input is not read from codes of one scale", path)
        store.register_buffer("bias", bias.detach().clone())
        return store
    rounded = rounded_bias(path, bias, step * scale)
    store.register_buffer("bias_codes", rounded.codes)
    store.add_module("bias", rounded.values)
    return store


def raised_scale(scale: Tensor, bias: Tensor, step: Tensor) -> Tensor:
    """The scale of a weight, raised where the bias would have no codes with it."""
    least = bias.abs() / (step * LARGEST_BIAS)
    return torch.maximum(scale, least if scale.ndim else least.max())


@dataclass(frozen=True)
class RoundedBias:
    """int32 codes, and what gives their values."""

    codes: Tensor
    values: Dequantize


def rounded_bias(path: str, bias: Tensor, scale: Tensor) -> RoundedBias:
    """A bias in steps of `scale`, of which there may be one for all, or one for each index of its first axis."""
    along = scale.expand(len(bias)) if scale.ndim == 0 else scale
    codes = torch.round(bias / along.view([-1, *[1] * (bias.ndim - 1)]))
    if not bool((codes.abs() <= LARGEST_BIAS * 2 - 128).all()):
        raise PassError(LowerLayers.name, f"the bias of {path} is not finite, or has no 32-bit codes in steps of {float(along.min()):.3g}")
    zero_point = torch.zeros_like(along, dtype=torch.int32)
    return RoundedBias(codes.to(torch.int32), Dequantize(along, zero_point, 0, None))


def step_of(graph: GraphModule, node: Node) -> Tensor | None:
    """The step of the codes that a value is read from; None for a float, or where there is more than one."""
    module = module_of(graph, node)
    if isinstance(module, Dequantize):
        return module.scale if module.axis is None else None
    if node.target not in (operator.mul, torch.mul):
        return None
    factors = [value for value in node.args if isinstance(value, int | float) and value > 0]
    step = step_of(graph, node.all_input_nodes[0]) if len(factors) == 1 else None
    return None if step is None else step * factors[0]


def _read(graph: GraphModule, node: Node, path: str, name: str) -> Node:
    """A parameter as the function takes it: the float, or codes and their Dequantize."""
    stored = getattr(graph.get_submodule(path), name)
    attribute = graph.graph.get_attr(f"{path}.{name}" if isinstance(stored, Tensor) else f"{path}.{name}_codes")
    read = attribute if isinstance(stored, Tensor) else graph.graph.call_module(f"{path}.{name}", (attribute,))
    for each in (attribute, read):
        each.meta = dict(node.meta)
    return read


def _padded(graph: GraphModule, node: Node, layer: nn.Conv2d) -> tuple[Node, tuple[int, ...]]:
    """What the convolution reads, and the zeros it adds around that itself."""
    (x,) = node.all_input_nodes
    around = list(layer._reversed_padding_repeated_twice)
    even = all(around[side] == around[side + 1] for side in (0, 2))
    if layer.padding_mode == "zeros" and even:
        return x, (around[2], around[0])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = graph.graph.call_function(F.pad, (x, around, mode))
    padded.meta = dict(node.meta)
    return padded, (0, 0)
