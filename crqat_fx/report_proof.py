"""What a report's figures rest on: what runs in integers and where time goes, the verification ladder, and how everything was measured."""

from collections.abc import Iterator, Sequence
from html import escape

from crqat_fx.bench import Operators
from crqat_fx.charts import axis, key, stacks
from crqat_fx.findings import Model, Study
from crqat_fx.report_parts import NOTHING, Cell, Part, Row, figure, folded, grid, number, share, table
from crqat_fx.verify import Verification
from crqat_fx.work import OTHER, by_work

SPARE = 6  # kinds of work that a bar tells apart; the rest is one part


def integers(study: Study) -> str:
    measured = [(model, model.integers) for model in study.models if model.integers is not None]
    if not measured:
        return ""
    head = (
        "model",
        "multiply-accumulates",
        "in integers",
        "of what the recipe quantizes",
        "operators",
        "on floats",
        "stray Transposes",
        "ms in turns",
        "ms, profiled",
    )
    body = [_coverage(model, found) for model, found in measured]
    return table("integer coverage", head, body) + grid(_times(study, measured)) + "".join(_details(*each) for each in measured)


def _coverage(model: Model, found: Operators) -> Row:
    of = found.coverage
    return [
        model.label, f"{of.macs / 1e9:.2f} G", share(of.share), share(of.wanted_share), f"{sum(of.counts.values())}", f"{len(of.floats)}",
        f"{len(of.stray_transposes)}", _spread(model), number(sum(each.milliseconds for each in found.times), ".1f"),
    ]  # fmt: skip


def _spread(model: Model) -> Cell:
    if model.speed is None:
        return Cell(NOTHING)
    found = model.speed.milliseconds
    return Cell(f"{found.median:.1f}", f"{found.low:.1f} to {found.high:.1f}")


def _times(study: Study, measured: Sequence[tuple[Model, Operators]]) -> Iterator[str]:
    *kinds, _ = by_work([found.times for _, found in measured])
    kinds.sort(key=lambda work: (work.name == OTHER, -sum(work.milliseconds)))
    parts = [(work.name, work.milliseconds) for work in kinds[:SPARE]]
    if kinds[SPARE:]:
        parts.append(("the rest", tuple(map(sum, zip(*(work.milliseconds for work in kinds[SPARE:]), strict=True)))))
    names, labels = [name for name, _ in parts], [model.label for model, _ in measured]
    values = [[taken[place] for _, taken in parts] for place in range(len(measured))]
    x = axis("milliseconds of one run, by kind of work", [sum(each) for each in values], from_zero=True, room=0.02)
    drawn = stacks("time by kind of work", labels, names, values, x, "ms")
    legend = key(((name, place) for place, name in enumerate(names)), squares=True)
    yield figure("Where the time goes, from onnxruntime's profiler", drawn + legend)


def _details(model: Model, found: Operators) -> str:
    whole = sum(each.milliseconds for each in found.times) or 1.0
    times = [
        [
            each.kind,
            f"{each.nodes}",
            f"{each.macs / 1e9:.3f}" if each.macs else "",
            f"{each.milliseconds:.3f}",
            share(each.milliseconds / whole),
        ]
        for each in found.times
    ]
    content = table(f"{model.label}: time by operator", ("operator", "nodes", "MACs, G", "ms", "share"), times, tall=True)
    reasons: dict[str, list[str]] = {}
    for each in found.coverage.floats:
        reasons.setdefault(each.reason, []).append(each.kind)
    if model.kind == "quantized" and reasons:
        rows_of = [[reason, ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))] for reason, kinds in reasons.items()]
        content += table(f"{model.label}: what is left in floats", ("left in floats, because", "operators"), rows_of, text=2)
    return folded(f"{model.label}: every operator", content)


# --- the ladder ---


def ladder(study: Study) -> str:
    verified = [(model, model.ladder) for model in study.models if model.ladder is not None]
    return "".join(_rungs(model, found) for model, found in verified)


def _rungs(model: Model, found: Verification) -> str:
    judged = {True: Cell("✓ holds", "", "good"), False: Cell("✗ FAILS", "", "bad"), None: Cell("reported")}
    body: list[list[str | Cell]] = [
        [
            Cell(f"{rung.number}. {rung.name}" if rung.number is not None else rung.name, rung.detail if rung.passed is not None else ""),
            judged[rung.passed],
            f"{rung.tensors:,}",
            *(f"{count:,}" for count in rung.steps),
        ]
        for rung in found.rungs
    ]
    head = ("rung", "", "tensors", "codes equal", "1 step off", "2 off", "more")
    reasons: dict[str, int] = {}
    for reason in found.collapsed.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    left = "; ".join(f"{count} where {reason}" for reason, count in reasons.items())
    note = f'<p class="note">Quantizers that are not in the file, and need not be: {escape(left)}.</p>' if left else ""
    departs = f'<p class="bad">Departs first: {escape(found.departs)}</p>' if found.departs is not None else ""
    return f"<h3>{escape(model.label)}</h3>{departs}{table(f'{model.label}: the ladder', head, body, text=2)}{note}"


# --- how it was measured ---


def measured(study: Study) -> str:
    facts = {
        "data": study.data,
        "vocabulary": f"{study.names} names",
        "picture size": f"{study.size} px",
        "metric": {"coco": "COCO AP", "lvis-fixed": "LVIS Fixed AP"}[study.metric],
        "threads": f"{study.threads}, where time is measured",
        **study.machine,
    }
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    files = [
        [model.label, model.file, "floats" if model.kind == "float" else model.recipe or "its own", model.target or "", model.weights]
        for model in study.models
    ]
    head = ("model", "file", "recipe", "target", "weights")
    return f"<dl>{told}</dl>{table('the models', head, files, text=5)}"


INTEGERS = Part(
    "integers",
    "What runs in integers, and where time goes",
    "Counted and timed on the graph that onnxruntime really runs, after its own optimizations. The first ratios are of the times in turns; "
    "the profiler, which tells operators apart, takes time of its own. Ratios carry over to other processors, milliseconds do not.",
    integers,
    ("integers",),
)
LADDER = Part(
    "ladder",
    "Does the file compute what training saw?",
    "Each rung rests on the one below: the stored codes, the lowered graph, onnxruntime without and with its optimizations, each tensor "
    "fed with the codes before it. What runs on from the picture is reported: one tie there cascades.",
    ladder,
    ("ladder",),
)
MEASURED = Part("measured", "How it was measured", "What the figures depend on besides the models.", measured)
