"""The check of passes must be able to fail: one broken pass or promise a test."""

import checks
import pytest
import torch
from checks import check_golden, check_pass
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.fx.fold_batchnorm import FoldBatchNorm
from passes.fx.graph import FxPass

PICTURE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
BEFORE = """
    x = input
    conv = Conv2d[3->4, k3](x)
    bn = BatchNorm2d(conv)
    return bn
"""
AFTER = """
    x = input
    conv = Conv2d[3->4, k3, bias](x)
    return conv
"""


class ConvBn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class DeletesTheNorm(FxPass):
    """A fold that forgets the fold."""

    name = "deletes-the-norm"

    def rewrite(self, graph: GraphModule) -> int:
        (norm,) = [node for node in graph.graph.nodes if node.target == "bn"]
        norm.replace_all_uses_with(norm.args[0])
        graph.graph.erase_node(norm)
        return 1


class DeletesTheNormOnce(DeletesTheNorm):
    name = "deletes-the-norm-once"

    def rewrite(self, graph: GraphModule) -> int:
        return super().rewrite(graph) if any(node.target == "bn" for node in graph.graph.nodes) else 0


class NeverDone(FxPass):
    name = "never-done"

    def rewrite(self, graph: GraphModule) -> int:
        return 1


class MovesAWeightOnTheSecondRun(FxPass):
    name = "moves-a-weight-on-the-second-run"
    runs = 0

    def rewrite(self, graph: GraphModule) -> int:
        self.runs += 1
        if self.runs > 1:
            with torch.no_grad():
                graph.get_parameter("conv.weight").add_(1)
        return 0


class ForgetsToRecompile(DeletesTheNormOnce):
    name = "forgets-to-recompile"

    def validate(self, graph: GraphModule) -> None:
        graph.graph.lint()


class GivesNaN(FxPass):
    name = "gives-nan"

    def rewrite(self, graph: GraphModule) -> int:
        with torch.no_grad():
            graph.get_parameter("conv.weight").fill_(float("nan"))
        return 0


class AddsBehindTheOutput(FxPass):
    """Puts a node between the norm and the graph's end by a method of its result; not found on a second run."""

    name = "adds-behind-the-output"
    method, arguments = "", ()

    def rewrite(self, graph: GraphModule) -> int:
        output = graph.graph.output_node()
        (value,) = output.args
        if value.target == self.method:
            return 0
        with graph.graph.inserting_before(output):
            output.args = (graph.graph.call_method(self.method, (value, *self.arguments)),)
        return 1


class ChangesTheShape(AddsBehindTheOutput):
    name = "changes-the-shape"
    method, arguments = "flatten", (2,)


class ChangesTheType(AddsBehindTheOutput):
    name = "changes-the-type"
    method = "double"


class ReturnsATuple(FxPass):
    name = "returns-a-tuple"

    def rewrite(self, graph: GraphModule) -> int:
        output = graph.graph.output_node()
        if isinstance(output.args[0], tuple):
            return 0
        output.args = ((output.args[0],),)
        return 1


class ReturnsItTwice(ReturnsATuple):
    name = "returns-it-twice"

    def rewrite(self, graph: GraphModule) -> int:
        output = graph.graph.output_node()
        if isinstance(output.args[0], tuple):
            return 0
        output.args = ((output.args[0], output.args[0]),)
        return 1


class LeavesAnInvalidGraph(FxPass):
    """A norm that stands behind what reads it, and a validation that does not look."""

    name = "leaves-an-invalid-graph"

    def rewrite(self, graph: GraphModule) -> int:
        convolution, norm = graph.graph.find_nodes(op="call_module")
        norm.append(convolution)
        return 1

    def validate(self, graph: GraphModule) -> None:
        graph.recompile()


class ForgetsParameters(FxPass):
    """Sets a parameter of the norm to where it starts, as a fold does that forgets it."""

    name = "forgets-parameters"

    def __init__(self, parameter: str, start: float) -> None:
        self.parameter, self.start = parameter, start

    def rewrite(self, graph: GraphModule) -> int:
        with torch.no_grad():
            graph.get_submodule("bn").state_dict()[self.parameter].fill_(self.start)
        return 0


class UndoesTheTextOnTheSecondRun(FxPass):
    """Counts nothing and computes the same; only the text tells."""

    name = "undoes-the-text-on-the-second-run"
    runs = 0

    def rewrite(self, graph: GraphModule) -> int:
        self.runs += 1
        if self.runs > 1:
            output = graph.graph.output_node()
            with graph.graph.inserting_before(output):
                output.args = (graph.graph.call_method("contiguous", (output.args[0],)),)
        return 0


class Copies(FxPass):
    name = "copies"

    def __call__(self, graph):
        result = super().__call__(graph)
        return type(result)(GraphModule(graph, graph.graph), result.steps)

    def rewrite(self, graph: GraphModule) -> int:
        return 0


def test_passes_a_good_pass():
    check_pass(FoldBatchNorm(), ConvBn(), PICTURE, before=BEFORE, after=AFTER, rewrites=1, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"before": BEFORE.replace("k3", "k1")}, "the graph before differs"),
        ({"after": AFTER.replace(", bias", "")}, "the graph after differs"),
        ({"after": None}, "the graph after differs"),
        ({"rewrites": 2}, "1 rewrites, 2 promised"),
        ({"atol": 0.0}, "is off by"),
    ],
)
def test_fails_a_good_pass_on_a_wrong_promise(changed, message):
    promise = {"before": BEFORE, "after": AFTER, "rewrites": 1, "atol": 1e-5} | changed
    with pytest.raises(AssertionError, match=message):
        check_pass(FoldBatchNorm(), ConvBn(), PICTURE, **promise)


@pytest.mark.parametrize(
    ("broken", "after", "rewrites", "message"),
    [
        (DeletesTheNormOnce(), AFTER.replace(", bias", ""), 1, "output 0 after the pass is off by"),
        (NeverDone(), BEFORE, 1, "a second run found 1 rewrites"),
        (MovesAWeightOnTheSecondRun(), BEFORE, 0, "output 0 after a second run is off by"),
        (ForgetsToRecompile(), AFTER.replace(", bias", ""), 1, "was not recompiled"),
        (GivesNaN(), BEFORE, 0, "is not finite"),
        (Copies(), BEFORE, 0, "passes rewrite in place"),
        (ChangesTheShape(), BEFORE.replace("return bn", "flatten = bn.flatten(2)\n    return flatten"), 1, "has the shape .2, 4, 36."),
        (
            ChangesTheType(),
            BEFORE.replace("return bn", "double = bn.double()\n    return double"),
            1,
            "is torch.float64, before torch.float32",
        ),
        (ReturnsATuple(), BEFORE.replace("return bn", "return (bn,)"), 1, "nested otherwise"),
        (ReturnsItTwice(), BEFORE.replace("return bn", "return (bn, bn)"), 1, "2 outputs after the pass, 1 before"),
        (ForgetsParameters("weight", 1), BEFORE, 0, "output 0 after the pass is off by"),
        (ForgetsParameters("bias", 0), BEFORE, 0, "output 0 after the pass is off by"),
        (ForgetsParameters("running_mean", 0), BEFORE, 0, "output 0 after the pass is off by"),
        (ForgetsParameters("running_var", 1), BEFORE, 0, "output 0 after the pass is off by"),
        (UndoesTheTextOnTheSecondRun(), BEFORE, 0, "the graph after a second run differs"),
    ],
    ids=lambda value: value.name if isinstance(value, FxPass) else "",
)
def test_fails_a_broken_pass(broken, after, rewrites, message):
    with pytest.raises(AssertionError, match=message):
        check_pass(broken, ConvBn(), PICTURE, before=BEFORE, after=after, rewrites=rewrites, atol=1e-5)


def test_fails_a_pass_that_leaves_an_invalid_graph():
    after = """
        x = input
        bn = BatchNorm2d(conv)
        conv = Conv2d[3->4, k3](x)
        return bn
    """
    with pytest.raises(RuntimeError, match="before it has been defined"):
        check_pass(LeavesAnInvalidGraph(), ConvBn(), PICTURE, before=BEFORE, after=after, rewrites=1)


class Affine(nn.Module):
    """Parameters outside every norm, and norms of other kinds, as they start."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.layer, self.batch = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.chosen = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.batch(self.layer(x)) * self.scale + self.shift


def test_draws_whatever_parameter_is_as_it_starts_and_leaves_what_a_test_chose():
    model = Affine()
    checks.randomise(model)
    started = {
        name: torch.ones_like(value) if name.endswith(("weight", "scale", "var")) else torch.zeros_like(value)
        for name, value in model.state_dict().items()
    }
    drawn = {name for name, value in model.state_dict().items() if not (value == started[name]).any()}
    assert drawn >= set(model.state_dict()) - {"chosen", "batch.num_batches_tracked"}
    assert model.chosen.tolist() == [1, 2]
    assert (model.batch.running_var > 0).all()


def test_refuses_numbers_that_are_not_finite_before():
    class Overflows(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) / 0

    before = BEFORE.replace("return bn", "truediv = truediv(bn, 0)\n    return truediv")
    with pytest.raises(AssertionError, match="output 0 of the graph before is constant or not finite"):
        check_pass(NeverDone(), Overflows(), PICTURE, before=before, rewrites=1)


def test_refuses_inputs_from_which_nothing_can_be_told():
    class Dead(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * 0

    with pytest.raises(AssertionError, match="constant"):
        check_pass(FoldBatchNorm(), Dead(), PICTURE, before=BEFORE.replace("return bn", "mul = mul(bn, 0)\n    return mul"), rewrites=1)


def test_a_golden_that_differs_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "GOLDEN", tmp_path)
    monkeypatch.delenv(checks.REGENERATE, raising=False)
    with pytest.raises(AssertionError, match="there is no golden"):
        check_golden("graph", "a")
    (tmp_path / "graph.txt").write_text("a\n", encoding="utf-8")
    check_golden("graph", "a")
    with pytest.raises(AssertionError, match="differs"):
        check_golden("graph", "b")


def test_regenerating_a_golden_fails_the_run_and_is_refused_in_ci(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "GOLDEN", tmp_path)
    monkeypatch.setenv(checks.REGENERATE, "1")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(AssertionError, match="refused"):
        check_golden("graph", "a")
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("CI")
    with pytest.raises(AssertionError, match="wrote"):
        check_golden("graph", "a")
    assert (tmp_path / "graph.txt").read_text(encoding="utf-8") == "a\n"
