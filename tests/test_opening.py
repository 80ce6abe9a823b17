"""What `--data` names, opened for training and for evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_sets import NAMES, write_coco, write_data, write_vocabulary

from crqat_fx.data.coco import CocoSet
from crqat_fx.data.loader import DetectionBatches
from crqat_fx.data.opening import SHAPES, joined, open_evaluation, size_of_data
from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.data.shapes_batches import ShapesBatches
from crqat_fx.data.training import open_training
from crqat_fx.errors import UserError
from crqat_fx.vocabulary import Vocabulary

ASKED: dict[str, Any] = {
    "size": 64, "batch": 2, "texts": 20, "seed": 3, "pictures": 5, "scale": 0.9, "mosaic_until": 7, "workers": 0
}  # fmt: skip


def write(folder: Path, **keys: Any) -> str:
    """A data.yaml with a set to train on, which is evaluated on, too."""
    write_coco(folder)
    one = {"annotations": "annotations.json", "pictures": "pictures"}
    return str(write_data(folder, train=one, val=one, **keys).path)


# --- evaluation ---


def test_the_drawn_task_is_evaluated_at_the_size_and_on_the_pictures_asked_for() -> None:
    dataset, vocabulary = open_evaluation(SHAPES, 192, 3)
    assert isinstance(dataset, ShapesSet)
    assert len(dataset) == 3
    assert np.array_equal(dataset.picture(2), ShapesTask(size=192).draw("val", 2).image)
    assert vocabulary is not None
    assert vocabulary.names == ShapesTask().names


def test_a_file_s_set_is_evaluated_with_its_vocabularies_as_one(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "a.npz", ["bird", "(empty)"])
    write_vocabulary(tmp_path / "b.npz", ["cat", "dog"])
    dataset, vocabulary = open_evaluation(write(tmp_path, vocabularies=["a.npz", "b.npz"], padding="(empty)"), 640, 500)
    assert isinstance(dataset, CocoSet)
    assert dataset.names == NAMES
    assert len(dataset) == 6
    assert vocabulary is not None
    assert vocabulary.names == ("bird", "cat", "dog")  # nothing is to be found under the padding


def test_a_file_without_vocabularies_leaves_the_names_to_the_model(tmp_path: Path) -> None:
    assert open_evaluation(write(tmp_path), 640, 500)[1] is None


def test_only_the_drawn_task_asks_for_a_picture_size() -> None:
    assert size_of_data(SHAPES) == {"size": 160}
    assert size_of_data("data.yaml") == {}


# --- vocabularies ---


def test_joined_vocabularies_keep_order_and_the_first_of_two_embeddings() -> None:
    axes = np.eye(4, dtype=np.float32)
    one = joined([Vocabulary(("dog", "cat"), axes[:2]), Vocabulary(("bird", "cat"), axes[2:])])
    assert one.names == ("dog", "cat", "bird")
    assert np.array_equal(one.embeddings, axes[:3])


# --- training ---


def test_the_drawn_task_is_trained_on_without_a_file() -> None:
    source, vocabulary = open_training(SHAPES, **ASKED)
    assert isinstance(source, ShapesBatches)
    assert (source.task, source.count, source.batch, source.texts, source.seed) == (ShapesTask(3, 64), 5, 2, 20, 3)
    assert source.text_width == 512
    assert vocabulary is None


def test_a_file_is_trained_on_and_gives_its_only_vocabulary_without_the_padding(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "v.npz", [*NAMES, "(empty)"])
    source, vocabulary = open_training(write(tmp_path, vocabularies="v.npz", padding="(empty)"), **ASKED)
    assert isinstance(source, DetectionBatches)
    assert (source.samples.augmentation.size, source.samples.augmentation.scale, source.samples.mosaic_until) == (64, 0.9, 7)
    assert (source.samples.batch, source.samples.texts, source.samples.seed) == (2, 20, 3)
    assert source.text_width == 8
    assert vocabulary is not None
    assert vocabulary.names == NAMES


def test_of_several_vocabularies_none_is_given(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "a.npz", ["bird"])
    write_vocabulary(tmp_path / "b.npz", ["cat", "dog"])
    assert open_training(write(tmp_path, vocabularies=["a.npz", "b.npz"]), **ASKED)[1] is None


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for open_it in (lambda data: open_training(data, **ASKED), lambda data: open_evaluation(data, 64, 5)):
        with pytest.raises(UserError, match="no readable YAML"):
            open_it(str(tmp_path / "none.yaml"))
