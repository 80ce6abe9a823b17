"""A small evaluation set out of what a test gives it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from crqat_fx.errors import UserError


@dataclass(frozen=True)
class ListedSet:
    """Pictures and COCO's terms for them; None stands for a picture that cannot be read."""

    coco: dict[str, Any]
    pictures: tuple[np.ndarray | None, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def picture(self, index: int) -> np.ndarray:
        picture = self.pictures[index]
        if picture is None:
            raise UserError("is no picture", where=self.coco["images"][index]["file_name"])
        return picture
