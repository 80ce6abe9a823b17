"""What a checkpoint is: size, version, vocabulary, and a tree of blocks whose channels and strides are measured, not looked up.

The model runs once on tensors without content (the meta device), with a hook on every module: a module that is called is a block, it stands
below the one that called it, and its channels and stride are those of what came out. So the tree holds for any size, version and module of
one's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.text import Text
from rich.tree import Tree
from torch import Tensor, nn

from crqat_fx.checkpoint import Checkpoint
from crqat_fx.models.yolo_world import STRIDES, YoloWorld, size_of

HEIGHT, WIDTH = 32 * 11, 32 * 13  # a map of a picture scales both sides alike: no other tensor of the model does so by chance
CELLS = tuple(HEIGHT * WIDTH // stride**2 for stride in STRIDES)
TEXTS = 97  # prime, so that a dimension of this size is the vocabulary's
NAMES_SHOWN = 8
GUIDE = 4  # columns that rich's guides take a level
HEADER = ("block", "type", "channels", "stride", "parameters")
DEPTH = 2  # backbone, neck and head with their layers; one more opens the layers


@dataclass
class _Block:
    """A module that was called, as the hooks build it up."""

    name: str
    module: nn.Module
    calls: int = 0
    outputs: list[dict[str, Any]] = field(default_factory=list)
    children: list["_Block"] = field(default_factory=list)


def inspect_model(model: YoloWorld, checkpoint: Checkpoint, *, depth: int | None = DEPTH) -> dict[str, Any]:
    """What `crqat-fx inspect` shows, as JSON can write it. `depth` limits the tree: 1 is backbone, neck, head; None is no limit."""
    vocabulary = checkpoint.vocabulary
    picture_size = checkpoint.extra.get("size")
    return {
        "path": str(checkpoint.path),
        "origin": checkpoint.origin,
        "size": size_of(model.config),
        "version": model.config.version,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "text_width": model.config.text_width,
        "strides": list(STRIDES),
        "vocabulary": None if vocabulary is None else {"count": len(vocabulary.names), "first": list(vocabulary.names[:NAMES_SHOWN])},
        "picture_size": picture_size if isinstance(picture_size, int) else None,
        "text_encoder": bool(checkpoint.text_model),
        "blocks": [_described(block, "", depth) for block in _blocks(model)],
    }


def title_of(report: Mapping[str, Any]) -> str:
    return f"YOLO-World v{report['version']}, {report['size'] or 'a size of its own'}"


def tree(report: Mapping[str, Any]) -> Tree:
    """The report as rich draws it: the facts, and below them the blocks in the order in which they run."""
    vocabulary = report["vocabulary"]
    facts = {
        "file": f"{report['path']} ({report['origin']})",
        "parameters": f"{report['parameters']:,}",
        "strides": ", ".join(map(str, report["strides"])),
        "picture size": f"{report['picture_size']} px" if report["picture_size"] else "not said",
        "text width": str(report["text_width"]),
        "text encoder": "in the file" if report["text_encoder"] else "not in the file",
        "vocabulary": "none" if vocabulary is None else f"{vocabulary['count']:,} names: {', '.join(vocabulary['first'])}",
    }
    if vocabulary is not None and vocabulary["count"] > len(vocabulary["first"]):
        facts["vocabulary"] += ", ..."
    title = Text(title_of(report), style="bold")
    root = Tree(Text("\n").join([title, *(Text.assemble((f"{name:<14}", "dim"), value) for name, value in facts.items())]))
    rows = [HEADER, *_rows(report["blocks"], 1)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    root.add(_line(HEADER, 1, widths, "dim"))
    _grow(root, report["blocks"], 1, widths)
    return root


# --- drawing ---


def _rows(blocks: Sequence[Mapping[str, Any]], level: int) -> Iterator[tuple[str, ...]]:
    """The cells of every line; the first is as wide as the tree's guides make it."""
    for block in blocks:
        name, *others = _cells(block)
        yield (" " * GUIDE * level + name, *others)
        yield from _rows(block["children"], level + 1)


def _cells(block: Mapping[str, Any]) -> tuple[str, ...]:
    times = f" x{block['calls']}" if block["calls"] > 1 else ""
    channels = dict.fromkeys(str(output["channels"] or "x".join(map(str, output["shape"]))) for output in block["outputs"])
    strides = dict.fromkeys(str(output["stride"] or "-") for output in block["outputs"])
    return block["name"] + times, block["type"], "/".join(channels), "/".join(strides), f"{block['parameters']:,}"


def _grow(root: Tree, blocks: Sequence[Mapping[str, Any]], level: int, widths: Sequence[int]) -> None:
    for block in blocks:
        branch = root.add(_line(_cells(block), level, widths, "bold" if block["children"] else ""))
        _grow(branch, block["children"], level + 1, widths)


def _line(cells: Sequence[str], level: int, widths: Sequence[int], style: str) -> Text:
    name, kind, channels, strides, parameters = cells
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(name.ljust(widths[0] - GUIDE * level + 1), style)
    line.append(kind.ljust(widths[1] + 1), "dim")
    line.append(f"{channels.rjust(widths[2])} {strides.rjust(widths[3])} {parameters.rjust(widths[4])}")
    return line


# --- measuring ---


def _blocks(model: YoloWorld) -> list[_Block]:
    """The modules that run, in the order in which they do, each below the nearest one around it."""
    root = _Block("", model)
    around = [root]
    blocks: dict[str, _Block] = {}

    def enter(name: str, module: nn.Module) -> None:
        if name not in blocks:
            blocks[name] = _Block(name, module)
            around[-1].children.append(blocks[name])
        blocks[name].calls += 1
        around.append(blocks[name])

    def leave(output: Any) -> None:
        around.pop().outputs = [_output(tensor) for tensor in _tensors(output)]

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda module, _, name=name: enter(name, module)))
            handles.append(module.register_forward_hook(lambda _, __, output: leave(output)))
    without_content = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    images = torch.empty(1, 3, HEIGHT, WIDTH, device="meta")
    text = torch.empty(1, TEXTS, model.config.text_width, device="meta")
    try:
        with torch.no_grad():
            torch.func.functional_call(model, without_content, (images, text))
    finally:
        for handle in handles:
            handle.remove()
    return root.children


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)


def _output(tensor: Tensor) -> dict[str, Any]:
    """Channels and stride of a map, channels alone of a row of texts, the shape of everything; N stands for the number of texts."""
    shape = tuple(tensor.shape)
    is_map = len(shape) == 4 and HEIGHT * shape[3] == WIDTH * shape[2]
    is_texts = len(shape) == 3 and shape[1] == TEXTS and shape[2] not in CELLS
    channels = shape[1] if is_map else shape[2] if is_texts else None
    return {
        "channels": "N" if channels == TEXTS else channels,
        "stride": HEIGHT // shape[2] if is_map else None,
        "shape": ["N" if size == TEXTS else size for size in shape[1:]],
    }


def _described(block: _Block, prefix: str, depth: int | None) -> dict[str, Any]:
    """A block as plain data. A module that only hands on to one other is drawn as that one, under its own name."""
    inner = _unwrapped(block)
    children: list[dict[str, Any]] = []
    if depth is None or depth > 1:
        below = None if depth is None else depth - 1
        children = [_described(child, f"{inner.name}.", below) for child in _flattened(inner.children)]
    return {
        "name": block.name.removeprefix(prefix),
        "type": type(inner.module).__name__,
        "parameters": sum(parameter.numel() for parameter in block.module.parameters()),
        "calls": block.calls,
        "outputs": block.outputs,
        "children": children,
    }


def _unwrapped(block: _Block) -> _Block:
    while len(block.children) == 1 and block.children[0].children:
        block = block.children[0]
    return block


def _flattened(blocks: Sequence[_Block]) -> Iterator[_Block]:
    """The blocks, a Sequential replaced by what it holds."""
    for block in blocks:
        if isinstance(block.module, nn.Sequential):
            yield from _flattened(block.children)
        else:
            yield block
