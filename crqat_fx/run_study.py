"""A training run as a study: the float model that taught it, what it began with (post-training quantization alone), what it came to."""

import dataclasses
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from crqat_fx.checkpoint import Checkpoint, model_of
from crqat_fx.data.opening import open_evaluation
from crqat_fx.errors import UserError
from crqat_fx.export import export
from crqat_fx.findings import Study
from crqat_fx.model_files import read_model
from crqat_fx.progress import Progress
from crqat_fx.qat import PREPARED, STARTED
from crqat_fx.quantize.prepared import read_saved
from crqat_fx.recipe import name_of
from crqat_fx.run_history import settings_of_run
from crqat_fx.runlog import LOG
from crqat_fx.study import Contender, StudySettings, study
from crqat_fx.vocabulary import Vocabulary


@dataclass(frozen=True)
class RunStudySettings(StudySettings):
    """Of a run: what stands in for its own, and whether files are exported of its models for what is measured of files."""

    teacher: str | None = None  # None: the run's own
    data: str | None = None
    export: bool = True


USUAL = RunStudySettings()
QUICK = {"pictures": 50, "compared": 16, "noise": 2, "shown": 3, "rounds": 5, "operators": 3}  # in place of the usual


def is_run(folder: Path) -> bool:
    """Whether a training wrote here."""
    return (folder / LOG).is_file()


def study_run(folder: Path, settings: RunStudySettings = USUAL, *, title: str = "", progress: Progress | None = None) -> Study:
    """Measures the models of a run against each other. Exported files are of the study alone, and go with it."""
    run = settings_of_run(folder)
    teacher, data = settings.teacher or run.teacher, settings.data or run.data
    if teacher is None:
        raise UserError("had no teacher to compare with", where=folder, remedy="name the float model with --teacher")
    for name in (STARTED, PREPARED):
        if not (folder / name).is_file():
            raise UserError(f"holds no {name}", where=folder, remedy="let the training save: go on with it by --resume")
    saved = read_saved(folder / PREPARED)
    recipe = name_of(saved.recipe) or "a recipe of its own"
    contenders: tuple[Contender, ...] = (
        Contender("FP32", teacher),
        Contender(f"PTQ {recipe}", str(folder / STARTED)),
        Contender(f"{run.method.upper()} {recipe}", str(folder / PREPARED), run=folder),
    )
    measured = StudySettings(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(StudySettings)})
    with tempfile.TemporaryDirectory() if settings.export else nullcontext() as place:
        if place is not None:
            texts = open_evaluation(data, saved.size, 1)[1] or saved.vocabulary
            contenders = _exported(contenders, texts, saved.size, Path(place), progress)
        return study(contenders, data, measured, title=title or f"Training in {folder.resolve().name}/", progress=progress)


def _exported(
    contenders: Sequence[Contender], vocabulary: Vocabulary | None, size: int, place: Path, progress: Progress | None
) -> tuple[Contender, ...]:
    made = []
    for number, each in enumerate(contenders):
        if progress is not None:
            progress(number, len(contenders), f"{each.label}, export")
        file = place / f"{number}.onnx"
        source = read_model(each.model, raw=each.raw)
        export(model_of(source) if isinstance(source, Checkpoint) else source, file, vocabulary=vocabulary, form="straight", size=size)
        made.append(dataclasses.replace(each, exported=file))
    return tuple(made)
