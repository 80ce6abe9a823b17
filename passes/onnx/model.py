"""What every pass over an ONNX model shares: the checker after each pass, the numbers behind a value, and the graph as text.

The text is one line a node, `value = What[attributes](inputs)`; constants with few numbers are written out.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import CheckerPass, RemoveUnusedNodesPass

from passes.base import Pass, PassError

OPSET, IR_VERSION = 21, 10
Dims = Iterable[int | str | ir.SymbolicDim | None]  # a shape as it is given: an axis that is open has a name, or None
FEW = 6  # numbers of a constant that are written out


class OnnxPass(Pass[ir.Model]):
    """A pass over an ONNX model: held to onnx's full checker after each rewrite."""

    def validate(self, graph: ir.Model) -> None:
        try:
            CheckerPass(full_check=True)(graph)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
            raise PassError(self.name, f"left a model that is not valid: {str(error).strip().splitlines()[0]}") from error


class Writer:
    """Writes nodes at the end of a graph, or before one of its nodes."""

    def __init__(self, graph: ir.Graph, before: ir.Node | None = None) -> None:
        self.graph = graph
        self.before = before

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: ir.DataType | None = None,
        shape: Dims | None = None,
        **attributes: Any,
    ) -> ir.Value:
        return self.ops(kind, inputs, [name], dtype=dtype, shapes=None if shape is None else [shape], **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        names: Sequence[str],
        *,
        dtype: ir.DataType | None = None,
        shapes: Sequence[Dims] | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        """A node of one output or more. What is not said of them is left to shape inference."""
        given: Sequence[Dims | None] = shapes or [None] * len(names)
        outputs = [
            ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=None if dtype is None else ir.TensorType(dtype))
            for name, shape in zip(names, given, strict=True)
        ]
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        node = ir.Node("", kind, inputs, attributes=attrs, outputs=outputs, name=names[0])
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)
        return outputs

    def constant(self, name: str, value: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """An initializer; one that has this name and these numbers already is taken."""
        tensor = value if isinstance(value, ir.TensorProtocol) else ir.Tensor(value, name=name)
        held = self.graph.initializers.get(name)
        if held is not None:
            assert held.const_value is not None
            if held.dtype == tensor.dtype and held.const_value.tobytes() == tensor.tobytes() and held.const_value.shape == tensor.shape:
                return held
            raise ValueError(f"{name} is another constant already")
        made = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(made)
        return made

    def numbers(self, name: str, *values: int) -> ir.Value:
        return self.constant(name, np.array(values, dtype=np.int64))

    def scalar(self, name: str, value: float) -> ir.Value:
        return self.constant(name, np.array(value, dtype=np.float32))


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of an initializer, None for anything else."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of that kind that makes a value, None where another one does, or none."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == kind else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, None where there are more, or where the graph returns it."""
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


def replace(old: ir.Value, new: ir.Value) -> None:
    """Everything that read `old` reads `new`, which takes over its name."""
    name = old.name
    old.name = f"{name}#before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name = name


def replace_reshapes(old: ir.Value, shape: Sequence[int | None], new: ir.Value) -> None:
    """Reads `new` wherever `old` was only given that shape, an open axis as None."""
    for node, _ in tuple(old.uses()):
        made = node.outputs[0]
        known = None if made.shape is None else [dim if isinstance(dim, int) else None for dim in made.shape]
        if node.op_type != "Reshape" or known != list(shape):
            continue
        if made.is_graph_output():
            replace(made, new)
        else:
            made.replace_all_uses_with(new)


def drop_dead(model: ir.Model) -> None:
    """Removes what no output needs, so that a pass does not meet again what it replaced."""
    RemoveUnusedNodesPass()(model)


def format_model(model: ir.Model) -> str:
    """The graph as text that can be compared."""
    lines = [f"{_typed(value)} = input" for value in model.graph.inputs]
    for node in model.graph:
        attributes = ", ".join(f"{key}={_short(node.attributes[key].value)}" for key in sorted(node.attributes))
        made = ", ".join(value.name or "" for value in node.outputs)
        domain = f"{node.domain}." if node.domain else ""
        lines.append(
            f"{made} = {domain}{node.op_type}{f'[{attributes}]' if attributes else ''}({', '.join(_read(value) for value in node.inputs)})"
        )
    return "\n".join([*lines, f"return {', '.join(_typed(value) for value in model.graph.outputs)}"])


def _typed(value: ir.Value) -> str:
    return f"{value.name}: {value.dtype.name.lower() if value.dtype is not None else '?'}{_shape(value)}"


def _shape(value: ir.Value) -> str:
    if value.shape is None:
        return ""
    return f"[{', '.join(str(dim) if isinstance(dim, int) else str(dim.value or '?') for dim in value.shape)}]"


def _short(value: object) -> str:
    return str(list(value)) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else str(value)


def _read(value: ir.Value | None) -> str:
    if value is None:
        return "_"
    numbers = constant_of(value)
    if numbers is None:
        return value.name or ""
    kind = numbers.dtype.name
    if numbers.size > FEW:
        return f"{kind}[{'x'.join(map(str, numbers.shape))}]"
    written = ", ".join(f"{number:.6g}" for number in numbers.astype(float).ravel())
    return f"{kind}[{written}]" if numbers.ndim else f"{kind}({written})"
