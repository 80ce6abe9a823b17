"""Where the boxes of a picture of a graph stand: a layered layout, data flowing down.

A box stands a layer below the lowest box it reads; a value read further down runs as one line from which its readers branch; things of a
layer are ordered by the mean of their neighbours, and moved sideways to where the lines are shortest (least squares with the distances
between them kept).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LINE, GAP = 12, 22  # width kept for a line; between things of a layer
SWEEPS = 24
STRAIGHT = 8  # how much more a long line weighs than a box


@dataclass(frozen=True)
class Line:
    """Where the value of a box passes a layer on its way further down."""

    source: int
    layer: int


Thing = int | Line  # a box is its number
Link = tuple[Thing, Thing]


@dataclass(frozen=True)
class Layout:
    """The things of every layer from left to right, the pairs of them that a value runs between, and the middle of each."""

    rows: Sequence[Sequence[Thing]]
    links: Sequence[Link]
    x: Mapping[Thing, float]
    width: float


def layered(reads: Sequence[Sequence[int]], box: float) -> Layout:
    """`reads`: of every box, in the order in which they run, those it reads; `box`: how wide one is."""
    layers = _layers(reads)
    links = _links(reads, layers)
    rows = _ordered(layers, links)
    x = _positions(rows, links, box)
    return Layout(rows, links, x, max(position + _width(thing, box) / 2 for thing, position in x.items()))


def source_of(thing: Thing) -> int:
    return thing.source if isinstance(thing, Line) else thing


def _layers(reads: Sequence[Sequence[int]]) -> dict[int, int]:
    """A layer below the lowest box that is read; a box that reads none stands right above its highest reader."""
    layers: dict[int, int] = {}
    waiting = list(range(len(reads)))
    while waiting:
        # boxes that read each other have no first one: the one that starts earlier goes above, and the way back is drawn upwards
        box = next((each for each in waiting if all(source in layers for source in reads[each])), waiting[0])
        layers[box] = max((layers[source] + 1 for source in reads[box] if source in layers), default=0)
        waiting.remove(box)
    for box, sources in enumerate(reads):
        if not sources:
            layers[box] = max(min((layers[reader] for reader, read in enumerate(reads) if box in read), default=1) - 1, 0)
    return layers


def _links(reads: Sequence[Sequence[int]], layers: Mapping[int, int]) -> list[Link]:
    """Pairs of things of neighbouring layers that a value runs between."""
    links: dict[Link, None] = {}
    for box, sources in enumerate(reads):
        for source in sources:
            above: Thing = source
            for number in range(layers[source] + 1, layers[box]):
                below = Line(source, number)
                links[above, below] = None
                above = below
            links[above, box] = None
    return list(links)


def _ordered(layers: Mapping[int, int], links: Sequence[Link]) -> list[list[Thing]]:
    """The things of each layer from left to right, so that few lines cross: the order of fewest crossings that the sweeps come by."""
    things: list[Thing] = [*layers, *dict.fromkeys(thing for link in links for thing in link if isinstance(thing, Line))]
    rows: list[list[Thing]] = [[] for _ in range(max(layers.values(), default=-1) + 1)]
    for thing in things:
        rows[thing.layer if isinstance(thing, Line) else layers[thing]].append(thing)
    down, up = _neighbours(rows, links)
    best, fewest = [list(row) for row in rows], _crossings(rows, links)
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            place = {thing: position / max(len(each), 1) for each in rows for position, thing in enumerate(each)}
            neighbours = down if sweep % 2 == 0 else up
            row.sort(key=lambda thing: _mean([place[other] for other in neighbours[thing]], place[thing]))
        crossings = _crossings(rows, links)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _crossings(rows: Sequence[Sequence[Thing]], links: Sequence[Link]) -> int:
    place = {thing: (number, position) for number, row in enumerate(rows) for position, thing in enumerate(row)}
    ends: list[list[tuple[int, int]]] = [[] for _ in rows]
    for above, below in links:
        (upper, a), (lower, b) = place[above], place[below]
        if lower == upper + 1:
            ends[upper].append((a, b))
    return sum((a - c) * (b - d) < 0 for between in ends for (a, b), (c, d) in itertools.combinations(between, 2))


def _positions(rows: Sequence[Sequence[Thing]], links: Sequence[Link], box: float) -> dict[Thing, float]:
    """The middle of every thing: near the mean of its neighbours, in the order of its row, without touching."""
    x: dict[Thing, float] = {}
    for row in rows:
        x.update(zip(row, _spread(row, [0.0] * len(row), box), strict=True))
    down, up = _neighbours(rows, links)
    for sweep in range(4 * SWEEPS):
        both = sweep >= 2 * SWEEPS
        first, second = (down, up) if sweep % 2 == 0 else (up, down)
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = []
            for thing in row:
                pulling = (*first[thing], *second[thing]) if both else first[thing]
                wanted.append(_mean([x[other] for other in pulling for _ in range(_pull(thing, other))], x[thing]))
            x.update(zip(row, _spread(row, wanted, box), strict=True))
    _straighten(rows, x, box)
    left = min((position - _width(thing, box) / 2 for thing, position in x.items()), default=0.0)
    return {thing: position - left for thing, position in x.items()}


def _straighten(rows: Sequence[Sequence[Thing]], x: dict[Thing, float], box: float) -> None:
    """Gives each long line as few bends as the room between its neighbours allows."""
    sides = {thing: (row[number - 1] if number else None, row[number + 1] if number + 1 < len(row) else None)
             for row in rows for number, thing in enumerate(row)}  # fmt: skip
    lines: dict[int, list[Line]] = {}
    for row in rows:
        for thing in row:
            if isinstance(thing, Line):
                lines.setdefault(thing.source, []).append(thing)

    def room(thing: Line) -> tuple[float, float]:
        left, right = sides[thing]
        lowest = -math.inf if left is None else x[left] + (_width(left, box) + LINE) / 2 + GAP
        highest = math.inf if right is None else x[right] - (_width(right, box) + LINE) / 2 - GAP
        return min(lowest, x[thing]), max(highest, x[thing])

    for _ in range(STRAIGHT):
        for parts in lines.values():
            straight: list[Line] = []
            low, high = -math.inf, math.inf
            for part in (*parts, None):
                lowest, highest = room(part) if part is not None else (math.inf, -math.inf)
                if straight and max(low, lowest) > min(high, highest):
                    place = min(max(_mean([x[each] for each in straight], 0.0), low), high)
                    x.update(dict.fromkeys(straight, place))
                    straight, low, high = [], -math.inf, math.inf
                if part is not None:
                    straight.append(part)
                    low, high = max(low, lowest), min(high, highest)


def _spread(row: Sequence[Thing], wanted: Sequence[float], box: float) -> list[float]:
    """The positions nearest to those wanted, by least squares, that keep things of a row apart (pool adjacent violators)."""
    offsets = [0.0]
    for one, other in itertools.pairwise(row):
        offsets.append(offsets[-1] + (_width(one, box) + _width(other, box)) / 2 + GAP)
    pools: list[tuple[float, float, int]] = []  # weighted sum, weight, things
    for thing, offset, want in zip(row, offsets, wanted, strict=False):
        weight = float(STRAIGHT) if isinstance(thing, Line) else 1.0
        pool = ((want - offset) * weight, weight, 1)
        while pools and pools[-1][0] / pools[-1][1] > pool[0] / pool[1]:
            total, heavier, count = pools.pop()
            pool = (total + pool[0], heavier + pool[1], count + pool[2])
        pools.append(pool)
    means = [total / weight for total, weight, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]


def _neighbours(rows: Sequence[Sequence[Thing]], links: Sequence[Link]) -> tuple[dict[Thing, list[Thing]], dict[Thing, list[Thing]]]:
    """What each thing is linked to above it, and below."""
    above: dict[Thing, list[Thing]] = {thing: [] for row in rows for thing in row}
    below: dict[Thing, list[Thing]] = {thing: [] for row in rows for thing in row}
    for upper, lower in links:
        above[lower].append(upper)
        below[upper].append(lower)
    return above, below


def _pull(one: Thing, other: Thing) -> int:
    """How much a link wants to be straight: a long line more than what ends in a box."""
    return STRAIGHT if isinstance(one, Line) and isinstance(other, Line) else 1


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _width(thing: Thing, box: float) -> float:
    return LINE if isinstance(thing, Line) else box
