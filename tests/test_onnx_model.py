"""What passes over ONNX models share, the small passes around onnx_ir's own, and that their check can fail."""

import numpy as np
import onnx_ir as ir
import pytest
from checks import check_lowering, onnx_model

from passes.base import PassError
from passes.onnx.drop_unused import DropUnused
from passes.onnx.merge_equal import MergeEqual
from passes.onnx.model import OnnxPass, Writer, format_model
from passes.onnx.shed_annotations import ShedAnnotations

TWICE = """
    g (float[2,3] x) => (float[2,3] y) {
        a = Mul (x, two)
        b = Mul (x, two)
        dead = Exp (x)
        same = Identity (b)
        y = Add (a, same)
    }
"""
TWO = {"two": np.float32(2)}


def test_writes_a_graph_as_text():
    assert format_model(onnx_model(TWICE, **TWO)).splitlines() == [
        "x: float[2, 3] = input",
        "a = Mul(x, float32(2))",
        "b = Mul(x, float32(2))",
        "dead = Exp(x)",
        "same = Identity(b)",
        "y = Add(a, same)",
        "return y: float[2, 3]",
    ]


def test_drops_what_no_output_needs():
    after = "x: float[2, 3] = input\na = Mul(x, float32(2))\nb = Mul(x, float32(2))\ny = Add(a, b)\nreturn y: float[2, 3]"
    check_lowering(DropUnused(), onnx_model(TWICE, **TWO), after=after, rewrites=2)


def test_computes_what_is_the_same_once():
    text = TWICE.replace("dead = Exp (x)", "").replace("same = Identity (b)", "").replace("same)", "b)")
    after = "x: float[2, 3] = input\na = Mul(x, float32(2))\ny = Add(a, a)\nreturn y: float[2, 3]"
    check_lowering(MergeEqual(), onnx_model(text, **TWO), after=after, rewrites=1)


def test_sheds_shapes_and_numbers_what_a_runtime_folds():
    text = """
        g (uint8[2,3] x) => (float[2,3] y) {
            scale = Mul (s, t)
            read = DequantizeLinear (x, scale)
            y = Exp (read)
        }
    """
    model = check_lowering(
        ShedAnnotations(),
        onnx_model(text, s=np.float32(0.1), t=np.float32(0.2)),
        after="""
            x: uint8[2, 3] = input
            n0 = Mul(float32(0.1), float32(0.2))
            read = DequantizeLinear(x, n0)
            y = Exp(read)
            return y: float[2, 3]
        """,
        rewrites=4,  # two names, two shapes
        atol=1e-4,
    )
    assert [node.name for node in model.graph][:2] == ["n0", "n1"]
    assert {value.name for value in ir.to_proto(model).graph.value_info} == {"s", "t"}  # initializers' own


class _Adds(OnnxPass):
    """Adds something to y before the graph returns it: a pass that breaks its promise."""

    name = "adds"

    def __init__(self, added: float, times: int = 1) -> None:
        self.added, self.times = added, times

    def rewrite(self, graph: ir.Model) -> int:
        if not self.times:
            return 0
        self.times -= 1
        again = "_" * self.times
        (end,) = graph.graph.outputs
        write = Writer(graph.graph)
        name, end.name = end.name, f"{end.name}_{again}"
        graph.graph.outputs[0] = write.op(
            "Add", [end, write.scalar(f"{name}_by{again}", self.added)], str(name), dtype=end.dtype, shape=list(end.shape or ())
        )
        return 1


ONE = "g (float[2,3] x) => (float[2,3] y) { y = Exp (x) }"
ADDED = "x: float[2, 3] = input\ny_ = Exp(x)\ny = Add(y_, float32({}))\nreturn y: float[2, 3]"


def test_the_check_accepts_a_pass_that_keeps_its_promises():
    check_lowering(_Adds(0), onnx_model(ONE), after=ADDED.format("0"), rewrites=1)


@pytest.mark.parametrize(
    ("rewriting", "after", "rewrites", "fault"),
    [
        (_Adds(0.5), ADDED.format("0.5"), 1, "is off by 0.5"),
        (_Adds(0), ADDED.format("0"), 2, "1 rewrites, 2 promised"),
        (_Adds(0), None, 1, "the graph after differs"),
        (_Adds(0, times=2), ADDED.format("0").replace("y_", "y__"), 1, "a second run found 1"),
    ],
)
def test_the_check_sees_a_broken_promise(rewriting: OnnxPass, after: str | None, rewrites: int, fault: str):
    with pytest.raises(AssertionError, match=fault):
        check_lowering(rewriting, onnx_model(ONE), after=after, rewrites=rewrites)


def test_the_check_wants_outputs_that_tell_something():
    with pytest.raises(AssertionError, match="constant"):
        check_lowering(DropUnused(), onnx_model("g (float[2,3] x) => (float[2,3] y) { y = Sub (x, x) }"))


class _Breaks(OnnxPass):
    """Writes a node that reads too little."""

    name = "breaks"

    def rewrite(self, graph: ir.Model) -> int:
        node = next(iter(graph.graph))
        graph.graph.insert_before(node, ir.Node("", "Add", [graph.graph.inputs[0]], outputs=[ir.Value(name="half")]))
        return 1


def test_a_pass_that_leaves_an_invalid_model_is_named():
    with pytest.raises(PassError, match="breaks: left a model that is not valid"):
        _Breaks()(onnx_model(ONE))
