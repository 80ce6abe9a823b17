"""Places quantizers by a table, and names each after what it quantizes.

    f(x)       becomes  f(quant.f.input(x))      an operand that the table lists: for this reader, as the node's spec asks
    y = f(x)   becomes  y = quant.f.output(f(x)) an output that the table lists, for every reader, at the widest of what they ask

1. A quantizer that stands already (torch.ao placed it) is kept, and named after its first reader.
2. Readers of one tensor that ask for the same share a quantizer.
3. A reader that asks for less than its tensor has gets a narrower quantizer behind the wide one.
4. A float reader of an integer producer reads codes too, at the widest.
5. A tensor that no integer kernel produces is quantized only for those who ask.
6. What hands codes on (views, pools, products with a number) is looked through.
7. A quantizer belongs to the stage of its tensor's producer where the table quantizes outputs, else to that of its earliest reader.

Left alone: parameters, shapes, and every node without a spec (`node.meta["activation"]`). The table and the factory come from above.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from passes.base import PassError
from passes.fx.graph import STAGE, FxPass, is_quantizer, node_paths
from passes.fx.placement import (
    ACTIVATION,
    WIDEST,
    Table,
    carries,
    entry,
    kinds,
    knows,
    operands,
    quantizes,
    readers,
    replace_operand,
    signed_spec,
    spec_of,
)
from passes.spec import QuantSpec

logger = logging.getLogger(__name__)
ROOT = "quant"  # the module that holds every activation quantizer
Make = Callable[[QuantSpec, float | None], nn.Module]  # the second: a scale that is known, counted from 0 up


@dataclass(frozen=True)
class _Ask:
    """A reader's wish: the operand, the node it reads it from, and the bits."""

    reader: Node
    index: int
    source: Node
    bits: int


class PlaceQuantizers(FxPass):
    """Places and names the quantizers that a table lists."""

    name = "place-quantizers"

    def __init__(self, table: Table, make: Make, inputs: Mapping[str, float] | None = None) -> None:
        """`inputs`: of which inputs of the graph the scale is known."""
        self.table, self.make, self.inputs = table, make, dict(inputs or {})

    def requires(self, graph: GraphModule) -> None:
        for name, module in graph.named_modules():
            if name.startswith(f"{ROOT}.") and not next(module.children(), None) and not is_quantizer(module):
                raise PassError(self.name, f"the model has a module {name!r}, and {ROOT!r} is where quantizers are kept: rename it")

    def rewrite(self, graph: GraphModule) -> int:
        work = _Work(graph, self.table, self.make, node_paths(graph))
        originals = [node for node in graph.graph.nodes if not quantizes(graph, node)]
        for node in list(graph.graph.nodes):
            if quantizes(graph, node) and not str(node.target).startswith(f"{ROOT}."):
                work.adopt(node)
        for node in originals:
            work.quantize_operands(node)
        for node in originals:
            work.quantize_output(node, self.inputs)
        graph.delete_all_unused_submodules()
        return work.rewrites


class _Work:
    """One run over one graph."""

    def __init__(self, graph: GraphModule, table: Table, make: Make, paths: Mapping[Node, str]) -> None:
        self.graph, self.table, self.make, self.paths = graph, table, make, paths
        self.order = list(dict.fromkeys(node.meta.get(STAGE) for node in graph.graph.nodes))
        self.rewrites = 0
        self.standing: dict[tuple[Node, QuantSpec], Node] = {}

    def adopt(self, node: Node) -> None:
        """Names a quantizer that stands already, of torch.ao's making."""
        reader = min(node.users)  # nodes compare by their place in the graph
        index = next(index for index, source in operands(reader) if source is node)
        node.target = self._add(self._input_name(reader, index), self.graph.get_submodule(str(node.target)))
        source = node.all_input_nodes[0]
        node.meta = {key: value for key, value in source.meta.items() if key != ACTIVATION}
        self._stage_of_readers(node)
        self.standing[source, spec_of(self.graph, node)] = node
        self.rewrites += 1

    def quantize_operands(self, reader: Node) -> None:
        named, asked = kinds(self.graph, reader), self._asked(reader)
        if asked is None:
            return
        listed = entry(self.table.operands, named, ())
        for index, source in list(operands(reader)):
            if index not in listed or quantizes(self.graph, source):
                continue
            spec = signed_spec(self.table, named, asked)
            self._behind(source, self._input_name(reader, index), spec, [_Ask(reader, index, source, spec.bits)])

    def quantize_output(self, node: Node, inputs: Mapping[str, float]) -> None:
        if node.op in ("get_attr", "output") or node.target is getattr or carries(self.graph, self.table, node):
            return
        named = kinds(self.graph, node)
        integer = self._asked(node) is not None and knows(self.table.outputs, named)
        found = sorted(readers(self.graph, self.table, node), key=lambda each: each[:2])
        asks = [_Ask(*found_at, bits) for found_at in found if (bits := self._bits(*found_at[:2], integer)) is not None]
        if not asks:
            return
        if not integer and len(asks) < len(found):  # the others read it in float
            for source in dict.fromkeys(ask.source for ask in asks):
                here = [ask for ask in asks if ask.source is source]
                first = max(here, key=lambda ask: ask.bits)  # the first of equals
                wide = self._behind(source, self._input_name(first.reader, first.index), QuantSpec(first.bits), here, stage=node)
                self._narrow(source, wide, first.bits, here, node)
            return
        bits = entry(self.table.outputs, named, None) or max(ask.bits for ask in asks)
        known = entry(self.table.fixed, named, None) if integer else inputs.get(str(node.target)) if node.op == "placeholder" else None
        everyone = [_Ask(user, index, node, bits) for user, index in self._readers_of_values(node)]
        name = f"{ROOT}.{self.paths[node]}.output"
        wide = self._behind(node, name, QuantSpec(bits), everyone, known=known if bits == WIDEST else None, stage=node)
        self._narrow(node, wide, bits, asks, node)

    def _readers_of_values(self, node: Node) -> list[tuple[Node, int]]:
        """Every user and operand that reads the node's values, and not its shape."""
        return [
            (user, index)
            for user in node.users
            if user.target is not getattr
            for index, source in operands(user)
            if source is node and (index == 0 or not carries(self.graph, self.table, user))
        ]

    def _bits(self, reader: Node, index: int, integer: bool) -> int | None:
        """What a reader asks for, None for float."""
        if quantizes(self.graph, reader):
            return None
        named, asked = kinds(self.graph, reader), self._asked(reader)
        if asked is not None and knows(self.table.reads, named):
            return entry(self.table.reads, named, None) or asked.bits
        return WIDEST if integer else None

    def _narrow(self, node: Node, wide: Node, bits: int, asks: list[_Ask], producer: Node) -> None:
        """Narrower quantizers for those who ask for less: one for each node that they read the tensor from, and each width."""
        less: dict[tuple[Node, int], list[_Ask]] = {}
        for ask in asks:
            if ask.bits < bits:
                less.setdefault((wide if ask.source is node else ask.source, ask.bits), []).append(ask)
        for (source, fewer), here in less.items():
            first = here[0]
            name = self._input_name(first.reader, first.index)
            self._behind(source, name, QuantSpec(fewer), [_Ask(ask.reader, ask.index, source, fewer) for ask in here], stage=producer)

    def _behind(
        self, source: Node, name: str, spec: QuantSpec, asks: list[_Ask], *, known: float | None = None, stage: Node | None = None
    ) -> Node:
        """A quantizer of `source` for those who ask: the one that stands, or a new one."""
        quantizer = self.standing.get((source, spec))
        if quantizer is None:
            target = self._add(name, self.make(spec, known))
            with self.graph.graph.inserting_after(source):
                quantizer = self.graph.graph.call_module(target, (source,))
            quantizer.meta = {key: value for key, value in source.meta.items() if key != ACTIVATION}
            self.standing[source, spec] = quantizer
            self.rewrites += 1
        for ask in asks:
            replace_operand(ask.reader, ask.index, source, quantizer)
        if stage is None and not self.table.outputs:
            self._stage_of_readers(quantizer)
        elif stage is not None and STAGE in stage.meta:
            quantizer.meta[STAGE] = stage.meta[STAGE]
        return quantizer

    def _stage_of_readers(self, quantizer: Node) -> None:
        stages = [reader.meta[STAGE] for reader in quantizer.users if STAGE in reader.meta]
        if stages:
            quantizer.meta[STAGE] = min(stages, key=self.order.index)

    def _add(self, name: str, module: nn.Module) -> str:
        if not self.graph.add_submodule(name, module):
            raise PassError(PlaceQuantizers.name, f"{name} cannot be added to the model: something else is in its place")
        return name

    def _input_name(self, reader: Node, index: int) -> str:
        several = len(reader.all_input_nodes) > 1
        return f"{ROOT}.{self.paths[reader]}.input{f'.{index}' if several else ''}"

    def _asked(self, node: Node) -> QuantSpec | None:
        asked = node.meta.get(ACTIVATION)
        return asked if isinstance(asked, QuantSpec) else None
