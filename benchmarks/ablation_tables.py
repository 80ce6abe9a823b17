"""The ablation's results as Markdown tables: means with their standard errors, and differences between runs of the same seed.

A difference is marked * where it exceeds twice its standard error. Of a single seed there is no error, and none is shown. One between rows
of two processors is marked †: their kernels round otherwise.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ablation_plan import (
    CORRECTED,
    FULL_PRECISION,
    HEADLINE,
    INTEGERS,
    METHODS,
    PAST,
    PLUS,
    PROTOCOL,
    PTQ,
    PTQ_CORRECTED,
    PUBLISHED,
    SCALES,
    THREE,
    TRKD,
    TUNING,
    WHY,
    WIDTHS,
    Result,
    Settings,
    choose,
    tuning_cell,
)

GROUPS = {"all": "all", "base": "base", "novel": "novel", "r": "rare", "c": "common", "f": "frequent"}
BEYOND = ("novel", "r")  # do they gain more than all do?
RELATIONS = {"region_text": "region-text", "region_region": "region-region"}
SPACES = ("embedding", "confidence")


def _at(place: str, *pairs: tuple[str, str]) -> list[tuple[str, str]]:
    return [(f"{place}/{own}", f"{place}/{other}") for own, other in pairs]


def _between(place: str, other: str, *variants: str) -> list[tuple[str, str]]:
    return [(f"{place}/{variant}", f"{other}/{variant}") for variant in variants]


# what is asked of two rows that no table has side by side: RECIPE[/TARGET]/VARIANT, and what it is compared with
PAIRS: Mapping[str, Sequence[tuple[str, str]]] = {
    "What the stages do": [
        *(pair for recipe in WIDTHS for pair in _at(recipe, ("cqat", "qat"), ("cr-qat", "kd"))),
        *_at(HEADLINE, ("cqat-3", "cqat"), ("cr-qat-3", "cr-qat"), ("cqat-kept-ranges", "cqat")),
    ],
    "What the teacher does": [
        *(pair for recipe in WIDTHS for pair in _at(recipe, ("kd", "qat"), ("cr-qat", "cqat"))),
        *_at(HEADLINE, *((name, "cqat") for name in TRKD), ("cr-qat-3", "cqat-3"), ("cr-qat-3-neck", "cr-qat-3")),
    ],
    "The order under other settings": _at(
        HEADLINE,
        *((f"{method}-slow", "qat-slow") for method in ("cqat", "kd", "cr-qat")),
        *((f"{method}-300", "qat-300") for method in ("cqat", "cr-qat")),
        ("cqat-300", "qat"),  # of which the second stage alone takes as many steps
        ("kd-decay", "qat-decay"),
        *((f"cr-qat-{setting}", f"qat-{setting}") for setting in ("decay", "norms", "correct", "correct-decay")),
    ),
    "What more steps do": _at(HEADLINE, *((f"{name}-300", name) for name in ("qat", "cqat", "cr-qat"))),
    "What correcting norms does": [
        *(pair for recipe in WIDTHS for pair in _at(recipe, (PTQ_CORRECTED, "ptq-omse"))),
        *_at(HEADLINE, *((f"{name}-correct{decay}", f"{name}{decay}") for name in ("qat", "cr-qat") for decay in ("", "-decay"))),
    ],
    "What a short first stage does": _at(HEADLINE, ("cr-qat-short", "cr-qat"), ("cr-qat-short-decay", "cr-qat-decay")),
    "What the decay does": _at(
        HEADLINE, *((f"{name}-decay", name) for name in ("qat", "kd", "cr-qat", "cr-qat-short", "qat-correct", "cr-qat-correct"))
    ),
    "What came of it, width by width": [
        pair
        for recipe in WIDTHS
        for pair in _at(
            recipe,
            ("qat-correct-decay", "qat"),
            ("cr-qat-correct-decay", "qat"),
            ("cr-qat-correct-decay", "cr-qat"),
            ("cr-qat-correct-decay", "qat-correct-decay"),
        )
    ],
    "What scales that learn faster do": [
        *(pair for recipe in WIDTHS for pair in _at(recipe, ("cr-qat-correct-decay-scales", "cr-qat-correct-decay"))),
        *_at(
            HEADLINE,
            ("qat-correct-decay-scales", "qat-correct-decay"),
            ("cr-qat-correct-decay-scales", "qat-correct-decay-scales"),
            ("cr-qat-correct-decay-scales", "cr-qat"),
        ),
    ],
    "What a scale per channel of activations does": [
        pair for recipe in (HEADLINE, "3-3-8") for pair in _between(f"{recipe}-ch", recipe, "ptq-omse", "qat", "cr-qat")
    ],
    "What odd weights do": [
        *_between(f"{HEADLINE}-odd", HEADLINE, "ptq-omse", PTQ_CORRECTED, *PLUS),
        *_at(f"{HEADLINE}-odd", tuple(reversed(PLUS))),
        (f"{HEADLINE}-odd/cr-qat-correct-decay", f"{HEADLINE}/cr-qat"),
    ],
    "What integers cost": [
        *_between(f"4-8-8-int/{INTEGERS}", "4-8-8", "ptq-omse", "qat", "cr-qat"),
        *_between(f"4-4-8/{INTEGERS}", "4-4-8", "ptq-omse", "qat", "cr-qat"),
    ],
}


@dataclass(frozen=True)
class Mean:
    """Of some values; `error` is the standard error of the mean, None of a single value."""

    mean: float
    error: float | None
    count: int

    @property
    def significant(self) -> bool:
        return self.error is not None and abs(self.mean) > 2 * self.error


def mean_of(values: Sequence[float]) -> Mean:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(statistics.fmean(values), error, len(values))


@dataclass(frozen=True)
class Row:
    """The runs of one variant, by seed."""

    recipe: str
    target: str
    variant: str
    runs: Mapping[int, Result]

    @property
    def processors(self) -> set[str | None]:
        """None of those that did not record it yet."""
        return {run.versions.get("processor") for run in self.runs.values()}

    @property
    def minutes(self) -> float:
        return statistics.fmean(sum(run.seconds.values()) for run in self.runs.values()) / 60

    def mean(self, value: "Measure") -> Mean | None:
        found = [number for number in map(value, self.runs.values()) if number is not None]
        return mean_of(found) if found else None

    def difference(self, reference: "Row", value: "Measure") -> Mean | None:
        """This less the reference, over the seeds that both have."""
        pairs = [(value(self.runs[seed]), value(reference.runs[seed])) for seed in sorted(self.runs.keys() & reference.runs.keys())]
        found = [own - other for own, other in pairs if own is not None and other is not None]
        return mean_of(found) if found else None


Measure = Callable[[Result], float | None]


def ap(group: str) -> Measure:
    return lambda result: result.ap.get(group)


def beyond_all(group: str) -> Measure:
    def measured(result: Result) -> float | None:
        own, everything = result.ap.get(group), result.ap.get("all")
        return None if own is None or everything is None else own - everything

    return measured


def drift(kind: str, space: str) -> Measure:
    return lambda result: result.distortion[kind][space]


def rows(results: Mapping[str, Result], recipe: str, variants: Sequence[str], target: str = PUBLISHED) -> list[Row]:
    """Those of the variants that were run, at least once."""
    found = []
    for variant in variants:
        runs = {
            result.cell.seed: result
            for result in results.values()
            if (result.cell.recipe, result.cell.target, result.cell.variant) == (recipe, target, variant)
            and not result.cell.name.startswith("tuning/")
        }
        if runs:
            found.append(Row(recipe, target, variant, runs))
    return found


# --- Markdown ---


def tables(results: Mapping[str, Result], again: Mapping[str, Result]) -> str:
    """All of them, those of which there is something to show. `again`: of cells that were run once more, elsewhere."""
    sections = (*_sections(results), *_run_again(results, again), *_on_one_processor(results, again))
    return "\n".join(["# Ablation", "", *_facts(results, again), "", *sections]).rstrip() + "\n"


def _facts(results: Mapping[str, Result], again: Mapping[str, Result]) -> Iterator[str]:
    runs = (*results.values(), *again.values())
    commits = sorted({run.versions["commit"] for run in runs})
    hours = sum(sum(run.seconds.values()) for run in runs) / 3600
    yield "Written by `python benchmarks/ablation.py --render` from the cells in `ablation/` and, run again, in `ablation-again/`;"
    yield "the protocol, fixed before, is `protocol.md`."
    told = ", ".join(commits) or "(none)"
    yield f"{len(results)} cells, {len(again)} of them again, {hours:.1f} hours of one core, library of commit {told}."
    yield ""
    yield "AP in percent on the first pictures of the drawn task's `val`; drift is the mean absolute error of cosines (embedding space) and"
    yield "of scores' relations (confidence space) against full precision. Mean ± standard error over n seeds; a difference is between runs"
    yield "of one seed, and marked * where it exceeds twice its standard error; † stands where the two were run on different processors."


def _sections(results: Mapping[str, Result]) -> Iterator[str]:
    yield from _tuning(results)
    yield from _headline(results)
    full = rows(results, FULL_PRECISION, [FULL_PRECISION])
    for recipe in WIDTHS:
        found = [*full, *rows(results, recipe, [*PTQ, PTQ_CORRECTED, *METHODS])]
        yield from _section(f"Methods at {recipe}", found, "qat")
    found = rows(results, HEADLINE, ["qat", *TRKD, "cr-qat"])
    yield from _section(f"What TRKD compares, {HEADLINE}", found, "no-trkd")
    yield from _section(f"Two stages and three, {HEADLINE}", rows(results, HEADLINE, ["qat", "cqat", "cr-qat", *THREE]), "qat")
    yield from _section(f"Why, {HEADLINE}", rows(results, HEADLINE, ["qat", "cqat", "cr-qat", *WHY]), "qat")
    for recipe in reversed(WIDTHS):
        yield from _section(f"Past the paper, {recipe}", rows(results, recipe, ["qat", "cr-qat", *CORRECTED, *SCALES, *PAST]), "cr-qat")
    for title, pairs in PAIRS.items():
        yield from _pairs(results, title, pairs)
    for recipe in (f"{HEADLINE}-ch", "3-3-8-ch"):
        yield from _section(f"Activations a scale per channel, {recipe}", rows(results, recipe, ["ptq-omse", "qat", "cr-qat"]), "qat")
    odd = rows(results, f"{HEADLINE}-odd", ["ptq-omse", PTQ_CORRECTED, *PLUS])
    yield from _section(f"Weights of odd codes, {HEADLINE}-odd", odd, PLUS[0])
    for recipe, target in (("4-8-8", PUBLISHED), ("4-8-8-int", INTEGERS), ("4-4-8", INTEGERS)):
        yield from _section(f"{recipe}, {target}", rows(results, recipe, ["ptq-omse", "qat", "cr-qat"], target), "qat")


def _tuning(results: Mapping[str, Result]) -> Iterator[str]:
    settings: Settings | None = PROTOCOL
    lines = []
    for tuning in TUNING:
        assert settings is not None
        chosen = choose(tuning, settings, results)
        for candidate in tuning.candidates:
            names = [tuning_cell(tuning, settings, candidate, seed).name for seed in tuning.seeds]
            values = [results[name].ap["all"] or 0.0 for name in names if name in results]
            if not values:
                continue
            told = ", ".join(f"{name} {value}" for name, value in candidate.items())
            mark = "chosen" if chosen is not None and chosen == {**settings, **candidate} else ""
            lines.append(f"| {tuning.method} | {told} | {', '.join(f'{value:.1f}' for value in values)} | {mark} |")
        settings = chosen
        if settings is None:
            break
    if lines:
        yield from (f"## Tuning, {HEADLINE}", "", "| method | candidate | AP, by seed | |", "|---|---|---|---|", *lines, "")


def _headline(results: Mapping[str, Result]) -> Iterator[str]:
    """Is a width one at which the question is asked: PTQ as the paper has it under a tenth of full precision, QAT under 60% of it?"""
    full = rows(results, FULL_PRECISION, [FULL_PRECISION])
    lines = []
    for recipe in WIDTHS if full else ():
        shares = []
        for variants in (list(PTQ), ["qat"]):
            means = [found.mean for row in rows(results, recipe, variants) if (found := row.mean(ap("all"))) is not None]
            whole = full[0].mean(ap("all"))
            assert whole is not None
            shares.append(f"{max(means) / whole.mean:.0%}" if means else "")
        lines.append(f"| {recipe} | {' | '.join(shares)} |")
    if lines:
        yield from ("## AP as a share of full precision", "", "| recipe | best PTQ | QAT |", "|---|---|---|", *lines, "")


def _pairs(results: Mapping[str, Result], title: str, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """One row less another."""
    lines = []
    for pair in pairs:
        own, other = (_of_name(results, name) for name in pair)
        count = len(own.runs.keys() & other.runs.keys()) if own and other else 0
        if own and other and count:
            measures = (*map(ap, GROUPS), *map(beyond_all, BEYOND))
            differences = [_marked(own.difference(other, measure), 1) for measure in measures]
            lines.append(f"| {less(*pair)}{_across(own, other)} | {count} | {' | '.join(differences)} |")
    if lines:
        names = ["", "n", *(f"AP {name}" for name in GROUPS.values()), *(f"{GROUPS[group]} less all" for group in BEYOND)]
        yield from (f"## {title}", "", *_head(names), *lines, "")


def _run_again(results: Mapping[str, Result], again: Mapping[str, Result]) -> Iterator[str]:
    """What came otherwise."""
    lines = []
    for name in sorted({name.rsplit(".", 1)[0] for name in again}):
        before, after = (_of_name(each, name) for each in (results, again))
        if before and after and (common := before.runs.keys() & after.runs.keys()):
            whole = [_shown(replace(row, runs={seed: row.runs[seed] for seed in common}).mean(ap("all")), 1) for row in (before, after)]
            differences = [_marked(after.difference(before, measure), 1) for measure in map(ap, GROUPS)]
            lines.append(f"| {name} | {len(common)} | {' | '.join((*whole, *differences))} |")
    if lines:
        yield from ("## Cells run again", "", "AP before, again, and the difference: of another processor, or another commit.", "")
        yield from (*_head(["", "n", "AP all", "again", *GROUPS.values()]), *lines, "")


def _on_one_processor(results: Mapping[str, Result], again: Mapping[str, Result]) -> Iterator[str]:
    """Differences between runs of each processor that cells ran again on: what ran again stands for what there was."""
    runs = (*results.items(), *again.items())
    for processor in sorted({result.versions["processor"] for result in again.values()}):
        of_it = {name: result for name, result in runs if result.versions.get("processor") == processor}
        for title, pairs in PAIRS.items():
            yield from _pairs(of_it, f"{title}: all with {processor}", pairs)


def _across(own: Row, other: Row) -> str:
    return " †" if own.processors != other.processors else ""


def _of_name(results: Mapping[str, Result], name: str) -> Row | None:
    """RECIPE[/TARGET]/VARIANT."""
    recipe, *target, variant = name.split("/")
    return next(iter(rows(results, recipe, [variant], *target)), None)


def less(name: str, other: str) -> str:
    (place, variant), (other_place, other_variant) = (each.rsplit("/", 1) for each in (name, other))
    if place == other_place:
        return f"{place}: {variant} less {other_variant}"
    return f"{variant}: {place} less {other_place}" if variant == other_variant else f"{name} less {other}"


def _section(title: str, found: list[Row], reference: str) -> Iterator[str]:
    if not any(row.variant != FULL_PRECISION for row in found):
        return
    yield from (f"## {title}", "")
    yield from _head(["", "n", *(f"AP {name}" for name in GROUPS.values()), "minutes"])
    for row in found:
        cells = [_shown(row.mean(ap(group)), 1) for group in GROUPS]
        yield f"| {row.variant} | {len(row.runs)} | {' | '.join(cells)} | {row.minutes:.1f} |"
    yield ""
    measured = [(kind, space) for kind in RELATIONS for space in SPACES]
    yield from _head(["drift", *(f"{RELATIONS[kind]}, {space}" for kind, space in measured)])
    for row in found:
        if row.variant != FULL_PRECISION:
            yield f"| {row.variant} | {' | '.join(_shown(row.mean(drift(*one)), 4) for one in measured)} |"
    yield ""
    base = next((row for row in found if row.variant == reference), None)
    others = [row for row in found if row.variant not in (reference, FULL_PRECISION)]
    if base is None or not any(row.runs.keys() & base.runs.keys() for row in others):
        return
    yield from _head([f"less {reference}", "n", *(f"AP {name}" for name in GROUPS.values()), *RELATIONS.values()])
    for row in others:
        differences = [_marked(row.difference(base, ap(group)), 1) for group in GROUPS]
        differences += [_marked(row.difference(base, drift(kind, "embedding")), 4) for kind in RELATIONS]
        pairs = len(row.runs.keys() & base.runs.keys())
        if pairs:
            yield f"| {row.variant}{_across(row, base)} | {pairs} | {' | '.join(differences)} |"
    yield ""


def _head(names: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)


def _shown(value: Mean | None, digits: int, sign: str = "") -> str:
    if value is None:
        return ""
    error = "" if value.error is None else f" ± {value.error:.{digits}f}"
    return f"{value.mean:{sign}.{digits}f}{error}"


def _marked(value: Mean | None, digits: int) -> str:
    return _shown(value, digits, "+") + ("*" if value is not None and value.significant else "")
