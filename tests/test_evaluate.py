"""Evaluation: the counts against another library and against the definition spelled out, and what joins a detector with a data set."""

import contextlib
import importlib
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from listed_set import ListedSet
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.detections import Detections
from crqat_fx.errors import UserError
from crqat_fx.evaluate import EvaluateSettings, Scores, category_slots, evaluate, score
from crqat_fx.models.yolo_world import build
from crqat_fx.torch_detector import TorchDetector

MODULE = importlib.import_module("crqat_fx.evaluate")  # the package exports a function of this name
IOUS = np.linspace(0.5, 0.95, 10)
AREAS = {"ap": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}


def found(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    """Detections from rows of x1, y1, x2, y2, score, label."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64))


def coco_set(pictures: int, names: list[str], objects: list[tuple[int, int, tuple[float, float, float, float]]]) -> dict[str, Any]:
    """COCO's terms from objects of (picture, category, xywh), both counted from 0; ids are not their indices."""
    return {
        "images": [{"id": 10 + index, "file_name": f"{index}.png", "width": 400, "height": 400} for index in range(pictures)],
        "categories": [{"id": 100 + index, "name": name} for index, name in enumerate(names)],
        "annotations": [
            {"id": index, "image_id": 10 + picture, "category_id": 100 + category, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
            for index, (picture, category, box) in enumerate(objects)
        ],
    }


def random_set(
    seed: int, pictures: int = 30, classes: int = 6, per_picture: int = 60
) -> tuple[dict[str, Any], list[Detections], list[str]]:
    """Objects of all sizes, and detections that lie near one, named rightly or not, with scores that are often equal."""
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for picture in range(pictures):
        count = int(rng.integers(0, 7))
        sides = np.exp(rng.uniform(np.log(8), np.log(200), (count, 2)))
        corners = rng.uniform(0, 200, (count, 2))
        labels = rng.integers(0, classes - 1, count)  # the last class has no object
        objects += [
            (picture, int(label), (*corner.tolist(), *side.tolist())) for label, corner, side in zip(labels, corners, sides, strict=True)
        ]
        near = rng.integers(0, max(count, 1), per_picture)
        boxes = rng.uniform(0, 200, (per_picture, 4)) if not count else np.concatenate([corners, sides], 1)[near]
        boxes = boxes * rng.uniform(0.85, 1.15, boxes.shape)
        boxes[:, 2:] += boxes[:, :2]
        right = rng.random(per_picture) < 0.5
        guessed = np.where(right & bool(count), labels[near] if count else 0, rng.integers(0, classes, per_picture))
        scores = rng.integers(1, 100, per_picture) / 100
        order = np.argsort(-scores, kind="stable")
        detections.append(Detections(boxes[order].astype(np.float32), scores[order].astype(np.float32), guessed[order].astype(np.int64)))
    names = [f"thing {index}" for index in range(classes)]
    return coco_set(pictures, names, objects), detections, names


# --- COCO ---


@pytest.mark.parametrize(("seed", "per_picture"), [(0, 60), (1, 700)], ids=["few", "more-than-100-a-class"])
def test_coco_ap_equals_pycocotools_on_the_same_detections(seed, per_picture):
    coco, detections, names = random_set(seed, per_picture=per_picture)
    for annotation in coco["annotations"][::7]:
        annotation["iscrowd"] = 1
    for annotation in coco["annotations"][::5]:
        annotation["area"] *= 0.4  # that of a mask
    result = score(detections, names, coco)

    truth = COCO()
    rows = [
        {"image_id": image["id"], "category_id": 100 + int(label), "bbox": [*box[:2], *(box[2:] - box[:2])], "score": float(value)}
        for image, of_picture in zip(coco["images"], detections, strict=True)
        for box, value, label in zip(of_picture.boxes.astype(np.float64), of_picture.scores, of_picture.labels, strict=True)
    ]
    truth.dataset = {**coco, "annotations": [{**annotation, "id": annotation["id"] + 1} for annotation in coco["annotations"]], "info": {}}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        peer = COCOeval(truth, truth.loadRes(rows), "bbox")
        peer.evaluate()
        peer.accumulate()
        peer.summarize()
    ours = result.scores
    assert [ours.ap, ours.ap50, ours.ap75, ours.small, ours.medium, ours.large, ours.ar] == pytest.approx(
        [100 * peer.stats[index] for index in (0, 1, 2, 3, 4, 5, 8)], rel=1e-9
    )
    for index, of_class in enumerate(result.classes):
        precision = peer.eval["precision"][:, :, index, 0, 2]
        theirs = None if (precision == -1).all() else 100 * precision.mean()
        assert of_class.scores.ap == (None if theirs is None else pytest.approx(theirs, rel=1e-9))
    assert result.classes[-1].scores.ap is None
    assert 5 < result.scores.ap < 95


def test_scoring_prints_nothing(capfd):
    coco, detections, names = random_set(2, pictures=5)
    score(detections, names, coco)
    assert capfd.readouterr() == ("", "")


def test_finding_every_object_exactly_is_100_percent_and_finding_none_is_0():
    coco = coco_set(2, ["cat", "dog"], [(0, 0, (10, 10, 20, 20)), (1, 1, (30, 30, 100, 100)), (1, 0, (0, 0, 50, 50))])
    right = [found((10, 10, 30, 30, 0.9, 0)), found((30, 30, 130, 130, 0.8, 1), (0, 0, 50, 50, 0.7, 0))]
    result = score(right, ["cat", "dog"], coco)
    assert result.scores == Scores(*[pytest.approx(100)] * 7)
    assert (result.pictures, result.objects, result.detections) == (2, 3, 3)
    assert score([found(), found()], ["cat", "dog"], coco).scores == Scores(*[0.0] * 7)


def test_classes_are_averaged_by_frequency_and_by_split():
    coco = coco_set(1, ["a", "b", "c", "d"], [(0, index, (100 * index, 0, 50, 50)) for index in range(4)])
    for category, frequency, split in zip(coco["categories"], "rfff", ("base", "base", "novel", "novel"), strict=True):
        category |= {"frequency": frequency, "split": split}
    boxes = [(100.0 * index, 0.0, 100.0 * index + 50, 50.0, 0.9, index) for index in (0, 1, 2)]
    result = score([found(*boxes)], ["a", "b", "c", "d"], coco)
    assert {group: scores.ap for group, scores in result.frequency.items()} == {"r": pytest.approx(100), "f": pytest.approx(200 / 3)}
    assert list(result.frequency) == ["r", "f"]
    assert {group: scores.ap for group, scores in result.split.items()} == {"base": pytest.approx(100), "novel": pytest.approx(50)}
    assert [(of_class.name, of_class.objects, of_class.detections) for of_class in result.classes] == [
        ("a", 1, 1),
        ("b", 1, 1),
        ("c", 1, 1),
        ("d", 1, 0),
    ]


def test_the_result_is_plain_json():
    coco, detections, names = random_set(3, pictures=4)
    result = score(detections, names, coco)
    read = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert read["scores"]["ap"] == result.scores.ap
    assert read["classes"][0]["name"] == "thing 0"
    assert read["classes"][-1]["scores"]["ap"] is None
    assert read["frequency"] == read["split"] == {}


def test_the_annotations_are_left_as_they_were():
    coco, detections, names = random_set(4, pictures=4)
    before = json.dumps(coco)
    score(detections, names, coco)
    assert json.dumps(coco) == before


def test_an_empty_truth_is_an_error():
    with pytest.raises(UserError, match="no annotated object"):
        score([found((0, 0, 9, 9, 0.5, 0))], ["cat"], coco_set(1, ["cat"], []))


# --- LVIS ---


def federated(coco: dict[str, Any], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ids = [category["id"] for category in coco["categories"]]
    for category, frequency in zip(coco["categories"], "rcfrcf", strict=True):
        category["frequency"] = frequency
    for image in coco["images"]:
        present = {annotation["category_id"] for annotation in coco["annotations"] if annotation["image_id"] == image["id"]}
        image["neg_category_ids"] = [identity for identity in ids if identity not in present and rng.random() < 0.4]
        image["not_exhaustive_category_ids"] = [identity for identity in present if rng.random() < 0.3]
    return coco


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Of two xywh boxes."""
    sides = np.minimum(first[:2] + first[2:], second[:2] + second[2:]) - np.maximum(first[:2], second[:2])
    shared = float(np.maximum(sides, 0).prod())
    return shared / float(first[2:].prod() + second[2:].prod() - shared)


def fixed_ap_by_definition(coco: dict[str, Any], detections: list[Detections], limit: int, low: float, high: float) -> dict[int, float]:
    """Fixed AP of each category id, one detection at a time; without a category that has nothing to find."""
    result = {}
    for label, category in enumerate(coco["categories"]):
        rows = []
        for image, of_picture in zip(coco["images"], detections, strict=True):
            for box, value, guess in zip(of_picture.boxes.astype(np.float64), of_picture.scores, of_picture.labels, strict=True):
                if guess == label:
                    rows.append((float(value), image, np.array([*box[:2], *(box[2:] - box[:2])])))
        rows = sorted(rows, key=lambda row: -row[0])[:limit]
        objects = [a for a in coco["annotations"] if a["category_id"] == category["id"]]
        wanted = {a["id"] for a in objects if low <= a["area"] <= high}
        if not wanted:
            continue
        precisions = []
        for threshold in IOUS:
            taken: set[int] = set()
            hits = []
            for _, image, box in rows:
                here = [a for a in objects if a["image_id"] == image["id"]]
                if not here and category["id"] not in image["neg_category_ids"]:
                    continue
                free = [(iou(box, np.array(a["bbox"])), a["id"]) for a in here if a["id"] not in taken]
                fitting = [(overlap, identity) for overlap, identity in free if overlap >= threshold]
                best = max([pair for pair in fitting if pair[1] in wanted] or fitting, default=None)
                if best is not None:
                    taken.add(best[1])
                    if best[1] in wanted:
                        hits.append(True)
                elif low <= box[2] * box[3] <= high and category["id"] not in image["not_exhaustive_category_ids"]:
                    hits.append(False)
            right = np.cumsum(hits) if hits else np.zeros(0)
            recall = right / len(wanted)
            precision = right / np.arange(1, len(hits) + 1)
            precisions += [max(precision[recall >= level], default=0.0) for level in np.linspace(0, 1, 101)]
        result[category["id"]] = 100 * float(np.mean(precisions))
    return result


@pytest.mark.parametrize("seed", range(4))
def test_lvis_fixed_ap_equals_its_definition_spelled_out(seed, monkeypatch):
    monkeypatch.setattr(MODULE, "FIXED_PER_CLASS", 110)
    coco, detections, names = random_set(seed + 10, pictures=14)
    federated(coco, seed)
    result = score(detections, names, coco, "lvis-fixed")
    for area, (low, high) in AREAS.items():
        expected = fixed_ap_by_definition(coco, detections, 110, low, high)
        assert getattr(result.scores, area) == pytest.approx(np.mean(list(expected.values())), abs=1e-9)
    everything = fixed_ap_by_definition(coco, detections, 110, 0, 1e10)
    unlimited = fixed_ap_by_definition(coco, detections, 10_000, 0, 1e10)
    assert everything != unlimited  # the limit bites
    for category, of_class in zip(coco["categories"], result.classes, strict=True):
        assert of_class.scores.ap == (pytest.approx(everything[category["id"]], abs=1e-9) if category["id"] in everything else None)
    for group, scores in result.frequency.items():
        members = [everything[c["id"]] for c in coco["categories"] if c["frequency"] == group and c["id"] in everything]
        assert scores.ap == pytest.approx(np.mean(members), abs=1e-9)
    assert list(result.frequency) == ["r", "c", "f"]


@pytest.mark.parametrize(
    ("negative", "not_exhaustive", "ap"),
    [([], [], 100), ([100], [], 50), ([], [100], 100)],
    ids=["nobody-looked", "verified-absent", "not-exhaustive-elsewhere"],
)
def test_a_wrong_detection_counts_only_where_annotators_looked_for_its_class(negative, not_exhaustive, ap):
    coco = coco_set(2, ["cat"], [(0, 0, (10, 10, 50, 50))])
    coco["images"][0] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    coco["images"][1] |= {"neg_category_ids": negative, "not_exhaustive_category_ids": not_exhaustive}
    detections = [found((10, 10, 60, 60, 0.5, 0)), found((200, 200, 250, 250, 0.9, 0))]
    assert score(detections, ["cat"], coco, "lvis-fixed").scores.ap == pytest.approx(ap)


@pytest.mark.parametrize(("not_exhaustive", "ap"), [([], 50), ([100], 100)])
def test_an_unmatched_detection_is_no_fault_where_its_class_is_not_annotated_exhaustively(not_exhaustive, ap):
    coco = coco_set(1, ["cat"], [(0, 0, (10, 10, 50, 50))])
    coco["images"][0] |= {"neg_category_ids": [], "not_exhaustive_category_ids": not_exhaustive}
    detections = [found((10, 10, 60, 60, 0.5, 0), (200, 200, 250, 250, 0.9, 0))]
    assert score(detections, ["cat"], coco, "lvis-fixed").scores.ap == pytest.approx(ap)


def test_fixed_ap_caps_a_class_over_the_set_before_it_asks_who_looked_for_it(monkeypatch):
    coco = coco_set(2, ["cat"], [(0, 0, (10, 10, 50, 50))])
    for image in coco["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    unjudged = [(200.0, 200.0, 250.0, 250.0, 0.9 - index / 100, 0) for index in range(3)]
    detections = [found((10, 10, 60, 60, 0.5, 0)), found(*unjudged)]
    monkeypatch.setattr(MODULE, "FIXED_PER_CLASS", 4)
    assert score(detections, ["cat"], coco, "lvis-fixed").scores.ap == pytest.approx(100)
    monkeypatch.setattr(MODULE, "FIXED_PER_CLASS", 3)
    assert score(detections, ["cat"], coco, "lvis-fixed").scores.ap == 0


def test_fixed_ap_has_no_cap_a_picture_and_coco_has_one():
    coco = coco_set(1, ["cat"], [(0, 0, (10, 10, 50, 50))])
    coco["images"][0] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    wrong = [(200.0, 200.0, 250.0, 250.0, 0.9, 0)] * 124
    detections = [found(*wrong, (10, 10, 60, 60, 0.5, 0))]
    assert score(detections, ["cat"], coco).scores.ap == 0
    assert score(detections, ["cat"], coco, "lvis-fixed").scores.ap == pytest.approx(100 / 125)


def test_lvis_fixed_refuses_a_set_that_does_not_say_what_was_looked_for():
    coco = coco_set(1, ["cat"], [(0, 0, (10, 10, 50, 50))])
    with pytest.raises(UserError, match="neg_category_ids"):
        score([found()], ["cat"], coco, "lvis-fixed")


# --- joining names ---


def test_names_in_another_order_and_names_that_are_no_category_change_nothing():
    coco, detections, names = random_set(5)
    shuffled = ["unicorn", *reversed(names), "griffin"]
    slots = np.array([shuffled.index(name) for name in names])
    renamed = []
    for of_picture in detections:
        extra = Detections(of_picture.boxes[:3], of_picture.scores[:3], np.array([0, 7, 7]))
        parts = zip(*((part.boxes, part.scores, part.labels) for part in (extra, relabelled(of_picture, slots))), strict=True)
        renamed.append(Detections(*(np.concatenate(part) for part in parts)))
    assert score(renamed, shuffled, coco) == score(detections, names, coco)


def relabelled(detections: Detections, slots: np.ndarray) -> Detections:
    return Detections(detections.boxes, detections.scores, slots[detections.labels])


def test_a_category_without_its_name_in_the_vocabulary_is_an_error_that_names_it():
    coco = coco_set(1, ["cat", "dog", "eel"], [(0, 0, (10, 10, 50, 50))])
    with pytest.raises(UserError, match=r"lacks 2 of the data set's 3 categories: dog, eel;"):
        score([found()], ["cat", "fox"], coco)


def test_categories_of_one_name_share_its_detections():
    coco = coco_set(1, ["bow", "bow"], [(0, 0, (10, 10, 50, 50)), (0, 1, (200, 200, 50, 50))])
    assert category_slots(["cat", "bow"], coco).tolist() == [1, 1]
    shared = score([found((10, 10, 60, 60, 0.9, 1), (200, 200, 250, 250, 0.8, 1))], ["cat", "bow"], coco)
    assert [of_class.detections for of_class in shared.classes] == [2, 2]
    assert [of_class.scores.ap for of_class in shared.classes] == [pytest.approx(100), pytest.approx(50)]


# --- settings ---


def test_the_metric_decides_how_many_detections_a_picture_keeps_unless_told():
    kept = [
        EvaluateSettings(metric=metric, max=most).detecting.selection.max
        for metric, most in (("coco", None), ("lvis-fixed", None), ("lvis-fixed", 7))
    ]
    assert kept == [300, 1000, 7]


def test_the_defaults_are_the_published_ones():
    assert MODULE.FIXED_PER_CLASS == 10_000
    assert dict(MODULE.KEPT) == {"coco": 300, "lvis-fixed": 1000}
    settings = EvaluateSettings()
    assert (settings.metric, settings.size, settings.conf, settings.iou) == ("coco", 640, 0.001, 0.7)
    assert (settings.detecting.selection.max, settings.compared) == (300, 512)


@pytest.mark.parametrize("wrong", [{"conf": 2.0}, {"size": 100}, {"compared": 1}, {"max": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        EvaluateSettings(**wrong)


# --- looking at the pictures ---


class Replay:
    """Finds on a picture what its first pixel says, out of what it was given."""

    def __init__(self, names: tuple[str, ...], detections: list[Detections]) -> None:
        self.names = names
        self._detections = detections

    def detect(self, pictures: list[np.ndarray]) -> list[Detections]:
        assert pictures  # asked about something
        return [self._detections[int(picture[0, 0, 0])] for picture in pictures]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_picture_that_cannot_be_read_is_left_out_and_named_with_its_objects(batch_size, caplog):
    coco = coco_set(4, ["cat"], [(index, 0, (10.0 * index, 10, 50, 50)) for index in range(4)])
    pictures = tuple(None if index in (0, 2) else np.full((8, 8, 3), index, np.uint8) for index in range(4))
    detector = Replay(("cat",), [found((10 * index, 10, 10 * index + 50, 60, 0.9, 0)) for index in range(4)])
    steps = []
    result = evaluate(detector, ListedSet(coco, pictures), batch_size=batch_size, progress=lambda *step: steps.append(step))
    assert result.skipped == ("0.png", "2.png")
    assert (result.pictures, result.objects, result.detections) == (2, 2, 2)
    assert result.scores.ap == pytest.approx(100)
    assert "2.png: is no picture" in caplog.text
    assert steps[-2:] == [(4, 4, "pictures"), (1, 1, "classes")]


def test_a_vocabulary_that_does_not_fit_is_refused_before_any_picture_is_looked_at():
    coco = coco_set(1, ["cat"], [(0, 0, (10, 10, 50, 50))])
    with pytest.raises(UserError, match="lacks 1"):
        evaluate(Replay(("dog",), []), ListedSet(coco, (None,)))


def test_evaluates_a_model_on_the_drawn_task_whatever_the_batch():
    task = ShapesTask(size=64)
    shapes = ShapesSet(task, "val", 6)
    torch.manual_seed(0)
    model = build("pico", 2)
    with torch.no_grad():
        for contrast in model.bbox_head.head_module.cls_contrasts:
            contrast.bias.fill_(-2.0)
    detector = TorchDetector(model, task.vocabulary, size=64)
    result = evaluate(detector, shapes, batch_size=4)
    one_by_one = [detector.detect([shapes.picture(index)])[0] for index in range(len(shapes))]
    assert result.scores.ap == pytest.approx(score(one_by_one, task.names, shapes.coco).scores.ap, abs=1e-3)
    assert (result.pictures, result.detections) == (6, 6 * 300)
    assert list(result.split) == ["base", "novel"]
