"""What a full-precision teacher says of a quantized student: features channel by channel (PKD), relations of regions and texts (TRKD).

    pkd     z = (x - mean) / (deviation + 1e-6), each channel over (N, H, W), the deviation unbiased, in student and teacher
            L = sum over levels of 1/2 mean (z_S - z_T)^2

    trkd    a group is a text c of a picture with the positions R_c that the teacher's assignment gives to it
            M_c = [t_c; r_1; ...; r_n], rows L2-normalised,   S_c = M_c M_c^T
            L = mean over all groups of the batch of mean over entries of SmoothL1(S_c of the student - S_c of the teacher)

The first row and column of S_c relate regions to the text, the rest regions to regions; `region-text` and `region-region` are means over
those entries alone. Everything is computed in float32, whatever precision the models ran in; float64 stays.

Groups are of very different sizes. Those of about one size are multiplied together: sizes are rounded up to the powers of two, of which
there are few, so that no loop runs over texts and no group is padded to more than twice its size.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from crqat_fx.assign import Assignment
from crqat_fx.distributed import ALONE, Processes

Relations = Literal["full", "region-text", "region-region"]
EPS = 1e-6


# --- features ---


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], processes: Processes = ALONE) -> Tensor:
    """PKD of feature maps [B,C,h,w], level by level. The batch enters the moments and the mean: twice the pictures, the same loss. With
    several processes the moments are of all their pictures, and the mean over processes of what they return is the loss of all."""
    with torch.autocast(student[0].device.type, enabled=False):
        losses = [
            0.5 * F.mse_loss(_standardised(of_student, processes), _standardised(of_teacher, processes))
            for of_student, of_teacher in zip(student, teacher, strict=True)
        ]
        return torch.stack(losses).sum()


def _standardised(features: Tensor, processes: Processes) -> Tensor:
    x = _wide(features)
    count = processes.count * x.numel() // x.shape[1]
    centred = x - processes.total(x.sum((0, 2, 3), keepdim=True)) / count
    variance = processes.total(centred.square().sum((0, 2, 3), keepdim=True)) / max(count - 1, 1)
    smallest = torch.finfo(x.dtype).tiny  # of a channel that is one number there is no slope of the root
    return centred / (variance.clamp(min=smallest).sqrt() + EPS)


# --- relations ---


def relation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    text: Tensor,
    assignment: Assignment,
    relations: Relations = "full",
    processes: Processes = ALONE,
) -> Tensor:
    """TRKD of regions [B,D,h,w], level by level, with texts [B,N,D], at the positions of the teacher's assignment.

    The mean is over the groups of the whole batch, a picture's texts weighing as much as another's: twice the pictures, the same loss; no
    group gives 0. With several processes the count is of all, and the mean over processes of what they return is the loss of all.
    """
    with torch.autocast(student[0].device.type, enabled=False):
        groups = _Groups(assignment, text.shape[1])
        texts = F.normalize(_wide(text[groups.image, groups.label]), dim=1)
        of_student, of_teacher = (F.normalize(_wide(_rows(levels, groups)), dim=1) for levels in (student, teacher))
        sizes = groups.sizes.to(texts.dtype)
        entries = texts.new_zeros(len(sizes))
        counts = torch.zeros_like(sizes)
        if relations != "region-region":
            entries = entries + 2 * _to_text(of_student, of_teacher, texts, groups)
            counts = counts + 2 * sizes + 1  # the corner, which never differs, among them
        if relations != "region-text":
            entries = entries + _to_each_other(of_student, of_teacher, groups)
            counts = counts + sizes.square()
        of_all = processes.total(sizes.new_tensor(float(len(sizes)))).clamp(min=1)
        return processes.count * (entries / counts).sum() / of_all


class _Groups:
    """The positives of an assignment, sorted by picture and text."""

    def __init__(self, assignment: Assignment, texts: int) -> None:
        image, position = assignment.positive.nonzero(as_tuple=True)
        key = image * texts + assignment.labels[image, position]
        key, order = key.sort(stable=True)
        self.row_image, self.row_position = image[order], position[order]
        keys, self.of_row, self.sizes = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
        self.image, self.label = keys // texts, keys % texts
        self.starts = self.sizes.cumsum(0) - self.sizes

    def of_about_one_size(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some groups at a time: which, the rows of each padded to the largest [g, n], and which of these are rows of it."""
        if not len(self.sizes):
            return
        powers = torch.log2(self.sizes.double()).ceil().long()
        for power in torch.unique(powers).tolist():
            chosen = (powers == power).nonzero().squeeze(1)
            sizes = self.sizes[chosen]
            place = torch.arange(int(sizes.max()), device=sizes.device)
            rows = self.starts[chosen].unsqueeze(1) + place
            valid = place < sizes.unsqueeze(1)
            yield chosen, torch.where(valid, rows, 0), valid


def _rows(levels: Sequence[Tensor], groups: _Groups) -> Tensor:
    """The regions [P, D] at the groups' positions, out of [B,D,h,w] a level."""
    parts, places, first = [], [], 0
    for level in levels:
        width, cells = level.shape[3], level.shape[2] * level.shape[3]
        place = ((groups.row_position >= first) & (groups.row_position < first + cells)).nonzero().squeeze(1)
        cell = groups.row_position[place] - first
        parts.append(level.movedim(1, 3)[groups.row_image[place], cell // width, cell % width])
        places.append(place)
        first += cells
    return torch.cat(parts)[torch.cat(places).argsort()]


def _to_text(student: Tensor, teacher: Tensor, texts: Tensor, groups: _Groups) -> Tensor:
    """A group's sum of SmoothL1 over its first row of S, without the corner."""
    own = texts[groups.of_row]
    wrong = F.smooth_l1_loss((student * own).sum(1), (teacher * own).sum(1), reduction="none")
    return wrong.new_zeros(len(groups.sizes)).index_add(0, groups.of_row, wrong)


def _to_each_other(student: Tensor, teacher: Tensor, groups: _Groups) -> Tensor:
    """A group's sum of SmoothL1 over S without its first row and column."""
    sums, order = [student.new_zeros(0)], [groups.sizes[:0]]
    for chosen, rows, valid in groups.of_about_one_size():
        of_student, of_teacher = student[rows], teacher[rows]
        wrong = F.smooth_l1_loss(of_student @ of_student.mT, of_teacher @ of_teacher.mT, reduction="none")
        both = valid.unsqueeze(1) & valid.unsqueeze(2)
        sums.append(torch.where(both, wrong, 0).sum((1, 2)))
        order.append(chosen)
    return torch.cat(sums)[torch.cat(order).argsort()]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
