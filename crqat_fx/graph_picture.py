"""The partition of a graph as a picture: its blocks as boxes, data flowing down, a colour a stage. SVG, written here.

A layered layout: a box stands a layer below the lowest box it reads; a value read further down runs as one line from which its readers
branch; boxes of a layer are ordered by the mean of their neighbours, and moved sideways to where the lines are shortest (least squares with
the distances between boxes kept).
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import nn
from torch.fx import GraphModule, Node

from crqat_fx.files import written
from passes.fx.graph import STAGE, blocks_of, describe, module_of, node_paths, nodes_in

WIDTH, HEIGHT = 164, 42  # of a box
LINE, GAP, LAYER_GAP, MARGIN = 12, 22, 34, 28  # width kept for a line; between things of a layer; between layers; around
HEADER, LEGEND = 64, 180
SWEEPS = 24
STRAIGHT = 8  # how much more a long line weighs than a box
COLOURS = {"backbone": "#c9dcf5", "neck": "#cdebd3", "neck-head": "#cdebd3", "head": "#fbdcc0"}
BORDERS = {"backbone": "#3b6ea8", "neck": "#3d8b54", "neck-head": "#3d8b54", "head": "#c06a1f"}
UNMARKED, UNMARKED_BORDER = "#ececec", "#777777"


@dataclass(frozen=True)
class Box:
    """What stands in one block and one stage: a block that is cut by a stage is two boxes."""

    block: str
    stage: str


@dataclass(frozen=True)
class Line:
    """Where the value of a box passes a layer on its way further down."""

    source: Box
    layer: int


Thing = Box | Line


def save_picture(graph: GraphModule, path: str | Path, title: str) -> None:
    with written(path) as temporary:
        temporary.write_text(draw_graph(graph, title), encoding="utf-8")


def draw_graph(graph: GraphModule, title: str) -> str:
    """The graph as SVG text; grey where no stage is marked."""
    blocks = blocks_of(graph)
    box_of = {node: Box(blocks[node], node.meta.get(STAGE, "")) for node in graph.graph.nodes}
    members: dict[Box, list[Node]] = {}
    for node, box in box_of.items():
        members.setdefault(box, []).append(node)
    reads = {
        box: list(dict.fromkeys(box_of[s] for n in nodes for s in n.all_input_nodes if box_of[s] != box)) for box, nodes in members.items()
    }
    layers = _layers(reads)
    links = _links(reads, layers)
    rows = _ordered(layers, links)
    return _svg(graph, title, members, rows, links, _positions(rows, links))


# --- layout ---


def _layers(reads: Mapping[Box, Sequence[Box]]) -> dict[Box, int]:
    """A layer below the lowest box that is read; a box that reads none stands right above its highest reader."""
    layers: dict[Box, int] = {}
    waiting = list(reads)
    while waiting:
        # blocks that read each other have no first one: the one that starts earlier goes above, and the way back is drawn upwards
        box = next((each for each in waiting if all(source in layers for source in reads[each])), waiting[0])
        layers[box] = max((layers[source] + 1 for source in reads[box] if source in layers), default=0)
        waiting.remove(box)
    for box in reads:
        if not reads[box]:
            layers[box] = max(min((layers[reader] for reader in reads if box in reads[reader]), default=1) - 1, 0)
    return layers


def _links(reads: Mapping[Box, Sequence[Box]], layers: Mapping[Box, int]) -> list[tuple[Thing, Thing]]:
    """Pairs of things of neighbouring layers that a value runs between."""
    links: dict[tuple[Thing, Thing], None] = {}
    for box, sources in reads.items():
        for source in sources:
            above: Thing = source
            for number in range(layers[source] + 1, layers[box]):
                below = Line(source, number)
                links[above, below] = None
                above = below
            links[above, box] = None
    return list(links)


def _ordered(layers: Mapping[Box, int], links: Sequence[tuple[Thing, Thing]]) -> list[list[Thing]]:
    """The things of each layer from left to right, so that few lines cross: the order of fewest crossings that the sweeps come by."""
    things: list[Thing] = [*layers, *dict.fromkeys(thing for link in links for thing in link if isinstance(thing, Line))]
    rows: list[list[Thing]] = [[] for _ in range(max(layers.values()) + 1)]
    for thing in things:
        rows[thing.layer if isinstance(thing, Line) else layers[thing]].append(thing)
    best, fewest = [list(row) for row in rows], _crossings(rows, links)
    for sweep in range(SWEEPS):
        for number in range(len(rows)) if sweep % 2 == 0 else reversed(range(len(rows))):
            place = {thing: position / max(len(row), 1) for row in rows for position, thing in enumerate(row)}
            neighbours = _neighbours(rows[number], links, down=sweep % 2 == 0)
            rows[number].sort(key=lambda thing: _mean([place[other] for other in neighbours[thing]], place[thing]))
        crossings = _crossings(rows, links)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _crossings(rows: Sequence[Sequence[Thing]], links: Sequence[tuple[Thing, Thing]]) -> int:
    total = 0
    for upper, lower in itertools.pairwise(rows):
        above, below = ({thing: position for position, thing in enumerate(row)} for row in (upper, lower))
        ends = [(above[a], below[b]) for a, b in links if a in above and b in below]
        total += sum((a - c) * (b - d) < 0 for number, (a, b) in enumerate(ends) for c, d in ends[number + 1 :])
    return total


def _positions(rows: Sequence[Sequence[Thing]], links: Sequence[tuple[Thing, Thing]]) -> dict[Thing, float]:
    """The middle of every thing: near the mean of its neighbours, in the order of its row, without touching."""
    x: dict[Thing, float] = {}
    for row in rows:
        x.update(zip(row, _spread(row, [0.0] * len(row)), strict=True))
    for sweep in range(4 * SWEEPS):
        both = sweep >= 2 * SWEEPS
        for row in rows if sweep % 2 == 0 else reversed(rows):
            down = _neighbours(row, links, down=sweep % 2 == 0)
            up = _neighbours(row, links, down=sweep % 2 == 1) if both else {thing: [] for thing in row}
            wanted = [
                _mean([x[other] for other in (*down[thing], *up[thing]) for _ in range(_pull(thing, other))], x[thing]) for thing in row
            ]
            x.update(zip(row, _spread(row, wanted), strict=True))
    left = min(position - _width(thing) / 2 for thing, position in x.items())
    return {thing: position - left + MARGIN for thing, position in x.items()}


def _spread(row: Sequence[Thing], wanted: Sequence[float]) -> list[float]:
    """The positions nearest to those wanted, by least squares, that keep things of a row apart (pool adjacent violators)."""
    offsets = [0.0]
    for one, other in itertools.pairwise(row):
        offsets.append(offsets[-1] + (_width(one) + _width(other)) / 2 + GAP)
    pools: list[tuple[float, float, int]] = []  # weighted sum, weight, things
    for thing, offset, want in zip(row, offsets, wanted, strict=True):
        weight = float(STRAIGHT) if isinstance(thing, Line) else 1.0
        pool = ((want - offset) * weight, weight, 1)
        while pools and pools[-1][0] / pools[-1][1] > pool[0] / pool[1]:
            total, heavier, count = pools.pop()
            pool = (total + pool[0], heavier + pool[1], count + pool[2])
        pools.append(pool)
    means = [total / weight for total, weight, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def _neighbours(row: Sequence[Thing], links: Sequence[tuple[Thing, Thing]], down: bool) -> dict[Thing, list[Thing]]:
    """What each thing of a row is linked to in the row above (while sweeping down) or below."""
    found: dict[Thing, list[Thing]] = {thing: [] for thing in row}
    for above, below in links:
        inner, outer = (below, above) if down else (above, below)
        if inner in found:
            found[inner].append(outer)
    return found


def _pull(one: Thing, other: Thing) -> int:
    """How much a link wants to be straight: a long line more than what ends in a box."""
    return STRAIGHT if isinstance(one, Line) and isinstance(other, Line) else 1


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _width(thing: Thing) -> int:
    return WIDTH if isinstance(thing, Box) else LINE


# --- drawing ---


def _svg(
    graph: GraphModule,
    title: str,
    members: Mapping[Box, Sequence[Node]],
    rows: Sequence[Sequence[Thing]],
    links: Sequence[tuple[Thing, Thing]],
    x: Mapping[Thing, float],
) -> str:
    top = {thing: HEADER + MARGIN + number * (HEIGHT + LAYER_GAP) for number, row in enumerate(rows) for thing in row}
    counts = Counter(box.stage for box, nodes in members.items() for _ in nodes)
    legend_width = MARGIN + LEGEND * len(counts)
    width = max(max(position + _width(thing) / 2 for thing, position in x.items()) + MARGIN, legend_width, 9 * len(title) + 2 * MARGIN)
    height = max(top.values()) + HEIGHT + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
        ' font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="30" font-size="16" font-weight="bold" fill="#222">{escape(title)}</text>',
    ]
    for number, (stage, count) in enumerate(counts.items()):
        left = MARGIN + LEGEND * number
        lines.append(f'<rect x="{left}" y="42" width="14" height="14" rx="3" {_paint(stage)}/>')
        lines.append(f'<text x="{left + 20}" y="53" font-size="12" fill="#222">{escape(stage or "no stage")}: {count} nodes</text>')
    for above, below in links:
        start = top[above] + HEIGHT
        middle, end = (start + top[below]) / 2, top[below]
        arrow = ' marker-end="url(#arrow)"' if isinstance(below, Box) else ""
        passing = "" if isinstance(below, Box) else f" V{end + HEIGHT}"
        curve = f"M{x[above]:.1f} {start} C{x[above]:.1f} {middle} {x[below]:.1f} {middle} {x[below]:.1f} {end}{passing}"
        source = above if isinstance(above, Box) else above.source
        colour = BORDERS.get(source.stage, UNMARKED_BORDER)
        lines.append(f'<path d="{curve}" fill="none" stroke="{colour}" stroke-opacity=".75" stroke-width="1.3"{arrow}/>')
    paths = node_paths(graph)
    for box, nodes in members.items():
        inside = "\n".join(f"{paths[node]}: {_called(graph, node)}" for node in nodes)
        lines.append(f"<g><title>{escape(inside)}</title>")
        lines.append(f'<rect x="{x[box] - WIDTH / 2:.1f}" y="{top[box]}" width="{WIDTH}" height="{HEIGHT}" rx="7" {_paint(box.stage)}/>')
        for text, size, drop, colour in ((_label(box), 13, 18, "#111"), (_contents(graph, nodes), 10.5, 33, "#444")):
            place = f'x="{x[box]:.1f}" y="{top[box] + drop}" font-size="{size}"'
            lines.append(f'<text {place} text-anchor="middle" fill="{colour}">{escape(text)}</text>')
        lines.append("</g>")
    return "\n".join([*lines, "</svg>"]) + "\n"


def _paint(stage: str) -> str:
    return f'fill="{COLOURS.get(stage, UNMARKED)}" stroke="{BORDERS.get(stage, UNMARKED_BORDER)}" stroke-width="1.2"'


def _label(box: Box) -> str:
    """The last part of the block's path, with the name of the list that a number counts."""
    parts = box.block.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _called(graph: GraphModule, node: Node) -> str:
    module = module_of(graph, node)
    return describe(module) if module is not None else node.op


def _contents(graph: GraphModule, nodes: Sequence[Node]) -> str:
    """What a box holds: its convolutions and parameters, or the one thing it is."""
    modules = [module for node in nodes if (module := module_of(graph, node)) is not None]
    parameters = sum(value.numel() for module in dict.fromkeys(modules) for value in module.parameters())
    convolutions = sum(isinstance(module, nn.Conv2d) for module in modules)
    if convolutions:
        amount = f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters / 1e3:.1f} k"
        return f"{convolutions} conv{'s' if convolutions > 1 else ''}, {amount}"
    if nodes[0].op == "output":
        return f"{len(nodes_in(nodes[0].args[0]))} tensors"
    if len(nodes) == 1:
        return "input" if nodes[0].op == "placeholder" else _called(graph, nodes[0]).partition("[")[0]
    return f"{len(nodes)} nodes"
