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
from crqat_fx.data.opening import SHAPES, open_training
from crqat_fx.data.shapes import ShapesBatches
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import Size, YoloWorld, config_for, initialise_head
from crqat_fx.progress import Progress
from crqat_fx.train import TrainResult, TrainSettings, train
from crqat_fx.vocabulary import Vocabulary

SMALL = ("pico", "nano", "s")  # sizes whose published augmentation scales less
OF_SHAPES = ("pictures",)  # settings that mean nothing to a data.yaml
OF_A_FILE = ("without_mosaic", "workers")  # settings that mean nothing to the drawn task


@dataclass(frozen=True)
class PretrainSettings(TrainSettings):
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (*TrainSettings.MAY_CHANGE, "workers")

    model: Size = "s"
    version: Literal[1, 2] = 1
    data: str = SHAPES  # or the path of a data.yaml
    size: int = 640  # of the pictures trained on
    texts: int = 80  # a picture
    pictures: int = 8_000  # of the drawn task; a data.yaml names its own
    without_mosaic: float = 0.02  # share of the steps, at the end; of a data.yaml
    seed: int = 0
    workers: int = 0  # processes that read a data.yaml's pictures

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 32 or self.size % 32:
            raise UserError(f"size is {self.size}", remedy="give a multiple of 32")
        if not 0 <= self.without_mosaic <= 1:
            raise UserError(f"without_mosaic is {self.without_mosaic}", remedy="give a share between 0 and 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}", remedy="give 0 or more")
        for name in OF_A_FILE if self.data == SHAPES else OF_SHAPES:
            if getattr(self, name) != getattr(PretrainSettings, name):
                raise UserError(f"{name} means nothing to the data {self.data}", remedy=f"leave {name} out")


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
    return open_training(
        settings.data,
        size=settings.size,
        batch=settings.batch,
        texts=settings.texts,
        seed=settings.seed,
        pictures=settings.pictures,
        scale=0.5 if settings.model in SMALL else 0.9,
        mosaic_until=round(settings.steps * settings.accumulate * (1 - settings.without_mosaic)),
        workers=settings.workers,
    )
