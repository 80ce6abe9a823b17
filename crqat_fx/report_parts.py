"""What every section of a report is made of: headings, tables that scroll by themselves, figures. All text that comes in is escaped."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from crqat_fx.findings import Model, Section, Study

NOTHING = "-"


@dataclass(frozen=True)
class Part:
    """A section: its address and heading, a sentence on what is seen and how it is read, and what it shows of a study; nothing at all where
    there is nothing."""

    address: str
    heading: str
    lead: str
    shown: Callable[[Study], str]
    needs: tuple[Section, ...] = ()  # what a model may lack, with the reason for it


@dataclass(frozen=True)
class Cell:
    """What a table says in one place, and what stands below it in small."""

    text: str
    below: str = ""
    kind: str = ""  # of the styles


Row = Sequence["str | Cell"]


def section(part: Part, study: Study) -> str:
    content = part.shown(study) + _missing(part.needs, study.models)
    return (
        f'<section id="{part.address}" aria-labelledby="{part.address}-heading"><h2 id="{part.address}-heading">{escape(part.heading)}</h2>'
        f'<p class="lead">{escape(part.lead)}</p>{content or "<p>Nothing was measured.</p>"}</section>'
    )


def _missing(needs: Sequence[Section], models: Sequence[Model]) -> str:
    """Why a section has nothing of some models; those with one reason are told together."""
    reasons: dict[str, list[str]] = {}
    for model in models:
        for each in needs:
            if each in model.missing:
                reason = f"{each}: {model.missing[each]}" if len(needs) > 1 else model.missing[each]
                reasons.setdefault(reason, []).append(model.label)
    told = "".join(f"<li>{escape(', '.join(labels))}: {escape(reason)}</li>" for reason, labels in reasons.items())
    return f'<ul class="missing" aria-label="what is not shown">{told}</ul>' if told else ""


def table(label: str, head: Sequence[str], rows: Iterable[Row], *, tall: bool = False, text: int = 1) -> str:
    """A table in a region that scrolls and that the keyboard reaches. The first column heads its row; the first `text` hold text."""
    top = "".join(f'<th scope="col"{"" if place < text else NUMBER}>{escape(name)}</th>' for place, name in enumerate(head))
    body = "".join(f"<tr>{''.join(_cell(cell, place, text) for place, cell in enumerate(row))}</tr>" for row in rows)
    region = f'<div class="scroll{" tall" if tall else ""}" tabindex="0" role="region" aria-label="{escape(label)}">'
    return f"{region}<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


NUMBER = ' class="number"'


def _cell(cell: str | Cell, place: int, text: int) -> str:
    given = cell if isinstance(cell, Cell) else Cell(cell)
    below = f"<small>{escape(given.below)}</small>" if given.below else ""
    kinds = " ".join(each for each in (given.kind, "" if place < text else "number") if each)
    kind = f' class="{kinds}"' if kinds else ""
    if place == 0:
        return f'<th scope="row"{kind}>{escape(given.text)}{below}</th>'
    return f"<td{kind}>{escape(given.text)}{below}</td>"


def figure(caption: str, drawn: str, kind: str = "") -> str:
    return f"<figure{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}><figcaption>{escape(caption)}</figcaption>{drawn}</figure>"


def grid(figures: Iterable[str], kind: str = "charts") -> str:
    """Figures side by side as far as there is room."""
    drawn = list(figures)
    return f'<div class="{kind}" style="--n:{len(drawn)}">{"".join(drawn)}</div>' if drawn else ""


def folded(summary: str, content: str) -> str:
    """Content that opens when it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def number(value: float | None, form: str = ".1f") -> str:
    return NOTHING if value is None else format(value, form)


def share(value: float | None) -> str:
    """In percent, as exact as it is small."""
    return NOTHING if value is None else "0%" if value == 0 else f"{value:.2%}" if value < 0.01 else f"{value:.1%}"


def named(models: Iterable[Model], study: Study) -> list[tuple[str, int]]:
    """Models with the number that their colour follows from: their place in the study."""
    places = {id(model): place for place, model in enumerate(study.models)}
    return [(model.label, places[id(model)]) for model in models]
