"""Holds a prepared graph against the recipe it was made from: none missed, none twice, bits and axes as written.

Placing walks from producers to readers; this walks back, from every operand that is read to the first quantizer before it. Then it asks of
every integer producer what stands behind it, and of every quantizer whom it serves. What differs is an error that names the node.
"""

from collections.abc import Iterator, Mapping

from torch.fx import GraphModule, Node

from crqat_fx.errors import UserError
from crqat_fx.quantize.backend import weight_spec
from crqat_fx.quantize.integer_bias import HeadBias
from crqat_fx.recipe import FLOAT, WIDEST, QuantRule, Target
from passes.fx.graph import module_of, node_paths
from passes.fx.placement import PATH, carries, entry, kinds, knows, operands, quantizes, readers, signed_spec, spec_of
from passes.spec import QuantSpec

_REPORT = "report this, with the model and the recipe: it is a fault of the passes"


def hold_to_recipe(graph: GraphModule, rules: Mapping[str, QuantRule], target: Target) -> None:
    """`rules`: of every path of the graph as it was traced, which each node still carries as `meta["path"]`."""
    paths = node_paths(graph)
    served: set[Node] = set()
    for node in graph.graph.nodes:
        if _quantizes(graph, node) or node.target is getattr:
            continue
        _check_weight(graph, node, paths[node], rules, target)
        if carries(graph, target, node):
            continue
        for index, source in operands(node):
            wanted = _wanted(graph, node, index, source, rules, target)
            found = _quantizer_before(graph, source, target)
            given = None if found is None else spec_of(graph, found)
            if given != wanted:
                what = f"operand {index} has {_described(given)}, and the recipe asks for {_described(wanted)}"
                raise UserError(what, where=paths[node], remedy=_REPORT)
            if found is not None:
                served.add(found)
                _check_in_a_row(graph, found, target)
        served |= _check_output(graph, node, paths[node], rules, target)
    for node in graph.graph.nodes:
        if _quantizes(graph, node) and node not in served:
            raise UserError("is a quantizer that serves nothing the recipe asks for", where=str(node.target), remedy=_REPORT)


def _check_weight(graph: GraphModule, node: Node, path: str, rules: Mapping[str, QuantRule], target: Target) -> None:
    module = module_of(graph, node)
    asked = _rule(rules, node).weight if knows(target.weights, kinds(graph, node)) else None
    wanted = None if asked is None else weight_spec(target, asked)
    given = getattr(getattr(module, "weight_fake_quant", None), "spec", None)
    if given != wanted:
        what = f"its weight has {_described(given)}, and the recipe asks for {_described(wanted)}"
        raise UserError(what, where=path, remedy=_REPORT)


def _wanted(graph: GraphModule, reader: Node, index: int, source: Node, rules: Mapping[str, QuantRule], target: Target) -> QuantSpec | None:
    """How the recipe, as the target understands it, wants an operand; None for float."""
    named, rule = kinds(graph, reader), _rule(rules, reader)
    if rule.activation is not None and index in entry(target.operands, named, ()):
        return signed_spec(target, named, rule.activation)
    producer = _producer(graph, source, target)
    if producer.op == "get_attr" or producer.target is getattr:
        return None
    if rule.activation is not None and knows(target.reads, named):
        return QuantSpec(entry(target.reads, named, None) or rule.activation.bits)
    return QuantSpec(WIDEST) if _is_integer(graph, producer, rules, target) else None


def _is_integer(graph: GraphModule, node: Node, rules: Mapping[str, QuantRule], target: Target) -> bool:
    return _rule(rules, node).activation is not None and knows(target.outputs, kinds(graph, node))


def _check_output(graph: GraphModule, node: Node, path: str, rules: Mapping[str, QuantRule], target: Target) -> set[Node]:
    """Behind an integer producer stands one quantizer, at the widest of what its readers ask for. What is read only in a weight's place
    has its quantizers there."""
    if not _is_integer(graph, node, rules, target):
        return set()
    found_readers = list(readers(graph, target, node))
    if all(_quantizes(graph, reader) and spec_of(graph, reader).symmetric for reader, _, _ in found_readers):
        return set()
    behind = {reader for reader, _, source in found_readers if source is node and _quantizes(graph, reader)}
    if len(behind) != 1 or any(reader not in behind for reader, _, _ in found_readers):
        raise UserError(f"its output has {len(behind)} quantizers, or a reader without", where=path, remedy=_REPORT)
    (quantizer,) = behind
    named = kinds(graph, node)
    asked = [_wanted(graph, *found, rules, target) for found in _final_readers(graph, target, node)]
    wanted = QuantSpec(entry(target.outputs, named, None) or max(spec.bits for spec in asked if spec is not None))
    given, fixed = spec_of(graph, quantizer), getattr(module_of(graph, quantizer), "fixed", None)
    known = entry(target.fixed, named, None)
    if given != wanted or fixed != (None if known is None else (known, 0)):
        raise UserError(f"its output has {_described(given)}, and {_described(wanted)} are asked for", where=path, remedy=_REPORT)
    return behind


def _final_readers(graph: GraphModule, target: Target, node: Node) -> Iterator[tuple[Node, int, Node]]:
    """Who reads a node's values, quantizers and what hands codes on looked through."""
    for reader, index, source in readers(graph, target, node):
        if _quantizes(graph, reader):
            yield from _final_readers(graph, target, reader)
        else:
            yield reader, index, source


def _quantizes(graph: GraphModule, node: Node) -> bool:
    """Biases are rounded as their products ask, and not the recipe."""
    return quantizes(graph, node) and not isinstance(module_of(graph, node), HeadBias)


def _rule(rules: Mapping[str, QuantRule], node: Node) -> QuantRule:
    return rules.get(node.meta.get(PATH, ""), FLOAT)


def _producer(graph: GraphModule, node: Node, target: Target) -> Node:
    """Who computed what a node hands on."""
    while _quantizes(graph, node) or carries(graph, target, node):
        node = node.all_input_nodes[0]
    return node


def _quantizer_before(graph: GraphModule, node: Node, target: Target) -> Node | None:
    while not _quantizes(graph, node):
        if not carries(graph, target, node):
            return None
        node = node.all_input_nodes[0]
    return node


def _check_in_a_row(graph: GraphModule, quantizer: Node, target: Target) -> None:
    """Two in a row are right where the second is narrower, for a reader that asks for less, or where it takes a weight's place."""
    before = _quantizer_before(graph, quantizer.all_input_nodes[0], target)
    if before is None:
        return
    first, second = spec_of(graph, before), spec_of(graph, quantizer)
    if not target.outputs or (second.bits >= first.bits and second.symmetric == first.symmetric):
        raise UserError(f"quantizes what {before.target} quantized", where=str(quantizer.target), remedy=_REPORT)


def _described(spec: object) -> str:
    if not isinstance(spec, QuantSpec):
        return "no quantizer"
    axis = "" if spec.channel_axis is None else f", a scale for each index of axis {spec.channel_axis}"
    return f"{spec.bits} bits{', symmetric' if spec.symmetric else ''}{', odd' if spec.odd else ''}{axis}"
