"""Recipes: which rule a path gets, YAML there and back, and every mistake in one line."""

import pytest

from crqat_fx.errors import UserError
from crqat_fx.recipe import DEFAULT_RECIPE, DEFAULT_TARGET, FLOAT, PRESETS, QuantRecipe, QuantRule, preset, recipe_named, target_named
from passes.spec import QuantSpec

WEIGHT, ACTIVATION, ATTENTION = QuantSpec(4, symmetric=True, channel_axis=0), QuantSpec(4), QuantSpec(8, channel_axis=1)
EIGHT = QuantSpec(8, symmetric=True, channel_axis=0)
PATHS = (
    "backbone.image_model.stem.conv",
    "backbone.image_model.stage1.0.conv",
    "neck.top_down_layers.0.attn_block.guide_fc",
    "neck.top_down_layers.0.attn_block.max_similarity",
    "neck.top_down_layers.0.attn_block.gate",
    "neck.text_enhancer.query.1",
    "neck.text_enhancer.match",
    "bbox_head.head_module.cls_preds.0.0.conv",
    "bbox_head.head_module.cls_preds.2.2",
    "bbox_head.head_module.reg_preds.1.2",
    "bbox_head.head_module.cls_contrasts.1.match",
)


def test_the_last_rule_that_matches_wins_and_no_match_is_float():
    recipe = QuantRecipe((QuantRule("neck.*", WEIGHT), QuantRule("*.conv", EIGHT), QuantRule("neck.last.*")))
    assert recipe.rule_for("neck.a").weight == WEIGHT
    assert recipe.rule_for("neck.a.conv").weight == EIGHT
    assert recipe.rule_for("neck.last.conv") == QuantRule("neck.last.*")
    assert recipe.rule_for("head.fc") == FLOAT


@pytest.mark.parametrize("path", PATHS)
def test_the_published_recipe_leaves_the_edges_float_and_gives_attention_its_own_bits(path):
    rule = preset("4-4-8").rules_for(PATHS)[path]
    if any(edge in path for edge in ("stem", "cls_preds.2.2", "reg_preds.1.2", "cls_contrasts")):
        assert (rule.weight, rule.activation) == (None, None)
    elif path.endswith(("max_similarity", "gate", "text_enhancer.match")):
        assert rule.activation == ATTENTION
    else:
        assert (rule.weight, rule.activation) == (WEIGHT, ACTIVATION)


def test_int_gives_the_edges_eight_bits_and_touches_nothing_else():
    plain, integer = preset("4-5-8").rules_for(PATHS), preset("4-5-8-int").rules_for(PATHS)
    for path in PATHS:
        if plain[path].activation is None:
            assert (integer[path].weight, integer[path].activation) == (EIGHT, QuantSpec(8))
        else:
            assert integer[path] == plain[path]


def test_odd_gives_weights_odd_codes_and_touches_nothing_else():
    plain, odd = preset("2-2-8-int").rules_for(PATHS), preset("2-2-8-odd-int").rules_for(PATHS)
    for path in PATHS:
        assert odd[path].activation == plain[path].activation
        if plain[path].weight is not None and plain[path].weight.bits == 2:
            assert odd[path].weight == QuantSpec(2, symmetric=True, channel_axis=0, odd=True)
        else:
            assert odd[path].weight == plain[path].weight
    assert any(rule.weight is not None and rule.weight.odd for rule in odd.values())


def test_ch_gives_activations_an_axis_and_touches_neither_weights_nor_attention():
    plain, channels = preset("3-3-8").rules_for(PATHS), preset("3-3-8-ch").rules_for(PATHS)
    for path in PATHS:
        assert channels[path].weight == plain[path].weight
        if plain[path].activation == QuantSpec(3):
            text = path.endswith(("guide_fc", "query.1"))
            assert channels[path].activation == QuantSpec(3, channel_axis=2 if text else 1)
        else:
            assert channels[path].activation == plain[path].activation


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_bits_of_its_name(name):
    weight, activation, attention = map(int, name.split("-"))
    recipe = preset(name)
    assert recipe.rule_for("neck.x.conv") == QuantRule("*", QuantSpec(weight, symmetric=True, channel_axis=0), QuantSpec(activation))
    assert recipe.rule_for("neck.x.attn_block.max_similarity").activation == QuantSpec(attention, channel_axis=1)


@pytest.mark.parametrize(
    "name", ["5-5-5", "4-4", "4-4-8-ch-ch", "4-4-8-int-ch", "4-4-8-", "", "4-4-8-int-int", "fp32", "4-4-8-odd", "2-2-8-ch-odd"]
)
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match="choose one of 4-4-8"):
        preset(name)


def test_a_glob_that_matches_nothing_is_an_error_that_names_the_nearest_path():
    recipe = QuantRecipe((QuantRule("*", WEIGHT), QuantRule("*.text_enhancer.matsch")))
    with pytest.raises(UserError, match=r"'\*\.text_enhancer\.matsch' matches nothing.*did you mean 'neck\.text_enhancer\.match'"):
        recipe.rules_for(PATHS)


def test_an_optional_rule_may_match_nothing():
    recipe = QuantRecipe((QuantRule("*", WEIGHT), QuantRule("nowhere.*", optional=True)))
    assert set(recipe.rules_for(PATHS)) == set(PATHS)


@pytest.mark.parametrize("name", [*PRESETS, "4-4-8-ch", "4-4-8-int", "4-4-8-ch-int", "3-3-8-odd", "2-2-8-odd-ch-int"])
def test_yaml_there_and_back(tmp_path, name):
    path = tmp_path / "recipe.yaml"
    preset(name).save(path)
    assert QuantRecipe.load(path) == preset(name)
    assert recipe_named(str(path)) == preset(name) == recipe_named(name)


def test_yaml_that_a_person_writes(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(
        """
        rules:
          - modules: "*"
            weight: {bits: 4, symmetric: true, channel_axis: 0}
            activation: {bits: 8}
          - {modules: "*.stem.*"}  # float
        """,
        encoding="utf-8",
    )
    assert recipe_named(str(path)) == QuantRecipe((QuantRule("*", WEIGHT, QuantSpec(8)), QuantRule("*.stem.*")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is None, not a mapping"),
        ("- 1", "not a mapping"),
        ("rules: []", "no list of `rules`"),
        ("rules: 4", "no list of `rules`"),
        ("rule: [{modules: x}]", "unknown key 'rule'"),
        ("rules: [x]", "rule 1 is 'x', not a mapping"),
        ("rules: [{modules: x}, {module: y}]", "rule 2 has an unknown key 'module'"),
        ("rules: [{weight: {bits: 4}}]", "rule 1 has no `modules`"),
        ("rules: [{modules: 3}]", "rule 1 has no `modules`"),
        ("rules: [{modules: x, optional: maybe}]", "optional is 'maybe'"),
        ("rules: [{modules: x, weight: 4}]", "rule 1: weight is 4, not a mapping"),
        ("rules: [{modules: x, weight: {bits: 9}}]", "rule 1: weight: bits is 9"),
        ("rules: [{modules: x, weight: {bits: '4'}}]", "rule 1: weight: bits is '4'"),
        ("rules: [{modules: x, activation: {symmetric: true}}]", "rule 1: activation: bits are missing"),
        ("rules: [{modules: x, activation: {bits: 4, axis: 1}}]", "rule 1: activation has an unknown key 'axis'"),
        ("rules: [{modules: x, activation: {bits: 4, channel_axis: -1}}]", "channel_axis is -1"),
        ("rules: [{modules: x, weight: {bits: 4, symmetric: true, odd: true}}]", "odd codes are for symmetric tensors of 2 to 3 bits"),
        ("rules: [{modules: x, weight: {bits: 2, odd: true}}]", "odd codes are for symmetric tensors"),
        ("rules: [{modules: x, activation: {bits: 2, symmetric: true, odd: true}}]", "rule 1: activation: odd codes are for weights"),
        ("rules: [", "no readable recipe"),
        ("rules: !!python/object/apply:os.system ['true']", "no readable recipe"),
        ("[" * 3000, "no readable recipe"),
    ],
)
def test_a_mistake_in_yaml_is_one_line_that_says_where(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        QuantRecipe.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no readable recipe"):
        recipe_named(str(tmp_path / "missing.yaml"))


def test_an_unknown_target_is_refused_with_the_known_ones():
    assert target_named("ort").name == "ort"
    with pytest.raises(UserError, match="choose one of ort, conv-inputs"):
        target_named("tpu")


def test_sharing_scales_is_written_where_it_is_said_and_read_again(tmp_path):
    path = tmp_path / "recipe.yaml"
    for share in (None, True, False):
        recipe = QuantRecipe((QuantRule("*", WEIGHT),), share_scales=share)
        recipe.save(path)
        assert ("share_scales" in path.read_text(encoding="utf-8")) == (share is not None)
        assert QuantRecipe.load(path) == recipe
    path.write_text("rules: [{modules: x}]\nshare_scales: always", encoding="utf-8")
    with pytest.raises(UserError, match="share_scales is 'always'"):
        QuantRecipe.load(path)


def test_processors_without_wide_sums_get_weights_of_seven_bits_under_ort():
    assert (target_named("ort").weight_bits, target_named("ort", "vnni").weight_bits) == (7, 8)
    assert target_named("conv-inputs").weight_bits == 8
    with pytest.raises(UserError, match="choose one of any, vnni"):
        target_named("ort", "neon")


def test_the_default_recipe_and_target_are_known():
    assert preset(DEFAULT_RECIPE) == preset("4-8-8-int")
    assert target_named(DEFAULT_TARGET).name == "ort"
