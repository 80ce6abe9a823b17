"""Graphs as text: paths that say where a node stands, modules by what decides their shape, and what every pass over a graph checks."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from passes.base import PassError
from passes.fx.graph import FxPass, blocks_of, describe, format_graph, living, node_paths, nodes_in, readers_of_values


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(x, [1, 2], dim=1)
        return self.pool(self.pool(torch.cat([rest, first], 1))) * self.scale.view(3, 1, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Block(), Block()

    def forward(self, x: Tensor):
        return (self.left(x), [self.right(x)])


class Reversed(Net):
    def forward(self, x: Tensor):
        right = self.right(x)
        return (self.left(x), [right])


def test_a_graph_is_one_line_a_node():
    assert format_graph(symbolic_trace(Block())).splitlines() == [
        "x = input",
        "split = split(x, [1, 2], dim=1)",
        "split[0] = split[0]",
        "split[1] = split[1]",
        "cat = cat([split[1], split[0]], 1)",
        "pool = MaxPool2d[k3, s1, p1](cat)",
        "pool@2 = MaxPool2d[k3, s1, p1](pool)",
        "scale = Parameter[3]",
        "view = scale.view(3, 1, 1)",
        "mul = mul(pool@2, view)",
        "return mul",
    ]


def test_the_lines_do_not_depend_on_the_order_of_the_visit():
    lines, other = (sorted(format_graph(symbolic_trace(net)).splitlines()) for net in (Net(), Reversed()))
    assert lines == other
    assert "left.split[1] = left.split[1]" in lines
    assert "return (left.mul, [right.mul])" in lines


def test_paths_are_unique():
    graph = symbolic_trace(Net())
    paths = node_paths(graph)
    assert len(set(paths.values())) == len(paths) == len(graph.graph.nodes)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Conv2d(3, 4, 3, bias=False), "Conv2d[3->4, k3]"),
        (nn.Conv2d(4, 8, (1, 3), stride=2, padding=(0, 1), groups=2), "Conv2d[4->8, k1x3, s2, p0x1, g2, bias]"),
        (nn.Conv2d(4, 8, 3, padding="same", dilation=2, bias=False), "Conv2d[4->8, k3, psame, d2]"),
        (nn.Linear(3, 5), "Linear[3->5, bias]"),
        (nn.Linear(3, 5, bias=False), "Linear[3->5]"),
        (nn.BatchNorm2d(4), "BatchNorm2d"),
        (nn.MaxPool2d(2), "MaxPool2d[k2, s2, p0]"),
        (nn.SiLU(), "SiLU"),
        (nn.Upsample(scale_factor=2, mode="nearest"), "Upsample[scale_factor=2.0, mode='nearest']"),
    ],
)
def test_a_module_is_described_by_what_decides_its_shape(module, text):
    assert describe(module) == text


def test_blocks_are_the_modules_right_below_the_parts_and_wrappers_count_for_nothing():
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.many = Block(), nn.ModuleList([Block(), nn.SiLU()])

        def forward(self, x: Tensor) -> Tensor:
            return self.many[1](self.many[0](self.one(x)))

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Part()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.tail = Wrapper(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.head(x)) + x

    blocks = blocks_of(symbolic_trace(Model()))
    assert list(dict.fromkeys(blocks.values())) == [
        "x",
        "head.inner.one",
        "head.inner.many.0",
        "head.inner.many.1",
        "tail",
        "add",
        "output",
    ]


def test_the_nodes_of_an_argument_are_found_however_it_is_nested():
    graph = torch.fx.Graph()
    a, b, c, d = (graph.placeholder(name) for name in "abcd")
    assert nodes_in((a, [slice(None, b), 1], {"key": (c,)}, "text", d)) == [a, b, c, d]
    assert nodes_in(slice(1, 2)) == []


def test_who_asks_about_a_value_does_not_read_it():
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.T + x.shape[0] + x.size(1) + x.dim() + x.numel() + x.ndim + torch.zeros(1, dtype=x.dtype, device=x.device)

    graph = symbolic_trace(Asks())
    (x,) = graph.graph.find_nodes(op="placeholder")
    assert len(x.users) == 8
    assert [node.args for node in readers_of_values(x)] == [(x, "T")]


def test_what_may_change_a_value_in_place_is_alive():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inplace, self.relu = nn.ReLU(inplace=True), nn.ReLU()
            self.unread = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            self.inplace(y)
            self.relu(y)
            torch.relu(y)
            torch.relu_(y)
            y.add_(1)
            nn.functional.relu(y, True)
            torch.add(y, 1, out=y)
            torch.neg(self.unread)
            return y

    graph = symbolic_trace(InPlace())
    alive = living(graph)
    dead = [str(node.target) if node.op in ("call_module", "get_attr") else node.target for node in graph.graph.nodes if node not in alive]
    assert dead == ["relu", torch.relu, "unread", torch.neg]


class UsesBeforeItIsMade(FxPass):
    name = "uses-before-it-is-made"

    def rewrite(self, graph: GraphModule) -> int:
        *_, last, output = graph.graph.nodes
        last.prepend(output)
        return 1


def test_a_pass_that_leaves_an_invalid_graph_is_named():
    with pytest.raises(
        PassError, match=r"uses-before-it-is-made: left a graph that is not valid: .*used before it has been defined"
    ) as caught:
        UsesBeforeItIsMade()(symbolic_trace(Block()))
    assert "\n" not in str(caught.value)
