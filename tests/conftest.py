"""One thread a process: the suite runs its files side by side, and small tensors gain nothing from more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # after the variable that it reads

torch.set_num_threads(1)
