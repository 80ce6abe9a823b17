"""Detection sets in COCO's format: COCO, Objects365, LVIS and any custom one, for training and for evaluation.

A class has one or more texts. Training draws a caption among them, evaluation asks with the first. Where they come from:

    a file of class texts   a JSON list with one list of texts for each category, in the order of their ids, as published with YOLO-World
    `coco`                  the category's name
    `objects365`            the name in small letters, split at "/":  "Cabinet/shelf" -> "cabinet", "shelf"
    `lvis`                  the synonyms, written out:  "bow_(weapon)" -> "bow", "bow weapon"

`coco` names a category by its first text or, where classes share that one, by all its texts joined by "/": the names that `crqat-fx embed`
gives to class texts.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from crqat_fx.data.annotations import AnnotatedSet, Tally, UnlabelledError, is_whole, read_json, read_pictures
from crqat_fx.errors import UserError

Format = Literal["coco", "objects365", "lvis"]
Texts = tuple[tuple[str, ...], ...]  # for each class its texts

_LVIS_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclass(frozen=True)
class Category:
    """A class of a set."""

    id: int
    name: str  # as the file has it
    texts: tuple[str, ...]
    entry: Mapping[str, Any]  # the file's entry: `frequency`, `split`, ...


class CocoSet(AnnotatedSet):
    """A detection set: an `EvaluationSet`, and a set that training draws from.

    Crowd annotations stay in `coco`, where evaluation ignores what lies on them, and are not trained on. `skipped` and `repaired` count
    by kind what the annotation file had wrong.
    """

    def __init__(
        self,
        annotations: Path,
        pictures: Path,
        *,
        classes: Sequence[str] | None = None,
        format: Format = "coco",  # noqa: A002  the word that data.yaml uses
        texts: Path | None = None,
    ) -> None:
        """`classes` keeps these categories alone, by the name the file gives them, in this order."""
        self.annotations = annotations
        self._tally = Tally(annotations)
        loaded = read_json(annotations, ("images", "annotations", "categories"))
        self.categories = _chosen(_categories(loaded["categories"], format, texts, annotations), classes, annotations)
        self.texts: Texts = tuple(category.texts for category in self.categories)
        _refuse_twins(self)
        self._pictures, entries = read_pictures(loaded["images"], pictures, self._tally)
        self._entries = tuple({key: entry[key] for key in _LVIS_LISTS if isinstance(entry.get(key), list)} for entry in entries)
        known = {entry["id"] for entry in loaded["categories"]}
        row_of = {category.id: row for row, category in enumerate(self.categories)}

        def label(annotation: Mapping[str, Any], _: int) -> int | None:
            category = annotation.get("category_id")
            if not is_whole(category) or category not in known:
                raise UnlabelledError("annotation of a category that is not listed")
            return row_of.get(category)

        self._read_boxes(loaded["annotations"], label)

    def truth(self, index: int) -> tuple[np.ndarray, np.ndarray, Texts]:
        """What training reads: boxes float32 [n, 4], xyxy and within the picture; labels int64 [n]; the texts that the labels index."""
        rows = self._boxes.trained_rows(index)
        return self._boxes.inside[rows], self._boxes.labels[rows].astype(np.int64), self.texts

    def all_texts(self) -> set[str]:
        """Every caption that training may draw."""
        return {text for texts in self.texts for text in texts}

    @property
    def names(self) -> tuple[str, ...]:
        """What the categories are called in `coco`, no two alike."""
        shared = Counter(texts[0] for texts in self.texts)
        return tuple(texts[0] if shared[texts[0]] == 1 else "/".join(texts) for texts in self.texts)

    @cached_property
    def coco(self) -> dict[str, Any]:
        """COCO's JSON without what was left out; boxes as the file has them."""
        kept = {category.id for category in self.categories}
        images = [
            {"id": int(identity), "file_name": name, "height": int(height), "width": int(width)}
            | {key: [item for item in listed if item in kept] for key, listed in entry.items()}
            for identity, name, (height, width), entry in zip(
                self._pictures.ids, self._pictures.names, self._pictures.sizes, self._entries, strict=True
            )
        ]
        boxes = self._boxes
        picture_of = np.repeat(self._pictures.ids, np.diff(boxes.offsets))
        annotations = [
            {
                "id": int(boxes.ids[row]),
                "image_id": int(picture_of[row]),
                "category_id": self.categories[boxes.labels[row]].id,
                "bbox": boxes.xywh[row].tolist(),
                "area": float(boxes.areas[row]),
                "iscrowd": int(boxes.crowd[row]),
            }
            for row in range(len(boxes.ids))
        ]
        categories = [
            dict(category.entry) | {"name": name, "synonyms": list(category.texts)}
            for name, category in zip(self.names, self.categories, strict=True)
        ]
        return {"images": images, "annotations": annotations, "categories": categories}


def _categories(entries: Sequence[Any], format: Format, texts: Path | None, where: Path) -> list[Category]:  # noqa: A002
    """All categories of a file, by id. There is no mending these: every label hangs on them."""
    for position, entry in enumerate(entries):
        if (
            not isinstance(entry, dict)
            or not is_whole(entry.get("id"))
            or not isinstance(entry.get("name"), str)
            or not entry["name"].strip()
        ):
            raise UserError(
                f"category number {position} has no id or no name", where=where, remedy="give each category a whole id and a name"
            )
    repeated = [identity for identity, count in Counter(entry["id"] for entry in entries).items() if count > 1]
    if repeated:
        raise UserError(f"category id {repeated[0]} is used twice", where=where, remedy="give each category an id of its own")
    ordered = sorted(entries, key=lambda entry: int(entry["id"]))
    if not ordered:
        raise UserError("lists no category", where=where, remedy="give a set with at least one")
    given = _class_texts(texts, len(ordered)) if texts is not None else [_texts_of(entry, format) for entry in ordered]
    return [Category(entry["id"], entry["name"], class_texts, entry) for entry, class_texts in zip(ordered, given, strict=True)]


def _chosen(categories: list[Category], classes: Sequence[str] | None, where: Path) -> tuple[Category, ...]:
    if classes is None:
        return tuple(categories)
    by_name = {category.name: category for category in reversed(categories)}
    for name in classes:
        if name not in by_name:
            raise UserError(f"has no category {name!r}", where=where, remedy=f"it has {', '.join(list(by_name)[:-9:-1])}, ...")
    if len(set(classes)) < len(classes) or not classes:
        raise UserError("the chosen classes are none, or name one twice", where=where, remedy="name each class once")
    return tuple(by_name[name] for name in classes)


def _refuse_twins(dataset: CocoSet) -> None:
    for name, count in Counter(dataset.names).items():
        if count > 1:
            raise UserError(f"has two categories named {name!r}", where=dataset.annotations, remedy="give each a name of its own")


def _texts_of(entry: Mapping[str, Any], format: Format) -> tuple[str, ...]:  # noqa: A002
    if format == "objects365":
        texts = [text.lower() for text in entry["name"].split("/")]
    elif format == "lvis":
        synonyms = entry.get("synonyms")
        listed = synonyms if isinstance(synonyms, list) and all(isinstance(synonym, str) for synonym in synonyms) else []
        texts = [text for synonym in listed or [entry["name"]] for text in _written_out(synonym)]
    else:
        texts = [entry["name"]]
    cleaned = (" ".join(text.split()) for text in texts)
    return tuple(dict.fromkeys(text for text in cleaned if text)) or (entry["name"].strip(),)


def _written_out(synonym: str) -> list[str]:
    """ "bow_(weapon)" is "bow" or "bow weapon"."""
    words = synonym.replace("_", " ")
    bare = re.sub(r"\([^)]*\)", " ", words)
    return [words] if bare == words else [bare, re.sub(r"[()]", " ", words)]


def _class_texts(path: Path, count: int) -> list[tuple[str, ...]]:
    try:
        loaded = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot be read as JSON ({error})", where=path, remedy="give a JSON list with one list of texts for each class"
        ) from error
    if not isinstance(loaded, list) or not all(_is_texts(texts) for texts in loaded):
        raise UserError("is no list of lists of texts", where=path, remedy="give a JSON list with one list of texts for each class")
    if len(loaded) != count:
        raise UserError(
            f"has texts for {len(loaded)} classes, the set has {count}", where=path, remedy="give one list of texts for each class"
        )
    return [tuple(texts) for texts in loaded]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)
