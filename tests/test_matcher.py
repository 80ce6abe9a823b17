"""The matcher compares module classes, not names; ignores literals; looks through quantizers."""

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from passes.fx.matcher import Matcher


class Round(nn.Module):
    """A quantizer as far as a graph is concerned."""

    is_quantizer = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4


class Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, Round) or super().is_leaf_module(module, name)


def traced(module: nn.Module) -> GraphModule:
    return GraphModule(module, Tracer().trace(module))


class Pair(nn.Module):
    """The pattern: a convolution and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 1, 1), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Catted(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y], self.axis).flatten(self.axis)


class Net(nn.Module):
    """Two pairs under other names, of other sizes, the second with quantizers in it where asked."""

    def __init__(self, quantized: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU())
        self.quantizer = Round() if quantized else nn.Identity()
        self.again = Round() if quantized else nn.Identity()
        self.last = nn.Conv2d(4, 2, 1, bias=False)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.activation(self.again(self.quantizer(self.last(y)))) + 1


def names(matches) -> list[list[str]]:
    return [[str(node.target) for node in match.nodes] for match in matches]


def test_finds_modules_by_their_class_whatever_they_are_called():
    graph = traced(Net(quantized=True))
    found = Matcher(graph).find(traced(Pair()))
    assert names(found) == [["stem.1", "stem.0"], ["activation", "last"]]


def test_gives_the_nodes_of_the_graph_itself_where_quantizers_were_looked_through():
    graph = traced(Net(quantized=True))
    _, second = Matcher(graph).find(traced(Pair()))
    assert all(node.graph is graph.graph for node in (*second.nodes, *second.inputs, *second.outputs))
    assert [str(node.target) for node in second.inputs] == ["stem.1"]
    assert [str(node.target) for node in second.outputs] == ["activation"]


def test_looks_through_quantizers_only():
    assert names(Matcher(traced(Net(quantized=False))).find(traced(Pair()))) == [["stem.1", "stem.0"]]


def test_looks_through_what_says_that_it_is_a_quantizer_by_class_and_not_by_a_tensor_or_flag_of_its_own():
    class Claims(nn.Identity):
        def __init__(self) -> None:
            super().__init__()
            self.is_quantizer = torch.tensor(1)

    net = Net(quantized=True)
    net.quantizer = Claims()
    graph = GraphModule(net, type("T", (Tracer,), {"is_leaf_module": lambda self, m, name: not isinstance(m, nn.Sequential)})().trace(net))
    assert names(Matcher(graph).find(traced(Pair()))) == [["stem.1", "stem.0"]]


def test_a_subclass_matches_its_base_and_not_the_other_way_round():
    class Special(nn.Conv2d):
        pass

    special = Pair()
    special.a = Special(1, 1, 1)
    leaf = type("T", (Tracer,), {"is_leaf_module": lambda self, m, name: isinstance(m, Special) or Tracer.is_leaf_module(self, m, name)})
    graph = GraphModule(special, leaf().trace(special))
    assert len(Matcher(graph).find(traced(Pair()))) == 1
    assert not Matcher(traced(Pair())).find(graph)


def test_literals_are_not_compared_but_never_stand_for_a_tensor():
    class Shifted(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(x + y)

    class ByNumber(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + 2)

    class ByAnother(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + 3)

    assert len(Matcher(symbolic_trace(Catted(2))).find(symbolic_trace(Catted(1)))) == 1
    assert len(Matcher(symbolic_trace(ByAnother())).find(symbolic_trace(ByNumber()))) == 1
    assert not Matcher(symbolic_trace(Shifted())).find(symbolic_trace(ByNumber()))


def test_a_value_read_from_outside_is_no_match():
    class Leaks(Pair):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y

    assert not Matcher(traced(Leaks())).find(traced(Pair()))


def test_a_reader_that_nobody_needs_hides_no_match():
    class Dead(Pair):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            torch.relu(y)
            return self.b(y)

    graph = traced(Dead())
    assert names(Matcher(graph).find(traced(Pair()))) == [["b", "a"]]
    (relu,) = [node for node in graph.graph.nodes if node.target is torch.relu]
    convolution = relu.args[0]
    assert [str(node.target) for node in Matcher(graph).readers(convolution)] == ["b"]


def test_one_module_called_twice_is_found_twice():
    class Twice(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.b(self.a(x))))

    assert len(Matcher(traced(Twice())).find(traced(Pair()))) == 2


def test_a_pattern_with_dead_code_is_refused():
    class Dead(Pair):
        def forward(self, x: Tensor) -> Tensor:
            self.b(x)
            return self.a(x)

    with pytest.raises(AssertionError, match="dead code"):
        Matcher(traced(Pair())).find(traced(Dead()))


def test_readers_look_through_quantizers():
    graph = traced(Net(quantized=True))
    (last,) = [node for node in graph.graph.nodes if node.target == "last"]
    assert [str(node.target) for node in Matcher(graph).readers(last)] == ["activation"]


def test_literals_may_be_given_by_position_by_name_or_not_at_all():
    class ByName(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, y], dim=1).flatten(start_dim=2, end_dim=3)

    class LeftOut(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, y]).flatten()

    forms = [symbolic_trace(module) for module in (Catted(1), ByName(), LeftOut())]
    assert [len(Matcher(graph).find(pattern)) for graph in forms for pattern in forms] == [1] * 9


def test_a_literal_stands_for_no_list_of_tensors():
    class Joined(nn.Module):
        def forward(self, first, x: Tensor) -> Tensor:
            return x

    class Leaves(Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, Joined) or super().is_leaf_module(module, name)

    class OfANumber(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.join = Joined()

        def forward(self, x: Tensor) -> Tensor:
            return self.join(2, x)

    class OfAList(OfANumber):
        def forward(self, x: Tensor) -> Tensor:
            return self.join([1, [x]], x)

    class OfNumbers(OfANumber):
        def forward(self, x: Tensor) -> Tensor:
            return self.join([1, [2]], x)

    number, tensors, numbers = (GraphModule(module, Leaves().trace(module)) for module in (OfANumber(), OfAList(), OfNumbers()))
    assert not Matcher(tensors).find(number)
    assert not Matcher(number).find(tensors)
    assert len(Matcher(numbers).find(number)) == 1


def test_an_input_of_the_pattern_is_a_tensor():
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(x + y)

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + 2)

    class Flipped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.sub(2, x))

    class Difference(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(torch.sub(x, y))

    assert not Matcher(symbolic_trace(Shifted())).find(symbolic_trace(Sum()))
    assert not Matcher(symbolic_trace(Flipped())).find(symbolic_trace(Difference()))


def test_one_module_under_two_names_is_found_under_both():
    class Shared(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.c = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + self.b(self.c(x))

    graph = traced(Shared())
    second = [node for node in graph.graph.nodes if node.target == "a"][1]
    graph.add_submodule("c", graph.a)
    second.target = "c"
    graph.recompile()
    assert names(Matcher(graph).find(traced(Pair()))) == [["b", "a"], ["b", "c"]]

    class Pattern(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x))

    pattern = traced(Pattern())
    pattern.add_submodule("d", pattern.a)
    [node for node in pattern.graph.nodes if node.target == "a"][1].target = "d"
    assert names(Matcher(traced(Pattern())).find(pattern)) == [["a", "a"]]


class Scaled(nn.Module):
    def __init__(self, scale: Tensor | nn.Parameter) -> None:
        super().__init__()
        self.scale = scale if isinstance(scale, nn.Parameter) else nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * self.scale


def test_any_parameter_or_buffer_stands_for_any_other():
    parameter, buffer = symbolic_trace(Scaled(nn.Parameter(torch.ones(3)))), symbolic_trace(Scaled(torch.zeros(2, 1)))
    assert len(Matcher(parameter).find(buffer)) == 1
    assert len(Matcher(buffer).find(parameter)) == 1


@pytest.mark.parametrize("ask", [lambda x: x.shape[0], lambda x: x.size(0), lambda x: x.dim(), lambda x: x.ndim])
def test_who_only_asks_for_the_shape_is_no_reader(ask):
    class Asks(Pair):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) * ask(y)

    graph = traced(Asks())
    (match,) = Matcher(graph).find(traced(Pair()))
    assert all(node.graph is graph.graph for node in (*match.nodes, *match.inputs, *match.outputs))
    (convolution,) = graph.graph.find_nodes(op="call_module", target="a")
    assert [str(node.target) for node in Matcher(graph).readers(convolution)] == ["b"]


def test_what_changes_a_value_in_place_reads_it_even_if_nobody_reads_on():
    class Shifts(Pair):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y.add_(1)
            return self.b(y)

    assert not Matcher(traced(Shifts())).find(traced(Pair()))


def test_says_at_debug_where_a_place_differs(caplog):
    class Near(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d = nn.Linear(1, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(self.d(self.b(self.c(self.b(y))))) + y

    pattern = traced(Pair())
    pattern.__class__.__name__ = "Pair"
    with caplog.at_level(logging.DEBUG, logger="passes.fx.matcher"):
        assert not Matcher(traced(Near())).find(pattern)
    assert [record.message for record in caplog.records] == [
        "no Pair at b: c is not as a is there",
        "no Pair at b: d is not as a is there",
        "no Pair at b, a: something else reads what is inside",
    ]
