"""The detection losses as published: binary cross-entropy against the texts, CIoU and the distribution focal loss.

    cls = 0.5   * sum over positions and texts of BCE(logit, target score)
    box = 7.5   * sum over positives of score * (1 - CIoU)
    dfl = 0.375 * sum over positives and 4 sides of score * (cross-entropy against the two bins around the true distance, by nearness)

each divided by the batch's sum of assigned scores (at least 1) and multiplied by the number of pictures. Boxes are measured in cells, so
that strides weigh alike. Everything is computed in float32, whatever precision the model ran in.

With several processes the score sum and the pictures are those of all, and what each returns is multiplied by their number: the mean over
the processes is the loss of the whole batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from crqat_fx.assign import Assignment, assign, ciou
from crqat_fx.data.batch import Truth
from crqat_fx.distributed import ALONE, Processes
from crqat_fx.models.yolo_world import BINS, anchor_points, decode_boxes, flatten_levels

CLS_WEIGHT, BOX_WEIGHT, DFL_WEIGHT = 0.5, 7.5, 0.375
MARGIN = 0.01  # by which a true distance stays under the last bin


@dataclass(frozen=True)
class Losses:
    """The weighted terms of one batch, and the sum of assigned scores (not clamped) the detection's were divided by."""

    cls: Tensor
    box: Tensor
    dfl: Tensor
    score_sum: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)  # what a course adds to them

    @property
    def terms(self) -> dict[str, Tensor]:
        return {"cls": self.cls, "box": self.box, "dfl": self.dfl, **self.others}

    @property
    def total(self) -> Tensor:
        return sum(self.others.values(), self.cls + self.box + self.dfl)


def detection_loss(
    logits: Sequence[Tensor], bins: Sequence[Tensor], truth: Truth, processes: Processes = ALONE
) -> tuple[Losses, Assignment]:
    """The model's logits and bins, level by level, against the truth. A text that only pads counts as one more negative, as published."""
    with torch.autocast(logits[0].device.type, enabled=False):
        points, strides = anchor_points(logits)
        scores = flatten_levels(logits).float()
        with torch.no_grad():
            assignment = assign(scores.sigmoid(), decode_boxes(bins), points, truth)
        score_sum = processes.total(assignment.scores.sum())
        share = processes.count**2 * scores.shape[0] / score_sum.clamp(min=1)

        image, position = assignment.positive.nonzero(as_tuple=True)
        target = assignment.scores[image, position]
        cls = _classification(scores, image, position, assignment)
        cells = strides[position].unsqueeze(1)
        sides = flatten_levels(bins)[image, position].float().unflatten(1, (4, BINS))
        box, dfl = box_losses(sides, points[position] / cells, assignment.boxes[image, position] / cells)
        losses = Losses(
            cls=CLS_WEIGHT * share * cls,
            box=BOX_WEIGHT * share * (box * target).sum(),
            dfl=DFL_WEIGHT * share * (dfl * target).sum(),
            score_sum=score_sum,
        )
    return losses, assignment


def _classification(scores: Tensor, image: Tensor, position: Tensor, assignment: Assignment) -> Tensor:
    """Summed BCE with logits, as softplus(x) - target * x: the target is 0 but for one text of each positive, so it is never laid out."""
    own = scores[image, position, assignment.labels[image, position]]
    return F.softplus(scores).sum() - (own * assignment.scores[image, position]).sum()


def box_losses(sides: Tensor, centres: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """1 - CIoU [P] and the distribution focal loss summed over the sides [P], of bins [P,4,16] against true boxes, all in cells."""
    steps = torch.arange(BINS, device=sides.device, dtype=sides.dtype)
    predicted = sides.softmax(2) @ steps
    overlap = ciou(torch.cat([centres - predicted[:, :2], centres + predicted[:, 2:]], 1), boxes)

    distances = torch.cat([centres - boxes[:, :2], boxes[:, 2:] - centres], 1).clamp(0, BINS - 1 - MARGIN)
    lower = distances.floor()
    above = (distances - lower).unsqueeze(2)
    logs = sides.log_softmax(2)
    at = lower.long().unsqueeze(2)
    dfl = -((1 - above) * logs.gather(2, at) + above * logs.gather(2, at + 1)).sum((1, 2))
    return 1 - overlap, dfl
