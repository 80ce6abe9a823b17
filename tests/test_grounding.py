"""GroundingSet: MDETR's files, whose captions name the classes of each picture."""

import logging
from pathlib import Path
from typing import Any

import pytest
from drawn_sets import write_grounding

from crqat_fx.data.grounding import GroundingSet
from crqat_fx.errors import UserError


def test_a_picture_has_its_own_distinct_phrases_as_classes(tmp_path: Path) -> None:
    dataset = GroundingSet(*write_grounding(tmp_path))
    for index in range(len(dataset)):
        boxes, labels, texts = dataset.truth(index)
        named = [texts[label] for label in labels]
        assert named == [("a red cat",), ("a dog",), ("a red cat",), (f"cat {index}",)]
        assert len(texts) == len(set(texts)) == 3
        assert boxes[1].tolist() == [50, 10, 74, 42]
    assert dataset.all_texts() == {"a red cat", "a dog", "cat 0", "cat 1", "cat 2", "cat 3"}
    assert not dataset.skipped


@pytest.mark.parametrize(
    ("spans", "kind"),
    [
        (None, "spans within its caption"),
        ([], "spans within its caption"),
        ([[3]], "spans within its caption"),
        ([[5, 3]], "spans within its caption"),
        ([[0, 10_000]], "spans within its caption"),
        ([[-3, 4]], "spans within its caption"),
        ([["0", 4]], "spans within its caption"),
        ([[1, 2]], "phrase is empty"),
    ],
)
def test_an_annotation_without_a_phrase_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spans: Any, kind: str
) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = GroundingSet(*write_grounding(tmp_path, change=lambda content: content["annotations"][1].update(tokens_positive=spans)))
    assert sum(dataset.skipped.values()) == 1
    assert kind in caplog.text
    assert "annotation 2" in caplog.text
    assert dataset.truth(0)[2] == (("a red cat",), ("cat 0",))


def test_a_picture_without_a_caption_keeps_no_annotation(tmp_path: Path) -> None:
    dataset = GroundingSet(*write_grounding(tmp_path, change=lambda content: content["images"][0].pop("caption")))
    assert dataset.skipped == {"annotation of a picture without a caption": 4}
    boxes, labels, texts = dataset.truth(0)
    assert (len(boxes), len(labels), texts) == (0, 0, ())


def test_a_phrase_of_untrained_boxes_alone_is_no_class(tmp_path: Path) -> None:
    dataset = GroundingSet(*write_grounding(tmp_path, count=1, change=lambda content: content["annotations"][1].update(iscrowd=1)))
    assert dataset.truth(0)[2] == (("a red cat",), ("cat 0",))
    assert dataset.all_texts() == {"a red cat", "cat 0"}


def test_an_empty_grounding_set_is_an_error(tmp_path: Path) -> None:
    annotations, pictures = write_grounding(tmp_path, change=lambda content: content.update(annotations=[]))
    with pytest.raises(UserError, match="no usable annotation"):
        GroundingSet(annotations, pictures)
