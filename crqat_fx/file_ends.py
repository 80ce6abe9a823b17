"""The two ends of an exported detector, around the network whose outputs are logits and bins of each level.

    images  uint8 [B,H,W,3]                                  becomes the network's input [B,3,H,W] in [0, 1]
    logits [B,N,h,w], bins [B,64,h,w] of each level          become  boxes [B,A,4] xyxy in input pixels, scores [B,A,N]
    boxes, scores                                            become  detections [B,K,6] (xyxy, score, label), counts [B]

Anchors stand level by level, row by row. NMS is that of `crqat_fx.detections`, but for its limit on candidates: all above `conf` take part.
Equal scores are ordered as there, by level, class and place. Rows of `detections` beyond a picture's count are zeros.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from crqat_fx.detections import Selection
from passes.onnx.model import Writer, constant_of

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
SIDES = 4  # of a box
BYTE = np.float32(1 / 255)


def take_bytes(model: ir.Model, name: str = "images") -> None:
    """Pictures come as bytes, channels last. A quantizer of exactly bytes over 255 vanishes: the bytes are its codes."""
    graph = model.graph
    floats = next(value for value in graph.inputs if value.name == name)
    assert floats.shape is not None
    batch, _, height, width = floats.shape
    pictures = ir.Value(name=name, shape=ir.Shape([batch, height, width, 3]), type=ir.TensorType(ir.DataType.UINT8))
    graph.inputs[graph.inputs.index(floats)] = pictures
    first = next(iter(graph))
    write = Writer(graph, first)
    codes = [use.node.outputs[0] for use in floats.uses() if _takes_bytes(use.node)]
    planes = write.op("Transpose", [pictures], f"{name}.planes", dtype=ir.DataType.UINT8, shape=list(floats.shape), perm=[0, 3, 1, 2])
    for value in codes:
        made, named = value.producer(), value.name
        value.replace_all_uses_with(planes)
        assert made is not None
        graph.remove(made, safe=True)
        planes.name = named
    if floats.uses():
        cast = write.op("Cast", [planes], f"{name}.floats", dtype=FLOAT, shape=list(floats.shape), to=FLOAT)
        scaled = write.op("Div", [cast, write.scalar(f"{name}.most", 255)], f"{name}.scaled", dtype=FLOAT, shape=list(floats.shape))
        floats.replace_all_uses_with(scaled)


def _takes_bytes(node: ir.Node) -> bool:
    """Whether a node only writes a picture as the bytes that it came from."""
    if node.op_type != "QuantizeLinear":
        return False
    scale, zero = (constant_of(value) for value in node.inputs[1:3])
    return scale is not None and zero is not None and zero.dtype == np.uint8 and bool((scale == BYTE).all()) and not zero.any()


def decode(model: ir.Model, strides: Sequence[int]) -> None:
    """Boxes and scores in place of the logits and bins of each level."""
    graph = model.graph
    levels = len(strides)
    logits, bins = graph.outputs[:levels], graph.outputs[levels : 2 * levels]
    write = Writer(graph)
    boxes = [_boxes(write, level, stride) for level, stride in zip(bins, strides, strict=True)]
    scored = [_classes_last(write, level) for level in logits]
    together = write.op("Concat", scored, "logits", dtype=FLOAT, axis=1)
    ends = [write.op("Concat", boxes, "boxes", dtype=FLOAT, axis=1), write.op("Sigmoid", [together], "scores", dtype=FLOAT)]
    assert logits[0].shape is not None
    anchors = [_cells(level) for level in bins]
    count = None if None in anchors else sum(each or 0 for each in anchors)
    ends[0].shape, ends[1].shape = ir.Shape([logits[0].shape[0], count, SIDES]), ir.Shape([logits[0].shape[0], count, logits[0].shape[1]])
    graph.outputs.clear()
    graph.outputs.extend(ends)


def _cells(level: ir.Value) -> int | None:
    assert level.shape is not None
    height, width = level.shape[2], level.shape[3]
    return height * width if isinstance(height, int) and isinstance(width, int) else None


def _boxes(write: Writer, bins: ir.Value, stride: int) -> ir.Value:
    """[B,4K,h,w] -> [B,hw,4]: the expected distance of each side from the cell's centre, in pixels."""
    name = f"boxes_{stride}"
    assert bins.shape is not None
    count = bins.shape[1]
    assert isinstance(count, int)
    last = write.op("Transpose", [bins], f"{name}.last", dtype=FLOAT, perm=[0, 2, 3, 1])
    split = write.op("Reshape", [last, write.numbers("boxes.bins", 0, -1, SIDES, count // SIDES)], f"{name}.bins", dtype=FLOAT)
    weights = write.op("Softmax", [split], f"{name}.weights", dtype=FLOAT, axis=-1)
    steps = write.constant("boxes.steps", np.arange(count // SIDES, dtype=np.float32))
    shares = write.op("Mul", [weights, steps], f"{name}.shares", dtype=FLOAT)
    distances = write.op("ReduceSum", [shares, write.numbers("boxes.last_axis", 3)], f"{name}.distances", dtype=FLOAT, keepdims=0)
    halves = write.ops("Split", [distances, write.numbers("boxes.halves", 2, 2)], [f"{name}.before", f"{name}.behind"], dtype=FLOAT, axis=2)
    centres = _centres(write, bins, name)
    corners = [
        write.op(kind, [centres, half], f"{name}.{kind.lower()}", dtype=FLOAT) for kind, half in zip(("Sub", "Add"), halves, strict=True)
    ]
    cells = write.op("Concat", corners, f"{name}.cells", dtype=FLOAT, axis=2)
    return write.op("Mul", [cells, write.scalar(f"{name}.stride", stride)], name, dtype=FLOAT)


def _centres(write: Writer, bins: ir.Value, name: str) -> ir.Value:
    """[hw,2]: x and y of each cell's centre, in cells."""
    assert bins.shape is not None
    height, width = bins.shape[2], bins.shape[3]
    if isinstance(height, int) and isinstance(width, int):
        y, x = np.divmod(np.arange(height * width), width)
        return write.constant(f"{name}.centres", np.stack((x, y), 1).astype(np.float32) + np.float32(0.5))
    size = write.op("Shape", [bins], f"{name}.size", dtype=INT64, start=2, end=4)
    axes = []
    for axis, around in ((1, [1, -1]), (0, [-1, 1])):
        length = write.op(
            "Gather", [size, write.constant(f"boxes.axis.{axis}", np.array(axis, np.int64))], f"{name}.{axis}.length", dtype=INT64
        )
        ends = [write.constant(f"boxes.{number}", np.array(number, np.int64)) for number in (0, 1)]
        counted = write.op("Range", [ends[0], length, ends[1]], f"{name}.{axis}.counted", dtype=INT64)
        row = write.op("Reshape", [counted, write.numbers(f"boxes.around.{axis}", *around)], f"{name}.{axis}.row", dtype=INT64)
        grid = write.op("Expand", [row, size], f"{name}.{axis}.grid", dtype=INT64)
        axes.append(write.op("Reshape", [grid, write.numbers("boxes.column", -1, 1)], f"{name}.{axis}.column", dtype=INT64))
    cells = write.op("Concat", axes, f"{name}.corners", dtype=INT64, axis=1)
    floats = write.op("Cast", [cells], f"{name}.floats", dtype=FLOAT, to=FLOAT)
    return write.op("Add", [floats, write.scalar("boxes.half", 0.5)], f"{name}.centres", dtype=FLOAT)


def _classes_last(write: Writer, logits: ir.Value) -> ir.Value:
    """[B,N,h,w] -> [B,hw,N]."""
    name, shape = str(logits.name), logits.shape
    assert shape is not None
    last = write.op("Transpose", [logits], f"{name}.last", dtype=FLOAT, perm=[0, 2, 3, 1])
    if isinstance(shape[1], int):
        target = write.numbers("scores.shape", 0, -1, shape[1])
    else:
        texts = write.op("Shape", [last], f"{name}.texts", dtype=INT64, start=3, end=4)
        target = write.op("Concat", [write.numbers("scores.places", 0, -1), texts], f"{name}.shape", dtype=INT64, axis=0)
    return write.op("Reshape", [last, target], f"{name}.flat", dtype=FLOAT)


def suppress(model: ir.Model, selection: Selection, strides: Sequence[int]) -> None:
    """Detections and counts in place of boxes and scores."""
    graph = model.graph
    boxes, scores = graph.outputs
    write = Writer(graph)
    whole = {
        name: write.constant(f"nms.{name}", np.array(value, np.int64)) for name, value in (("max", selection.max), ("zero", 0), ("one", 1))
    }
    limits = [
        write.constant(f"nms.{name}", np.array([value], np.float32)) for name, value in (("iou", selection.iou), ("conf", selection.conf))
    ]
    by_class = write.op("Transpose", [scores], "nms.scores", dtype=FLOAT, perm=[0, 2, 1])
    most = write.numbers("nms.most", selection.max)
    kept = write.op("NonMaxSuppression", [boxes, by_class, most, *limits], "nms.kept", dtype=INT64)  # [n,3]: picture, class, anchor
    kept = _in_order(write, kept, boxes, scores, strides)
    columns = write.ops(
        "Split", [kept, write.numbers("nms.columns", 1, 1, 1)], ["nms.picture", "nms.class", "nms.anchor"], dtype=INT64, axis=1
    )
    found = write.op("GatherND", [by_class, kept], "nms.found", dtype=FLOAT)
    # one row a picture, what belongs to others at -1, and as many more that never count: the best `max` of each row are its detections
    pictures = write.op("Shape", [boxes], "nms.pictures", dtype=INT64, start=0, end=1)
    count = write.op("Squeeze", [pictures], "nms.picture_count", dtype=INT64)
    own = write.op("Range", [whole["zero"], count, whole["one"]], "nms.range", dtype=INT64)
    rows = write.op("Unsqueeze", [own, write.numbers("nms.axis", 1)], "nms.rows", dtype=INT64)
    turned = write.op("Transpose", [columns[0]], "nms.of", dtype=INT64, perm=[1, 0])
    belongs = write.op("Equal", [turned, rows], "nms.belongs", dtype=BOOL)
    never = write.scalar("nms.never", -1)
    scored = write.op("Where", [belongs, found, never], "nms.scored", dtype=FLOAT)
    padding = write.op("Concat", [pictures, most], "nms.padding_shape", dtype=INT64, axis=0)
    padded = write.op(
        "Concat", [scored, write.op("Expand", [never, padding], "nms.padding", dtype=FLOAT)], "nms.padded", dtype=FLOAT, axis=1
    )
    best = write.ops("TopK", [padded, most], ["nms.best", "nms.best_places"], axis=1)
    best[0].dtype, best[1].dtype = FLOAT, INT64
    valid = write.op("GreaterOrEqual", [best[0], write.scalar("nms.nothing", 0)], "nms.valid", dtype=BOOL)
    extra = write.constant("nms.extra", np.zeros((selection.max, 1), np.int64))
    taken = []
    for name, column in (("label", columns[1]), ("place", columns[2])):
        longer = write.op("Concat", [column, extra], f"nms.{name}s", dtype=INT64, axis=0)
        taken.append(write.op("Gather", [longer, best[1]], f"nms.{name}", dtype=INT64, axis=0))  # [B,K,1]
    corners = write.op("GatherND", [boxes, taken[1]], "nms.corners", dtype=FLOAT, batch_dims=1)
    last = write.numbers("nms.last", 2)
    score = write.op("Unsqueeze", [best[0], last], "nms.score", dtype=FLOAT)
    label = write.op("Cast", [taken[0]], "nms.labels_float", dtype=FLOAT, to=FLOAT)
    rows_found = write.op("Concat", [corners, score, label], "nms.rows_found", dtype=FLOAT, axis=2)
    is_row = write.op("Unsqueeze", [valid, last], "nms.is_row", dtype=BOOL)
    detections = write.op("Where", [is_row, rows_found, write.scalar("nms.nothing", 0)], "detections", dtype=FLOAT)
    numbers = write.op("Cast", [valid], "nms.valid_numbers", dtype=INT64, to=INT64)
    counts = write.op("ReduceSum", [numbers, write.numbers("nms.axis", 1)], "counts", dtype=INT64, keepdims=0)
    batch = boxes.shape[0] if boxes.shape is not None else None
    detections.shape, counts.shape = ir.Shape([batch, selection.max, 6]), ir.Shape([batch])
    graph.outputs.clear()
    graph.outputs.extend([detections, counts])


def _in_order(write: Writer, kept: ir.Value, boxes: ir.Value, scores: ir.Value, strides: Sequence[int]) -> ir.Value:
    """What was kept, by level, class and anchor: of equal scores the first of these comes first."""
    _, label, anchor = write.ops(
        "Split",
        [kept, write.numbers("nms.columns", 1, 1, 1)],
        [f"nms.kept.{each}" for each in ("picture", "class", "anchor")],
        dtype=INT64,
        axis=1,
    )
    anchors = write.op("Shape", [boxes], "nms.anchors", dtype=INT64, start=1, end=2)
    texts = write.op("Shape", [scores], "nms.texts", dtype=INT64, start=2, end=3)
    # of the cells of all levels, those of the first, and of the first two, ... : each level has a quarter of the one before
    parts = [(strides[-1] // stride) ** 2 for stride in strides]
    level: ir.Value | None = None
    for index in range(1, len(strides)):
        share = write.constant(f"nms.share.{index}", np.array([sum(parts[:index])], np.int64))
        scaled = write.op("Mul", [anchors, share], f"nms.level.{index}.scaled", dtype=INT64)
        start = write.op("Div", [scaled, write.numbers("nms.shares", sum(parts))], f"nms.level.{index}.start", dtype=INT64)
        beyond = write.op("GreaterOrEqual", [anchor, start], f"nms.level.{index}.beyond", dtype=BOOL)
        number = write.op("Cast", [beyond], f"nms.level.{index}.number", dtype=INT64, to=INT64)
        level = number if level is None else write.op("Add", [level, number], f"nms.level.{index}", dtype=INT64)
    assert level is not None
    blocks = write.op("Add", [write.op("Mul", [level, texts], "nms.level_blocks", dtype=INT64), label], "nms.blocks", dtype=INT64)
    key = write.op("Add", [write.op("Mul", [blocks, anchors], "nms.block_start", dtype=INT64), anchor], "nms.key", dtype=INT64)
    count = write.op("Shape", [kept], "nms.count", dtype=INT64, start=0, end=1)
    order = write.ops("TopK", [key, count], ["nms.sorted_key", "nms.order"], dtype=INT64, axis=0, largest=0)[1]
    places = write.op("Squeeze", [order, write.numbers("nms.axis", 1)], "nms.places_in_order", dtype=INT64)
    return write.op("Gather", [kept, places], "nms.ordered", dtype=INT64, axis=0)
