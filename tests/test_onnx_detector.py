"""The detector on exported files: every form of the contract against the torch detector, and files that nobody should run."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import KEPT, METADATA, NAMES, WIDTH, Averages, vocabulary, write_nms, write_onnx

from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.detect import DetectSettings
from crqat_fx.detections import Detections, Selection
from crqat_fx.errors import UserError
from crqat_fx.evaluate import evaluate
from crqat_fx.onnx_detector import OnnxDetector, read_onnx
from crqat_fx.torch_detector import TorchDetector

CONF = 0.3


def photos() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    sizes = [(80, 120), (200, 60), (96, 96)]
    return [cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC) for size in sizes]


def assert_same(found: list[Detections], wanted: list[Detections]) -> None:
    assert sum(len(one) for one in wanted) > 20
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)


# --- what it finds ---


@pytest.mark.parametrize(
    ("outputs", "given", "text"), list(itertools.product(("decoded", "raw"), ("float", "uint8"), ("constant", "runtime")))
)
@pytest.mark.parametrize("multiple", [None, 32], ids=["static", "dynamic"])
def test_every_form_of_file_finds_what_torch_finds(tmp_path, outputs, given, text, multiple):
    path = write_onnx(tmp_path / "m.onnx", outputs=outputs, input=given, text=text, multiple=multiple, batch=2)  # of 3 pictures
    detector = OnnxDetector(path, vocabulary() if text == "runtime" else None, conf=CONF)
    assert detector.names == NAMES
    assert_same(detector.detect(photos()), TorchDetector(Averages(), vocabulary(), size=96, conf=CONF).detect(photos()))


@pytest.mark.parametrize("outputs", ["decoded", "raw"])
def test_a_file_of_any_size_takes_the_one_asked_for(tmp_path, outputs):
    path = write_onnx(tmp_path / "m.onnx", outputs=outputs, multiple=32)
    for size in (64, 128):
        found = OnnxDetector(path, size=size, conf=CONF).detect(photos())
        assert_same(found, TorchDetector(Averages(), vocabulary(), size=size, conf=CONF).detect(photos()))
    with pytest.raises(UserError, match="size is 100; give a multiple of 32"):
        OnnxDetector(path, size=100)


def test_a_file_for_a_rectangle_letterboxes_into_it(tmp_path):
    path = write_onnx(tmp_path / "m.onnx", size=(64, 128))
    picture = np.full((64, 128, 3), 200, np.uint8)
    picture[:, :64] = 30
    square = np.full((128, 128, 3), 114, np.uint8)
    square[32:96] = picture
    wide = OnnxDetector(path, conf=0.0, iou=1.0, max_detections=10_000).detect([picture])[0]
    scores = np.sort(wide.scores)
    whole = TorchDetector(Averages(), vocabulary(), size=128, conf=0.0, iou=1.0, max_detections=10_000).detect([square])[0]
    assert len(wide) == sum((64 // stride) * (128 // stride) for stride in METADATA.strides) * len(NAMES)
    assert np.isin(scores.round(4), whole.scores.round(4)).mean() > 0.9  # cells of the coarsest stride straddle the edge there
    assert wide.boxes[:, 2].max() == 128
    assert wide.boxes[:, 3].max() == 64


def test_runtime_text_finds_the_given_vocabulary_given_once_or_for_each_picture(tmp_path):
    names = ("boat", "kite", "tie", "sea", "sky", "sun")
    wanted = TorchDetector(Averages(), vocabulary(names), size=96, conf=CONF).detect(photos())
    for batch, own_text in ((None, False), (None, True), (2, True)):
        path = write_onnx(tmp_path / "m.onnx", text="runtime", names=(), batch=batch, own_text=own_text)
        detector = OnnxDetector(path, vocabulary(names), conf=CONF)
        assert detector.names == names
        assert_same(detector.detect(photos()), wanted)


@pytest.mark.parametrize("outputs", ["decoded", "raw"])
def test_chosen_names_find_what_a_vocabulary_of_them_finds(tmp_path, outputs):
    chosen = (NAMES[3], NAMES[1])
    wanted = TorchDetector(Averages(), vocabulary().select(chosen), size=96, conf=CONF).detect(photos())
    detector = OnnxDetector(write_onnx(tmp_path / "m.onnx", outputs=outputs), conf=CONF, names=chosen)
    assert detector.names == chosen
    assert_same(detector.detect(photos()), wanted)
    runtime = OnnxDetector(write_onnx(tmp_path / "r.onnx", outputs=outputs, text="runtime"), vocabulary(), conf=CONF, names=chosen)
    assert_same(runtime.detect(photos()), wanted)


def test_equal_scores_come_in_the_order_of_the_raw_outputs(tmp_path):
    flat = [np.full((96, 96, 3), 90, np.uint8)]  # every cell of a level alike
    raw, decoded = (
        OnnxDetector(write_onnx(tmp_path / f"{outputs}.onnx", outputs=outputs), conf=0.0, iou=1.0, max_detections=10_000).detect(flat)[0]
        for outputs in ("raw", "decoded")
    )
    assert len(np.unique(raw.scores)) < len(raw) / 3
    np.testing.assert_array_equal(raw.labels, decoded.labels)
    np.testing.assert_allclose(raw.scores, decoded.scores, atol=1e-6)
    np.testing.assert_allclose(raw.boxes, decoded.boxes, atol=1e-4)


def test_nms_in_the_file_gives_its_rows_on_the_picture(tmp_path):
    detector = OnnxDetector(write_nms(tmp_path / "m.onnx", batch=2))
    assert detector.selection == Selection(conf=0.2, iou=0.7, max=8)
    for found, picture in zip(detector.detect(photos()), photos(), strict=True):
        height, width = picture.shape[:2]
        ratio = 96 / max(height, width)
        left, top = (96 - int(width * ratio)) // 2, (96 - int(height * ratio)) // 2
        boxes = (KEPT[:, :4] - [left, top, left, top]) / ([int(width * ratio) / width, int(height * ratio) / height] * 2)
        np.testing.assert_allclose(found.boxes, boxes.clip(0, [width, height, width, height]), rtol=1e-6)
        np.testing.assert_array_equal(found.scores, KEPT[:, 4])
        np.testing.assert_array_equal(found.labels, [1, 3, 1])


def test_less_can_be_asked_of_nms_in_the_file_and_not_more(tmp_path):
    path, picture = write_nms(tmp_path / "m.onnx"), photos()[:1]
    assert OnnxDetector(path, conf=0.4).detect(picture)[0].labels.tolist() == [1, 3]
    assert OnnxDetector(path, max_detections=1).detect(picture)[0].labels.tolist() == [1]
    chosen = OnnxDetector(path, names=(NAMES[3], NAMES[1])).detect(picture)[0]
    assert chosen.labels.tolist() == [1, 0, 1]
    assert OnnxDetector(path, names=(NAMES[0],)).detect(picture)[0].labels.tolist() == []
    for name, asked in (("conf", {"conf": 0.1}), ("iou", {"iou": 0.5}), ("max", {"max_detections": 9})):
        with pytest.raises(UserError, match=f"has NMS in it, with {name} .*: .* cannot be had of it; leave --{name} out"):
            OnnxDetector(path, **asked)


def test_finds_nothing_on_no_pictures_and_refuses_what_is_none(tmp_path):
    detector = OnnxDetector(write_onnx(tmp_path / "m.onnx"))
    assert detector.detect([]) == []
    with pytest.raises(UserError, match="give uint8 RGB"):
        detector.detect([np.zeros((4, 4), np.uint8)])


def test_ap_is_that_of_the_torch_detector(tmp_path):
    task = ShapesTask(size=96)
    pictures = ShapesSet(task, "val", 6)
    texts = replace(task.vocabulary, embeddings=task.vocabulary.embeddings[:, :WIDTH])
    path = write_onnx(tmp_path / "m.onnx", text="runtime", names=())
    found = evaluate(OnnxDetector(path, texts), pictures, batch_size=4)
    wanted = evaluate(TorchDetector(Averages(), texts, size=96), pictures, batch_size=4)
    assert found.detections == wanted.detections > 1000
    assert found.scores.ar is not None
    assert found.scores.ap == pytest.approx(wanted.scores.ap, abs=1e-9)
    assert found.split == wanted.split


# --- how it is opened ---


def test_carries_its_settings(tmp_path):
    assert read_onnx(write_onnx(tmp_path / "a.onnx")).carried_settings() == {"size": 96}
    assert read_onnx(write_nms(tmp_path / "b.onnx")).carried_settings() == {"size": 96, "conf": 0.2, "iou": 0.7, "max": 8}


def test_opens_by_the_settings_of_the_commands(tmp_path):
    constant, runtime = read_onnx(write_onnx(tmp_path / "c.onnx")), read_onnx(write_onnx(tmp_path / "r.onnx", text="runtime"))
    settings = DetectSettings(size=96, conf=CONF, max=7, text='"bright thing, large", red', threads=1)
    other = vocabulary(("kite", "boat"))
    other.save(tmp_path / "v.npz")
    assert constant.detector(settings, other).names == ("bright thing, large", "red")  # what is folded in cannot be changed by the data's
    assert (found := constant.detector(settings).detect(photos())[0]).scores.min() > CONF
    assert len(found) == 7
    assert runtime.detector(settings, vocabulary()).names == ("bright thing, large", "red")
    assert runtime.detector(replace(settings, vocabulary=tmp_path / "v.npz", text=None), vocabulary()).names == ("kite", "boat")


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"size": 64}, "is for pictures of 96 x 96 px, not of 64; leave --size out"),
        ({}, {"device": "cuda"}, "runs on the processor, not on cuda; leave --device out"),
        ({}, {"vocabulary": Path("v.npz")}, "has its vocabulary folded into it; leave --vocabulary out"),
        ({}, {"text": "unicorn"}, "'unicorn' is not among the 4 names"),
        ({"text": "runtime"}, {}, "carries no vocabulary; give one with --vocabulary"),
        ({"text": "runtime"}, {"vocabulary": Path("v.npz")}, "embeddings are 5 wide and the model reads 8"),
    ],
)
def test_settings_that_do_not_fit_the_file_are_refused(tmp_path, monkeypatch, changes, settings, message):
    monkeypatch.chdir(tmp_path)
    vocabulary(width=5).save("v.npz")
    model = read_onnx(write_onnx(tmp_path / "m.onnx", **changes))
    with pytest.raises(UserError, match=message):
        model.detector(DetectSettings(**({"size": 96} | settings)))


def test_a_vocabulary_goes_to_the_file_that_asks_for_one_and_no_other(tmp_path):
    with pytest.raises(UserError, match="has its vocabulary folded into it"):
        OnnxDetector(write_onnx(tmp_path / "c.onnx"), vocabulary())
    with pytest.raises(UserError, match="takes its text as an input; give a vocabulary"):
        OnnxDetector(write_onnx(tmp_path / "r.onnx", text="runtime"))


# --- files that nobody should run ---


def rewritten(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_what_is_no_onnx_file_is_told_in_one_line_and_nowhere_else(tmp_path, capfd):
    path = tmp_path / "m.onnx"
    whole = write_onnx(path).read_bytes()
    for content in (b"", b"PK\3\4 a checkpoint", b"hello", whole[: len(whole) // 2], bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"m.onnx: cannot be opened by onnxruntime \(.+\); make one with `crqat-fx export`") as raised:
            read_onnx(path)
        assert len(str(raised.value)) < 500
    with pytest.raises(UserError, match=r"none.onnx: cannot be read \(No such file"):
        read_onnx(tmp_path / "none.onnx")
    with pytest.raises(UserError, match=r"cannot be read \("):
        read_onnx(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_file_without_our_metadata_is_told_what_it_lacks(tmp_path):
    path = rewritten(write_onnx(tmp_path / "m.onnx"), lambda model: helper.set_model_props(model, {"stride": "32"}))
    with pytest.raises(UserError, match=r"did not write: its metadata lacks crqat_fx.format"):
        read_onnx(path)


def test_metadata_that_is_no_text_is_refused(tmp_path, capfd):
    path = write_onnx(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"float32", b"\xff\xfeoat32"))
    with pytest.raises(UserError, match=r"m.onnx: its metadata cannot be read"):
        read_onnx(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("word", "kind"), [(b"scores", "outputs"), (b"batch", "inputs")])
def test_names_that_are_no_text_are_refused(tmp_path, capfd, word, kind):
    path = write_onnx(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(word, b"\xff" * len(word)))
    with pytest.raises(UserError, match=f"names its {kind} in bytes that are no text"):
        OnnxDetector(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("place", ["../secret.bin", "{folder}/secret.bin", "missing.bin"])
def test_weights_outside_the_files_folder_are_not_read(tmp_path, place):
    (tmp_path / "secret.bin").write_bytes(bytes(2**16))
    folder = tmp_path / "in"
    folder.mkdir()

    def point_outside(model: onnx.ModelProto) -> None:
        tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=place.format(folder=tmp_path))
        tensor.ClearField("raw_data")

    path = rewritten(write_onnx(folder / "m.onnx"), point_outside)
    with pytest.raises(UserError, match=r"m.onnx: cannot be opened by onnxruntime .*xternal data"):
        read_onnx(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "uint8"}, r"its input images is tensor\(float\) \[any, 3, 96, 96\], and its metadata promises tensor\(uint8\)"),
        ({"text": "runtime"}, "has the inputs images, and its metadata promises images, text"),
        ({"outputs": "raw"}, "has the outputs boxes, scores, and its metadata promises logits_8, logits_16, logits_32, bins_8"),
        ({"names": ("red",)}, r"its output scores is .*189, 4\], and its metadata promises tensor\(float\) \[any, 189, 1\]"),
        ({"size": (64, 64)}, r"its input images is .*\[any, 3, 96, 96\], and its metadata promises tensor\(float\) \[any, 3, 64, 64\]"),
        ({"strides": (16, 32)}, r"its output boxes is tensor\(float\) \[any, 189, 4\], and its metadata promises .*\[any, 45, 4\]"),
    ],
)
def test_a_file_that_is_not_what_its_metadata_says_is_refused(tmp_path, changes, message):
    path = rewritten(
        write_onnx(tmp_path / "m.onnx"), lambda model: helper.set_model_props(model, replace(METADATA, **changes).as_strings())
    )
    with pytest.raises(UserError, match=message):
        OnnxDetector(path, vocabulary() if changes.get("text") == "runtime" else None)


def test_outputs_that_turn_out_otherwise_are_refused(tmp_path):
    path = write_onnx(tmp_path / "m.onnx", multiple=32)
    told = replace(METADATA, multiple=32, strides=(8, 16)).as_strings()
    detector = OnnxDetector(rewritten(path, lambda model: helper.set_model_props(model, told)))
    with pytest.raises(UserError, match=r"its output boxes is of shape \[3, 189, 4\], where \[3, 180, 4\] belongs"):
        detector.detect(photos())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("label", 4.0, "counts or labels that cannot be"),
        ("label", -1.0, "counts or labels that cannot be"),
        ("label", np.nan, "counts or labels that cannot be"),
        ("score", np.nan, "scores are not numbers"),
        ("box", np.inf, "boxes are not finite"),
        ("count", 5, "counts or labels that cannot be"),
        ("count", -1, "counts or labels that cannot be"),
    ],
)
def test_nms_that_gives_what_cannot_be_is_refused(tmp_path, name, value, message):
    def spoil(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor).copy()
            if name == "count" and array.shape == (1,) and array[0] == len(KEPT):
                array[0] = value
            elif name != "count" and array.shape == (1, len(KEPT) + 1, 6):
                array[0, 1, {"box": 0, "score": 4, "label": 5}[name]] = value
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    detector = OnnxDetector(rewritten(write_nms(tmp_path / "m.onnx"), spoil))
    with pytest.raises(UserError, match=message):
        detector.detect(photos())


@pytest.mark.parametrize("outputs", ["decoded", "raw"])
@pytest.mark.parametrize(("where", "message"), [("text", "scores are not numbers"), ("bias", "boxes are not finite")])
def test_answers_that_are_no_numbers_are_an_error(tmp_path, outputs, where, message):
    def spoil(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor).copy()
            if array.shape == ((1, len(NAMES), WIDTH) if where == "text" else (64, 1, 1)):
                array[...] = np.nan
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    detector = OnnxDetector(rewritten(write_onnx(tmp_path / "m.onnx", outputs=outputs), spoil))
    with pytest.raises(UserError, match=message):
        detector.detect(photos())


def test_a_file_that_fails_when_it_runs_is_told_in_one_line(tmp_path):
    def take_one_size_alone(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 3, 96, 96), np.float32), "zeros"))
        for node in model.graph.node:
            node.input[:] = ["added" if name == "images" else name for name in node.input]
        model.graph.node.insert(0, helper.make_node("Add", ["images", "zeros"], ["added"]))

    path = rewritten(write_onnx(tmp_path / "m.onnx", multiple=32), take_one_size_alone)
    assert len(OnnxDetector(path).detect(photos())) == 3
    with pytest.raises(UserError, match=r"m.onnx: cannot be run by onnxruntime \(.+\); make one with `crqat-fx export`$"):
        OnnxDetector(path, size=64).detect(photos())


def test_damage_anywhere_in_a_file_is_an_error_or_harmless(tmp_path):
    path = write_onnx(tmp_path / "m.onnx")
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            OnnxDetector(path).detect(photos()[:1])
        except UserError:
            refused += 1
    assert 10 < refused < 60


def test_threads_are_those_asked_for(tmp_path):
    detector: Any = OnnxDetector(write_onnx(tmp_path / "m.onnx"), threads=3)
    assert detector._session.get_session_options().intra_op_num_threads == 3
    assert json.loads(detector.metadata.as_strings()["crqat_fx.size"]) == [96, 96]
