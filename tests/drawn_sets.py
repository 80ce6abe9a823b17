"""Tiny data sets in each format, drawn and written by the tests: flat coloured rectangles on grey, so that pixels tell where boxes are."""

import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from crqat_fx.data.config import DataConfig, read_data
from crqat_fx.vocabulary import Vocabulary

WIDTH, HEIGHT = 96, 64
COLOURS = {"cat": (255, 0, 0), "dog": (0, 255, 0), "bird": (0, 0, 255)}
NAMES = tuple(COLOURS)

Change = Callable[[dict[str, Any]], None]


def draw(boxes: Iterable[tuple[str, tuple[int, int, int, int]]], width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Rectangles (name, (x, y, w, h)) on grey, RGB."""
    image = np.full((height, width, 3), 60, np.uint8)
    for name, (x, y, w, h) in boxes:
        image[y : y + h, x : x + w] = COLOURS[name]
    return image


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def boxes_of(index: int) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Two rectangles that do not meet."""
    left = (NAMES[index % 3], (4 + index, 8, 30, 40))
    right = (NAMES[(index + 1) % 3], (50, 10 + index, 24, 32))
    return [left, right]


def write_coco(folder: Path, count: int = 6, change: Change | None = None, suffix: str = "png") -> tuple[Path, Path]:
    """A COCO set of `count` pictures with two boxes each; category ids are 10, 20 and 30. `change` may spoil the JSON."""
    content: dict[str, Any] = {
        "images": [{"id": 100 + i, "file_name": f"{i}.{suffix}", "width": WIDTH, "height": HEIGHT} for i in range(count)],
        "annotations": [],
        "categories": [{"id": 10 * (i + 1), "name": name, "supercategory": "animal"} for i, name in enumerate(NAMES)],
    }
    for i in range(count):
        save(folder / "pictures" / f"{i}.{suffix}", draw(boxes_of(i)))
        for name, (x, y, w, h) in boxes_of(i):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 100 + i,
                    "category_id": 10 * (NAMES.index(name) + 1),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h]],
                }
            )
    return _written(folder, content, change)


def write_objects365(folder: Path) -> tuple[Path, Path]:
    """Objects365 v2: names with patches, as the file has them, though the pictures lie directly in patch folders."""

    def as_objects365(content: dict[str, Any]) -> None:
        for image in content["images"]:
            (folder / "pictures" / "patch16").mkdir(exist_ok=True)
            (folder / "pictures" / image["file_name"]).rename(folder / "pictures" / "patch16" / f"objects365_v2_{image['file_name']}")
            image["file_name"] = f"images/v2/patch16/objects365_v2_{image['file_name']}"
        for category, name in zip(content["categories"], ("Cat", "Cabinet/shelf", "Cigar/Cigarette "), strict=True):
            category["name"] = name

    return write_coco(folder, 3, as_objects365)


def write_lvis(folder: Path) -> tuple[Path, Path]:
    """LVIS v1: no `file_name` but a `coco_url`; frequencies, synonyms, and what is annotated in each picture."""

    def as_lvis(content: dict[str, Any]) -> None:
        (folder / "pictures" / "val2017").mkdir()
        for image in content["images"]:
            name = image.pop("file_name")
            (folder / "pictures" / name).rename(folder / "pictures" / "val2017" / name)
            image["coco_url"] = f"http://images.cocodataset.org/val2017/{name}"
            image["neg_category_ids"] = [30]
            image["not_exhaustive_category_ids"] = [10]
        synonyms = (["bow_(weapon)"], ["bow_(decorative_ribbons)"], ["aerosol_can", "spray_can"])
        for category, listed, frequency in zip(content["categories"], synonyms, "rcf", strict=True):
            category |= {"name": listed[0], "synonyms": listed, "frequency": frequency}

    return write_coco(folder, 3, as_lvis)


CAPTION = "a red cat beside a green dog and another red cat"


def write_grounding(folder: Path, count: int = 4, change: Change | None = None) -> tuple[Path, Path]:
    """MDETR's format: in each picture two boxes share the phrase "a red cat" and one, of two spans, is "a dog"; the caption ends on a
    number, so that each picture has one phrase of its own."""
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "object"}]}
    cat, dog = CAPTION.index("a red cat"), CAPTION.index("a green dog")
    for i in range(count):
        caption = f"{CAPTION} {i}"
        name = f"grounding_{i}.png"
        rectangles = [("cat", (4, 8, 30, 40)), ("dog", (50, 10, 24, 32)), ("cat", (80, 8, 12, 40))]
        save(folder / "pictures" / name, draw(rectangles))
        content["images"].append({"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT, "caption": caption})
        spans = [
            [[cat, cat + len("a red cat")]],
            [[dog, dog + 1], [dog + len("a green "), dog + len("a green dog")]],
            [[cat, cat + len("a red cat")]],
        ]
        spans.append([[len(CAPTION) - 3, len(caption)]])
        for (_, box), tokens in zip([*rectangles, rectangles[2]], spans, strict=True):
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": 1, "bbox": list(box), "tokens_positive": tokens}
            )
    return _written(folder, content, change)


def write_vocabulary(path: Path, names: Iterable[str], width: int = 8) -> Path:
    """Embeddings that depend on the name alone."""
    listed = tuple(names)
    rows = np.stack([np.random.default_rng(zlib.crc32(name.encode())).standard_normal(width) for name in listed])
    Vocabulary(listed, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)).save(path)
    return path


def write_data(folder: Path, **keys: Any) -> DataConfig:
    """A data.yaml, read."""
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return read_data(path)


def _written(folder: Path, content: dict[str, Any], change: Change | None) -> tuple[Path, Path]:
    if change is not None:
        change(content)
    path = folder / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path, folder / "pictures"
