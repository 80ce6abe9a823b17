"""Drawn detections: inside the picture, told apart, readable, and in letters that OpenCV has."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crqat_fx.detections import Detections
from crqat_fx.draw import ascii_name, colour_of, draw, enlarged, place_labels, text_colour

NAMES = ("person", "striped red star", "café", "a man in a very long coat walking a small dog past the harbour at night")


def detections(*boxes: tuple[float, float, float, float], labels: list[int] | None = None) -> Detections:
    scores = np.linspace(0.9, 0.1, len(boxes)).astype(np.float32)
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), scores, np.array(labels or [0] * len(boxes), np.int64))


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == np.array(colour)).all(axis=2)


def test_draws_a_box_of_the_class_colour_and_leaves_the_picture_given_alone():
    picture = np.full((400, 600, 3), 90, np.uint8)
    drawn = draw(picture, detections((200, 150, 400, 300), labels=[1]), NAMES)
    assert (picture == 90).all()
    assert drawn.shape == picture.shape
    marked = has_colour(drawn, colour_of(1))
    assert marked[150, 200:400].all()
    assert marked[300, 200:400].all()
    assert marked[150:300, 200].all()
    assert marked[150:300, 400].all()
    assert (drawn[160:290, 210:390] == 90).all()
    label = place_labels(detections((200, 150, 400, 300), labels=[1]), NAMES, 400, 600)[0]
    within = drawn[label.top : label.top + label.height, label.left : label.left + label.width]
    assert label.text == "striped red star 0.90"
    assert label.top + label.height <= 150
    assert has_colour(within, colour_of(1)).mean() > 0.5
    assert text_colour(colour_of(1)) == (0, 0, 0)
    assert (within.max(axis=2) < 90).sum() > 50


def test_draws_nothing_where_nothing_is_found():
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    np.testing.assert_array_equal(draw(picture, detections(), NAMES), picture)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (12, 9)])
def test_draws_on_pictures_of_any_shape(shape):
    height, width = shape
    drawn = draw(np.zeros((*shape, 3), np.uint8), detections((0, 0, width, height), (0, 0, 1, 1), labels=[3, 1]), NAMES)
    assert drawn.shape == (*shape, 3)
    assert drawn.any()


def test_lines_and_letters_grow_with_the_picture():
    heights, thickness = [], []
    for side in (400, 4000):
        found = detections((side * 0.3, side * 0.3, side * 0.7, side * 0.7))
        heights.append(place_labels(found, NAMES, side, side)[0].height)
        column = has_colour(draw(np.zeros((side, side, 3), np.uint8), found, NAMES), colour_of(0))[side // 2 :, side // 2]
        thickness.append(int(column.sum()))
    assert heights[1] > 5 * heights[0]
    assert thickness[1] > 5 * thickness[0]


@given(st.integers(0, 2**32), st.sampled_from([(300, 400), (160, 160), (2000, 300), (120, 900)]))
@settings(max_examples=40, deadline=None)
def test_every_label_lies_whole_within_the_picture_and_ends_in_its_score(seed, shape):
    height, width = shape
    generator = np.random.default_rng(seed)
    corners = np.sort(generator.uniform(-20, 1.1, (12, 2, 2)) % 1, axis=1).reshape(12, 4) * [width, height, width, height]
    found = detections(*corners.tolist(), labels=generator.integers(0, len(NAMES), 12).tolist())
    for label, score in zip(place_labels(found, NAMES, height, width), found.scores, strict=True):
        assert label.left >= 0
        assert label.top >= 0
        assert label.left + label.width <= width
        assert label.top + label.height <= height
        assert label.text.endswith(f" {score:.2f}")


def test_a_label_goes_into_its_box_where_there_is_no_room_above_and_stays_in_at_the_right():
    label = place_labels(detections((390, 0, 400, 200)), NAMES, 300, 400)[0]
    assert label.top == 0
    assert label.left + label.width == 400


def test_labels_avoid_each_other_and_the_best_chooses_first():
    found = detections((50, 100, 200, 200), (52, 101, 201, 203), (54, 99, 202, 204))
    labels = place_labels(found, NAMES, 400, 400)
    assert labels[0] == place_labels(detections((50, 100, 200, 200)), NAMES, 400, 400)[0]
    assert not any(one.meets(other) for one in labels for other in labels if one is not other)


def test_the_best_label_is_drawn_on_top():
    box = (0, 0, 30, 11)  # of a picture so low that labels cannot avoid each other
    picture = np.zeros((14, 200, 3), np.uint8)
    alone = draw(picture, detections(box, labels=[0]), NAMES)
    both = draw(picture, detections(box, box, labels=[0, 1]), NAMES)
    label = place_labels(detections(box), NAMES, 14, 200)[0]
    area = np.s_[label.top : label.top + label.height, label.left : label.left + label.width]
    np.testing.assert_array_equal(both[area], alone[area])


def test_a_long_name_is_shortened_and_its_score_stays():
    label = place_labels(detections((10, 50, 60, 90), labels=[3]), NAMES, 300, 400)[0]
    assert label.text.startswith("a man in a")
    assert label.text.endswith(".. 0.90")
    assert label.width <= 400 / 2 + 20


def test_the_first_classes_are_told_apart_and_colours_are_stable():
    lab = cv2.cvtColor(np.array([[colour_of(label) for label in range(20)]], np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1e3 * np.eye(20)
    assert distance.min() > 12  # CIE76: far above the 2.3 that an eye just notices
    assert [colour_of(label) for label in (0, 1, 79)] == [colour_of(label) for label in (0, 1, 79)]
    assert len({colour_of(label) for label in range(1203)}) > 600


def test_text_stands_out_from_every_background():
    def luminance(colour: tuple[int, int, int]) -> float:
        parts = [value / 255 / 12.92 if value / 255 <= 0.04045 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for label in range(0, 1203, 7):
        low, high = sorted((luminance(colour_of(label)), luminance(text_colour(colour_of(label)))))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG AA


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("traffic light", "traffic light"),
        ("café crème", "cafe creme"),
        ("Ærøskøbing \u2013 \u201cStraße\u201d", 'AEroskobing - "Strasse"'),
        ("猫", "\\u732b"),
        ("кот", "\\u043a\\u043e\\u0442"),
        ("fire 🔥", "fire \\U0001f525"),
        ("ﬁre", "fire"),
    ],
)
def test_names_are_drawn_in_ascii(name, drawn):
    assert ascii_name(name) == drawn
    assert ascii_name(name).isascii()


@pytest.mark.parametrize(("shape", "times"), [((160, 160), 4), ((100, 213), 3), ((300, 320), 2), ((321, 8), 1), ((640, 640), 1)])
def test_small_pictures_are_enlarged_with_their_boxes(shape, times):
    picture = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    found = Detections(np.array([[1, 2, 5, 7]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64))
    larger, moved = enlarged(picture, found)
    assert larger.shape == (shape[0] * times, shape[1] * times, 3)
    assert moved.boxes.tolist() == [[1 * times, 2 * times, 5 * times, 7 * times]]
    assert moved.scores is found.scores
