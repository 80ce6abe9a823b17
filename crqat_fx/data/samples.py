"""What data sets give, without torch: a sample to train on, and what a set to be evaluated on must offer."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One picture with its boxes and its own texts, before batching. `labels` index `texts`."""

    image: np.ndarray  # uint8 [H, W, 3], RGB
    boxes: np.ndarray  # float32 [n, 4], xyxy in pixels of `image`
    labels: np.ndarray  # int64 [n]
    texts: tuple[str, ...]


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


class FirstPictures:
    """The first pictures of a set, as a set."""

    def __init__(self, whole: EvaluationSet, count: int) -> None:
        self.whole = whole
        images = whole.coco["images"][:count]
        kept = {image["id"] for image in images}
        annotations = [each for each in whole.coco["annotations"] if each["image_id"] in kept]
        self.coco: dict[str, Any] = {**whole.coco, "images": images, "annotations": annotations}

    def __len__(self) -> int:
        return len(self.coco["images"])

    def picture(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        return self.whole.picture(index)
