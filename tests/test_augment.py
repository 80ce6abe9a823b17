"""Augmentation: wherever a rectangle's pixels go, its box goes too."""

from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest

from crqat_fx.data.augment import Augmentation, Boxed, augmented, flipped, jitter_hsv, letterboxed, mosaic

SIZE = 160
GREY = 60
COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [250, 0, 250], [0, 250, 250], [250, 250, 250], [0, 0, 0]])
SHAPES = ((120, 160), (160, 90), (300, 200), (64, 64))  # height, width; wider, taller, larger and smaller than the result
SEEN = Augmentation(size=SIZE, area=4.0, visible=0.0)  # a box for whatever is seen
STILL = Augmentation(size=SIZE, scale=0.0, translate=0.0)


def pictures() -> list[Boxed]:
    """Four pictures, each with two rectangles in colours of their own; the labels are the colours."""
    rng = np.random.default_rng(5)
    made = []
    for number, (height, width) in enumerate(SHAPES):
        image = np.full((height, width, 3), GREY, np.uint8)
        boxes = []
        for half, colour in enumerate((2 * number, 2 * number + 1)):
            left, right = sorted(int(x) for x in half * width // 2 + rng.choice(np.arange(2, width // 2 - 2, 12), 2, replace=False))
            top, bottom = sorted(int(y) for y in rng.choice(np.arange(2, height - 2, 14), 2, replace=False))
            image[top:bottom, left:right] = COLOURS[colour]
            boxes.append((left, top, right, bottom))
        made.append(Boxed(image, np.array(boxes, np.float32), np.array([2 * number, 2 * number + 1])))
    return made


def nearest_colours(image: np.ndarray) -> np.ndarray:
    """Each pixel's nearest colour, grey being none: the edge of a blend of two is where each has half."""
    palette = np.concatenate([COLOURS, [[GREY] * 3, [114] * 3]]).astype(np.float32)
    return np.square(image[:, :, None] - palette).sum(3).argmin(2)


def assert_boxes_match_pixels(result: Boxed) -> None:
    colours = nearest_colours(result.image)
    for box, label in zip(result.boxes, result.labels, strict=True):
        rows, columns = np.nonzero(colours == label)
        assert len(rows), f"nothing of colour {label} where {box} says"
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(seen - box).max() <= 1, (box, seen)
    for label in set(range(len(COLOURS))) - set(result.labels.tolist()):
        rows, columns = np.nonzero(colours == label)
        # What has no box is out of sight, or too thin a strip of it is left.
        assert not len(rows) or min(np.ptp(rows), np.ptp(columns)) + 1 <= SEEN.side + 1


def test_the_defaults_are_the_published_ones():
    published = {"scale": 0.5, "translate": 0.1, "flip": 0.5, "hue": 0.015, "saturation": 0.7, "value": 0.4, "side": 2, "area": 32}
    assert asdict(Augmentation()) == {"size": 640, "visible": 0.1, "aspect": 100} | published


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("scale", [0.5, 0.9])
def test_boxes_stay_on_their_pixels_in_a_mosaic(seed: int, scale: float) -> None:
    result = mosaic(pictures(), replace(SEEN, scale=scale), np.random.default_rng(seed))
    assert result.image.shape == (SIZE, SIZE, 3)
    assert_boxes_match_pixels(result)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_stay_on_their_pixels_in_a_letterbox(seed: int) -> None:
    settings = Augmentation(size=SIZE)
    for picture in pictures():
        result = letterboxed(picture, settings, np.random.default_rng(seed))
        for box, label in zip(result.boxes, result.labels, strict=True):
            rows, columns = np.nonzero(nearest_colours(result.image) == label)
            assert np.abs([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] - box).max() <= 1.5  # its sides are truncated


@pytest.mark.parametrize("seed", range(4))
def test_boxes_stay_on_their_pixels_when_flipped(seed: int) -> None:
    picture = mosaic(pictures(), SEEN, np.random.default_rng(seed))
    result = flipped(picture)
    assert_boxes_match_pixels(result)
    assert (result.image == picture.image[:, ::-1]).all()


def test_most_rectangles_are_seen_over_some_mosaics() -> None:
    kept = [len(mosaic(pictures(), Augmentation(size=SIZE), np.random.default_rng(seed)).boxes) for seed in range(12)]
    assert np.mean(kept) > 3


def test_a_still_letterbox_changes_no_pixel_of_a_picture_that_fits() -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    picture = Boxed(image, np.array([[3, 5, 80, 90]], np.float32), np.array([0]))
    result = letterboxed(picture, STILL, np.random.default_rng(0))
    assert (result.image == image).all()
    assert result.boxes.tolist() == picture.boxes.tolist()


def test_a_mosaic_is_what_a_canvas_pasted_and_warped_once_gives() -> None:
    """Pictures that need no resizing, pasted at whole pixels on a canvas as wide as two, then cut: pixel for pixel."""
    rng = np.random.default_rng(3)
    made = [
        Boxed(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64)) for _ in range(4)
    ]

    class WholePixels:
        """Draws the centre (100, 130), the scale 1 and the translation to the middle."""

        def uniform(self, low: float, high: float, count: int | None = None) -> float | np.ndarray:
            if count is None:
                return 1.0
            return np.array([100, 130]) / SIZE if (low, high) == (0.5, 1.5) else np.array([0.5, 0.5])

    canvas = np.full((2 * SIZE, 2 * SIZE, 3), 114, np.uint8)
    canvas[:130, :100] = made[0].image[SIZE - 130 :, SIZE - 100 :]
    canvas[:130, 100 : 100 + SIZE] = made[1].image[SIZE - 130 :]
    canvas[130 : 130 + SIZE, :100] = made[2].image[:, SIZE - 100 :]
    canvas[130 : 130 + SIZE, 100 : 100 + SIZE] = made[3].image
    half = SIZE // 2
    result = mosaic(made, STILL, WholePixels())  # type: ignore[arg-type]
    assert (result.image == canvas[half : half + SIZE, half : half + SIZE]).all()


@pytest.mark.parametrize("upright", [False, True])
def test_a_picture_longer_than_opencv_warps_is_placed_as_any_other(upright: bool) -> None:
    image = np.full((200, 33_000, 3), GREY, np.uint8)
    image[20:180, 8_000:20_000] = COLOURS[0]
    box = (8_000, 20, 20_000, 180)
    if upright:
        image, box = image.transpose(1, 0, 2), (20, 8_000, 180, 20_000)
    long = Boxed(image, np.array([box], np.float32), np.array([0]))
    ground = Boxed(np.full((64, 64, 3), GREY, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    settings = replace(SEEN, size=1280)
    met = 0
    for seed in range(6):
        result = mosaic([long, ground, ground, ground], settings, np.random.default_rng(seed))
        assert_boxes_match_pixels(result)
        met += len(result.boxes)
    assert met >= 3


def test_what_no_picture_covers_is_grey_114() -> None:
    result = mosaic(pictures(), replace(STILL, scale=0.5), np.random.default_rng(1))
    covered = (np.abs(result.image.astype(int) - 114).max(2) == 0).mean()
    assert covered > 0.1


def test_scale_and_translation_stay_within_their_limits() -> None:
    """Of a picture with a square in its middle, its size gives the scale and its centre the translation."""
    image = np.full((SIZE, SIZE, 3), GREY, np.uint8)
    image[60:100, 60:100] = 255
    picture = Boxed(image, np.array([[60, 60, 100, 100]], np.float32), np.array([0]))
    boxes = np.concatenate([letterboxed(picture, Augmentation(size=SIZE), np.random.default_rng(seed)).boxes for seed in range(300)])
    scales = (boxes[:, 2] - boxes[:, 0]) / 40
    assert 0.5 <= scales.min() < 0.55
    assert 1.45 < scales.max() <= 1.5
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / SIZE - 0.5
    assert 0.09 < np.abs(centres).max() <= 0.1 + 1e-6
    assert np.allclose(scales, (boxes[:, 3] - boxes[:, 1]) / 40, atol=1e-4)


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((20, 20, 60, 60), True),
        ((20, 20, 22, 60), False),  # a side of 2 px
        ((20, 20, 25, 26), False),  # 30 px of area
        ((20, 20, 26, 26), True),  # 36 px
        ((-300, 20, 30, 60), False),  # less than a tenth is left
        ((-100, 20, 30, 60), True),
    ],
)
def test_boxes_of_which_too_little_is_left_are_dropped(box: tuple[int, ...], kept: bool) -> None:
    picture = Boxed(np.zeros((SIZE, SIZE, 3), np.uint8), np.array([box], np.float32), np.array([4]))
    assert letterboxed(picture, STILL, np.random.default_rng(0)).labels.tolist() == [4] * kept


def test_boxes_thinner_than_the_aspect_limit_are_dropped() -> None:
    picture = Boxed(np.zeros((640, 640, 3), np.uint8), np.array([[0, 0, 640, 6], [0, 50, 640, 57]], np.float32), np.array([0, 1]))
    assert letterboxed(picture, replace(STILL, size=640), np.random.default_rng(0)).labels.tolist() == [1]


def test_a_picture_that_lost_all_its_boxes_is_kept() -> None:
    empty = [replace(picture, boxes=picture.boxes[:0], labels=picture.labels[:0]) for picture in pictures()]
    result = augmented(empty, Augmentation(size=SIZE), np.random.default_rng(0))
    assert result.boxes.shape == (0, 4)
    assert result.boxes.dtype == np.float32


def test_hsv_jitter_multiplies_hue_saturation_and_value() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    before = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(float)
    settings = Augmentation(hue=0.0, saturation=0.0, value=0.4)
    seed = 1
    factor = 1 + np.random.default_rng(seed).uniform(-1, 1, 3)[2] * 0.4
    after = cv2.cvtColor(jitter_hsv(image, settings, np.random.default_rng(seed)), cv2.COLOR_RGB2HSV).astype(float)
    assert factor < 0.95
    assert np.abs(after[..., 2] - before[..., 2] * factor).max() <= 1.5


def test_without_strength_hsv_jitter_leaves_the_picture_but_for_rounding() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    result = jitter_hsv(image, Augmentation(hue=0.0, saturation=0.0, value=0.0), np.random.default_rng(0))
    # OpenCV's 8-bit hue is in steps of two degrees
    assert np.abs(result.astype(int) - image).max() <= 6


def test_hsv_jitter_keeps_boxes() -> None:
    made = pictures()
    plain = mosaic(made, Augmentation(size=SIZE), np.random.default_rng(7))
    whole = augmented(made, Augmentation(size=SIZE, flip=0.0), np.random.default_rng(7))
    assert (whole.boxes == plain.boxes).all()
    assert (whole.image != plain.image).any()


def test_half_of_the_pictures_are_flipped() -> None:
    picture = Boxed(np.zeros((SIZE, SIZE, 3), np.uint8), np.array([[0, 0, 60, 60]], np.float32), np.array([0]))
    lefts = [augmented([picture], STILL, np.random.default_rng(seed)).boxes[0, 0] for seed in range(200)]
    assert set(lefts) == {0.0, 100.0}
    assert 70 < lefts.count(0.0) < 130


@pytest.mark.parametrize("seed", range(6))
def test_pixels_lie_where_boxes_say_to_a_tenth_of_a_pixel(seed: int) -> None:
    """The centroid of a square on black is its box's centre: coordinates are edges, whatever the scale."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[60:100, 50:90] = 255
    picture = Boxed(image, np.array([[50, 60, 90, 100]], np.float32), np.array([0]))
    result = letterboxed(picture, Augmentation(size=SIZE), np.random.default_rng(seed))
    left, top, right, bottom = result.boxes[0].astype(int) + np.array([-3, -3, 4, 4])
    weights = result.image[top:bottom, left:right, 0].astype(float)
    rows, columns = np.mgrid[top:bottom, left:right] + 0.5
    centroid = np.array([(columns * weights).sum(), (rows * weights).sum()]) / weights.sum()
    assert np.abs(centroid - (result.boxes[0, :2] + result.boxes[0, 2:]) / 2).max() < 0.1


@pytest.mark.parametrize("seed", range(6))
def test_a_picture_covers_the_pixels_whose_centres_lie_in_it(seed: int) -> None:
    picture = Boxed(np.full((SIZE, SIZE, 3), 255, np.uint8), np.array([[0, 0, SIZE, SIZE]], np.float32), np.array([0]))
    result = letterboxed(picture, replace(SEEN, scale=0.9), np.random.default_rng(seed))
    rows, columns = np.nonzero(result.image[..., 0] == 255)
    seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(seen - result.boxes[0]).max() <= 0.5 + 1e-4
