"""Ground truth written by hand."""

import torch

from crqat_fx.data.batch import Truth

Row = tuple[int, float, float, float, float]


def truth_of(*pictures: list[Row]) -> Truth:
    """One list of (label, x1, y1, x2, y2) a picture, padded to the longest."""
    most = max(len(rows) for rows in pictures)
    boxes = torch.zeros(len(pictures), most, 4)
    labels = torch.zeros(len(pictures), most, dtype=torch.int64)
    valid = torch.zeros(len(pictures), most, dtype=torch.bool)
    for picture, rows in enumerate(pictures):
        for slot, (label, *box) in enumerate(rows):
            boxes[picture, slot] = torch.tensor(box)
            labels[picture, slot] = label
            valid[picture, slot] = True
    return Truth(boxes, labels, valid)
