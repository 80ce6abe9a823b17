"""A study as one HTML page that needs nothing else: no script, no network, no font."""

from html import escape
from pathlib import Path

from crqat_fx.files import written
from crqat_fx.findings import Study, closing_table


def write_report(study: Study, path: str | Path) -> None:
    with written(path) as temporary:
        temporary.write_text(page(study), encoding="utf-8")


def page(study: Study) -> str:
    head, rows = closing_table(study)
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(study.title)}</title></head><body>'
        f"<main><h1>{escape(study.title)}</h1><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></main></body></html>\n"
    )


def _cell(value: str | float | None) -> str:
    return f"<td>{'-' if value is None else f'{value:.2f}' if isinstance(value, float) else escape(str(value))}</td>"
