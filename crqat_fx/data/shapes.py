"""The drawn open-vocabulary task: a detection set that needs no download, drawn from a seed.

An object is a composition of fill x colour x shape, named like "striped red star", and a picture holds one to eight of them over
gradients, line clutter and noise. Of the 432 compositions 240 are the vocabulary: 180 base ones, drawn with long-tailed frequencies, and
60 novel ones that are drawn for evaluation alone, so that a detector has to read their names. The text embeddings are compositional, as
CLIP's are: the sum of a direction for the shape, the colour, the fill, one that all share, and one of the phrase's own.

Picture `index` of a split is a pure function of seed, size, split and index: processes, order and resumption do not matter. No shape and
no fill is known by its handedness, so that a mirrored picture keeps its names.
"""

import functools
import itertools
import json
import math
import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from crqat_fx.data.samples import Sample
from crqat_fx.errors import UserError
from crqat_fx.files import written
from crqat_fx.progress import Progress
from crqat_fx.vocabulary import Vocabulary

SPLITS = ("train", "val", "calibration")
BASE_COUNT = 180
NOVEL_COUNT = 60
MOST_OBJECTS = 8
TEXT_WIDTH = 512

FILLS = ("solid", "striped", "dotted", "hollow")
COLOURS = {
    "red": (215, 30, 35),
    "orange": (250, 135, 20),
    "yellow": (250, 230, 50),
    "green": (30, 150, 50),
    "cyan": (70, 215, 225),
    "blue": (35, 60, 215),
    "pink": (250, 110, 200),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}

_VOCABULARY_STREAM = 0  # what a random stream of the seed is for; splits follow from 1
_SMALLEST, _LARGEST = 0.125, 0.5  # an object's longest side as a share of the picture's
_TURN = math.radians(20)
_TRIES = 40  # places tried for an object before the picture goes without it
_OVERLAP = 0.25  # how much of the smaller of two boxes the other may cover
_COVERED = 0.4  # how much of a box all later ones together may cover
_SUPERSAMPLING = 4
_CHUNK = 50  # pictures a worker draws at a time
_SHIFT = 4  # fractional bits of the coordinates given to cv2


def _arc(centre: tuple[float, float], radii: tuple[float, float], start: float, end: float, count: int) -> np.ndarray:
    angles = np.radians(np.linspace(start, end, count))
    return np.stack([centre[0] + radii[0] * np.cos(angles), centre[1] + radii[1] * np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    angles = np.radians(np.arange(10) * 36 - 90)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return np.stack([16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], axis=1)


def _crescent() -> np.ndarray:
    """A disc of radius 1 less one of radius .8 that lies .55 beside it; the two circles meet at `tip` on each side."""
    x = (1 - 0.8**2 + 0.55**2) / (2 * 0.55)
    outer, inner = math.degrees(math.acos(x)), math.degrees(math.acos((x - 0.55) / 0.8))
    return np.concatenate([_arc((0, 0), (1, 1), outer, 360 - outer, 36), _arc((0.55, 0), (0.8, 0.8), 360 - inner, inner, 28)[1:-1]])


def _fish() -> np.ndarray:
    return np.concatenate([_arc((0.2, 0), (0.8, 0.55), -155, 155, 40), np.array([(-1.0, 0.55), (-0.75, 0.0), (-1.0, -0.55)])])


def _cross() -> np.ndarray:
    a = 0.34
    return np.array([(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)])


# Outlines, y down; only their form counts, size and place are set where they are used.
SHAPES: Mapping[str, np.ndarray] = {
    "circle": _arc((0, 0), (1, 1), 0, 352.5, 48),
    "square": np.array([(-1.0, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": np.array([(0.0, -0.9), (1, 0.9), (-1, 0.9)]),
    "diamond": np.array([(0.0, -1), (0.6, 0), (0, 1), (-0.6, 0)]),
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(),
    "arrow": np.array([(0.0, -1), (0.85, -0.05), (0.32, -0.05), (0.32, 1), (-0.32, 1), (-0.32, -0.05), (-0.85, -0.05)]),
    "crescent": _crescent(),
    "hourglass": np.array([(-0.75, -1.0), (0.75, -1), (0.1, 0), (0.75, 1), (-0.75, 1), (-0.1, 0)]),
    "crown": np.array([(-1.0, 0.75), (-1, -0.6), (-0.5, 0.1), (0, -0.75), (0.5, 0.1), (1, -0.6), (1, 0.75)]),
    "fish": _fish(),
}


@dataclass(frozen=True)
class Piece:
    """One object, ready to be painted. Coordinates are in pixels, where pixel i covers i to i + 1."""

    label: int
    fill: str
    colour: tuple[int, int, int]
    outline: np.ndarray  # float64 [k, 2]
    pattern_turn: float  # radians, of stripes and dots
    pattern_offset: tuple[float, float]  # of stripes and dots, in periods

    @property
    def box(self) -> np.ndarray:
        return np.concatenate([self.outline.min(axis=0), self.outline.max(axis=0)])

    @property
    def side(self) -> float:
        return float(np.ptp(self.outline, axis=0).max())


def paint(canvas: np.ndarray, piece: Piece) -> None:
    """Draws an object that lies within the canvas (uint8 RGB), anti-aliased. Behind a hollow one the canvas is seen."""
    left, top = np.floor(piece.outline.min(axis=0)).astype(int)
    right, bottom = np.ceil(piece.outline.max(axis=0)).astype(int)
    origin = np.array([left, top])
    patch = canvas[top:bottom, left:right]
    outline = _subpixels(piece.outline - origin)
    silhouette = np.zeros((patch.shape[0] * _SUPERSAMPLING, patch.shape[1] * _SUPERSAMPLING), np.uint8)
    cv2.fillPoly(silhouette, [outline], 255, shift=_SHIFT)
    pattern = np.zeros_like(silhouette)
    if piece.fill == "hollow":
        _border(pattern, outline, 255, 0.1 * piece.side)
        silhouette, pattern = cv2.bitwise_and(silhouette, pattern), np.zeros_like(pattern)
    elif piece.fill == "striped":
        _stripe(pattern, piece, origin)
        _border(pattern, outline, 0, 0.05 * piece.side)
    elif piece.fill == "dotted":
        _dot(pattern, piece, origin)
        _border(pattern, outline, 0, 0.05 * piece.side)
    cover, shaded = (
        cv2.resize(layer, (right - left, bottom - top), interpolation=cv2.INTER_AREA).astype(np.int32)[:, :, None]
        for layer in (silhouette, pattern)
    )
    colour = np.array(piece.colour, np.int32)
    shade = np.where(colour.max() < 64, colour + 120, colour // 3)
    own = (colour * (255 - shaded) + shade * shaded + 127) // 255
    patch[:] = (patch * (255 - cover) + own * cover + 127) // 255


def _subpixels(points: np.ndarray) -> np.ndarray:
    """Pixels to cv2's fixed-point coordinates, where whole numbers are the centres of (sub)pixels."""
    return np.rint((points * _SUPERSAMPLING - 0.5) * (1 << _SHIFT)).astype(np.int32)


def _border(pattern: np.ndarray, outline: np.ndarray, value: int, width: float) -> None:
    """Draws along the inside of an outline, and as far outside of it, where nothing is seen."""
    cv2.polylines(pattern, [outline], True, value, max(1, round(2 * width * _SUPERSAMPLING)), shift=_SHIFT)


def _pattern_frame(piece: Piece, period: float) -> tuple[np.ndarray, np.ndarray, range]:
    """Origin and axes (rows, one period long) of a pattern, and the periods that cover the object."""
    cosine, sine = math.cos(piece.pattern_turn), math.sin(piece.pattern_turn)
    axes = np.array([(cosine, sine), (-sine, cosine)]) * period
    centre = (piece.box[:2] + piece.box[2:]) / 2 + np.array(piece.pattern_offset) @ axes
    reach = math.ceil(0.75 * piece.side / period) + 1
    return centre, axes, range(-reach, reach + 1)


def _stripe(pattern: np.ndarray, piece: Piece, origin: np.ndarray) -> None:
    centre, (along, across), periods = _pattern_frame(piece, 0.24 * piece.side)
    length = len(periods) * along
    corners = np.stack([-length, length, length + across / 2, -length + across / 2])
    cv2.fillPoly(pattern, [_subpixels(centre - origin + corners + k * across) for k in periods], 255, shift=_SHIFT)


def _dot(pattern: np.ndarray, piece: Piece, origin: np.ndarray) -> None:
    period = 0.26 * piece.side
    centre, axes, periods = _pattern_frame(piece, period)
    steps = np.array(list(itertools.product(periods, periods)))
    radius = round(0.33 * period * _SUPERSAMPLING * (1 << _SHIFT))
    for x, y in _subpixels(centre - origin + steps @ axes).tolist():
        cv2.circle(pattern, (x, y), radius, 255, cv2.FILLED, shift=_SHIFT)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A soft gradient of muted colours, crossed by lines, under noise of some grain."""
    corners = (rng.uniform(60, 190, (4, 4, 1)) + rng.uniform(-25, 25, (4, 4, 3))).astype(np.float32)
    canvas = np.clip(cv2.resize(corners, (size, size), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
    for _ in range(rng.integers(0, 13)):
        colour = np.clip(rng.uniform(40, 215) + rng.uniform(-30, 30, 3), 0, 255).tolist()
        points = (rng.uniform(-0.1, 1.1, (rng.integers(2, 5), 2)) * size * (1 << _SHIFT)).astype(np.int32)
        cv2.polylines(canvas, [points], False, colour, max(1, round(rng.uniform(0.5, 2.5) * size / 160)), cv2.LINE_AA, _SHIFT)
    grain = size // int(rng.choice([1, 2, 4]))
    noise = cv2.resize(rng.integers(0, 256, (grain, grain, 3), np.uint8), (size, size), interpolation=cv2.INTER_LINEAR)
    strength = rng.uniform(0.05, 0.25)
    return cv2.addWeighted(canvas, 1, noise, strength, -127.5 * strength)


@dataclass(frozen=True)
class ShapesTask:
    """The task of a seed at a picture size. Names are in the order of their frequency in training, the novel ones last."""

    seed: int = 0
    size: int = 160

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"the seed of the drawn task cannot be negative, it is {self.seed}")
        if self.size < 64 or self.size % 32:
            raise UserError(f"pictures of the drawn task cannot be {self.size} px wide", remedy="choose a multiple of 32 from 64 on")

    @cached_property
    def compositions(self) -> tuple[tuple[str, str, str], ...]:
        """Fill, colour and shape of each name. Every one of a novel composition is seen in some base composition."""
        rng = np.random.default_rng([self.seed, _VOCABULARY_STREAM])
        everything = list(itertools.product(FILLS, COLOURS, SHAPES))
        while True:
            chosen = [everything[i] for i in rng.permutation(len(everything))[: BASE_COUNT + NOVEL_COUNT]]
            seen = set(itertools.chain.from_iterable(chosen[:BASE_COUNT]))
            if seen.issuperset(itertools.chain.from_iterable(chosen[BASE_COUNT:])):
                return tuple(chosen)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(" ".join(composition) for composition in self.compositions)

    @property
    def base(self) -> tuple[str, ...]:
        return self.names[:BASE_COUNT]

    @property
    def novel(self) -> tuple[str, ...]:
        return self.names[BASE_COUNT:]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        rng = np.random.default_rng([self.seed, _VOCABULARY_STREAM, 1])

        def directions(count: int) -> np.ndarray:
            vectors = rng.standard_normal((count, TEXT_WIDTH))
            return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

        shapes, colours, fills = (dict(zip(values, directions(len(values)), strict=True)) for values in (SHAPES, COLOURS, FILLS))
        common, own = directions(1)[0], directions(len(self.names))
        embeddings = np.stack(
            [
                shapes[shape] + 0.85 * colours[colour] + 0.7 * fills[fill] + 0.6 * common + 0.35 * phrase
                for (fill, colour, shape), phrase in zip(self.compositions, own, strict=True)
            ]
        )
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        return Vocabulary(self.names, embeddings.astype(np.float32))

    def frequency(self, label: int) -> str | None:
        """`f`, `c` or `r` for the frequent, common and rare thirds of the base names; a novel one, never trained on, has none."""
        return "fcr"[label * 3 // BASE_COUNT] if label < BASE_COUNT else None

    def probabilities(self, split: str) -> np.ndarray:
        """How likely an object is to be each of the names, of the base names outside `val`."""
        if split == "val":
            return np.full(len(self.names), 1 / len(self.names))
        weights = (np.arange(BASE_COUNT) + 8.0) ** -1.3
        return np.asarray(weights / weights.sum())

    def layout(self, split: str, index: int) -> tuple[Piece, ...]:
        """The objects of a picture, from back to front."""
        rng = np.random.default_rng([self.seed, stream_of(split), index])
        count = int(rng.integers(1, MOST_OBJECTS + 1))
        labels = np.searchsorted(np.cumsum(self.probabilities(split))[:-1], rng.random(count), side="right")
        # The largest first: small objects lie in front, and there is room for more of them.
        sides = np.sort(np.exp(rng.uniform(math.log(_SMALLEST), math.log(_LARGEST), count)) * self.size)[::-1]
        pieces: list[Piece] = []
        boxes = np.zeros((0, 4))
        covered = np.zeros(0)
        for label, side in zip(labels.tolist(), sides.tolist(), strict=True):
            fill, colour, shape = self.compositions[label]
            outline = _turned(SHAPES[shape], rng.uniform(-_TURN, _TURN), side)
            if rng.random() < 0.5:
                outline[:, 0] = -outline[:, 0]
            extent = np.ptp(outline, axis=0)
            corners = rng.uniform(0, 1, (_TRIES, 2)) * (self.size - extent)
            tint = np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255).tolist()
            pattern_turn, pattern_offset = rng.uniform(0, math.pi), tuple(rng.uniform(-0.5, 0.5, 2).tolist())
            candidates = np.concatenate([corners, corners + extent], axis=1)
            hidden = _intersections(candidates, boxes)
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            fits = (hidden <= _OVERLAP * np.minimum(areas, extent.prod())) & (covered + hidden / areas <= _COVERED)
            places = np.flatnonzero(fits.all(axis=1))
            if not len(places):
                continue
            covered = np.append(covered + hidden[places[0]] / areas, 0.0)
            boxes = np.concatenate([boxes, candidates[places[:1]]])
            outline += corners[places[0]] - outline.min(axis=0)
            pieces.append(Piece(label, fill, tuple(tint), outline, pattern_turn, pattern_offset))
        return tuple(pieces)

    def draw(self, split: str, index: int) -> Sample:
        """A picture with its boxes; the labels index `names`."""
        pieces = self.layout(split, index)
        canvas = _background(np.random.default_rng([self.seed, stream_of(split), index, 1]), self.size)
        for piece in pieces:
            paint(canvas, piece)
        boxes = np.array([piece.box for piece in pieces], np.float32)
        return Sample(canvas, boxes, np.array([piece.label for piece in pieces], np.int64), self.names)


def stream_of(split: str) -> int:
    if split not in SPLITS:
        raise UserError(f"the drawn task has no split {split!r}", remedy=f"choose one of {', '.join(SPLITS)}")
    return 1 + SPLITS.index(split)


def _turned(form: np.ndarray, angle: float, side: float) -> np.ndarray:
    """The outline turned by an angle and scaled so that the longest side of its box is `side`."""
    cosine, sine = math.cos(angle), math.sin(angle)
    outline = form @ np.array([(cosine, sine), (-sine, cosine)])
    return np.asarray(outline * (side / np.ptp(outline, axis=0).max()))


def _intersections(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Areas [a, b] in which boxes [a, 4] and [b, 4] overlap."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.asarray(np.clip(high - low, 0, None).prod(axis=2))


class ShapesSet:
    """The first `count` pictures of a split as an EvaluationSet. Nothing is kept: a picture is drawn, in milliseconds, when it is read."""

    def __init__(self, task: ShapesTask, split: str, count: int) -> None:
        if count < 1:
            raise UserError(f"a set of {count} pictures of the drawn task has nothing to be evaluated on")
        self.task = task
        self.split = split
        self.coco = _coco(task, split, count)

    def __len__(self) -> int:
        return len(self.coco["images"])

    def picture(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        return self.task.draw(self.split, index).image


def _coco(task: ShapesTask, split: str, count: int) -> dict[str, Any]:
    """COCO's JSON of the first `count` pictures of a split. Training and calibration know no novel category, not even as a negative text;
    `val` says as LVIS does which categories a picture is verified to lack: all that it does not show."""
    known = range(1, 1 + (len(task.names) if split == "val" else BASE_COUNT))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        image = {"id": index + 1, "file_name": _file_name(index), "width": task.size, "height": task.size}
        pieces = task.layout(split, index)
        if split == "val":
            image["neg_category_ids"] = sorted(set(known) - {piece.label + 1 for piece in pieces})
            image["not_exhaustive_category_ids"] = []
        images.append(image)
        for piece in pieces:
            left, top, right, bottom = piece.box.astype(np.float32).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": piece.label + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
            )
    categories: list[dict[str, Any]] = []
    for category in known:
        frequency = task.frequency(category - 1)
        group = {"split": "novel"} if frequency is None else {"split": "base", "frequency": frequency}
        categories.append({"id": category, "name": task.names[category - 1]} | group)
    return {"images": images, "annotations": annotations, "categories": categories}


def _file_name(index: int) -> str:
    return f"{index:06d}.png"


def write_coco(task: ShapesTask, out: str | Path, counts: Mapping[str, int], *, workers: int = 2, progress: Progress | None = None) -> Path:
    """Writes the first pictures of each split in `counts` as a detection set in COCO's format, and returns its data.yaml.

        out/data.yaml, out/vocabulary.npz, out/annotations/{split}.json, out/{split}/000000.png ...

    data.yaml names train and val; a set for calibration stands beside them. The folder takes its name when everything in it is written.
    `workers` processes draw; 0 draws in this one.
    """
    folder = Path(out)
    for split, count in counts.items():
        stream_of(split)
        if count < 1:
            raise UserError(f"{count} pictures of {split} are no set", remedy="leave the split out, or ask for a picture at least")
    if not counts:
        raise UserError("no split of the drawn task to write", remedy=f"ask for pictures of {', '.join(SPLITS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("exists and is no empty folder", where=folder, remedy="name a new one, or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            whole = Path(temporary) / folder.name
            _write_set(task, whole, counts, workers, progress)
            if folder.exists():
                folder.rmdir()
            whole.rename(folder)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror or error})", where=folder, remedy="name a folder you may write to") from error
    return folder / "data.yaml"


def _write_set(task: ShapesTask, folder: Path, counts: Mapping[str, int], workers: int, progress: Progress | None) -> None:
    chunks = []
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        chunks += [(split, range(first, min(first + _CHUNK, count))) for first in range(0, count, _CHUNK)]
    total, done = sum(counts.values()), 0
    for written_count in _written_chunks(task, folder, chunks, workers):
        done += written_count
        if progress is not None:
            progress(done, total, "pictures")
    for split, count in counts.items():
        with written(folder / "annotations" / f"{split}.json") as path:
            path.write_text(json.dumps(_coco(task, split, count)), encoding="utf-8")
    task.vocabulary.save(folder / "vocabulary.npz")
    data: dict[str, Any] = {"vocabularies": ["vocabulary.npz"]}
    data |= {split: {"annotations": f"annotations/{split}.json", "pictures": split} for split in ("train", "val") if split in counts}
    with written(folder / "data.yaml") as path:
        path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def _written_chunks(task: ShapesTask, folder: Path, chunks: Sequence[tuple[str, range]], workers: int) -> Iterator[int]:
    """Draws and writes chunk after chunk; yields how many pictures each had."""
    write = functools.partial(_write_chunk, task, folder)
    if workers < 1:
        yield from map(write, chunks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=cv2.setNumThreads, initargs=(1,)) as executor:
        yield from executor.map(write, chunks)


def _write_chunk(task: ShapesTask, folder: Path, chunk: tuple[str, range]) -> int:
    split, indices = chunk
    for index in indices:
        _, png = cv2.imencode(".png", cv2.cvtColor(task.draw(split, index).image, cv2.COLOR_RGB2BGR))
        (folder / split / _file_name(index)).write_bytes(png.tobytes())
    return len(indices)
