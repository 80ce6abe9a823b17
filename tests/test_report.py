"""A training run measured and shown: by the command, in its study, on its page, and in a browser as a reader has it."""

import html
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from studies import QUICK, trained_run
from typer.testing import CliRunner

from crqat_fx.charts import COLOURS
from crqat_fx.cli import app
from crqat_fx.errors import UserError
from crqat_fx.findings import Found, Picture, Study, load_study
from crqat_fx.report import PARTS, page, write_report
from crqat_fx.report_results import judged, overlap, verdict
from crqat_fx.report_style import STYLE

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
VOID = {"meta", "link", "br", "img"}


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run, the report that the command makes of it, and what the command said."""
    folder = tmp_path_factory.mktemp("study")
    training = trained_run(folder)
    done = run("report", training, "--out", folder / "report.html", *QUICK, "--json")
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout)


@pytest.fixture(scope="module")
def study(made) -> Study:
    return load_study(made[0] / "study.json")


# --- the command ---


def test_a_run_is_measured_as_what_taught_it_what_it_began_with_and_what_it_came_to(made, study):
    folder, said = made
    assert [model.label for model in study.models] == ["FP32", "PTQ 4-8-8-int", "CR-QAT 4-8-8-int"]
    assert [row["model"] for row in said["table"]] == [model.label for model in study.models]
    assert said["verdict"] == verdict(study)
    assert (folder / "report.html.settings.yaml").is_file()
    assert said["settings"]["pictures"] == {"value": 2, "from": "flag"}
    first, began, trained = study.models
    assert (study.data, study.size, study.names, study.metric) == ("shapes", 96, 240, "coco")
    for model in study.models:
        assert set(model.accuracy.ap) == {"all", "base", "novel", "r", "c", "f"}
        assert (model.accuracy.engine, model.accuracy.pictures) == ("onnxruntime", 2)
        assert model.speed.ratio.median > 0
    assert first.integers.coverage.integer_macs == 0
    for model in (began, trained):
        assert len(model.drift.region_text.embedding) == 3
        assert model.ladder.passed
        assert model.integers.coverage.wanted_share == 1
        assert len(model.quantization.quantizers) > 200
        assert all(each.clipped is not None and each.range is not None for each in model.quantization.quantizers)
        assert model.counted.size_mib < first.counted.size_mib / 5
    assert (began.training, trained.weights) == (None, "average")
    assert trained.training.log["loss"].steps == (1, 2, 3, 4)
    assert trained.training.log["trkd"].steps == (3, 4)
    assert (trained.training.log["ap_opening"].steps, trained.training.log["ap"].steps) == ((1, 3), (2, 4))
    assert set(trained.training.watched) == {"clipped weights", "clipped activations", "flipped weights"}
    assert [(phase.first, phase.last) for phase in trained.training.phases] == [(0, 2), (2, 4)]
    assert began.drift != trained.drift
    assert study.graph.label == trained.label
    assert {box.stage for box in study.graph.boxes} >= {"backbone", "neck-head"}
    assert set(first.missing) == {"drift", "training", "quantization", "ladder"}
    assert set(began.missing) == {"training"}
    assert not trained.missing


def test_a_study_is_drawn_again_without_being_measured(made, tmp_path):
    folder, said = made
    shutil.copy(folder / "study.json", tmp_path / "study.json")
    for place, name in ((tmp_path, "a.html"), (tmp_path / "study.json", "b.html")):
        again = run("report", place, "--out", tmp_path / name)
        assert again.exit_code == 0
        assert said["verdict"] in again.output.replace("\n", " ")
        assert (tmp_path / name).read_bytes() == (folder / "report.html").read_bytes()


def test_the_exit_status_says_that_a_file_departs(study, tmp_path):
    model = study.models[-1]
    rungs = (replace(model.ladder.rungs[0], passed=False, departs="a.b"), *model.ladder.rungs[1:])
    spoilt = replace(study, models=(*study.models[:-1], replace(model, ladder=replace(model.ladder, rungs=rungs))))
    spoilt.save(tmp_path / "study.json")
    done = run("report", tmp_path, "--out", tmp_path / "r.html")
    assert done.exit_code == 1
    assert "does not compute what the model does" in done.output.replace("\n", " ")
    assert "Departs first: stored codes: a.b" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{empty}",), "study.json: cannot be read"),
        (("{empty}/none",), "none: cannot be read"),
        (("{empty}", "--quick"), "is no training run; leave out --quick"),
        (("{empty}", "--no-export"), "leave out --no-export"),
        (("{empty}/none", "--pictures", "3"), "none: is not there; leave out --pictures, or name a run's folder"),
        (("{empty}", "--config", "{run}/settings.yaml"), "leave out --config"),
        (("{run}", "--out", "{empty}/r.txt"), "r.txt is no .html; name a file that ends in it"),
        (("{run}", "--out", "{run}/log.jsonl/r.html"), "cannot be written"),
        (("{run}", "--pictures", "-1"), "pictures is -1"),
        (("{run}", "--compared", "1"), "give at least 2 pictures"),
        (("{run}", "--conf", "2"), "conf is 2.0"),
        (("{run}", "--teacher", "{empty}/none.pt"), "none.pt"),
        (("{run}", "--data", "{empty}/none.yaml"), "none.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(made, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "run": made[0] / "run"}
    given = [each.format(**places) for each in arguments]
    out = [] if "--out" in given else ["--out", tmp_path / "empty" / "r.html"]
    before = sorted((made[0] / "run").rglob("*"))
    with pytest.raises(UserError, match=re.escape(message)) as failed:
        CliRunner().invoke(app, ["report", *given, *map(str, out)], catch_exceptions=False)
    assert "\n" not in str(failed.value)
    assert list((tmp_path / "empty").iterdir()) == []
    assert sorted((made[0] / "run").rglob("*")) == before


# --- the page ---


class Outline(HTMLParser):
    """Which elements a page has, and whether each is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_has_every_section_with_what_it_is_there_for(made, study):
    text = (made[0] / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.open == []
    ids = [attributes["id"] for _, attributes in outline.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] for tag, attributes in outline.found if tag in ("a", "use")}
    assert links <= {f"#{each}" for each in ids}
    assert {f"#{part.address}" for part in PARTS} <= links
    sections = dict(re.findall(r'<section id="([a-z]+)".*?>(.*?)</section>', text, re.DOTALL))
    assert list(sections) == [part.address for part in PARTS]
    holds = {
        "results": ("AP novel", "÷", "AP by group of names", "AP against size", "AP against speed", "in onnxruntime"),
        "pictures": ("data:image/jpeg;base64,", "annotated", "FP32", "CR-QAT 4-8-8-int", "right,", "a score of 0.1 or more"),
        "drift": ("Pearson", "moved by", "region-text, confidence", 'class="cell"', "FP32: the others are compared with it"),
        "training": (
            "cr-qat, taught by pico-v2, 4 steps in 2 phases",
            "2 neck-head",
            "relations taught",
            "flipped weights",
            "AP, as phases open and end",
            "hold it against itself",
        ),
        "quantizers": ("SQNR", "Clipped share", "Ranges of activations", "every quantizer (", "FP32: it has no quantizers"),
        "stages": ("bottom_up_layers.1", "neck-head", "W4"),
        "integers": ("100.0%", "QLinearConv", "stray Transposes", "ms in turns", "Where the time goes"),
        "ladder": ("1. stored codes", "4. onnxruntime, optimised", "✓ holds", "FP32: a file in floats has no codes"),
        "measured": ("240 names", "96 px", "COCO AP", "processor"),
    }
    for address, words in holds.items():
        for word in words:
            assert word in sections[address], (address, word)
    assert f"{study.models[1].speed.milliseconds.low:.1f} to {study.models[1].speed.milliseconds.high:.1f}" in sections["integers"]
    assert len(text) < 6e6
    assert text.count("data:image/jpeg") == len(study.shown) + len(study.heat)


def test_no_address_leads_out_of_the_page(made):
    text = (made[0] / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"url\(|@import|<iframe|<object|<embed", text)
    addresses = {value for _, attributes in Outline(text).found for name, value in attributes.items() if name in ("href", "src", "srcset")}
    assert all(each.startswith(("#", "data:")) for each in addresses)


def test_what_comes_from_outside_is_text_and_nothing_else(study):
    picture = replace(study.shown[0], name=HOSTILE, names=(HOSTILE,) * len(study.shown[0].names), jpeg=HOSTILE)
    model = study.models[-1]
    rungs = tuple(replace(each, name=HOSTILE, detail=HOSTILE, departs=HOSTILE, passed=False) for each in model.ladder.rungs)
    quantizers = tuple(replace(each, name=HOSTILE, block=HOSTILE, stage=HOSTILE) for each in model.quantization.quantizers[:3])
    blocks = tuple(replace(each, block=HOSTILE, stage=HOSTILE) for each in model.quantization.blocks[:3])
    training = replace(
        model.training, method=HOSTILE, teacher=HOSTILE, log={HOSTILE: model.training.log["loss"]},
        phases=tuple(replace(each, quantized=(HOSTILE,), losses=(HOSTILE,)) for each in model.training.phases),
    )  # fmt: skip
    times = tuple(replace(each, kind=HOSTILE) for each in model.integers.times)
    spoilt = replace(
        model, label=HOSTILE, file=HOSTILE, recipe=HOSTILE, target=HOSTILE, weights=HOSTILE, training=training,
        found=tuple(replace(each, names=(HOSTILE,) * len(each.names)) for each in model.found),
        quantization=replace(model.quantization, quantizers=quantizers, blocks=blocks),
        ladder=replace(model.ladder, rungs=rungs, collapsed={HOSTILE: HOSTILE}), integers=replace(model.integers, times=times),
        missing=dict.fromkeys(("training", "ladder", "speed"), HOSTILE),
    )  # fmt: skip
    boxes = tuple(replace(each, label=HOSTILE, lines=(HOSTILE,), told=HOSTILE, stage=HOSTILE) for each in study.graph.boxes)
    text = page(
        replace(
            study, title=HOSTILE, data=HOSTILE, models=(*study.models[:-1], spoilt), shown=(picture, *study.shown[1:]),
            heat=tuple(replace(each, picture=replace(each.picture, name=HOSTILE)) for each in study.heat),
            graph=replace(study.graph, label=HOSTILE, boxes=boxes), machine={HOSTILE: HOSTILE},
        )
    )  # fmt: skip
    outline = Outline(text)
    assert [tag for tag, _ in outline.found].count("script") == 1  # the page's own
    assert not [attributes for _, attributes in outline.found if any(name.startswith("on") for name in attributes)]
    assert not [tag for tag, _ in outline.found if tag == "img"]
    assert text.count(html.escape(HOSTILE)) > 20
    assert "alert" not in re.sub(re.escape(html.escape(HOSTILE)), "", text).replace(html.escape(HOSTILE)[:20], "")


def test_what_was_not_measured_is_told_with_its_reason(study):
    bare = tuple(
        replace(
            model, accuracy=None, counted=None, speed=None, drift=None, training=None, quantization=None, integers=None, ladder=None,
            found=(), missing=dict.fromkeys(("accuracy", "drift", "training", "quantization", "integers", "ladder"), "nobody asked"),
        )
        for model in study.models
    )  # fmt: skip
    text = page(replace(study, models=bare, shown=(), heat=(), graph=None))
    Outline(text)
    assert text.count("FP32, PTQ 4-8-8-int, CR-QAT 4-8-8-int: nobody asked") == 5
    assert "FP32, PTQ 4-8-8-int, CR-QAT 4-8-8-int: accuracy: nobody asked" in text
    assert "Neither accuracy nor cost was measured" in text
    assert "Nothing was measured." in text


def test_of_very_many_boxes_the_best_are_drawn_and_all_are_counted(study):
    box, picture = study.shown[0].boxes[0], study.shown[0]
    many = Found((box,) * 300, (0.5,) * 300, (picture.names[0],) * 300)
    text = page(replace(study, models=(replace(study.models[0], found=(many,)),), shown=(picture,), heat=(), graph=None))
    assert f"1 right, 299 wrong, {len(picture.boxes) - 1} missed" in text
    assert text.count(", twice</title>") == 39
    assert "and 288 more" in text


def test_a_study_of_one_model_has_a_page(study):
    alone = replace(study, models=study.models[:1], heat=())
    assert "FP32 alone was measured: AP" in page(alone)


def luminance(colour: str) -> float:
    full = colour if len(colour) == 7 else "#" + "".join(2 * each for each in colour[1:])
    parts = [int(full[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_marks_stand_out_from_the_page(theme):
    root = STYLE.split(":root {")[1 if theme == "light" else 2].split("}")[0]
    colours = {name: luminance(value) for name, value in re.findall(r"--(\w+): (#\w+)", root)}

    def contrast(one, other):
        return (max(colours[one], colours[other]) + 0.05) / (min(colours[one], colours[other]) + 0.05)

    for name in ("text", "muted", "accent", "good", "bad"):
        assert contrast(name, "page") >= 4.5, name
        assert contrast(name, "tint") >= 4.5, name
    for number in range(COLOURS):
        assert contrast(f"m{number}", "page") >= 3.5, number


# --- what its sentences say ---


def test_the_verdict_is_of_the_best_trained_model_against_the_first(study):
    told = verdict(study)
    ap = [f"{model.accuracy.ap['all']:.1f}" for model in study.models]
    assert told.startswith(f"CR-QAT 4-8-8-int keeps {ap[2]} of {ap[0]} AP")
    assert f"Not trained, the same bits give {ap[1]}." in told
    assert "7.1 times smaller" in told
    worse = replace(study.models[-1], label="worse", accuracy=replace(study.models[-1].accuracy, ap={"all": 0.0}))
    assert verdict(replace(study, models=(*study.models, worse))).startswith("CR-QAT 4-8-8-int keeps")
    untrained = replace(study, models=study.models[:2])
    assert verdict(untrained).startswith(f"PTQ 4-8-8-int keeps {ap[1]}")
    assert "Not trained" not in verdict(untrained)


def test_boxes_are_judged_by_name_place_and_once():
    picture = Picture(
        "p", 100, 100, "", ((0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0), (80.0, 80.0, 90.0, 90.0)), ("cat", "dog", "cat")
    )
    found = Found(
        ((0.0, 0.0, 10.0, 9.0), (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0), (20.0, 20.0, 30.0, 30.0), (80.0, 80.0, 90.0, 84.0)),
        (0.9, 0.8, 0.7, 0.6, 0.5), ("cat", "cat", "cat", "cat", "cat"),
    )  # fmt: skip
    seen = judged(picture, found)
    assert seen.boxes == ("right", "twice", "wrong name", "nothing there", "nothing there")
    assert seen.missed == (1, 2)
    assert seen.told() == "1 right, 4 wrong, 2 missed"
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0


# --- in a browser ---

WIDTHS = {"phone": 390, "desk": 1400}
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: install Debian's package")


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory) -> Path:
    named = os.environ.get("CRQAT_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_it_shows_every_section_without_a_complaint_and_without_scrolling_sideways(made, shown, screenshots, device, dark):
    shown.open(made[0] / "report.html", WIDTHS[device], dark=dark)
    assert shown.run("document.documentElement.scrollWidth") == WIDTHS[device]
    visible = shown.run("[...document.querySelectorAll('main > section')].filter(each => each.checkVisibility()).map(each => each.id)")
    assert visible == [part.address for part in PARTS]
    background = shown.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 23, 27)") == dark
    loaded = shown.run("[...document.querySelectorAll('svg.picture')].every(each => each.getBoundingClientRect().width > 100)")
    assert loaded is True
    cut = shown.run(
        "[...document.querySelectorAll('main *')].filter(each => !each.closest('.scroll') && !each.closest('svg') && "
        "each.checkVisibility() && each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML.slice(0, 80))"
    )
    assert cut == []
    taken = screenshots / f"report-{device}-{'dark' if dark else 'light'}.png"
    shown.screenshot(taken)
    assert taken.stat().st_size > 100_000
    assert shown.complaints() == []
    assert all(each.startswith(("file:", "data:")) for each in shown.asked_for())


@needs_chromium
def test_it_prints_whole_and_without_what_only_a_screen_needs(made, shown):
    shown.open(made[0] / "report.html", 794, media="print")
    assert shown.run("document.documentElement.scrollWidth") == 794
    assert not shown.run("document.querySelector('nav').checkVisibility()")
    kept = shown.run("[...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > 796).map(each => each.ariaLabel)")
    assert kept == []


@needs_chromium
def test_words_in_charts_stay_in_their_charts(made, shown):
    shown.open(made[0] / "report.html", 390)
    outside = shown.run(
        "[...document.querySelectorAll('svg.chart text')].filter(each => { const a = each.getBoundingClientRect(), "
        "b = each.ownerSVGElement.getBoundingClientRect(); "
        "return a.left < b.left - 2 || a.right > b.right + 2 || a.bottom > b.bottom + 2 }).map(each => each.textContent)"
    )
    assert outside == []


@needs_chromium
def test_the_keyboard_reaches_contents_tables_and_what_is_folded(made, shown):
    shown.open(made[0] / "report.html", 1400)
    reached = []
    while "BODY" not in reached and len(reached) < 200:
        shown.press("Tab")
        reached.append(
            shown.run(
                "(() => { const a = document.activeElement; return a.className === 'skip' ? 'skip' : a.closest('nav') ? 'nav ' + a.hash : "
                "a.matches('.scroll') ? 'table ' + a.getAttribute('aria-label') : a.tagName })()"
            )
        )
        outline = shown.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or reached[-1] in ("g", "BODY"), reached[-1]  # boxes of the graph have a ring of their own
    assert reached[0] == "skip"
    assert reached[1 : 1 + len(PARTS)] == [f"nav #{part.address}" for part in PARTS]
    assert reached[1 + len(PARTS)] == "table closing table"
    assert "SUMMARY" in reached
    assert "table the stage graph" in reached
    shown.open(made[0] / "report.html", 1400)
    shown.press("Tab")
    shown.press("Enter")
    assert shown.run("location.hash + ' ' + document.activeElement.id") == "#main main"


@needs_chromium
def test_a_hostile_page_runs_nothing(study, shown, tmp_path):
    write_report(replace(study, title=HOSTILE, data=HOSTILE), tmp_path / "r.html")
    shown.open(tmp_path / "r.html", 390)
    assert shown.run("document.title") == HOSTILE
    assert not [each for each in shown.events if each.get("method") == "Page.javascriptDialogOpening"]
