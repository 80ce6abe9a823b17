"""Lets the end of a byte cut what SiLU writes to fewer bits than a byte has, in the place of a Clip.

    codes = Clip(Q(x Q'(Sigmoid(x)), s, z), 0, highest)
    becomes   codes + d = Q(x Q'(Sigmoid(x)), s, z + d),   d = 255 - highest

where no code of x gives one below 0, which is found by trying all of them: SiLU never falls far. What reads the codes reads them with
z + d, through splits, pools and layouts on the way. Where no code of x gives one above `highest`, the Clip goes and nothing moves.

Left alone: what is not SiLU, codes that both ends would cut, that the graph returns, or that something else than DequantizeLinear or a
change of layout reads, such as a Concat of codes.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.onnx.codes import Read, read
from passes.onnx.model import OnnxPass, Writer, constant_of, drop_dead, made_by, only_reader

BYTE = 255
HANDED_ON = frozenset(("Split", "Transpose", "Reshape", "MaxPool", "Tile", "Squeeze", "Unsqueeze", "Slice", "ReduceMax", "Identity"))
SHIFTED = ".shifted"  # behind the name of codes that are


class SaturateCodes(OnnxPass):
    """Lets the end of a byte cut what SiLU writes to fewer bits, in the place of a Clip."""

    name = "saturate-codes"

    def rewrite(self, graph: ir.Model) -> int:
        found = sum(_saturated(graph.graph, node) for node in list(graph.graph) if node.op_type == "Clip")
        drop_dead(graph)
        return found


@dataclass(frozen=True)
class _Codes:
    """The codes that SiLU is written to, before they are cut: of each code of its input."""

    lowest: int
    highest: int


def _saturated(graph: ir.Graph, clip: ir.Node) -> bool:
    wide = made_by(clip.inputs[0], "QuantizeLinear")
    ends = [constant_of(value) for value in clip.inputs[1:3]]
    if wide is None or only_reader(wide.outputs[0]) is not clip or len(ends) != 2:
        return False
    if any(end is None or end.dtype != np.uint8 for end in ends):
        return False
    lowest, highest = (int(end) for end in ends if end is not None)
    reached = _reached(wide)
    if reached is None or lowest or reached.lowest < 0 < reached.highest - highest:
        return False
    codes = clip.outputs[0]
    if reached.highest <= highest:
        name, codes.name = codes.name, f"{codes.name}#before"
        codes.replace_all_uses_with(wide.outputs[0], replace_graph_outputs=True)
        wide.outputs[0].name = name
        return True
    readers = _readers(codes)
    if readers is None:
        return False
    zero = constant_of(wide.inputs[2])
    held = wide.inputs[2]
    assert zero is not None
    assert held is not None
    name, shift = str(codes.name), BYTE - highest
    moved = Writer(graph, wide).constant(f"{held.name}{SHIFTED}", np.array(int(zero) + shift, np.uint8))
    for node in (wide, *readers):
        node.replace_input_with(2, moved)
    codes.replace_all_uses_with(wide.outputs[0])
    codes.name, wide.outputs[0].name = f"{name}#before", f"{name}{SHIFTED}"
    return True


def _reached(wide: ir.Node) -> _Codes | None:
    """What x Sigmoid(x) is written to for any code of x; None where that is not what is written."""
    product = made_by(wide.inputs[0], "Mul")
    scale, zero = constant_of(wide.inputs[1]), constant_of(wide.inputs[2])
    if product is None or scale is None or scale.ndim or zero is None or zero.dtype != np.uint8:
        return None
    operands = [read(value) for value in product.inputs]
    for x, gate in (operands, operands[::-1]):
        written = None if gate is None else made_by(gate.codes, "QuantizeLinear")
        weighed = None if written is None else made_by(written.inputs[0], "Sigmoid")
        source = None if weighed is None else read(weighed.inputs[0])
        if (
            x is None
            or gate is None
            or written is None
            or source is None
            or source.codes is not x.codes
            or not (_is_byte(x) and _is_byte(gate))
        ):
            continue
        values = _values(x, np.arange(BYTE + 1))
        steps, middle = constant_of(written.inputs[1]), constant_of(written.inputs[2])
        if steps is None or steps.ndim or middle is None:
            continue
        gates = np.clip(np.rint(1 / (1 + np.exp(-values)) / steps) + int(middle), 0, BYTE)
        codes = np.rint(values * _values(gate, gates) / scale) + int(zero)
        return _Codes(int(codes.min()), int(codes.max()))
    return None


def _is_byte(value: Read) -> bool:
    return value.axis is None and value.codes.dtype == ir.DataType.UINT8


def _values(x: Read, codes: np.ndarray) -> np.ndarray:
    zero = constant_of(x.zero_point)
    values: np.ndarray = ((codes - (0 if zero is None else int(zero))) * x.scale).astype(np.float32)
    return values


def _readers(codes: ir.Value) -> list[ir.Node] | None:
    """The nodes that read values from codes, however these are laid out on the way; None where anything else reads them."""
    found: list[ir.Node] = []
    waiting = [codes]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return None
        for node, index in value.uses():
            if node.op_type == "DequantizeLinear" and index == 0 and len(node.inputs) == 3:
                found.append(node)
            elif node.op_type in HANDED_ON and index == 0:
                waiting += node.outputs
            else:
                return None
    return found
