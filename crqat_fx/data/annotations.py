"""Annotation files of COCO's shape, read once into arrays: what COCO, Objects365, LVIS and MDETR's grounding files have in common.

A file from outside is never trusted. Each picture entry and each annotation is checked by itself; one that cannot be used is left out,
counted in `Tally.skipped` and named in the log, one that can be mended is mended and counted in `Tally.repaired`. A file that is no
JSON, lacks a list, or has nothing usable left is a UserError.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard
from urllib.parse import urlsplit

import numpy as np

from crqat_fx.errors import UserError
from crqat_fx.pictures import read_picture

log = logging.getLogger(__name__)

SMALLEST_SIDE = 32  # training leaves out pictures with a shorter side, as published
_NAMED = 20  # of each kind of fault the log names this many; the rest is counted
_HEAVY_KEYS = ("segmentation", "keypoints")  # megabytes that nothing here reads


class Tally:
    """What was wrong in one file, by kind."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.skipped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()

    def skip(self, kind: str, name: str) -> None:
        self._count(self.skipped, kind, name, "left out")

    def repair(self, kind: str, name: str) -> None:
        self._count(self.repaired, kind, name, "mended")

    def close(self) -> None:
        """Logs the totals of the kinds that were too many to name."""
        for counts, deed in ((self.skipped, "left out"), (self.repaired, "mended")):
            for kind, count in counts.items():
                if count > _NAMED:
                    log.warning("%s: %s: %d in all %s", self.where, kind, count, deed)

    def _count(self, counts: Counter[str], kind: str, name: str, deed: str) -> None:
        counts[kind] += 1
        if counts[kind] <= _NAMED:
            log.warning("%s: %s: %s %s", self.where, kind, name, deed)


class UnlabelledError(Exception):
    """Raised by what labels an annotation: why it has no label. The annotation is left out."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a set: their entries in the annotation file, reduced to what is read again, and where their files are."""

    folder: Path
    names: tuple[str, ...]  # relative to `folder`, with forward slashes
    ids: np.ndarray  # int64 [P]
    sizes: np.ndarray  # int32 [P, 2], height and width

    def __len__(self) -> int:
        return len(self.names)

    def file(self, index: int) -> Path:
        """The picture's file. Sets are unpacked in several ways: `a/b/c.jpg` is looked for as such, then as `b/c.jpg`, then as `c.jpg`."""
        parts = PurePosixPath(self.names[index]).parts
        for tail in (parts, parts[-2:], parts[-1:]):
            path = self.folder.joinpath(*tail)
            if _is_file(path):
                return path
        raise UserError(
            "the picture file is missing", where=self.folder / self.names[index], remedy="check the `pictures` folder of the set"
        )

    def read(self, index: int) -> np.ndarray:
        """uint8 RGB [H, W, 3]."""
        path = self.file(index)
        height, width = (int(side) for side in self.sizes[index])
        image: np.ndarray = read_picture(path)
        if image.shape[:2] != (height, width):
            found = f"{image.shape[1]} x {image.shape[0]} px, annotated as {width} x {height} px"
            raise UserError(f"the picture is {found}", where=path, remedy="annotate the picture that is there")
        return image


@dataclass(frozen=True)
class Boxes:
    """Every annotation of a set, sorted by picture: those of picture p are the rows `offsets[p]` to `offsets[p + 1]`."""

    offsets: np.ndarray  # int64 [P + 1]
    ids: np.ndarray  # int64 [n], unique and from 1 up
    xywh: np.ndarray  # float64 [n, 4], as in the file
    inside: np.ndarray  # float32 [n, 4], xyxy, clipped to the picture
    labels: np.ndarray  # int32 [n]
    areas: np.ndarray  # float64 [n]
    crowd: np.ndarray  # bool [n]
    trained: np.ndarray  # bool [n]: no crowd, and at least a pixel wide and high within the picture

    def rows(self, picture: int) -> slice:
        return slice(int(self.offsets[picture]), int(self.offsets[picture + 1]))

    def trained_rows(self, picture: int) -> np.ndarray:
        rows = self.rows(picture)
        trained = np.flatnonzero(self.trained[rows])
        return np.asarray(trained + rows.start)


def read_json(path: Path, lists: Sequence[str]) -> dict[str, Any]:
    """The file's top level, a mapping that has the named lists."""
    try:
        loaded = json.loads(path.read_bytes(), object_hook=_light)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path, remedy="check the path of the annotation file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no valid JSON ({error})", where=path, remedy="fetch or write the annotation file again") from error
    if not isinstance(loaded, dict):
        raise UserError("is JSON, but no mapping", where=path, remedy=f"give a file with the lists {', '.join(lists)}")
    for name in lists:
        if not isinstance(loaded.get(name), list):
            raise UserError(f"has no list {name!r}", where=path, remedy="give an annotation file in COCO's format")
    return loaded


def read_pictures(entries: Sequence[Any], folder: Path, tally: Tally) -> tuple[Pictures, list[dict[str, Any]]]:
    """The usable pictures, and their entries in the same order."""
    if not folder.is_dir():
        raise UserError("is no folder", where=folder, remedy=f"give the folder that holds the pictures of {tally.where.name}")
    kept: list[dict[str, Any]] = []
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        name = _file_name(entry) if isinstance(entry, dict) else None
        if name is None or not is_whole(entry.get("id")) or not all(_is_side(entry.get(key)) for key in ("height", "width")):
            tally.skip("picture entry without id, file name, width or height", f"number {position}")
            continue
        if entry["id"] in seen:
            tally.skip("picture id used before", f"{entry['id']} ({name})")
            continue
        seen.add(entry["id"])
        kept.append(entry)
        names.append(name)
        sizes.append((int(entry["height"]), int(entry["width"])))
    if not kept:
        raise UserError("lists no usable picture", where=tally.where, remedy="give a set with at least one")
    ids = np.array([entry["id"] for entry in kept], dtype=np.int64)
    return Pictures(folder, tuple(names), ids, np.array(sizes, dtype=np.int32)), kept


def read_boxes(
    annotations: Sequence[Any], pictures: Pictures, label: Callable[[Mapping[str, Any], int], int | None], tally: Tally
) -> Boxes:
    """The usable annotations. `label` gets an annotation and its picture's row and gives the label; None leaves it out without a word."""
    row_of = {int(identity): row for row, identity in enumerate(pictures.ids)}
    rows: list[int] = []
    labels: list[int] = []
    ids: list[int] = []
    numbers: list[tuple[float, ...]] = []  # x, y, width, height, area
    crowd: list[bool] = []
    for position, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or not _is_box(annotation.get("bbox")):
            tally.skip("annotation without a box of four finite numbers", _annotation_name(annotation, position))
            continue
        picture = annotation.get("image_id")
        row = row_of.get(picture) if is_whole(picture) else None
        if row is None:
            tally.skip("annotation of a picture that is not listed", _annotation_name(annotation, position))
            continue
        try:
            found = label(annotation, row)
        except UnlabelledError as reason:
            tally.skip(str(reason), _annotation_name(annotation, position))
            continue
        if found is None:
            continue
        x, y, width, height = (float(number) for number in annotation["bbox"])
        if width <= 0 or height <= 0:
            tally.skip("box without area", _annotation_name(annotation, position))
            continue
        area = annotation.get("area")
        rows.append(row)
        labels.append(found)
        ids.append(annotation["id"] if is_whole(annotation.get("id")) else 0)
        numbers.append((x, y, width, height, float(area) if _is_finite(area) and area > 0 else width * height))
        crowd.append(annotation.get("iscrowd") in (1, True))
    if not rows:
        raise UserError("has no usable annotation", where=tally.where, remedy="give a set with at least one box")
    return _in_order(pictures, np.array(rows), np.array(labels, np.int32), _unique(ids, tally), np.array(numbers), np.array(crowd), tally)


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


class AnnotatedSet:
    """What sets of every format share: an annotation file, and the pictures and boxes that were read from it.

    `skipped` and `repaired` count by kind what the annotation file had wrong.
    """

    annotations: Path
    indices: np.ndarray  # of the pictures that training draws from
    _tally: Tally
    _pictures: Pictures
    _boxes: Boxes

    def _read_boxes(self, annotations: Sequence[Any], label: Callable[[Mapping[str, Any], int], int | None]) -> None:
        self._boxes = read_boxes(annotations, self._pictures, label, self._tally)
        self._tally.close()
        self.indices = trainable(self._pictures)

    @property
    def trained_boxes(self) -> int:
        """How many boxes the pictures that training draws from have."""
        picture_of = np.repeat(np.arange(len(self)), np.diff(self._boxes.offsets))
        return int(np.count_nonzero(self._boxes.trained & np.isin(picture_of, self.indices)))

    @property
    def skipped(self) -> Counter[str]:
        return self._tally.skipped

    @property
    def repaired(self) -> Counter[str]:
        return self._tally.repaired

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, index: int) -> str:
        return self._pictures.names[index]

    def picture(self, index: int) -> np.ndarray:
        """uint8 RGB [H, W, 3]. A missing or broken picture, or one whose size is not the annotated one, is a UserError."""
        return self._pictures.read(index)


def trainable(pictures: Pictures) -> np.ndarray:
    """The rows of the pictures that training draws from."""
    large = np.flatnonzero(pictures.sizes.min(axis=1) >= SMALLEST_SIDE)
    if len(large) < len(pictures):
        log.info("%s: %d pictures with a side under %d px are not trained on", pictures.folder, len(pictures) - len(large), SMALLEST_SIDE)
    return large


def _in_order(
    pictures: Pictures, rows: np.ndarray, labels: np.ndarray, ids: np.ndarray, numbers: np.ndarray, crowd: np.ndarray, tally: Tally
) -> Boxes:
    order = np.argsort(rows, kind="stable")
    rows, labels, ids, crowd = rows[order], labels[order], ids[order], crowd[order]
    xywh, areas = numbers[order, :4], numbers[order, 4]
    limits = np.tile(pictures.sizes[rows][:, ::-1], 2)
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    inside = np.clip(xyxy, 0, limits)
    # COCO's own boxes reach over the edge by rounding: only a whole pixel is worth a word.
    over = np.abs(xyxy - inside).max(axis=1) > 1
    tiny = (inside[:, 2:] - inside[:, :2]).min(axis=1) < 1
    for index in np.flatnonzero(over & ~tiny):
        tally.repair("box reaching outside its picture", f"annotation {ids[index]}")
    for index in np.flatnonzero(tiny):
        tally.skip("box without a whole pixel in its picture, for training", f"annotation {ids[index]}")
    offsets = np.searchsorted(rows, np.arange(len(pictures) + 1))
    return Boxes(offsets, ids, xywh, inside.astype(np.float32), labels, areas, crowd, ~crowd & ~tiny)


def _unique(ids: Sequence[int], tally: Tally) -> np.ndarray:
    """Ids as they are where they are unique and positive, otherwise new ones: COCO's evaluation takes id 0 for "no match"."""
    repeated = [identity for identity, count in Counter(ids).items() if count > 1 or identity < 1]
    if not repeated:
        return np.array(ids, dtype=np.int64)
    for identity in repeated:
        tally.repair("annotation id missing, not positive or used twice: all are numbered anew", str(identity))
    return np.arange(1, len(ids) + 1)


def _light(entry: dict[str, Any]) -> dict[str, Any]:
    for key in _HEAVY_KEYS:
        entry.pop(key, None)
    return entry


def _file_name(entry: Mapping[str, Any]) -> str | None:
    """The picture's file name, or for LVIS, which has none, the last two parts of `coco_url`: `train2017/000000391895.jpg`. It never
    leaves the folder it is looked for in: an absolute name counts as relative, one that climbs is refused."""
    name, url = entry.get("file_name"), entry.get("coco_url")
    if isinstance(name, str) and name:
        parts = name.replace("\\", "/").split("/")
    elif isinstance(url, str) and url:
        parts = urlsplit(url).path.split("/")[-2:]
    else:
        return None
    parts = [part for part in parts if part not in ("", ".") and not part.endswith(":")]
    if not parts or ".." in parts or any("\0" in part for part in parts):
        return None
    return "/".join(parts)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the system knows, a folder that may not be entered: there is no such picture for us
        return False


def _annotation_name(annotation: Any, position: int) -> str:
    identity = annotation.get("id") if isinstance(annotation, dict) else None
    return f"annotation {identity}" if is_whole(identity) else f"annotation number {position}"


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(_is_finite(number) for number in value)


def _is_side(value: object) -> bool:
    return _is_finite(value) and 0 < value < 2**31 and int(value) == value
