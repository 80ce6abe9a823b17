"""What a study refuses before it measures anything, and what it leaves out where it is not asked."""

from dataclasses import replace

import pytest
from prepared_models import SIZE, calibrated_pico

from crqat_fx.checkpoint import write_checkpoint
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.errors import UserError
from crqat_fx.findings import load_study
from crqat_fx.models.yolo_world import YoloWorld, build
from crqat_fx.quantize.prepare import prepare
from crqat_fx.study import Contender, StudySettings, study

NOTHING = StudySettings(pictures=0, compared=0, noise=0, shown=0, verified=0, rounds=0, operators=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = build("pico", 1)
    write_checkpoint(folder / "float.pt", model, model.config, vocabulary=ShapesTask().vocabulary, metadata={"size": SIZE})
    calibrated_pico("4-8-8-int", "ort").save(folder / "ort.pt")
    prepare(model, recipe="8-8-8", vocabulary=ShapesTask().vocabulary, size=SIZE).save(folder / "open.pt")
    other = YoloWorld(replace(model.config, text_width=48))
    write_checkpoint(folder / "other.pt", other, other.config)
    return folder


def of(*named):
    return [Contender(each.stem, str(each)) for each in named]


def test_models_without_any_measurement_are_counted_and_every_gap_says_what_to_do(files, tmp_path):
    found = study(of(files / "float.pt", files / "ort.pt"), "shapes", NOTHING, title="t")
    first, second = found.models
    assert (found.size, found.names, found.shown, found.heat) == (SIZE, 240, (), ())
    assert (first.kind, first.recipe, second.kind, second.recipe, second.target) == ("float", None, "quantized", "4-8-8-int", "ort")
    assert second.counted.size_mib < first.counted.size_mib / 4
    assert second.counted.bops_t < first.counted.bops_t / 10
    assert (second.accuracy, second.drift, second.quantization, second.integers, second.ladder, second.speed) == (None,) * 6
    assert "--compared" in second.missing["drift"]
    assert "--noise" in second.missing["quantization"]
    assert "--pictures" in second.missing["accuracy"]
    assert second.missing["ladder"] == second.missing["integers"] == "not measured: it was not exported; leave --no-export out"
    assert found.graph.quantized
    assert {edge.bits for edge in found.graph.edges} >= {(8,)}
    found.save(tmp_path / "s.json")
    assert load_study(tmp_path / "s.json") == found


def test_a_float_model_has_its_stages_drawn_as_well(files):
    found = study(of(files / "float.pt"), "shapes", NOTHING)
    assert not found.graph.quantized
    assert {box.stage for box in found.graph.boxes} >= {"backbone", "neck-head"}


def test_the_pictures_that_ap_is_measured_on_do_not_limit_the_others(files):
    found = study(of(files / "float.pt", files / "ort.pt"), "shapes", replace(NOTHING, pictures=1, shown=3, noise=2))
    assert [model.accuracy.pictures for model in found.models] == [1, 1]
    assert found.models[0].accuracy.engine == "torch"
    assert len(found.shown) == len(found.models[1].found) == 3
    assert found.models[1].quantization.pictures == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no model to study; name one or more"),
        (("ort.pt", "float.pt"), r"ort\.pt: is prepared: the others are compared with a float model; name a checkpoint"),
        (("float.pt", "open.pt"), r"open\.pt: its quantizers have no ranges; prepare it again with --calibrate"),
        (("float.pt", "none.pt"), r"none\.pt"),
        (("other.pt",), r"other\.pt"),
    ],
)
def test_what_cannot_be_studied_is_told_at_once(files, names, message):
    with pytest.raises(UserError, match=message):
        study(of(*(files / name for name in names)), "shapes", NOTHING)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pictures": -1}, "pictures is -1"),
        ({"compared": 1}, "give at least 2 pictures"),
        ({"batch": 0}, "give a number from 1"),
        ({"threads": 0}, "threads is 0"),
        ({"conf": 1.5}, "give a number from 0 to 1"),
        ({"noise": -1}, "--noise"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, message):
    with pytest.raises(UserError, match=message):
        StudySettings(**changed)
