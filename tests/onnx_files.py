"""Small files of the exported contract, made by hand, and the PyTorch model that computes the same.

A level of stride s is the average of s x s pixels; its logits are a linear map of that matched with the text, its bins another linear map.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from crqat_fx.detections import Selection
from crqat_fx.metadata import Metadata
from crqat_fx.vocabulary import Vocabulary

WIDTH = 8  # of an embedding
NAMES = ("red", "café", "dark thing", "bright thing, large")
METADATA = Metadata("0.1.0", NAMES, (96, 96), "decoded", "float", "constant", WIDTH, "float32")
KEPT = np.array([[4.5, 4, 40, 50, 0.75, 1], [10, 0, 96, 30, 0.5, 3], [-8, -8, 20.25, 20, 0.25, 1]], np.float32)  # by NMS, of any picture


def vocabulary(names: tuple[str, ...] = NAMES, width: int = WIDTH) -> Vocabulary:
    rows = np.random.default_rng(0).normal(size=(len(names), width)).astype(np.float32)
    return Vocabulary(names, rows / np.linalg.norm(rows, axis=1, keepdims=True))


@dataclass(frozen=True)
class Weights:
    """Of one stride."""

    embed: np.ndarray  # [WIDTH, 3]
    bins: np.ndarray  # [64, 3]
    bias: np.ndarray  # [64]


def weights() -> list[Weights]:
    rng = np.random.default_rng(5)

    def drawn(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.normal(size=shape) * scale).astype(np.float32)

    return [Weights(drawn(WIDTH, 3, scale=4), drawn(64, 3), drawn(64)) for _ in METADATA.strides]


class Averages(nn.Module):
    """The model of YOLO-World's contract that the files hold."""

    def forward(self, images: Tensor, text: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        logits, bins, regions = [], [], []
        for stride, level in zip(METADATA.strides, weights(), strict=True):
            pooled = nn.functional.avg_pool2d(images, stride)
            region = torch.einsum("dc,bchw->bdhw", torch.from_numpy(level.embed), pooled)
            regions.append(region)
            logits.append(torch.einsum("bnd,bdhw->bnhw", text, region))
            bias = torch.from_numpy(level.bias)[:, None, None]
            bins.append(torch.einsum("dc,bchw->bdhw", torch.from_numpy(level.bins), pooled) + bias)
        return logits, bins, regions


def write_onnx(path: Path, *, batch: int | None = None, own_text: bool = False, **changes: Any) -> Path:
    """A file that holds `Averages` as `METADATA`, changed by `changes`, says. `batch` None is any; with `own_text` each picture has a text
    of its own. With the outputs `nms` it gives `KEPT`, whatever the picture."""
    metadata = replace(METADATA, **changes)
    model = made(metadata, batch, own_text)
    helper.set_model_props(model, metadata.as_strings())
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def write_nms(path: Path, selection: Selection | None = None, **changes: Any) -> Path:
    return write_onnx(path, outputs="nms", nms=selection or Selection(conf=0.2, iou=0.7, max=8), **changes)


def made(metadata: Metadata, batch: int | None = None, own_text: bool = False) -> onnx.ModelProto:
    graph = _Graph()
    count: int | str = "batch" if batch is None else batch
    height, width = metadata.size if metadata.multiple is None else ("height", "width")
    floats = metadata.input == "float"
    sides = [count, 3, height, width] if floats else [count, height, width, 3]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT if floats else TensorProto.UINT8, sides)]
    images = "images"
    if not floats:
        images = graph.add("Transpose", graph.add("Cast", images, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
        images = graph.add("Div", images, graph.constant(np.float32(255)))
    text = "text"
    if metadata.text == "constant":
        text = graph.constant(vocabulary(metadata.names).embeddings[np.newaxis])
    else:
        inputs.append(helper.make_tensor_value_info("text", TensorProto.FLOAT, [count if own_text else 1, "texts", metadata.text_width]))
    if metadata.outputs == "nms":
        return graph.model(inputs, _kept(graph, images))
    logits, bins, boxes, scores = [], [], [], []
    for stride, level in zip(metadata.strides, weights(), strict=True):
        pooled = graph.add("AveragePool", images, kernel_shape=[stride, stride], strides=[stride, stride])
        region = graph.add("Einsum", graph.constant(level.embed), pooled, equation="dc,bchw->bdhw")
        logits.append(graph.add("Einsum", text, region, equation=f"{'b' if own_text else 'a'}nd,bdhw->bnhw"))
        flat = graph.add("Einsum", graph.constant(level.bins), pooled, equation="dc,bchw->bdhw")
        bins.append(graph.add("Add", flat, graph.constant(level.bias[:, None, None])))
        boxes.append(_boxes(graph, bins[-1], stride))
        flat = graph.add("Reshape", logits[-1], graph.constant(np.array([0, 0, -1])))
        scores.append(graph.add("Sigmoid", graph.add("Transpose", flat, perm=[0, 2, 1])))
    if metadata.outputs == "raw":
        names = {f"{kind}_{stride}": TensorProto.FLOAT for kind in ("logits", "bins") for stride in metadata.strides}
        return graph.model(inputs, dict(zip(names, [*logits, *bins], strict=True)))
    return graph.model(inputs, {"boxes": graph.add("Concat", *boxes, axis=1), "scores": graph.add("Concat", *scores, axis=1)})


def _boxes(graph: "_Graph", bins: str, stride: int) -> str:
    """Boxes [B, h w, 4] of bins [B, 64, h, w]; the centres of cells are running sums of ones."""
    split = graph.add("Reshape", bins, graph.constant(np.array([0, 4, 16, -1])))
    steps = graph.constant(np.arange(16, dtype=np.float32))
    distances = graph.add("Einsum", graph.add("Softmax", split, axis=2), steps, equation="bfkc,k->bcf")
    first = graph.add("Slice", bins, *(graph.constant(np.array([value])) for value in (0, 1, 1)))
    ones = graph.add("Add", graph.add("Sub", first, first), graph.constant(np.float32(1)))
    centres = []
    for axis in (3, 2):
        count = graph.add("CumSum", ones, graph.constant(np.array(axis)))
        flat = graph.add("Reshape", graph.add("Sub", count, graph.constant(np.float32(0.5))), graph.constant(np.array([0, -1, 1])))
        centres.append(flat)
    signs = graph.add("Mul", distances, graph.constant(np.array([-1, -1, 1, 1], np.float32)))
    corners = graph.add("Add", graph.add("Concat", *centres, *centres, axis=2), signs)
    return graph.add("Mul", corners, graph.constant(np.float32(stride)))


def _kept(graph: "_Graph", images: str) -> dict[str, str]:
    """`KEPT` for each picture, and a row of zeros behind it."""
    batch = graph.add("Shape", images, end=1)
    rows = graph.constant(np.concatenate([KEPT, np.zeros((1, 6), np.float32)])[np.newaxis])
    shape = graph.add("Concat", batch, graph.constant(np.array([len(KEPT) + 1, 6])), axis=0)
    return {
        "detections": graph.add("Expand", rows, shape),
        "counts": graph.add("Expand", graph.constant(np.array([len(KEPT)])), batch),
    }


class _Graph:
    """Nodes and constants, named by number."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def model(self, inputs: list[onnx.ValueInfoProto], outputs: dict[str, str]) -> onnx.ModelProto:
        """`outputs`: which value each is; their shapes are inferred."""
        self.nodes += [helper.make_node("Identity", [value], [name]) for name, value in outputs.items()]
        kinds = {name: TensorProto.INT64 if name == "counts" else TensorProto.FLOAT for name in outputs}
        told = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
        graph = helper.make_graph(self.nodes, "made", inputs, told, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
