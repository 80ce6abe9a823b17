"""Tracing hands out only graphs that equal their model, and says at which line a model cannot be traced."""

import pytest
import torch
from torch import Tensor, nn

from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import SIZES, Add, Concat, Match, YoloWorld, build, config_for
from crqat_fx.trace import prove_equal, trace, trace_unproved, yolo_world_examples


@pytest.mark.parametrize(("version", "size"), [(1, "pico"), (2, "pico"), (1, "s"), (2, "s")])
def test_named_modules_are_leaves_and_the_state_is_the_models(version, size):
    model = build(size, version)
    graph = trace(model)
    kinds = [type(graph.get_submodule(node.target)) for node in graph.graph.nodes if node.op == "call_module"]
    assert kinds.count(Match) == 3
    assert kinds.count(Concat) == 13 + (version == 1)
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
    modes = {name: module.training for name, module in model.named_modules()}
    graph = trace(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: module.training for name, module in graph.named_modules()}.items() <= modes.items()
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


def traced(x) -> bool:
    return not isinstance(x, Tensor)


class BakesTheBatchOfPictures(YoloWorld):
    def forward(self, images, text):
        count = 1 if traced(images) else len(images)
        return super().forward(images[:count].expand(text.shape[0], -1, -1, -1), text)


class BakesTheHeight(YoloWorld):
    def forward(self, images, text):
        height = 32 if traced(images) else images.shape[2]
        return super().forward(torch.cat([images, images], 2)[:, :, :height], text)


class BakesTheWidth(YoloWorld):
    def forward(self, images, text):
        width = 64 if traced(images) else images.shape[3]
        return super().forward(torch.cat([images, images], 3)[:, :, :, :width], text)


class BakesTheVocabulary(YoloWorld):
    def forward(self, images, text):
        return super().forward(images, text[:, : 3 if traced(text) else text.shape[1]])


@pytest.mark.parametrize("kind", [BakesTheBatchOfPictures, BakesTheHeight, BakesTheWidth, BakesTheVocabulary])
def test_only_the_second_size_and_vocabulary_tell_a_model_that_bakes_in_the_first(kind):
    model = kind(config_for("pico", 2))
    first, second = yolo_world_examples(model)
    graph = trace_unproved(model)
    prove_equal(model, graph, [first])
    with pytest.raises(UserError, match="on example 1 "):
        prove_equal(model, graph, [second, first][::-1])
    with pytest.raises(UserError, match="on example 1 "):
        trace(model)


class Asserts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        return x


class LooksUp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + [1, 2][2 if traced(x) else 0]


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if traced(x):
            return x.no_such_method()
        return x


class ChangesTheType(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() if traced(x) else x.double()


class ChangesTheShape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.flatten(0) if traced(x) else x.view(1, -1)


class ChangesTheNesting(nn.Module):
    def forward(self, x: Tensor):
        return (x, (x,)) if traced(x) else (x, x)


class ChangesANumber(nn.Module):
    def forward(self, x: Tensor):
        return x, 1 if traced(x) else 2


class ChangesTheSignOfZero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.0 if traced(x) else x * -0.0


class FailsItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(7, 7)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Asserts, r"test_trace\.py:\d+: `assert isinstance\(x, Tensor\)`: Asserts cannot be traced \(AssertionError.*leaves="),
        (LooksUp, r"test_trace\.py:\d+: `return x \+ .*`: LooksUp cannot be traced \(IndexError: list index.*leaves="),
        (
            Fails,
            r"test_trace\.py:\d+: `return x\.no_such_method\(\)`: the traced graph fails on example 0 \(2\) \(AttributeError: .*baked in",
        ),
        (ChangesTheType, r"test_trace\.py:\d+: `return x\.float\(\).*output 0 is torch\.float32, not torch\.float64; look for"),
        (ChangesTheShape, r"test_trace\.py:\d+: `return x \+ .*output 0 has the shape \[2\], not \[1, 2\]; look for"),
        (ChangesTheNesting, r"ChangesTheNesting: .* nested otherwise; return"),
        (ChangesANumber, r"output 1 is 1, not 2; look for"),
        (ChangesTheSignOfZero, r"test_trace\.py:\d+: `return x \* 0\.0.*output 0 has other values; look for"),
        (FailsItself, r"test_trace\.py:\d+: `return x\.view\(7, 7\)`: the model fails on example 0 \(2\) \(RuntimeError: .*give examples"),
    ],
)
def test_whatever_goes_wrong_is_one_line_with_its_source_and_the_remedy(model, message, capfd):
    with pytest.raises(UserError, match=message) as refused:
        trace(model(), [(torch.ones(2),)])
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_not_a_number_is_equal_to_itself():
    assert trace(nn.Sequential(nn.ReLU()), [(torch.tensor([float("nan"), 1]),)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_type_is_proved_in_it(dtype):
    model = build("pico", 1).to(dtype)
    assert all(value.dtype == dtype for example in yolo_world_examples(model) for value in example)
    assert trace(model)


def test_a_model_without_numbers_is_refused_unless_it_is_asked_for_unproved():
    with torch.device("meta"):
        model = build("pico", 2).train()
    with pytest.raises(UserError, match=r"YoloWorld: is on the meta device.*trace_unproved"):
        trace(model)
    graph = trace_unproved(model)
    assert graph.training
    assert [node.target for node in graph.graph.nodes] == [node.target for node in trace(build("pico", 2)).graph.nodes]


@pytest.mark.parametrize("examples", [None, []])
def test_a_graph_is_not_handed_out_without_a_proof(examples):
    with pytest.raises(ValueError, match="examples"):
        trace(nn.Linear(2, 2), examples)


def test_an_empty_list_of_examples_is_no_proof_of_a_detector():
    with pytest.raises(ValueError, match="examples"):
        trace(build("pico", 2), [])


def test_a_foreign_module_needs_examples():
    graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), [(torch.ones(4, 2),)])
    assert graph(torch.ones(1, 2)).shape == (1, 3)


def test_a_leaf_of_the_users_own_is_kept_whole():
    graph = trace(nn.Sequential(Branches()), [(torch.ones(2),), (-torch.ones(2),)], leaves=(Branches,))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0"]
