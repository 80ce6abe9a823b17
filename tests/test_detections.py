"""From raw outputs to detections: against the published post-processing, and against slow literal versions."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_from_names import reference_inputs, weights_from_names

from crqat_fx.detections import Detections, Picked, Selection, decode_cells, nms, pick, postprocess, sigmoid
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import build, decode_boxes
from crqat_fx.pictures import Placement
from crqat_fx.torch_detector import pick_tensor

REFERENCE = Path(__file__).parent / "data" / "detections_v1_s.npz"


def unmoved(height: int, width: int) -> Placement:
    return Placement(height, width, 1.0, 1.0, 0, 0, (height, width))


def literal_iou(one: np.ndarray, other: np.ndarray) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    union = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - shared
    return shared / union if union else 0.0


def literal_nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou: float, limit: int) -> list[int]:
    boxes = boxes.astype(np.float64)
    kept: list[int] = []
    for index in sorted(range(len(scores)), key=lambda row: (-scores[row], row)):
        if all(labels[index] != labels[other] or literal_iou(boxes[index], boxes[other]) <= iou for other in kept):
            kept.append(index)
    return kept[:limit]


def candidates(seed: int, count: int, classes: int, levels: int, side: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes with whole-numbered corners, so that their overlaps are exact in any precision; few score levels make ties."""
    generator = np.random.default_rng(seed)
    corners = np.sort(generator.integers(0, side, (count, 2, 2)), axis=1)
    scores = generator.integers(0, levels, count).astype(np.float32) / levels
    return corners.reshape(count, 4).astype(np.float32), scores, generator.integers(0, classes, count)


# --- the whole, against the published one ---


def test_equals_the_published_post_processing_on_the_reference():
    reference = np.load(REFERENCE)
    setting = json.loads(str(reference["settings"]))
    model = build("s", 1).eval()
    model.load_state_dict(weights_from_names(model.state_dict()))
    images, text = reference_inputs(1, 320, 256, 7, seed=77)
    with torch.inference_mode():
        logits, bins, _regions = model(images, text)
    meta, test = setting["meta"], setting["test_cfg"]
    selection = Selection(test["score_thr"], test["nms"]["iou_threshold"], test["max_per_img"], test["nms_pre"])
    (height, width), (scale_x, scale_y), (top, _bottom, left, _right) = meta["ori_shape"], meta["scale_factor"], meta["pad_param"]
    placement = Placement(height, width, scale_x, scale_y, int(left), int(top), tuple(meta["batch_input_shape"]))
    distances = [level[0].numpy() for level in bins]
    for picked in (
        [pick(level[0].numpy(), selection.floor) for level in logits],
        [pick_tensor(level[0], selection.floor) for level in logits],
    ):
        found = postprocess(picked, distances, placement, selection)
        np.testing.assert_array_equal(found.labels, reference["labels"])
        np.testing.assert_allclose(found.scores, reference["scores"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.boxes, reference["boxes"], rtol=0, atol=1e-3)
        assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)


def random_outputs(seed: int, classes: int, canvas: tuple[int, int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    shapes = [(canvas[0] // stride, canvas[1] // stride) for stride in (8, 16, 32)]
    logits = [generator.normal(-1, 2, (classes, *shape)).astype(np.float32) for shape in shapes]
    return logits, [generator.normal(0, 2, (64, *shape)).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("conf", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("limit", [30_000, 150])
def test_equals_a_literal_post_processing(conf, limit):
    logits, bins = random_outputs(5, 4, (96, 64))
    placement = Placement(220, 130, 0.4, 0.42, 6, 1, (96, 64))
    rows = []
    for level, distances, stride in zip(logits, bins, (8, 16, 32), strict=True):
        for label, row, column in np.ndindex(level.shape):
            score = 1 / (1 + np.exp(-level[label, row, column].astype(np.float64)))
            sides = [
                sum(k * w for k, w in enumerate(np.exp(side.astype(np.float64)))) / np.exp(side.astype(np.float64)).sum()
                for side in distances[:, row, column].reshape(4, 16)
            ]
            x, y = column + 0.5, row + 0.5
            box = np.array([x - sides[0], y - sides[1], x + sides[2], y + sides[3]]) * stride
            rows.append((score, label, (box - [6, 1, 6, 1]) / [0.4, 0.42, 0.4, 0.42]))
    rows = sorted((row for row in rows if row[0] > conf), key=lambda row: -row[0])[:limit]
    boxes, scores, labels = np.array([row[2] for row in rows]), np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    kept = literal_nms(boxes, scores, labels, 0.5, 60)
    found = postprocess([pick(level, Selection(conf).floor) for level in logits], bins, placement, Selection(conf, 0.5, 60, limit))
    assert len(found) == len(kept) > 10
    np.testing.assert_array_equal(found.labels, labels[kept])
    np.testing.assert_allclose(found.scores, scores[kept], atol=1e-6)
    np.testing.assert_allclose(found.boxes, np.clip(boxes[kept], 0, [130, 220, 130, 220]), atol=1e-3)


def test_a_score_must_be_above_the_threshold_not_at_it():
    logits = np.zeros((1, 2, 2), np.float32)
    logits[0, 0, 1] = 1e-3
    bins = np.zeros((64, 2, 2), np.float32)
    found = postprocess([pick(logits, Selection(0.5).floor)], [bins], unmoved(16, 16), Selection(0.5))
    assert len(found) == 1
    assert found.scores[0] > 0.5
    assert not len(postprocess([pick(logits, Selection(1.0).floor)], [bins], unmoved(16, 16), Selection(1.0)))


def test_one_place_may_be_found_under_several_names():
    logits = np.array([1.0, 2.0, -9.0], np.float32).reshape(3, 1, 1)
    found = postprocess([pick(logits, Selection(0.5).floor)], [np.zeros((64, 1, 1), np.float32)], unmoved(8, 8), Selection(0.5))
    assert found.labels.tolist() == [1, 0]


def test_finds_nothing_where_nothing_passes():
    found = postprocess(
        [pick(np.full((3, 2, 2), -20, np.float32), Selection(0.5).floor)], [np.zeros((64, 2, 2))], unmoved(16, 16), Selection(0.5)
    )
    assert (found.boxes.shape, found.scores.shape, found.labels.shape) == ((0, 4), (0,), (0,))


def test_boxes_are_clipped_after_nms_not_before():
    """Two boxes that reach far beyond the picture, differently: clipped first, they would be the same."""
    selection = Selection(0.1, 0.7)
    bins = np.full((64, 1, 2), -30, np.float32)
    for cell, distances in enumerate([(15, 15, 0, 0), (2, 2, 0, 0)]):
        for side, distance in enumerate(distances):
            bins[16 * side + distance, 0, cell] = 30
    logits = np.array([2.0, 1.0], np.float32).reshape(1, 1, 2)
    found = postprocess([pick(logits, selection.floor)], [bins], Placement(4, 4, 1.0, 1.0, 0, 0, (8, 16)), selection)
    assert found.boxes.tolist() == [[0, 0, 4, 4], [0, 0, 4, 4]]


def test_scores_that_are_no_numbers_are_an_error_not_silence():
    logits = np.full((2, 2, 2), -20, np.float32)
    logits[1, 1, 0] = np.nan
    for picked in (pick(logits, Selection(0.5).floor), pick_tensor(torch.from_numpy(logits), Selection(0.5).floor)):
        with pytest.raises(UserError, match="scores are not numbers"):
            postprocess([picked], [np.zeros((64, 2, 2))], unmoved(16, 16), Selection(0.5))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_boxes_that_are_no_numbers_are_an_error(value):
    bins = np.zeros((64, 2, 2), np.float32)
    bins[5, 0, 1] = value
    with pytest.raises(UserError, match="boxes are not finite"):
        postprocess([pick(np.ones((1, 2, 2), np.float32), -1.0)], [bins], unmoved(16, 16), Selection(0.5))


def test_the_best_candidates_go_to_nms_and_the_earlier_among_equals():
    logits = np.array([[1, 3, 2, 2], [2, 0, 3, 2]], np.float32).reshape(2, 1, 4)
    bins = np.random.default_rng(0).normal(0, 1, (64, 1, 4)).astype(np.float32)
    bins[::16] += 6  # small boxes, so that clipping leaves them apart
    selection = Selection(0.1, 1.0, candidates=5)
    found = postprocess([pick(logits, selection.floor)], [bins], unmoved(8, 32), selection)
    # the 3s, then the 2s in the order of class and place; the fourth 2, class 1 in cell 3, falls away
    assert found.labels.tolist() == [0, 1, 0, 0, 1]
    assert found.scores.tolist() == pytest.approx([1 / (1 + np.exp(-value)) for value in (3.0, 3.0, 2.0, 2.0, 2.0)])
    np.testing.assert_array_equal(found.boxes, np.clip(decode_cells(bins, np.array([1, 2, 2, 3, 0]), 8), 0, [32, 8, 32, 8]))


# --- the parts ---


def test_decodes_cells_as_the_model_does():
    _, bins = random_outputs(3, 1, (96, 64))
    expected = decode_boxes([torch.from_numpy(level)[None] for level in bins])[0].numpy()
    decoded = [
        decode_cells(level, np.arange(level.shape[1] * level.shape[2]), stride) for level, stride in zip(bins, (8, 16, 32), strict=True)
    ]
    np.testing.assert_allclose(np.concatenate(decoded), expected, rtol=0, atol=1e-4)
    chosen = np.array([7, 0, 7])
    np.testing.assert_array_equal(decode_cells(bins[0], chosen, 8), decoded[0][chosen])


@given(st.integers(0, 2**32), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_picks_the_same_in_torch_and_in_numpy_and_misses_nothing(seed, conf):
    logits = np.random.default_rng(seed).normal(0, 6, (3, 4, 5)).astype(np.float32)
    floor = Selection(conf).floor
    picked, from_torch = pick(logits, floor), pick_tensor(torch.from_numpy(logits), floor)
    np.testing.assert_array_equal(picked.places, from_torch.places)
    np.testing.assert_array_equal(picked.logits, from_torch.logits)
    passing = np.flatnonzero(sigmoid(logits.reshape(-1)) > conf)
    assert set(passing) <= set(picked.places)
    np.testing.assert_array_equal(picked.logits, logits.reshape(-1)[picked.places])


def test_picking_among_many_names_copies_no_scores():
    logits = np.full((1203, 40, 40), -9, np.float32)
    logits[::100, 3, 3] = 2
    tracemalloc.start()
    picked = pick(logits, Selection(0.25).floor)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(picked.places) == 13
    assert peak < 0.3 * logits.nbytes  # one bool for each


def test_sigmoid_holds_at_both_ends():
    values = np.array([-1e4, -100, -5, 0, 5, 100, 1e4, np.inf, -np.inf], np.float32)
    with np.errstate(all="raise", under="ignore"):
        got = sigmoid(values)
    np.testing.assert_allclose(got, torch.from_numpy(values).sigmoid().numpy(), rtol=1e-5, atol=1e-37)
    assert got.dtype == np.float32


# --- NMS ---


@given(st.integers(0, 2**32), st.integers(0, 60), st.sampled_from([1, 2, 7, 1203]), st.sampled_from([1, 3, 1000]), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_nms_equals_a_literal_one(seed, count, classes, levels, limit):
    boxes, scores, labels = candidates(seed, count, classes, levels, side=12)
    for iou in (0.0, 1 / 3 + 1e-4, 0.7, 1.0):  # never an overlap that a rounding could decide, but 0 and 1
        assert nms(boxes, scores, labels, iou, limit).tolist() == literal_nms(boxes, scores, labels, iou, limit)


def test_nms_equals_a_literal_one_on_many_candidates():
    boxes, scores, labels = candidates(1, 1500, 3, 50)
    kept = nms(boxes, scores, labels, 0.5001, 1000)
    assert kept.tolist() == literal_nms(boxes, scores, labels, 0.5001, 1000)
    assert 50 < len(kept) < 1000


def test_nms_keeps_a_box_that_overlaps_by_just_the_threshold():
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 2]], np.float32)  # IoU .5 exactly
    scores, labels = np.array([0.9, 0.8], np.float32), np.zeros(2, np.int64)
    assert nms(boxes, scores, labels, 0.5, 10).tolist() == [0, 1]
    assert nms(boxes, scores, labels, 0.4999, 10).tolist() == [0]


def test_nms_never_lets_classes_meet():
    """The published trick, to shift classes apart by the largest coordinate, lets boxes that reach beyond the picture meet."""
    boxes = np.array([[0, 0, 99, 99], [-100, -100, -1, -1]], np.float32)
    assert nms(boxes, np.array([0.9, 0.8], np.float32), np.array([0, 1]), 0.7, 10).tolist() == [0, 1]


def test_nms_of_equal_boxes_keeps_the_first_of_each_class():
    labels = np.tile(np.arange(80), 25)
    boxes = np.tile(np.array([[10, 10, 50, 50]], np.float32), (len(labels), 1))
    kept = nms(boxes, np.full(len(labels), 0.5, np.float32), labels, 0.7, 300)
    assert kept.tolist() == list(range(80))


@pytest.mark.parametrize("limit", [1, 300, 1000])
@pytest.mark.parametrize("classes", [1, 80, 1203])
def test_nms_of_thirty_thousand_is_what_it_is_without_the_limit(classes, limit):
    boxes, scores, labels = candidates(2, 30_000, classes, 10_000, side=200)
    kept = nms(boxes, scores, labels, 0.7, limit)
    assert len(kept) == limit
    assert (np.diff(scores[kept]) <= 0).all()
    np.testing.assert_array_equal(kept, nms(boxes, scores, labels, 0.7, 1000)[:limit])


def test_nms_of_boxes_without_area_keeps_them():
    boxes = np.array([[5, 5, 5, 5]] * 3, np.float32)
    assert nms(boxes, np.ones(3, np.float32), np.zeros(3, np.int64), 0.7, 10).tolist() == [0, 1, 2]


def test_nms_of_nothing_is_nothing():
    assert nms(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), 0.7, 10).tolist() == []


# --- settings ---


@pytest.mark.parametrize("wrong", [{"conf": -0.1}, {"conf": 1.1}, {"conf": float("nan")}, {"iou": 2.0}, {"max": 0}, {"candidates": 0}])
def test_a_selection_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Selection(**wrong)


def test_detections_know_their_number():
    assert len(Detections(np.zeros((3, 4), np.float32), np.zeros(3, np.float32), np.zeros(3, np.int64))) == 3
    assert len(Picked(np.zeros(2, np.float32), np.zeros(2, np.int64)).places) == 2
