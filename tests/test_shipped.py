"""The shipped models are small, safe to read, and as good as they were when they were shipped."""

import pytest
import torch

from crqat_fx.checkpoint import load_model
from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.evaluate import EvaluationResult, evaluate
from crqat_fx.models.yolo_world import size_of
from crqat_fx.shipped import SHIPPED, locate
from crqat_fx.torch_detector import TorchDetector

PICTURES = 100
AP = {"pico-v1": 80.85, "pico-v2": 83.55}  # on the first validation pictures of the drawn task
NOVEL = {"pico-v1": 80.27, "pico-v2": 82.29}  # over the names never trained on


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_is_under_three_megabytes_and_reads_without_running_anything(name):
    path = locate(name)
    assert path.stat().st_size < 3_000_000
    assert torch.load(path, weights_only=True)["metadata"]["size"] == 160
    model, checkpoint = load_model(name)
    assert (size_of(model.config), model.config.version) == ("pico", int(name[-1]))
    assert checkpoint.vocabulary is not None
    assert checkpoint.vocabulary.names == ShapesTask().names


def scored(name: str, pictures: int) -> EvaluationResult:
    task = ShapesTask()
    return evaluate(TorchDetector(load_model(name)[0], task.vocabulary, size=task.size), ShapesSet(task, "val", pictures))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_models_accuracy_holds_on_a_fixed_slice(name):
    result = scored(name, PICTURES)
    assert result.scores.ap == pytest.approx(AP[name], abs=0.3)
    assert result.split["novel"].ap == pytest.approx(NOVEL[name], abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_as_good_as_promised_over_all_names_and_over_the_novel_ones(name):
    result = scored(name, 500)
    assert result.scores.ap >= 64
    assert result.split["novel"].ap >= 58


def test_a_file_of_the_users_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("pico-v1").name == "pico-v1.pt"
    (tmp_path / "pico-v1").write_text("the user's own")
    assert locate("pico-v1").read_text() == "the user's own"
