"""Tracing hands out only graphs that equal their model, and says at which line a model cannot be traced."""

import pytest
import torch
from torch import Tensor, nn

from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import SIZES, Add, Concat, Match, build
from crqat_fx.trace import trace


@pytest.mark.parametrize(("version", "size"), [(1, "pico"), (2, "pico"), (1, "s"), (2, "s")])
def test_named_modules_are_leaves_and_the_state_is_the_models(version, size):
    model = build(size, version)
    graph = trace(model)
    kinds = [type(graph.get_submodule(node.target)) for node in graph.graph.nodes if node.op == "call_module"]
    assert kinds.count(Match) == 3
    assert kinds.count(Concat) == 13
    assert kinds.count(Add) == sum(len(stage[1].blocks) for stage in stages(model)) + (version == 1)
    assert set(graph.state_dict()) == set(model.state_dict())
    assert all(graph.get_parameter(name) is parameter for name, parameter in model.named_parameters())


def stages(model: nn.Module) -> list[nn.Module]:
    darknet = model.backbone.image_model
    return [darknet.stage1, darknet.stage2, darknet.stage3, darknet.stage4]


def test_statistics_and_mode_are_left_alone():
    model = build("pico", 1).train()
    model.neck.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = trace(model)
    assert graph.training
    assert model.training
    assert not model.neck.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_every_size_traces():
    for size in SIZES[:3]:
        assert trace(build(size, 2)).graph.find_nodes(op="placeholder")


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class BakesTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x * self.seen


class KeepsAConstant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(2.0).view(2)


def test_a_data_dependent_branch_is_named_with_its_line_and_the_remedy():
    with pytest.raises(UserError, match=r"test_trace\.py:\d+: `if x\.sum\(\) > 0:`.*torch\.where") as refused:
        trace(Branches(), [(torch.ones(2),)])
    assert "\n" not in str(refused.value)


def test_a_graph_that_differs_from_its_model_is_refused():
    with pytest.raises(UserError, match=r"differ on example 0 \(2\)"):
        trace(BakesTheBatch(), [(torch.ones(2),)])


def test_a_graph_with_more_state_than_its_model_is_refused():
    with pytest.raises(UserError, match="added '_tensor_constant0'"):
        trace(KeepsAConstant(), [(torch.ones(2),)])


def test_a_foreign_module_needs_examples():
    with pytest.raises(ValueError, match="examples"):
        trace(nn.Linear(2, 2))
    graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), [(torch.ones(4, 2),)])
    assert graph(torch.ones(1, 2)).shape == (1, 3)


def test_a_leaf_of_the_users_own_is_kept_whole():
    graph = trace(nn.Sequential(Branches()), [(torch.ones(2),), (-torch.ones(2),)], leaves=(Branches,))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0"]
