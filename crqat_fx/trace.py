"""From an nn.Module to a torch.fx GraphModule, with the proof that both compute the same.

The leaves are torch.nn's modules and the small named modules of the model (adds, concats, products): one node each, which recipes,
quantizers and patterns can name. A graph is only handed out after it gave the eager model's numbers, bit for bit, on every example.
"""

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import Add, Concat, Match, MatMul, Multiply, YoloWorld

LEAVES: tuple[type[nn.Module], ...] = (Add, Concat, MatMul, Match, Multiply)
Example = tuple[Tensor, ...]


class LeafTracer(Tracer):
    """torch.fx's tracer that keeps the named modules whole."""

    def __init__(self, leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, self.leaves) or super().is_leaf_module(module, qualified_name)


def trace(model: nn.Module, examples: Sequence[Example] | None = None, leaves: tuple[type[nn.Module], ...] = LEAVES) -> GraphModule:
    """The model as a graph, proved equal to it on every example. A YOLO-World brings its own: two picture sizes, two vocabularies.

    The graph shares the model's parameters and keeps its mode. A model that cannot be traced is refused with the line at fault.
    """
    if examples is None:
        if not isinstance(model, YoloWorld):
            raise ValueError("examples of the inputs are needed to prove that the traced graph equals the model")
        examples = yolo_world_examples(model)
    tracer = LeafTracer(leaves)
    try:
        graph = tracer.trace(model)
    except (TraceError, TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, KeyError) as error:
        raise UserError(
            f"{type(model).__name__} cannot be traced ({error})",
            where=_line_at_fault(error),
            remedy="take what depends on the data out of the module, use torch.where, or name the submodule as a leaf (`leaves=`)",
        ) from error
    traced = GraphModule(tracer.root, graph, type(model).__name__)
    traced.train(model.training)
    prove_equal(model, traced, examples)
    return traced


def yolo_world_examples(model: YoloWorld) -> list[Example]:
    """Two sizes and two vocabularies, small enough to cost little for the largest model."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    examples: list[Example] = []
    for batch, height, width, texts in ((1, 64, 96, 3), (2, 96, 64, 5)):
        images = torch.rand(batch, 3, height, width, generator=generator)
        text = nn.functional.normalize(torch.randn(batch, texts, model.config.text_width, generator=generator), dim=2)
        examples.append((images.to(device), text.to(device)))
    return examples


def prove_equal(model: nn.Module, traced: nn.Module, examples: Sequence[Example]) -> None:
    """Refuses a graph that has more state than its model or differs, by a single bit, in an output. Leaves every mode as it was."""
    added = sorted(set(traced.state_dict()) - set(model.state_dict()))
    if added:
        raise UserError(
            f"tracing added {added[0]!r} to the state",
            where=type(model).__name__,
            remedy="use buffers and parameters as plain attributes in forward",
        )
    modes = {module: module.training for root in (model, traced) for module in root.modules()}
    try:
        model.eval()
        traced.eval()
        with torch.no_grad():
            for number, example in enumerate(examples):
                expected, got = (pytree.tree_leaves(run(*example)) for run in (model, traced))
                if len(expected) != len(got) or not all(_same(a, b) for a, b in zip(expected, got, strict=True)):
                    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in example)
                    raise UserError(
                        f"the traced graph and the model differ on example {number} ({shapes})",
                        where=type(model).__name__,
                        remedy="look for shapes or branches that tracing baked in",
                    )
    finally:
        for module, mode in modes.items():
            module.training = mode


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _line_at_fault(error: BaseException) -> str:
    """The innermost line outside torch: the user's own, not the tracer's."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = str(Path(torch.__file__).parent)
    theirs = [frame for frame in frames if not frame.filename.startswith(inside) and Path(frame.filename) != Path(__file__)]
    if not theirs:
        return "in the module's forward"
    last = theirs[-1]
    return f"{last.filename}:{last.lineno}: `{last.line}`"
