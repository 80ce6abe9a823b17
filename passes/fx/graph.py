"""What every pass over a torch.fx graph shares: lint and recompile, the path of a node, and the graph as text.

The text is one line a node, `path = What[details](arguments)`, with the stage after `#` once stages are marked. A path is the module's own
name, or the owning module's and the function's, so that it says where a node stands and not when the tracer came by.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.base import Pass, PassError

STAGE = "stage"  # the key of a node's stage in `node.meta`
ASKING_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "layout")
ASKING_METHODS = ("size", "dim", "ndimension", "numel", "nelement")


class FxPass(Pass[GraphModule]):
    """A pass over a torch.fx graph: linted and recompiled after each rewrite."""

    def validate(self, graph: GraphModule) -> None:
        try:
            graph.graph.lint()
        except (RuntimeError, ValueError) as error:
            raise PassError(self.name, f"left a graph that is not valid: {str(error).splitlines()[0]}") from error
        graph.recompile()


def module_of(graph: GraphModule, node: Node) -> nn.Module | None:
    """The module a node calls, None where it calls something else."""
    if node.op != "call_module":
        return None
    module: nn.Module = graph
    for name in str(node.target).split("."):  # asked of every node, many times over: `get_submodule` takes five times as long
        module = module._modules[name]  # type: ignore[assignment]  # None stands for a module that was taken out
    return module


def is_quantizer(module: nn.Module | None) -> bool:
    """A module whose class says `is_quantizer = True` only rounds: patterns and stages look through it."""
    return getattr(type(module), "is_quantizer", False) is True


def nodes_in(value: Any) -> list[Node]:
    """The nodes in an argument, however it is nested."""
    if isinstance(value, Node):
        return [value]
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, dict):
        value = tuple(value.values())
    return [node for item in value for node in nodes_in(item)] if isinstance(value, tuple | list) else []


def ancestors(ends: Iterable[Node]) -> set[Node]:
    """Everything that the ends are computed from, and the ends."""
    return _reached(ends, lambda node: node.all_input_nodes)


def descendants(start: Node) -> set[Node]:
    """Everything that is computed from a node, and the node."""
    return _reached([start], lambda node: node.users)


def _reached(starts: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> set[Node]:
    found = set(starts)
    waiting = list(found)
    while waiting:
        for node in following(waiting.pop()):
            if node not in found:
                found.add(node)
                waiting.append(node)
    return found


def asks_about(node: Node) -> bool:
    """Whether a node reads no numbers, and asks only what shape they have, of which type and where they are."""
    if node.op == "call_method":
        return node.target in ASKING_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in ASKING_ATTRIBUTES


def readers_of_values(node: Node) -> list[Node]:
    """Who reads the node's numbers: not those that only ask about them."""
    return [user for user in node.users if not asks_about(user)]


def living(graph: GraphModule) -> set[Node]:
    """The nodes that the graph's inputs and outputs need, or that may change a value in place."""
    alive: set[Node] = set()
    for node in reversed(graph.graph.nodes):
        if node.op in ("placeholder", "output") or any(user in alive for user in node.users) or _may_write(graph, node):
            alive.add(node)
    return alive


def _may_write(graph: GraphModule, node: Node) -> bool:
    """Whether a node's work may show elsewhere than in what it returns."""
    module = module_of(graph, node)
    if module is not None:
        return getattr(module, "inplace", False) is True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or "out" in node.kwargs or any(value is True for value in (*node.args, *node.kwargs.values()))
    return in_place or bool(node.is_impure())


def owners_of(node: Node) -> list[str]:
    """The paths of the modules in whose forward the node was traced, from the outermost."""
    return [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]


def blocks_of(graph: GraphModule) -> dict[Node, str]:
    """For every node the block of the architecture it stands in: of the model's parts, the modules called right below. A module
    that only wraps another counts for nothing. A node outside every module is a block by itself."""
    chains: dict[Node, list[str]] = {}
    inside: dict[str, set[str]] = {}  # of every module, what is called in it; itself where it computes something of its own
    for node in graph.graph.nodes:
        owners = owners_of(node)
        chain = ["", *owners] if node.op != "call_module" or owners[-1:] == [node.target] else ["", *owners, str(node.target)]
        chains[node] = chain
        if len(chain) > 1:
            for outer, inner in zip(chain, [*chain[1:], chain[-1]], strict=True):
                inside.setdefault(outer, set()).add(inner)

    def below_wrappers(chain: list[str], start: int) -> int:
        while start + 1 < len(chain) and inside[chain[start]] == {chain[start + 1]}:
            start += 1
        return start

    blocks: dict[Node, str] = {}
    for node, chain in chains.items():
        part = below_wrappers(chain, min(below_wrappers(chain, 0) + 1, len(chain) - 1))
        blocks[node] = chain[min(part + 1, len(chain) - 1)] or node.name
    return blocks


def node_paths(graph: GraphModule) -> dict[Node, str]:
    """A name for every node, unique in the graph. Only repeats within one module (`pool`, `pool@2`) are told apart by their order."""
    paths: dict[Node, str] = {}
    seen: Counter[str] = Counter()
    for node in graph.graph.nodes:
        path = _path(node, paths)
        seen[path] += 1
        paths[node] = path if seen[path] == 1 else f"{path}@{seen[path]}"
    return paths


def _path(node: Node, paths: dict[Node, str]) -> str:
    if node.op not in ("call_function", "call_method"):
        return str(node.target)
    part = _part(node)
    if part is not None:
        return f"{paths[part[0]]}{part[1]}"
    owner = next(reversed(owners_of(node)), "")
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", type(node.target).__name__)
    return f"{owner}.{called}" if owner else str(called)


def _part(node: Node) -> tuple[Node, str] | None:
    """Where a node only takes a part of another, `x[0]` or `x.shape`: that other node and the part's spelling."""
    if len(node.args) != 2 or not isinstance(node.args[0], Node) or isinstance(node.args[1], Node):
        return None
    if node.target is operator.getitem:
        return node.args[0], f"[{_literal(node.args[1])}]"
    if node.target is getattr:
        return node.args[0], f".{node.args[1]}"
    return None


def format_graph(graph: GraphModule, left_out: Callable[[Node], bool] = lambda node: False) -> str:
    """The graph as text that can be compared: the same graph gives the same text, in any process. In the place of what is `left_out` stands
    what it reads."""
    paths = node_paths(graph)
    lines = []
    for node in graph.graph.nodes:
        if left_out(node):
            paths[node] = paths[node.all_input_nodes[0]]
        else:
            lines.append(_line(graph, node, paths))
    return "\n".join(lines)


def _line(graph: GraphModule, node: Node, paths: dict[Node, str]) -> str:
    stage = f"  # {node.meta[STAGE]}" if STAGE in node.meta else ""
    if node.op == "output":
        return f"return {_argument(node.args[0], paths)}{stage}"
    return f"{paths[node]} = {_value(graph, node, paths)}{stage}"


def _value(graph: GraphModule, node: Node, paths: dict[Node, str]) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        found: Any = graph
        for part in str(node.target).split("."):
            found = getattr(found, part)
        shape = f"[{', '.join(map(str, found.shape))}]" if isinstance(found, Tensor) else ""
        return f"{type(found).__name__}{shape}"
    taken = _part(node)
    if taken is not None:
        return f"{paths[taken[0]]}{taken[1]}"
    arguments = [_argument(argument, paths) for argument in node.args]
    arguments += [f"{key}={_argument(value, paths)}" for key, value in node.kwargs.items()]
    if node.op == "call_method":
        return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
    module = module_of(graph, node)
    called = getattr(node.target, "__name__", str(node.target)) if module is None else describe(module)
    return f"{called}({', '.join(arguments)})"


def _argument(value: Any, paths: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return paths[value]
    if isinstance(value, tuple | list):
        inside = ", ".join(_argument(item, paths) for item in value)
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return _literal(value)


def _literal(value: Any) -> str:
    if not isinstance(value, slice):
        return repr(value)
    parts = ["" if part is None else str(part) for part in (value.start, value.stop, value.step)]
    return ":".join(parts if parts[2] else parts[:2])


def describe(module: nn.Module) -> str:
    """The module's class and what decides its shape: `Conv2d[3->4, k3, s2, bias]`. What stands at its default is left out."""
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d):
        details = [f"{module.in_channels}->{module.out_channels}", f"k{_square(module.kernel_size)}"]
        for letter, value, default in (("s", module.stride, (1, 1)), ("p", module.padding, (0, 0)), ("d", module.dilation, (1, 1))):
            if value != default:
                details.append(f"{letter}{_square(value)}")
        if module.groups != 1:
            details.append(f"g{module.groups}")
        if module.bias is not None:
            details.append("bias")
        return f"{kind}[{', '.join(details)}]"
    if isinstance(module, nn.Linear):
        return f"{kind}[{module.in_features}->{module.out_features}{', bias' if module.bias is not None else ''}]"
    if isinstance(module, nn.MaxPool2d):
        return f"{kind}[k{_square(module.kernel_size)}, s{_square(module.stride)}, p{_square(module.padding)}]"
    if isinstance(module, nn.BatchNorm2d):
        return kind
    details_of_others = module.extra_repr()
    return f"{kind}[{details_of_others}]" if details_of_others else kind


def _square(value: str | int | Iterable[int]) -> str:
    if isinstance(value, str | int):
        return str(value)
    sides = list(value)
    return str(sides[0]) if len(set(sides)) == 1 else "x".join(map(str, sides))
