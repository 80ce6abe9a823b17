"""What a table of quantizers says of a node: how it is called in one, which operands it reads, and what hands codes on.

A table is data from above: mappings from kinds to what is done. A kind is the class of a module (or a class it derives from) or the name
of a function or method.
"""

import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from passes.fx.graph import is_quantizer, module_of, nodes_in
from passes.spec import QuantSpec

ACTIVATION, WEIGHT = "activation", "weight"  # keys in `node.meta`: the QuantSpec that is asked for, None for float
PATH = "path"  # and the node's path as it was traced, which goes to all that is made of it
WIDEST = 8
V = TypeVar("V")


class Table(Protocol):
    """Where a target has quantizers, by kind."""

    @property
    def operands(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def signed(self) -> Mapping[str, int | None]: ...
    @property
    def reads(self) -> Mapping[str, int | None]: ...
    @property
    def outputs(self) -> Mapping[str, int | None]: ...
    @property
    def fixed(self) -> Mapping[str, float]: ...
    @property
    def carries(self) -> Collection[str]: ...
    @property
    def weight_bits(self) -> int: ...


def kinds(graph: GraphModule, node: Node) -> tuple[str, ...]:
    """What a table may call a node, the most particular first; nothing for inputs, parameters, outputs and shapes."""
    module = module_of(graph, node)
    if module is not None:
        if isinstance(module, nn.Upsample) and module.mode != "nearest":
            return ()  # it mixes values: what comes out are no codes
        return tuple(each.__name__ for each in type(module).__mro__)
    if node.op == "call_method":
        return (str(node.target),)
    if node.op == "call_function" and node.target is not getattr:
        return (getattr(node.target, "__name__", type(node.target).__name__),)
    return ()


def entry(table: Mapping[str, V], named: tuple[str, ...], default: V) -> V:
    """The table's entry for the first of the kinds that it knows."""
    return next((table[kind] for kind in named if kind in table), default)


def knows(table: Collection[str], named: tuple[str, ...]) -> bool:
    return any(kind in table for kind in named)


def operands(node: Node) -> Iterator[tuple[int, Node]]:
    """What a node reads, with the position of the argument it stands in; -1 by keyword."""
    for index, argument in enumerate(node.args):
        for source in nodes_in(argument):
            yield index, source
    for value in node.kwargs.values():
        for source in nodes_in(value):
            yield -1, source


def replace_operand(reader: Node, index: int, source: Node, new: Node) -> None:
    """The one operand, or all equal ones of an argument that is a list or given by keyword."""
    if 0 <= index < len(reader.args) and reader.args[index] is source:
        reader.update_arg(index, new)
        return
    reader.replace_input_with(source, new)


def carries(graph: GraphModule, table: Table, node: Node) -> bool:
    """Whether a node hands on the codes of its first operand. A product does so only where the other factor is a number."""
    if not knows(table.carries, kinds(graph, node)):
        return False
    return node.target not in (operator.mul, torch.mul) or len(node.all_input_nodes) == 1


def readers(graph: GraphModule, table: Table, node: Node) -> Iterator[tuple[Node, int, Node]]:
    """Who reads a node's values, what hands them on looked through: the reader, the operand, and the node it reads them from."""
    for user in node.users:
        if user.target is getattr:
            continue
        handed = carries(graph, table, user)
        for index, source in operands(user):
            if source is not node:
                continue
            if not handed:
                yield user, index, node
            elif index == 0:  # the others give a shape
                yield from readers(graph, table, user)


def quantizes(graph: GraphModule, node: Node) -> bool:
    return is_quantizer(module_of(graph, node))


def spec_of(graph: GraphModule, node: Node) -> QuantSpec:
    """How a quantizer's node quantizes."""
    spec = getattr(module_of(graph, node), "spec", None)
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"{node.target} is a quantizer without a QuantSpec")
    return spec


def signed_spec(table: Table, named: tuple[str, ...], asked: QuantSpec) -> QuantSpec:
    """How an operand of its own is quantized for a kind: as asked, or as weights are where it takes their place."""
    if not knows(table.signed, named):
        return asked
    return QuantSpec(min(asked.bits, table.weight_bits), symmetric=True, channel_axis=entry(table.signed, named, None))
