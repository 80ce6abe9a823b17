"""Recipes for a budget: the choice against trying everything, what is written, and that it holds where it is prepared and counted."""

import itertools
import random

import pytest
import torch
from prepared_models import RECIPES, SIZE, calibrated_pico, pictures

from crqat_fx.cost import cost
from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.errors import UserError
from crqat_fx.mixed_recipe import Budget, Option, Widths, choose, float_model, propose, with_blocks
from crqat_fx.models.yolo_world import YoloWorld
from crqat_fx.noise import turned_on
from crqat_fx.plots import write_sensitivity
from crqat_fx.quantize.calibrate import picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.recipe import QuantRecipe, QuantRule, preset
from crqat_fx.sensitivity import sensitivity
from passes.spec import QuantSpec

WIDTHS = (Widths(4, 4), Widths(4, 8), Widths(8, 8))


def dataset():
    return ShapesSet(ShapesTask(size=SIZE), "val", 2)


def proposed(prepared, budget, widths=WIDTHS, **more):
    return propose(prepared, budget, dataset(), lambda: pictures(4, "calibration"), widths, calibrated_on=4, pictures=2, **more)


def counted(prepared, recipe):
    with torch.device("meta"):
        model = YoloWorld(prepared.config)
    return cost(model, recipe, len(prepared.vocabulary), prepared.size, prepared.target.name)


# --- choosing ---


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_there_is(seed):
    rng = random.Random(seed)
    options = {
        f"b{block}": [
            Option(Widths(2 + number, 8), rng.randrange(-20, 50), rng.random() * 10 ** rng.randrange(-6, 0)) for number in range(3)
        ]
        for block in range(6)
    }
    everything = list(itertools.product(*options.values()))
    for limit in (
        max(sum(each.cost for each in min(everything, key=lambda s: sum(o.cost for o in s))), least) for least in (-60, 0, 60, 200)
    ):
        chosen = choose(options, limit)
        found = [next(each for each in options[block] if each.widths == widths) for block, widths in chosen.items()]
        assert sum(each.cost for each in found) <= limit
        best = min(sum(each.share for each in some) for some in everything if sum(each.cost for each in some) <= limit)
        assert sum(each.share for each in found) == pytest.approx(best)


def test_many_blocks_are_chosen_for_within_the_budget_and_near_the_best():
    rng = random.Random(0)
    options = {
        f"b{block}": [Option(Widths(2 + number, 8), 10**6 * number + rng.randrange(10**6), rng.random() / 4**number) for number in range(4)]
        for block in range(60)
    }
    limit = 90 * 10**6
    chosen = choose(options, limit)
    found = [next(each for each in options[block] if each.widths == widths) for block, widths in chosen.items()]
    assert sum(each.cost for each in found) <= limit
    # no choice is better than what a price of cost gives, whatever the price
    prices = [10.0**power / limit for power in (step / 20 for step in range(-60, 60))]
    bound = max(sum(min(o.share + p * o.cost for o in some) for some in options.values()) - p * limit for p in prices)
    assert bound <= sum(each.share for each in found) < 1.01 * bound
    with pytest.raises(ValueError, match="no choice"):
        choose(options, -1)


def test_widths_are_read_as_they_are_written():
    assert str(Widths.parse("4-8")) == "4-8"
    for wrong in ("4", "1-8", "4-9", "4-8-8", "a-b", "-4-8"):
        with pytest.raises(UserError, match="no pair of widths"):
            Widths.parse(wrong)


# --- recipes ---


def test_rules_of_blocks_stand_behind_the_one_for_everything_and_before_the_edges():
    recipe = with_blocks(preset("4-8-8-int"), {"backbone.image_model.stem": Widths(3, 4)}, {"backbone.image_model.stem": ("*.stem.*",)})
    assert recipe.rules[0] == preset("4-8-8-int").rules[0]
    assert recipe.rules[1] == QuantRule("*.stem.*", QuantSpec(3, True, 0), QuantSpec(4))
    assert recipe.rules[2:] == preset("4-8-8-int").rules[1:]
    assert recipe.rule_for("backbone.image_model.stem.conv").weight == QuantSpec(8, True, 0)  # the edge's rule is later


def test_blocks_keep_odd_codes_where_they_are_narrow_enough():
    widths = {"a": Widths(3, 4), "b": Widths(8, 8)}
    recipe = with_blocks(preset("2-2-8-odd"), widths, {"a": ("a.*",), "b": ("b.*",)})
    assert recipe.rules[1:3] == (
        QuantRule("a.*", QuantSpec(3, True, 0, odd=True), QuantSpec(4)),
        QuantRule("b.*", QuantSpec(8, True, 0), QuantSpec(8)),
    )


def test_a_recipe_that_says_nothing_of_everything_is_refused():
    prepared = calibrated_pico(*RECIPES[0])
    prepared.recipe = QuantRecipe((QuantRule("*.stage1.*", QuantSpec(4, True, 0), QuantSpec(4)),))
    with pytest.raises(UserError, match=r"no rule that gives everything"):
        proposed(prepared, Budget(1, "size_mib"))


# --- models ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_float_model_of_a_prepared_one_computes_what_it_does_with_its_quantizers_off(recipe):
    prepared = calibrated_pico(*recipe)
    (inputs,) = picture_batches(prepared, pictures(2), 2)
    with torch.no_grad(), turned_on(prepared.quantizers(), lambda _: False):
        exact = prepared.graph.eval()(*inputs)
        model = float_model(prepared)(*inputs)
    for one, other in zip(itertools.chain(*exact), itertools.chain(*model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- proposals ---


@pytest.mark.parametrize(("recipe", "of", "counts"), [(RECIPES[1], "size_mib", "export"), (RECIPES[0], "bops_t", "published")])
def test_a_proposal_is_within_its_budget_and_its_file_prepares_a_model_that_has_its_bits(recipe, of, counts, tmp_path):
    prepared = calibrated_pico(*recipe)

    def spent(recipe):
        report = counted(prepared, recipe)
        return getattr(report.total if counts == "published" else report.export_total, of)

    wide = with_blocks(prepared.recipe, {"all": Widths(8, 8)}, {"all": ("*",)})
    limit = (spent(prepared.recipe) + spent(wide)) / 2
    found = proposed(prepared, Budget(limit, of, counts))
    assert spent(prepared.recipe) < spent(found.recipe) <= limit
    assert getattr(found.cost, of) == pytest.approx(spent(found.recipe))
    assert {str(each) for each in found.chosen.values()} > {"8-8"}
    found.recipe.save(tmp_path / "recipe.yaml")
    loaded = QuantRecipe.load(tmp_path / "recipe.yaml")
    assert loaded == found.recipe
    again = prepare(float_model(prepared), None, str(tmp_path / "recipe.yaml"), prepared.target.name, size=SIZE)
    quantizers = again.quantizers()
    for block, widths in found.chosen.items():
        inside = {
            each.spec.bits
            for name, each in quantizers.items()
            if name.startswith(f"{block}.") and name.endswith("weight_fake_quant") and not loaded_edge(name)
        }
        assert inside <= {min(widths.weight, prepared.target.weight_bits)}


def loaded_edge(name):
    return ".2.weight_fake_quant" in name or ".stem." in name


def test_what_is_proposed_is_less_noisy_than_the_recipe_it_comes_from_and_said_beforehand_how_much():
    prepared = calibrated_pico(*RECIPES[0])
    before = sensitivity(prepared, dataset(), pictures=2)
    told = []
    found = proposed(prepared, Budget(10, "bops_t"), progress=lambda done, total, at: told.append(done / total))
    assert set(map(str, found.chosen.values())) == {"8-8"}  # the budget bears all there is
    assert found.measured > -10 * torch.tensor(before.share).log10() + 10
    assert found.predicted == pytest.approx(found.measured, abs=4)
    assert told == sorted(told)
    assert told[-1] == 1


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_that_can():
    prepared = calibrated_pico(*RECIPES[0])
    with pytest.raises(UserError, match=r"cannot be met: the least possible with the widths 4-4, 4-8, 8-8 is (\S+) MiB") as caught:
        proposed(prepared, Budget(0.1, "size_mib"))
    least = float(str(caught.value).partition(" is ")[2].split()[0])
    assert least == pytest.approx(counted(prepared, prepared.recipe).total.size_mib, abs=0.01)
    assert "--size-mib" in str(caught.value)
    with pytest.raises(UserError, match=r"T BOPs cannot be met.*--widths"):
        proposed(prepared, Budget(1e-9, "bops_t"))


def test_a_proposal_is_drawn_with_what_there_was_to_choose_from(tmp_path):
    prepared = calibrated_pico(*RECIPES[0])
    found = sensitivity(prepared, dataset(), pictures=1)
    write_sensitivity(found, tmp_path / "s.svg", proposed(prepared, Budget(10, "bops_t"), widths=(Widths(8, 8),)))
    drawn = (tmp_path / "s.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {text} -->" in drawn for text in ("4-4", "8-8", "chosen"))
