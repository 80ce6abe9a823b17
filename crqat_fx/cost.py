"""What a model costs: multiply-accumulates, bit operations and size, counted from its graph with shapes propagated on the meta device.

The published convention: one picture. BOPs are MACs x weight bits x activation bits over convolutions, linears and matrix products (32 x 32
where float; a product of two activations takes their bits twice). Size is 4 B a float parameter, bits/8 a quantized weight, and 4 B for
every scale and zero point of weights and activation quantizers. Published figures were counted so, for the target `conv-inputs`.

A target that computes in integers, `ort`, is counted as it computes and stores. A product takes no more bits of its weight, or of the
operand in a weight's place, than the target's products bear: 7 where the recipe says 8. Codes are stored as its files hold them: up to
4 bits in 4, everything wider in 8, those 7 too.

What an export runs, for a fixed vocabulary: BatchNorm folded; what does not depend on the picture computed once and stored, at the bits of
the product that reads it; and a last 1x1 convolution that a constant text reads through linear nodes alone collapsed with it into one 1x1
convolution of the vocabulary's width.
"""

import copy
import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import Target as Called
from torch.utils.flop_counter import FlopCounterMode

from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import SIZES, Match, YoloWorld, build, max_similarity
from crqat_fx.pipelines import BINS, LOGITS
from crqat_fx.recipe import FLOAT, QuantRecipe, QuantRule, Target, target_named
from crqat_fx.trace import trace_unproved
from passes.fx.fold_batchnorm import FoldBatchNorm
from passes.fx.graph import ancestors, blocks_of, descendants, is_quantizer, living, module_of, node_paths, nodes_in, readers_of_values
from passes.spec import QuantSpec

FLOAT_BITS = SCALAR_BITS = 32
INTEGER_BITS = (4, 8)  # of the integers that an ONNX file holds codes in
PICTURE_INPUT, TEXT_INPUT = 0, 1  # placeholders; an export for a fixed vocabulary has the text as a constant
MOST_TEXTS = 1_000_000  # far above any vocabulary, far below where the numbers of bytes overflow
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Cost:
    """Sums, exact: of one node, of a block, or of all."""

    parameters: int = 0
    macs: int = 0
    bops: int = 0
    bits: int = 0
    fp32_bits: int = 0

    def __add__(self, other: Self) -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.macs + other.macs,
            self.bops + other.bops,
            self.bits + other.bits,
            self.fp32_bits + other.fp32_bits,
        )

    @property
    def bops_t(self) -> float:
        return self.bops / 1e12

    @property
    def size_mib(self) -> float:
        return self.bits / 8 / 2**20

    @property
    def fp32_bops_t(self) -> float:
        return self.macs * FLOAT_BITS**2 / 1e12

    @property
    def fp32_size_mib(self) -> float:
        return self.fp32_bits / 8 / 2**20

    def as_json(self) -> dict[str, int | float]:
        names = ("parameters", "macs", "bops_t", "size_mib", "fp32_bops_t", "fp32_size_mib")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class CostReport:
    """Cost per block by the published convention (`blocks`) and as an export runs it (`export`), blocks in the order of the graph."""

    vocabulary: int
    size: int
    target: str
    blocks: Mapping[str, Cost]
    export: Mapping[str, Cost]

    @property
    def total(self) -> Cost:
        return sum(self.blocks.values(), Cost())

    @property
    def export_total(self) -> Cost:
        return sum(self.export.values(), Cost())

    def as_json(self) -> dict[str, Any]:
        names = dict.fromkeys((*self.blocks, *self.export))
        blocks = {name: {**self.blocks.get(name, Cost()).as_json(), "export": self.export.get(name, Cost()).as_json()} for name in names}
        settings = {"vocabulary": self.vocabulary, "size": self.size, "target": self.target}
        return {**settings, **self.total.as_json(), "export": self.export_total.as_json(), "blocks": blocks}


@dataclass(frozen=True)
class Measurement:
    """What recipes and targets cannot change, so that several can be priced: the graph as it is, and as an export folds it."""

    vocabulary: int
    size: int
    plain: "_Counted"
    folded: "_Counted"


def cost(model: nn.Module, recipe: QuantRecipe | None = None, vocabulary: int = 80, size: int = 640, target: str = "ort") -> CostReport:
    """What a YoloWorld, or its graph, costs at batch 1, real or on the meta device. Without a recipe everything is float."""
    return price(measure(model, vocabulary, size), recipe, target)


def measure(model: nn.Module, vocabulary: int = 80, size: int = 640) -> Measurement:
    if not 1 <= vocabulary <= MOST_TEXTS:
        raise UserError(f"a vocabulary of {vocabulary} texts", where="--vocabulary", remedy=f"give a number from 1 to {MOST_TEXTS:,}")
    if size < 32 or size % 32:
        raise UserError(f"size is {size}", where="--size", remedy="give a multiple of 32")
    graph = _countable(on_meta(model) if isinstance(model, GraphModule) else trace_unproved(on_meta(model)))
    inputs = (torch.empty(1, 3, size, size, device="meta"), torch.empty(1, vocabulary, _text_width(graph), device="meta"))
    plain = _Counted.run(graph, inputs, node_paths(graph))
    folded = copy.deepcopy(graph)
    # a recipe speaks of the model's own paths, which folding may change: what is read through a norm is then read through a convolution
    paths = {node: plain.paths[original] for original, node in zip(graph.graph.nodes, folded.graph.nodes, strict=True)}
    FoldBatchNorm()(folded)
    return Measurement(vocabulary, size, plain, _Counted.run(folded, inputs, node_paths(folded) | paths))


def price(measured: Measurement, recipe: QuantRecipe | None = None, target: str = "ort") -> CostReport:
    place = target_named(target)
    asked = recipe or QuantRecipe((FLOAT,))
    asked.rules_for(measured.plain.paths.values())  # refuses a rule that matches nothing
    return CostReport(
        measured.vocabulary,
        measured.size,
        target,
        blocks=_by_block(measured.plain, _published(measured.plain, asked, place)),
        export=_by_block(measured.folded, _exported(measured.folded, asked, place)),
    )


def format_report(report: CostReport) -> str:
    """A table: per block and in total, by the published convention and as an export runs it."""
    header = ("block", "parameters", "MACs G", "BOPs T", "MiB", "MACs G", "BOPs T", "MiB")
    names = dict.fromkeys((*report.blocks, *report.export))
    rows: list[tuple[str, ...]] = [
        header,
        *(_row(name, report.blocks.get(name, Cost()), report.export.get(name, Cost())) for name in names),
        _row("total", report.total, report.export_total),
        _row("total in float", _in_float(report.total), _in_float(report.export_total)),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    published, export = sum(widths[1:5]) + 6, sum(widths[5:]) + 4
    headline = "  ".join(["".ljust(widths[0]), "published convention".rjust(published), "as an export runs".rjust(export)])
    return "\n".join(line.rstrip() for line in [headline, *lines])


def _row(name: str, published: Cost, export: Cost) -> tuple[str, ...]:
    def columns(each: Cost) -> list[str]:
        return [f"{each.macs / 1e9:.2f}", f"{each.bops_t:.2f}", f"{each.size_mib:.2f}"]

    return (name, f"{published.parameters:,}", *columns(published), *columns(export))


def _in_float(each: Cost) -> Cost:
    return dataclasses.replace(each, bops=each.macs * FLOAT_BITS**2, bits=each.fp32_bits)


def _countable(graph: GraphModule) -> GraphModule:
    """The graph without its dead nodes. Refused where layers would be missed: they are told by the modules that `trace` keeps whole."""
    if any(is_quantizer(module) for module in graph.modules()):
        raise UserError("holds quantizers", where="the graph", remedy="give the float model, and the bits as a recipe")
    alive = living(graph)
    for node in reversed(graph.graph.nodes):
        if node not in alive:
            graph.graph.erase_node(node)
    graph.recompile()
    _text_width(graph)
    if not any(isinstance(module_of(graph, node), Match) for node in graph.graph.nodes):
        raise UserError("holds no Match, whose cost an export folds", where="the graph", remedy="trace the model with crqat_fx.trace")
    return graph


def _text_width(graph: GraphModule) -> int:
    """The width of the linear that reads the text: a graph knows it where no configuration is at hand."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 2:
        raise UserError(
            f"has {len(placeholders)} inputs, not pictures and text", where="the graph", remedy="give the graph of a YOLO-World"
        )
    widths = {module.in_features for reader in placeholders[TEXT_INPUT].users if isinstance(module := module_of(graph, reader), nn.Linear)}
    if len(widths) != 1:
        raise UserError("no linear layer tells the width of the text", where="the graph", remedy="give the graph of a YOLO-World")
    return widths.pop()


def model_on_paper(name: str) -> YoloWorld | None:
    """The model of a preset's name, such as `yolo-world-v1-l`, without weights; None where the text is no such name."""
    found = re.fullmatch(r"yolo-world-v([12])-(\w+)", name)
    if found is None:
        return None
    version, size = int(found[1]), found[2]
    if size not in SIZES:
        raise UserError(f"no preset of this name: the size {size!r} is unknown", where=name, remedy=f"choose one of {', '.join(SIZES)}")
    with torch.device("meta"):
        return build(size, version)


def on_meta(model: M) -> M:
    """A copy in evaluation mode that has shapes and no numbers, whatever the model weighs, in float32 whatever it computes in."""
    stand_ins: dict[int, Any] = {}
    for parameter in model.parameters():
        stand_ins[id(parameter)] = nn.Parameter(_stand_in(parameter), requires_grad=False)
    for buffer in model.buffers():
        stand_ins[id(buffer)] = _stand_in(buffer)
    return copy.deepcopy(model, stand_ins).eval()


def _stand_in(value: Tensor) -> Tensor:
    return value.detach().to("meta", torch.float32 if value.is_floating_point() else value.dtype)


# --- counting ---


@dataclass
class _Counted:
    """A graph after one run on the meta device: what each node is called, its MACs and the shape of what it returns."""

    graph: GraphModule
    paths: dict[Node, str]
    macs: dict[Node, int] = field(default_factory=dict)
    shapes: dict[Node, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def run(cls, graph: GraphModule, inputs: tuple[Tensor, ...], paths: dict[Node, str]) -> "_Counted":
        counted = cls(graph, paths)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _Counting(counted, counter).run(*inputs)
        return counted

    def kind(self, node: Node) -> str:
        """What targets call a node by: the class of its module, or the name of its function."""
        module = module_of(self.graph, node)
        return type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))

    def elements(self, node: Node) -> int:
        return torch.Size(self.shapes[node]).numel()

    def parameters(self, node: Node) -> dict[str, Tensor]:
        """The parameters of a module, or the one that a node fetches."""
        module = module_of(self.graph, node)
        if module is not None:
            return dict(module.named_parameters())
        if node.op != "get_attr":
            return {}
        owner, _, last = str(node.target).rpartition(".")
        value = getattr(self.graph.get_submodule(owner), last)
        return {last: value} if isinstance(value, nn.Parameter) else {}


class _Counting(Interpreter):
    def __init__(self, counted: _Counted, counter: FlopCounterMode) -> None:
        super().__init__(counted.graph)
        self.counted, self.counter = counted, counter

    def run_node(self, n: Node) -> Any:
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        self.counted.macs[n] = (self.counter.get_total_flops() - before) // 2
        if isinstance(value, Tensor):
            self.counted.shapes[n] = tuple(value.shape)
        return value

    def call_function(self, target: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is max_similarity:  # at once, not a few texts at a time: on the meta device nothing is too large
            return torch.matmul(*args, **kwargs).amax(2)
        return super().call_function(target, args, kwargs)


def _published(counted: _Counted, recipe: QuantRecipe, target: Target) -> dict[Node, Cost]:
    costs: dict[Node, Cost] = {}
    stored: set[Tensor] = set()
    for node in counted.graph.graph.nodes:
        path = counted.paths[node]
        rule = recipe.rule_for(path)
        weights = _weights(counted.parameters(node), rule, target, stored, path)
        quantizers = _quantizers(counted, node, rule, target, counted.shapes.get(node, ()))
        costs[node] = _product(counted, node, counted.macs[node], rule, target) + weights + quantizers
    return costs


def _exported(counted: _Counted, recipe: QuantRecipe, target: Target) -> dict[Node, Cost]:
    picture = [node for node in counted.graph.graph.nodes if node.op == "placeholder"][PICTURE_INPUT]
    varying = descendants(picture)
    needed = ancestors(_outputs(counted.graph))
    collapsed = {convolution: (match, linear) for match, convolution, linear in _collapses(counted, varying, needed)}
    absorbed = {node for match, linear in collapsed.values() for node in (match, *linear)}
    costs: dict[Node, Cost] = {}
    stored: set[Tensor] = set()
    for node in counted.graph.graph.nodes:
        if node not in needed or node not in varying or node in absorbed:
            continue
        path = counted.paths[node]
        rule = recipe.rule_for(path)
        macs, output = counted.macs[node], counted.shapes.get(node, ())
        parameters = counted.parameters(node)
        if node in collapsed:
            match, _ = collapsed[node]
            texts, channels = counted.shapes[match][1], parameters["weight"].shape[0]
            macs, output = macs // channels * texts, (output[0], texts, *output[2:])
            parameters = {"weight": parameters["weight"][:1].expand(texts, -1, -1, -1), "bias": torch.empty(texts, device="meta")}
        here = _product(counted, node, macs, rule, target) + _weights(parameters, rule, target, stored, path)
        constants = [source for source in node.all_input_nodes if source not in varying and source in counted.shapes]
        for constant in constants:
            spec = rule.activation if counted.macs[node] else None
            here += _stored(counted.elements(constant), spec, target, counted.shapes[constant], path)
        costs[node] = here + _quantizers(counted, node, rule, target, output, without=constants)
    return costs


def _product(counted: _Counted, node: Node, macs: int, rule: QuantRule, target: Target) -> Cost:
    """The node's MACs at the bits of its operands."""
    weighs = "weight" in counted.parameters(node)
    activation = rule.activation.bits if rule.activation else FLOAT_BITS
    weight = rule.weight if weighs else rule.activation
    bits = weight.bits if weight else FLOAT_BITS
    if weight and (weighs or counted.kind(node) in target.signed):
        bits = min(bits, target.weight_bits)
    return Cost(macs=macs, bops=macs * bits * activation)


def _weights(parameters: Mapping[str, Tensor], rule: QuantRule, target: Target, stored: set[Tensor], path: str) -> Cost:
    """A weight of two axes and more (a norm's has one) at the rule's bits, with its scales; every other parameter in float. What is shared
    is stored once."""
    total = Cost()
    for name, value in parameters.items():
        if value not in stored:  # by identity, which is how tensors hash
            stored.add(value)
            spec = rule.weight if name == "weight" and value.dim() > 1 else None
            total += _stored(value.numel(), spec, target, tuple(value.shape), path)
    return total


def _stored(elements: int, spec: QuantSpec | None, target: Target, shape: tuple[int, ...], path: str) -> Cost:
    bits = elements * (FLOAT_BITS if spec is None else _held_in(spec.bits, target))
    scalars = 0 if spec is None else _scalars(spec, shape, path)
    return Cost(parameters=elements, bits=bits + scalars * SCALAR_BITS, fp32_bits=elements * FLOAT_BITS)


def _held_in(bits: int, target: Target) -> int:
    """What a code takes: the bits themselves as published, an integer of the file where the target's kernels compute in codes."""
    return min(held for held in INTEGER_BITS if bits <= held) if target.outputs else bits


def _quantizers(
    counted: _Counted, node: Node, rule: QuantRule, target: Target, output: tuple[int, ...], without: Collection[Node] = ()
) -> Cost:
    """The scales and zero points of the activation quantizers that a target has at a node, whose `output` has this shape."""
    if rule.activation is None or node.op not in ("call_module", "call_function"):
        return Cost()
    kind = counted.kind(node)
    operands = [node.args[index] for index in target.operands.get(kind, ())]
    shapes = [counted.shapes[operand] for operand in operands if isinstance(operand, Node) and operand not in without]
    shapes += [output] * (kind in target.outputs)
    return Cost(bits=sum(_scalars(rule.activation, shape, counted.paths[node]) for shape in shapes) * SCALAR_BITS)


def _scalars(spec: QuantSpec, shape: tuple[int, ...], path: str) -> int:
    if spec.channel_axis is not None and spec.channel_axis >= len(shape):
        raise UserError(
            f"channel_axis is {spec.channel_axis}, but what is quantized at {path} has the shape {list(shape)}",
            where="recipe",
            remedy=f"give an axis from 0 to {len(shape) - 1}" if shape else "leave channel_axis out",
        )
    scales = 1 if spec.channel_axis is None else shape[spec.channel_axis]
    return scales * (1 if spec.symmetric else 2)


def _collapses(counted: _Counted, varying: set[Node], needed: set[Node]) -> list[tuple[Node, Node, set[Node]]]:
    """Where a constant text reads a 1x1 convolution through flattening and BatchNorm alone: the match, the convolution, the rest."""
    found = []
    for match in counted.graph.graph.nodes:
        if match not in needed or not isinstance(module_of(counted.graph, match), Match) or match.all_input_nodes[0] in varying:
            continue
        source, between = match.all_input_nodes[1], set[Node]()
        while counted.kind(source) in ("flatten", "BatchNorm2d"):
            between.add(source)
            source = source.all_input_nodes[0]
        module = module_of(counted.graph, source)
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        others = [reader for node in (source, *between) for reader in readers_of_values(node) if reader not in (match, *between)]
        if pointwise and not needed.intersection(others):
            found.append((match, source, between))
    return found


def _outputs(graph: GraphModule) -> list[Node]:
    """What an export returns: the logits and the bins, not the regions."""
    returned = graph.graph.output_node().args[0]
    entries = returned if isinstance(returned, tuple | list) else (returned,)
    return [node for index in (LOGITS, BINS) for node in nodes_in(entries[index : index + 1])]


def _by_block(counted: _Counted, costs: Mapping[Node, Cost]) -> dict[str, Cost]:
    """Summed by block, blocks that cost nothing left out."""
    blocks = blocks_of(counted.graph)
    total: dict[str, Cost] = {}
    for node, each in costs.items():
        if each != Cost():
            total[blocks[node]] = total.get(blocks[node], Cost()) + each
    return total
