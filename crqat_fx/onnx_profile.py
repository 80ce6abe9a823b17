"""What onnxruntime really runs of a file: the nodes of its optimized graph, what flowed through them, and how long each took.

The optimized graph comes from `optimized_model_filepath`, shapes and times from the profiler; both call a node by its name.
"""

import json
import math
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from crqat_fx.errors import UserError
from crqat_fx.onnx_run import USUAL, Extent, made_up_inputs, run
from crqat_fx.onnx_session import open_session

Shape = tuple[int, ...]

KERNEL_TIME = "_kernel_time"
RENAMED = re.compile(r"(_token_\d+|_nchwc|_fused|/\w+Fusion/?)+$")  # what onnxruntime appends to a name when it replaces a node
# where the operands of a product stand, by operator: of a convolution its weight, of a matrix product both sides
CONVOLUTIONS: Mapping[str, int] = {"Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3}
MATRIX_PRODUCTS: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("MatMul", "FusedMatMul", "FusedGemm", "Gemm", "MatMulInteger", "MatMulIntegerToFloat"), (0, 1)),
    **dict.fromkeys(("DynamicQuantizeMatMul",), (0, 1)),
    **dict.fromkeys(("QLinearMatMul", "QGemm"), (0, 3)),
}
INTEGER_PRODUCTS = frozenset(
    ("ConvInteger", "QLinearConv", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm")
)


@dataclass(frozen=True)
class Executed:
    """One node of the optimized graph. `path` is the name of the node in the file that it came from; `types` are those of its outputs, as
    onnxruntime names them; a time for every run."""

    name: str
    path: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: tuple[str, ...]
    macs: int
    microseconds: tuple[float, ...]

    @property
    def integer(self) -> bool:
        """Whether its multiply-accumulates are an integer kernel's."""
        return self.kind in INTEGER_PRODUCTS


@dataclass(frozen=True)
class Profile:
    """The nodes of the optimized graph, in its order, and what the file's metadata says."""

    nodes: tuple[Executed, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator."""

    kind: str
    nodes: int
    macs: int
    milliseconds: float


def profile(model: str | Path, extent: Extent = USUAL, runs: int = 1, threads: int | None = None) -> Profile:
    """Runs the file `runs` times and once before that, uncounted. `extent` is what its open axes become."""
    path = Path(model)
    read = _read(path)
    with tempfile.TemporaryDirectory() as folder:
        source = path
        if _name_uniquely(read.graph):
            source = Path(folder) / path.name
            onnx.save(read, source)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = open_session(source, threads, options)
        feed = made_up_inputs(session, extent, path)
        for _ in range(1 + runs):
            run(session, feed, path)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        optimized = onnx.load(options.optimized_model_filepath)
    inputs = {name: tuple(value.shape) for name, value in feed.items()}
    paths = {value: node.name for node in read.graph.node for value in node.output} | {node.name: node.name for node in read.graph.node}
    metadata = {entry.key: entry.value for entry in read.metadata_props}
    return Profile(tuple(_executed(optimized.graph, inputs, events, paths, path)), metadata)


def operator_times(profiled: Profile) -> tuple[OperatorTime, ...]:
    """The slowest operator first; a node's time is its median over the runs."""
    kinds: dict[str, list[Executed]] = {}
    for node in profiled.nodes:
        kinds.setdefault(node.kind, []).append(node)
    times = [
        OperatorTime(kind, len(nodes), sum(node.macs for node in nodes), sum(statistics.median(node.microseconds) for node in nodes) / 1e3)
        for kind, nodes in kinds.items()
    ]
    return tuple(sorted(times, key=lambda each: -each.milliseconds))


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"is no readable ONNX file ({reason})", where=path, remedy="name an ONNX file") from error


def _name_uniquely(graph: onnx.GraphProto) -> bool:
    """Names tie what the profiler says of a node to the node: one that has none, or another's, gets its own. Whether any had to."""
    counts = Counter(node.name for node in graph.node)
    unnamed = [(number, node) for number, node in enumerate(graph.node) if not node.name or counts[node.name] > 1]
    for number, node in unnamed:
        node.name = f"{node.name or node.op_type}#{number}"
    return bool(unnamed)


def _executed(
    graph: onnx.GraphProto, inputs: Mapping[str, Shape], events: Sequence[Mapping[str, Any]], paths: Mapping[str, str], where: object
) -> list[Executed]:
    kernels: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if event["name"].endswith(KERNEL_TIME):
            kernels.setdefault(event["name"].removesuffix(KERNEL_TIME), []).append(event)
    _name_like(graph, kernels)
    shapes = {value.name: tuple(value.dims) for value in graph.initializer} | dict(inputs)
    nodes = []
    for node in graph.node:
        seen = kernels.get(node.name)
        if seen is None:
            raise UserError(f"onnxruntime did not run its node {node.name!r}", where=where, remedy="give a file without branches")
        described = [next(iter(one.items())) for one in seen[-1]["args"]["output_type_shape"]]
        outputs = tuple(name for name in node.output if name)
        shapes |= {name: tuple(shape) for name, (_, shape) in zip(outputs, described, strict=True)}
        times = tuple(float(event["dur"]) for event in seen[1:])
        types = tuple(kind for kind, _ in described)
        stem = RENAMED.sub("", node.name)  # of the node it came from, or of that one's output
        path = paths.get(stem, stem)
        nodes.append(Executed(node.name, path, node.op_type, tuple(node.input), outputs, types, _macs(node, shapes), times))
    return nodes


def _name_like(graph: onnx.GraphProto, kernels: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Nodes that onnxruntime itself wrote, and gave no name, take the names that the profiler made up for them: those of a Softmax of 16
    bits, for instance. The profiler meets nodes of one kind in the order of the graph."""
    named = {node.name for node in graph.node}
    made_up: dict[str, list[str]] = {}
    for name, events in kernels.items():
        if name not in named:
            made_up.setdefault(events[0]["args"]["op_name"], []).append(name)
    unnamed: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if not node.name:
            unnamed.setdefault(node.op_type, []).append(node)
    for kind, nodes in unnamed.items():
        names = made_up.get(kind, [])
        if len(names) == len(nodes):  # else which is which is not known
            for node, name in zip(nodes, names, strict=True):
                node.name = name


def _macs(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Multiply-accumulates of a product; 0 for what is none."""
    if node.op_type in CONVOLUTIONS:
        weight = shapes[node.input[CONVOLUTIONS[node.op_type]]]
        moved = shapes[node.input[0]] if node.op_type == "ConvTranspose" else shapes[node.output[0]]
        return math.prod(moved) * math.prod(weight[1:])
    if node.op_type in MATRIX_PRODUCTS:
        left, _ = MATRIX_PRODUCTS[node.op_type]
        shape = shapes[node.input[left]]
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return math.prod(shapes[node.output[0]]) * shape[-2 if transposed else -1]
    if node.op_type == "Einsum" and len(node.input) > 1:
        return _einsum_macs(node, shapes)
    return 0


def _einsum_macs(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """One for every combination of indices, for each operand after the first."""
    equation = next(attribute.s for attribute in node.attribute if attribute.name == "equation").decode().replace(" ", "")
    sides: dict[str, int] = {}
    for term, name in zip(equation.partition("->")[0].split(","), node.input, strict=True):
        shape = shapes[name]
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after) if dots else 0
        letters = [*before, *(f"...{hidden - place}" for place in range(hidden)), *after]
        for letter, side in zip(letters, shape, strict=True):
            sides[letter] = max(side, sides.get(letter, 1))
    return math.prod(sides.values()) * (len(node.input) - 1)
