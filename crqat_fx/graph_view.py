"""A graph as one looks at it: quantizers are no nodes of their own, they stand on the edges that carry their codes.

Of a prepared graph the nodes that compute, the block and the path of each, and for every operand that is read the quantizer whose codes it
holds. Codes that are only handed on (views, pools: the target knows) are still its codes. A graph without quantizers is seen as it is.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import Graph, GraphModule, Node

from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.recipe import Target
from passes.fx.graph import asks_about, blocks_of, module_of, node_paths
from passes.fx.placement import carries, operands, quantizes

FLOAT_BITS = 32
HANDS_ON_NOTHING = Target("none")


@dataclass(frozen=True)
class Read:
    """One operand of a node. `quantizer`: by name the one whose codes are read, if any. `bits`: what the numbers are read in, 32 in float;
    None for a shape, for a parameter, and where unrounded numbers are only handed on."""

    source: Node
    reader: Node
    quantizer: str | None
    bits: int | None


@dataclass(frozen=True, eq=False)
class GraphView:
    """`graph` is without quantizers, and shares its modules with the original; `seen` leads from every node of the original to the node it
    is seen as, from a quantizer to what it rounds."""

    graph: GraphModule
    seen: Mapping[Node, Node]
    reads: tuple[Read, ...]
    blocks: Mapping[Node, str]
    paths: Mapping[Node, str]  # as in the original
    quantizers: Mapping[str, FakeQuantize]  # of activations, by name, and where they round: those of weights are in their layers

    def weight_quantizer(self, node: Node) -> FakeQuantize | None:
        found = getattr(module_of(self.graph, node), "weight_fake_quant", None)
        return found if isinstance(found, FakeQuantize) else None

    def bits_read(self, nodes: Collection[Node]) -> set[int]:
        """By some nodes, from each other or from elsewhere."""
        inside = set(nodes)
        return {read.bits for read in self.reads if read.reader in inside and read.bits is not None}

    def bits_of_weights(self, nodes: Collection[Node]) -> set[int]:
        layers = [node for node in nodes if isinstance(module_of(self.graph, node), nn.Conv2d | nn.Linear)]
        found = [self.weight_quantizer(node) for node in layers]
        return {FLOAT_BITS if quantizer is None else quantizer.spec.bits for quantizer in found}

    def leaving(self, nodes: Collection[Node]) -> list[Node]:
        """Of some nodes those whose numbers others read."""
        inside = set(nodes)
        return list(dict.fromkeys(read.source for read in self.reads if read.source in inside and read.reader not in inside))


def view(graph: GraphModule, target: Target = HANDS_ON_NOTHING) -> GraphView:
    bare = Graph()
    seen: dict[Node, Node] = {}
    quantizers: dict[str, FakeQuantize] = {}
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        if quantizes(graph, node):
            if isinstance(module, FakeQuantize):
                quantizers[str(node.target)] = module
            seen[node] = seen[node.all_input_nodes[0]]
        else:
            seen[node] = bare.node_copy(node, seen.__getitem__)
    shown = GraphModule(graph, bare, type(graph).__name__)
    paths = {seen[node]: path for node, path in node_paths(graph).items() if not quantizes(graph, node)}
    fixed = _without_numbers(bare)
    reads = []
    for reader in graph.graph.nodes:
        for index, source in operands(reader) if not quantizes(graph, reader) else ():
            name = _codes(graph, source, target)
            counts = not (seen[source] in fixed or asks_about(reader) or _is_like(reader, index) or carries(graph, target, reader))
            bits = quantizers[name].spec.bits if name is not None else FLOAT_BITS if counts else None
            reads.append(Read(seen[source], seen[reader], name, bits))
    return GraphView(shown, seen, tuple(reads), blocks_of(shown), paths, quantizers)


def _without_numbers(graph: Graph) -> set[Node]:
    """What depends on no input's numbers: parameters, shapes, and what is computed from them."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or asks_about(node) or (node.all_input_nodes and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _is_like(reader: Node, index: int) -> bool:
    """`x.view_as(y)` reads no number of y."""
    return reader.op == "call_method" and str(reader.target).endswith("_as") and index > 0


def _codes(graph: GraphModule, node: Node, target: Target) -> str | None:
    """The quantizer whose codes a node's values are."""
    while not isinstance(module_of(graph, node), FakeQuantize):
        if not carries(graph, target, node):
            return None
        node = node.all_input_nodes[0]
    return str(node.target)
