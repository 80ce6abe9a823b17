"""The checks that state every promise of a pass in one call. They raise, and never print."""

import difflib
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.utils import _pytree as pytree

from passes.base import Pass
from passes.fx.graph import format_graph
from passes.onnx.model import drop_dead, format_model

GOLDEN = Path(__file__).parent / "golden"
REGENERATE = "REGENERATE_GOLDEN"


def check_pass(
    rewriting: Pass[GraphModule],
    model: nn.Module,
    *inputs: Tensor,
    before: str,
    after: str | None = None,
    rewrites: int = 0,
    atol: float = 0.0,
) -> GraphModule:
    """Holds a pass to everything it promises, and returns the rewritten graph.

    The text before and after (`after` not given: left as it was), the exact count of rewrites, the outputs with parameters and statistics
    drawn at random (how they are nested, their types and shapes, and their numbers: rtol 0, `atol` as stated), the code compiled from the
    graph, a valid graph, and a second run that finds nothing.
    `model` is traced with torch.fx in evaluation mode unless it is a graph already.
    """
    graph = model if isinstance(model, GraphModule) else symbolic_trace(model.eval())
    randomise(graph)
    _same_text("before", before, format_graph(graph))
    expected = _outputs(graph, inputs)
    for number, output in enumerate(expected.tensors):
        if not bool(torch.isfinite(output).all()) or output.numel() < 2 or float(output.double().std()) == 0:
            raise AssertionError(f"output {number} of the graph before is constant or not finite: nothing could be told from it")

    result = rewriting(graph)
    if result.graph is not graph:
        raise AssertionError("the pass returned another graph: passes rewrite in place")
    _same_text("after", before if after is None else after, format_graph(graph))
    if result.rewrites != rewrites:
        raise AssertionError(f"{result.rewrites} rewrites, {rewrites} promised")
    graph.graph.lint()
    if graph.code != graph.graph.python_code("self").src:
        raise AssertionError("the graph was not recompiled: its code is the old one")
    _same_outputs("after the pass", expected, _outputs(graph, inputs), atol)

    again = rewriting(graph)
    if again.rewrites:
        raise AssertionError(f"a second run found {again.rewrites} rewrites: the first left some, or undid itself")
    _same_text("after a second run", before if after is None else after, format_graph(graph))
    _same_outputs("after a second run", expected, _outputs(graph, inputs), atol)
    return graph


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Parameters and norm statistics as training leaves them: with fresh ones a norm does nothing, and could be deleted unseen.

    Drawn is every norm's statistics, and every floating parameter that is still 0 or 1 all over: what a test chose stays.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(variance, Tensor):
                mean.copy_(torch.randn(mean.shape, generator=generator))
                variance.copy_(torch.rand(variance.shape, generator=generator) * 2 + 0.1)
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and (bool((parameter == 1).all()) or bool((parameter == 0).all())):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))


def check_golden(name: str, text: str) -> None:
    """Holds a text to tests/golden. With REGENERATE_GOLDEN set it is written instead and the test fails: no run passes by writing."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get(REGENERATE):
        if os.environ.get("CI"):
            raise AssertionError(f"{REGENERATE} is refused where CI is set: goldens are made by hand and read before they are committed")
        path.write_text(text + "\n", encoding="utf-8")
        raise AssertionError(f"wrote {path.name}: read the difference, then run without {REGENERATE}")
    if not path.is_file():
        raise AssertionError(f"there is no golden {path.name}: make it with {REGENERATE}=1, read it, and commit it")
    _same_text(name, path.read_text(encoding="utf-8"), text)


@dataclass(frozen=True)
class Outputs:
    """What a graph returned: its tensors, and how they are nested."""

    tensors: tuple[Tensor, ...]
    form: pytree.TreeSpec


def _outputs(graph: GraphModule, inputs: tuple[Tensor, ...]) -> Outputs:
    with torch.no_grad():
        tensors, form = pytree.tree_flatten(graph(*inputs))
    return Outputs(tuple(tensor.clone() for tensor in tensors), form)


def _same_text(what: str, expected: str, got: str) -> None:
    wanted, given = (textwrap.dedent(text).strip().splitlines() for text in (expected, got))
    wanted, given = ([line.rstrip() for line in lines] for lines in (wanted, given))
    if wanted != given:
        difference = "\n".join(difflib.unified_diff(wanted, given, "expected", "got", lineterm="", n=2))
        raise AssertionError(f"the graph {what} differs:\n{difference}")


def _same_outputs(when: str, expected: Outputs, got: Outputs, atol: float) -> None:
    if len(expected.tensors) != len(got.tensors):
        raise AssertionError(f"{len(got.tensors)} outputs {when}, {len(expected.tensors)} before")
    if expected.form != got.form:
        raise AssertionError(f"the outputs {when} are nested otherwise than before")
    for number, (wanted, given) in enumerate(zip(expected.tensors, got.tensors, strict=True)):
        if wanted.shape != given.shape:
            raise AssertionError(f"output {number} {when} has the shape {tuple(given.shape)}, before {tuple(wanted.shape)}")
        if wanted.dtype != given.dtype:
            raise AssertionError(f"output {number} {when} is {given.dtype}, before {wanted.dtype}")
        if not bool(torch.isfinite(given).all()):
            raise AssertionError(f"output {number} {when} is not finite")
        error = float((wanted - given).abs().max())
        if not error <= atol:
            raise AssertionError(f"output {number} {when} is off by {error:.3g}, more than {atol:.3g}")


# --- passes over ONNX models ---

PLAIN, OPTIMISED = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


def onnx_model(text: str, **constants: np.ndarray) -> ir.Model:
    """A model of ONNX's own text form, `name (inputs) => (outputs) { nodes }`, with initializers, and every shape inferred."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{textwrap.dedent(text)}')
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True))


def check_lowering(
    rewriting: Pass[ir.Model], model: ir.Model, *, after: str | None = None, rewrites: int = 0, atol: float = 0.0
) -> ir.Model:
    """Holds a pass over an ONNX model to everything it promises, and returns the rewritten model.

    The text after (not given: left as it was), the exact count of rewrites, the outputs in onnxruntime without optimizations (codes
    equal, floats within `atol`) and with all of them (codes one step apart at most), nothing left that no output needs, and a second run
    that finds nothing. Inputs are drawn.
    """
    before = format_model(model)
    feeds = _drawn(model)
    expected = run_model(model, feeds, PLAIN)
    for name, value in expected.items():
        if value.size < 2 or not np.isfinite(value.astype(np.float64)).all() or (value == value.flat[0]).all():
            raise AssertionError(f"the output {name} of the model before is constant or not finite: nothing could be told from it")

    result = rewriting(model)
    if result.graph is not model:
        raise AssertionError("the pass returned another model: passes rewrite in place")
    _same_text("after", before if after is None else after, format_model(model))
    if result.rewrites != rewrites:
        raise AssertionError(f"{result.rewrites} rewrites, {rewrites} promised")
    _same_values("after the pass", expected, run_model(model, feeds, PLAIN), atol, steps=0)
    _same_values("after the pass, optimised", expected, run_model(model, feeds, OPTIMISED), atol, steps=1)

    left = format_model(model)
    drop_dead(model)
    _same_text("without what is dead", left, format_model(model))
    again = rewriting(model)
    if again.rewrites:
        raise AssertionError(f"a second run found {again.rewrites} rewrites: the first left some, or undid itself")
    _same_text("after a second run", left, format_model(model))
    return model


def run_model(model: ir.Model, feeds: dict[str, np.ndarray], level: onnxruntime.GraphOptimizationLevel) -> dict[str, np.ndarray]:
    """The model's outputs by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads, options.graph_optimization_level = 3, 1, level
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def optimised_kinds(model: ir.Model, folder: Path) -> dict[str, int]:
    """How many nodes of each kind the graph has that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds: dict[str, int] = {}
    for node in onnx.load(folder / "optimised.onnx").graph.node:
        kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
    return kinds


def _drawn(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    drawn: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        assert value.dtype is not None
        assert value.shape is not None
        shape = [dim if isinstance(dim, int) else 2 for dim in value.shape]
        kind = value.dtype.numpy()
        if kind.kind == "f":
            drawn[str(value.name)] = generator.standard_normal(shape).astype(kind)
        else:
            # signed codes keep to 7 bits, as those of an export do: without VNNI a kernel adds two u8 x s8 products in 16 bits
            ends = np.iinfo(kind)
            lowest, highest = (-63, 63) if kind == np.int8 else (ends.min, ends.max)
            drawn[str(value.name)] = generator.integers(lowest, highest, shape, dtype=kind, endpoint=True)
    return drawn


def _same_values(when: str, expected: dict[str, np.ndarray], got: dict[str, np.ndarray], atol: float, steps: int) -> None:
    if expected.keys() != got.keys():
        raise AssertionError(f"the outputs {when} are {', '.join(got)}, before {', '.join(expected)}")
    for name, wanted in expected.items():
        given = got[name]
        if (wanted.shape, wanted.dtype) != (given.shape, given.dtype):
            raise AssertionError(f"{name} {when} is {given.dtype}{list(given.shape)}, before {wanted.dtype}{list(wanted.shape)}")
        apart = np.abs(wanted.astype(np.float64) - given.astype(np.float64)).max()
        if not apart <= (steps if wanted.dtype.kind in "iu" else atol):
            raise AssertionError(f"{name} {when} is off by {apart:.3g}")
