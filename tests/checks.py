"""The checks that state every promise of a pass in one call. They raise, and never print."""

import difflib
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.utils import _pytree as pytree

from passes.base import Pass
from passes.fx.graph import format_graph

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
