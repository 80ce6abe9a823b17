"""Makes one convolution of a linear chain: a convolution, and the match of what it gives with constant texts.

    y = unflatten(text @ flatten(W * x + b) + c)   becomes   y = (text W) * x + (text b + c)
    for texts [N,D], a convolution C -> D of any kernel, and a scalar c: a convolution C -> N

The convolution's weight and bias are those that evaluation uses, its norm folded in. Where both the convolution and the match are
quantized, the product of their weights is what is rounded: symmetric, a scale a text, the smallest that holds the row; and the quantizers
between them go, that of the match's output stays. Where neither is, nothing is.

Left alone:
1. texts that depend on an input, or of which there is more than one set;
2. a convolution whose output has another reader (one that asks for its shape is none), or that has groups;
3. a pair of which one is quantized and the other float;
4. a match that is not unflattened to the shape of the map it reads, or has another reader before.
"""

import logging
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.fx.codes import Dequantize, Quantize
from passes.fx.fold_constants import value_of
from passes.fx.graph import FxPass, ancestors, asks_about, module_of, node_paths, readers_of_values
from passes.fx.lower_layers import weight_and_bias
from passes.fx.placement import quantizes
from passes.spec import QuantSpec

logger = logging.getLogger(__name__)


class RoundedBySelf(nn.Module):
    """A quantizer of a weight that no training sees: symmetric, of each row the smallest scale that holds it."""

    is_quantizer: ClassVar[bool] = True

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.spec = QuantSpec(bits, symmetric=True, channel_axis=0)
        largest = weight.flatten(1).abs().amax(1)
        self.scale = torch.where(largest > 0, largest / self.spec.highest, 1.0)
        self.zero_points = torch.zeros_like(self.scale, dtype=torch.int32)

    def forward(self, weight: Tensor) -> Tensor:
        rounds = Quantize(self.scale, self.zero_points, self.spec)
        values: Tensor = Dequantize(self.scale, self.zero_points, 0, self.spec)(rounds(weight))
        return values


@dataclass(frozen=True)
class _Found:
    """One chain, from the convolution to what unflattens its matches."""

    convolution: Node
    text: Node
    offset: Node
    ends: tuple[Node, ...]
    behind: Node  # the match, or the quantizer of its output
    quantized: bool
    gone: tuple[str, ...]  # quantizers between the two


class CollapseMatch(FxPass):
    """Makes one convolution of a convolution and the match of what it gives with constant texts."""

    name = "collapse-match"

    def __init__(self, match: type[nn.Module], weight_bits: int) -> None:
        """`match`: called with texts [B,N,D], regions [B,D,A] and a scalar. `weight_bits`: the most that a product's weight has."""
        self.match, self.weight_bits = match, weight_bits
        self.gone: tuple[str, ...] = ()  # the quantizers that the last run collapsed away

    def rewrite(self, graph: GraphModule) -> int:
        paths = node_paths(graph)
        rewrites, self.gone = 0, ()
        for node in list(graph.graph.nodes):
            if not isinstance(module_of(graph, node), self.match):
                continue
            found = self._found(graph, node)
            if isinstance(found, str):
                logger.debug("%s: left %s: %s", self.name, paths[node], found)
                continue
            self._collapse(graph, node, found)
            rewrites += 1
        graph.graph.eliminate_dead_code()
        graph.delete_all_unused_submodules()
        return rewrites

    def _found(self, graph: GraphModule, match: Node) -> _Found | str:
        """What is collapsed, or why it cannot be."""
        if len(match.args) != 3 or not all(isinstance(argument, Node) for argument in match.args):
            return "it is not called with three tensors"
        text, regions, offset = match.all_input_nodes
        if any(node.op == "placeholder" for node in ancestors([text, offset])):
            return "its texts, or its scalar, depend on an input"
        if regions.op != "call_method" or regions.target != "flatten" or regions.args[1:] != (2,):
            return "what it reads is no map with its last two axes flattened"
        between = list(_quantizers_before(graph, regions.all_input_nodes[0]))
        convolution = between[-1].all_input_nodes[0] if between else regions.all_input_nodes[0]
        layer = module_of(graph, convolution)
        if type(layer) is not nn.Conv2d and not (isinstance(layer, nn.Conv2d) and hasattr(layer, "weight_fake_quant")):
            return "what it reads is made by no convolution"
        if layer.groups != 1:
            return "the convolution has groups"
        chain = [match, regions, *between, convolution]
        for read, reader in zip(chain[1:], chain, strict=False):
            if readers_of_values(read) != [reader]:
                return "what lies between the convolution and the match has another reader"
        of_text = list(_quantizers_before(graph, text))
        text = of_text[-1].all_input_nodes[0] if of_text else text
        if value_of(graph, text).shape[0] != 1:
            return "there is more than one set of texts"
        if value_of(graph, offset).numel() != 1:
            return "what it adds is no scalar"
        behind = next((user for user in match.users if quantizes(graph, user)), match)
        ends = tuple(readers_of_values(behind))
        if behind is not match and readers_of_values(match) != [behind]:
            return "the match has another reader than its quantizer"
        if not ends or not all(_unflattens(end, behind, {convolution, *between}) for end in ends):
            return "its result is not unflattened to the shape of the map it reads"
        quantized = getattr(layer, "weight_fake_quant", None) is not None
        if quantized != bool(of_text or behind is not match):
            return "one of both is quantized, and the other is not"
        own = [f"{convolution.target}.weight_fake_quant"] if quantized else []
        gone = (*own, *(str(each.target) for each in (*between, *of_text)))
        return _Found(convolution, text, offset, ends, behind, quantized, gone)

    def _collapse(self, graph: GraphModule, match: Node, found: _Found) -> None:
        layer = module_of(graph, found.convolution)
        assert isinstance(layer, nn.Conv2d)  # what was found
        with torch.no_grad():
            texts, offset = (value_of(graph, each).double() for each in (found.text, found.offset))
            weight, bias = weight_and_bias(layer)
            collapsed = torch.tensordot(texts[0], weight.double(), 1).float()
            shift = (offset + (0 if bias is None else texts[0] @ bias.double())).float()
        made = _convolution(layer, collapsed, shift.expand(len(collapsed)).clone())
        if found.quantized:
            made.weight_fake_quant = RoundedBySelf(collapsed, min(8, self.weight_bits))
        graph.set_submodule(str(match.target), made)
        match.args = (found.convolution.all_input_nodes[0],)
        for end in found.ends:
            end.replace_all_uses_with(found.behind)
            graph.graph.erase_node(end)
        self.gone = (*self.gone, *found.gone)


def _convolution(like: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A convolution with a weight and bias of its own, and everything else as another's."""
    made = nn.Conv2d(
        like.in_channels,
        len(weight),
        like.kernel_size,  # type: ignore[arg-type]  # torch types it as any tuple
        like.stride,  # type: ignore[arg-type]
        like.padding,  # type: ignore[arg-type]
        like.dilation,  # type: ignore[arg-type]
        padding_mode=like.padding_mode,
        device="meta",  # the weight is there already: none is drawn
    )
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return made.eval()


def _unflattens(end: Node, behind: Node, maps: set[Node]) -> bool:
    """Whether a node gives the last axis the shape that one of the maps has behind its channels."""
    if end.op != "call_method" or end.target != "unflatten" or end.args[:2] != (behind, 2) or len(end.args) != 3:
        return False
    sides = end.args[2]
    if not isinstance(sides, Node) or sides.target is not operator.getitem or sides.args[1] != slice(2, None, None):
        return False
    shape = sides.args[0]
    if not isinstance(shape, Node) or not asks_about(shape) or shape.args[0] not in maps:
        return False
    return shape.args[1:] == (() if shape.target == "size" else ("shape",))


def _quantizers_before(graph: GraphModule, node: Node) -> Iterator[Node]:
    """The quantizers that a value went through last, from the last one."""
    while quantizes(graph, node):
        yield node
        node = node.all_input_nodes[0]
