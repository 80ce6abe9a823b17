"""The detector on a PyTorch model with YOLO-World's contract, and how it is opened from a model's file."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from crqat_fx.checkpoint import Checkpoint
from crqat_fx.detect import DetectSettings, open_vocabulary
from crqat_fx.detections import LARGEST, STEP, Detections, Picked, Selection, check_picture, check_size, postprocess
from crqat_fx.device import usable_device
from crqat_fx.errors import UserError
from crqat_fx.pictures import letterbox
from crqat_fx.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


class TorchDetector:
    """Detects with a model of YOLO-World's contract, (images, text) -> (logits, bins, regions), which it moves to `device` and sets to
    evaluation. Pictures of any size are letterboxed to `size`; those of one call run as one batch."""

    def __init__(
        self,
        model: nn.Module,
        vocabulary: Vocabulary,
        size: int = 640,
        conf: float = 0.001,
        iou: float = 0.7,
        max_detections: int = 300,
        nms_candidates: int = 30_000,
        device: str | torch.device = "cpu",
    ) -> None:
        check_size(size)
        self.vocabulary = vocabulary
        self.size = size
        self.selection = Selection(conf, iou, max_detections, nms_candidates)
        self.device = usable_device(device)
        self.model = model.to(self.device).eval()
        self._text = torch.from_numpy(vocabulary.embeddings).to(self.device)

    @property
    def names(self) -> tuple[str, ...]:
        return self.vocabulary.names

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        if not pictures:
            return []
        for picture in pictures:
            check_picture(picture)
        boxed, placements = zip(*(letterbox(picture, self.size) for picture in pictures), strict=True)
        try:
            with torch.inference_mode():
                stacked = torch.from_numpy(np.stack(boxed)).to(self.device)
                images = stacked.permute(0, 3, 1, 2).contiguous().float().div_(255)
                logits, bins, _regions = self.model(images, self._text.expand(len(pictures), -1, -1))
                distances = [level.float().cpu().numpy() for level in bins]
                picked = [[pick_tensor(level[row], self.selection.floor) for level in logits] for row in range(len(pictures))]
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"does not fit the memory of {self.device} with {len(pictures)} pictures of {self.size} px",
                where="detect",
                remedy="take a smaller --batch or --size",
            ) from error
        return [
            postprocess(picked[row], [level[row] for level in distances], placement, self.selection)
            for row, placement in enumerate(placements)
        ]


def pick_tensor(logits: Tensor, floor: float) -> Picked:
    """`detections.pick` where the logits are: only what passes is copied, converted and moved."""
    flat = logits.flatten()
    places = (flat <= floor).logical_not_().nonzero().squeeze(1)
    return Picked(flat[places].float().cpu().numpy(), places.cpu().numpy())


@dataclass(frozen=True, eq=False)
class TorchModel:
    """A model's file, loaded, before it is known how it is to be run."""

    module: nn.Module
    checkpoint: Checkpoint
    takes_text: ClassVar[bool] = True

    @property
    def weights(self) -> str:
        """Which of a trained model's: `average` or `raw`; `only` of any other."""
        return str(self.checkpoint.extra.get("weights", "only"))

    def carried_settings(self) -> dict[str, Any]:
        return carried_settings(self.checkpoint)

    def detector(self, settings: DetectSettings, vocabulary: Vocabulary | None = None) -> TorchDetector:
        """`vocabulary` is the data's and goes before the file's own; that of the settings goes before both."""
        checkpoint = self.checkpoint
        chosen = open_vocabulary(checkpoint.vocabulary if vocabulary is None else vocabulary, settings, checkpoint.path)
        chosen.check_width(checkpoint.config.text_width, settings.vocabulary or checkpoint.path)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        return TorchDetector(self.module, chosen, settings.size, settings.conf, settings.iou, settings.max, device=settings.device)


def carried_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model's file says of the settings: the picture size that it was trained for."""
    size = checkpoint.extra.get("size")
    if size is None:
        return {}
    if not isinstance(size, int) or not STEP <= size <= LARGEST or size % STEP:
        logger.warning("%s: the picture size in it, %r, is no multiple of %d up to %d: not used", checkpoint.path, size, STEP, LARGEST)
        return {}
    return {"size": size}
