"""Lets real integers flow where quantizers rounded: every one becomes a Quantize, and a Dequantize before each reader in float.

    y = f(q(x))               becomes   c = Quantize(x), y = f(Dequantize(c))
    y = f(pick(q(x)))         becomes   y = f(Dequantize(pick(c)))              what picks or moves codes works on the codes
    y = concat(q(a), q(b))    becomes   concat of codes, where all have one quantizer
    q(pick(q(x)))             becomes   pick(c), the same quantizer: (k s) / s rounds to k again
    relu(q(x))                becomes   Dequantize(clamp(c, min=zero point))
    view_as(y, x), x.shape    ask the codes of x instead, so that nothing reads the tensor before it is quantized

What is computed stays the same to the last bit, but for the sign of a zero. Left alone, in float behind a Dequantize: a pick from codes
with a scale for each index of an axis, which it may move; a concat of several scales; a product with a number, and a norm.
"""

import logging
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from passes.base import PassError
from passes.fx.codes import Dequantize, OnCodes, Quantize
from passes.fx.graph import FxPass, asks_about, module_of, node_paths, nodes_in
from passes.fx.placement import kinds, knows, operands, quantizes, replace_operand

logger = logging.getLogger(__name__)
CODES = "codes"  # the key in `node.meta` of the Quantize module whose codes a node hands on
QUANTIZER = "quantizer"  # and of the name that the node had which a Quantize stands for
VALUES = "values"  # the Dequantize of a Quantize, its child

PICKS = frozenset(
    (
        *("split", "getitem", "flatten", "unflatten", "transpose", "permute", "view_as", "unsqueeze"),
        *("MaxPool2d", "AdaptiveMaxPool2d", "Upsample"),
    )
)
JOINS = frozenset(("Concat",))
CLAMPS = frozenset(("ReLU",))


class ToIntegerCodes(FxPass):
    """Replaces quantizers by Quantize and Dequantize, with integers between them."""

    name = "to-integer-codes"

    def rewrite(self, graph: GraphModule) -> int:
        return _Work(graph).run()

    def ensures(self, graph: GraphModule) -> None:
        left = next((node for node in graph.graph.nodes if quantizes(graph, node)), None)
        if left is not None:
            raise PassError(self.name, f"{left.target} is a quantizer still")


class _Work:
    """One run over one graph. `codes`: for a node whose value is on a quantizer's grid, the node that has its codes."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.paths = node_paths(graph)
        self.kinds = {node: kinds(graph, node) for node in graph.graph.nodes}  # before any module is wrapped
        self.codes: dict[Node, Node] = {}
        self.made: dict[str, Quantize] = {}

    def run(self) -> int:
        found = [node for node in self.graph.graph.nodes if quantizes(self.graph, node)]  # known before the first of them is replaced
        quantizers = set(found)
        for node in list(self.graph.graph.nodes):
            if node in quantizers:
                self.quantize(node)
            elif not _asks_shape(node) and not self.stays_in_codes(node):
                self.read_in_float(node)
        self.ask_codes_for_shapes()
        for node in reversed(found):
            if node.users:
                raise PassError(ToIntegerCodes.name, f"{node.target} has a reader that takes neither codes nor values")
            self.graph.graph.erase_node(node)
        return len(found)

    def quantize(self, node: Node) -> None:
        target = str(node.target)
        (source,) = node.all_input_nodes
        known = self.codes.get(source)
        if known is not None and known.meta[CODES] == target:
            self.codes[node] = known
            return
        if target not in self.made:
            self.made[target] = _quantize(module_of(self.graph, node))
            self.graph.set_submodule(target, self.made[target])
        with self.graph.graph.inserting_before(node):
            value = source if known is None else self.dequantized(source)
            made = self.graph.graph.call_module(target, (value,))
        made.meta = {**node.meta, CODES: target, QUANTIZER: node.name}
        self.codes[node] = made

    def stays_in_codes(self, node: Node) -> bool:
        """Whether a node could be set to work on codes. It hands them on then."""
        named = self.kinds[node]
        read = [(index, source) for index, source in operands(node) if source in self.codes]
        if not read:
            return False
        if knows(JOINS, named):
            return self.join(node)
        if read[0][0] != 0 or not knows(PICKS | CLAMPS, named):
            return False
        source = read[0][1]
        if self.steps(source).axis is not None:
            logger.debug("to-integer-codes: left %s in float: its codes have a scale for each index of an axis", self.paths[node])
            return False
        codes = self.codes[source]
        if knows(CLAMPS, named):
            return self.clamp(node, codes)
        replace_operand(node, 0, source, codes)
        self.wrap(node)
        self.hands_on(node, codes)
        return True

    def join(self, node: Node) -> bool:
        sources = [source for _, source in operands(node)]
        quantizers = {self.codes[source].meta[CODES] for source in sources if source in self.codes}
        if any(source not in self.codes for source in sources) or len(quantizers) != 1:
            logger.debug("to-integer-codes: left %s in float: it joins codes of %d scales, or floats", self.paths[node], len(quantizers))
            return False
        if self.steps(sources[0]).axis is not None:
            logger.debug("to-integer-codes: left %s in float: its codes have a scale for each index of an axis", self.paths[node])
            return False
        codes = self.codes[sources[0]]
        for source in dict.fromkeys(sources):
            node.replace_input_with(source, self.codes[source])
        self.hands_on(node, codes)
        return True

    def clamp(self, node: Node, codes: Node) -> bool:
        lowest = int(self.made[codes.meta[CODES]].zero_point)
        with self.graph.graph.inserting_before(node):
            clamped = self.graph.graph.call_function(torch.clamp, (codes,), {"min": lowest})
        clamped.meta = dict(node.meta)
        node.replace_all_uses_with(clamped)
        self.graph.graph.erase_node(node)
        self.hands_on(clamped, codes)
        return True

    def wrap(self, node: Node) -> None:
        """A module on codes may need floats in torch. One that is called several times is wrapped once."""
        module = module_of(self.graph, node)
        if module is not None and not isinstance(module, OnCodes):
            self.graph.set_submodule(str(node.target), OnCodes(module))

    def hands_on(self, node: Node, codes: Node) -> None:
        node.meta = {**node.meta, CODES: codes.meta[CODES]}
        self.codes[node] = node

    def read_in_float(self, node: Node) -> None:
        """A Dequantize of its own for every tensor that the node reads."""
        for source in dict.fromkeys(nodes_in([*node.args, *node.kwargs.values()])):
            if source not in self.codes:
                continue
            with self.graph.graph.inserting_before(node):
                node.replace_input_with(source, self.dequantized(source))

    def dequantized(self, source: Node) -> Node:
        codes = self.codes[source]
        made = self.graph.graph.call_module(f"{codes.meta[CODES]}.{VALUES}", (codes,))
        made.meta = {key: value for key, value in codes.meta.items() if key not in (CODES, QUANTIZER)}
        return made

    def steps(self, source: Node) -> Quantize:
        return self.made[self.codes[source].meta[CODES]]

    def ask_codes_for_shapes(self) -> None:
        order = {node: index for index, node in enumerate(self.graph.graph.nodes)}
        for node in order:
            asked = self.only_its_shape(node)
            if asked is None:
                continue
            instead = self.codes.get(asked)
            if instead is None:
                made = [user for user in asked.users if CODES in user.meta and user.op == "call_module" and user.target in self.made]
                instead = next((user for user in made if order[user] < order[node]), None)
            if instead is not None and instead is not asked:
                node.replace_input_with(asked, instead)

    def only_its_shape(self, node: Node) -> Node | None:
        """What a node asks the shape of, and nothing else."""
        position = 0 if _asks_shape(node) else 1
        if position == 1 and not (node.op == "call_method" and node.target == "view_as"):
            return None
        asked: Any = node.args[position] if len(node.args) > position else None
        return asked if isinstance(asked, Node) else None


def _asks_shape(node: Node) -> bool:
    return asks_about(node) and not (node.target is getattr and node.args[1] == "dtype")


def _quantize(module: nn.Module | None) -> Quantize:
    """The Quantize of a quantizer, with its Dequantize."""
    found: Any = module  # a quantizer, as its class says
    scale, zero_point, spec = found.scale, found.zero_points, found.spec
    made = Quantize(scale, zero_point, spec)
    made.add_module(VALUES, Dequantize(scale, zero_point, spec.channel_axis, spec))
    return made
