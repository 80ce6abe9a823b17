"""SiLU as a sigmoid and a product: modules and functions, and nothing else."""

import torch
import torch.nn.functional as F
from checks import check_pass
from torch import nn
from torch.fx import symbolic_trace

from passes.fx.graph import STAGE
from passes.fx.split_silu import SplitSilu

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.activate = nn.SiLU()

    def forward(self, x):
        return self.activate(x + 1) * torch.sigmoid(x), F.silu(x)


def test_splits_a_module_and_a_function():
    check_pass(
        SplitSilu(),
        Both(),
        X,
        before="""
            x = input
            add = add(x, 1)
            activate = SiLU(add)
            sigmoid = sigmoid(x)
            mul = mul(activate, sigmoid)
            silu = silu(x, inplace=False)
            return (mul, silu)
        """,
        after="""
            x = input
            add = add(x, 1)
            activate.sigmoid = sigmoid(add)
            activate.SiLU = SiLU(add, activate.sigmoid)
            sigmoid = sigmoid(x)
            mul = mul(activate.SiLU, sigmoid)
            sigmoid@2 = sigmoid(x)
            SiLU = SiLU(x, sigmoid@2)
            return (mul, SiLU)
        """,
        rewrites=2,
        atol=1e-6,
    )


class Similar(nn.Module):
    def __init__(self):
        super().__init__()
        self.hard, self.activate = nn.Hardswish(), nn.GELU()

    def forward(self, x):
        return self.hard(x), self.activate(x), x * torch.sigmoid(x)


def test_leaves_other_activations_and_a_product_that_is_split_already():
    check_pass(
        SplitSilu(),
        Similar(),
        X,
        before="""
            x = input
            hard = Hardswish(x)
            activate = GELU[approximate='none'](x)
            sigmoid = sigmoid(x)
            mul = mul(x, sigmoid)
            return (hard, activate, mul)
        """,
    )


def test_both_parts_take_the_stage_of_the_whole():
    graph = symbolic_trace(Both())
    for node in graph.graph.nodes:
        node.meta[STAGE] = node.name
    SplitSilu()(graph)
    stages = {node.name: node.meta[STAGE] for node in graph.graph.nodes}
    assert [stage for name, stage in stages.items() if name != stage] == ["activate", "activate", "silu", "silu"]
