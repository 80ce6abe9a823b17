import json
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from crqat_fx.checkpoint import load_model
from crqat_fx.data.augment import Augmentation
from crqat_fx.data.loader import DetectionBatches
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.data.shapes_batches import ShapesBatches
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import Size, config_for
from crqat_fx.pretrain import PretrainSettings, open_source, pretrain
from crqat_fx.settings import resolve
from crqat_fx.vocabulary import Vocabulary

DRAWN = PretrainSettings(steps=2, batch=2, model="pico", size=64, texts=20, pictures=4, log_every=1)


ON_A_FILE = PretrainSettings(steps=2, batch=2, model="pico", size=64, texts=4, data="data.yaml", log_every=1)


def write_set(folder: Path, width: int = 16, vocabularies: int = 1) -> Path:
    """Three pictures with a box each, of two categories, and the data.yaml that names them."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, 4):
        cv2.imwrite(str(folder / f"{number}.png"), rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
        box = {"bbox": [4, 6, 40, 30], "area": 1200, "iscrowd": 0}
        annotations.append({"id": number, "image_id": number, "category_id": 1 + number % 2, **box})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    (folder / "train.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    names = [f"v{number}.npz" for number in range(vocabularies)]
    for name in names:
        Vocabulary(("cat", "dog"), rng.standard_normal((2, width), dtype=np.float32)).save(folder / name)
    (folder / "data.yaml").write_text(f"vocabularies: [{', '.join(names)}]\ntrain:\n  annotations: train.json\n  pictures: .\n")
    return folder / "data.yaml"


def test_trains_on_the_drawn_task_and_the_file_carries_its_vocabulary_and_size(tmp_path: Path) -> None:
    result = pretrain(DRAWN, tmp_path)
    assert result.steps == 2
    model, checkpoint = load_model(result.model)
    assert model.config == config_for("pico", 1)
    assert checkpoint.vocabulary is not None
    assert len(checkpoint.vocabulary) == 240
    assert checkpoint.extra["size"] == 64
    assert resolve(PretrainSettings, {}, tmp_path / "settings.yaml").values == DRAWN


def test_the_seed_decides_the_start_and_the_classification_bias_fits_texts_and_size(tmp_path: Path) -> None:
    starts = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(replace(DRAWN, steps=0, seed=seed), tmp_path / run)
        starts.append(load_model(tmp_path / run / "model.pt")[0].state_dict())
    first, again, other = starts
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.image_model.stem.conv.weight"], other["backbone.image_model.stem.conv.weight"])
    bias = first["bbox_head.head_module.cls_contrasts.1.bias"].item()
    assert bias == pytest.approx(math.log(5 / 20 / (64 / 16) ** 2))


def test_a_stopped_run_goes_on_with_other_workers_and_logging(tmp_path: Path) -> None:
    settings = replace(ON_A_FILE, data=str(write_set(tmp_path)))
    pretrain(settings, tmp_path / "run")
    assert pretrain(replace(settings, workers=1, log_every=5), tmp_path / "run", resume=True).steps == 2
    with pytest.raises(UserError, match="texts 4, not 5"):
        pretrain(replace(settings, texts=5), tmp_path / "run", resume=True)


def test_trains_on_a_detection_set_with_the_text_width_of_its_vocabulary(tmp_path: Path) -> None:
    settings = replace(ON_A_FILE, data=str(write_set(tmp_path)))
    result = pretrain(settings, tmp_path / "run")
    model, checkpoint = load_model(result.model)
    assert model.config == replace(config_for("pico", 1), text_width=16)
    assert checkpoint.vocabulary is not None
    assert checkpoint.vocabulary.names == ("cat", "dog")


def test_several_vocabularies_leave_the_file_without_one(tmp_path: Path) -> None:
    source, vocabulary = open_source(replace(ON_A_FILE, data=str(write_set(tmp_path, vocabularies=2))))
    assert vocabulary is None
    assert source.text_width == 16


@pytest.mark.parametrize(("model", "scale"), [("pico", 0.5), ("nano", 0.5), ("s", 0.5), ("m", 0.9), ("l", 0.9), ("x", 0.9), ("xl", 0.9)])
def test_a_data_yaml_is_read_as_published(tmp_path: Path, model: Size, scale: float) -> None:
    """The scale of the model's size, and no mosaic in the last two of a hundred steps, each of which takes `accumulate` batches."""
    settings = PretrainSettings(steps=100, accumulate=2, model=model, data=str(write_set(tmp_path)), size=96, texts=5, batch=3, seed=7)
    source, _ = open_source(settings)
    assert isinstance(source, DetectionBatches)
    samples = source.samples
    assert samples.augmentation == Augmentation(size=96, scale=scale)
    assert samples.mosaic_until == 196
    assert (samples.batch, samples.texts, samples.seed) == (3, 5, 7)


def test_the_drawn_task_is_drawn_as_the_settings_say() -> None:
    source, vocabulary = open_source(replace(DRAWN, seed=7))
    assert isinstance(source, ShapesBatches)
    assert source.task == ShapesTask(7, 64)
    assert (source.count, source.batch, source.texts, source.seed) == (4, 2, 20, 7)
    assert vocabulary is None


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [("file", "pictures", 100), ("drawn", "workers", 1), ("drawn", "without_mosaic", 0.5)],
)
def test_a_setting_that_the_data_gives_no_meaning_is_refused(settings: str, name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} means nothing to the data"):
        replace(ON_A_FILE if settings == "file" else DRAWN, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("size", 100), ("without_mosaic", 1.5), ("seed", -1), ("threads", 0)])
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is"):
        replace(ON_A_FILE, **{name: value})
