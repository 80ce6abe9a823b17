"""What `--data` names when something is trained or evaluated: the drawn task, or the sets of a data.yaml."""

from pathlib import Path

import numpy as np

from crqat_fx.data.augment import Augmentation
from crqat_fx.data.config import DataConfig, open_validation, open_vocabularies, read_data
from crqat_fx.data.loader import DetectionBatches
from crqat_fx.data.samples import EvaluationSet
from crqat_fx.data.shapes import ShapesBatches, ShapesSet, ShapesTask
from crqat_fx.vocabulary import Vocabulary

SHAPES = "shapes"


def size_of_data(data: str) -> dict[str, int]:
    """The picture size that the data asks for: the drawn task has one, a file's pictures come in any."""
    return {"size": ShapesTask.size} if data == SHAPES else {}


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
) -> tuple[DetectionBatches | ShapesBatches, Vocabulary | None]:
    """The batches, and the vocabulary that the trained file is to carry. A data.yaml with one vocabulary gives it to the file; with several
    there is none to choose, and the file goes without. The drawn task's follows from its seed.

    `pictures` is of the drawn task; `scale`, `mosaic_until` and `workers` are of a file.
    """
    if data == SHAPES:
        return ShapesBatches(ShapesTask(seed, size), pictures, batch, texts, seed=seed), None
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
    return source, _of_names(vocabularies[0], config) if len(vocabularies) == 1 else None


def open_evaluation(data: str, size: int, pictures: int) -> tuple[EvaluationSet, Vocabulary | None]:
    """The set, and the vocabulary that comes with it, if any. `size` and `pictures` are of the drawn task; a file has its own."""
    if data == SHAPES:
        task = ShapesTask(size=size)
        return ShapesSet(task, "val", pictures), task.vocabulary
    config = read_data(Path(data))
    dataset = open_validation(config)
    return dataset, _of_names(joined(open_vocabularies(config)), config) if config.vocabularies else None


def joined(vocabularies: list[Vocabulary]) -> Vocabulary:
    """All names of some vocabularies of one width; of a name that several hold, the first embedding."""
    rows: dict[str, np.ndarray] = {}
    for vocabulary in vocabularies:
        for name, row in zip(vocabulary.names, vocabulary.embeddings, strict=True):
            rows.setdefault(name, row)
    return Vocabulary(tuple(rows), np.stack(list(rows.values())))


def _of_names(vocabulary: Vocabulary, config: DataConfig) -> Vocabulary:
    """Without `padding`, the embedding of no text, which nothing is to be detected under."""
    return vocabulary.select(name for name in vocabulary.names if name != config.padding)
