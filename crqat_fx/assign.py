"""Task-aligned assignment: which positions answer for which ground-truth boxes, and with what target score.

    alignment(truth, position) = score of the truth's text ** ALPHA * overlap ** BETA,   overlap = CIoU of the position's box, at least 0

A truth claims the `TOP` best aligned of the positions whose centres lie strictly inside it. A position claimed by several truths goes to
the one it overlaps most, of all truths of the picture. Target of a positive = alignment * (its truth's best overlap) / (its truth's best
alignment), over the positives it was left.

Only pairs of a truth and a centre inside it are ever compared, so memory is a mask and one float a (picture, truth, position).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crqat_fx.data.batch import Truth

TOP = 10
ALPHA, BETA = 0.5, 6.0
EPS = 1e-9
CIOU_EPS = 1e-7


@dataclass(frozen=True)
class Assignment:
    """What every position of a batch should say."""

    positive: Tensor  # bool [B, A]
    labels: Tensor  # int64 [B, A], text slot; 0 where not positive
    boxes: Tensor  # float32 [B, A, 4], xyxy in input pixels; 0 where not positive
    scores: Tensor  # float32 [B, A], target of the positive's own label; 0 where not positive
    truth: Tensor  # int64 [B, A], index into the picture's truths; -1 where not positive


def ciou(first: Tensor, second: Tensor) -> Tensor:
    """Complete IoU of paired xyxy boxes [..., 4]: IoU - centre distance^2 / enclosing diagonal^2 - alpha * v, where v compares the aspect
    ratios and alpha = v / (1 - IoU + v) counts as a constant in the gradient."""
    x1, y1, x2, y2 = first.unbind(-1)
    u1, v1, u2, v2 = second.unbind(-1)
    width, height = x2 - x1, y2 - y1
    other_width, other_height = u2 - u1, v2 - v1
    common = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0) * (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    iou = common / (width * height + other_width * other_height - common + CIOU_EPS)
    diagonal = (torch.maximum(x2, u2) - torch.minimum(x1, u1)) ** 2 + (torch.maximum(y2, v2) - torch.minimum(y1, v1)) ** 2 + CIOU_EPS
    distance = ((x1 + x2 - u1 - u2) ** 2 + (y1 + y2 - v1 - v2) ** 2) / 4
    angles = torch.atan(other_width / (other_height + CIOU_EPS)) - torch.atan(width / (height + CIOU_EPS))
    aspect = (4 / math.pi**2) * angles**2
    with torch.no_grad():
        alpha = aspect / (aspect - iou + 1 + CIOU_EPS)
    return iou - distance / diagonal - alpha * aspect


@torch.no_grad()
def assign(scores: Tensor, boxes: Tensor, points: Tensor, truth: Truth) -> Assignment:
    """Sigmoid scores [B,A,N], predicted boxes [B,A,4] and centres [A,2] in input pixels, against the truths of the batch."""
    batch, positions, _ = scores.shape
    truths = truth.boxes.shape[1]
    result = Assignment(
        positive=torch.zeros(batch, positions, dtype=torch.bool, device=scores.device),
        labels=torch.zeros(batch, positions, dtype=torch.int64, device=scores.device),
        boxes=torch.zeros(batch, positions, 4, device=scores.device),
        scores=torch.zeros(batch, positions, device=scores.device),
        truth=torch.full((batch, positions), -1, dtype=torch.int64, device=scores.device),
    )
    if truths == 0 or positions == 0:
        return result

    inside = _centres_inside(points, truth)
    image, owner, position = inside.nonzero(as_tuple=True)
    alignment = torch.zeros(batch, truths, positions, device=scores.device)
    alignment[image, owner, position] = _alignment(scores, boxes, truth, image, owner, position)[0]
    best = alignment.topk(min(TOP, positions), dim=2).indices
    claimed = torch.zeros_like(inside).scatter_(2, best, True) & inside
    _give_contested_to_the_highest_overlap(claimed, boxes, truth)

    image, owner, position = claimed.nonzero(as_tuple=True)
    aligned, overlap = _alignment(scores, boxes, truth, image, owner, position)
    group = image * truths + owner
    best_aligned = aligned.new_zeros(batch * truths).scatter_reduce_(0, group, aligned, "amax")
    best_overlap = overlap.new_zeros(batch * truths).scatter_reduce_(0, group, overlap, "amax")
    result.positive[image, position] = True
    result.labels[image, position] = truth.labels[image, owner]
    result.boxes[image, position] = truth.boxes[image, owner]
    result.scores[image, position] = aligned * best_overlap[group] / (best_aligned[group] + EPS)
    result.truth[image, position] = owner
    return result


def _centres_inside(points: Tensor, truth: Truth) -> Tensor:
    """bool [B,G,A]: which centres lie strictly inside which truths. Padding holds none."""
    x, y = points.unbind(-1)
    x1, y1, x2, y2 = truth.boxes.unsqueeze(2).unbind(-1)
    inside = x - x1 > EPS
    for side in (y - y1, x2 - x, y2 - y):
        inside &= side > EPS
    return inside & truth.valid.unsqueeze(2)


def _alignment(scores: Tensor, boxes: Tensor, truth: Truth, image: Tensor, owner: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Alignment and overlap [P] of pairs of a truth and a position, each given by three indices."""
    overlap = ciou(boxes[image, position].float(), truth.boxes[image, owner]).clamp(min=0)
    score = scores[image, position, truth.labels[image, owner]].float()
    return score**ALPHA * overlap**BETA, overlap


def _give_contested_to_the_highest_overlap(claimed: Tensor, boxes: Tensor, truth: Truth) -> None:
    """Leaves each position of `claimed` [B,G,A] at most one truth, in place."""
    image, position = (claimed.sum(1) > 1).nonzero(as_tuple=True)
    overlap = ciou(boxes[image, position].float().unsqueeze(1), truth.boxes[image]).clamp(min=0)
    winner = overlap.masked_fill(~truth.valid[image], -1).argmax(1)
    claimed[image, :, position] = False
    claimed[image, winner, position] = True
