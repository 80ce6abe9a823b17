import torch
from checks import check_pass
from rounds import Rounds, traced
from torch import nn
from torch.fx import symbolic_trace

from passes.fx.bind_input import BindInput
from passes.fx.fold_constants import FoldConstants
from passes.fx.graph import format_graph
from passes.fx.to_integer_codes import CODES, QUANTIZER, ToIntegerCodes


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.row = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.scale.exp() + self.row


def test_computes_once_what_depends_on_no_input_and_leaves_plain_parameters():
    check_pass(
        FoldConstants(),
        Scaled(),
        torch.rand(2, 4),
        before="""
            x = input
            scale = Parameter[]
            exp = scale.exp()
            mul = mul(x, exp)
            row = Parameter[4]
            add = add(mul, row)
            return add
        """,
        after="""
            x = input
            exp = Tensor[]
            mul = mul(x, exp)
            row = Parameter[4]
            add = add(mul, row)
            return add
        """,
        rewrites=1,
    )


class Shaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.row = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x + self.row.expand(x.shape)


def test_leaves_what_asks_an_input_for_its_shape():
    check_pass(
        FoldConstants(),
        Shaped(),
        torch.rand(2, 4),
        before="""
            x = input
            row = Parameter[4]
            x.shape = x.shape
            expand = row.expand(x.shape)
            add = add(x, expand)
            return add
        """,
    )


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.linear = Rounds(0.1, 7, 4), nn.Linear(4, 4)
        self.again = Rounds(0.05, 100)

    def forward(self, x, text):
        return x @ self.again(self.linear(self.quant(text))).transpose(0, 1)


def test_stores_the_codes_that_are_read_last_and_leaves_what_moves_them():
    torch.manual_seed(0)
    graph, x, text = traced(Texts()), torch.randn(3, 4), torch.randn(5, 4)
    with torch.no_grad():
        expected = graph(x, text)
        ToIntegerCodes()(graph)
        BindInput("text", text)(graph)
        assert FoldConstants()(graph).rewrites == 1
        assert (
            format_graph(graph)
            == """x = input
again.codes = Tensor[5, 4]
transpose = again.codes.transpose(0, 1)
again.values = Dequantize[8 bit](transpose)
matmul = matmul(x, again.values)
return matmul"""
        )
        assert torch.equal(graph(x), expected)
    assert graph.again.codes.dtype == torch.uint8
    stored = next(node for node in graph.graph.nodes if node.op == "get_attr")
    assert (stored.meta[CODES], stored.meta[QUANTIZER]) == ("again", "again")
    assert FoldConstants()(graph).rewrites == 0


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.row, self.norm = nn.Parameter(torch.randn(4)), nn.LayerNorm(4)

    def forward(self, x):
        return x + self.norm(self.row)


def test_a_value_that_a_module_computed_gets_a_name_beside_the_modules():
    graph = symbolic_trace(Module())
    with torch.no_grad():
        expected = graph(torch.ones(2, 4))
        assert FoldConstants()(graph).rewrites == 1
        assert format_graph(graph) == "x = input\nnorm_value = Tensor[4]\nadd = add(x, norm_value)\nreturn add"
        assert torch.equal(graph(torch.ones(2, 4)), expected)
