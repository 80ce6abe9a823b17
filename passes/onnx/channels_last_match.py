"""Writes the match of regions and texts on codes channels last, as one integer product.

    y = text [T,N,D] @ x [B,D,HW]                     becomes   y' [B,H,W,N] = x' [B,H,W,D] @ text^T
    y = text @ (x / max(|x|, eps)) of each position    becomes   y' = (x' @ text^T) / max(|x'|, eps)

and what is added to y and the codes it is written to follow. A text that is constant is turned when the file is loaded; any other in the
graph, and the positions are flattened, as one text belongs to one picture. Left alone: a text or an x that is not read from codes, and
codes of x with more than one scale.
"""

from dataclasses import dataclass

import onnx_ir as ir

from passes.onnx.codes import CHANNELS_FIRST, CHANNELS_LAST, LAST, Read, Written, dequantize, dims, read, written
from passes.onnx.model import OnnxPass, Writer, constant_of, drop_dead, made_by, only_reader, replace, replace_reshapes

FLOAT = ir.DataType.FLOAT
CHANNELS = 1


@dataclass(frozen=True)
class _Match:
    text: Read
    x: Read
    maps: ir.Value  # codes [B,D,H,W] of x
    floor: ir.Value | None  # eps of the norm that x is divided by; None: it is not
    added: ir.Value | None
    codes: Written
    path: str


class ChannelsLastMatch(OnnxPass):
    """Writes the match of regions and texts on codes channels last, as one integer product."""

    name = "channels-last-match"

    def rewrite(self, graph: ir.Model) -> int:
        found = [match for node in graph.graph if (match := _match(node)) is not None]
        for match in found:
            _rewritten(graph.graph, match)
        drop_dead(graph)
        return len(found)


def _match(node: ir.Node) -> _Match | None:
    text = read(node.inputs[0]) if node.op_type == "MatMul" else None
    if text is None or text.axis is not None or not text.symmetric or len(dims(text.codes) or ()) != 3:
        return None
    x, maps, floor = _regions(node.inputs[1])
    if x is None or maps is None or x.axis is not None or len(dims(maps) or ()) != 4:
        return None
    end, added, path = node.outputs[0], None, str(node.outputs[0].name).removesuffix(".product")
    reader = only_reader(end)
    if reader is not None and reader.op_type == "Add":
        added = next((value for value in reader.inputs if value is not end), None)
        number = constant_of(added)
        if number is None or number.ndim:
            return None
        end = reader.outputs[0]
    codes = written(end)
    return None if codes is None or not codes.scalar else _Match(text, x, maps, floor, added, codes, path)


def _regions(value: ir.Value | None) -> tuple[Read | None, ir.Value | None, ir.Value | None]:
    """What [B,D,HW] is read from: codes flattened, or codes divided by their norm and flattened."""
    plain = read(value)
    if plain is not None:
        flat = made_by(plain.codes, "Reshape")
        return plain, None if flat is None else flat.inputs[0], None
    flat = made_by(value, "Reshape")
    divided = None if flat is None else made_by(flat.inputs[0], "Div")
    floored = None if divided is None else made_by(divided.inputs[1], "Max")
    norm = None if floored is None else made_by(floored.inputs[0], "ReduceL2")
    if divided is None or floored is None or norm is None:
        return None, None, None
    x, normed, axes = read(divided.inputs[0]), read(norm.inputs[0]), constant_of(norm.inputs[1])
    if x is None or normed is None or normed.codes is not x.codes or axes is None or axes.tolist() != [CHANNELS]:
        return None, None, None
    return x, x.codes, floored.inputs[1]


def _rewritten(graph: ir.Graph, match: _Match) -> None:
    end = match.codes.codes.producer()
    assert end is not None
    write, path, text = Writer(graph, end), match.path, match.text
    batch, depth, height, columns = dims(match.maps) or ()
    _, texts, _ = dims(text.codes) or ()
    stored = constant_of(text.codes)
    constant = stored is not None and stored.shape[0] == 1
    places = [batch, height, columns] if constant else [batch, None if height is None or columns is None else height * columns]
    assert depth is not None
    regions = write.op(
        "Transpose", [match.maps], f"{path}.regions", dtype=match.maps.dtype, shape=[batch, height, columns, depth], perm=CHANNELS_LAST
    )
    if constant:
        alone = write.op(
            "Squeeze", [text.codes, write.numbers(f"{path}.one", 0)], f"{path}.texts", dtype=text.codes.dtype, shape=[texts, depth]
        )
        turned = write.op("Transpose", [alone], f"{path}.text", dtype=text.codes.dtype, shape=[depth, texts], perm=[1, 0])
    else:
        regions = write.op(
            "Reshape",
            [regions, write.numbers(f"{path}.places", 0, -1, depth)],
            f"{path}.flat",
            dtype=match.maps.dtype,
            shape=[*places, depth],
        )
        shape = [(dims(text.codes) or (None,))[0], depth, texts]
        turned = write.op("Transpose", [text.codes], f"{path}.text", dtype=text.codes.dtype, shape=shape, perm=[0, 2, 1])
    values = dequantize(write, regions, match.x, f"{path}.regions.values", regions.shape)
    kernel = dequantize(write, turned, text, f"{path}.text.values", turned.shape)
    product = write.op("MatMul", [values, kernel], f"{path}.matched", dtype=FLOAT, shape=[*places, texts])
    if match.floor is not None:
        again = dequantize(write, regions, match.x, f"{path}.regions.normed", regions.shape)
        axis = write.numbers(f"{path}.axis", len(places))
        norm = write.op("ReduceL2", [again, axis], f"{path}.norm", dtype=FLOAT, shape=[*places, 1], keepdims=1)
        floored = write.op("Max", [norm, match.floor], f"{path}.divisor", dtype=FLOAT, shape=[*places, 1])
        product = write.op("Div", [product, floored], f"{path}.normed", dtype=FLOAT, shape=[*places, texts])
    if match.added is not None:
        product = write.op("Add", [product, match.added], f"{path}.shifted", dtype=FLOAT, shape=[*places, texts])
    old = match.codes.codes
    codes = match.codes.again(write, product, f"{old.name}{LAST}", [*places, texts])
    order = CHANNELS_FIRST if constant else [0, 2, 1]
    first = write.op("Transpose", [codes], f"{path}.first", dtype=codes.dtype, shape=[batch, texts, *places[1:]], perm=order)
    if not constant:
        replace(old, first)
        return
    replace_reshapes(old, [batch, texts, height, columns], first)
    if old.uses() or old.is_graph_output():
        target = write.numbers(f"{path}.shape", 0, 0, -1)
        replace(old, write.op("Reshape", [first, target], f"{path}.old", dtype=codes.dtype, shape=old.shape))
