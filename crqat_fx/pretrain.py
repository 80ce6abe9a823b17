"""Float training from scratch: builds the model and the data that the settings name, and hands them to the loop.

The data are the drawn task (`shapes`) or the sets of a `data.yaml`. The model starts from the seed, its classification biases from the
number of texts and the picture size it will see.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch

from crqat_fx.checkpoint import DRAWN
from crqat_fx.data.loader import DetectionBatches
from crqat_fx.data.opening import SHAPES
from crqat_fx.data.shapes_batches import ShapesBatches
from crqat_fx.data.training import DataSettings, open_for
from crqat_fx.models.yolo_world import Size, YoloWorld, config_for, initialise_head
from crqat_fx.progress import Progress
from crqat_fx.train import TrainResult, TrainSettings, train
from crqat_fx.vocabulary import Vocabulary


@dataclass(frozen=True)
class PretrainSettings(TrainSettings, DataSettings):
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (*TrainSettings.MAY_CHANGE, "workers")

    model: Size = "s"
    version: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_data()


def pretrain(
    settings: PretrainSettings,
    out: Path,
    *,
    origins: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> TrainResult:
    """Trains a new model into the run folder `out`, or goes on with the run that is there."""
    source, vocabulary = open_source(settings)
    torch.manual_seed(settings.seed)
    model = YoloWorld(replace(config_for(settings.model, settings.version), text_width=source.text_width))
    initialise_head(model, settings.texts, settings.size)
    return train(
        model,
        source,
        settings,
        out,
        vocabulary=vocabulary,
        metadata={"size": settings.size} | ({DRAWN: settings.seed} if settings.data == SHAPES else {}),
        origins=origins,
        progress=progress,
        resume=resume,
    )


def open_source(settings: PretrainSettings) -> tuple[DetectionBatches | ShapesBatches, Vocabulary | None]:
    """The batches that the settings ask for, and the vocabulary that the trained file will carry."""
    return open_for(settings, settings.steps * settings.accumulate, settings.batch, config_for(settings.model, settings.version).widen)
