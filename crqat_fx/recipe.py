"""Which modules get which bits (a recipe), and where a target has quantizers: data alone, so that a graph can be counted or prepared by it.

A recipe's rules are globs over the paths of a graph's nodes (`neck.top_down_layers.0.main_conv.conv`; `*` crosses dots). The last rule that
matches wins; a path that none matches stays float. Presets are named weight-activation-attention, as published: `4-4-8`.
`-ch` gives activations a scale per channel; `-int` gives the edges, which the published recipes leave float, 8 bits.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from crqat_fx.errors import UserError
from crqat_fx.files import written
from passes.spec import QuantSpec


@dataclass(frozen=True)
class QuantRule:
    """How the paths that `modules` matches are quantized. None stays float. An optional rule may match nothing in a graph."""

    modules: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    optional: bool = False


FLOAT = QuantRule("*")


@dataclass(frozen=True)
class QuantRecipe:
    """Rules in order: the last match wins."""

    rules: tuple[QuantRule, ...]

    def rule_for(self, path: str) -> QuantRule:
        return next((rule for rule in reversed(self.rules) if fnmatchcase(path, rule.modules)), FLOAT)

    def rules_for(self, paths: Iterable[str]) -> dict[str, QuantRule]:
        """The rule of every path of a graph; a rule that matches none of them is refused, so that a typing error is never a float layer."""
        known = list(paths)
        for rule in self.rules:
            if not rule.optional and not any(fnmatchcase(path, rule.modules) for path in known):
                near = difflib.get_close_matches(rule.modules.strip("*."), known, 1, 0.3)
                remedy = f"did you mean {near[0]!r}?" if near else "see the paths with `crqat-fx inspect`"
                raise UserError(f"the rule {rule.modules!r} matches nothing in this model", where="recipe", remedy=remedy)
        return {path: self.rule_for(path) for path in known}

    def save(self, path: str | Path) -> None:
        """Writes the recipe as YAML that `load` reads again."""
        rules = [{key: value for key, value in _plain(rule).items() if key == "modules" or value} for rule in self.rules]
        with written(path) as temporary:
            temporary.write_text(yaml.safe_dump({"rules": rules}, sort_keys=False, default_flow_style=None, width=140), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "QuantRecipe":
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UserError(f"is no readable recipe ({reason})", where=path, remedy=f"give YAML, or one of {_names()}") from error
        _check_keys(loaded, {"rules"}, "a recipe", path)
        rules = loaded.get("rules")
        if not isinstance(rules, list) or not rules:
            raise UserError(
                "holds no list of `rules`", where=path, remedy="give at least one, such as `- {modules: '*', weight: {bits: 4}}`"
            )
        return cls(tuple(_rule(entry, number, path) for number, entry in enumerate(rules, 1)))


# --- presets ---

# weight, activation and attention bits
PRESETS: Mapping[str, tuple[int, int, int]] = {
    "4-4-8": (4, 4, 8),
    "4-5-8": (4, 5, 8),
    "4-8-8": (4, 8, 8),
    "6-6-6": (6, 6, 6),
    "3-3-8": (3, 3, 8),
    "2-2-8": (2, 2, 8),
    "8-8-8": (8, 8, 8),
}
EDGES = ("*.stem.*", "*.cls_preds.*.2", "*.reg_preds.*.2", "*.cls_contrasts.*")  # the first layer, the last ones, and the matching
GUIDES = ("*.attn_block.max_similarity", "*.attn_block.gate")
POOLING = ("*.text_enhancer.match", "*.text_enhancer.mix")  # v1 alone has it
LINEARS = ("*.guide_fc",)
POOLING_LINEARS = ("*.text_enhancer.query.1", "*.text_enhancer.key.1", "*.text_enhancer.value.1", "*.text_enhancer.proj")
OUTPUT_AXIS, CHANNEL_AXIS, HEAD_AXIS, FEATURE_AXIS = 0, 1, 1, 2  # of a weight, a feature map, [B,heads,..,..], and [B,texts,features]


def preset(name: str) -> QuantRecipe:
    """A published recipe by name, `-ch` and `-int` (in this order) after it."""
    base = name.removesuffix("-int").removesuffix("-ch")
    if base not in PRESETS or name not in (base, f"{base}-ch", f"{base}-int", f"{base}-ch-int"):
        raise UserError(f"unknown recipe {name!r}", where="--recipe", remedy=f"choose one of {_names()}, or name a YAML file")
    weight_bits, activation_bits, attention_bits = PRESETS[base]
    per_channel = name.removesuffix("-int").endswith("-ch")
    weight = QuantSpec(weight_bits, symmetric=True, channel_axis=OUTPUT_AXIS)
    activation = QuantSpec(activation_bits, channel_axis=CHANNEL_AXIS if per_channel else None)
    attention = QuantSpec(attention_bits, channel_axis=HEAD_AXIS)
    rules = [QuantRule("*", weight, activation)]
    if per_channel:
        of_text = QuantSpec(activation_bits, channel_axis=FEATURE_AXIS)
        rules += [QuantRule(glob, weight, of_text) for glob in LINEARS]
        rules += [QuantRule(glob, weight, of_text, optional=True) for glob in POOLING_LINEARS]
    rules += [QuantRule(glob, activation=attention) for glob in GUIDES]
    rules += [QuantRule(glob, activation=attention, optional=True) for glob in POOLING]
    edge = (QuantSpec(8, symmetric=True, channel_axis=OUTPUT_AXIS), QuantSpec(8)) if name.endswith("-int") else (None, None)
    rules += [QuantRule(glob, *edge) for glob in EDGES]
    return QuantRecipe(tuple(rules))


def recipe_named(text: str) -> QuantRecipe:
    """What `--recipe` means: a preset's name, or a YAML file."""
    return QuantRecipe.load(text) if Path(text).suffix in (".yaml", ".yml") else preset(text)


# --- targets ---


@dataclass(frozen=True)
class Target:
    """Where quantizers stand, by the class of a module or the name of a function: on which operands, or on the output."""

    name: str
    operands: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    outputs: frozenset[str] = frozenset()


PRODUCTS = ("MatMul", "Match", "max_similarity")  # of two activations
TARGETS: Mapping[str, Target] = {
    # every tensor that an integer kernel of onnxruntime produces
    "ort": Target(
        "ort",
        outputs=frozenset(
            ("Conv2d", "SiLU", "Add", "Concat", "MaxPool2d", "AdaptiveMaxPool2d", "Linear", *PRODUCTS, "Multiply", "sigmoid")
        ),
    ),
    # what the published figures count, and what OpenVINO runs best; of the gate, only what weighs
    "conv-inputs": Target(
        "conv-inputs",
        operands={"Conv2d": (0,), "Linear": (0,), **dict.fromkeys(PRODUCTS, (0, 1)), "Multiply": (1,)},
    ),
}


def target_named(name: str) -> Target:
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}", where="--target", remedy=f"choose one of {', '.join(TARGETS)}")
    return TARGETS[name]


# --- YAML ---


def _names() -> str:
    return f"{', '.join(PRESETS)}, each also with -ch, -int or -ch-int"


def _plain(rule: QuantRule) -> dict[str, Any]:
    """The rule as YAML can write it, defaults of its specs left out."""
    plain = dataclasses.asdict(rule)
    for key in ("weight", "activation"):
        if plain[key] is not None:
            plain[key] = {name: value for name, value in plain[key].items() if value is not None and value is not False}
    return plain


def _check_keys(value: Any, known: set[str], what: str, where: object) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{what} is {value!r:.60}, not a mapping", where=where, remedy=f"give {', '.join(sorted(known))}")
    unknown = [key for key in value if key not in known]
    if unknown:
        raise UserError(f"{what} has an unknown key {unknown[0]!r}", where=where, remedy=f"known are {', '.join(sorted(known))}")


def _rule(entry: Any, number: int, path: str | Path) -> QuantRule:
    what = f"rule {number}"
    _check_keys(entry, {field.name for field in dataclasses.fields(QuantRule)}, what, path)
    modules, optional = entry.get("modules"), entry.get("optional", False)
    if not isinstance(modules, str) or not modules:
        raise UserError(f"{what} has no `modules`", where=path, remedy="give a glob over module paths, such as '*.stem.*'")
    if not isinstance(optional, bool):
        raise UserError(f"{what}: optional is {optional!r}", where=path, remedy="give true or false")
    weight, activation = (_spec(entry.get(key), f"{what}: {key}", path) for key in ("weight", "activation"))
    return QuantRule(modules, weight, activation, optional)


def _spec(entry: Any, what: str, path: str | Path) -> QuantSpec | None:
    if entry is None:
        return None
    _check_keys(entry, {field.name for field in dataclasses.fields(QuantSpec)}, what, path)
    try:
        return QuantSpec(**entry)
    except (TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else "bits are missing"
        raise UserError(f"{what}: {reason}", where=path) from error
