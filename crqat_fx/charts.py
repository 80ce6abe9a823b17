"""Charts as SVG that stands in a page: small enough for a phone, in the page's own colours, light or dark.

They know nothing of what they show. A series has a number, from which its colour (a CSS variable of the page, `--m0` and on) and the shape
of its marks follow, so that no chart speaks in colours alone.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8  # of series, in the page's styles; they come again after that
WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 8, 40  # around the plot
SMALLEST = 1e-300  # whose logarithm has a power of ten that a float still holds
CHARACTER = 6.3  # how wide one is at the size of a label
BOLD = 7.0
ROW = 19  # height of a row of dots or bars
TICKS = 5


@dataclass(frozen=True)
class Series:
    """What one thing does: points in order."""

    name: str
    number: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis with a name."""

    first: float
    last: float
    name: str


@dataclass(frozen=True)
class Axis:
    """`folded`: logarithmic away from zero on both sides, down to this."""

    label: str
    low: float
    high: float
    logarithmic: bool = False
    percent: bool = False
    folded: float = 0.0

    def share(self, value: float) -> float:
        """Where on the axis a value lies, 0 to 1."""
        low, high, value = (self._scaled(each) for each in (self.low, self.high, value))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def _scaled(self, value: float) -> float:
        if self.folded:
            return math.copysign(math.log10(max(abs(value), self.folded) / self.folded), value)
        return math.log10(max(value, self.low)) if self.logarithmic else value

    @property
    def ticks(self) -> list[float]:
        if self.folded:
            powers = [self.folded * 10.0**power for power in range(1, round(math.log10(self.high / self.folded)) + 1)]
            return [*(-each for each in reversed(powers)), 0.0, *powers]
        if self.logarithmic:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            wide = range(first, last + 1, max(1, (last - first) // TICKS))
            return [10.0**power for power in wide if self.low * 0.999 <= 10.0**power <= self.high * 1.001]
        step = nice((self.high - self.low) / TICKS)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def told(self, value: float) -> str:
        """A tick's label, as short as its neighbours allow."""
        if self.percent:
            return f"{value * 100:.10g}%" if self.high - self.low >= 0.05 else f"{value:.3g}" if value == 0 else f"{value * 100:.3g}%"
        return "0" if value == 0 else f"{value:,.6g}" if abs(value) >= 1e-4 else f"{value:.0e}"


def axis(
    label: str, values: Iterable[float], *, from_zero: bool = False, logarithmic: bool = False, percent: bool = False, room: float = 0.06
) -> Axis:
    """An axis that holds the values, with some room around them; without values, or with one alone, there is an axis all the same."""
    known = [value for value in values if math.isfinite(value) and (value > SMALLEST or not logarithmic)]
    low, high = (min(known), max(known)) if known else (1.0, 1.0) if logarithmic else (0.0, 1.0)
    if logarithmic:
        return Axis(label, 10 ** math.floor(math.log10(low)), 10 ** max(math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1), True)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    around = room * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(label, low if from_zero and low == 0 else low - around, high + around, percent=percent)


def folded_axis(label: str, values: Iterable[float], decades: int = 3) -> Axis:
    """An axis for values of either sign and of any size: logarithmic away from zero."""
    largest = max((abs(value) for value in values if value), default=1.0)
    reach = 10.0 ** math.ceil(math.log10(largest) - 1e-9)
    return Axis(label, -reach, reach, folded=reach / 10**decades)


def nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= step * (1 - 1e-9))


# --- charts ---


def lines(title: str, series: Sequence[Series], x: Axis, y: Axis, bands: Sequence[Band] = (), *, dots: bool = False) -> str:
    """Values over something, each line with its name at its end; bands behind them."""
    longest = max((len(each.name) for each in series), default=0)
    right = WIDTH - RIGHT - (4 + BOLD * longest if len(series) > 1 else 0)
    plot = _Plot(LEFT, TOP + (14 if bands else 0), right, HEIGHT - BOTTOM, x, y)
    drawn = [*_bands(plot, bands), *plot.frame()]
    ends = []
    for each in series:
        points = [(plot.x(a), plot.y(b)) for a, b in each.points]
        drawn.append(f'<polyline class="line" {colour(each.number)} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
        if dots or len(points) == 1:
            drawn += [
                mark(each.number, a, b, f"{each.name}: {_pair(x, y, point)}") for (a, b), point in zip(points, each.points, strict=True)
            ]
        if points:
            ends.append((points[-1][1], each))
    if len(series) > 1:
        drawn += _ends(ends, right + 8, plot)
    return picture(title, HEIGHT, drawn)


def scatter(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    plot = _Plot(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM, x, y)
    marks = (
        mark(each.number, plot.x(a), plot.y(b), f"{each.name}: {_pair(x, y, (a, b))}", small=len(each.points) > 1)
        for each in series
        for a, b in each.points
    )
    return picture(title, HEIGHT, [*plot.frame(), *marks])


def rows(
    title: str,
    labels: Sequence[str],
    series: Sequence[tuple[str, int, Sequence[float | tuple[float, float] | None]]],
    x: Axis,
    *,
    groups: Sequence[str] = (),
) -> str:
    """A row a label, and in it a mark for each series, or a bar from a low to a high value. `groups`: of every row the name of what it
    belongs to, told where that changes."""
    left = 10 + CHARACTER * max((len(each) for each in labels), default=0)
    changes = [place for place in range(len(labels)) if groups and (place == 0 or groups[place] != groups[place - 1])]
    shift, tops = 0, []
    for place in range(len(labels)):
        shift += 16 if place in changes else 0
        tops.append(TOP + shift + ROW * place)
    bottom = TOP + shift + ROW * len(labels)
    plot = _Plot(left, TOP, WIDTH - RIGHT, bottom, x, Axis("", 0, 1))
    drawn = plot.frame(across=False)
    for place in changes:
        drawn.append(f'<text class="group" x="2" y="{tops[place] - 4}">{escape(groups[place])}</text>')
    for place, label in enumerate(labels):
        middle = tops[place] + ROW / 2
        drawn.append(f'<text class="label" x="{left - 8:.1f}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        drawn.append(f'<line class="grid" x1="{plot.left:.1f}" x2="{plot.right:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>')
        for turn, (name, number, values) in enumerate(series):
            value = values[place]
            if isinstance(value, tuple):
                apart = (ROW - 5) / max(len(series), 1)
                top, (first, last) = tops[place] + 2.5 + apart * turn, (plot.x(end) for end in value)
                told = f"{name}, {label}: {value[0]:.4g} to {value[1]:.4g}"
                shape = f'x="{first:.1f}" y="{top:.1f}" width="{max(last - first, 1):.1f}" height="{max(apart - 1, 1):.1f}"'
                drawn.append(f'<rect class="part" {colour(number)} {shape}><title>{escape(told)}</title></rect>')
            elif value is not None:
                drawn.append(mark(number, plot.x(value), middle, f"{name}, {label}: {value:.4g}"))
    return picture(title, bottom + BOTTOM, drawn)


def stacks(title: str, labels: Sequence[str], parts: Sequence[str], values: Sequence[Sequence[float]], x: Axis, unit: str) -> str:
    """A bar a label, made of parts; each part has a colour, and its number where it is wide enough."""
    tall, apart = 24, 22
    bottom = TOP + (tall + apart) * len(labels)
    plot = _Plot(8, TOP, WIDTH - RIGHT - 40, bottom, x, Axis("", 0, 1))
    drawn = plot.frame(across=False)
    for place, (label, own) in enumerate(zip(labels, values, strict=True)):
        top, done = TOP + (tall + apart) * place + apart - 4, 0.0
        drawn.append(f'<text class="label" x="{plot.left}" y="{top - 5}">{escape(label)}</text>')
        for number, (part, value) in enumerate(zip(parts, own, strict=True)):
            first, last = plot.x(done), plot.x(done + value)
            done += value
            told = f"{label}, {part}: {value:.3g} {unit}"
            shape = f'x="{first:.1f}" y="{top}" width="{max(last - first - 1, 0):.1f}" height="{tall}" rx="2"'
            drawn.append(f'<rect class="part" {colour(number)} {shape}><title>{escape(told)}</title></rect>')
            if last - first > 34:
                drawn.append(f'<text class="on-part" x="{(first + last) / 2:.1f}" y="{top + 16}" text-anchor="middle">{value:.3g}</text>')
        drawn.append(f'<text class="label" x="{plot.x(done) + 5:.1f}" y="{top + 16}">{done:.3g} {escape(unit)}</text>')
    return picture(title, bottom + BOTTOM, drawn)


# --- their parts ---


def picture(title: str, height: float, drawn: Iterable[str]) -> str:
    """What is drawn, as a figure of its own size that shrinks where there is no room."""
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'


def colour(number: int) -> str:
    return f'style="--c:var(--m{number % COLOURS})"'


def mark(number: int, x: float, y: float, told: str, *, small: bool = False) -> str:
    """A shape around a point; what it says when it is pointed at."""
    size = 3.2 if small else 4.6
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}"',
        f'<rect x="{x - size * 0.9:.1f}" y="{y - size * 0.9:.1f}" width="{size * 1.8:.1f}" height="{size * 1.8:.1f}"',
        f'<path d="M{x:.1f} {y - size * 1.25:.1f}l{size * 1.25:.1f} {size * 1.25:.1f}l{-size * 1.25:.1f} {size * 1.25:.1f}'
        f'l{-size * 1.25:.1f} {-size * 1.25:.1f}z"',
        f'<path d="M{x:.1f} {y - size * 1.2:.1f}l{size * 1.2:.1f} {size * 2.1:.1f}h{-size * 2.4:.1f}z"',
    )
    return f'{shapes[number % len(shapes)]} class="mark" {colour(number)}><title>{escape(told)}</title>{_closing(number % len(shapes))}'


def _closing(shape: int) -> str:
    return ("</circle>", "</rect>", "</path>", "</path>")[shape]


def key(series: Iterable[tuple[str, int]], *, squares: bool = False) -> str:
    """What colours and shapes stand for, as a list. `squares`: of parts of bars, which have no shape."""
    entries = []
    for name, number in series:
        shape = f'<rect class="part" {colour(number)} x="1" y="1" width="12" height="12" rx="2"/>' if squares else mark(number, 7, 7, name)
        entries.append(f'<li><svg viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">{shape}</svg> {escape(name)}</li>')
    return f'<ul class="key">{"".join(entries)}</ul>'


class _Plot:
    """Where values stand between two axes."""

    def __init__(self, left: float, top: float, right: float, bottom: float, x: Axis, y: Axis) -> None:
        self.left, self.top, self.right, self.bottom = left, top, right, bottom
        self.of_x, self.of_y = x, y

    def x(self, value: float) -> float:
        return self.left + self.of_x.share(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.of_y.share(value) * (self.bottom - self.top)

    def frame(self, *, across: bool = True) -> list[str]:
        """Both axes with their ticks; `across`: those of y as well."""
        drawn = []
        for value in self.of_y.ticks if across else ():
            y = self.y(value)
            drawn.append(f'<line class="grid" x1="{self.left:.1f}" x2="{self.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            drawn.append(f'<text class="tick" x="{self.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{self.of_y.told(value)}</text>')
        for value in self.of_x.ticks:
            x = self.x(value)
            if not across:
                drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top:.1f}" y2="{self.bottom:.1f}"/>')
            drawn.append(f'<text class="tick" x="{x:.1f}" y="{self.bottom + 15:.1f}" text-anchor="middle">{self.of_x.told(value)}</text>')
        drawn.append(f'<line class="axis" x1="{self.left:.1f}" x2="{self.right:.1f}" y1="{self.bottom:.1f}" y2="{self.bottom:.1f}"/>')
        return [*drawn, *_labels(self, self.of_x.label, self.of_y.label)]


def _labels(plot: _Plot, x: str, y: str) -> list[str]:
    middle = min((plot.left + plot.right) / 2, WIDTH - len(x) * CHARACTER / 2)  # a long one moves into the room beside the plot
    height = (plot.top + plot.bottom) / 2
    drawn = [f'<text class="label" x="{middle:.1f}" y="{plot.bottom + 32:.1f}" text-anchor="middle">{escape(x)}</text>'] if x else []
    if y:
        drawn.append(f'<text class="label" transform="translate(10 {height:.1f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    return drawn


def _bands(plot: _Plot, bands: Sequence[Band]) -> list[str]:
    """Stretches of the x axis, every other one shaded, each with its name above."""
    drawn = []
    for number, band in enumerate(bands):
        first, last = plot.x(band.first), plot.x(band.last)
        shape = f'x="{first:.1f}" y="{plot.top:.1f}" width="{last - first:.1f}" height="{plot.bottom - plot.top:.1f}"'
        drawn.append(f'<rect class="band{number % 2}" {shape}/>')
        if number:
            drawn.append(f'<line class="border" x1="{first:.1f}" x2="{first:.1f}" y1="{plot.top - 14:.1f}" y2="{plot.bottom:.1f}"/>')
        room = int((last - first - 10) / BOLD)
        name = band.name if len(band.name) <= room else f"{band.name[: room - 1]}…" if room > 3 else ""
        drawn.append(f'<text class="group" x="{first + 4:.1f}" y="{plot.top - 4:.1f}">{escape(name)}</text>')
    return drawn


def _ends(ends: Sequence[tuple[float, Series]], x: float, plot: _Plot) -> Iterator[str]:
    """The names of lines where they end, moved apart where they would lie on each other."""
    placed: list[float] = []
    for y, _ in sorted(ends, key=lambda end: end[0]):
        lowest = placed[-1] + 12 if placed else plot.top + 4
        placed.append(max(y, lowest))
    over = max(0.0, placed[-1] - plot.bottom) if placed else 0.0
    for y, (_, each) in zip(placed, sorted(ends, key=lambda end: end[0]), strict=True):
        yield f'<text class="end" {colour(each.number)} x="{x:.1f}" y="{y - over + 4:.1f}">{escape(each.name)}</text>'


def _pair(x: Axis, y: Axis, point: tuple[float, float]) -> str:
    return f"{x.label} {point[0]:.4g}, {y.label} {point[1]:.4g}"
