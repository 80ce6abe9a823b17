"""What travels between data sets, training and evaluation: a sample, a batch, and what a set to be evaluated on must offer."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One picture with its boxes and its own texts, before batching. `labels` index `texts`."""

    image: np.ndarray  # uint8 [H, W, 3], RGB
    boxes: np.ndarray  # float32 [n, 4], xyxy in pixels of `image`
    labels: np.ndarray  # int64 [n]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Truth:
    """Ground truth of a batch, padded to the picture with the most boxes."""

    boxes: Tensor  # float32 [B, G, 4], xyxy in input pixels
    labels: Tensor  # int64 [B, G], a slot of the batch's text
    valid: Tensor  # bool [B, G]

    def to(self, device: torch.device | str) -> "Truth":
        return Truth(*(tensor.to(device, non_blocking=True) for tensor in (self.boxes, self.labels, self.valid)))


@dataclass(frozen=True)
class Batch:
    """What a training step reads."""

    images: Tensor  # uint8 [B, 3, H, W], RGB: divided by 255 on the device
    text: Tensor  # float32 [B, N, D], L2-normalised; each picture has its own N texts
    truth: Truth

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.images.to(device, non_blocking=True), self.text.to(device, non_blocking=True), self.truth.to(device))


class EvaluationSet(Protocol):
    """Pictures with their truth, in the terms of COCO's format."""

    @property
    def coco(self) -> dict[str, Any]:
        """`images`, `annotations` and `categories` as COCO's JSON has them.

        LVIS adds `frequency` to the categories, and `neg_category_ids` and `not_exhaustive_category_ids` to the pictures; the drawn task
        adds `split` to the categories, and `frequency` to the base ones.
        """

    def __len__(self) -> int: ...

    def picture(self, index: int) -> np.ndarray:
        """uint8 RGB [H, W, 3] of `coco["images"][index]`."""


def collate(samples: Sequence[Sample], embeddings: Sequence[np.ndarray]) -> Batch:
    """Pads the boxes of some samples of one size to a batch; `embeddings` holds each sample's [N, D] texts, N the same for all."""
    most = max((len(sample.boxes) for sample in samples), default=0)
    boxes = torch.zeros(len(samples), most, 4)
    labels = torch.zeros(len(samples), most, dtype=torch.int64)
    valid = torch.zeros(len(samples), most, dtype=torch.bool)
    for row, sample in enumerate(samples):
        count = len(sample.boxes)
        boxes[row, :count] = torch.from_numpy(sample.boxes)
        labels[row, :count] = torch.from_numpy(sample.labels)
        valid[row, :count] = True
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2).contiguous()
    text = torch.from_numpy(np.stack(embeddings).astype(np.float32, copy=False))
    return Batch(images, text, Truth(boxes, labels, valid))


def fingerprint_of(described: Mapping[str, Any]) -> str:
    """A short hash over plain values: two sources of batches with the same one give the same batches."""
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8).hexdigest()
