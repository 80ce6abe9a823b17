"""Training batches of the drawn task, drawn as they are needed."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import cv2
import numpy as np

from crqat_fx.data.batch import Batch, collate, fingerprint_of, slots_of
from crqat_fx.data.samples import Sample
from crqat_fx.data.shapes import BASE_COUNT, MOST_OBJECTS, ShapesTask, stream_of
from crqat_fx.errors import UserError

_ORDER_STREAM = 101  # beyond the streams of the splits
_AUGMENT_STREAM = 102


class ShapesBatches:
    """Training batches of the drawn task, an endless and resumable stream: batch `step` is a pure function of the seed and the step.

    An epoch is the first `count` training pictures in an order of its own. Each picture gets `texts` texts: its own names and as many
    other base names, in random order. Augmented by a horizontal flip and a change of brightness alone. Pictures are drawn when they
    are first needed and kept as long as they fit into `memory` bytes.
    """

    def __init__(
        self,
        task: ShapesTask,
        count: int = 8000,
        batch: int = 16,
        texts: int = 40,
        *,
        seed: int = 0,
        split: str = "train",
        flip: float = 0.5,
        brightness: float = 0.2,
        memory: int = 1 << 30,
    ) -> None:
        if count < 1 or batch < 1:
            raise UserError(f"no batches of {batch} can be made of {count} pictures of the drawn task")
        if not MOST_OBJECTS <= texts <= BASE_COUNT:
            raise UserError(
                f"{texts} texts a picture are not possible on the drawn task", remedy=f"choose {MOST_OBJECTS} to {BASE_COUNT} texts"
            )
        if split == "val":
            raise UserError("the split val of the drawn task shows novel names", remedy="train on the split train or calibration")
        stream_of(split)
        self.task, self.split, self.count, self.batch, self.texts = task, split, count, batch, texts
        self.seed, self.flip, self.brightness = seed, flip, brightness
        kept = min(count, memory // (task.size * task.size * 3))
        self.skipped: Counter[str] = Counter()  # what is drawn is never broken
        self.repaired: Counter[str] = Counter()
        self._images = np.empty((kept, task.size, task.size, 3), np.uint8)
        self._drawn: dict[int, Sample] = {}

    @property
    def text_width(self) -> int:
        return self.task.vocabulary.width

    @property
    def fingerprint(self) -> str:
        """A short hash over what decides the batches."""
        decisive = ("split", "count", "batch", "texts", "seed", "flip", "brightness")
        return fingerprint_of({"task": asdict(self.task)} | {name: getattr(self, name) for name in decisive})

    def batches(self, start_step: int = 0, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """`part`: which of how many equal parts of each batch."""
        for step in itertools.count(start_step):
            yield self.at(step, part)

    def at(self, step: int, part: tuple[int, int] = (0, 1)) -> Batch:
        """The batch of a step, counted from 0, or a part of it."""
        first = step * self.batch
        positions = [first + slot for slot in slots_of(part, self.batch)]
        orders = {epoch: self._order(epoch) for epoch in {position // self.count for position in positions}}
        pairs = [self._augmented(int(orders[position // self.count][position % self.count]), position) for position in positions]
        return collate([sample for sample, _ in pairs], [embeddings for _, embeddings in pairs])

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, _ORDER_STREAM, epoch]).permutation(self.count)

    def _augmented(self, index: int, position: int) -> tuple[Sample, np.ndarray]:
        sample = self._sample(index)
        rng = np.random.default_rng([self.seed, _AUGMENT_STREAM, position])
        image, boxes = sample.image, sample.boxes
        if rng.random() < self.flip:
            image = cv2.flip(image, 1)
            boxes = boxes[:, [2, 1, 0, 3]]
            boxes[:, [0, 2]] = self.task.size - boxes[:, [0, 2]]
        image = cv2.convertScaleAbs(image, alpha=rng.uniform(1 - self.brightness, 1 + self.brightness))
        present = np.unique(sample.labels)
        others = np.setdiff1d(np.arange(BASE_COUNT), present)
        shown = rng.permutation(np.concatenate([present, rng.permutation(others)[: self.texts - len(present)]]))
        slots = np.argsort(shown)
        labels = slots[np.searchsorted(shown, sample.labels, sorter=slots)]
        texts = tuple(self.task.names[label] for label in shown)
        return Sample(image, boxes, labels, texts), self.task.vocabulary.embeddings[shown]

    def _sample(self, index: int) -> Sample:
        sample = self._drawn.get(index)
        if sample is not None:
            return sample
        sample = self.task.draw(self.split, index)
        if index < len(self._images):
            self._images[index] = sample.image
            sample = self._drawn[index] = Sample(self._images[index], sample.boxes, sample.labels, sample.texts)
        return sample
