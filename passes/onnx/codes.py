"""Integer codes in an ONNX graph: what a DequantizeLinear reads and a QuantizeLinear makes, and how to write others like them.

codes = Clip(QuantizeLinear(x, scale, zero point))      without Clip where all codes of the type are used
x'    = DequantizeLinear(codes, scale, zero point)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.onnx.model import Dims, Writer, constant_of, made_by, only_reader

CHANNELS_LAST, CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # permutations of a feature map
LAST = ".nhwc"  # behind the name of codes whose channels are moved last


@dataclass(frozen=True)
class Read:
    """A value read from codes."""

    node: ir.Node
    codes: ir.Value
    scale: np.ndarray
    axis: int | None  # None: one scale for all

    @property
    def zero_point(self) -> ir.Value | None:
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def symmetric(self) -> bool:
        zeros = constant_of(self.zero_point)
        return self.zero_point is None or (zeros is not None and not zeros.any())

    @property
    def name(self) -> str:
        return str(self.node.outputs[0].name)


@dataclass(frozen=True)
class Written:
    """Codes that a value is written to, and the nodes that do it."""

    quantize: ir.Node
    clip: ir.Node | None

    @property
    def codes(self) -> ir.Value:
        return (self.quantize if self.clip is None else self.clip).outputs[0]

    @property
    def scalar(self) -> bool:
        scale = constant_of(self.quantize.inputs[1])
        return scale is not None and scale.ndim == 0

    def again(self, write: Writer, x: ir.Value, name: str, shape: Dims | None = None) -> ir.Value:
        """Another value written to the same codes."""
        dtype = self.codes.dtype
        if self.clip is None:
            return write.op("QuantizeLinear", [x, *self.quantize.inputs[1:]], name, dtype=dtype, shape=shape)
        wide = write.op("QuantizeLinear", [x, *self.quantize.inputs[1:]], f"{name}.unclipped", dtype=dtype, shape=shape)
        return write.op("Clip", [wide, *self.clip.inputs[1:]], name, dtype=dtype, shape=shape)


def read(value: ir.Value | None) -> Read | None:
    """How a value is read from codes; None for what comes from elsewhere, or from codes whose scale is no constant."""
    node = made_by(value, "DequantizeLinear")
    if node is None or node.inputs[0] is None:
        return None
    scale = constant_of(node.inputs[1])
    if scale is None:
        return None
    return Read(node, node.inputs[0], scale, None if scale.ndim == 0 else node.attributes.get_int("axis", 1))


def written(value: ir.Value) -> Written | None:
    """How the one reader of a value writes it to codes."""
    node = only_reader(value)
    if node is None or node.op_type != "QuantizeLinear" or constant_of(node.inputs[1]) is None:
        return None
    reader = only_reader(node.outputs[0])
    clip = reader if reader is not None and reader.op_type == "Clip" and reader.inputs[0] is node.outputs[0] else None
    return Written(node, clip)


def dequantize(write: Writer, codes: ir.Value, like: Read, name: str, shape: Dims | None = None) -> ir.Value:
    """Codes read as those of another tensor of one scale are."""
    return write.op("DequantizeLinear", [codes, *like.node.inputs[1:]], name, dtype=ir.DataType.FLOAT, shape=shape)


def dims(value: ir.Value) -> tuple[int | None, ...] | None:
    """The shape, None for an axis that is open; None where nothing is known."""
    return None if value.shape is None else tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def whole(values: Sequence[int | None]) -> list[int]:
    """A shape as Reshape takes it where each open axis stays where it is."""
    return [0 if value is None else value for value in values]
