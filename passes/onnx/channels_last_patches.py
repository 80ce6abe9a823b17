"""Takes the patches of pooled maps channels last, where each patch is a token: nothing has to be turned then.

    tokens = Transpose(Q(Concat_2(Reshape(p) [B,C,hw], ...)))   p [B,C,h,w], codes, the largest of windows of x, rows first, then columns
    becomes   Q(Concat_1(Reshape(p') [B,hw,C], ...))            p' [B,h,w,C] the same of x channels last

Left alone: windows whose sides are not known, what is joined of anything else, and codes that have another reader.
"""

from dataclasses import dataclass

import onnx_ir as ir

from passes.onnx.codes import CHANNELS_LAST, LAST, Read, Written, dequantize, dims, read
from passes.onnx.model import OnnxPass, Writer, constant_of, drop_dead, made_by, only_reader

ROWS, COLUMNS = 2, 3  # the axes of [B,C,H,W]


@dataclass(frozen=True)
class _Pooled:
    """A map, and the windows [start, end) of its rows and of its columns that were reduced; how the patches are read."""

    source: ir.Value
    rows: tuple[tuple[ir.Value, ir.Value], ...]
    columns: tuple[tuple[ir.Value, ir.Value], ...]
    patches: Read


@dataclass(frozen=True)
class _Tokens:
    """Patches of maps, together, and how they are written to codes."""

    maps: tuple[_Pooled, ...]
    codes: Written


class ChannelsLastPatches(OnnxPass):
    """Takes the patches of pooled maps channels last."""

    name = "channels-last-patches"

    def rewrite(self, graph: ir.Model) -> int:
        found = [(node, tokens) for node in graph.graph if (tokens := _tokens(node)) is not None]
        for node, tokens in found:
            _rewrite(graph.graph, node, tokens)
        drop_dead(graph)
        return len(found)


def _tokens(node: ir.Node) -> _Tokens | None:
    if node.op_type != "Transpose" or node.inputs[0] is None or list(node.attributes.get_ints("perm", [])) != [0, 2, 1]:
        return None
    clip = made_by(node.inputs[0], "Clip")
    quantize = made_by(node.inputs[0] if clip is None else clip.inputs[0], "QuantizeLinear")
    joined = None if quantize is None else made_by(quantize.inputs[0], "Concat")
    if quantize is None or joined is None or joined.attributes.get_int("axis", 0) != 2 or only_reader(node.inputs[0]) is not node:
        return None
    codes, maps = Written(quantize, clip), [_pooled(read(value)) for value in joined.inputs]
    known = tuple(each for each in maps if each is not None)
    return _Tokens(known, codes) if codes.scalar and len(known) == len(maps) else None


def _flattens(reshape: ir.Node) -> bool:
    before, after = reshape.inputs[0], dims(reshape.outputs[0])
    shape = None if before is None else dims(before)
    return shape is not None and after is not None and len(shape) == 4 and len(after) == 3 and after[1] == shape[1] is not None


def _pooled(patches: Read | None) -> _Pooled | None:
    flat = None if patches is None or patches.axis is not None else made_by(patches.codes, "Reshape")
    if patches is None or flat is None or not _flattens(flat):
        return None
    columns = _windows(flat.inputs[0], COLUMNS)
    rows = None if columns is None else _windows(columns[0], ROWS)
    return None if columns is None or rows is None else _Pooled(rows[0], rows[1], columns[1], patches)


def _windows(value: ir.Value | None, axis: int) -> tuple[ir.Value, tuple[tuple[ir.Value, ir.Value], ...]] | None:
    """The map whose windows along an axis were reduced and joined to a value."""
    joined = made_by(value, "Concat")
    if joined is None or joined.attributes.get_int("axis", 0) != axis:
        return None
    windows = [_window(each, axis) for each in joined.inputs]
    known = [each for each in windows if each is not None]
    if len(known) < len(windows) or any(source is not known[0][0] for source, _, _ in known):
        return None
    return known[0][0], tuple((start, end) for _, start, end in known)


def _window(value: ir.Value | None, axis: int) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    reduced = made_by(value, "ReduceMax")
    cut = None if reduced is None else made_by(reduced.inputs[0], "Slice")
    if reduced is None or cut is None or reduced.attributes.get_int("keepdims", 1) != 1 or len(cut.inputs) != 4:
        return None
    source, start, end, along = cut.inputs
    places = [constant_of(each) for each in (along, reduced.inputs[1], start, end)]
    if source is None or start is None or end is None or any(place is None or place.size != 1 for place in places):
        return None
    return (source, start, end) if all(place is not None and int(place.flat[0]) == axis for place in places[:2]) else None


def _rewrite(graph: ir.Graph, node: ir.Node, tokens: _Tokens) -> None:
    made, old = node.outputs[0], tokens.codes.codes
    write, name = Writer(graph, node), str(made.name)
    batch, count, channels = dims(made) or ()
    parts = [_patches(write, each, f"{name}.{index}", int(channels or 0)) for index, each in enumerate(tokens.maps)]
    joined = write.op("Concat", parts, f"{name}.joined", dtype=ir.DataType.FLOAT, shape=[batch, count, channels], axis=1)
    made.replace_all_uses_with(tokens.codes.again(write, joined, f"{old.name}{LAST}", [batch, count, channels]))


def _patches(write: Writer, pooled: _Pooled, name: str, channels: int) -> ir.Value:
    x, dtype = pooled.source, pooled.source.dtype
    batch, _, height, width = dims(x) or ()
    x = write.op("Transpose", [x], f"{name}.last", dtype=dtype, shape=[batch, height, width, channels], perm=CHANNELS_LAST)
    for axis, windows in ((1, pooled.rows), (2, pooled.columns)):
        along = write.numbers(f"{name}.axis.{axis}", axis)
        best = []
        for index, (start, end) in enumerate(windows):
            part = write.op("Slice", [x, start, end, along], f"{name}.{axis}.{index}.part", dtype=dtype)
            best.append(write.op("ReduceMax", [part, along], f"{name}.{axis}.{index}", dtype=dtype, keepdims=1))
        x = write.op("Concat", best, f"{name}.{axis}", dtype=dtype, axis=axis)
    count = len(pooled.rows) * len(pooled.columns)
    shape = [batch, count, channels]
    flat = write.op("Reshape", [x, write.numbers(f"{name}.shape", 0, -1, channels)], f"{name}.patches", dtype=dtype, shape=shape)
    return dequantize(write, flat, pooled.patches, f"{name}.values", shape)
