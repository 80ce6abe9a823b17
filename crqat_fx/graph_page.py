"""A graph as one HTML page that needs nothing else: its blocks as a picture, and behind each block its nodes, quantizers and their ranges.

No script and no network: every box is a link to what is in it, so that mouse, keyboard and screen reader go the same ways. Colours follow
the reader's choice of light or dark.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from torch.fx import Node

from crqat_fx.files import written
from crqat_fx.graph_picture import Box, Face, bits_and_noise, boxes_of, called, contents, draw_view, short, styles, svg
from crqat_fx.graph_view import GraphView
from crqat_fx.prepared_inspection import (
    COLUMNS,
    EXPLAINED,
    UNMEASURED,
    PreparedReport,
    of_block,
    of_quantizer,
    summary,
    within,
)

DRAWN_AS = (".svg", ".html")
LABEL = 21  # characters of a node's path that its box has room for
SECOND = 26  # of its second line
LOUD = 50.0  # decibels at which a bar is full

PAGE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2024; --faint: #565d66; --rule: #d9dde2; --soft: #f4f6f8; --bar: #cfe0f5;
  --link: #1a5fb4 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #eceef1; --faint: #b4bac3; --rule: #383d45; --soft: #1f2227; --bar: #284566; --link: #8ab8f0 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 14px/1.45 Helvetica, Arial, sans-serif }
h1 { font-size: 19px; margin: 0 0 6px }
h2 { font-size: 16px; margin: 0 0 4px; overflow-wrap: anywhere }
h3 { font-size: 13px; margin: 14px 0 4px; color: var(--faint) }
p { margin: 3px 0 }
.note { color: var(--faint); max-width: 100ch; margin-top: 8px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 1px 14px; margin: 0 }
dt { color: var(--faint) }
dd { margin: 0; overflow-wrap: anywhere }
a { color: var(--link) }
a:focus-visible, [tabindex]:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
main { display: grid; grid-template-columns: minmax(320px, 45%) 1fr }
nav, #blocks { height: 100vh; overflow: auto }
nav { border-right: 1px solid var(--rule) }
nav svg { max-width: 100%; height: auto; display: block; margin: 0 auto }
section { padding: 14px 20px; border-bottom: 1px solid var(--rule) }
section:target { box-shadow: inset 4px 0 var(--link); background: var(--soft) }
.scroll { overflow: auto; max-height: 75vh; border: 1px solid var(--rule); border-radius: 6px; background: var(--paper) }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 2px 10px 2px 6px; white-space: nowrap; border-bottom: 1px solid var(--rule) }
th { color: var(--faint); font-weight: 600 }
thead th { position: sticky; top: 0; background: var(--paper) }
td.db { text-align: right; min-width: 84px; background: linear-gradient(90deg, var(--bar) var(--v), transparent var(--v)) }
@media (max-width: 900px) { main { display: block } nav, #blocks { height: auto } nav { max-height: 70vh } }
@media print { nav, #blocks, .scroll { height: auto; max-height: none; overflow: visible } }
"""


def save_drawing(seen: GraphView, path: str | Path, title: str, report: PreparedReport | None = None) -> None:
    """The page, or the picture alone: the path's suffix says which."""
    page = Path(path).suffix == ".html"
    drawn = draw_page(seen, title, report) if page else draw_view(seen, title, None if report is None else report.tensors)
    with written(path) as temporary:
        temporary.write_text(drawn, encoding="utf-8")


def draw_page(seen: GraphView, title: str, report: PreparedReport | None = None) -> str:
    """`report` of a prepared model adds what is known of its quantizers."""
    decibels = None if report is None else report.tensors
    members = boxes_of(seen)
    address = {box: f"b{number}" for number, box in enumerate(members)}
    overview = draw_view(seen, title, decibels, {box: f"#{name}" for box, name in address.items()})
    sections = [_section(seen, box, members, address, report) for box in members]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>',
            f"<style>{PAGE}{styles()}</style></head><body>",
            f'<main><nav tabindex="0" aria-label="the graph">{overview}</nav>',
            f'<div id="blocks" tabindex="0" aria-label="its blocks"><section><h1>{escape(title)}</h1>{_summary(report)}</section>',
            _overview(report, address),
            *sections,
            "</div></main></body></html>\n",
        ]
    )


def _summary(report: PreparedReport | None) -> str:
    if report is None:
        return ""
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in summary(report).items())
    measured = f"{EXPLAINED} Measured on {report.measured_on}." if report.measured_on else UNMEASURED
    return f'<dl>{facts}</dl><p class="note">{escape(measured)}</p>'


def _overview(report: PreparedReport | None, address: Mapping[Box, str]) -> str:
    if report is None:
        return ""
    rows = [
        (f'<a href="#{address[Box(each.block, each.stage)]}">{escape(each.block)}</a>', *_cells(of_block(each)[1:]))
        for each in report.blocks
    ]
    head = ("block", "W", "A", "quantizers", "end to end", "local", "of")
    return f'<section id="all"><h2>blocks</h2><div class="scroll" tabindex="0">{_table(head, rows)}</div></section>'


def _section(
    seen: GraphView, box: Box, members: Mapping[Box, Sequence[Node]], address: Mapping[Box, str], report: PreparedReport | None
) -> str:
    nodes = members[box]
    decibels = None if report is None else report.tensors
    box_of = {node: each for each, inside in members.items() for node in inside}
    before = dict.fromkeys(box_of[read.source] for read in seen.reads if box_of[read.reader] == box != box_of[read.source])
    behind = dict.fromkeys(box_of[read.reader] for read in seen.reads if box_of[read.source] == box != box_of[read.reader])
    told = [box.stage or "no stage", contents(seen.graph, nodes), *bits_and_noise(seen, nodes, decibels)]
    parts = [
        f'<section id="{address[box]}" tabindex="-1"><h2>{escape(box.block)}</h2>',
        f"<p>{escape(' · '.join(each for each in told if each))}</p>",
        f"<p>{_ways('reads', before, address)}{_ways('read by', behind, address)}</p>",
    ]
    if report is not None:
        own = [each for each in report.quantizers if (each.block, each.stage) == (box.block, box.stage)]
        if own:
            rows = [(escape(within(each.name, box.block)), *_cells(of_quantizer(each))) for each in own]
            parts.append(f'<h3>quantizers</h3><div class="scroll" tabindex="0">{_table(("quantizer", *COLUMNS), rows)}</div>')
    if len(nodes) > 1:
        parts.append(f'<h3>nodes</h3><div class="scroll" tabindex="0">{_inside(seen, box, members, box_of, address, decibels)}</div>')
    return "".join([*parts, "</section>"])


def _ways(what: str, boxes: Iterable[Box], address: Mapping[Box, str]) -> str:
    links = ", ".join(f'<a href="#{address[box]}">{escape(short(box.block))}</a>' for box in boxes)
    return f"{what} {links}. " if links else ""


def _inside(
    seen: GraphView,
    box: Box,
    members: Mapping[Box, Sequence[Node]],
    box_of: Mapping[Node, Box],
    address: Mapping[Box, str],
    decibels: Mapping[str, float] | None,
) -> str:
    """The nodes of a block as a picture of their own, with a box for each block that they read or that reads them."""
    nodes = members[box]
    things: list[Node | tuple[str, Box]] = []
    reads: list[tuple[Node | tuple[str, Box], Node | tuple[str, Box], int | None]] = []
    for read in seen.reads:
        source, reader = box_of[read.source], box_of[read.reader]
        if box in (source, reader):
            above = read.source if source == box else ("from", source)
            below = read.reader if reader == box else ("to", reader)
            reads.append((above, below, read.bits))
    outside = dict.fromkeys(each for above, below, _ in reads for each in (above, below) if isinstance(each, tuple))
    things = [*(each for each in outside if each[0] == "from"), *nodes, *(each for each in outside if each[0] == "to")]
    number = {each: place for place, each in enumerate(things)}
    carried: list[dict[int, set[int]]] = [{} for _ in things]
    for above, below, bits in reads:
        carried[number[below]].setdefault(number[above], set()).update(() if bits is None else (bits,))
    faces = [_stub(each, address) if isinstance(each, tuple) else _node(seen, each, box, decibels) for each in things]
    return svg(faces, carried, quantized=bool(seen.quantizers))


def _stub(each: tuple[str, Box], address: Mapping[Box, str]) -> Face:
    way, box = each
    return Face(short(box.block), (), f"{way} {box.block}", box.stage, f"#{address[box]}", is_stub=True)


def _node(seen: GraphView, node: Node, box: Box, decibels: Mapping[str, float] | None) -> Face:
    path, what = seen.paths[node], called(seen.graph, node)
    label = path.removeprefix(f"{box.block}.")
    more = [each for each in bits_and_noise(seen, [node], decibels) if each]
    return Face(
        label if len(label) <= LABEL else f"…{label[1 - LABEL :]}", (what[:SECOND], *more), f"{path}: {', '.join([what, *more])}", box.stage
    )


def _cells(values: Iterable[object]) -> Iterator[str]:
    return (escape(str(value)) for value in values)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    if not text.endswith(" dB"):
        return f"<td>{text}</td>"
    share = max(0.0, min(1.0, float(text.removesuffix(" dB")) / LOUD))
    return f'<td class="db" style="--v:{share:.0%}">{text}</td>'
