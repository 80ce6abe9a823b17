"""Which texts a training picture is shown: its own classes, some that it lacks, in random order, each by one of its names.

Every picture gets the same number of slots. What is left of them stays empty (`EMPTY`), where there are too few classes: a grounding
picture has no other negatives than the phrases of the pictures in its mosaic. An empty slot is no class, and its logits take the whole
negative loss, as published.
"""

from collections.abc import Sequence

import numpy as np

from crqat_fx.data.coco import Texts

EMPTY = ""


def merged(vocabularies: Sequence[Texts]) -> tuple[Texts, list[np.ndarray]]:
    """One vocabulary of several, and for each of them where its classes went: classes with the same texts become one."""
    first = vocabularies[0]
    if all(texts is first for texts in vocabularies):
        return first, [np.arange(len(first))] * len(vocabularies)
    rows: dict[tuple[str, ...], int] = {}
    places = [np.array([rows.setdefault(texts, len(rows)) for texts in vocabulary], dtype=np.int64) for vocabulary in vocabularies]
    return tuple(rows), places


def sample_texts(labels: np.ndarray, classes: Texts, slots: int, rng: np.random.Generator) -> tuple[tuple[str, ...], np.ndarray]:
    """`slots` texts for a picture with these labels, and each label's slot; -1 where a picture has more classes than slots and this one
    was left out."""
    positives = np.unique(labels)
    if len(positives) > slots:
        positives = rng.choice(positives, slots, replace=False)
    others = np.setdiff1d(np.arange(len(classes)), positives)
    negatives = rng.choice(others, min(len(others), slots - len(positives)), replace=False)
    chosen = rng.permutation(np.concatenate([positives, negatives]).astype(np.int64))
    slot_of = np.full(len(classes), -1, dtype=np.int64)
    slot_of[chosen] = np.arange(len(chosen))
    texts = [classes[row][rng.integers(len(classes[row]))] for row in chosen]
    return (*texts, *[EMPTY] * (slots - len(texts))), slot_of[labels]
