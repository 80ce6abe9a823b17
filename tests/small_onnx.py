"""Small ONNX graphs whose products can be counted by hand, for the tests of what counts and times files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

Shape = Sequence[int | str]


def drawn(name: str, *shape: int) -> TensorProto:
    generator = np.random.default_rng([*name.encode()])
    return numpy_helper.from_array(generator.normal(0, 0.3, shape).astype(np.float32), name)


def write_graph(
    path: Path,
    nodes: Sequence[NodeProto],
    weights: Sequence[TensorProto],
    inputs: Mapping[str, Shape],
    outputs: Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A valid file; its inputs and outputs are floats."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        list(weights),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, dict(metadata or {}))
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def convolutions(
    path: Path,
    between: Sequence[NodeProto] = (),
    last: str = "stem.out",
    weights: Sequence[TensorProto] = (),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """images [1,3,16,16] -> 8 channels `stem`, 1x1 -> `between` -> 16 channels `tower` of 3x3, against 10 texts in an Einsum `match`: in
    QDQ form but for the Einsum."""
    nodes = [*coded("images"), *convolved("stem", "images.coded"), *between, *convolved("tower", last)]
    nodes.append(helper.make_node("Einsum", ["tower.out", "texts"], ["logits"], "match", equation="bchw,nc->bnhw"))
    own = [*scales("images", 1 / 255), *weights_of("stem", 8, 3, 1, 0.02), *weights_of("tower", 16, 8, 3, 0.05), drawn("texts", 10, 16)]
    return write_graph(path, nodes, [*own, *weights], {"images": [1, 3, 16, 16]}, ["logits"], metadata)


def coded(name: str, source: str | None = None, to: str | None = None) -> list[NodeProto]:
    """`source` as codes and back, which the next node reads as `NAME.coded`."""
    parameters = [f"{name}.scale", f"{name}.zero"]
    return [
        helper.make_node("QuantizeLinear", [source or name, *parameters], [f"{name}.codes"], f"quant.{name}"),
        helper.make_node("DequantizeLinear", [f"{name}.codes", *parameters], [to or f"{name}.coded"], f"values.{name}"),
    ]


def convolved(name: str, source: str) -> list[NodeProto]:
    return [
        helper.make_node(
            "DequantizeLinear", [f"{name}.weight_codes", f"{name}.weight_scale"], [f"{name}.weight"], f"{name}.weight", axis=0
        ),
        helper.make_node("Conv", [source, f"{name}.weight"], [f"{name}.float"], name, auto_pad="SAME_UPPER"),
        *coded(name, f"{name}.float", f"{name}.out"),
    ]


def weights_of(name: str, outputs: int, inputs: int, kernel: int, scale: float) -> list[TensorProto]:
    codes = np.random.default_rng(len(name)).integers(-127, 128, (outputs, inputs, kernel, kernel), np.int8)
    return [
        numpy_helper.from_array(codes, f"{name}.weight_codes"),
        numpy_helper.from_array(np.full(outputs, 0.004, np.float32), f"{name}.weight_scale"),
        *scales(name, scale),
    ]


def scales(name: str, scale: float) -> list[TensorProto]:
    return [
        numpy_helper.from_array(np.float32(scale).reshape(()), f"{name}.scale"),
        numpy_helper.from_array(np.uint8(0 if name == "images" else 128).reshape(()), f"{name}.zero"),
    ]
