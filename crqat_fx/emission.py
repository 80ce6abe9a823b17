"""From a torch.fx graph, float or lowered to integer codes, to an ONNX model: each node becomes one ONNX node or a few, under its own path.

    quant.X.output      Quantize     ->  quant.X.output.codes   (QuantizeLinear; of fewer bits than its type has, Clip behind it)
    quant.X.output      Dequantize   ->  quant.X.output         (DequantizeLinear)

Shapes come from running the graph, without numbers, on each example: what is the same in all of them is a constant of the file, and what
differs is left open. So a file of one size is exported from one example, and a dynamic one from several that differ in what shall be open.
Reshapes of reshapes become one. How a runtime likes its graph is not decided here but by the passes over the result (`passes.onnx`).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import Add, Concat, Match, MatMul, Multiply, max_similarity
from passes.fx.codes import Dequantize, OnCodes, Quantize
from passes.fx.graph import asks_about, node_paths, nodes_in
from passes.fx.split_silu import SiLU
from passes.fx.to_integer_codes import VALUES
from passes.onnx.model import IR_VERSION, OPSET

Example = tuple[Tensor, ...]
Dim = tuple[int, ...]  # of one axis: its length in each example
Axes = Sequence[str | None]  # of an input: a name for each axis, None where it has a length

TYPES: Mapping[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
}
CODES, UNCLIPPED = ".codes", ".unclipped"  # behind the name of a quantizer


def emit(
    graph: GraphModule,
    examples: Sequence[Example],
    outputs: Sequence[str] | None = None,
    *,
    names: Mapping[Node, str] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> ir.Model:
    """The graph as a model. `outputs` names what it returns, in order, else they are `output_0` and so on; `names` the nodes, else they go
    by their paths; `axes` the open axes of inputs. A node that ONNX has no words for is refused by name."""
    emitter = _Emitter(graph, examples, names or node_paths(graph), axes or {})
    with torch.no_grad():
        results = emitter.run()
    given = list(outputs) if outputs is not None else [f"output_{index}" for index in range(len(results))]
    if len(given) != len(results):
        raise ValueError(f"{len(given)} names for {len(results)} outputs")
    return emitter.model(results, given)


class _Shapes(Interpreter):
    """Runs a graph on tensors without numbers and keeps what shape and type each node has."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        self.found[n] = result
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, Quantize):  # most of a graph: what they do has the shape of what they read
            return torch.empty_like(args[0], dtype=module.dtype)
        if isinstance(module, Dequantize):
            return torch.empty_like(args[0], dtype=torch.float32)
        return super().call_module(target, args, kwargs)


def _shapes(graph: GraphModule, example: Example) -> dict[Node, Any]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        shapes = _Shapes(graph)
        shapes.run(*(mode.from_tensor(tensor) for tensor in example))
    return shapes.found


class _Emitter:
    """The model while it grows."""

    def __init__(self, graph: GraphModule, examples: Sequence[Example], names: Mapping[Node, str], axes: Mapping[str, Axes]) -> None:
        self.graph = graph
        self.names = names
        self.axes = axes
        self.probes = [_shapes(graph, example) for example in examples]
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.values: dict[Node, Any] = {}  # of every node its value, values, or what is no tensor
        self.roots: dict[ir.Value, ir.Value] = {}  # of a reshaped value: what it was reshaped from
        self.lengths: dict[ir.Value, tuple[Dim, ...]] = {}
        self.used: set[str] = set()
        self.at: Node | None = None

    # --- the walk ---

    def run(self) -> list[ir.Value]:
        for node in self.graph.graph.nodes:
            self.at = node
            if node.op == "output":
                return [self._value(each) for each in nodes_in(node.args[0])]
            if asks_about(node) or self._is_no_tensor(node):
                self.values[node] = None  # a shape: what reshapes by it is told by its own
                continue
            self.values[node] = self._emitted(node)
        raise ValueError("a graph without an output")

    def model(self, results: Sequence[ir.Value], outputs: Sequence[str]) -> ir.Model:
        ends = []
        for value, name in zip(results, outputs, strict=True):
            end = self._fresh(name, self.lengths[value], value.dtype)
            self.nodes.append(ir.Node("", "Identity", [value], outputs=[end], name=name))
            ends.append(end)
        graph = ir.Graph(
            self.inputs, ends, nodes=self.nodes, initializers=list(self.initializers.values()), opset_imports={"": OPSET}, name="crqat-fx"
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="crqat-fx")

    def _is_no_tensor(self, node: Node) -> bool:
        return not any(isinstance(each, Tensor) for each in pytree.tree_leaves(self.probes[0][node]))

    def _emitted(self, node: Node) -> Any:
        name = self.names[node]
        if node.op == "placeholder":
            return self._input(node, name)
        if node.op == "get_attr":
            found: Any = self.graph
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return self.constant(str(node.target), found)
        arguments = pytree.tree_map_only(Node, self._value_or_none, (tuple(node.args), dict(node.kwargs)))
        if node.op == "call_module":
            module = self.graph.get_submodule(str(node.target))
            write = MODULES.get(type(module))
            if write is None:
                raise self._refused(type(module).__name__)
            return write(self, name, module, *arguments[0], **arguments[1])
        write = FUNCTIONS.get(node.target)
        if write is None:
            raise self._refused(getattr(node.target, "__name__", str(node.target)))
        return write(self, name, *arguments[0], **arguments[1])

    def _refused(self, kind: str) -> UserError:
        assert self.at is not None
        return UserError(
            f"{kind} has no form in ONNX that this release writes",
            where=self.names[self.at],
            remedy="build the model of the kinds that `crqat_fx.emission` lists",
        )

    def _input(self, node: Node, name: str) -> ir.Value:
        lengths, dtype = self._of(node)
        named = self.axes.get(name, [None] * len(lengths))
        shape = [
            dim[0] if len(set(dim)) == 1 else told or f"{name}_{axis}" for axis, (dim, told) in enumerate(zip(lengths, named, strict=True))
        ]
        value = ir.Value(name=self._taken(name), shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.lengths[value] = lengths
        self.inputs.append(value)
        return value

    def _value(self, node: Node) -> ir.Value:
        value = self.values[node]
        if not isinstance(value, ir.Value):
            raise self._refused(f"{self.names[node]}, which is no tensor,")
        return value

    def _value_or_none(self, node: Node) -> Any:
        return self.values[node]

    # --- what handlers write with ---

    def op(self, kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """One node with the output of the torch node at hand, in shape and type."""
        return self._node(kind, inputs, name, *self.here(), **attributes)

    def inner(self, kind: str, inputs: Sequence[ir.Value | None], name: str, like: ir.Value, **attributes: Any) -> ir.Value:
        """One node on the way there, whose output has the shape and type of `like`."""
        assert like.dtype is not None
        return self._node(kind, inputs, name, self.lengths[like], like.dtype, **attributes)

    def _node(
        self, kind: str, inputs: Sequence[ir.Value | None], name: str, lengths: tuple[Dim, ...], dtype: ir.DataType, **attributes: Any
    ) -> ir.Value:
        value = self._fresh(name, lengths, dtype)
        attrs = [ir.convenience.convert_attribute(key, each) for key, each in attributes.items()]
        self.nodes.append(ir.Node("", kind, inputs, attributes=attrs, outputs=[value], name=value.name))
        return value

    def constant(self, name: str, value: Tensor | np.ndarray) -> ir.Value:
        """An initializer, under the name of the attribute that holds it; the same attribute is one initializer however often it is read."""
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
        held = self.initializers.get(name)
        if held is None:
            tensor = ir.Tensor(array, name=name)
            held = ir.Value(name=self._taken(name), shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.initializers[name] = held
            self.lengths[held] = tuple((length,) * len(self.probes) for length in array.shape)
        return held

    def numbers(self, name: str, *values: int) -> ir.Value:
        return self.constant(name, np.array(values, dtype=np.int64))

    def scalar(self, name: str, value: float) -> ir.Value:
        return self.constant(name, np.array(value, dtype=np.float32))

    def here(self) -> tuple[tuple[Dim, ...], ir.DataType]:
        """Shape and type of the node at hand."""
        assert self.at is not None
        return self._of(self.at)

    def _of(self, node: Node) -> tuple[tuple[Dim, ...], ir.DataType]:
        return self._described([probe[node] for probe in self.probes])

    def parts(self) -> list[tuple[tuple[Dim, ...], ir.DataType]]:
        """The same of each tensor that the node at hand makes."""
        assert self.at is not None
        found = [probe[self.at] for probe in self.probes]
        return [self._described(each) for each in zip(*found, strict=True)]

    @staticmethod
    def _described(found: Sequence[Tensor]) -> tuple[tuple[Dim, ...], ir.DataType]:
        return tuple(zip(*(tensor.shape for tensor in found), strict=True)), TYPES[found[0].dtype]

    def reshape(self, value: ir.Value, name: str, lengths: tuple[Dim, ...] | None = None) -> ir.Value:
        """A value in the shape of the node at hand, from whatever it was reshaped from itself."""
        assert value.dtype is not None
        wanted = self.here()[0] if lengths is None else lengths
        root = self.roots.get(value, value)
        if self.lengths[root] == wanted:
            return root
        shaped = self._node("Reshape", [root, self._target(root, wanted, f"{name}.shape")], name, wanted, value.dtype)
        self.roots[shaped] = root
        return shaped

    def _target(self, source: ir.Value, wanted: tuple[Dim, ...], name: str) -> ir.Value:
        """The shape to reshape to: numbers where they are the same in all examples, 0 for what stays, -1 for the one that is left."""
        lengths = self.lengths[source]
        plain: list[int | None] = []
        for axis, dim in enumerate(wanted):
            stays = axis < len(lengths) and lengths[axis] == dim
            plain.append(dim[0] if len(set(dim)) == 1 else 0 if stays else None)
        if plain.count(None) <= 1:
            return self.numbers(name, *(-1 if each is None else each for each in plain))
        found = [
            self.numbers(f"{name}.{axis}", each) if each is not None else self._length(wanted[axis], f"{name}.{axis}")
            for axis, each in enumerate(plain)
        ]
        return self._node("Concat", found, name, ((len(found),) * len(self.probes),), ir.DataType.INT64, axis=0)

    def _length(self, dim: Dim, name: str) -> ir.Value:
        """The length of an axis that is open, read from the latest value that has it."""
        one = ((1,) * len(self.probes),)
        for value in reversed(self.lengths):
            if dim in self.lengths[value]:
                axis = self.lengths[value].index(dim)
                return self._node("Shape", [value], name, one, ir.DataType.INT64, start=axis, end=axis + 1)
        raise self._refused("a shape that is computed")

    def _fresh(self, name: str, lengths: tuple[Dim, ...], dtype: ir.DataType | None) -> ir.Value:
        assert dtype is not None
        shape = ir.Shape([dim[0] if len(set(dim)) == 1 else None for dim in lengths])
        value = ir.Value(name=self._taken(name), shape=shape, type=ir.TensorType(dtype))
        self.lengths[value] = lengths
        return value

    def _taken(self, name: str) -> str:
        number, free = 2, name
        while free in self.used:
            free, number = f"{name}#{number}", number + 1
        self.used.add(free)
        return free


# --- codes ---


def _quantize(e: _Emitter, name: str, module: Quantize, x: ir.Value) -> ir.Value:
    assert e.at is not None
    if module.spec.odd:  # QuantizeLinear rounds to all whole numbers; a weight's codes are stored, and need none
        raise e._refused("a quantizer of odd codes")
    codes = name if CODES in name else f"{name}{CODES}"
    inputs = [x, *_steps(e, f"{e.at.target}.", module)]
    whole = np.iinfo(np.int8 if module.dtype == torch.int8 else np.uint8)
    attributes = {} if module.axis is None else {"axis": module.axis}
    if (module.lowest, module.highest) == (whole.min, whole.max):
        return e.op("QuantizeLinear", inputs, codes, **attributes)
    wide = e.op("QuantizeLinear", inputs, f"{codes}{UNCLIPPED}", **attributes)
    ends = [e.constant(f"{whole.dtype.name}.{value}", np.array(value, dtype=whole.dtype)) for value in (module.lowest, module.highest)]
    return e.op("Clip", [wide, *ends], codes)


def _dequantize(e: _Emitter, name: str, module: Dequantize, codes: ir.Value) -> ir.Value:
    """With a zero point where QuantizeLinear has one, and without where nothing but this reads the codes: a weight, a bias."""
    assert e.at is not None
    owner, _, last = str(e.at.target).rpartition(".")
    attributes = {} if module.axis is None else {"axis": module.axis}
    if last == VALUES:
        return e.op("DequantizeLinear", [codes, *_steps(e, f"{owner}.", module)], name, **attributes)
    scale, zero_point = _steps(e, f"{e.at.target}_", module)
    return e.op("DequantizeLinear", [codes, scale, zero_point] if bool(module.zero_point.any()) else [codes, scale], name, **attributes)


def _steps(e: _Emitter, prefix: str, module: Quantize | Dequantize) -> tuple[ir.Value, ir.Value]:
    return e.constant(f"{prefix}scale", module.scale), e.constant(f"{prefix}zero_point", module.zero_point.to(module.dtype))


def _on_codes(e: _Emitter, name: str, module: OnCodes, codes: ir.Value) -> Any:
    write = MODULES.get(type(module.module))
    if write is None:
        raise e._refused(type(module.module).__name__)
    return write(e, name, module.module, codes)


# --- layers ---


def _conv2d(
    e: _Emitter,
    name: str,
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> ir.Value:
    if isinstance(padding, str):
        raise e._refused(f"padding {padding!r}")
    (top, left), strides, dilations = _pair(padding), _pair(stride), _pair(dilation)
    given = {"strides": strides, "pads": [top, left, top, left], "dilations": dilations, "group": groups}
    usual = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1}
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return e.op("Conv", inputs, name, **{key: value for key, value in given.items() if value != usual[key]})


def _conv_module(e: _Emitter, name: str, module: nn.Conv2d, x: ir.Value) -> ir.Value:
    if module.padding_mode != "zeros":
        raise e._refused(f"padding by {module.padding_mode}")
    weight, bias = e.constant(f"{name}.weight", module.weight), _bias(e, name, module)
    return _conv2d(e, name, x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


def _linear(e: _Emitter, name: str, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    rows, columns = e.lengths[weight]
    turned = e._node("Transpose", [weight], f"{name}.weight.transposed", (columns, rows), weight.dtype or ir.DataType.FLOAT, perm=[1, 0])
    if bias is None:
        return e.op("MatMul", [x, turned], name)
    return e.op("Add", [e.op("MatMul", [x, turned], f"{name}.product"), bias], name)


def _linear_module(e: _Emitter, name: str, module: nn.Linear, x: ir.Value) -> ir.Value:
    return _linear(e, name, x, e.constant(f"{name}.weight", module.weight), _bias(e, name, module))


def _bias(e: _Emitter, name: str, module: nn.Conv2d | nn.Linear) -> ir.Value | None:
    return None if module.bias is None else e.constant(f"{name}.bias", module.bias)


def _batch_norm(e: _Emitter, name: str, module: nn.BatchNorm2d, x: ir.Value) -> ir.Value:
    if module.training or module.running_mean is None or module.running_var is None:
        raise e._refused("a norm by the statistics of the batch")
    ones, zeros = torch.ones_like(module.running_mean), torch.zeros_like(module.running_mean)
    given = {
        "weight": ones if module.weight is None else module.weight,
        "bias": zeros if module.bias is None else module.bias,
        "running_mean": module.running_mean,
        "running_var": module.running_var,
    }
    return e.op("BatchNormalization", [x, *(e.constant(f"{name}.{key}", value) for key, value in given.items())], name, epsilon=module.eps)


def _layer_norm(e: _Emitter, name: str, module: nn.LayerNorm, x: ir.Value) -> ir.Value:
    weight = torch.ones(module.normalized_shape) if module.weight is None else module.weight
    inputs = [x, e.constant(f"{name}.weight", weight)]
    if module.bias is not None:
        inputs.append(e.constant(f"{name}.bias", module.bias))
    return e.op("LayerNormalization", inputs, name, axis=-len(module.normalized_shape), epsilon=module.eps)


def _max_pool(e: _Emitter, name: str, module: nn.MaxPool2d, x: ir.Value) -> ir.Value:
    if module.ceil_mode or module.return_indices:
        raise e._refused("a pool that rounds up or returns places")
    (top, left) = _pair(module.padding)
    attributes = {"kernel_shape": _pair(module.kernel_size), "strides": _pair(module.stride), "dilations": _pair(module.dilation)}
    return e.op("MaxPool", [x], name, pads=[top, left, top, left], **attributes)


def _adaptive_max_pool(e: _Emitter, name: str, module: nn.AdaptiveMaxPool2d, x: ir.Value) -> ir.Value:
    """Window i of n over L places is floor(i L / n) to ceil((i + 1) L / n): slices, and the largest of each, of rows, then of columns."""
    if module.return_indices:
        raise e._refused("a pool that returns places")
    for axis, count in zip((2, 3), _pair(module.output_size), strict=True):
        lengths = e.lengths[x]
        pooled: tuple[Dim, ...] = tuple((1,) * len(e.probes) if each == axis else dim for each, dim in enumerate(lengths))
        windows = []
        for index in range(count):
            start, end = (
                _bound(e, f"{name}.{axis}.{index}.{side}", x, axis, index + (side == "end"), count, side) for side in ("start", "end")
            )
            taken = tuple(-(-(index + 1) * length // count) - index * length // count for length in lengths[axis])
            cut: tuple[Dim, ...] = tuple(taken if each == axis else dim for each, dim in enumerate(lengths))
            part = e._node("Slice", [x, start, end, e.numbers(f"{name}.axis.{axis}", axis)], f"{name}.{axis}.{index}.part", cut, _type(x))
            windows.append(
                e._node("ReduceMax", [part, e.numbers(f"{name}.axis.{axis}", axis)], f"{name}.{axis}.{index}", pooled, _type(x), keepdims=1)
            )
        wide: tuple[Dim, ...] = tuple((count,) * len(e.probes) if each == axis else dim for each, dim in enumerate(lengths))
        x = e._node("Concat", windows, name if axis == 3 else f"{name}.{axis}", wide, _type(x), axis=axis)
    return x


def _bound(e: _Emitter, name: str, x: ir.Value, axis: int, index: int, count: int, side: str) -> ir.Value:
    """Where a window starts, floor(index L / count), or ends, ceil(index L / count)."""
    dim = e.lengths[x][axis]
    up = count - 1 if side == "end" else 0
    if len(set(dim)) == 1:
        return e.numbers(name, (index * dim[0] + up) // count)
    one, kind = ((1,) * len(e.probes),), ir.DataType.INT64
    length = e._node("Shape", [x], f"{name}.length", one, kind, start=axis, end=axis + 1)
    scaled = e._node("Mul", [length, e.numbers(f"{name}.index", index)], f"{name}.scaled", one, kind)
    raised = e._node("Add", [scaled, e.numbers(f"{name}.up", up)], f"{name}.raised", one, kind)
    return e._node("Div", [raised, e.numbers(f"{name}.count", count)], name, one, kind)


def _upsample(e: _Emitter, name: str, module: nn.Upsample, x: ir.Value) -> ir.Value:
    if module.mode != "nearest" or module.scale_factor is None:
        raise e._refused(f"Upsample by {module.mode}, or to a size,")
    height, width = _pair(module.scale_factor)
    scales = e.constant(f"{name}.scales", np.array([1, 1, height, width], dtype=np.float32))
    return e.op("Resize", [x, None, scales], name, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")


def _match(e: _Emitter, name: str, _module: Match, text: ir.Value, regions: ir.Value, bias: ir.Value) -> ir.Value:
    return e.op("Add", [e.op("MatMul", [text, regions], f"{name}.product"), bias], name)


def _concat(e: _Emitter, name: str, module: Concat, *tensors: ir.Value) -> ir.Value:
    return e.op("Concat", tensors, name, axis=module.axis)


# --- functions ---


def _unary(kind: str) -> Callable[..., ir.Value]:
    def write(e: _Emitter, name: str, x: ir.Value, **_settings: Any) -> ir.Value:
        return e.op(kind, [x], name)

    return write


def _unary_module(kind: str) -> Callable[..., ir.Value]:
    def write(e: _Emitter, name: str, _module: nn.Module, x: ir.Value) -> ir.Value:
        return e.op(kind, [x], name)

    return write


def _binary(kind: str) -> Callable[..., ir.Value]:
    def write(e: _Emitter, name: str, x: ir.Value | float, y: ir.Value | float) -> ir.Value:
        return e.op(kind, [each if isinstance(each, ir.Value) else e.scalar(f"{name}.factor", each) for each in (x, y)], name)

    return write


def _binary_module(kind: str) -> Callable[..., ir.Value]:
    def write(e: _Emitter, name: str, _module: nn.Module, x: ir.Value, y: ir.Value) -> ir.Value:
        return e.op(kind, [x, y], name)

    return write


def _silu(e: _Emitter, name: str, x: ir.Value, inplace: bool = False) -> ir.Value:
    return e.op("Mul", [x, e.inner("Sigmoid", [x], f"{name}.sigmoid", x)], name)


def _silu_module(e: _Emitter, name: str, _module: nn.SiLU, x: ir.Value) -> ir.Value:
    return _silu(e, name, x)


def _normalize(e: _Emitter, name: str, x: ir.Value, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> ir.Value:
    if p != 2.0 or out is not None:
        raise e._refused(f"normalize with p {p}")
    one = (1,) * len(e.probes)
    axis = dim % len(e.lengths[x])
    lengths: tuple[Dim, ...] = tuple(one if each == axis else length for each, length in enumerate(e.lengths[x]))
    norm = e._node("ReduceL2", [x, e.numbers(f"{name}.axis", axis)], f"{name}.norm", lengths, _type(x), keepdims=1)
    floor = e._node("Max", [norm, e.scalar(f"{name}.eps", eps)], f"{name}.divisor", lengths, _type(x))
    return e.op("Div", [x, floor], name)


def _softmax(e: _Emitter, name: str, x: ir.Value, dim: int = -1, **_settings: Any) -> ir.Value:
    return e.op("Softmax", [x], name, axis=dim)


def _max_similarity(e: _Emitter, name: str, guide: ir.Value, embed: ir.Value) -> ir.Value:
    batch, heads, texts, _ = e.lengths[guide]
    batch = max(batch, e.lengths[embed][0])
    scores = e._node("MatMul", [guide, embed], f"{name}.scores", (batch, heads, texts, e.lengths[embed][3]), _type(embed))
    return e.op("ReduceMax", [scores, e.numbers(f"{name}.axis", 2)], name, keepdims=0)


def _amax(e: _Emitter, name: str, x: ir.Value, dim: int | Sequence[int], keepdim: bool = False) -> ir.Value:
    axes = [dim] if isinstance(dim, int) else list(dim)
    return e.op("ReduceMax", [x, e.numbers(f"{name}.axis", *axes)], name, keepdims=int(keepdim))


def _cat(e: _Emitter, name: str, tensors: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    return e.op("Concat", list(tensors), name, axis=dim)


def _split(e: _Emitter, name: str, x: ir.Value, sizes: int | Sequence[int], dim: int = 0) -> tuple[ir.Value, ...]:
    values = [e._fresh(f"{name}[{index}]", lengths, dtype) for index, (lengths, dtype) in enumerate(e.parts())]
    each = e.numbers(f"{name}.sizes", *(e.lengths[value][dim][0] for value in values))
    e.nodes.append(ir.Node("", "Split", [x, each], attributes=[ir.AttrInt64("axis", dim)], outputs=values, name=name))
    return tuple(values)


def _chunk(e: _Emitter, name: str, x: ir.Value, chunks: int, dim: int = 0) -> tuple[ir.Value, ...]:
    return _split(e, name, x, chunks, dim)


def _getitem(e: _Emitter, name: str, x: Any, index: Any) -> Any:
    if isinstance(x, tuple):
        return x[index]
    raise e._refused("indexing a tensor")


def _reshape(e: _Emitter, name: str, x: ir.Value, *_shape: Any, **_named: Any) -> ir.Value:
    return e.reshape(x, name)


def _transpose(e: _Emitter, name: str, x: ir.Value, first: int, second: int) -> ir.Value:
    order = list(range(len(e.lengths[x])))
    order[first], order[second] = order[second], order[first]
    return e.op("Transpose", [x], name, perm=order)


def _permute(e: _Emitter, name: str, x: ir.Value, *order: Any) -> ir.Value:
    flat = order[0] if len(order) == 1 and isinstance(order[0], list | tuple) else order
    return e.op("Transpose", [x], name, perm=[each % len(flat) for each in flat])


def _expand(e: _Emitter, name: str, x: ir.Value, *_shape: Any) -> ir.Value:
    """Left out: the operators of ONNX broadcast by themselves."""
    return x


def _pad(e: _Emitter, name: str, x: ir.Value, around: Sequence[int], mode: str = "constant", value: float | None = None) -> ir.Value:
    """torch counts from the last axis, before and behind it."""
    if mode not in ("constant", "reflect", "replicate", "circular"):
        raise e._refused(f"padding by {mode}")
    sides = [0] * 2 * len(e.lengths[x])
    for index in range(len(around) // 2):
        axis = len(e.lengths[x]) - 1 - index
        sides[axis], sides[axis + len(e.lengths[x])] = around[2 * index], around[2 * index + 1]
    inputs = [x, e.numbers(f"{name}.sides", *sides)]
    if mode == "constant" and value:
        inputs.append(e.scalar(f"{name}.value", value))
    return e.op("Pad", inputs, name, mode={"replicate": "edge", "circular": "wrap"}.get(mode, mode))


def _clamp(e: _Emitter, name: str, x: ir.Value, min: float | None = None, max: float | None = None) -> ir.Value:  # noqa: A002  # torch's names
    ends = [
        None if end is None else e.constant(f"{name}.{side}", np.array(end, _type(x).numpy()))
        for side, end in (("lowest", min), ("highest", max))
    ]
    return e.op("Clip", [x, *ends], name)


def _same(e: _Emitter, name: str, x: ir.Value, *_settings: Any, **_named: Any) -> ir.Value:
    return x


def _same_module(e: _Emitter, name: str, _module: nn.Module, x: ir.Value) -> ir.Value:
    return x


def _type(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value, value]


MODULES: Mapping[type[nn.Module], Callable[..., Any]] = {
    Quantize: _quantize,
    Dequantize: _dequantize,
    OnCodes: _on_codes,
    nn.Conv2d: _conv_module,
    nn.Linear: _linear_module,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.MaxPool2d: _max_pool,
    nn.AdaptiveMaxPool2d: _adaptive_max_pool,
    nn.Upsample: _upsample,
    nn.SiLU: _silu_module,
    nn.Sigmoid: _unary_module("Sigmoid"),
    nn.ReLU: _unary_module("Relu"),
    nn.Identity: _same_module,
    Add: _binary_module("Add"),
    Multiply: _binary_module("Mul"),
    MatMul: _binary_module("MatMul"),
    Match: _match,
    Concat: _concat,
}
FUNCTIONS: Mapping[Any, Callable[..., Any]] = {  # functions by themselves, methods by name
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.silu: _silu,
    F.pad: _pad,
    **dict.fromkeys((torch.clamp, "clamp"), _clamp),
    F.normalize: _normalize,
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), _softmax),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), _unary("Sigmoid")),
    **dict.fromkeys((torch.relu, F.relu, "relu"), _unary("Relu")),
    **dict.fromkeys((torch.exp, "exp"), _unary("Exp")),
    **dict.fromkeys((operator.add, torch.add, "add"), _binary("Add")),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _binary("Sub")),
    **dict.fromkeys((operator.mul, torch.mul, "mul", SiLU), _binary("Mul")),
    **dict.fromkeys((operator.truediv, torch.div, "div"), _binary("Div")),
    **dict.fromkeys((operator.matmul, torch.matmul, "matmul"), _binary("MatMul")),
    max_similarity: _max_similarity,
    **dict.fromkeys((torch.amax, "amax"), _amax),
    **dict.fromkeys((torch.cat, torch.concat), _cat),
    **dict.fromkeys((torch.split, "split"), _split),
    **dict.fromkeys((torch.chunk, "chunk"), _chunk),
    operator.getitem: _getitem,
    **dict.fromkeys(
        (
            torch.flatten,
            torch.reshape,
            torch.unsqueeze,
            torch.squeeze,
            *("flatten", "unflatten", "reshape", "view", "view_as", "unsqueeze", "squeeze"),
        ),
        _reshape,
    ),
    **dict.fromkeys((torch.transpose, "transpose"), _transpose),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys(("contiguous", "clone", "detach"), _same),
    **dict.fromkeys(("expand", "expand_as"), _expand),
}
