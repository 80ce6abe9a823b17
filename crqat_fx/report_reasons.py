"""Why the models of a report differ: how far regions drift, how training went, what each quantizer does, and where all this happens."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from crqat_fx.charts import COLOURS, Axis, Band, Series, axis, folded_axis, key, lines, rows, scatter
from crqat_fx.findings import RELATIONS, Curve, Drift, HeatPicture, Model, Quantization, Study, Training
from crqat_fx.graph_picture import paint, svg
from crqat_fx.noise import EXACT
from crqat_fx.prepared_inspection import QuantizerFacts, within
from crqat_fx.report_parts import NOTHING, Cell, Part, figure, folded, grid, named, number, share, table
from crqat_fx.report_results import overlay

CALLED = {"region_text": "region-text", "region_region": "region-region"}
SPACES = ("embedding", "confidence")
OPEN_HEATS = 2  # heat pictures that are shown at once; the others on demand
AP = ("ap", "ap_opening")  # what a log calls it
NOT_A_TERM = ("loss", "rate", "gradient_norm", "steps_per_second", *AP)  # of a log's values
TERMS = {
    "cls": "classes", "box": "boxes", "dfl": "box bins", "pkd": "features taught", "neck-pkd": "neck features taught",
    "trkd": "relations taught",
}  # fmt: skip
# ends of colour scales: low to high similarity; lower and higher than the first model
VIRIDIS = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)
LOWER, HIGHER = (214, 84, 12), (24, 104, 214)


# --- drift ---


def drift(study: Study) -> str:
    measured = [(model, model.drift) for model in study.models if model.drift is not None]
    if not measured:
        return ""
    heats = [_heat(study, measured, place) for place in range(len(study.heat))]
    more = folded(f"{len(heats) - OPEN_HEATS} more pictures", "".join(heats[OPEN_HEATS:])) if len(heats) > OPEN_HEATS else ""
    scale = _scales(study, measured) if heats else ""
    return grid(_drift_charts(study, measured)) + _drift_table(measured) + scale + "".join(heats[:OPEN_HEATS]) + more


def _drift_charts(study: Study, measured: Sequence[tuple[Model, Drift]]) -> Iterator[str]:
    models = [model for model, _ in measured]
    labels = [f"{CALLED[kind]}, {space}" for kind in RELATIONS for space in SPACES]
    series = [
        (label, place, [getattr(getattr(found, kind), f"mean_{space}") for kind in RELATIONS for space in SPACES])
        for (_, found), (label, place) in zip(measured, named(models, study), strict=True)
    ]
    known = [value for _, _, values in series for value in values if value is not None]
    drawn = rows("distortion", labels, series, axis("mean absolute error against the first model", known, from_zero=True))
    yield figure("Distortion, on average: further left is nearer to the first model", drawn + key(named(models, study)))
    for kind in RELATIONS:
        points = [
            Series(label, place, tuple(_pairs(getattr(found, kind).embedding, getattr(found, kind).confidence)))
            for (_, found), (label, place) in zip(measured, named(models, study), strict=True)
        ]
        across = axis("embeddings, error", (x for each in points for x, _ in each.points), from_zero=True)
        up = axis("confidences, error", (y for each in points for _, y in each.points), from_zero=True)
        correlated = ", ".join(f"{model.label} {number(getattr(found, kind).pearson, '.2f')}" for model, found in measured)
        drawn = scatter(f"{CALLED[kind]} distortion", points, across, up) + key(named(models, study))
        told = f'<p class="note">A mark a picture. Pearson\'s r: {escape(correlated)}.</p>'
        yield figure(f"{CALLED[kind].capitalize()}: do confidences follow embeddings?", drawn + told)


def _pairs(xs: Sequence[float | None], ys: Sequence[float | None]) -> Iterator[tuple[float, float]]:
    for x, y in zip(xs, ys, strict=True):
        if x is not None and y is not None:
            yield x, y


def _drift_table(measured: Sequence[tuple[Model, Drift]]) -> str:
    head = ("model", *(f"{CALLED[kind]}, {what}" for kind in RELATIONS for what in ("embeddings", "confidences", "Pearson's r")), "anchors")
    body = []
    for model, found in measured:
        relations = [getattr(found, kind) for kind in RELATIONS]
        values = [(each.mean_embedding, each.mean_confidence, each.pearson) for each in relations]
        told = [number(value, form) for each in values for value, form in zip(each, (".4f", ".4f", ".3f"), strict=True)]
        body.append([model.label, *told, f"{found.anchors:,}"])
    return folded("the distortions as a table", table("distortions", head, body))


def _limits(study: Study, measured: Sequence[tuple[Model, Drift]]) -> tuple[float, float, float]:
    """The lowest and highest similarity, and the largest change of one."""
    values = [value for picture in study.heat for value in picture.teacher if value is not None]
    changes = [
        abs(value - reference)
        for _, found in measured
        for picture, own in zip(study.heat, found.heat, strict=True)
        for value, reference in zip(own, picture.teacher, strict=True)
        if value is not None and reference is not None
    ]
    own = [value for _, found in measured for heat in found.heat for value in heat if value is not None]
    return min([*values, *own], default=0.0), max([*values, *own], default=1.0), max(changes, default=1.0) or 1.0


def _scales(study: Study, measured: Sequence[tuple[Model, Drift]]) -> str:
    low, high, change = _limits(study, measured)
    similar = ", ".join(_rgb(each) for each in VIRIDIS)
    moved = f"{_rgb(LOWER)}, transparent, {_rgb(HIGHER)}"
    return (
        f'<p class="scales"><span>similarity {low:.2f} <i style="background:linear-gradient(90deg,{similar})"></i> {high:.2f}</span> '
        f'<span>change {-change:+.2f} <i style="background:linear-gradient(90deg,{moved})"></i> {change:+.2f}</span></p>'
    )


def _heat(study: Study, measured: Sequence[tuple[Model, Drift]], place: int) -> str:
    """Similarities under each model, and below them how they moved from the first model's."""
    heat = study.heat[place]
    low, high, change = _limits(study, measured)
    first = study.models[0].label

    def drawn(label: str, fills: Sequence[str | None], values: Sequence[float | None], is_first: bool = False) -> str:
        told = f"{heat.picture.name}: {label}"
        return overlay(heat.picture, _cells(heat, fills, values), f"heat-{place}", told, first=is_first, kind=" heat")

    columns = [
        figure(first, drawn(f"similarity under {first}", [_similarity(each, low, high) for each in heat.teacher], heat.teacher, True))
    ]
    for model, found in measured:
        own = found.heat[place]
        moved = [None if a is None or b is None else a - b for a, b in zip(own, heat.teacher, strict=True)]
        known = [abs(each) for each in moved if each is not None]
        told = f"moved by {number(sum(known) / len(known) if known else None, '.3f')} on average:"
        similar = drawn(f"similarity under {model.label}", [_similarity(each, low, high) for each in own], own)
        changes = drawn(f"its change under {model.label}", [None if each is None else _change(each / change) for each in moved], moved)
        columns.append(figure(model.label, f"{similar}<p>{told}</p>{changes}"))
    return f"<h3>{escape(heat.picture.name)}</h3>{grid(columns, 'pictures')}"


def _cells(heat: HeatPicture, fills: Sequence[str | None], values: Sequence[float | None]) -> list[str]:
    """Each anchor as the square of its cell, coarse ones below; hollow where it is alone in its class."""
    drawn = []
    for place in sorted(range(len(heat.points)), key=lambda each: -heat.strides[each]):
        (x, y), side, fill = heat.points[place], heat.strides[place], fills[place]
        value = values[place]
        told = "alone in its class" if value is None else f"{value:.3f}"
        shape = f'x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" height="{side:.1f}"'
        drawn.append(f'<rect class="cell" fill="{fill or "none"}" {shape}><title>{told}</title></rect>')
    return drawn


def _similarity(value: float | None, low: float, high: float) -> str | None:
    if value is None:
        return None
    place = (value - low) / (high - low or 1.0) * (len(VIRIDIS) - 1)
    before = min(int(place), len(VIRIDIS) - 2)
    return _rgb(_between(VIRIDIS[before], VIRIDIS[before + 1], place - before))


def _change(value: float) -> str:
    """Nothing where nothing changed."""
    red, green, blue = HIGHER if value > 0 else LOWER
    return f"rgba({red},{green},{blue},{min(abs(value), 1.0):.3f})"


def _between(one: tuple[int, int, int], other: tuple[int, int, int], part: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _rgb(colour: tuple[int, int, int]) -> str:
    return "rgb({},{},{})".format(*colour)


# --- training ---

SCORED = (
    "This AP is scored while training, in torch and on fewer pictures, with the stages of later phases still in floats: hold it against "
    "itself, not against the table."
)
UNSCORED = "The log of this run has no AP over its steps: train with --ap-pictures for it."


def training(study: Study) -> str:
    trained = [(model, model.training) for model in study.models if model.training is not None]
    return "".join(_course(model, found, len(trained) > 1) for model, found in trained)


def _course(model: Model, found: Training, several: bool) -> str:
    bands = [
        Band(phase.first, phase.last, f"{place} {phase.quantized[-1] if phase.quantized else 'float'}")
        for place, phase in enumerate(found.phases, 1)
    ]
    across = Axis("step", 0, found.phases[-1].last if found.phases else max(found.planned, 1))
    charts = []
    if "loss" in found.log:
        charts.append(_chart("Loss, all terms together", {"loss": found.log["loss"]}, across, "loss", bands))
    terms = {TERMS.get(name, name): curve for name, curve in found.log.items() if name not in NOT_A_TERM}
    if terms:
        charts.append(_chart("Terms of the loss, on a logarithmic axis", terms, across, "term", bands, logarithmic=True))
    scores = sorted(point for name in AP if name in found.log for point in zip(found.log[name].steps, found.log[name].values, strict=True))
    if scores:
        ap = Curve(tuple(step for step, _ in scores), tuple(value for _, value in scores))
        charts.append(_chart("AP, as phases open and end", {"AP": ap}, across, "AP", bands, dots=True))
    if found.watched:
        charts.append(
            _chart(
                "Of the codes: clipped, and flipped in a step (means over quantizers)",
                found.watched,
                across,
                "share",
                bands,
                percent=True,
                dots=True,
            )
        )
    told = "".join(
        f"<li>steps {phase.first} to {phase.last}: {escape(', '.join(phase.quantized) or 'nothing')} quantized, "
        f"{escape(', '.join(phase.trained) or 'nothing')} trained, on {escape(' + '.join(phase.losses))}</li>"
        for phase in found.phases
    )
    taught = f", taught by {found.teacher}" if found.teacher is not None else ""
    heading = f"<h3>{escape(model.label)}</h3>" if several else ""
    about = SCORED if scores else UNSCORED
    summary = f"{found.method}{taught}, {found.planned} steps in {len(found.phases)} {'phase' if len(found.phases) == 1 else 'phases'}:"
    return f'{heading}<p>{escape(summary)}</p><ol class="phases">{told}</ol>{grid(charts)}<p class="note">{escape(about)}</p>'


def _chart(
    caption: str, curves: Mapping[str, Curve], x: Axis, y_label: str, bands: Sequence[Band], *,
    logarithmic: bool = False, percent: bool = False, dots: bool = False,
) -> str:  # fmt: skip
    kept = {
        name: [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if v > 0 or not logarithmic] for name, curve in curves.items()
    }
    series = [Series(name, place % COLOURS, tuple(points)) for place, (name, points) in enumerate(kept.items()) if points]
    values = [value for each in series for _, value in each.points]
    y = axis(y_label, values, logarithmic=logarithmic, percent=percent, from_zero=percent)
    return figure(caption, lines(caption, series, x, y, bands, dots=dots))


# --- quantizers ---


def quantization(study: Study) -> str:
    measured = [(model, model.quantization) for model in study.models if model.quantization is not None]
    if not measured:
        return ""
    return grid(_quantizer_charts(study, measured)) + "".join(_quantizer_tables(model, found) for model, found in measured)


def _quantizer_charts(study: Study, measured: Sequence[tuple[Model, Quantization]]) -> Iterator[str]:
    models = [model for model, _ in measured]
    blocks = dict.fromkeys((each.block, each.stage) for _, found in measured for each in found.blocks)
    labels, stages = [_last(block) for block, _ in blocks], [stage for _, stage in blocks]
    ends, clipped = [], []
    for (_, found), (label, place) in zip(measured, named(models, study), strict=True):
        noise = {(each.block, each.stage): each.end_to_end for each in found.blocks}
        ends.append((label, place, [_finite(noise.get(each)) for each in blocks]))
        most: dict[str, float] = {}
        for each in found.quantizers:
            most[each.block] = max(most.get(each.block, 0.0), each.clipped or 0.0)
        clipped.append((label, place, [most.get(block) for block, _ in blocks]))
    known = [value for _, _, values in ends for value in values if value is not None]
    drawn = rows("SQNR by block", labels, ends, axis("dB, end to end: further right is better", known), groups=stages)
    yield figure("Signal to quantization noise of what leaves each block, at its worst", drawn + key(named(models, study)))
    known = [value for _, _, values in clipped for value in values if value is not None]
    drawn = rows("clipped by block", labels, clipped, axis("share of values", known, from_zero=True, percent=True), groups=stages)
    yield figure("Clipped share, of the quantizer in each block that clips most", drawn + key(named(models, study)))
    ranges = []
    for (_, found), (label, place) in zip(measured, named(models, study), strict=True):
        widest: dict[str, tuple[float, float]] = {}
        for each in found.quantizers:
            if each.of == "activation" and each.learns and each.range is not None:
                low, high = widest.get(each.block, each.range)
                widest[each.block] = min(low, each.range[0]), max(high, each.range[1])
        ranges.append((label, place, [widest.get(block) for block, _ in blocks]))
    both = [end for _, _, pairs in ranges for pair in pairs if pair is not None for end in pair]
    drawn = rows("ranges by block", labels, ranges, folded_axis("value, on an axis logarithmic away from 0", both), groups=stages)
    yield figure("Ranges of activations: the lowest and highest value in each block", drawn + key(named(models, study)))


def _finite(value: float | None) -> float | None:
    """Without what is exact, which no axis holds."""
    return None if value is None or value >= EXACT else value


def _last(block: str) -> str:
    """The part of a block's path that tells it from others."""
    parts = block.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() or len(parts[-1]) < 3 else parts[-1]


def _quantizer_tables(model: Model, found: Quantization) -> str:
    head = ("quantizer", "block", "of", "bits", "lowest", "highest", "moved", "clipped", "alone, dB", "end to end, dB")
    body = [_quantizer(each) for each in found.quantizers]
    label = f"{model.label}: every quantizer"
    told = f"{label} ({len(body)}), measured on {found.pictures} {'picture' if found.pictures == 1 else 'pictures'}"
    return folded(told, table(label, head, body, tall=True, text=3))


def _quantizer(each: QuantizerFacts) -> list[str | Cell]:
    low, high = each.range or (None, None)
    moved = NOTHING if each.moved is None else f"x {each.moved:.3f}"
    name = within(each.name, each.block).removesuffix(".output") or each.name
    return [
        name, _last(each.block), each.of, str(each.bits), number(low, ".3g"), number(high, ".3g"), moved,
        share(each.clipped) if each.on else "off", _told(each.local) if each.on else "off", _told(each.end_to_end),
    ]  # fmt: skip


def _told(value: float | None) -> str:
    return NOTHING if value is None else "exact" if value >= EXACT else f"{value:.1f}"


# --- the graph ---


def stages(study: Study) -> str:
    graph = study.graph
    if graph is None:
        return ""
    reads: list[dict[int, set[int]]] = [{} for _ in graph.boxes]
    for edge in graph.edges:
        reads[edge.reader][edge.source] = set(edge.bits)
    found = dict.fromkeys(box.stage for box in graph.boxes)
    legend = "".join(
        f'<li><svg viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">'
        f'<rect x="1" y="1" width="12" height="12" rx="3" {paint(stage)}/></svg> {escape(stage or "no stage")}</li>'
        for stage in found
    )
    note = (
        "Numbers on lines are bits, a dashed line carries floats; W and A are the bits of weights and of what is read."
        if graph.quantized
        else ""
    )
    drawn = svg(graph.boxes, reads, quantized=graph.quantized)
    past = f'<a href="#integers">Go past its {len(graph.boxes)} boxes</a>'
    return (
        f'<ul class="key">{legend}</ul><p class="note">{escape(graph.label)}. {note} {past}</p>'
        f'<div class="scroll graph" tabindex="0" role="region" aria-label="the stage graph">{drawn}</div>'
    )


DRIFT = Part(
    "drift",
    "How far regions drift",
    "What makes a detector open-vocabulary is how its regions lie to texts and to each other; quantization moves them. Squares are the "
    "positions that stand for an object, coloured by their mean similarity to the others of its class.",
    drift,
    ("drift",),
)
TRAINING = Part(
    "training",
    "How training went",
    "Shaded stretches are the phases of the curriculum: each quantizes and trains the stages up to its own.",
    training,
    ("training",),
)
QUANTIZATION = Part(
    "quantizers",
    "What the quantizers do",
    "Where noise comes from: every block's signal to quantization noise, in the order of the data, and how much its quantizers clip. It is "
    "noise against the same weights without rounding: a trained model has come to rely on its rounding, and owes that one nothing.",
    quantization,
    ("quantization",),
)
STAGES = Part(
    "stages",
    "The stages",
    "The blocks of the graph, data flowing down, coloured by the stage of the curriculum that they belong to.",
    stages,
)
