import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from passes.base import PassError
from passes.fx.bind_input import BindInput
from passes.fx.graph import format_graph


class Adds(nn.Module):
    def forward(self, x, text):
        return x + text * text


def test_an_input_becomes_a_buffer_of_its_name():
    graph, value = symbolic_trace(Adds()), torch.tensor([1.0, 2.0])
    assert BindInput("text", value)(graph).rewrites == 1
    assert format_graph(graph) == "x = input\ntext = Tensor[2]\nmul = mul(text, text)\nadd = add(x, mul)\nreturn add"
    value.zero_()  # the graph has a copy
    assert graph(torch.zeros(2)).tolist() == [1.0, 4.0]
    assert list(graph.state_dict()) == ["text"]
    assert BindInput("text", value)(graph).rewrites == 0


def test_leaves_a_graph_without_such_an_input():
    graph = symbolic_trace(Adds())
    before = format_graph(graph)
    assert BindInput("words", torch.zeros(2))(graph).rewrites == 0
    assert format_graph(graph) == before


def test_refuses_a_name_that_the_model_uses():
    graph = symbolic_trace(Adds())
    graph.text = nn.ReLU()
    with pytest.raises(PassError, match="an attribute 'text'"):
        BindInput("text", torch.zeros(2))(graph)
