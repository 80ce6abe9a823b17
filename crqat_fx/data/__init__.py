"""Data sets, their augmentation, and the drawn task."""
