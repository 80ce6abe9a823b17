"""The record of a training run: one JSON object a line in `log.jsonl`, and the same numbers as TensorBoard scalars."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tensorboardX import SummaryWriter

from crqat_fx.files import written

LOG, TENSORBOARD = "log.jsonl", "tensorboard"


class RunLog:
    """Appends to a run folder's log. Opening it at a step drops what was logged after that step, by a run that was killed later."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / LOG
        if path.exists():
            _drop_lines_after(path, step)
        self._lines = path.open("a", encoding="utf-8", newline="\n")
        # the writer names its file by the second and empties one of that name: the step tells a quick resume's file from the first
        suffix = f".{step:012d}"
        self._scalars = SummaryWriter(logdir=str(folder / TENSORBOARD), purge_step=step + 1, filename_suffix=suffix)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lines.close()
        self._scalars.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._scalars.add_scalar(name, value, step)


def _drop_lines_after(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            logged = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # the line that was being written when the run was killed
            continue
        if logged <= step:
            kept.append(line + "\n")
    with written(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8", newline="\n")
