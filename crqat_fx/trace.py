"""From an nn.Module to a torch.fx GraphModule, with the proof that both compute the same.

The leaves are torch.nn's modules and the small named modules of the model (adds, concats, products): one node each, which recipes,
quantizers and patterns can name. A graph is only handed out after it gave the eager model's numbers, bit for bit, on every example;
`trace_unproved` is for the meta device, where there are no numbers.
"""

import itertools
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, Tracer
from torch.utils import _pytree as pytree

from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import Add, Concat, Match, MatMul, Multiply, YoloWorld
from passes.fx.graph import nodes_in

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

    The graph shares the model's parameters and every module's mode. A model that cannot be traced is refused with the line at fault.
    """
    if any(value.is_meta for value in itertools.chain(model.parameters(), model.buffers())):
        raise UserError(
            "is on the meta device, where no graph can be proved",
            where=type(model).__name__,
            remedy="give it numbers with `to_empty` and a state, or use `trace_unproved`",
        )
    if examples is None and isinstance(model, YoloWorld):
        examples = yolo_world_examples(model)
    if not examples:
        raise ValueError("examples of the inputs are needed to prove that the traced graph equals the model")
    traced = trace_unproved(model, leaves)
    prove_equal(model, traced, examples, leaves)
    return traced


def trace_unproved(model: nn.Module, leaves: tuple[type[nn.Module], ...] = LEAVES) -> GraphModule:
    """The model as a graph, as `trace` makes it, without the proof: for shapes alone."""
    tracer = LeafTracer(leaves)
    try:
        graph = tracer.trace(model)
    except Exception as error:  # a forward that meets a proxy where it expects a tensor may raise anything
        raise UserError(
            f"{type(model).__name__} cannot be traced ({_said(error)})",
            where=_line_at_fault(error),
            remedy="take what depends on the data out of the module, use torch.where, or name the submodule as a leaf (`leaves=`)",
        ) from error
    traced = GraphModule(tracer.root, graph, type(model).__name__)
    for name, module in traced.named_modules():  # the containers are new; the leaves are the model's own
        module.training = model.get_submodule(name).training
    return traced


def yolo_world_examples(model: YoloWorld) -> list[Example]:
    """Two sizes and two vocabularies, of the type and in the place of the model's parameters. One side of each is the smallest there is,
    32 px, so that the largest model costs little; no axis is 1 in both."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.parameters())
    examples: list[Example] = []
    for batch, height, width, texts in ((1, 32, 64, 3), (2, 64, 32, 5)):
        images = torch.rand(batch, 3, height, width, generator=generator)
        text = nn.functional.normalize(torch.randn(batch, texts, model.config.text_width, generator=generator), dim=2)
        examples.append((images.to(parameter), text.to(parameter)))
    return examples


def prove_equal(model: nn.Module, traced: GraphModule, examples: Sequence[Example], leaves: tuple[type[nn.Module], ...] = LEAVES) -> None:
    """Refuses a graph that has more state than its model or differs, by a single bit, in an output. Leaves every mode as it was.

    `leaves` are those that the graph was traced with: it is traced once more to name the line where it goes wrong.
    """
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
                _prove_on(model, traced, leaves, example, f"example {number} ({_shapes(example)})")
    finally:
        for module, mode in modes.items():
            module.training = mode


def _prove_on(model: nn.Module, traced: GraphModule, leaves: tuple[type[nn.Module], ...], example: Example, which: str) -> None:
    remedy = "look for shapes or branches that tracing baked in"
    try:
        expected, form = pytree.tree_flatten(model(*example))
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"the model fails on {which} ({_said(error)})", where=_line_at_fault(error), remedy="give examples that it takes"
        ) from error
    try:
        got, form_of_graph = pytree.tree_flatten(traced.forward(*example))  # called as a module, it would print where it fails
    except Exception as error:  # so may the graph, which runs the user's code with what tracing made of it
        raise UserError(
            f"the traced graph fails on {which} ({_said(error)}), the model does not",
            where=_line_of(model, leaves, traced, _failing(traced, example)),
            remedy=remedy,
        ) from error
    if form != form_of_graph:
        raise UserError(
            f"the traced graph and the model differ on {which}: the outputs are nested otherwise",
            where=type(model).__name__,
            remedy="return the same structure whatever the inputs are",
        )
    outputs = nodes_in(traced.graph.output_node().args[0])
    for index, (wanted, given) in enumerate(zip(expected, got, strict=True)):
        difference = _difference(wanted, given)
        if difference:
            node = outputs[index] if len(outputs) == len(got) else None  # literals among the outputs have no node
            where = _line_of(model, leaves, traced, node)
            raise UserError(f"the traced graph and the model differ on {which}: output {index} {difference}", where=where, remedy=remedy)


def _difference(wanted: Any, given: Any) -> str:
    """How two outputs differ, empty where they are the same to the last bit."""
    if not isinstance(wanted, Tensor) or not isinstance(given, Tensor):
        return "" if type(wanted) is type(given) and bool(wanted == given) else f"is {given!r:.40}, not {wanted!r:.40}"
    if wanted.shape != given.shape:
        return f"has the shape {list(given.shape)}, not {list(wanted.shape)}"
    if wanted.dtype != given.dtype:
        return f"is {given.dtype}, not {wanted.dtype}"
    return "" if torch.equal(_bits(wanted), _bits(given)) else "has other values"


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def _shapes(example: Example) -> str:
    return ", ".join("x".join(map(str, tensor.shape)) for tensor in example)


# --- the line at fault ---


class _Locator(Interpreter):
    """Runs a graph node by node, and knows at which it is."""

    extra_traceback = False
    at: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.at = n
        return super().run_node(n)


def _failing(traced: GraphModule, example: Example) -> Node | None:
    """The node at which a graph fails."""
    locator = _Locator(traced)
    try:
        locator.run(*example)
    except Exception:  # noqa: BLE001  # it is known to fail, and its error was caught before: where it does is all that is asked
        return locator.at
    return None


def _line_of(model: nn.Module, leaves: tuple[type[nn.Module], ...], traced: GraphModule, node: Node | None) -> str:
    """The line of the user's code that made a node. Graphs do not keep it, as it takes tracing ten times as long."""
    if node is None:
        return type(model).__name__
    tracer = LeafTracer(leaves)
    tracer.record_stack_traces = True
    again = dict(zip(traced.graph.nodes, tracer.trace(model).nodes, strict=False))
    frames = re.findall(r'File "(.+)", line (\d+), in .*\n\s*(.*)', again[node].stack_trace or "")
    theirs = [frame for frame in frames if _is_users(frame[0])]
    if not theirs:
        return f"{type(model).__name__}, {node.name}"
    file, number, line = theirs[-1]
    return f"{file}:{number}: `{line}`"


def _line_at_fault(error: BaseException) -> str:
    """The innermost line outside torch: the user's own, not the tracer's."""
    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    if not theirs:
        return "in the module's forward"
    last = theirs[-1]
    return f"{last.filename}:{last.lineno}: `{last.line}`"


def _is_users(file: str) -> bool:
    return not file.startswith(str(Path(torch.__file__).parent)) and Path(file) != Path(__file__)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
