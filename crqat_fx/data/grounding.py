"""Grounding sets as MDETR writes them (GQA, Flickr): COCO's format with a caption for each picture, whose phrases the boxes belong to.

An annotation's `tokens_positive` are spans [start, end) of its picture's caption; the phrase is the spans, joined. A picture has the
distinct phrases of its own boxes as classes and nothing else: what another caption speaks of may well be in this picture, unmentioned.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crqat_fx.data.annotations import AnnotatedSet, Tally, UnlabelledError, is_whole, read_json, read_pictures
from crqat_fx.data.coco import Texts


class GroundingSet(AnnotatedSet):
    """A grounding set, to be trained on. `skipped` and `repaired` count by kind what the annotation file had wrong."""

    def __init__(self, annotations: Path, pictures: Path) -> None:
        self.annotations = annotations
        self._tally = Tally(annotations)
        loaded = read_json(annotations, ("images", "annotations"))
        self._pictures, entries = read_pictures(loaded["images"], pictures, self._tally)
        rows: dict[str, int] = {}

        def label(annotation: Mapping[str, Any], picture: int) -> int:
            phrase = _phrase(entries[picture].get("caption"), annotation.get("tokens_positive"))
            return rows.setdefault(phrase, len(rows))

        self._read_boxes(loaded["annotations"], label)
        self._phrases = tuple((phrase,) for phrase in rows)

    def truth(self, index: int) -> tuple[np.ndarray, np.ndarray, Texts]:
        """Boxes float32 [n, 4], xyxy and within the picture; labels int64 [n]; this picture's phrases, which the labels index."""
        rows = self._boxes.trained_rows(index)
        phrases, labels = np.unique(self._boxes.labels[rows], return_inverse=True)
        return self._boxes.inside[rows], labels.astype(np.int64), tuple(self._phrases[phrase] for phrase in phrases)

    def all_texts(self) -> set[str]:
        """The phrases of the boxes that are trained on."""
        return {self._phrases[phrase][0] for phrase in np.unique(self._boxes.labels[self._boxes.trained])}


def _phrase(caption: Any, spans: Any) -> str:
    if not isinstance(caption, str):
        raise UnlabelledError("annotation of a picture without a caption")
    if not isinstance(spans, list) or not spans or not all(_is_span(span, len(caption)) for span in spans):
        raise UnlabelledError("annotation without `tokens_positive` spans within its caption")
    phrase = " ".join(" ".join(caption[start:end] for start, end in spans).split())
    if not phrase:
        raise UnlabelledError("annotation whose phrase is empty")
    return phrase


def _is_span(span: Any, length: int) -> bool:
    return isinstance(span, list) and len(span) == 2 and all(is_whole(place) for place in span) and 0 <= span[0] < span[1] <= length
