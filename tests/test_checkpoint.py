"""Checkpoints of all kinds are read as one model; what is written is read back."""

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import DATA, NAMES, embeddings, official, ultralytics_names, weights, write_foreign_files

from crqat_fx.checkpoint import load_model, official_name, read_checkpoint, write_checkpoint
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import YoloWorld, build, config_for
from crqat_fx.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    write_foreign_files(folder, "sound")
    return folder


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in state.items())


def halved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.half().float() if value.is_floating_point() else value for key, value in state.items()}


# --- official files ---


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", ["pico", "nano"])
def test_reads_an_official_file_and_finds_its_size_and_version(tmp_path: Path, size: str, version: int) -> None:
    state = weights(size, version)
    checkpoint = read_checkpoint(official(tmp_path / "model.pth", state))
    assert checkpoint.origin == "official"
    assert checkpoint.config == config_for(size, version)
    assert same(checkpoint.state, state)
    assert checkpoint.vocabulary is None
    assert checkpoint.text_model is None


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", ["m", "l"])
def test_finds_the_published_sizes_by_the_published_shapes(tmp_path: Path, size: str, version: int) -> None:
    shapes = json.loads((DATA / f"keys_v{version}_{size}.json").read_text())
    state = {key: torch.zeros(shape, dtype=torch.int64 if key.endswith("tracked") else torch.half) for key, shape in shapes.items()}
    checkpoint = read_checkpoint(official(tmp_path / "model.pth", state))
    assert checkpoint.config == config_for(size, version)
    assert {key: list(value.shape) for key, value in checkpoint.state.items()} == shapes


def test_finds_the_text_width(tmp_path: Path) -> None:
    narrow = dataclasses.replace(config_for("pico", 1), text_width=48)
    assert read_checkpoint(official(tmp_path / "model.pth", YoloWorld(narrow).state_dict())).config == narrow


def test_reads_a_bare_state_dict(tmp_path: Path) -> None:
    state = weights("pico", 2)
    torch.save(state, tmp_path / "state.pt")
    assert same(read_checkpoint(tmp_path / "state.pt").state, state)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_reads_every_protocol_that_pickle_writes_today(tmp_path: Path, protocol: int) -> None:
    state = weights("pico", 2)
    torch.save({"state_dict": OrderedDict(state), "meta": {1, "two"}}, tmp_path / "model.pth", pickle_protocol=protocol)
    assert same(read_checkpoint(tmp_path / "model.pth").state, state)


def test_reads_a_training_file_with_the_objects_of_mmengine_in_it(foreign: Path) -> None:
    checkpoint = read_checkpoint(foreign / "official-training.pth")
    assert same(checkpoint.state, weights("pico", 1))
    assert checkpoint.text_model is not None
    assert {key: (tuple(value.shape), value.dtype) for key, value in checkpoint.text_model.items()} == {
        "text_model.embeddings.token_embedding.weight": ((7, 4), torch.float32),
        "text_model.embeddings.position_ids": ((1, 5), torch.int64),
        "text_projection.weight": ((4, 4), torch.float32),
    }


def test_reads_tensors_that_are_views_of_a_larger_one(tmp_path: Path) -> None:
    state = weights("pico", 2)
    key = "backbone.image_model.stage1.0.conv.weight"
    whole = torch.randn(2, *state[key].shape)
    state[key] = whole[1].permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    state["backbone.image_model.stem.bn.weight"] = torch.arange(100.0)[4:20:2]
    read = read_checkpoint(official(tmp_path / "model.pth", state)).state
    assert same(read, state)
    assert all(value.is_contiguous() for value in read.values())


def test_keeps_two_references_to_the_same_list(tmp_path: Path) -> None:
    doubled: list[object] = []
    for _ in range(64):
        doubled = [doubled, doubled]
    state = weights("pico", 2)
    assert same(read_checkpoint(official(tmp_path / "model.pth", state, message_hub=doubled)).state, state)


# --- ultralytics files ---


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", ["s", "m", "l"])
def test_names_every_entry_of_ultralytics_as_the_official_code_does(size: str, version: int) -> None:
    expected = {key: official_key or "dfl.conv.weight" for key, (official_key, _) in ultralytics_names(size, version).items()}
    assert {key: official_name(key, version) for key in expected} == expected
    published = json.loads((DATA / f"keys_v{version}_{size}.json").read_text())
    assert set(expected.values()) == {*published, "dfl.conv.weight"}


def test_names_the_blocks_that_only_deeper_sizes_have() -> None:
    assert official_name("model.6.m.5.cv2.bn.bias", 1) == "backbone.image_model.stage3.1.blocks.5.conv2.bn.bias"
    assert official_name("model.22.m.2.cv1.conv.weight", 1) == "neck.bottom_up_layers.1.blocks.2.conv1.conv.weight"
    assert official_name("model.21.m.2.cv1.conv.weight", 2) == "neck.bottom_up_layers.1.blocks.2.conv1.conv.weight"


def test_leaves_a_name_of_no_layer_as_it_is() -> None:
    assert official_name("model.10.weight", 2) == "model.10.weight"
    assert official_name("model.99.weight", 2) == "model.99.weight"
    assert official_name("criterion.weight", 2) == "criterion.weight"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", ["pico", "s"])
def test_reads_an_ultralytics_file_without_ultralytics(foreign: Path, size: str, version: int) -> None:
    checkpoint = read_checkpoint(foreign / f"ultralytics-v{version}-{size}.pt")
    assert checkpoint.origin == "ultralytics"
    assert checkpoint.config == config_for(size, version)
    assert same(checkpoint.state, halved(weights(size, version)))
    assert checkpoint.extra == {"size": 512}


def test_reads_the_vocabulary_baked_into_an_ultralytics_file(foreign: Path) -> None:
    vocabulary = read_checkpoint(foreign / "ultralytics-v2-pico.pt").vocabulary
    assert vocabulary is not None
    assert vocabulary.names == NAMES
    np.testing.assert_allclose(vocabulary.embeddings, embeddings().numpy(), atol=2e-4)
    np.testing.assert_allclose(np.linalg.norm(vocabulary.embeddings, axis=1), 1, atol=1e-6)


def test_takes_a_square_pair_as_the_picture_size_and_says_that_another_is_left_aside(
    foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_checkpoint(foreign / "ultralytics-square.pt").extra == {"size": 320}
    assert not caplog.records
    assert read_checkpoint(foreign / "ultralytics-oblong.pt").extra == {}
    assert "the picture size in it, 320 x 640, is left aside: pictures are square" in caplog.text


def test_prefers_the_averaged_weights_of_an_ultralytics_training_file(foreign: Path) -> None:
    checkpoint = read_checkpoint(foreign / "ultralytics-training.pt")
    assert same(checkpoint.state, halved(weights("pico", 2)))
    assert not same(checkpoint.state, halved(weights("pico", 2, seed=1)))


@pytest.mark.parametrize(("file", "reason"), [("unset-vocabulary", "never set"), ("fewer-names", "4 names and 5 embeddings")])
def test_leaves_a_vocabulary_aside_that_is_none_and_says_so(
    foreign: Path, caplog: pytest.LogCaptureFixture, file: str, reason: str
) -> None:
    checkpoint = read_checkpoint(foreign / f"ultralytics-{file}.pt")
    assert checkpoint.vocabulary is None
    assert reason in caplog.text


# --- this project's own files ---


@pytest.mark.parametrize("version", [1, 2])
def test_reads_back_what_it_wrote(tmp_path: Path, version: int) -> None:
    model = build("pico", version)
    model.load_state_dict(weights("pico", version))
    vocabulary = Vocabulary(NAMES, embeddings().numpy())
    metadata = {"size": 320, "command": ["pretrain", "--steps", "10"], "ap": 64.5, "seed": None, "nested": {"deep": [True, {}]}}
    write_checkpoint(tmp_path / "own.pt", model, model.config, vocabulary=vocabulary, metadata=metadata)
    checkpoint = read_checkpoint(tmp_path / "own.pt")
    assert checkpoint.origin == "crqat-fx"
    assert checkpoint.config == model.config
    assert same(checkpoint.state, model.state_dict())
    assert checkpoint.vocabulary is not None
    assert checkpoint.vocabulary.names == NAMES
    np.testing.assert_array_equal(checkpoint.vocabulary.embeddings, vocabulary.embeddings)
    assert checkpoint.extra == metadata


def test_writes_a_file_that_torch_loads_without_trusting_it(tmp_path: Path) -> None:
    state = weights("pico", 2)
    write_checkpoint(tmp_path / "own.pt", state, config_for("pico", 2), vocabulary=Vocabulary(NAMES, embeddings().numpy()), half=True)
    content = torch.load(tmp_path / "own.pt", weights_only=True)
    assert content["config"]["widen"] == config_for("pico", 2).widen
    assert content["vocabulary"]["names"] == list(NAMES)
    assert {value.dtype for value in content["state"].values()} == {torch.float16, torch.int64}


def test_halves_storage_and_reads_it_back_as_float32_and_whole_counters(tmp_path: Path) -> None:
    state = weights("pico", 2) | {"backbone.image_model.stem.bn.num_batches_tracked": torch.tensor(123_456_789)}
    write_checkpoint(tmp_path / "full.pt", state, config_for("pico", 2))
    write_checkpoint(tmp_path / "half.pt", state, config_for("pico", 2), half=True)
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * (tmp_path / "full.pt").stat().st_size
    read = read_checkpoint(tmp_path / "half.pt").state
    assert same(read, halved(state))
    assert read["backbone.image_model.stem.bn.num_batches_tracked"] == 123_456_789
    assert {value.dtype for value in read.values()} == {torch.float32, torch.int64}


def test_writes_the_same_bytes_for_the_same_content_under_any_name(tmp_path: Path) -> None:
    for file in ("a.pt", "b.pt"):
        write_checkpoint(tmp_path / file, weights("pico", 2), config_for("pico", 2))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_takes_a_view_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    state = weights("pico", 2)
    write_checkpoint(tmp_path / "plain.pt", state, config_for("pico", 2))
    key = "backbone.image_model.stem.bn.weight"
    state[key] = torch.cat([state[key], torch.zeros(10**6)])[: len(state[key])]
    write_checkpoint(tmp_path / "view.pt", state, config_for("pico", 2))
    assert (tmp_path / "view.pt").stat().st_size == (tmp_path / "plain.pt").stat().st_size


def test_refuses_to_write_weights_that_are_not_finite_and_keeps_the_old_file(tmp_path: Path) -> None:
    state = weights("pico", 2)
    write_checkpoint(tmp_path / "own.pt", state, config_for("pico", 2))
    before = (tmp_path / "own.pt").read_bytes()
    state["neck.top_down_layers.0.attn_block.bias"][0] = math.nan
    with pytest.raises(UserError, match=r"NaN or infinite weights in 1 of .*top_down_layers\.0\.attn_block\.bias"):
        write_checkpoint(tmp_path / "own.pt", state, config_for("pico", 2))
    assert (tmp_path / "own.pt").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["own.pt"]


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_says_that_the_disk_is_full_and_leaves_nothing(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from crqat_fx.checkpoint import write_checkpoint
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import build
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
model = build("pico", 2)
try:
    write_checkpoint(sys.argv[1], model, model.config)
except UserError as error:
    sys.exit(str(error))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "own.pt")], capture_output=True, text=True, env=environment)
    assert "own.pt: cannot be written (File too large)" in run.stderr
    assert not list(tmp_path.iterdir())


def test_refuses_to_write_variances_below_zero(tmp_path: Path) -> None:
    state = weights("pico", 2)
    state["backbone.image_model.stem.bn.running_var"][3] = -1e-3
    with pytest.raises(UserError, match=r"negative variances in 1 of 411 entries \(backbone\.image_model\.stem\.bn\.running_var\)"):
        write_checkpoint(tmp_path / "own.pt", state, config_for("pico", 2))
    assert not list(tmp_path.iterdir())


def test_refuses_to_halve_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = weights("pico", 2)
    state["backbone.image_model.stem.bn.running_var"][0] = 1e6
    with pytest.raises(UserError, match="too large for 16 bits"):
        write_checkpoint(tmp_path / "own.pt", state, config_for("pico", 2), half=True)
    write_checkpoint(tmp_path / "own.pt", state, config_for("pico", 2))


def test_refuses_to_write_a_state_that_is_not_the_configurations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not fit YOLO-World v1-PICO"):
        write_checkpoint(tmp_path / "own.pt", weights("pico", 2), config_for("pico", 1))
    vocabulary = Vocabulary(NAMES, embeddings(width=64).numpy())
    with pytest.raises(UserError, match="the vocabulary is 64 wide and the model's text 512"):
        write_checkpoint(tmp_path / "own.pt", weights("pico", 2), config_for("pico", 2), vocabulary=vocabulary)
    assert not list(tmp_path.iterdir())


def test_refuses_metadata_that_is_not_plain(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"PosixPath|WindowsPath"):
        write_checkpoint(tmp_path / "own.pt", weights("pico", 2), config_for("pico", 2), metadata={"path": tmp_path})
    assert not list(tmp_path.iterdir())


# --- models ---


def test_loads_a_model_that_computes_what_the_saved_one_does(tmp_path: Path) -> None:
    model = build("pico", 1).eval()
    model.load_state_dict(weights("pico", 1))
    write_checkpoint(tmp_path / "own.pt", model, model.config)
    loaded, checkpoint = load_model(tmp_path / "own.pt")
    assert not loaded.training
    assert checkpoint.config == loaded.config == model.config
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    images, text = torch.rand(2, 3, 64, 96), embeddings().expand(2, -1, -1)
    with torch.no_grad():
        for ours, theirs in zip(loaded(images, text), model(images, text), strict=True):
            for level, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(level, other, rtol=0, atol=0)


def test_a_loaded_model_trains_and_pickles_like_any_other(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "own.pt", weights("pico", 2), config_for("pico", 2))
    model, _ = load_model(tmp_path / "own.pt")
    logits, _, _ = model.train()(torch.rand(2, 3, 64, 64), embeddings().expand(2, -1, -1))
    sum(level.sum() for level in logits).backward()
    assert all(value.device.type == "cpu" for value in (*model.parameters(), *model.buffers()))
    assert pickle.loads(pickle.dumps(model)).config == model.config
