"""CocoSet: COCO, Objects365 and LVIS read as they are published, and what is mended, left out or refused."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_sets import COLOURS, HEIGHT, NAMES, WIDTH, boxes_of, draw, save, write_coco, write_lvis, write_objects365

from crqat_fx.data.coco import CocoSet
from crqat_fx.errors import UserError


def test_reads_boxes_labels_texts_and_pixels_of_a_coco_set(tmp_path: Path) -> None:
    dataset = CocoSet(*write_coco(tmp_path))
    assert len(dataset) == 6
    assert dataset.names == NAMES
    for index in range(6):
        boxes, labels, texts = dataset.truth(index)
        image = dataset.picture(index)
        assert [texts[label][0] for label in labels] == [name for name, _ in boxes_of(index)]
        assert boxes.tolist() == [[x, y, x + w, y + h] for _, (x, y, w, h) in boxes_of(index)]
        for (left, top, right, bottom), label in zip(boxes.astype(int), labels, strict=True):
            assert (image[top:bottom, left:right] == COLOURS[NAMES[label]]).all()
    assert not dataset.skipped
    assert not dataset.repaired


def test_gives_evaluation_the_truth_in_coco_s_terms(tmp_path: Path) -> None:
    def crowd(content: dict[str, Any]) -> None:
        content["annotations"][1]["iscrowd"] = 1
        content["annotations"][1]["area"] = 77.5
        del content["annotations"][2]["area"]

    annotations, pictures = write_coco(tmp_path, change=crowd)
    given = json.loads(annotations.read_text())
    coco = CocoSet(annotations, pictures).coco
    assert coco["images"] == given["images"]
    assert [category["id"] for category in coco["categories"]] == [10, 20, 30]
    assert coco["categories"][0] == {"id": 10, "name": "cat", "supercategory": "animal", "synonyms": ["cat"]}
    keys = ("id", "image_id", "category_id", "bbox", "iscrowd")
    assert [[a[key] for key in keys] for a in coco["annotations"]] == [[a[key] for key in keys] for a in given["annotations"]]
    assert [annotation["area"] for annotation in coco["annotations"][:3]] == [30 * 40, 77.5, 30 * 40]
    assert json.loads(json.dumps(coco)) == coco


def test_crowds_are_not_trained_on(tmp_path: Path) -> None:
    dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["annotations"][1].update(iscrowd=1)))
    boxes, labels, _ = dataset.truth(0)
    assert boxes.tolist() == [[4, 8, 34, 48]]
    assert labels.tolist() == [0]


def test_annotations_in_any_order_find_their_pictures(tmp_path: Path) -> None:
    dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["annotations"].reverse()))
    assert sorted(dataset.truth(4)[0].tolist()) == [[8, 8, 38, 48], [50, 14, 74, 46]]


def test_classes_keep_some_categories_in_the_order_given(tmp_path: Path) -> None:
    dataset = CocoSet(*write_coco(tmp_path), classes=["bird", "cat"])
    assert dataset.names == ("bird", "cat")
    labels = [label for index in range(6) for label in dataset.truth(index)[1]]
    assert labels.count(0) == labels.count(1) == 4
    assert {annotation["category_id"] for annotation in dataset.coco["annotations"]} == {10, 30}
    assert not dataset.skipped


def test_class_texts_give_each_category_its_captions_in_the_order_of_ids(tmp_path: Path) -> None:
    annotations, pictures = write_coco(tmp_path, change=lambda content: content["categories"].reverse())
    texts = tmp_path / "texts.json"
    texts.write_text('[["cat", "kitty"], ["dog"], ["bird"]]')
    dataset = CocoSet(annotations, pictures, texts=texts)
    assert dataset.texts == (("cat", "kitty"), ("dog",), ("bird",))
    assert dataset.truth(0)[1].tolist() == [0, 1]
    assert dataset.all_texts() == {"cat", "kitty", "dog", "bird"}


def test_objects365_names_are_split_and_its_patch_folders_found(tmp_path: Path) -> None:
    dataset = CocoSet(*write_objects365(tmp_path), format="objects365")
    assert dataset.texts == (("cat",), ("cabinet", "shelf"), ("cigar", "cigarette"))
    assert (dataset.picture(1) == draw(boxes_of(1))).all()


def test_lvis_pictures_are_found_by_their_url(tmp_path: Path) -> None:
    dataset = CocoSet(*write_lvis(tmp_path), format="lvis")
    assert dataset.coco["images"][1]["file_name"] == "val2017/1.png"
    assert (dataset.picture(1) == draw(boxes_of(1))).all()


def test_lvis_pictures_are_found_without_the_folder_of_their_split(tmp_path: Path) -> None:
    annotations, pictures = write_lvis(tmp_path)
    assert (CocoSet(annotations, pictures / "val2017", format="lvis").picture(2) == draw(boxes_of(2))).all()


def test_lvis_carries_frequencies_and_what_is_annotated_where(tmp_path: Path) -> None:
    coco = CocoSet(*write_lvis(tmp_path), format="lvis").coco
    assert [category["frequency"] for category in coco["categories"]] == ["r", "c", "f"]
    assert [(image["neg_category_ids"], image["not_exhaustive_category_ids"]) for image in coco["images"]] == [([30], [10])] * 3


def test_lvis_synonyms_are_written_out_and_shared_first_ones_told_apart(tmp_path: Path) -> None:
    dataset = CocoSet(*write_lvis(tmp_path), format="lvis")
    assert dataset.texts == (("bow", "bow weapon"), ("bow", "bow decorative ribbons"), ("aerosol can", "spray can"))
    assert dataset.names == ("bow/bow weapon", "bow/bow decorative ribbons", "aerosol can")


def test_chosen_classes_leave_lvis_lists_with_those_alone(tmp_path: Path) -> None:
    coco = CocoSet(*write_lvis(tmp_path), format="lvis", classes=["bow_(weapon)", "bow_(decorative_ribbons)"]).coco
    assert [image["neg_category_ids"] for image in coco["images"]] == [[]] * 3
    assert [image["not_exhaustive_category_ids"] for image in coco["images"]] == [[10]] * 3


def test_a_box_reaching_outside_is_clipped_for_training_and_kept_for_evaluation(tmp_path: Path) -> None:
    dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["annotations"][0].update(bbox=[-10, 20, 200, 30])))
    assert dataset.truth(0)[0][0].tolist() == [0, 20, WIDTH, 50]
    assert dataset.coco["annotations"][0]["bbox"] == [-10, 20, 200, 30]
    assert dataset.repaired == {"box reaching outside its picture": 1}


def test_a_box_that_leaves_no_pixel_inside_is_not_trained_on(tmp_path: Path) -> None:
    dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["annotations"][0].update(bbox=[WIDTH + 5, 0, 10, 10])))
    assert len(dataset.truth(0)[0]) == 1
    assert sum(dataset.skipped.values()) == 1


@pytest.mark.parametrize(
    ("spoilt", "kind"),
    [
        ({"bbox": [5, 5, 0, 20]}, "box without area"),
        ({"bbox": [5, 5, -3, 20]}, "box without area"),
        ({"bbox": [5, 5, 3]}, "annotation without a box of four finite numbers"),
        ({"bbox": [5, 5, 3, "4"]}, "annotation without a box of four finite numbers"),
        ({"bbox": [5, 5, 3, math.nan]}, "annotation without a box of four finite numbers"),
        ({"bbox": None}, "annotation without a box of four finite numbers"),
        ({"image_id": 999}, "annotation of a picture that is not listed"),
        ({"image_id": [100]}, "annotation of a picture that is not listed"),
        ({"category_id": 11}, "annotation of a category that is not listed"),
        ({"category_id": "10"}, "annotation of a category that is not listed"),
    ],
)
def test_an_unusable_annotation_is_left_out_named_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoilt: dict[str, Any], kind: str
) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["annotations"][0].update(spoilt)))
    assert dataset.skipped == {kind: 1}
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'annotations.json'}: {kind}: annotation 1 left out"]
    assert [annotation["id"] for annotation in dataset.coco["annotations"]] == list(range(2, 13))


def test_an_annotation_that_is_no_mapping_is_left_out(tmp_path: Path) -> None:
    dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["annotations"].append(7)))
    assert sum(dataset.skipped.values()) == 1
    assert len(dataset.coco["annotations"]) == 12


def test_repeated_and_missing_annotation_ids_are_numbered_anew(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][3]["id"] = 1
        del content["annotations"][5]["id"]

    dataset = CocoSet(*write_coco(tmp_path, change=change))
    assert [annotation["id"] for annotation in dataset.coco["annotations"]] == list(range(1, 13))
    assert sum(dataset.repaired.values()) == 2


def test_an_annotation_id_of_zero_is_numbered_anew(tmp_path: Path) -> None:
    dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["annotations"][0].update(id=0)))
    assert min(annotation["id"] for annotation in dataset.coco["annotations"]) == 1


@pytest.mark.parametrize(
    "spoilt",
    [{"width": 0}, {"height": None}, {"height": 2.5}, {"file_name": ""}, {"file_name": "../1.png"}, {"file_name": 5}, {"id": "100"}],
)
def test_an_unusable_picture_entry_is_left_out_and_counted(tmp_path: Path, spoilt: dict[str, Any]) -> None:
    dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["images"][0].update(spoilt)))
    assert len(dataset) == 5
    assert dataset.skipped["picture entry without id, file name, width or height"] == 1
    assert dataset.skipped["annotation of a picture that is not listed"] == 2


def test_a_picture_id_used_twice_keeps_the_first(tmp_path: Path) -> None:
    dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["images"][1].update(id=100)))
    assert [image["file_name"] for image in dataset.coco["images"]] == [f"{i}.png" for i in (0, 2, 3, 4, 5)]
    assert dataset.skipped["picture id used before"] == 1


def test_an_absolute_file_name_is_looked_for_in_the_folder_alone(tmp_path: Path) -> None:
    dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["images"][0].update(file_name="C:\\data\\0.png")))
    assert (dataset.picture(0) == draw(boxes_of(0))).all()


def test_many_faults_of_a_kind_are_counted_and_only_the_first_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["annotations"].extend([{}] * 500)))
    assert sum(dataset.skipped.values()) == 500
    assert len(caplog.records) < 30
    assert "500 in all" in caplog.text


def test_a_missing_and_a_broken_picture_are_errors_with_their_names(tmp_path: Path) -> None:
    annotations, pictures = write_coco(tmp_path)
    (pictures / "0.png").unlink()
    (pictures / "1.png").write_bytes(b"no picture")
    dataset = CocoSet(annotations, pictures)
    with pytest.raises(UserError, match=r"0\.png: the picture file is missing"):
        dataset.picture(0)
    with pytest.raises(UserError, match=r"1\.png"):
        dataset.picture(1)


@pytest.mark.parametrize("name", ["n" * 5_000, f"{'f' * 5_000}/none.png"])
def test_a_name_longer_than_the_system_takes_is_of_a_missing_picture(tmp_path: Path, name: str) -> None:
    dataset = CocoSet(*write_coco(tmp_path, 2, lambda content: content["images"][1].update(file_name=name)))
    with pytest.raises(UserError, match="the picture file is missing"):
        dataset.picture(1)


def test_a_picture_of_another_size_than_annotated_is_an_error(tmp_path: Path) -> None:
    annotations, pictures = write_coco(tmp_path)
    save(pictures / "2.png", np.zeros((HEIGHT, WIDTH + 1, 3), np.uint8))
    with pytest.raises(UserError, match=f"{WIDTH + 1} x {HEIGHT} px, annotated as {WIDTH} x {HEIGHT} px"):
        CocoSet(annotations, pictures).picture(2)


def test_pictures_under_32_px_are_not_trained_on(tmp_path: Path) -> None:
    dataset = CocoSet(*write_coco(tmp_path, change=lambda content: content["images"][2].update(height=31)))
    assert dataset.indices.tolist() == [0, 1, 3, 4, 5]
    assert len(dataset) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[]", "no mapping"),
        ('{"images": [], "annotations": []}', "no list 'categories'"),
        ('{"images": {}, "annotations": [], "categories": []}', "no list 'images'"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no category"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no usable picture"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "no id or no name"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "used twice"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}', "two categories named 'a'"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        CocoSet(path, tmp_path)
    assert str(path) in str(caught.value)


def test_a_set_without_a_usable_annotation_is_an_error(tmp_path: Path) -> None:
    annotations, pictures = write_coco(tmp_path, change=lambda content: content.update(annotations=[]))
    with pytest.raises(UserError, match="no usable annotation"):
        CocoSet(annotations, pictures)


def test_a_missing_annotation_file_and_a_missing_folder_are_errors(tmp_path: Path) -> None:
    annotations, pictures = write_coco(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        CocoSet(tmp_path / "none.json", pictures)
    with pytest.raises(UserError, match="is no folder"):
        CocoSet(annotations, tmp_path / "none")


def test_an_unknown_class_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no category 'horse'"):
        CocoSet(*write_coco(tmp_path), classes=["cat", "horse"])


@pytest.mark.parametrize(("content", "message"), [('[["a"]]', "texts for 1 classes"), ('{"a": 1}', "no list of lists"), ("[[]", "JSON")])
def test_class_texts_that_do_not_fit_are_an_error(tmp_path: Path, content: str, message: str) -> None:
    annotations, pictures = write_coco(tmp_path)
    texts = tmp_path / "texts.json"
    texts.write_text(content)
    with pytest.raises(UserError, match=message):
        CocoSet(annotations, pictures, texts=texts)
