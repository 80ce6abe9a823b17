"""The record of a training run: one JSON object a line in `log.jsonl`, and in `quantizers.jsonl` where there are quantizers to speak of;
the same numbers as TensorBoard scalars."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from crqat_fx.files import written

LOG, DETAILS, TENSORBOARD = "log.jsonl", "quantizers.jsonl", "tensorboard"


class RunLog:
    """Appends to a run folder's log. Opening it at a step drops what was logged after that step, by a run that was killed later."""

    def __init__(self, folder: Path, step: int) -> None:
        for name in (LOG, DETAILS):
            if (folder / name).exists():
                _drop_lines_after(folder / name, step)
        self._folder = folder
        self._files: dict[str, TextIO] = {LOG: _appended(folder / LOG)}
        # the writer names its file by the second and empties one of that name: the step tells a quick resume's file from the first
        suffix = f".{step:012d}"
        self._scalars = SummaryWriter(logdir=str(folder / TENSORBOARD), purge_step=step + 1, filename_suffix=suffix)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        self._scalars.close()

    def write(self, step: int, values: Mapping[str, float], name: str = LOG) -> None:
        """Appends a line to the file of that name."""
        if name not in self._files:
            self._files[name] = _appended(self._folder / name)
        file = self._files[name]
        file.write(json.dumps({"step": step, **values}) + "\n")
        file.flush()
        for name, value in values.items():
            self._scalars.add_scalar(name, value, step)


def _appended(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8", newline="\n")


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log, but for those that cannot be read: the one that was being written when a run was killed. None of no file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and type(line.get("step")) is int:
                yield line


def _drop_lines_after(path: Path, step: int) -> None:
    kept = [json.dumps(line) + "\n" for line in lines_of(path) if line["step"] <= step]
    with written(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8", newline="\n")
