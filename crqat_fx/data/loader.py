"""Training batches from the sets of a `data.yaml`.

Every picture of every batch is a pure function of the seed, the step and its place in the batch: the number of workers changes nothing,
and a stopped training goes on with the batches it would have seen. An epoch shows each picture as often as its set's weight says (1.5:
every picture once, a random half of them twice), all sets shuffled together; epochs follow one another without a gap. The other three
pictures of a mosaic come from the set of the first, as published: what one set annotates another may leave out.
"""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from crqat_fx.data.augment import Augmentation, Boxed, augmented
from crqat_fx.data.batch import Batch, collate, fingerprint_of, slots_of
from crqat_fx.data.coco import Texts
from crqat_fx.data.config import DataConfig, open_set, open_vocabularies, refuse_missing, refuse_padding
from crqat_fx.data.samples import Sample
from crqat_fx.data.texts import EMPTY, merged, sample_texts
from crqat_fx.errors import UserError

log = logging.getLogger(__name__)

_TRIES = 100  # unreadable pictures in a row before the set counts as broken


class TrainingSet(Protocol):
    """Pictures with boxes and texts, as `CocoSet` and `GroundingSet` offer them."""

    @property
    def annotations(self) -> Path: ...

    @property
    def indices(self) -> np.ndarray:
        """The pictures to train on."""

    def name(self, index: int) -> str: ...

    def picture(self, index: int) -> np.ndarray:
        """uint8 RGB [H, W, 3], or a UserError."""

    def truth(self, index: int) -> tuple[np.ndarray, np.ndarray, Texts]:
        """Boxes float32 [n, 4], xyxy in pixels; labels int64 [n]; the texts that the labels index."""


@dataclass(frozen=True)
class Broken:
    """A picture that could not be read, and why."""

    name: str
    why: str


class Samples:
    """The training pictures of some sets."""

    def __init__(
        self,
        sets: Sequence[TrainingSet],
        weights: Sequence[float],
        *,
        batch: int,
        texts: int,
        augmentation: Augmentation,
        mosaic_until: int | None,
        seed: int,
    ) -> None:
        self.batch = batch
        self.texts = texts
        self.augmentation = augmentation
        self.mosaic_until = mosaic_until
        self.seed = seed
        self._sets = tuple(sets)
        self._shown = [max(round(len(one.indices) * weight), 1) for one, weight in zip(sets, weights, strict=True)]
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Pictures in an epoch."""
        return sum(self._shown)

    def sample(self, step: int, slot: int) -> tuple[Sample, list[Broken]]:
        """The picture at a place of a step's batch, and the pictures that should have been in it and could not be read."""
        rng = np.random.default_rng((self.seed, 1, step, slot))
        epoch, place = divmod(step * self.batch + slot, len(self))
        which, index = self._epoch(epoch)[place]
        dataset = self._sets[which]
        indices = [int(index)]
        if self.mosaic_until is None or step < self.mosaic_until:
            indices += [int(other) for other in rng.choice(dataset.indices, 3)]
        broken: list[Broken] = []
        pictures, vocabularies = zip(*(_read(dataset, one, rng, broken) for one in indices), strict=True)
        classes, places = merged(vocabularies)
        relabelled = [replace(picture, labels=rows[picture.labels]) for picture, rows in zip(pictures, places, strict=True)]
        result = augmented(relabelled, self.augmentation, rng)
        texts, slots = sample_texts(result.labels, classes, self.texts, rng)
        kept = slots >= 0
        return Sample(result.image, result.boxes[kept], slots[kept], texts), broken

    def _epoch(self, epoch: int) -> np.ndarray:
        """Rows (set, index) in the order of an epoch."""
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, 0, epoch))
            parts = []
            for which, (dataset, count) in enumerate(zip(self._sets, self._shown, strict=True)):
                rounds, rest = divmod(count, len(dataset.indices))
                indices = [dataset.indices] * rounds + [rng.choice(dataset.indices, rest, replace=False)]
                parts.append(np.stack([np.full(count, which), np.concatenate(indices)], axis=1))
            self._order = epoch, rng.permutation(np.concatenate(parts))
        return self._order[1]


class DetectionBatches:
    """Endless training batches from the `train` sets of a `data.yaml`.

    `mosaic_until` is the step from which on pictures come without mosaic; the published recipe goes without for the last 2 of 100 epochs.
    `skipped` counts by kind what could not be used: in the annotation files, and the pictures that could not be read so far.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        batch: int,
        augmentation: Augmentation | None = None,
        texts: int = 80,
        seed: int = 0,
        workers: int = 0,
        mosaic_until: int | None = None,
        start_method: str | None = None,
    ) -> None:
        """`start_method` is how worker processes start: `fork`, `spawn`, `forkserver`, or as the system does by default."""
        for name, value, least in (("batch", batch, 1), ("texts", texts, 1), ("seed", seed, 0), ("workers", workers, 0)):
            if value < least:
                raise UserError(f"{name} is {value}", remedy=f"give at least {least}")
        if not config.train:
            raise UserError("names no set to train on", where=config.path, remedy="add `train` with `annotations` and `pictures`")
        self._config = config
        self._workers = workers
        self._start_method = start_method
        vocabularies = open_vocabularies(config)
        self._embeddings = np.concatenate([vocabulary.embeddings for vocabulary in vocabularies])
        names = [name for vocabulary in vocabularies for name in vocabulary.names]
        self._rows = {name: row for row, name in reversed(list(enumerate(names)))}
        self._add_padding(config)
        sets = [open_set(one) for one in config.train]
        for one in sets:
            if not len(one.indices):
                raise UserError("has no picture of at least 32 px to train on", where=one.annotations, remedy="give larger pictures")
            if not one.trained_boxes:
                what = "has no box to train on: every one is a crowd, outside its picture, or on a picture under 32 px"
                raise UserError(what, where=one.annotations, remedy="leave the set out, or give one with boxes of single objects")
            texts_of_set = one.all_texts()
            refuse_missing(texts_of_set, self._rows, one.annotations)
            refuse_padding(config, texts_of_set)
        self.skipped: Counter[str] = sum((one.skipped for one in sets), Counter())
        self.repaired: Counter[str] = sum((one.repaired for one in sets), Counter())
        self._broken: set[str] = set()
        self.samples = Samples(
            sets,
            [one.weight for one in config.train],
            batch=batch,
            texts=texts,
            augmentation=augmentation or Augmentation(),
            mosaic_until=mosaic_until,
            seed=seed,
        )

    @property
    def pictures(self) -> int:
        """Pictures in an epoch."""
        return len(self.samples)

    @property
    def text_width(self) -> int:
        return int(self._embeddings.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """A short hash over what decides the batches: the sets' annotations and texts, their weights, the embeddings, the settings. The
        pictures' files are not read, and where any file lies does not count; nor does the number of workers, which changes nothing."""
        sets = [
            {
                "annotations": _digest(one.annotations),
                "format": one.format,
                "weight": one.weight,
                "texts": _digest(one.texts) if one.texts is not None else None,
                "classes": one.classes,
            }
            for one in self._config.train
        ]
        return fingerprint_of(
            {
                "sets": sets,
                "vocabularies": [_digest(path) for path in self._config.vocabularies],
                "padding": self._config.padding,
                "batch": self.samples.batch,
                "texts": self.samples.texts,
                "seed": self.samples.seed,
                "mosaic_until": self.samples.mosaic_until,
                "augmentation": asdict(self.samples.augmentation),
            }
        )

    def batches(self, start_step: int = 0, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """The batches from a step on, or of each the part that is asked for: which, of how many equal ones."""
        loader = DataLoader(
            _Steps(self.samples, slots_of(part, self.samples.batch)),
            batch_size=None,
            sampler=itertools.count(start_step),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            multiprocessing_context=self._start_method if self._workers else None,
            generator=torch.Generator(),  # or each start would draw from the global generator
        )
        for drawn in loader:
            if isinstance(drawn, str):
                raise UserError(drawn)
            for broken in drawn.broken:
                self._count(broken)
            yield replace(drawn.batch, text=self._text(drawn.texts))

    def _text(self, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        rows = [[self._rows[text] for text in listed] for listed in texts]
        return torch.from_numpy(self._embeddings[rows])

    def _count(self, broken: Broken) -> None:
        if broken.name in self._broken:
            return
        self._broken.add(broken.name)
        self.skipped["picture that cannot be read"] += 1
        log.warning("left out of the training: %s", broken.why)

    def _add_padding(self, config: DataConfig) -> None:
        """Gives the empty text the embedding that `padding` names. Without one it is zero, so that an empty slot's logits are the bias: a
        deviation, which `config` describes."""
        if config.padding is None:
            self._embeddings = np.concatenate([self._embeddings, np.zeros_like(self._embeddings[:1])])
            self._rows[EMPTY] = len(self._embeddings) - 1
            return
        if config.padding not in self._rows:
            raise UserError(
                f"padding {config.padding!r} is in none of the vocabularies",
                where=config.path,
                remedy="make one of this file with `crqat-fx embed`, or remove the key",
            )
        self._rows[EMPTY] = self._rows[config.padding]


@dataclass(frozen=True)
class _Drawn:
    """A batch as a worker makes it: the texts' embeddings stay in the main process, which looks them up."""

    batch: Batch
    texts: tuple[tuple[str, ...], ...]
    broken: tuple[Broken, ...]


class _Steps(Dataset[_Drawn | str]):
    """The batch of a step. A UserError comes as its text: a worker's exception would come as a traceback."""

    def __init__(self, samples: Samples, slots: range) -> None:
        self.samples = samples
        self.slots = slots

    def __getitem__(self, step: int) -> _Drawn | str:
        try:
            drawn = [self.samples.sample(step, slot) for slot in self.slots]
        except UserError as error:
            return str(error)
        samples = [sample for sample, _ in drawn]
        batch = collate(samples, [np.empty((self.samples.texts, 0))] * len(samples))
        return _Drawn(batch, tuple(sample.texts for sample in samples), tuple(one for _, broken in drawn for one in broken))


def _read(dataset: TrainingSet, index: int, rng: np.random.Generator, broken: list[Broken]) -> tuple[Boxed, Texts]:
    """The picture, or in place of one that cannot be read another of the set."""
    for _ in range(_TRIES):
        try:
            image = dataset.picture(index)
        except UserError as error:
            broken.append(Broken(f"{dataset.annotations}: {dataset.name(index)}", str(error)))
            index = int(rng.choice(dataset.indices))
            continue
        boxes, labels, texts = dataset.truth(index)
        return Boxed(image, boxes, labels), texts
    what = f"{_TRIES} of its pictures in a row cannot be read, the last: {broken[-1].why}"
    raise UserError(what, where=dataset.annotations, remedy="check the `pictures` folder of the set")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_it_is(drawn: Any) -> Any:
    return drawn


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # one process a core, and OpenCV's threads do not survive a fork
