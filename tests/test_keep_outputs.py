import pytest
import torch
from checks import check_pass
from torch import nn
from torch.fx import symbolic_trace

from passes.base import PassError
from passes.fx.graph import format_graph
from passes.fx.keep_outputs import KeepOutputs


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, unread):
        y = self.first(x)
        return (y, self.second(y), self.third(y))


def test_drops_an_output_and_what_only_it_needs_but_no_input():
    graph = symbolic_trace(Three())
    assert KeepOutputs((0, 1), of=3)(graph).rewrites == 1
    assert (
        format_graph(graph)
        == """x = input
unread = input
first = Linear[4->4, bias](x)
second = Linear[4->4, bias](first)
return (first, second)"""
    )
    assert not hasattr(graph, "third")
    assert len(graph(torch.rand(1, 4), None)) == 2
    assert KeepOutputs((0, 1), of=3)(graph).rewrites == 0


def test_keeps_outputs_in_the_order_that_is_asked_for():
    graph = symbolic_trace(Three())
    expected = Three.forward(graph, torch.ones(1, 4), None)
    KeepOutputs((2, 0), of=3)(graph)
    got = graph(torch.ones(1, 4), None)
    assert [torch.equal(one, other) for one, other in zip(got, (expected[2], expected[0]), strict=True)] == [True, True]


def test_leaves_a_graph_that_returns_no_more_than_is_kept():
    check_pass(
        KeepOutputs((0, 1, 2), of=3),
        Three(),
        torch.rand(2, 4),
        torch.rand(1),
        before="""
            x = input
            unread = input
            first = Linear[4->4, bias](x)
            second = Linear[4->4, bias](first)
            third = Linear[4->4, bias](first)
            return (first, second, third)
        """,
    )


def test_refuses_a_graph_of_other_outputs():
    with pytest.raises(PassError, match="keep-outputs: the graph does not return a tuple of 4"):
        KeepOutputs((0, 1), of=4)(symbolic_trace(Three()))
    with pytest.raises(PassError, match="does not return a tuple"):
        KeepOutputs((0,), of=2)(symbolic_trace(nn.Sequential(nn.ReLU())))
