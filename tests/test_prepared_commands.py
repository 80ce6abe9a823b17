"""The commands that look at a prepared model, as the command line runs them."""

import json

import cv2
import pytest
from prepared_models import RECIPES, SIZE, calibrated_pico, pictures
from typer.testing import CliRunner

from crqat_fx.checkpoint import write_checkpoint
from crqat_fx.cli import app
from crqat_fx.cost import cost
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import build
from crqat_fx.quantize.prepare import load_prepared, prepare
from crqat_fx.recipe import QuantRecipe


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A prepared model for each target, and a checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    for recipe, target in RECIPES:
        calibrated_pico(recipe, target).save(folder / f"{target}.pt")
    model = build("pico", 1)
    write_checkpoint(folder / "float.pt", model, model.config, vocabulary=ShapesTask().vocabulary, metadata={"size": SIZE})
    return folder


@pytest.mark.parametrize("target", ["conv-inputs", "ort"])
def test_inspect_shows_a_prepared_model_and_draws_it(files, tmp_path, target):
    done = run("inspect", files / f"{target}.pt", "--json", "--graph", tmp_path / "g.html")
    report = json.loads(done.stdout)
    assert (report["kind"], report["target"], report["measured_on"]) == ("prepared", target, "4 drawn pictures")
    assert all(each["local"] is not None and each["end_to_end"] is not None for each in report["quantizers"])
    page = (tmp_path / "g.html").read_text(encoding="utf-8")
    assert f"{target}.pt: YOLO-World v1, pico" in page
    assert "backbone.image_model.stage4" in page
    assert (tmp_path / "g.html.settings.yaml").exists()
    shown = run("inspect", files / f"{target}.pt", "--depth", 0, "--graph", tmp_path / "g.svg").stdout
    assert "0.conv.weight" in shown
    assert "Measured on 4 drawn pictures" in shown
    assert (tmp_path / "g.svg").read_text(encoding="utf-8").startswith("<svg")


def test_inspect_measures_on_the_pictures_that_are_named(files, tmp_path):
    for number, picture in enumerate(pictures(3)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    reports = [
        json.loads(run("inspect", files / "ort.pt", "--json", *(more for each in named for more in ("--picture", each))).stdout)
        for named in ([tmp_path], [tmp_path / "0.png", tmp_path / "1.png", tmp_path / "2.png"], [tmp_path / "0.png"])
    ]
    assert reports[0]["tensors"] == reports[1]["tensors"] != reports[2]["tensors"]
    assert reports[2]["measured_on"] == f"1 of {tmp_path / '0.png'}"


def test_inspect_of_a_model_without_ranges_measures_nothing(tmp_path):
    prepare(build("pico", 1).eval(), None, "4-4-8", "conv-inputs", vocabulary=ShapesTask().vocabulary, size=SIZE).save(tmp_path / "p.pt")
    report = json.loads(run("inspect", tmp_path / "p.pt", "--json", "--graph", tmp_path / "g.svg").stdout)
    assert (report["calibrated"], report["tensors"], report["measured_on"]) == (False, {}, None)
    assert " dB</text>" not in (tmp_path / "g.svg").read_text(encoding="utf-8")


def test_a_checkpoint_has_a_page_too_and_no_noise(files, tmp_path):
    assert run("inspect", files / "float.pt", "--graph", tmp_path / "g.html").exit_code == 0
    assert "float.pt: YOLO-World v1, pico" in (tmp_path / "g.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="no quantization noise"):
        run("inspect", files / "float.pt", "--picture", tmp_path)


def test_stages_of_a_prepared_model_cannot_be_chosen_again(files):
    with pytest.raises(UserError, match="chosen when it was prepared"):
        run("inspect", files / "ort.pt", "--stages", 3)


def test_cost_counts_a_prepared_model_by_its_own_recipe(files):
    counted = json.loads(run("cost", files / "conv-inputs.pt", "--json").stdout)
    expected = cost(build("pico", 1), calibrated_pico(*RECIPES[0]).recipe, 240, SIZE, "conv-inputs")
    assert (counted["size_mib"], counted["bops_t"]) == (expected.total.size_mib, expected.total.bops_t)
    other = json.loads(run("cost", files / "conv-inputs.pt", "--recipe", "8-8-8", "--json").stdout)
    assert other["size_mib"] > counted["size_mib"]


def test_a_prepared_model_is_no_checkpoint_to_prepare_again(files):
    with pytest.raises(UserError, match="is a crqat-fx prepared file, not a checkpoint"):
        run("prepare", files / "ort.pt")


def test_sensitivity_writes_table_plot_and_a_recipe_that_prepare_takes_and_that_holds(files, tmp_path):
    out = tmp_path / "out"
    done = run(
        "sensitivity", files / "ort.pt", "--data", "shapes", "--pictures", 2, "--no-ap", "--size-mib", 1, "--widths", "8-8",
        "--calibrated-on", 4, "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0
    assert "stage1" in done.stdout
    assert "8-8" in done.stdout
    report = json.loads((out / "sensitivity.json").read_text(encoding="utf-8"))
    assert {each["block"] for each in report["blocks"]} >= set(report["proposal"]["blocks"])
    assert report["proposal"]["cost"]["size_mib"] <= 1
    assert (out / "sensitivity.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert "size_mib: 1.0  # flag" in (out / "settings.yaml").read_text(encoding="utf-8")
    prepared = tmp_path / "mixed.pt"
    assert run("prepare", files / "float.pt", "--recipe", out / "recipe.yaml", "--out", prepared).exit_code == 0
    assert load_prepared(prepared).recipe == QuantRecipe.load(out / "recipe.yaml")
    counted = json.loads(
        run("cost", files / "float.pt", "--recipe", out / "recipe.yaml", "--vocabulary", 240, "--size", SIZE, "--json").stdout
    )
    assert counted["size_mib"] == pytest.approx(report["proposal"]["cost"]["size_mib"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float.pt", "--data", "shapes"), "is a float model"),
        (("ort.pt", "--data", "shapes", "--size-mib", 1, "--bops-t", 1), "one budget"),
        (("ort.pt", "--data", "shapes", "--widths", "4"), "no pair of widths"),
        (("ort.pt", "--data", "shapes", "--pictures", 0), "pictures is 0"),
        (("ort.pt", "--data", "nowhere.yaml"), "nowhere.yaml"),
        (("ort.pt", "--data", "some.yaml", "--size-mib", 1), "--calibrate"),
        (("ort.pt", "--data", "shapes", "--counted", "twice"), "counted is 'twice'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured_or_written(files, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run("sensitivity", files / arguments[0], *arguments[1:], "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
