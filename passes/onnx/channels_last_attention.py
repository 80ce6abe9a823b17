"""Writes max-sigmoid attention on codes channels last: what a position's best text is stands then in neighbouring bytes.

    codes = Q(ReduceMax_n(guide [1,m,N,c] @ x [B,m,c,HW]) f + b)           of one guide for the batch, of a number of texts that is known
    becomes   ReduceMax_n(Q(Conv(x [B,C,H,W], guide f as [mN,c,1,1], b of each head N times, groups m)) as [B,H,W,m,N])

    of any other guide [T,m,N,c]    becomes   Q(ReduceMax_n(x_h [B,HW,c] @ guide_h^T) f + b), head by head

    Q(Sigmoid(codes))               stays as it is, channels last
    Q(y [B,m,c,HW] s [B,m,1,HW])    becomes   Q(y [B,H,W,m,c] s [B,H,W,m,1])

Rounding never changes which of two is larger, so that it may come before the maximum. A guide may be computed: the integer convolution
takes its weight as an input. b is in codes of an int32 already. Left alone: a guide or an x that is not read from codes, an x with a scale
a head, a result that is not written to codes of one scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.onnx.codes import CHANNELS_FIRST, CHANNELS_LAST, LAST, Read, Written, dequantize, dims, read, whole, written
from passes.onnx.model import OnnxPass, Writer, constant_of, drop_dead, made_by, only_reader, replace, replace_reshapes

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
TEXTS = 2  # the axis of [B,m,N,HW] that the maximum is of


@dataclass(frozen=True)
class _Attention:
    """Scores of the best text: max_n(guide x) f + b, written to codes."""

    guide: Read
    x: Read
    maps: ir.Value  # codes [B,C,H,W] of x
    heads: int
    factor: float
    bias: Read | None
    codes: Written
    path: str


class ChannelsLastAttention(OnnxPass):
    """Writes max-sigmoid attention on codes channels last."""

    name = "channels-last-attention"

    def rewrite(self, graph: ir.Model) -> int:
        found = [attention for node in graph.graph if (attention := _attention(node)) is not None]
        for attention in found:
            maps = _scores(graph.graph, attention)
            _replaced(graph.graph, attention.codes.codes, maps)
        drop_dead(graph)
        moved = sum(
            _sigmoid(graph.graph, node) or _gate(graph.graph, node) for node in list(graph.graph) if node.op_type in ("Sigmoid", "Mul")
        )
        drop_dead(graph)
        return len(found) + moved


def _attention(node: ir.Node) -> _Attention | None:
    product = made_by(node.inputs[0], "MatMul") if node.op_type == "ReduceMax" else None
    if product is None or len(node.inputs) < 2 or node.attributes.get_int("keepdims", 1) != 0:
        return None
    axes, guide, x = constant_of(node.inputs[1]), read(product.inputs[0]), read(product.inputs[1])
    if axes is None or axes.tolist() != [TEXTS] or guide is None or x is None or x.axis is not None or guide.axis not in (None, 1):
        return None
    reshape, shape = made_by(x.codes, "Reshape"), dims(x.codes)
    maps = None if reshape is None else reshape.inputs[0]
    around = None if maps is None else dims(maps)
    if maps is None or shape is None or around is None or len(around) != 4 or len(shape) != 4 or not guide.symmetric:
        return None
    heads, width = shape[1], shape[2]
    if heads is None or width is None or around[1] != heads * width:
        return None
    factor, bias, end = 1.0, None, node.outputs[0]
    while (reader := only_reader(end)) is not None and reader.op_type in ("Mul", "Add"):
        other = next((value for value in reader.inputs if value is not end), None)
        number, added = constant_of(other), read(other)
        if reader.op_type == "Mul" and number is not None and number.ndim == 0 and number > 0 and bias is None and factor == 1:
            factor = float(number)
        elif (
            reader.op_type == "Add"
            and added is not None
            and added.codes.dtype == ir.DataType.INT32
            and dims(added.codes) == (heads, 1)
            and bias is None
        ):
            bias = added
        else:
            return None
        end = reader.outputs[0]
    codes = written(end)
    if codes is None or not codes.scalar:
        return None
    return _Attention(guide, x, maps, heads, factor, bias, codes, str(node.outputs[0].name))


def _scores(graph: ir.Graph, attention: _Attention) -> ir.Value:
    """The codes of the scores [B,H,W,m]."""
    end = attention.codes.codes.producer()
    assert end is not None
    write = Writer(graph, end)
    sets, _, texts, width = dims(attention.guide.codes) or (None,) * 4
    if sets != 1 or texts is None or width is None or (attention.bias is not None and constant_of(attention.bias.codes) is None):
        return _by_head(write, attention)
    return _convolved(write, attention, texts, width)


def _convolved(write: Writer, attention: _Attention, texts: int, width: int) -> ir.Value:
    """One guide is the kernel of a convolution of groups."""
    path, guide, heads = attention.path, attention.guide, attention.heads
    batch, _, height, columns = dims(attention.maps) or ()
    turned = write.numbers(f"{path}.kernel_shape", heads * texts, width, 1, 1)
    kernels = write.op(
        "Reshape", [guide.codes, turned], f"{guide.codes.name}.kernels", dtype=guide.codes.dtype, shape=[heads * texts, width, 1, 1]
    )
    scales = np.repeat(np.broadcast_to(guide.scale, (heads,)) * np.float32(attention.factor), texts).astype(np.float32)
    scale = write.constant(f"{path}.weight_scale", scales)
    weight = write.op("DequantizeLinear", [kernels, scale], f"{path}.weight", dtype=FLOAT, shape=kernels.shape, axis=0)
    given = [dequantize(write, attention.maps, attention.x, f"{path}.maps", attention.maps.shape), weight]
    if attention.bias is not None:
        kind, name = attention.bias.codes.dtype, str(attention.bias.codes.name)
        rows = write.op(
            "Expand",
            [attention.bias.codes, write.numbers(f"{path}.bias_rows", heads, texts)],
            f"{name}.texts",
            dtype=kind,
            shape=[heads, texts],
        )
        biases = write.op("Reshape", [rows, write.numbers(f"{path}.bias_row", -1)], f"{name}.row", dtype=kind, shape=[heads * texts])
        step = write.constant(f"{path}.bias_scale", np.repeat(np.broadcast_to(attention.bias.scale, (heads,)), texts))
        given.append(write.op("DequantizeLinear", [biases, step], f"{path}.bias", dtype=FLOAT, shape=[heads * texts], axis=0))
    shape = [batch, heads * texts, height, columns]
    scores = write.op("Conv", given, f"{path}.scores", dtype=FLOAT, shape=shape, group=heads)
    codes_of_all = attention.codes.again(write, scores, f"{path}.scores.codes", shape)
    dtype = codes_of_all.dtype
    last = write.op(
        "Transpose", [codes_of_all], f"{path}.scores.last", dtype=dtype, shape=[batch, height, columns, heads * texts], perm=CHANNELS_LAST
    )
    split = write.numbers(f"{path}.scores.shape", 0, 0, 0, heads, texts)
    by_text = write.op("Reshape", [last, split], f"{path}.scores.texts", dtype=dtype, shape=[batch, height, columns, heads, texts])
    axis = write.numbers(f"{path}.text_axis", 4)
    return write.op("ReduceMax", [by_text, axis], f"{path}.best", dtype=dtype, shape=[batch, height, columns, heads], keepdims=0)


def _by_head(write: Writer, attention: _Attention) -> ir.Value:
    """Any other guide is multiplied head by head: a product of codes has one scale."""
    path, guide, x, heads = attention.path, attention.guide, attention.x, attention.heads
    batch, channels, height, columns = dims(attention.maps) or ()
    text_batch, _, texts, width = dims(guide.codes) or ()
    assert channels is not None
    assert width is not None
    kind, guides = attention.maps.dtype, guide.codes.dtype
    last = write.op(
        "Transpose", [attention.maps], f"{path}.maps.last", dtype=kind, shape=[batch, height, columns, channels], perm=CHANNELS_LAST
    )
    flat = write.op(
        "Reshape",
        [last, write.numbers(f"{path}.places", 0, -1, channels)],
        f"{path}.places.codes",
        dtype=kind,
        shape=[batch, None, channels],
    )
    widths = write.numbers(f"{path}.widths", *[width] * heads)
    ones = write.numbers(f"{path}.heads", *[1] * heads)
    parts = write.ops("Split", [flat, widths], [f"{path}.{head}.codes" for head in range(heads)], dtype=kind, axis=2)
    split = write.ops("Split", [guide.codes, ones], [f"{guide.name}.{head}.split" for head in range(heads)], dtype=guides, axis=1)
    scales = np.broadcast_to(guide.scale, (heads,))
    zero = write.constant(f"{guide.name}.zero", np.zeros((), np.int8))
    best = []
    for head, (part, text) in enumerate(zip(parts, split, strict=True)):
        name = f"{path}.{head}"
        alone = write.op(
            "Squeeze", [text, write.numbers(f"{path}.head_axis", 1)], f"{name}.guide", dtype=guides, shape=[text_batch, texts, width]
        )
        turned = write.op("Transpose", [alone], f"{name}.guide.turned", dtype=guides, shape=[text_batch, width, texts], perm=[0, 2, 1])
        scale = write.constant(f"{name}.guide.scale", np.array(scales[head], np.float32))
        values = write.op("DequantizeLinear", [turned, scale, zero], f"{name}.guide.values", dtype=FLOAT, shape=[text_batch, width, texts])
        places = dequantize(write, part, x, f"{name}.values", [batch, None, width])
        scores = write.op("MatMul", [places, values], f"{name}.scores", dtype=FLOAT, shape=[batch, None, texts])
        best.append(write.op("ReduceMax", [scores, write.numbers(f"{path}.text_axis", 2)], f"{name}.best", dtype=FLOAT, keepdims=1))
    together = write.op("Concat", best, f"{path}.best", dtype=FLOAT, shape=[batch, None, heads], axis=2)
    if attention.factor != 1:
        together = write.op(
            "Mul", [together, write.scalar(f"{path}.factor", attention.factor)], f"{path}.scaled", dtype=FLOAT, shape=[batch, None, heads]
        )
    if attention.bias is not None:
        row = write.op(
            "Reshape",
            [attention.bias.codes, write.numbers(f"{path}.row", heads)],
            f"{attention.bias.codes.name}.row",
            dtype=ir.DataType.INT32,
            shape=[heads],
        )
        biases = write.op("DequantizeLinear", [row, *attention.bias.node.inputs[1:]], f"{path}.bias", dtype=FLOAT, shape=[heads], axis=0)
        together = write.op("Add", [together, biases], f"{path}.shifted", dtype=FLOAT, shape=[batch, None, heads])
    codes = attention.codes.again(write, together, f"{path}.places_codes", [batch, None, heads])
    if height is not None and columns is not None:
        target = write.numbers(f"{path}.shape", 0, height, columns, heads)
    else:
        sides = write.op("Shape", [last], f"{path}.sides", dtype=INT64, start=0, end=3)
        target = write.op("Concat", [sides, write.numbers(f"{path}.count", heads)], f"{path}.shape", dtype=INT64, axis=0)
    return write.op("Reshape", [codes, target], f"{path}.maps.codes", dtype=codes.dtype, shape=[batch, height, columns, heads])


def _replaced(graph: ir.Graph, old: ir.Value, maps: ir.Value) -> None:
    """The codes `maps` [B,H,W,..], and what has the shape of the old codes made of them, for readers that are not moved."""
    name = str(old.name)
    made = old.producer()
    assert made is not None
    write = Writer(graph, made)
    maps.name = f"{name}{LAST}"
    batch, height, columns, channels = dims(maps) or ()
    first = write.op("Transpose", [maps], f"{name}.first", dtype=maps.dtype, shape=[batch, channels, height, columns], perm=CHANNELS_FIRST)
    shape = dims(old) or ()
    target = write.numbers(f"{name}.shape", *whole(shape[:-1]), -1)
    replace(old, write.op("Reshape", [first, target], f"{name}.flat", dtype=maps.dtype, shape=old.shape))


def _maps_of(codes: ir.Value) -> ir.Value | None:
    """The codes [B,H,W,..] that others are a reshape of with channels first; None where they are not."""
    value: ir.Value | None = codes
    while (node := made_by(value, "Reshape")) is not None:
        value = node.inputs[0]
    node = made_by(value, "Transpose")
    return node.inputs[0] if node is not None and list(node.attributes.get_ints("perm", [])) == CHANNELS_FIRST else None


def _sigmoid(graph: ir.Graph, node: ir.Node) -> bool:
    x, codes = read(node.inputs[0]), written(node.outputs[0])
    if (
        node.op_type != "Sigmoid"
        or x is None
        or x.axis is not None
        or codes is None
        or not codes.scalar
        or made_by(x.codes, "Reshape") is None
    ):
        return False
    maps = _maps_of(x.codes)
    if maps is None:
        return False
    end, shape = codes.codes.producer(), maps.shape
    assert end is not None
    write, name = Writer(graph, end), str(node.outputs[0].name)
    values = dequantize(write, maps, x, f"{name}.maps", shape)
    weighed = write.op("Sigmoid", [values], f"{name}.last", dtype=FLOAT, shape=shape)
    _replaced(graph, codes.codes, codes.again(write, weighed, f"{name}.last.codes", shape))
    return True


def _gate(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type != "Mul":
        return False
    y, s, codes = read(node.inputs[0]), read(node.inputs[1]), written(node.outputs[0])
    if y is None or s is None or codes is None or not codes.scalar or y.axis is not None or s.axis is not None:
        return False
    reshape, shape, gates = made_by(y.codes, "Reshape"), dims(y.codes), dims(s.codes)
    maps = None if reshape is None else reshape.inputs[0]
    weights = _maps_of(s.codes)
    if maps is None or weights is None or shape is None or gates is None or len(shape) != 4 or len(gates) != 4 or gates[2] != 1:
        return False
    batch, channels, height, columns = dims(maps) or (None,) * 4
    _, heads, width, _ = shape
    if heads is None or width is None or channels != heads * width or gates[1] != heads or (dims(weights) or ())[-1] != heads:
        return False
    end = codes.codes.producer()
    assert end is not None
    write, name = Writer(graph, end), str(node.outputs[0].name)
    places: Sequence[int | None] = [batch, height, columns]
    last = write.op("Transpose", [maps], f"{name}.maps.last", dtype=maps.dtype, shape=[*places, channels], perm=CHANNELS_LAST)
    apart = write.op(
        "Reshape",
        [last, write.numbers(f"{name}.heads", 0, 0, 0, heads, width)],
        f"{name}.heads.codes",
        dtype=maps.dtype,
        shape=[*places, heads, width],
    )
    spread = write.op(
        "Unsqueeze", [weights, write.numbers(f"{name}.axis", 4)], f"{name}.weights.codes", dtype=weights.dtype, shape=[*places, heads, 1]
    )
    factors = [
        dequantize(write, apart, y, f"{name}.heads.values", apart.shape),
        dequantize(write, spread, s, f"{name}.weights", spread.shape),
    ]
    product = write.op("Mul", factors, f"{name}.last", dtype=FLOAT, shape=apart.shape)
    gated = codes.again(write, product, f"{name}.last.codes", apart.shape)
    together = write.op(
        "Reshape",
        [gated, write.numbers(f"{name}.channels", 0, 0, 0, channels)],
        f"{name}.codes",
        dtype=gated.dtype,
        shape=[*places, channels],
    )
    old = codes.codes
    together.name = f"{old.name}{LAST}"
    first = write.op(
        "Transpose", [together], f"{name}.first", dtype=gated.dtype, shape=[batch, channels, height, columns], perm=CHANNELS_FIRST
    )
    replace_reshapes(old, [batch, channels, height, columns], first)
    if old.uses() or old.is_graph_output():
        target = write.numbers(f"{name}.shape", *whole(shape[:-1]), -1)
        replace(old, write.op("Reshape", [first, target], f"{name}.flat", dtype=old.dtype, shape=old.shape))
    return True
