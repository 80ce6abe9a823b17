"""What `inspect` reports, held against the configuration that the model was built from."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from crqat_fx.checkpoint import Checkpoint, load_model, write_checkpoint
from crqat_fx.inspection import inspect_model, tree
from crqat_fx.models.yolo_world import SIZES, YoloWorld, YoloWorldConfig, build, config_for
from crqat_fx.vocabulary import Vocabulary


def report_of(config: YoloWorldConfig, tmp_path, **options):
    """The report of a model without content: shapes are all that counts."""
    with torch.device("meta"):
        model = YoloWorld(config)
    return inspect_model(model, Checkpoint(path=tmp_path / "m.pth", origin="official", config=config, state={}), **options)


def named(blocks, *path: str):
    for name in path:
        (block,) = [each for each in blocks if each["name"] == name]
        blocks = block["children"]
    return block


def shape(block) -> list[tuple[int | str | None, int | None]]:
    return [(output["channels"], output["stride"]) for output in block["outputs"]]


def drawn(report, width: int = 80) -> list[str]:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(tree(report))
    return capture.get().splitlines()


@pytest.mark.parametrize(("size", "version"), [(size, version) for size in SIZES for version in (1, 2)])
def test_channels_and_strides_are_those_of_the_configuration(size, version, tmp_path):
    config = config_for(size, version)
    stem, p2, p3, p4, p5 = config.channels
    report = report_of(config, tmp_path)
    blocks = report["blocks"]
    assert (report["size"], report["version"]) == (size, version)
    assert [block["name"] for block in blocks] == ["backbone", "neck", "bbox_head"]
    levels = [(p3, 8), (p4, 16), (p5, 32)]
    assert shape(named(blocks, "backbone")) == shape(named(blocks, "neck")) == levels
    for name, expected in [
        ("stem", (stem, 2)),
        ("stage1.1", (p2, 4)),
        ("stage2.1", (p3, 8)),
        ("stage3.0", (p4, 16)),
        ("stage4.2", (p5, 32)),
    ]:
        assert shape(named(blocks, "backbone", name)) == [expected]
    for name, expected in [
        ("upsample_layers.0", (p5, 16)), ("top_down_concats.0", (p4 + p5, 16)), ("top_down_layers.0", (p4, 16)),
        ("top_down_layers.1", (p3, 8)), ("bottom_up_layers.0", (p4, 16)), ("bottom_up_layers.1", (p5, 32)),
    ]:  # fmt: skip
        assert shape(named(blocks, "neck", name)) == [expected]
    if version == 1:
        assert shape(named(blocks, "neck", "text_enhancer")) == [(512, None)]
    assert shape(named(blocks, "bbox_head")) == [(c, s) for c in ("N", 64, 512) for s in (8, 16, 32)]
    assert shape(named(blocks, "bbox_head", "cls_preds.1.0")) == [(config.class_channels, 16)]
    assert shape(named(blocks, "bbox_head", "reg_preds.2.1")) == [(config.box_channels, 32)]
    assert shape(named(blocks, "bbox_head", "cls_contrasts.0")) == [("N", 8), (512, 8)]


@pytest.mark.parametrize(("size", "version", "parameters"), [("s", 1, 13_383_480), ("l", 1, 47_553_954), ("m", 2, 28_376_142)])
def test_parameters_are_the_published_ones_and_those_of_the_blocks_add_up(size, version, parameters, tmp_path):
    report = report_of(config_for(size, version), tmp_path)
    assert report["parameters"] == parameters == sum(block["parameters"] for block in report["blocks"])


def test_blocks_stand_in_the_order_in_which_they_run(tmp_path):
    names = [block["name"] for block in named(report_of(config_for("pico", 1), tmp_path)["blocks"], "neck")["children"]]
    assert names.index("top_down_layers.1") < names.index("text_enhancer") < names.index("bottom_up_layers.0")
    assert names[:3] == ["upsample_layers.0", "top_down_concats.0", "top_down_layers.0"]


def test_depth_opens_the_blocks(tmp_path):
    config = config_for("pico", 2)
    assert all(not block["children"] for block in report_of(config, tmp_path, depth=1)["blocks"])
    assert not named(report_of(config, tmp_path)["blocks"], "backbone", "stage4.2")["children"]
    blocks = report_of(config, tmp_path, depth=None)["blocks"]
    half = config.channels[4] // 2
    pool = named(blocks, "backbone", "stage4.2", "pool")
    assert (pool["type"], pool["calls"], shape(pool)) == ("MaxPool2d", 3, [(half, 32)])
    guide = named(blocks, "neck", "top_down_layers.0", "attn_block", "guide_fc")
    assert guide["outputs"] == [{"channels": config.channels[3] // 2, "stride": None, "shape": ["N", config.channels[3] // 2]}]
    match = named(blocks, "bbox_head", "cls_contrasts.2", "match")
    assert (match["outputs"][0]["channels"], match["outputs"][0]["shape"][0]) == (None, "N")


def test_a_size_and_a_text_width_of_ones_own_are_measured_too(tmp_path):
    config = YoloWorldConfig(version=2, deepen=0.5, widen=0.3, text_width=96)
    report = report_of(config, tmp_path)
    assert report["size"] is None
    assert report["text_width"] == 96
    assert shape(named(report["blocks"], "bbox_head", "cls_contrasts.0")) == [("N", 8), (96, 8)]
    assert drawn(report)[0] == "YOLO-World v2, a size of its own"


def test_a_written_checkpoint_is_reported_with_its_vocabulary_and_picture_size(tmp_path):
    vocabulary = Vocabulary([f"name {number}" for number in range(12)], np.eye(12, 512, dtype=np.float32))
    write_checkpoint(tmp_path / "m.pt", build("pico", 1), config_for("pico", 1), vocabulary=vocabulary, metadata={"size": 160})
    report = inspect_model(*load_model(tmp_path / "m.pt"))
    assert report["vocabulary"] == {"count": 12, "first": [f"name {number}" for number in range(8)]}
    assert (report["origin"], report["picture_size"], report["text_encoder"]) == ("crqat-fx", 160, False)
    assert json.loads(json.dumps(report)) == report
    text = "\n".join(drawn(report, width=200))
    assert "12 names: name 0, name 1, name 2, name 3, name 4, name 5, name 6, name 7, ..." in text
    assert "160 px" in text


def test_the_model_is_left_as_it_was():
    model = build("pico", 1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = config_for("pico", 1)
    inspect_model(model, Checkpoint(path="m", origin="official", config=config, state={}))
    assert model.training
    assert all(tensor.device.type == "cpu" and torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("size", "version"), [("pico", 1), ("s", 2), ("x", 1), ("xl", 2)])
def test_the_tree_fits_a_terminal_of_80_columns(size, version, tmp_path):
    lines = drawn(report_of(config_for(size, version), tmp_path))
    assert not any("…" in line for line in lines)
    assert len({len(line) for line in lines if "├──" in line or "└──" in line}) == 1, "the columns do not line up"
    (stem,) = [line.split() for line in lines if " stem " in line]
    assert stem[-4:-1] == ["ConvModule", str(config_for(size, version).channels[0]), "2"]
    assert lines[0] == f"YOLO-World v{version}, {size}"
