"""The checks that state every promise of a pass in one call. They raise, and never print."""

import difflib
import os
import textwrap
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

    The text before and after (`after` not given: left as it was), the exact count of rewrites, the outputs (rtol 0, `atol` as stated) with
    parameters and statistics drawn at random, the code compiled from the graph, a valid graph, and a second run that finds nothing.
    `model` is traced with torch.fx in evaluation mode unless it is a graph already.
    """
    graph = model if isinstance(model, GraphModule) else symbolic_trace(model.eval())
    randomise(graph)
    _same_text("before", before, format_graph(graph))
    expected = _outputs(graph, inputs)
    for number, output in enumerate(expected):
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
    """Parameters and norm statistics as training leaves them: with fresh ones a norm does nothing, and could be deleted unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) * 2 + 0.1)
                if module.affine and bool((module.weight == 1).all()):  # a weight that a test chose stays
                    module.weight.copy_(torch.randn(module.num_features, generator=generator))
                    module.bias.copy_(torch.randn(module.num_features, generator=generator))


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


def _outputs(graph: GraphModule, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [output.clone() for output in pytree.tree_leaves(graph(*inputs))]


def _same_text(what: str, expected: str, got: str) -> None:
    wanted, given = (textwrap.dedent(text).strip().splitlines() for text in (expected, got))
    wanted, given = ([line.rstrip() for line in lines] for lines in (wanted, given))
    if wanted != given:
        difference = "\n".join(difflib.unified_diff(wanted, given, "expected", "got", lineterm="", n=2))
        raise AssertionError(f"the graph {what} differs:\n{difference}")


def _same_outputs(when: str, expected: list[Tensor], got: list[Tensor], atol: float) -> None:
    if len(expected) != len(got):
        raise AssertionError(f"{len(got)} outputs {when}, {len(expected)} before")
    for number, (wanted, given) in enumerate(zip(expected, got, strict=True)):
        if wanted.shape != given.shape:
            raise AssertionError(f"output {number} {when} has the shape {tuple(given.shape)}, before {tuple(wanted.shape)}")
        if not bool(torch.isfinite(given).all()):
            raise AssertionError(f"output {number} {when} is not finite")
        error = float((wanted - given).abs().max())
        if not error <= atol:
            raise AssertionError(f"output {number} {when} is off by {error:.3g}, more than {atol:.3g}")
