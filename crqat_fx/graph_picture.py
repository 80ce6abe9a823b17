"""The blocks of a graph as boxes, data flowing down, a colour a stage, and the bits on every line where there are quantizers. SVG.

Readable in light and dark, and with the keyboard: boxes take the focus in the order of the data, and say what is in them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import nn
from torch.fx import GraphModule, Node

from crqat_fx.files import written
from crqat_fx.graph_layout import LINE, Layout, Line, Link, Thing, layered, source_of
from crqat_fx.graph_view import FLOAT_BITS, GraphView, view
from crqat_fx.noise import EXACT
from passes.fx.graph import STAGE, describe, is_quantizer, module_of, nodes_in

WIDTH, HEIGHT, TALL = 164, 42, 57  # of a box; with a line of bits
LAYER_GAP, MARGIN = 38, 28  # between layers; around
HEADER, CAPTION, LEGEND = 64, 18, 180
EXPLAINED = (
    "On lines: bits (32: float). W, A: bits of weights, of what is read. dB: signal to quantization noise, end to end, of what leaves."
)
PORT = 26  # between the ends of lines at one box
COLOURS = {"backbone": "#c9dcf5", "neck": "#cdebd3", "neck-head": "#cdebd3", "head": "#fbdcc0"}
BORDERS = {"backbone": "#3b6ea8", "neck": "#3d8b54", "neck-head": "#3d8b54", "head": "#c06a1f"}
UNMARKED, UNMARKED_BORDER = "#ececec", "#777777"
DARK = {"backbone": "#20344f", "neck": "#1f3d2a", "neck-head": "#1f3d2a", "head": "#4a3018", "": "#33363b"}
DARK_BORDERS = {"backbone": "#79a9e0", "neck": "#74c48d", "neck-head": "#74c48d", "head": "#e29a57", "": "#a0a0a0"}


@dataclass(frozen=True)
class Box:
    """What stands in one block and one stage: a block that is cut by a stage is two boxes."""

    block: str
    stage: str


@dataclass(frozen=True)
class Face:
    """How a box is drawn: a label and lines below it, what it says when it is pointed at or read out, and where it leads."""

    label: str
    lines: tuple[str, ...]
    told: str
    stage: str
    leads_to: str | None = None
    is_stub: bool = False  # stands for what is elsewhere


def save_picture(graph: GraphModule, path: str | Path, title: str) -> None:
    with written(path) as temporary:
        temporary.write_text(draw_graph(graph, title), encoding="utf-8")


def draw_graph(graph: GraphModule, title: str) -> str:
    """The graph as SVG text; grey where no stage is marked."""
    return draw_view(view(graph), title)


def draw_view(seen: GraphView, title: str, decibels: Mapping[str, float] | None = None, leads_to: Mapping[Box, str] | None = None) -> str:
    """`decibels`: of tensors by path, the SQNR that a box shows of what leaves it. `leads_to`: the address of a box."""
    faces, reads = blocks_of_view(seen, decibels, leads_to)
    counts = Counter(box.stage for box, nodes in boxes_of(seen).items() for _ in nodes)
    legend = [(stage, f"{stage or 'no stage'}: {count} nodes") for stage, count in counts.items()]
    return svg(faces, reads, quantized=bool(seen.quantizers), title=title, legend=legend)


def blocks_of_view(
    seen: GraphView, decibels: Mapping[str, float] | None = None, leads_to: Mapping[Box, str] | None = None
) -> tuple[list[Face], list[dict[int, set[int]]]]:
    """A face for every box, and for every box those that it reads, with the bits that it reads them in: what `svg` draws."""
    members = boxes_of(seen)
    number = {node: place for place, nodes in enumerate(members.values()) for node in nodes}
    reads: list[dict[int, set[int]]] = [{} for _ in members]
    for read in seen.reads:
        source, reader = number[read.source], number[read.reader]
        if source != reader:
            reads[reader].setdefault(source, set()).update(() if read.bits is None else (read.bits,))
    faces = [
        Face(
            short(box.block),
            (contents(seen.graph, nodes), *bits_and_noise(seen, nodes, decibels)),
            "\n".join(_told(seen, nodes, decibels)),
            box.stage,
            (leads_to or {}).get(box),
        )
        for box, nodes in members.items()
    ]
    return faces, reads


def boxes_of(seen: GraphView) -> dict[Box, list[Node]]:
    members: dict[Box, list[Node]] = {}
    for node in seen.graph.graph.nodes:
        members.setdefault(Box(seen.blocks[node], node.meta.get(STAGE, "")), []).append(node)
    return members


# --- what a box says ---


def short(block: str) -> str:
    """The last part of the block's path, with the name of the list that a number counts."""
    parts = block.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def contents(graph: GraphModule, nodes: Sequence[Node]) -> str:
    """What a box holds: its convolutions and parameters, or the one thing it is."""
    modules = dict.fromkeys(module for node in nodes if (module := module_of(graph, node)) is not None)
    parameters = sum(value.numel() for module in modules for value in _own_parameters(module))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in modules)
    if convolutions:
        amount = f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters / 1e3:.1f} k"
        return f"{convolutions} conv{'s' if convolutions > 1 else ''}, {amount}"
    if nodes[0].op == "output":
        return f"{len(nodes_in(nodes[0].args[0]))} tensors"
    if len(nodes) == 1:
        return "input" if nodes[0].op == "placeholder" else called(graph, nodes[0]).partition("[")[0]
    return f"{len(nodes)} nodes"


def _own_parameters(module: nn.Module) -> Iterable[nn.Parameter]:
    """Without what its quantizers learn."""
    learned = {id(value) for each in module.modules() if is_quantizer(each) for value in each.parameters()}
    return (value for value in module.parameters() if id(value) not in learned)


def bits_and_noise(seen: GraphView, nodes: Sequence[Node], decibels: Mapping[str, float] | None) -> list[str]:
    """`W4 A8  23.1 dB`: the bits of weights and of what is read, and the worst of what leaves; nothing where nothing is quantized."""
    if not seen.quantizers:
        return []
    found = (("W", seen.bits_of_weights(nodes)), ("A", seen.bits_read(nodes) - {FLOAT_BITS}))
    parts = [f"{letter}{joined(bits)}" for letter, bits in found if bits]
    measured = [decibels[path] for node in seen.leaving(nodes) if decibels is not None and (path := seen.paths[node]) in decibels]
    return [" · ".join([*([" ".join(parts)] if parts else []), *([in_decibels(min(measured))] if measured else [])])]


def in_decibels(value: float) -> str:
    return "exact" if value >= EXACT else f"{value:.1f} dB"


def joined(bits: Iterable[int]) -> str:
    return "/".join(map(str, sorted(bits)))


def called(graph: GraphModule, node: Node) -> str:
    module = module_of(graph, node)
    if module is not None:
        return describe(module)
    return node.op if node.op in ("placeholder", "output", "get_attr") else str(getattr(node.target, "__name__", node.target))


def _told(seen: GraphView, nodes: Sequence[Node], decibels: Mapping[str, float] | None) -> Iterable[str]:
    for node in nodes:
        measured = None if decibels is None else decibels.get(seen.paths[node])
        yield f"{seen.paths[node]}: {called(seen.graph, node)}" + ("" if measured is None else f", {in_decibels(measured)}")


# --- drawing ---


def svg(
    faces: Sequence[Face],
    reads: Sequence[Mapping[int, set[int]]],
    *,
    quantized: bool,
    title: str = "",
    legend: Sequence[tuple[str, str]] = (),
) -> str:
    """Boxes and who reads whom, with the bits that are read. Without a title it is a part of a page, which has the styles."""
    height = max((HEIGHT + (TALL - HEIGHT) * (len(face.lines) - 1) for face in faces), default=HEIGHT)
    layout = layered([list(sources) for sources in reads], WIDTH)
    head = HEADER + (CAPTION if quantized else 0) if title else 0
    top = {thing: head + MARGIN + number * (height + LAYER_GAP) for number, row in enumerate(layout.rows) for thing in row}
    x = {thing: place + MARGIN for thing, place in layout.x.items()}
    wide = max(layout.width + 2 * MARGIN, MARGIN + LEGEND * (len(legend) + quantized) if title else 0, 9 * len(title) + 2 * MARGIN)
    tall = max(top.values(), default=0) + height + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {tall:.0f}" width="{wide:.0f}" height="{tall:.0f}"'
        ' font-family="Helvetica, Arial, sans-serif" role="group">'
    ]
    if title:
        lines += [f"<style>{styles()}</style>", *_heading(title, legend, quantized)]
    lines += _drawn_links(layout, x, top, height, faces, reads, quantized)
    for box, face in enumerate(faces):
        lines += _drawn_box(face, x[box], top[box], height)
    return "\n".join([*lines, "</svg>"]) + "\n"


def styles() -> str:
    """What attributes cannot say: the colours where dark ones are asked for, and the ring around what has the focus."""
    dark = [
        ".paper{fill:#16181c}",
        ".ink{fill:#eceef1}",
        ".faint{fill:#b4bac3}",
        ".arrow{fill:#b4bac3}",
        *(f".s-{stage or 'none'}{{fill:{colour};stroke:{DARK_BORDERS[stage]}}}" for stage, colour in DARK.items()),
        *(f".l-{stage or 'none'}{{stroke:{colour}}}" for stage, colour in DARK_BORDERS.items()),
    ]
    focus = ".box:focus{outline:none}.box:focus rect,a:focus .box rect{stroke-width:3.5}a{text-decoration:none}"
    return f"{focus}@media (prefers-color-scheme: dark){{{''.join(dark)}}}"


def _heading(title: str, legend: Sequence[tuple[str, str]], quantized: bool) -> list[str]:
    lines = [
        '<rect class="paper" width="100%" height="100%" fill="white"/>',
        f'<text class="ink" x="{MARGIN}" y="30" font-size="16" font-weight="bold" fill="#222">{escape(title)}</text>',
    ]
    for number, (stage, text) in enumerate(legend):
        left = MARGIN + LEGEND * number
        lines.append(f'<rect x="{left}" y="42" width="14" height="14" rx="3" {paint(stage)}/>')
        lines.append(f'<text class="ink" x="{left + 20}" y="53" font-size="12" fill="#222">{escape(text)}</text>')
    if quantized:
        left = MARGIN + LEGEND * len(legend)
        line = f'x1="{left}" y1="49" x2="{left + 34}" y2="49" stroke="{UNMARKED_BORDER}" stroke-width="1.3" stroke-dasharray="5 4"'
        lines.append(f'<line class="l-none" {line}/>')
        lines.append(f'<text class="ink" x="{left + 42}" y="53" font-size="12" fill="#222">float</text>')
        lines.append(f'<text class="faint" x="{MARGIN}" y="{HEADER + CAPTION / 2:.0f}" font-size="11" fill="#444">{EXPLAINED}</text>')
    return lines


def _drawn_links(
    layout: Layout,
    x: Mapping[Thing, float],
    top: Mapping[Thing, float],
    height: float,
    faces: Sequence[Face],
    reads: Sequence[Mapping[int, set[int]]],
    quantized: bool,
) -> list[str]:
    ports = _ports(layout, x, quantized)
    lines, labels = [], []
    for above, below in layout.links:
        start, end = top[above] + height, top[below]
        middle = (start + end) / 2
        source, face = source_of(above), faces[source_of(above)]
        arrives = ports.get((above, below), x[below])
        curve = f"M{x[above]:.1f} {start:.0f} C{x[above]:.1f} {middle:.0f} {arrives:.1f} {middle:.0f} {arrives:.1f} {end:.0f}"
        carried = set().union(*(bits.get(source, set()) for bits in reads)) if isinstance(below, Line) else reads[below][source]
        look = f'stroke="{BORDERS.get(face.stage, UNMARKED_BORDER)}" stroke-opacity=".75" stroke-width="1.3"'
        if quantized and carried <= {FLOAT_BITS}:
            look += ' stroke-dasharray="5 4"'
        passing = f" V{end + height:.0f}" if isinstance(below, Line) else ""
        lines.append(f'<path class="{_name("l", face.stage)}" d="{curve}{passing}" fill="none" {look}/>')
        if isinstance(below, Line):
            continue
        lines.append(f'<path class="arrow" d="M{arrives - 3.5:.1f} {end - 7:.0f}h7L{arrives:.1f} {end:.0f}z" fill="#555"/>')
        if quantized and (told := joined(carried)):
            wide = 6 * len(told) + 4
            under = f'x="{arrives - wide / 2:.1f}" y="{end - 20:.0f}" width="{wide}" height="12" rx="3"'
            place = f'x="{arrives:.1f}" y="{end - 10:.0f}" font-size="10" text-anchor="middle"'
            labels.append(f'<rect class="paper" {under} fill="white"/><text class="ink bits" {place} fill="#222">{told}</text>')
    return [*lines, *labels]


def _ports(layout: Layout, x: Mapping[Thing, float], quantized: bool) -> dict[Link, float]:
    """Where the lines that end in a box do so: side by side where each is to bear its bits."""
    arriving: dict[int, list[Thing]] = {}
    for above, below in layout.links:
        if not isinstance(below, Line):
            arriving.setdefault(below, []).append(above)
    ports: dict[Link, float] = {}
    for below, sources in arriving.items():
        apart = min(PORT, (WIDTH - LINE) / max(len(sources), 1)) if quantized else 0
        for number, above in enumerate(sorted(sources, key=lambda thing: x[thing])):
            ports[above, below] = x[below] + (number - (len(sources) - 1) / 2) * apart
    return ports


def _drawn_box(face: Face, middle: float, top: float, height: float) -> list[str]:
    dashes = ' stroke-dasharray="4 3"' if face.is_stub else ""
    focus = "" if face.leads_to is not None else ' tabindex="0"'
    lines = [f'<g class="box" role="img"{focus}><title>{escape(face.told)}</title>']
    if face.leads_to is not None:
        lines.insert(0, f'<a href="{escape(face.leads_to)}">')
    lines.append(f'<rect x="{middle - WIDTH / 2:.1f}" y="{top:.0f}" width="{WIDTH}" height="{height}" rx="7" {paint(face.stage)}{dashes}/>')
    written_lines = [face.label, *(line for line in face.lines if line)]
    first = top + (height - 15 * len(written_lines)) / 2 + 12
    for number, text in enumerate(written_lines):
        size, colour, shade = (13, "#111", "ink") if number == 0 else (10.5, "#444", "faint")
        place = f'class="{shade}" x="{middle:.1f}" y="{first + 15 * number:.1f}" font-size="{size}"'
        lines.append(f'<text {place} text-anchor="middle" fill="{colour}">{escape(text)}</text>')
    return [*lines, "</g></a>" if face.leads_to is not None else "</g>"]


def paint(stage: str) -> str:
    """How a box of a stage looks, in light and, with `styles`, in dark."""
    fill, border = COLOURS.get(stage, UNMARKED), BORDERS.get(stage, UNMARKED_BORDER)
    return f'class="{_name("s", stage)}" fill="{fill}" stroke="{border}" stroke-width="1.2"'


def _name(kind: str, stage: str) -> str:
    return f"{kind}-{stage if stage in COLOURS else 'none'}"
