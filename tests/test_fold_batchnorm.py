"""fold-batchnorm: the fold, and a near miss for each thing it must leave alone."""

import logging

import pytest
import torch
from checks import check_pass, randomise
from torch import Tensor, nn
from torch.fx import symbolic_trace

from crqat_fx.models.yolo_world import build
from crqat_fx.trace import trace
from passes.fx.fold_batchnorm import FoldBatchNorm

PICTURE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
ATOL = 1e-5  # a handful of float32 roundings on values of order 1
BEFORE = """
    x = input
    conv = Conv2d[3->4, k3](x)
    bn = BatchNorm2d(conv)
    return bn
"""


class ConvBn(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, bias=bias)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def test_folds_batchnorm_into_the_convolution_before_it():
    check_pass(
        FoldBatchNorm(),
        ConvBn(),
        PICTURE,
        before=BEFORE,
        after="""
            x = input
            conv = Conv2d[3->4, k3, bias](x)
            return conv
        """,
        rewrites=1,
        atol=ATOL,
    )


def test_folds_into_a_convolution_that_has_a_bias_already():
    check_pass(
        FoldBatchNorm(),
        ConvBn(bias=True),
        PICTURE,
        before=BEFORE.replace("k3", "k3, bias"),
        after="""
            x = input
            conv = Conv2d[3->4, k3, bias](x)
            return conv
        """,
        rewrites=1,
        atol=ATOL,
    )


def test_a_gamma_of_zero_folds_to_finite_weights():
    model = ConvBn()
    with torch.no_grad():
        model.bn.weight[1] = 0
        model.bn.weight[2] = -2
    graph = symbolic_trace(model.eval())
    FoldBatchNorm()(graph)
    assert not graph.conv.weight[1].any()
    assert torch.isfinite(graph.conv.weight).all()
    assert torch.isfinite(graph.conv.bias).all()
    assert torch.allclose(graph(PICTURE), model(PICTURE), rtol=0, atol=ATOL)


def test_folds_each_of_a_chain():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = ConvBn(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    check_pass(
        FoldBatchNorm(),
        Chain(),
        PICTURE,
        before="""
            x = input
            first.conv = Conv2d[3->4, k3](x)
            first.bn = BatchNorm2d(first.conv)
            second.0 = Conv2d[4->4, k1, bias](first.bn)
            second.1 = BatchNorm2d(second.0)
            second.2 = SiLU(second.1)
            return second.2
        """,
        after="""
            x = input
            first.conv = Conv2d[3->4, k3, bias](x)
            second.0 = Conv2d[4->4, k1, bias](first.conv)
            second.2 = SiLU(second.0)
            return second.2
        """,
        rewrites=2,
        atol=ATOL,
    )


class ReadTwice(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class ConvCalledTwice(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x)


class NormCalledTwice(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(self.other(x))


class NoRunningStatistics(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4, track_running_stats=False)


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight / self.weight.std(), self.bias)


class OfASubclass(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.conv = StandardisedConv2d(3, 4, 3)


class NormBeforeConv(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x))


ADDED = """
    x = input
    conv = Conv2d[3->4, k3](x)
    bn = BatchNorm2d(conv)
    {}
    add = add(bn, {})
    return add
"""


@pytest.mark.parametrize(
    ("model", "before", "reason"),
    [
        (ReadTwice, ADDED.replace("    {}\n", "").format("conv"), "has 2 readers"),
        (ConvCalledTwice, ADDED.format("conv@2 = Conv2d[3->4, k3](x)", "conv@2"), "Conv2d is called 2 times"),
        (
            NormCalledTwice,
            ADDED.format("other = Conv2d[3->4, k3, bias](x)\n    bn@2 = BatchNorm2d(other)", "bn@2"),
            "BatchNorm2d is called 2 times",
        ),
        (NoRunningStatistics, BEFORE, "statistics of the batch"),
    ],
)
def test_leaves_a_near_miss_and_says_why(model, before, reason, caplog):
    with caplog.at_level(logging.DEBUG, logger="passes.fx.fold_batchnorm"):
        check_pass(FoldBatchNorm(), model(), PICTURE, before=before, rewrites=0)
    assert reason in caplog.text
    assert "left bn after" in caplog.text


def test_leaves_a_convolution_that_is_shared_under_two_names():
    graph = symbolic_trace(ConvCalledTwice().eval())
    graph.alias = graph.conv
    _, second = [node for node in graph.graph.nodes if node.target == "conv"]
    second.target = "alias"
    graph.recompile()
    before = ADDED.format("alias = Conv2d[3->4, k3](x)", "alias")
    check_pass(FoldBatchNorm(), graph, PICTURE, before=before)


def test_a_reader_of_the_shape_alone_does_not_hinder():
    class ShapeRead(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y).flatten(2).unflatten(2, y.shape[2:])

    check_pass(
        FoldBatchNorm(),
        ShapeRead(),
        PICTURE,
        before="""
            x = input
            conv = Conv2d[3->4, k3](x)
            bn = BatchNorm2d(conv)
            flatten = bn.flatten(2)
            conv.shape = conv.shape
            conv.shape[2:] = conv.shape[2:]
            unflatten = flatten.unflatten(2, conv.shape[2:])
            return unflatten
        """,
        after="""
            x = input
            conv = Conv2d[3->4, k3, bias](x)
            flatten = conv.flatten(2)
            conv.shape = conv.shape
            conv.shape[2:] = conv.shape[2:]
            unflatten = flatten.unflatten(2, conv.shape[2:])
            return unflatten
        """,
        rewrites=1,
        atol=ATOL,
    )


def test_leaves_a_subclass_that_may_compute_something_else(caplog):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nn.Conv2d) or super().is_leaf_module(module, name)

    model = OfASubclass().eval()
    graph = torch.fx.GraphModule(model, Tracer().trace(model))
    with caplog.at_level(logging.DEBUG, logger="passes.fx.fold_batchnorm"):
        check_pass(FoldBatchNorm(), graph, PICTURE, before=BEFORE.replace("Conv2d[3->4, k3]", "StandardisedConv2d[3->4, k3, bias]"))
    assert "StandardisedConv2d" in caplog.text


def test_leaves_a_norm_before_a_convolution():
    check_pass(
        FoldBatchNorm(),
        NormBeforeConv(),
        PICTURE,
        before="""
            x = input
            bn = BatchNorm2d(x)
            conv = Conv2d[3->4, k3](bn)
            return conv
        """,
    )


class Transposed(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(3, 4, 3, bias=False)


class Functional(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(nn.functional.conv2d(x, self.conv.weight))


class FunctionalNorm(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var)


class Between(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.between = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.between(self.conv(x)))


class Synchronised(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.SyncBatchNorm(4)


class WeightRead(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv.weight.mean()


class BetaRead(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn.bias.mean()


class HookOnTheConvolution(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(lambda module, inputs, output: output * 2)


class HookOnTheNorm(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.bn.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


class SpectralNorm(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.spectral_norm(self.conv)


class Parametrized(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(self.conv)


class InPlace(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.mul_(2)
        return self.bn(y)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Transposed, "left bn after conv: ConvTranspose2d is no Conv2d"),
        (Functional, "left bn after conv2d: what it norms is made by no module"),
        (FunctionalNorm, "left batch_norm after conv: the norm is a function"),
        (Between, "left bn after between: SiLU is no Conv2d"),
        (Synchronised, "left bn after conv: SyncBatchNorm is no BatchNorm2d"),
        (WeightRead, "left bn after conv: the parameters of the Conv2d are read elsewhere"),
        (BetaRead, "left bn after conv: the parameters of the BatchNorm2d are read elsewhere"),
        (HookOnTheConvolution, "left bn after conv: the Conv2d has hooks"),
        (HookOnTheNorm, "left bn after conv: the BatchNorm2d has hooks"),
        (SpectralNorm, "left bn after conv: the Conv2d has hooks"),
        (Parametrized, "left bn after conv: ParametrizedConv2d is no Conv2d, and may compute something else"),
        (InPlace, "left bn after conv: the convolution's output has 2 readers"),
    ],
)
def test_leaves_what_only_looks_like_it_says_why_and_computes_the_same(model, reason, caplog):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nn.Conv2d) or super().is_leaf_module(module, name)

    net = model().eval()
    randomise(net)
    graph = torch.fx.GraphModule(net, Tracer().trace(net))
    state = list(graph.state_dict())
    with caplog.at_level(logging.DEBUG, logger="passes.fx.fold_batchnorm"), torch.no_grad():
        expected = net(PICTURE)
        assert FoldBatchNorm()(graph).rewrites == 0
        assert torch.equal(graph(PICTURE), expected)
    assert caplog.messages == [f"fold-batchnorm: {reason}"]
    assert list(graph.state_dict()) == state


def test_leaves_a_norm_behind_a_quantizer(caplog):
    class Round(nn.Module):
        is_quantizer = True

        def forward(self, x: Tensor) -> Tensor:
            return torch.round(x * 4) / 4

    graph = symbolic_trace(ConvBn().eval())
    graph.add_submodule("round", Round())
    convolution, norm = graph.graph.find_nodes(op="call_module")
    with graph.graph.inserting_after(convolution):
        norm.args = (graph.graph.call_module("round", (convolution,)),)
    graph.recompile()
    with caplog.at_level(logging.DEBUG, logger="passes.fx.fold_batchnorm"):
        assert FoldBatchNorm()(graph).rewrites == 0
    assert "left bn after round: Round is no Conv2d" in caplog.text


@pytest.mark.parametrize("training", ["norm", "both"])
def test_leaves_a_norm_in_training_mode(training, caplog):
    graph = symbolic_trace(ConvBn().eval())
    graph.bn.train()
    graph.conv.train(training == "both")
    with caplog.at_level(logging.DEBUG, logger="passes.fx.fold_batchnorm"):
        assert FoldBatchNorm()(graph).rewrites == 0
    assert "the norm is in training mode" in caplog.text


def test_a_convolution_in_training_mode_computes_the_same_and_keeps_its_mode():
    model = ConvBn().eval()
    randomise(model)
    graph = symbolic_trace(model)
    graph.conv.train()
    expected = graph(PICTURE)
    assert FoldBatchNorm()(graph).rewrites == 1
    assert graph.conv.training
    assert torch.allclose(graph(PICTURE), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("options", [{"groups": 2}, {"bias": False}])
def test_folds_groups_and_a_norm_without_affine(options):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, **options), nn.BatchNorm2d(6, affine=False)).eval()
    randomise(model)
    graph = symbolic_trace(model)
    x = torch.randn(2, 4, 8, 8)
    expected = graph(x)
    assert FoldBatchNorm()(graph).rewrites == 1
    assert torch.allclose(graph(x), expected, rtol=0, atol=ATOL)


class DeadReader(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        torch.relu(y)
        return self.bn(y)


class SizeReader(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y).reshape(y.size(0), y.size(1), -1)


@pytest.mark.parametrize("model", [DeadReader, SizeReader])
def test_who_needs_no_numbers_of_the_convolution_does_not_hinder(model):
    net = model().eval()
    randomise(net)
    graph = symbolic_trace(net)
    with torch.no_grad():
        assert FoldBatchNorm()(graph).rewrites == 1
        assert torch.allclose(graph(PICTURE), net(PICTURE), rtol=0, atol=ATOL)


@pytest.mark.parametrize(("model", "rewrites"), [(ConvBn, 1), (ReadTwice, 0)])
def test_only_the_folded_norm_goes_and_whatever_else_the_graph_holds_stays(model, rewrites):
    graph = symbolic_trace(model().eval())
    graph.add_module("kept", nn.Linear(1, 1))
    graph.add_module("keeper", nn.Module())
    before = list(graph.state_dict())
    assert FoldBatchNorm()(graph).rewrites == rewrites
    folded = [name for name in before if not name.startswith("bn.")] + ["conv.bias"]
    assert sorted(graph.state_dict()) == sorted(folded if rewrites else before)
    assert graph.get_submodule("keeper") is not None


def test_the_model_that_was_traced_keeps_its_own_weights():
    model = ConvBn().eval()
    randomise(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    FoldBatchNorm()(symbolic_trace(model))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("version", [1, 2])
def test_folds_every_norm_of_a_detector(version):
    torch.manual_seed(0)
    model = build("pico", version).eval()
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.abs_().clamp_(0.3, 0.7)  # keeps thirty layers of random numbers in the range of float32
            module.running_var.clamp_(0.5)
    graph = trace(model)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    images, text = torch.rand(1, 3, 64, 96), nn.functional.normalize(torch.randn(1, 5, 512), dim=2)
    with torch.no_grad():
        before = model(images, text)
        assert FoldBatchNorm()(graph).rewrites == norms
        after = graph(images, text)
    for expected, got in zip(sum(before, ()), sum(after, ()), strict=True):
        assert expected.std() > 1e-3
        assert torch.allclose(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
