"""Computes once what depends on no input, and stores it: as codes where it is read as codes.

    y = f(x, Dequantize(Quantize(g(c))))   becomes   y = f(x, Dequantize(codes)), a buffer `codes` under the path of the Quantize
    y = f(x, g(c))                         becomes   y = f(x, v), v a buffer under the node's path

What only moves codes about stays behind them, and is left for the runtime to fold: the codes keep the quantizer's name and layout.
Left alone: what depends on an input, or asks for a shape that does; buffers and their Dequantize.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from passes.base import PassError
from passes.fx.codes import Dequantize, Quantize
from passes.fx.graph import FxPass, module_of, node_paths
from passes.fx.to_integer_codes import CODES


class FoldConstants(FxPass):
    """Computes what depends on no input, and stores it."""

    name = "fold-constants"

    def rewrite(self, graph: GraphModule) -> int:
        constant: set[Node] = set()
        for node in graph.graph.nodes:
            if node.op == "get_attr" or (node.all_input_nodes and node.op != "output" and constant.issuperset(node.all_input_nodes)):
                constant.add(node)
        wanted = [node for node in constant if any(user not in constant for user in node.users)]
        paths = node_paths(graph)
        values: dict[Node, Any] = {}
        stored = 0
        for node in self._to_store(graph, wanted):
            with torch.no_grad():
                value = value_of(graph, node, values)
            if isinstance(value, Tensor):
                self._store(graph, node, paths[node], value)
                stored += 1
        graph.graph.eliminate_dead_code()
        graph.delete_all_unused_submodules()
        return stored

    def _to_store(self, graph: GraphModule, wanted: list[Node]) -> list[Node]:
        """The nodes whose value is stored: of codes those that quantize, of floats the last before they are read."""
        found: dict[Node, None] = {}
        waiting = list(wanted)
        while waiting:
            node = waiting.pop()
            if node.op == "get_attr":
                continue
            module = module_of(graph, node)
            if isinstance(module, Dequantize) or (CODES in node.meta and not isinstance(module, Quantize)):
                waiting += node.all_input_nodes
            else:
                found[node] = None
        return sorted(found)

    def _store(self, graph: GraphModule, node: Node, path: str, value: Tensor) -> None:
        owner, _, name = (f"{path}.codes" if isinstance(module_of(graph, node), Quantize) else path).rpartition(".")
        module = _owner(graph, owner)
        name = f"{name}_value" if hasattr(module, name) else name  # where the module that computed it has the name
        if hasattr(module, name):
            raise PassError(self.name, f"{path} cannot be stored: the model has something else called {name}")
        module.register_buffer(name, value.detach().clone())
        with graph.graph.inserting_before(node):
            attribute = graph.graph.get_attr(f"{owner}.{name}" if owner else name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.graph.erase_node(node)


def _owner(graph: GraphModule, path: str) -> nn.Module:
    if not path:
        return graph
    try:
        return graph.get_submodule(path)
    except AttributeError:
        graph.add_submodule(path, nn.Module())
        return graph.get_submodule(path)


def value_of(graph: GraphModule, node: Node, known: dict[Node, Any] | None = None) -> Any:
    """What a node that depends on no input computes. `known`: what was computed before, kept for the next."""
    values = {} if known is None else known
    if node not in values:
        args, kwargs = map_arg((node.args, node.kwargs), lambda each: value_of(graph, each, values))
        values[node] = _call(graph, node, args, kwargs)
    return values[node]


def _call(graph: GraphModule, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return getattr(graph.get_submodule(owner), name)
    if node.op == "call_module":
        return graph.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)  # all that is left
    return node.target(*args, **kwargs)
