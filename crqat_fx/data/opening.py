"""What names of data mean: `--data` when something is evaluated, the drawn task or the set of a data.yaml; and pictures without truth."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crqat_fx.data.config import DataConfig, open_validation, open_vocabularies, read_data
from crqat_fx.data.samples import EvaluationSet
from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.pictures import find_sources, read_source
from crqat_fx.vocabulary import Vocabulary

SHAPES = "shapes"


def size_of_data(data: str) -> dict[str, int]:
    """The picture size that the data asks for: the drawn task has one, a file's pictures come in any."""
    return {"size": ShapesTask.size} if data == SHAPES else {}


def open_evaluation(data: str, size: int, pictures: int) -> tuple[EvaluationSet, Vocabulary | None]:
    """The set, and the vocabulary that comes with it, if any. `size` and `pictures` are of the drawn task; a file has its own."""
    if data == SHAPES:
        task = ShapesTask(size=size)
        return ShapesSet(task, "val", pictures), task.vocabulary
    config = read_data(Path(data))
    dataset = open_validation(config)
    return dataset, without_padding(joined(open_vocabularies(config)), config) if config.vocabularies else None


def open_pictures(place: str, size: int, count: int) -> Iterator[np.ndarray]:
    """At most `count` pictures (uint8 RGB [H, W, 3]), one at a time, such as ranges are set by: of a folder, a file or a pattern, or with
    `shapes` of the drawn task, whose `size` it is."""
    if place == SHAPES:
        task = ShapesTask(size=size)
        return (task.draw("calibration", index).image for index in range(count))
    sources = find_sources([place])
    return (picture.pixels for picture in itertools.islice((each for source in sources for each in read_source(source)), count))


def joined(vocabularies: list[Vocabulary]) -> Vocabulary:
    """All names of some vocabularies of one width; of a name that several hold, the first embedding."""
    rows: dict[str, np.ndarray] = {}
    for vocabulary in vocabularies:
        for name, row in zip(vocabulary.names, vocabulary.embeddings, strict=True):
            rows.setdefault(name, row)
    return Vocabulary(tuple(rows), np.stack(list(rows.values())))


def without_padding(vocabulary: Vocabulary, config: DataConfig) -> Vocabulary:
    """Without `padding`, the embedding of no text, which nothing is to be detected under."""
    return vocabulary.select(name for name in vocabulary.names if name != config.padding)
