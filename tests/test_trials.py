"""A file that leaves axes open, and one with NMS in it, are verified in what they are: at other sizes, batches and texts; by detections."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from crqat_fx.checkpoint import load_model
from crqat_fx.cli import app
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.detections import Selection
from crqat_fx.export import export
from crqat_fx.metadata import IMAGES, Metadata
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.trials import SMALL, Axes, DetectorTrials, Selected
from crqat_fx.verify import Verification, _Tally, verify_file

SIZE = 96
TASK = ShapesTask(size=SIZE)
TEXTS = TASK.vocabulary.select(TASK.vocabulary.names[:24])
PICTURES = [TASK.draw("val", index).image for index in range(2)]
KEPT = Selection(conf=0.001, iou=0.6, max=40)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    made = prepare(load_model("pico-v2")[0], recipe="8-8-8-int", vocabulary=TEXTS, size=SIZE)
    calibrate(made, picture_batches(made, [TASK.draw("calibration", index).image for index in range(4)]), "minmax", 4)
    return made


@pytest.fixture(scope="module")
def files(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With NMS in them: one open, one fixed."""
    folder = tmp_path_factory.mktemp("nms")
    return {
        "open": export(prepared, folder / "open.onnx", outputs="nms", selection=KEPT, dynamic=("batch", "size")).path,
        "fixed": export(prepared, folder / "fixed.onnx", outputs="nms", selection=KEPT).path,
    }


def verified(prepared: Prepared, path: Path, count: int = 1) -> Verification:
    return verify_file(prepared, path, PICTURES[:count], count=count, threads=1)


def changed(path: Path, to: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, to)
    return to


def test_axes_that_a_file_leaves_open_are_tried(prepared: Prepared, tmp_path: Path) -> None:
    path = export(prepared, tmp_path / "model.onnx", outputs="raw").path

    def tried(batch: int | str, **said: object) -> list[tuple[int, tuple[int, int], int]]:
        model = onnx.load(path)
        first = model.graph.input[0].type.tensor_type.shape.dim[0]
        first.ClearField("value")
        if isinstance(batch, int):
            first.dim_value = batch
        else:
            first.dim_param = batch
        metadata = Metadata.read({each.key: each.value for each in model.metadata_props} | said, path)  # type: ignore[arg-type]
        runs = DetectorTrials(model, metadata, TEXTS)
        found = list(runs.trials(PICTURES))
        assert runs.runs(len(PICTURES)) == len(found)
        for trial in found:
            axes = trial.axes or runs.axes[0]
            assert tuple(trial.inputs[0].shape) == (axes.batch, 3, *axes.canvas)
            assert trial.inputs[1].shape[:2] == (axes.batch, axes.texts)
        return [(each.batch, each.canvas, each.texts) for each in runs.axes]

    usual, texts = (SIZE, SIZE), len(TEXTS)
    size = {"crqat_fx.size": f'{{"multiple": 32, "default": {SIZE}}}'}
    assert tried(1) == [(1, usual, texts)]
    assert tried(2) == [(2, usual, texts)]
    assert tried("batch") == [(1, usual, texts), (2, usual, texts)]
    assert tried(1, **size) == [(1, usual, texts), (1, SMALL, texts)]
    assert tried("batch", **size) == [(1, usual, texts), (1, SMALL, texts), (2, SMALL, texts)]
    assert tried("batch", **{"crqat_fx.text": "runtime"}) == [(1, usual, texts), (2, usual, texts // 2)]


def test_a_file_with_nms_and_open_axes_holds_at_all_of_them(prepared: Prepared, files: dict[str, Path]) -> None:
    found = verified(prepared, files["open"], 2)
    assert found.passed, found.departs
    for rung in found.rungs[2:4]:
        count, pictures = (int(word) for word in rung.detail.split()[:4:3])
        assert pictures == 2 + 1 + 2  # at the usual size; at another; there in a batch
        assert count > 10
        assert "left out" not in rung.detail


# --- each sees what it is there to see ---


def right_at_its_usual_size_alone(model: onnx.ModelProto) -> None:
    """Scores grow with the height above, and fall below."""
    nodes = [
        helper.make_node("Shape", [IMAGES], ["odd.shape"], start=2, end=3),
        helper.make_node("Cast", ["odd.shape"], ["odd.height"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["odd.height", "odd.usual"], ["odd.factor"]),
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array([SIZE], np.float32), "odd.usual"))
    before_scores(model, nodes, helper.make_node("Mul", ["odd.scores", "odd.factor"], ["scores"]))


def the_first_picture_for_all(model: onnx.ModelProto) -> None:
    """What is seen on the first picture of a batch is said of every one."""
    nodes = [
        helper.make_node("Shape", ["odd.scores"], ["odd.shape"]),
        helper.make_node("Gather", ["odd.scores", "odd.zero"], ["odd.first"], axis=0),
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "odd.zero"))
    before_scores(model, nodes, helper.make_node("Expand", ["odd.first", "odd.shape"], ["scores"]))


def before_scores(model: onnx.ModelProto, nodes: list[onnx.NodeProto], last: onnx.NodeProto) -> None:
    """The scores are what these nodes make of them."""
    place, maker = next((place, node) for place, node in enumerate(model.graph.node) if "scores" in node.output)
    maker.output[0] = "odd.scores"
    for number, node in enumerate((*nodes, last)):
        model.graph.node.insert(place + 1 + number, node)


def with_value(name: str, value: object) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (held,) = [each for each in model.graph.initializer if each.name == name]
        before = numpy_helper.to_array(held)
        held.CopyFrom(numpy_helper.from_array(np.full_like(before, value), name))

    return change


def labelled_one_more(model: onnx.ModelProto) -> None:
    maker = next(node for node in model.graph.node if "nms.label" in node.output)
    maker.output[0] = "odd.label"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "odd.one"))
    place = list(model.graph.node).index(maker)
    model.graph.node.insert(place + 1, helper.make_node("Add", ["odd.label", "odd.one"], ["nms.label"]))


def counted_one_less(model: onnx.ModelProto) -> None:
    maker = next(node for node in model.graph.node if "counts" in node.output)
    maker.output[0] = "odd.counts"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "odd.one"))
    model.graph.node.append(helper.make_node("Sub", ["odd.counts", "odd.one"], ["counts"]))


@pytest.mark.parametrize(
    ("file", "change", "departs"),
    [
        ("open", right_at_its_usual_size_alone, f"scores at {Axes(1, SMALL, len(TEXTS))}"),
        ("open", the_first_picture_for_all, f"scores at {Axes(2, SMALL, len(TEXTS))}"),
        ("fixed", with_value("nms.iou", 0.1), "detections"),
        ("fixed", with_value("nms.conf", 0.2), "detections"),
        ("fixed", labelled_one_more, "detections"),
        ("fixed", counted_one_less, "counts"),
    ],
    ids=["another size", "a batch", "overlaps that were allowed", "scores that were allowed", "labels", "counts"],
)
def test_verification_names_what_departs(
    prepared: Prepared, files: dict[str, Path], tmp_path: Path, file: str, change: Callable[[onnx.ModelProto], None], departs: str
) -> None:
    found = verified(prepared, changed(files[file], tmp_path / "model.onnx", change))
    assert [rung.passed for rung in found.rungs[:4]] == [True, True, False, False]
    assert found.rungs[2].departs == departs


def test_a_picture_whose_detections_hang_on_an_overlap_at_the_limit_is_left_out_and_told() -> None:
    rows = np.zeros((3, 6), np.float32)
    rows[0] = (0, 0, 10, 10, 0.9, 1)
    other = rows.copy()
    other[0, 5] = 2
    tally = _Tally(1e-4)
    tally.add_selected([Selected(rows, rows, 1, False), Selected(rows, other, 1, True)], "")
    assert tally.rung(3, "x").passed
    assert tally.rung(3, "x").detail == "1 detections on 2 pictures, 1 left out: an overlap lies at the limit"
    tally.add_selected([Selected(rows, other, 1, False)], "")
    assert tally.rung(3, "x").departs == "detections"


def test_a_file_with_nms_is_scored_beside_its_model_by_what_it_keeps(tmp_path: Path) -> None:
    size = 64
    made = prepare(load_model("pico-v2")[0], recipe="8-8-8-int", vocabulary=TASK.vocabulary, size=size)
    calibrate(made, picture_batches(made, PICTURES[:1]), "minmax", 1)
    made.save(tmp_path / "prepared.pt")
    export(made, tmp_path / "model.onnx", outputs="nms", selection=KEPT)
    arguments = ["verify", tmp_path / "prepared.pt", tmp_path / "model.onnx", "shapes", "--count", 1, "--data", "shapes", "--pictures", 2]
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    rungs = json.loads(done.stdout)["rungs"]
    assert [rung["passed"] for rung in rungs[:4]] == [True] * 4
    assert (rungs[-1]["number"], rungs[-1]["detail"].split()[0]) == (5, "AP")
