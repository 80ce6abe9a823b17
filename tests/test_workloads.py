"""What the inference benchmarks run is the same in every process: figures of two runs are of one model."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from workloads import drawn_model


@pytest.mark.parametrize("version", [1, 2])
def test_a_model_is_drawn_by_its_own_seed_alone(version: int) -> None:
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        drawn.append(drawn_model("pico", version).state_dict())
    assert [name for name, value in drawn[0].items() if not torch.equal(value, drawn[1][name])] == []
