"""Augmentation as published: mosaic or letterbox, random scale and translation, HSV jitter, flip. No rotation, no shear, no MixUp.

A mosaic lays four pictures, each resized to fit the size S, around a random point of a 2S x 2S canvas; a random scale about its middle and
a translation cut an S x S picture out of that. Without rotation and shear all this moves each picture by

    x' = a x + b,  y' = a y + c

so each is warped once, from its file's pixels straight to its part of the result: no canvas, one interpolation instead of two. Coordinates
are edges, not pixel centres: pixel i covers i to i + 1, and boxes match pixels exactly.

Left out: the published recipe blurs, median-filters, greys or equalises one picture in a hundred each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from crqat_fx.pictures import PADDING, letterbox

_LONGEST = 32_766  # the longest side of a picture that OpenCV warps


@dataclass(frozen=True)
class Augmentation:
    """How much. The defaults are the published ones; `scale` is 0.5 for S and below, 0.9 for the larger models."""

    size: int = 640
    scale: float = 0.5  # the random scale is 1 +- this
    translate: float = 0.1  # share of the size, either way
    flip: float = 0.5  # probability
    hue: float = 0.015
    saturation: float = 0.7
    value: float = 0.4
    # A box is kept while both sides are longer than `side` px and its area at least `area` px: at stride 8, fewer than half of the smaller
    # ones hold the centre of a cell. At least `visible` of it must be left, and no side may be `aspect` times the other.
    side: float = 2.0
    area: float = 32.0
    visible: float = 0.1
    aspect: float = 100.0


@dataclass(frozen=True)
class Boxed:
    """A picture and its boxes."""

    image: np.ndarray  # uint8 [H, W, 3], RGB
    boxes: np.ndarray  # float32 [n, 4], xyxy in pixels
    labels: np.ndarray  # int64 [n]


def augmented(pictures: Sequence[Boxed], settings: Augmentation, rng: np.random.Generator) -> Boxed:
    """A training picture out of four pictures (mosaic) or of one (letterbox), whose labels already mean the same classes."""
    placed = mosaic(pictures, settings, rng) if len(pictures) == 4 else letterboxed(pictures[0], settings, rng)
    image = jitter_hsv(placed.image, settings, rng)
    if rng.random() < settings.flip:
        return flipped(Boxed(image, placed.boxes, placed.labels))
    return Boxed(image, placed.boxes, placed.labels)


def mosaic(pictures: Sequence[Boxed], settings: Augmentation, rng: np.random.Generator) -> Boxed:
    """Four pictures: above left, above right, below left and below right of a random point."""
    size = settings.size
    centre = rng.uniform(0.5, 1.5, 2) * size
    zoom, shift = _random_view(settings, rng)
    result = np.full((size, size, 3), PADDING, dtype=np.uint8)
    boxes, labels = [], []
    for place, picture in enumerate(pictures):
        height, width = picture.image.shape[:2]
        ratio = size / max(height, width)
        extent = np.array([width, height]) * ratio
        corner = centre - extent * [place in (0, 2), place in (0, 1)]  # of the whole picture on the canvas
        left, top = np.clip(corner, 0, 2 * size)
        right, bottom = np.clip(corner + extent, 0, 2 * size)
        whole = np.clip(picture.boxes * ratio + np.tile(corner, 2), (left, top, left, top), (right, bottom, right, bottom))
        moved, kept = _seen((whole - size) * zoom + np.tile(shift, 2), settings)
        boxes.append(moved[kept])
        labels.append(picture.labels[kept])
        part = (np.array([left, top, right, bottom]) - size) * zoom + np.tile(shift, 2)
        _paste(picture.image, result, ratio * zoom, (corner - size) * zoom + shift, part)
    return Boxed(result, np.concatenate(boxes).astype(np.float32), np.concatenate(labels))


def letterboxed(picture: Boxed, settings: Augmentation, rng: np.random.Generator) -> Boxed:
    """One picture, letterboxed as in evaluation, scaled and translated."""
    size = settings.size
    image, placement = letterbox(picture.image, size)
    zoom, shift = _random_view(settings, rng)
    offset = shift - zoom * size / 2
    result = np.full((size, size, 3), PADDING, dtype=np.uint8)
    _paste(image, result, zoom, offset, np.tile(offset, 2) + np.array([0, 0, size, size]) * zoom)
    ratio = np.array([placement.scale_x, placement.scale_y] * 2)
    start = np.array([placement.left, placement.top] * 2)
    moved, kept = _seen((picture.boxes * ratio + start) * zoom + np.tile(offset, 2), settings)
    return Boxed(result, moved[kept].astype(np.float32), picture.labels[kept])


def jitter_hsv(image: np.ndarray, settings: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Hue, saturation and value each times a random factor."""
    factors = 1 + rng.uniform(-1, 1, 3) * (settings.hue, settings.saturation, settings.value)
    levels = np.arange(256)[:, None] * factors
    table = np.concatenate([levels[:, :1] % 180, np.clip(levels[:, 1:], 0, 255)], axis=1).astype(np.uint8)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table[None])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def flipped(picture: Boxed) -> Boxed:
    """Left and right exchanged."""
    width = picture.image.shape[1]
    boxes = picture.boxes.copy()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    return Boxed(cv2.flip(picture.image, 1), boxes, picture.labels)


def _random_view(settings: Augmentation, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """The scale, and where the middle of what is scaled comes to lie in the result."""
    zoom = rng.uniform(1 - settings.scale, 1 + settings.scale)
    return zoom, rng.uniform(0.5 - settings.translate, 0.5 + settings.translate, 2) * settings.size


def _paste(image: np.ndarray, result: np.ndarray, scale: float, offset: np.ndarray, part: np.ndarray) -> None:
    """Warps `image` by x' = scale x + offset into those pixels of `result` whose centres lie in `part` (xyxy)."""
    size = len(result)
    left, top, right, bottom = (int(edge) for edge in np.clip(np.ceil(part - 0.5), 0, size))
    if left >= right or top >= bottom:
        return
    image, shrinkage = _warpable(image)
    scales = scale / shrinkage
    # Of the source, the place under the first pixel's centre; OpenCV counts from the centre of pixel 0.
    start = (np.array([left, top]) + 0.5 - offset) / scales - 0.5
    matrix = np.array([[1 / scales[0], 0, start[0]], [0, 1 / scales[1], start[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    result[top:bottom, left:right] = cv2.warpAffine(
        image, matrix, (right - left, bottom - top), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )


def _warpable(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture, shrunk where it is longer than OpenCV warps, and how much in x and y."""
    extent = np.array(image.shape[1::-1])
    if extent.max() <= _LONGEST:
        return image, np.ones(2)
    shrunk = np.maximum(extent * _LONGEST // extent.max(), 1)
    return cv2.resize(image, shrunk.tolist(), interpolation=cv2.INTER_AREA), shrunk / extent


def _seen(boxes: np.ndarray, settings: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    """The boxes clipped to the result, and which of them are still worth looking for."""
    clipped = np.clip(boxes, 0, settings.size)
    width, height = (clipped[:, 2:] - clipped[:, :2]).T
    area = width * height
    before = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    long, short = np.maximum(width, height), np.minimum(width, height)
    kept = (short > settings.side) & (area >= settings.area) & (area > settings.visible * before) & (long < settings.aspect * short)
    return clipped, kept
