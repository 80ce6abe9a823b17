"""`data.yaml`: what is trained on, what is evaluated on, and where the embeddings of their texts are.

    vocabularies: [objects365.npz, phrases.npz]  # one file or several; a text is looked up in them in this order
    padding: "(empty)"                           # optional: the name in them whose embedding fills empty text slots
    train:                                       # one set or a list of sets
      - annotations: objects365/train.json
        pictures: objects365/train
        format: objects365                       # coco (the default), objects365, lvis or grounding
        weight: 1.0                              # optional: how often an epoch shows each picture of the set
        texts: class_texts.json                  # optional: a list of texts for each category
        classes: [person, car]                   # optional: these categories alone
      - annotations: flickr/final_flickr_separateGT_train.json
        pictures: flickr/images
        format: grounding
    val:                                         # one set, of any format but grounding
      annotations: lvis/lvis_v1_minival.json
      pictures: coco
      format: lvis

Paths are relative to the file's folder. `train` or `val` may be left out where only the other is used.

The published recipe fills empty text slots with the embedding of the empty text. With `padding` it is followed: `crqat-fx embed data.yaml`
embeds the empty text under that name, which may be any that is no text of a set. Without `padding` the slots are zero, a deviation: the
logits of an empty slot are then the bias alone.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crqat_fx.data.coco import CocoSet
from crqat_fx.data.grounding import GroundingSet
from crqat_fx.errors import UserError
from crqat_fx.settings import read_config
from crqat_fx.vocabulary import Vocabulary, prompt

FORMATS = ("coco", "objects365", "lvis", "grounding")
_MOST_WEIGHT = 1000.0


@dataclass(frozen=True)
class SetConfig:
    """One set of `data.yaml`."""

    annotations: Path
    pictures: Path
    format: Literal["coco", "objects365", "lvis", "grounding"] = "coco"
    weight: float = 1.0
    texts: Path | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class DataConfig:
    """A `data.yaml`."""

    path: Path
    train: tuple[SetConfig, ...] = ()
    val: SetConfig | None = None
    vocabularies: tuple[Path, ...] = ()
    padding: str | None = None


def read_data(path: Path) -> DataConfig:
    """Reads a `data.yaml`; the sets themselves are read by `open_set`."""
    given = read_config(path)
    _refuse_unknown(given, ("vocabularies", "padding", "train", "val"), path)
    train = given.get("train", [])
    padding = given.get("padding")
    if padding is not None and not (isinstance(padding, str) and padding):
        raise UserError(f"padding is {padding!r}", where=path, remedy="give the name of a text in the vocabularies")
    vocabularies = given.get("vocabularies", [])
    listed = [vocabularies] if isinstance(vocabularies, str) else vocabularies
    if not isinstance(listed, list):
        raise UserError(f"vocabularies is {vocabularies!r}", where=path, remedy="give a path or a list of paths")
    return DataConfig(
        path=path,
        train=tuple(_set(entry, path, "train") for entry in (train if isinstance(train, list) else [train])),
        val=_validation(given["val"], path) if given.get("val") is not None else None,
        vocabularies=tuple(_path(item, path, "vocabularies") for item in listed),
        padding=padding,
    )


def open_set(config: SetConfig) -> CocoSet | GroundingSet:
    """Reads a set's annotation file."""
    if config.format == "grounding":
        return GroundingSet(config.annotations, config.pictures)
    return CocoSet(config.annotations, config.pictures, classes=config.classes, format=config.format, texts=config.texts)


def open_validation(config: DataConfig) -> CocoSet:
    """The set that is evaluated on."""
    if config.val is None:
        raise UserError("names no set to evaluate on", where=config.path, remedy="add `val` with `annotations` and `pictures`")
    opened = open_set(config.val)
    if isinstance(opened, GroundingSet):  # read_data refuses it; a config made by hand may hold it
        raise UserError("val is a grounding set", where=config.path, remedy="evaluate on a detection set")
    return opened


def open_vocabularies(config: DataConfig) -> list[Vocabulary]:
    """The vocabularies, all of one width."""
    if not config.vocabularies:
        raise UserError(
            "names no vocabulary", where=config.path, remedy="add `vocabularies` with the file that `crqat-fx embed` makes of its texts"
        )
    opened = [Vocabulary.load(path) for path in config.vocabularies]
    for path, vocabulary in zip(config.vocabularies, opened, strict=True):
        if vocabulary.width != opened[0].width:
            what = f"its embeddings have {vocabulary.width} numbers, those of {config.vocabularies[0].name} {opened[0].width}"
            raise UserError(what, where=path, remedy="embed all texts with the same text encoder")
    return opened


def texts_needed(config: DataConfig) -> dict[str, str]:
    """Every text that training may draw and every name that evaluation asks for, each with the prompt to embed it by.

    Phrases and synonyms stand for themselves; the name of a category is prompted by its first synonym, `padding` by the empty text.
    """
    needed: dict[str, str] = {}
    if config.val is not None:
        needed |= {name: prompt(name) for name in open_validation(config).names}
    for one in config.train:
        needed |= {text: text for text in open_set(one).all_texts()}
    if config.padding is not None:
        refuse_padding(config, needed)
        needed[config.padding] = ""
    return dict(sorted(needed.items()))


def refuse_padding(config: DataConfig, texts: Container[str]) -> None:
    """A UserError where `padding` is a text that something is called by."""
    if config.padding in texts:
        raise UserError(f"padding {config.padding!r} is a text of its sets", where=config.path, remedy="give a name that means nothing")


def refuse_missing(texts: Iterable[str], known: Mapping[str, Any], where: Path) -> None:
    """A UserError where a text has no embedding."""
    missing = sorted(text for text in texts if text not in known)
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        what = f"the vocabularies lack {len(missing)} of its texts: {shown}"
        raise UserError(what, where=where, remedy="embed them with `crqat-fx embed`, and add the file to `vocabularies`")


def _set(entry: Any, path: Path, key: str) -> SetConfig:
    if not isinstance(entry, dict):
        raise UserError(f"{key} is {entry!r}", where=path, remedy="give a set with `annotations` and `pictures`")
    _refuse_unknown(entry, ("annotations", "pictures", "format", "weight", "texts", "classes"), path, key)
    form = entry.get("format", "coco")
    if form not in FORMATS:
        raise UserError(f"{key}: format is {form!r}", where=path, remedy=f"give one of {', '.join(FORMATS)}")
    if form == "grounding" and ("texts" in entry or "classes" in entry):
        raise UserError(f"{key}: a grounding set takes no texts and no classes", where=path, remedy="its captions name its classes")
    return SetConfig(
        annotations=_path(entry.get("annotations"), path, f"{key}: annotations"),
        pictures=_path(entry.get("pictures"), path, f"{key}: pictures"),
        format=form,
        weight=_weight(entry.get("weight", 1.0), path, key),
        texts=_path(entry["texts"], path, f"{key}: texts") if entry.get("texts") is not None else None,
        classes=_classes(entry["classes"], path, key) if entry.get("classes") is not None else None,
    )


def _validation(entry: Any, path: Path) -> SetConfig:
    config = _set(entry, path, "val")
    if config.format == "grounding":
        raise UserError("val: a grounding set cannot be evaluated on", where=path, remedy="give a detection set")
    if "weight" in entry:
        raise UserError("val: weight means nothing there", where=path, remedy="remove it")
    return config


def _path(value: Any, path: Path, key: str) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise UserError(f"{key} is {value!r}", where=path, remedy="give a path, relative to this file's folder")
    return path.parent / value


def _weight(value: Any, path: Path, key: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not 0 < value <= _MOST_WEIGHT:
        raise UserError(f"{key}: weight is {value!r}", where=path, remedy=f"give a number above 0, at most {_MOST_WEIGHT:g}")
    return float(value)


def _classes(value: Any, path: Path, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise UserError(f"{key}: classes is {value!r}", where=path, remedy="give a list of category names")
    return tuple(value)


def _refuse_unknown(given: Mapping[Any, Any], known: Sequence[str], path: Path, key: str = "") -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{key + ': ' if key else ''}unknown key {name!r}", where=path, remedy=f"known here are {', '.join(known)}")
