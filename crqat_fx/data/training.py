"""What `--data` names when something is trained: the drawn task, or the sets of a data.yaml."""

from dataclasses import dataclass
from pathlib import Path

from crqat_fx.data.augment import Augmentation
from crqat_fx.data.config import open_vocabularies, read_data
from crqat_fx.data.loader import DetectionBatches
from crqat_fx.data.opening import SHAPES, without_padding
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.data.shapes_batches import ShapesBatches
from crqat_fx.errors import UserError
from crqat_fx.vocabulary import Vocabulary

OF_SHAPES = ("pictures",)  # settings that mean nothing to a data.yaml
OF_A_FILE = ("without_mosaic", "workers")  # settings that mean nothing to the drawn task
SMALL = 0.5  # widest of the models whose published augmentation scales less


@dataclass(frozen=True)
class DataSettings:
    """What a training sees."""

    data: str = SHAPES  # or the path of a data.yaml
    size: int = 640  # of the pictures trained on
    texts: int = 80  # a picture
    pictures: int = 8_000  # of the drawn task; a data.yaml names its own
    without_mosaic: float = 0.02  # share of the steps, at the end; of a data.yaml
    seed: int = 0
    workers: int = 0  # processes that read a data.yaml's pictures

    def check_data(self) -> None:
        """Refuses values that make no sense."""
        if self.size < 32 or self.size % 32:
            raise UserError(f"size is {self.size}", remedy="give a multiple of 32")
        if not 0 <= self.without_mosaic <= 1:
            raise UserError(f"without_mosaic is {self.without_mosaic}", remedy="give a share between 0 and 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}", remedy="give 0 or more")
        for name in OF_A_FILE if self.data == SHAPES else OF_SHAPES:
            if getattr(self, name) != getattr(DataSettings, name):
                raise UserError(f"{name} means nothing to the data {self.data}", remedy=f"leave {name} out")


def open_for(
    settings: DataSettings, batches: int, batch: int, widen: float, task: int | None = None
) -> tuple[DetectionBatches | ShapesBatches, Vocabulary | None]:
    """What `open_training` gives for a training of so many batches of a model of that width."""
    return open_training(
        settings.data,
        size=settings.size,
        batch=batch,
        texts=settings.texts,
        seed=settings.seed,
        pictures=settings.pictures,
        scale=0.5 if widen <= SMALL else 0.9,
        mosaic_until=round(batches * (1 - settings.without_mosaic)),
        workers=settings.workers,
        task=task,
    )


def open_training(
    data: str,
    *,
    size: int,
    batch: int,
    texts: int,
    seed: int,
    pictures: int,
    scale: float,
    mosaic_until: int | None,
    workers: int,
    task: int | None = None,
) -> tuple[DetectionBatches | ShapesBatches, Vocabulary | None]:
    """The batches, and the vocabulary that the trained file is to carry. A data.yaml with one vocabulary gives it to the file; with several
    there is none to choose, and the file goes without. The drawn task's follows from its seed.

    `pictures` is of the drawn task, as is `task`, the task's own seed where it is another; `scale`, `mosaic_until` and `workers` are of a
    file.
    """
    if data == SHAPES:
        return ShapesBatches(ShapesTask(seed if task is None else task, size), pictures, batch, texts, seed=seed), None
    config = read_data(Path(data))
    source = DetectionBatches(
        config,
        batch=batch,
        augmentation=Augmentation(size=size, scale=scale),
        texts=texts,
        seed=seed,
        workers=workers,
        mosaic_until=mosaic_until,
    )
    vocabularies = open_vocabularies(config)
    return source, without_padding(vocabularies[0], config) if len(vocabularies) == 1 else None
