"""What a reader of a report wants first: the closing table with what it comes to, and what the models find on pictures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from crqat_fx.charts import Series, axis, key, rows, scatter
from crqat_fx.findings import GROUPS, BoxPixels, Found, Model, Picture, Study, closing_table, told
from crqat_fx.report_parts import Cell, Part, figure, grid, named, table

MATCHED = 0.5  # overlap from which a box is said to be on its object
LISTED, DRAWN = 12, 40  # boxes a picture that are told by name, and that are drawn: the best


# --- the table ---


def verdict(study: Study) -> str:
    """What it comes to, in a sentence or two: of the models that were trained the best one, or else the last model, against the first."""
    first = study.models[0]
    others = study.models[1:]
    if not others:
        return f"{first.label} alone was measured: {_ap(first)}."
    chosen = max((model for model in others if model.training is not None), key=lambda model: _whole(model) or 0.0, default=others[-1])
    untrained = [model for model in others if model.training is None and model.recipe == chosen.recipe and model is not chosen]
    parts = []
    ours, theirs = _whole(chosen), _whole(first)
    if ours is not None and theirs:
        kept = f"{chosen.label} keeps {ours:.1f} of {theirs:.1f} AP"
        novel, of_novel = _whole(chosen, "novel"), _whole(first, "novel")
        parts.append(kept + (f" ({novel:.1f} of {of_novel:.1f} on novel names)" if novel is not None and of_novel is not None else ""))
    if chosen.counted is not None and first.counted is not None and chosen.counted.size_mib:
        parts.append(f"{'' if parts else f'{chosen.label} '}is {first.counted.size_mib / chosen.counted.size_mib:.1f} times smaller")
    if chosen.speed is not None:
        parts.append(f"runs {chosen.speed.ratio.median:.1f} times as fast")
    summed = (
        ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else parts[0] if parts else "Neither accuracy nor cost was measured"
    )
    ptq = _whole(untrained[-1]) if untrained and chosen.training is not None else None
    without = f" Not trained, the same bits give {ptq:.1f}." if ptq is not None and ours is not None else ""
    return f"{summed}.{without}{_proved(study)}"


def _proved(study: Study) -> str:
    verified = [model for model in study.models if model.ladder is not None]
    wrong = [model.label for model in verified if model.ladder is not None and not model.ladder.passed]
    if wrong:
        return f" The exported file of {', '.join(wrong)} does not compute what the model does: see the ladder."
    return " The exported files compute what the models do, tensor by tensor." if verified else ""


def _whole(model: Model, group: str = "all") -> float | None:
    return None if model.accuracy is None else model.accuracy.ap.get(group)


def _ap(model: Model) -> str:
    return "AP was not measured" if _whole(model) is None else f"AP {_whole(model):.1f}"


def results(study: Study) -> str:
    head, lines = closing_table(study)
    first = lines[0]
    body = []
    for model, line in zip(study.models, lines, strict=True):
        cells: list[str | Cell] = [Cell(str(line[0]), _kind(model))]
        for name, value, reference in zip(head[1:], line[1:], first[1:], strict=True):
            cells.append(_result(name, value, reference, model, model is study.models[0]))
        body.append(cells)
    scored = [model for model in study.models if model.accuracy is not None]
    return table("closing table", head, body) + grid(_charts(study, scored)) + (_measured(scored) if scored else "")


def _kind(model: Model) -> str:
    if model.kind == "float":
        return "floats"
    trained = "" if model.training is None else f", {model.training.method}"
    weights = f", {model.weights} weights" if model.weights != "only" else ""
    return f"{model.recipe or 'a recipe of its own'}, {model.target}{trained}{weights}"


def _result(name: str, value: str | float | None, reference: str | float | None, model: Model, is_first: bool) -> Cell:
    """A number with how it stands to the first model's."""
    text = told(name, value)
    if is_first or not isinstance(value, float) or not isinstance(reference, float):
        return Cell(text)
    if name.startswith("AP"):
        return Cell(text, f"{value - reference:+.1f}")
    if name in ("MiB", "GBOPs"):
        return Cell(text, f"÷ {reference / value:.1f}" if value else "")
    spread = model.speed.ratio if name == "times as fast" and model.speed is not None else None
    return Cell(text, "" if spread is None else f"{spread.low:.2f} to {spread.high:.2f}")


def _charts(study: Study, scored: Sequence[Model]) -> Iterator[str]:
    """AP by group, where there is more than the whole to tell; and what it costs."""
    legend = key(named(scored, study))
    found = [group for group in GROUPS if any(model.accuracy and model.accuracy.ap.get(group) is not None for model in scored)]
    if len(found) > 1:
        series = [
            (label, place, [model.accuracy.ap.get(group) if model.accuracy else None for group in found])
            for model, (label, place) in zip(scored, named(scored, study), strict=True)
        ]
        known = [value for _, _, values in series for value in values if value is not None]
        drawn = rows("AP by group of names", [GROUPS[group] for group in found], series, axis("AP", known))
        yield figure("AP by group of names", drawn + legend)
    costs: tuple[tuple[str, str, Callable[[Model], float | None]], ...] = (
        ("AP against size: up and left is better", "MiB", lambda model: None if model.counted is None else model.counted.size_mib),
        (
            "AP against speed: up and right is better",
            "times as fast",
            lambda model: None if model.speed is None else model.speed.ratio.median,
        ),
    )
    for caption, label, cost in costs:
        points = [
            Series(name, place, ((at, ap),))
            for model, (name, place) in zip(scored, named(scored, study), strict=True)
            if (at := cost(model)) is not None and (ap := _whole(model)) is not None
        ]
        if len(points) > 1:
            x = axis(label, [each.points[0][0] for each in points], from_zero=True)
            y = axis("AP", [each.points[0][1] for each in points])
            yield figure(caption, scatter(caption, points, x, y) + legend)


def _measured(scored: Sequence[Model]) -> str:
    ways = dict.fromkeys((each.accuracy.pictures, each.accuracy.objects, each.accuracy.engine) for each in scored if each.accuracy)
    scores = "; ".join(f"{pictures} pictures with {objects} objects, in {engine}" for pictures, objects, engine in ways)
    sizes = "MiB and GBOPs (bit operations, billions) are counted on the graph as an export runs it"
    drift = "region-text and region-region are mean absolute errors of similarity against the first model"
    return f'<p class="note">AP on {escape(scores)}. {sizes}; {drift}.</p>'


# --- pictures ---


RIGHT, TWICE, OTHER, NOTHING_THERE = "right", "twice", "wrong name", "nothing there"


@dataclass(frozen=True)
class Judged:
    """What each box of a picture is, and the objects that no box is right on."""

    boxes: tuple[str, ...]
    missed: tuple[int, ...]

    def told(self) -> str:
        right = self.boxes.count(RIGHT)
        return f"{right} right, {len(self.boxes) - right} wrong, {len(self.missed)} missed"


def judged(picture: Picture, found: Found) -> Judged:
    """Best first: a box is right on an object of its name that no better box took, from an overlap of `MATCHED` on."""
    free = set(range(len(picture.boxes)))
    boxes = []
    for box, name in zip(found.boxes, found.names, strict=True):
        covered = sorted(((overlap(box, other), place) for place, other in enumerate(picture.boxes)), reverse=True)
        under = [place for share, place in covered if share >= MATCHED]
        of_name = [place for place in under if picture.names[place] == name]
        taken = next((place for place in of_name if place in free), None)
        boxes.append(RIGHT if taken is not None else TWICE if of_name else OTHER if under else NOTHING_THERE)
        free.discard(-1 if taken is None else taken)
    return Judged(tuple(boxes), tuple(sorted(free)))


def overlap(one: BoxPixels, other: BoxPixels) -> float:
    """Intersection over union."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(wide, 0.0) * max(tall, 0.0)
    areas = sum((right - left) * (bottom - top) for left, top, right, bottom in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0


def pictures(study: Study) -> str:
    legend = (
        '<ul class="key"><li><svg viewBox="0 0 18 14" width="18" height="14" aria-hidden="true">'
        '<rect class="box-right" x="2" y="2" width="14" height="10"/></svg> right</li>'
        '<li><svg viewBox="0 0 18 14" width="18" height="14" aria-hidden="true">'
        '<rect class="box-wrong" x="2" y="2" width="14" height="10"/></svg> wrong</li>'
        '<li><svg viewBox="0 0 18 14" width="18" height="14" aria-hidden="true">'
        '<rect class="box-missed" x="2" y="2" width="14" height="10"/></svg> missed</li></ul>'
    )
    shown = []
    for place, picture in enumerate(study.shown):
        columns = [_annotated(picture, place)]
        columns += [_detected(model, model.found[place], picture, place) for model in study.models]
        shown.append(f"<h3>{escape(picture.name)}</h3>{grid(columns, 'pictures')}")
    note = f'<p class="note">Shown is what has a score of {study.conf:g} or more.</p>'
    return legend + note + "".join(shown) if shown else ""


def _annotated(picture: Picture, place: int) -> str:
    wide = len(str(len(picture.boxes)))
    boxes = [
        _box(box, "box-truth", str(number), wide, name, picture)
        for number, (box, name) in enumerate(zip(picture.boxes, picture.names, strict=True), 1)
    ]
    drawn = overlay(picture, boxes, f"picture-{place}", f"{picture.name} as annotated", first=True)
    return figure("annotated", f"{drawn}<p>{len(boxes)} objects</p>" + _list([Cell(name) for name in picture.names], "annotated objects"))


def _detected(model: Model, found: Found, picture: Picture, place: int) -> str:
    seen = judged(picture, found)
    wide = len(str(len(found.boxes)))
    boxes, entries = [], []
    for number, (box, name, score, what) in enumerate(zip(found.boxes, found.names, found.scores, seen.boxes, strict=True), 1):
        kind = "box-right" if what == RIGHT else "box-wrong"
        boxes.append((what == RIGHT, -number, _box(box, kind, str(number), wide, f"{name} {score:.2f}, {what}", picture)))
        entries.append(Cell(name, f"{score:.2f}", what))
    on_top = [drawn for _, _, drawn in sorted(boxes[:DRAWN])]  # right ones above wrong ones, the best last
    missed = [_box(picture.boxes[each], "box-missed", "", 0, f"missed: {picture.names[each]}", picture) for each in seen.missed]
    drawn = overlay(picture, [*missed, *on_top], f"picture-{place}", f"{picture.name}: what {model.label} finds: {seen.told()}")
    return figure(model.label, f"{drawn}<p>{seen.told()}</p>" + _list(entries, f"what {model.label} finds"))


def _list(entries: Sequence[Cell], label: str) -> str:
    """Numbers as they stand at the boxes, names, scores."""
    lines = "".join(
        f'<li class="{"wrong" if each.kind not in ("", RIGHT) else RIGHT}">{escape(each.text)}'
        f"{f' <b>{escape(each.below)}</b>' if each.below else ''}{f' <i>{each.kind}</i>' if each.kind not in ('', RIGHT) else ''}</li>"
        for each in entries[:LISTED]
    )
    more = f"<p>and {len(entries) - LISTED} more</p>" if len(entries) > LISTED else ""
    return f'<ol class="found" aria-label="{escape(label)}">{lines}</ol>{more}' if lines else "<p>nothing</p>"


def _box(box: BoxPixels, kind: str, label: str, wide: int, says: str, picture: Picture) -> str:
    """A box with its number on a plate; `wide`: how many digits all plates of a picture have room for."""
    left, top, right, bottom = box
    text = ""
    if label:
        high = max(picture.width, picture.height) / 17
        width = high * (0.35 + 0.58 * wide)
        x, y = min(max(left, 0), picture.width - width), min(max(top, 0), picture.height - high)
        text = (
            f'<rect class="{kind} plate" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{high:.1f}"/>'
            f'<text class="plate-text" x="{x + width / 2:.1f}" y="{y + high * 0.8:.1f}" font-size="{high * 0.85:.1f}"'
            f' text-anchor="middle">{label}</text>'
        )
    shape = f'x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0):.1f}" height="{max(bottom - top, 0):.1f}"'
    return f'<g><title>{escape(says)}</title><rect class="{kind}" {shape}/>{text}</g>'


def overlay(picture: Picture, drawn: Sequence[str], address: str, label: str, *, first: bool = False, kind: str = "") -> str:
    """Shapes on a picture. Where it is the `first` to show it the picture itself is here, which the others refer to."""
    size = f'width="{picture.width}" height="{picture.height}"'
    image = f'<image id="{address}" {size} href="data:image/jpeg;base64,{escape(picture.jpeg)}"/>' if first else f'<use href="#{address}"/>'
    return (
        f'<svg class="picture{kind}" viewBox="0 0 {picture.width} {picture.height}" role="img" aria-label="{escape(label)}">'
        f'<g class="pixels">{image}</g>{"".join(drawn)}</svg>'
    )


RESULTS = Part(
    "results",
    "What it comes to",
    "One row a model; below a number how it stands to the first row. AP in percent: higher is better.",
    results,
    ("accuracy", "speed"),
)
PICTURES = Part(
    "pictures",
    "What the models find",
    "The same pictures under each model; numbers lead from a box to its name and score. A box is right on an object of its name from an "
    "overlap of one half on.",
    pictures,
)
