"""How the command line speaks: results on stdout, everything else (progress, warnings, where files went) on stderr."""

import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Report = Callable[[int, int, str], None]  # done, total, what it is at

SECONDS_BETWEEN_LINES = 10.0

results = Console(soft_wrap=True)
notes = Console(stderr=True, soft_wrap=True)


class _OneLine(logging.Handler):
    """`warning: ...`, above a progress bar that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        notes.print(f"{record.levelname.lower()}: {record.getMessage()}", markup=False, highlight=False)


def write_what_the_terminal_cannot() -> None:
    """A character that a stream's encoding lacks is written as its code instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def start_logging(debug: bool) -> None:
    """Warnings to stderr, one line each; with `debug` also what passes left alone and why."""
    handler = _OneLine()
    for package in ("crqat_fx", "passes"):
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(logging.DEBUG if debug else logging.WARNING)


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """A bar for one long deed, drawn by calling what it yields. Where no terminal is there to draw on, a line now and then. Of several
    processes that torchrun started the first one draws."""
    if not notes.is_terminal or os.environ.get("RANK", "0") != "0":
        yield _lines(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[at]}", markup=False),
    )
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task(title, total=None, at="")

        def report(done: int, total: int, at: str) -> None:
            bar.update(task, completed=done, total=total, at=at)

        yield report


@contextmanager
def deed(title: str) -> Iterator[Report]:
    """One of several long deeds: a bar while it lasts, and a line with its time that stays."""
    started = time.monotonic()
    with progress(title) as report:
        yield report
    note(f"{title}: done in {time.monotonic() - started:.0f} s")


def _lines(title: str) -> Report:
    last = time.monotonic()

    def report(done: int, total: int, at: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            note(f"{title}: {done} of {total} {at}")

    return report


def note(text: str) -> None:
    notes.print(text, markup=False, highlight=False)


def show(what: RenderableType) -> None:
    results.print(what)


def show_json(report: Mapping[str, Any] | Sequence[Any]) -> None:
    results.file.write(json.dumps(report, indent=2, default=str) + "\n")


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]], digits: int = 1) -> Table:
    """Text on the left, numbers on the right."""
    drawn = Table(title=Text(title), title_justify="left")
    written = [["-" if cell is None else f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    for number, name in enumerate(head):
        numeric = all(isinstance(row[number], int | float | None) for row in rows)
        longest = max((len(row[number]) for row in written), default=0)
        # nothing is cut short, however narrow the terminal: numbers keep their width, words go on in the next line
        drawn.add_column(Text(name), justify="right" if numeric else "left", min_width=longest if numeric else None, overflow="fold")
    for cells in written:  # as Text: a name may look like markup
        drawn.add_row(*map(Text, cells))
    return drawn
