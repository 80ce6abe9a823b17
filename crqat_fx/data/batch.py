"""What a training step reads: samples padded to one batch of tensors, with its truth."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crqat_fx.data.samples import Sample


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


def slots_of(part: tuple[int, int], batch: int) -> range:
    """The places in a batch that a part of it takes: which, of how many equal ones, in order."""
    which, count = part
    if batch % count:
        raise ValueError(f"a batch of {batch} has no {count} equal parts")
    size = batch // count
    return range(which * size, (which + 1) * size)


def fingerprint_of(described: Mapping[str, Any]) -> str:
    """A short hash over plain values: two sources of batches with the same one give the same batches."""
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8).hexdigest()
