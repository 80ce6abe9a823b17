"""The ablation's plan, its statistics, and that a run goes on where it stopped."""

import dataclasses
import fnmatch
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import ablation
import ablation_plan
from ablation_plan import HEADLINE, METHODS, PROTOCOL, PTQ, QUICK, SEEDS, TRAINED, TRAININGS, TUNING, Cell, Result, cell_of, plan
from ablation_tables import PAIRS, Row, ap, drift, less, mean_of, tables

from crqat_fx.errors import UserError

COMMITTED = ablation.read_results(ablation.RESULTS)
AGAIN = ablation.read_results(ablation.again_in(ablation.RESULTS))
TINY = {**PROTOCOL, **QUICK, "observer": "minmax"}


def result_of(cell: Cell, of_all: float, **others: float) -> Result:
    drifts = {kind: {"embedding": 0.1, "confidence": 0.2, "pearson": None} for kind in ("region_text", "region_region")}
    of_groups = {"all": of_all, **{name: others.get(name, of_all) for name in ("base", "novel", "r", "c", "f")}}
    return Result(cell, of_groups, drifts, {}, {"prepared and trained": 50.0, "measured": 10.0}, {"commit": "abc"})


def measured(value=lambda cell: 10.0, trained_too: bool = True) -> dict[str, Result]:
    """Results of every cell, as the plan grows."""
    results: dict[str, Result] = {}
    while missing := [cell for cell in plan(results) if cell.name not in results]:
        if not trained_too and all(not cell.name.startswith("tuning/") for cell in missing):
            break
        results |= {cell.name: result_of(cell, value(cell)) for cell in missing}
    return results


# --- the plan ---


def test_every_method_of_a_block_has_every_seed_and_seeds_come_whole():
    cells = plan(measured(trained_too=False))
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for block in TRAINED:
        wanted = [f"{block.recipe}/{block.target}/{variant}.{seed}" for seed in block.seeds for variant in block.variants]
        assert [name for name in names if name in wanted] == wanted  # in this order: a stop leaves whole pairs
    assert names.index(f"{HEADLINE}/conv-inputs/cr-qat.1") < names.index(f"{HEADLINE}/conv-inputs/qat.2")
    for recipe, variant in itertools.product(ablation_plan.WIDTHS, (*PTQ, *METHODS)):
        assert {cell.seed for cell in cells if (cell.recipe, cell.variant) == (recipe, variant) and "tuning" not in cell.name} == set(SEEDS)


def test_seeds_of_tuning_serve_nothing_else():
    rates, kd = ({seed for each in TUNING if each.method == method for seed in each.seeds} for method in ("qat", "cr-qat"))
    assert not rates & kd
    assert not (rates | kd) & set(SEEDS)
    assert {cell.seed for cell in plan(measured()) if cell.name.startswith("tuning/")} == rates | kd


def test_methods_differ_in_what_their_name_says_and_nothing_else():
    chosen = {"rate", "ema", "trkd_factor"}
    for cell in plan(measured(lambda cell: min(cell.settings.get("rate", 0), 1e-3) * 1e4 + cell.settings.get("ema", 0))):
        if cell.trained and not cell.name.startswith("tuning/"):
            own = TRAININGS[cell.variant]
            assert {name: cell.settings[name] for name in own} == dict(own)
            assert {name: value for name, value in cell.settings.items() if name not in own and name not in chosen} == {
                name: value for name, value in PROTOCOL.items() if name not in own and name not in chosen
            }
            assert (cell.settings["rate"], cell.settings["ema"]) == (own.get("rate", 1e-3), 0.3)  # what tuning chose


def test_methods_of_the_paper_get_the_same_steps_data_and_rate():
    same = ("steps", "batch", "pictures", "texts", "rate", "schedule", "ema", "norm", "observer", "calibration", "evaluated")
    for variant in (*METHODS, *ablation_plan.TRKD, *ablation_plan.THREE):
        assert not set(TRAININGS[variant]) & set(same)


def test_the_method_that_came_of_it_is_what_was_measured():
    (cell,) = (each for each in plan(COMMITTED) if each.name == f"{HEADLINE}/conv-inputs/cr-qat-correct-decay.1")
    measured_as = ablation.settings_of(cell, ablation.drawn_task())
    assert measured_as.method == "cr-qat"
    kept = dataclasses.replace(measured_as, method="cr-qat-plus")  # refused where a setting were another
    for stages in (("backbone", "neck-head"), ("backbone", "neck", "head")):
        given = {"shares": None} if len(stages) == 2 else {"shares": (0.2, 0.3, 0.5)}
        assert dataclasses.replace(kept, **given).plan(stages) == dataclasses.replace(measured_as, **given).plan(stages)
    assert kept.schedule == measured_as.schedule == "linear"


def test_tuning_takes_the_best_mean_and_waits_until_all_is_measured():
    (tuning, *_) = TUNING
    # the last two are out after their first seed
    values = {2e-4: (15.0, 16.0), 5e-4: (12.0, 19.5), 1e-3: (15.0, 15.0), 2e-3: (5.0, 99.0), 4e-3: (1.0, 99.0)}

    def found(*pairs: tuple[float, int]) -> dict[str, Result]:
        cells = [ablation_plan.tuning_cell(tuning, PROTOCOL, {"rate": rate}, seed) for rate, seed in pairs]
        return {cell.name: result_of(cell, values[cell.settings["rate"]][tuning.seeds.index(cell.seed)]) for cell in cells}

    def asked_for(results: dict[str, Result]) -> set[tuple[float, int]]:
        cells = ablation_plan.tuning_cells(tuning, PROTOCOL, results)
        return {(cell.settings["rate"], cell.seed) for cell in cells if cell.name not in results}

    firsts = [(rate, 101) for rate in values]
    seconds = [(rate, 102) for rate in values if rate < 2e-3]
    assert asked_for({}) == set(firsts)
    assert asked_for(found(*firsts[:-1])) == {firsts[-1]}
    assert asked_for(found(*firsts)) == set(seconds)
    assert ablation_plan.choose(tuning, PROTOCOL, found(*firsts, *seconds[1:])) is None
    assert not any(cell.variant in METHODS and cell.seed in SEEDS for cell in plan(found(*firsts, *seconds[1:])))
    assert ablation_plan.choose(tuning, PROTOCOL, found(*firsts, *seconds))["rate"] == 5e-4


def test_the_protocol_in_words_is_the_one_that_runs():
    words = (ablation.RESULTS.parent / "protocol.md").read_text(encoding="utf-8")
    assert f"{PROTOCOL['steps']} steps of {PROTOCOL['batch']} pictures, {PROTOCOL['texts']} texts" in words
    assert f"first {PROTOCOL['evaluated']} pictures" in words.replace("\n", " ")
    assert f"first {PROTOCOL['compared']}." in words
    seeds = [str(seed) for each in TUNING[::2] for seed in each.seeds]
    assert "Tuning has the seeds {} and {} (QAT) and {} and {} (KD); evaluation 1 to 5.".format(*seeds) in words
    for number, tuning in enumerate(TUNING, 1):
        (line,) = re.findall(rf"^{number}\. .*(?:rate of|horizon of|factor, on) {tuning.method.upper()}.*$", words, re.MULTILINE)
        told = re.findall(r"(?<![\w.])[\d.]+(?:e-\d)?(?![\w)])", line.split(":", 1)[1])
        assert told[: len(tuning.candidates)] == [spelt(value) for candidate in tuning.candidates for value in candidate.values()]
    for block in TRAINED:
        assert block.recipe in words
    cells = plan(COMMITTED)
    assert f"all: {len(cells)} cells, {sum(cell.trained for cell in cells)} of them" in words.replace("\n", " ")


def test_rows_of_the_other_processor_are_those_that_the_protocol_names():
    words = (ablation.RESULTS.parent / "protocol.md").read_text(encoding="utf-8").replace("\n", " ")
    told = re.findall(r"`([^`]+)`", re.search(r"\*\*Two processors\.\*\*(.*?) were run on one", words)[1])
    for name, result in COMMITTED.items():
        of_it = any(fnmatch.fnmatch(word, each) for word in (result.cell.recipe, result.cell.variant) for each in told)
        assert (result.versions.get("processor") == "AVX2") == of_it, name


def spelt(value: float) -> str:
    """As the protocol writes it."""
    return f"{value:.0e}".replace("e-0", "e-") if value < 0.01 else f"{value:g}".removeprefix("0")


def test_what_is_committed_belongs_to_the_plan():
    cells = {cell.name: cell for cell in plan(COMMITTED)}
    for kept in (COMMITTED, AGAIN):
        assert {name: result.cell for name, result in kept.items()} == {name: cells.get(name) for name in kept}


def test_what_is_committed_is_what_the_tables_show():
    written = ablation.RESULTS.with_suffix(".md")
    assert not COMMITTED or written.read_text(encoding="utf-8") == tables(COMMITTED, AGAIN)


def test_a_trial_is_a_cell_of_another_seed_with_settings_changed():
    found = ablation_plan.trial_cell("2-2-8/conv-inputs/cr-qat", ["steps=2000", "schedule=linear", "shares=[0.1, 0.9]"], COMMITTED)
    known = next(cell for cell in plan(COMMITTED) if cell.name == "2-2-8/conv-inputs/cr-qat.1")
    assert found.settings == {**known.settings, "steps": 2000, "schedule": "linear", "shares": (0.1, 0.9)}
    assert found.seed not in {*SEEDS, *(seed for tuning in TUNING for seed in tuning.seeds)}
    for asked, what in (
        ("cr-qat", "is no trial"),
        ("2-2-8/conv-inputs/cr-qat steps", "is no trial"),
        ("2-2-8/conv-inputs/crqat", "unknown variant"),
        ("2-2-8/conv-inputs/cr-qat step=2", "unknown setting 'step'"),
        ("2-2-8/conv-inputs/ptq-omse steps=2", "unknown setting 'steps'"),
    ):
        name, *changes = asked.split()
        with pytest.raises(UserError, match=what):
            ablation_plan.trial_cell(name, changes, COMMITTED)
    for change in ("steps=abc", "evaluated=2.5", "calibration=true", "rate=fast", "shares=1"):
        with pytest.raises(UserError, match=f"{change.replace('=', ' is ')}; give it as it is known"):
            ablation_plan.trial_cell("2-2-8/conv-inputs/cr-qat", [change], COMMITTED)
    assert ablation_plan.trial_cell("2-2-8/conv-inputs/qat", ["quantizer_rate=5"], COMMITTED).settings["quantizer_rate"] == 5.0
    unknown = ablation_plan.trial_cell("2-2-8/conv-inputs/cr-qat", ["schedule=cosine"], COMMITTED)
    with pytest.raises(UserError, match="give one of linear, constant"):
        ablation.settings_of(unknown, ablation.drawn_task())
    with pytest.raises(UserError, match="not tuned yet"):
        ablation_plan.trial_cell("2-2-8/conv-inputs/cr-qat", [], {})


# --- statistics and tables ---


def test_means_and_their_errors():
    found = mean_of([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert found.significant  # 2.5 against 2 x 0.645
    assert not mean_of([-1.0, 2.0, -3.0, 4.0]).significant
    assert mean_of([7.0]).error is None
    assert not mean_of([7.0]).significant


def test_differences_are_between_runs_of_one_seed():
    def row(variant: str, values: dict[int, float]) -> Row:
        runs = {seed: result_of(cell_of(HEADLINE, "conv-inputs", variant, seed, PROTOCOL), value) for seed, value in values.items()}
        return Row(HEADLINE, "conv-inputs", variant, runs)

    own, other = row("cr-qat", {1: 11.0, 2: 21.0, 3: 32.0, 9: 99.0}), row("qat", {1: 10.0, 2: 20.0, 3: 30.0, 8: 0.0})
    found = own.difference(other, ap("all"))
    assert found is not None
    assert (found.mean, found.count) == (pytest.approx(4 / 3), 3)
    assert found.error == pytest.approx(1 / 3)  # of 1, 1, 2; the spread of the seeds, which is far greater, has gone
    assert found.significant
    assert own.difference(row("qat", {8: 1.0}), ap("all")) is None
    assert own.difference(other, drift("region_text", "pearson")) is None


def test_tables_show_means_errors_and_what_wins():
    gain = {"fp32": 80.0, "qat": 20.0, "cr-qat": 23.0}
    text = tables(measured(lambda cell: gain.get(cell.variant, 19.0) + 0.5 * cell.seed), {})
    lines = text.splitlines()
    methods = lines[lines.index(f"## Methods at {HEADLINE}") :]
    assert next(line for line in methods if line.startswith("| cr-qat |")).startswith("| cr-qat | 5 | 24.5 ± 0.4 |")
    differences = methods[next(number for number, line in enumerate(methods) if line.startswith("| less qat")) :]
    assert next(line for line in differences if line.startswith("| cr-qat |")).startswith("| cr-qat | 5 | +3.0 ± 0.0* |")
    assert f"| {HEADLINE} | 25% | 27% |" in lines  # of 80.5: 20.5, and 21.5
    assert "| qat | rate 0.0002 | 70.5, 71.0 | chosen |" in lines  # of equal ones the first
    assert "## Two stages and three, 2-2-8" in lines
    for pairs in PAIRS.values():  # a misspelt row would be left out in silence
        for own, other in pairs:
            assert f"| {less(own, other)} | 5 | " in text
    assert "| 2-2-8: cr-qat less cqat | 5 | +4.0 ± 0.0* |" in text
    assert "| cr-qat: 4-8-8-int/ort less 4-8-8 | 5 | +0.0 ± 0.0 |" in text
    assert "| 2-2-8-odd/cr-qat-correct-decay less 2-2-8/cr-qat | 5 | -4.0 ± 0.0* |" in text


def test_tables_of_a_part_show_that_part():
    cells = [cell_of(HEADLINE, "conv-inputs", variant, 1, PROTOCOL) for variant in ("qat", "cr-qat")]
    text = tables({cell.name: result_of(cell, 20.0) for cell in cells}, {})
    assert "| cr-qat | 1 | 20.0 | 20.0 |" in text
    assert "| cr-qat | 1 | +0.0 | +0.0 |" in text  # one pair: no error, no mark
    assert "3-3-8" not in text
    assert tables({}, {}).startswith("# Ablation")


def test_what_ran_again_is_compared_with_what_there_was_and_with_rows_of_its_processor():
    def run(variant: str, seed: int, of_all: float, processor: str) -> Result:
        found = result_of(cell_of(HEADLINE, "conv-inputs", variant, seed, PROTOCOL), of_all)
        return dataclasses.replace(found, versions={"commit": "abc", "processor": processor})

    def by_name(*runs: Result) -> dict[str, Result]:
        return {each.cell.name: each for each in runs}

    results = by_name(
        *(run("cr-qat-short-decay", seed, 27.0, "AVX2") for seed in SEEDS),
        *(run("cr-qat", seed, 30.0, "AVX512") for seed in SEEDS),
        *(run("cqat", seed, 20.0, "AVX512") for seed in SEEDS),
        *(run("cr-qat-short", seed, 25.0 + seed, "AVX2") for seed in SEEDS),
    )
    again = (run("cr-qat", 1, 28.0, "AVX2"), run("cr-qat", 2, 31.0, "AVX2"), run("cr-qat-short-decay", 1, 50.0, "AVX512"))
    text = tables(results, by_name(*again))
    ran, on_one = (text.split(f"\n## {title}\n")[1] for title in ("Cells run again", "What a short first stage does: all with AVX2"))
    assert "| 2-2-8/conv-inputs/cr-qat | 2 | 30.0 ± 0.0 | 29.5 ± 1.5 | -0.5 ± 1.5 |" in ran
    assert "| 2-2-8: cr-qat-short less cr-qat † | 5 | -2.0 ± 0.7* |" in text.split("\n## Cells run again\n")[0]
    assert "| 2-2-8: cr-qat-short less cr-qat | 2 | -3.0 ± 1.0* |" in on_one  # 26 less 28, 27 less 31
    assert "| 2-2-8: cr-qat-short-decay less cr-qat-short | 5 | -1.0 ± 0.7 |" in on_one  # though it ran elsewhere, too
    assert "| 2-2-8: cr-qat less cqat | 5 | +10.0 ± 0.0* |" in text.split("## What the teacher does: all with AVX512")[1]
    assert "cr-qat less cqat" not in on_one.split("all with AVX512")[0]  # which did not run there


# --- running ---


def test_a_cell_is_measured_alone_and_again_the_same():
    cell = cell_of(HEADLINE, "conv-inputs", "cr-qat", 1, TINY)
    first, again, other = (ablation.run_cell(each) for each in (cell, cell, cell_of(HEADLINE, "conv-inputs", "cr-qat", 2, TINY)))
    assert {name: getattr(first, name) for name in ("ap", "distortion", "log")} == {
        name: getattr(again, name) for name in ("ap", "distortion", "log")
    }
    assert first.log["cls"] != other.log["cls"]
    assert first.log["step"] == (1.0, 3.0)  # the end of each phase
    assert first.log["trkd"][0] is None
    assert first.log["trkd"][1] > 0
    assert set(first.ap) == {"all", "base", "novel", "r", "c", "f"}
    assert first.distortion["region_region"]["embedding"] > 0


def test_results_are_read_as_they_were_written(tmp_path):
    cell = cell_of(HEADLINE, "conv-inputs", "cr-qat-short", 1, PROTOCOL)  # its shares are a tuple
    result = dataclasses.replace(result_of(cell, 12.5), log={"trkd": (None, 0.5)})
    ablation.save(result, tmp_path)
    assert ablation.read_results(tmp_path) == {cell.name: result}


@pytest.fixture
def two_cells(monkeypatch) -> list[Cell]:
    """A plan of two cells that take no training."""
    cells = [cell_of("fp32", "conv-inputs", "fp32", 1, TINY), cell_of("8-8-8", "conv-inputs", "ptq-minmax", 1, TINY)]
    monkeypatch.setattr(ablation, "plan", lambda results: cells)
    return cells


def test_what_is_done_is_not_run_again_and_what_was_cut_short_is(tmp_path, two_cells, capsys):
    done, cut = (ablation.path_of(cell, tmp_path) for cell in two_cells)
    ablation.save(result_of(two_cells[0], 12.5), tmp_path)
    whole = done.read_bytes()
    cut.parent.mkdir(parents=True, exist_ok=True)
    cut.write_bytes(whole[: len(whole) // 2])
    assert ablation.run_cells(tmp_path, ["*"], jobs=2)
    assert done.read_bytes() == whole
    results = ablation.read_results(tmp_path)
    assert results[two_cells[1].name].ap["all"] > 0
    told = capsys.readouterr()
    assert str(cut) in told.err
    assert two_cells[1].name in told.out
    assert two_cells[0].name not in told.out


def test_only_what_is_asked_for_is_run(tmp_path, two_cells):
    assert ablation.run_cells(tmp_path, ["fp32/*"], jobs=1)
    assert list(ablation.read_results(tmp_path)) == [two_cells[0].name]
    with pytest.raises(UserError, match="no cell is called fp23/"):
        ablation.run_cells(tmp_path, ["fp23/*"], jobs=1)
    assert ablation.run_cells(tmp_path, ["fp23/*", "*ptq*"], jobs=1)
    assert len(ablation.read_results(tmp_path)) == 2


def test_a_cell_that_runs_again_leaves_what_there_is(tmp_path, two_cells):
    folder, kept = tmp_path / "ablation", ablation.path_of(two_cells[0], tmp_path / "ablation")
    ablation.save(result_of(two_cells[0], 12.5), folder)
    whole = kept.read_bytes()
    assert ablation.run_cells(folder, ["fp32/*"], jobs=1, again=True)
    assert kept.read_bytes() == whole
    (again,) = ablation.read_results(tmp_path / "ablation-again").values()
    assert again.cell == two_cells[0]
    assert again.ap["all"] != 12.5
    assert again.versions["processor"] == torch.backends.cpu.get_cpu_capability()
    written = ablation.path_of(two_cells[0], tmp_path / "ablation-again")
    stamp = written.stat().st_mtime_ns
    assert ablation.run_cells(folder, ["fp32/*"], jobs=1, again=True)  # once
    assert written.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("arguments", [("--only", "fp23/*"), ("--trial", "crqat"), ("--jobs", "0")])
def test_bad_input_is_told_and_ends_with_2(tmp_path, arguments):
    script = Path(ablation.__file__)
    told = subprocess.run([sys.executable, script, *arguments, "--results", tmp_path], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout) == (2, "")
    assert "Traceback" not in told.stderr
    assert arguments[1] in told.stderr


def test_a_result_of_another_plan_is_refused(tmp_path, two_cells):
    other = dataclasses.replace(two_cells[0], settings={**two_cells[0].settings, "evaluated": 5})
    ablation.save(result_of(other, 12.5), tmp_path)
    with pytest.raises(UserError, match="other settings") as caught:
        ablation.run_cells(tmp_path, ["*"], jobs=1)
    assert str(ablation.path_of(other, tmp_path)) in str(caught.value)
