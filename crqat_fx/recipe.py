"""Which modules get which bits (a recipe), and where a target has quantizers: data alone, so that a graph can be counted or prepared by it.

A recipe's rules are globs over the paths of a graph's nodes (`neck.top_down_layers.0.main_conv.conv`; `*` crosses dots). The last rule that
matches wins; a path that none matches stays float. Presets are named weight-activation-attention, as published: `4-4-8`.
`-odd` gives weights odd codes, as many below zero as above; `-ch` gives activations a scale per channel; `-int` gives the edges, which the
published recipes leave float, 8 bits.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from crqat_fx.errors import UserError
from crqat_fx.files import written
from passes.spec import ODD_BITS, QuantSpec


@dataclass(frozen=True)
class QuantRule:
    """How the paths that `modules` matches are quantized. None stays float. An optional rule may match nothing in a graph."""

    modules: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation.odd:
            raise ValueError("activation: odd codes are for weights, an activation needs one for zero")


FLOAT = QuantRule("*")


@dataclass(frozen=True)
class QuantRecipe:
    """Rules in order: the last match wins. `share_scales`: one scale for all that a concat joins within a block, where the target can
    (it is a copy then); None shares at 8 bits and not below, where a scale of one's own is worth more."""

    rules: tuple[QuantRule, ...]
    share_scales: bool | None = None

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
        with written(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.as_plain(), sort_keys=False, default_flow_style=None, width=140), encoding="utf-8")

    def as_plain(self) -> dict[str, Any]:
        """The recipe as plain data, defaults left out."""
        rules = [{key: value for key, value in _plain(rule).items() if key == "modules" or value} for rule in self.rules]
        return {"rules": rules} if self.share_scales is None else {"rules": rules, "share_scales": self.share_scales}

    @classmethod
    def load(cls, path: str | Path) -> "QuantRecipe":
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UserError(f"is no readable recipe ({reason})", where=path, remedy=f"give YAML, or one of {_names()}") from error
        return cls.from_plain(loaded, path)

    @classmethod
    def from_plain(cls, loaded: Any, where: object) -> "QuantRecipe":
        """The recipe of plain data from outside; `where` it came from is for the message that refuses it."""
        _check_keys(loaded, {"rules", "share_scales"}, "a recipe", where)
        rules, share_scales = loaded.get("rules"), loaded.get("share_scales")
        if not isinstance(rules, list) or not rules:
            raise UserError(
                "holds no list of `rules`", where=where, remedy="give at least one, such as `- {modules: '*', weight: {bits: 4}}`"
            )
        if share_scales is not None and not isinstance(share_scales, bool):
            raise UserError(f"share_scales is {share_scales!r}", where=where, remedy="give true or false")
        return cls(tuple(_rule(entry, number, where) for number, entry in enumerate(rules, 1)), share_scales)


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
ODD = tuple(name for name, (weight, _, _) in PRESETS.items() if weight <= ODD_BITS)  # also with odd codes
NAMED = re.compile(r"(?P<base>[^-]+-[^-]+-[^-]+)(?P<odd>-odd)?(?P<ch>-ch)?(?P<int>-int)?")
DEFAULT_RECIPE = "4-8-8-int"  # without kernels for 4 bits, 4-bit activations cost accuracy and give nothing back; 4-4-8 is the paper's
EDGES = ("*.stem.*", "*.cls_preds.*.2", "*.reg_preds.*.2", "*.cls_contrasts.*")  # the first layer, the last ones, and the matching
GUIDES = ("*.attn_block.max_similarity", "*.attn_block.gate")
POOLING = ("*.text_enhancer.match", "*.text_enhancer.mix")  # v1 alone has it
LINEARS = ("*.guide_fc",)
POOLING_LINEARS = ("*.text_enhancer.query.1", "*.text_enhancer.key.1", "*.text_enhancer.value.1", "*.text_enhancer.proj")
OUTPUT_AXIS, CHANNEL_AXIS, HEAD_AXIS, FEATURE_AXIS = 0, 1, 1, 2  # of a weight, a feature map, [B,heads,..,..], and [B,texts,features]


def preset(name: str) -> QuantRecipe:
    """A published recipe by name, `-odd`, `-ch` and `-int` (in this order) after it."""
    parts = NAMED.fullmatch(name)
    if parts is None or parts["base"] not in (ODD if parts["odd"] else PRESETS):
        raise UserError(f"unknown recipe {name!r}", where="--recipe", remedy=f"choose one of {_names()}, or name a YAML file")
    weight_bits, activation_bits, attention_bits = PRESETS[parts["base"]]
    per_channel = bool(parts["ch"])
    weight = QuantSpec(weight_bits, symmetric=True, channel_axis=OUTPUT_AXIS, odd=bool(parts["odd"]))
    activation = QuantSpec(activation_bits, channel_axis=CHANNEL_AXIS if per_channel else None)
    attention = QuantSpec(attention_bits, channel_axis=HEAD_AXIS)
    rules = [QuantRule("*", weight, activation)]
    if per_channel:
        of_text = QuantSpec(activation_bits, channel_axis=FEATURE_AXIS)
        rules += [QuantRule(glob, weight, of_text) for glob in LINEARS]
        rules += [QuantRule(glob, weight, of_text, optional=True) for glob in POOLING_LINEARS]
    rules += [QuantRule(glob, activation=attention) for glob in GUIDES]
    rules += [QuantRule(glob, activation=attention, optional=True) for glob in POOLING]
    edge = (QuantSpec(8, symmetric=True, channel_axis=OUTPUT_AXIS), QuantSpec(8)) if parts["int"] else (None, None)
    rules += [QuantRule(glob, *edge) for glob in EDGES]
    return QuantRecipe(tuple(rules))


def recipe_named(text: str) -> QuantRecipe:
    """What `--recipe` means: a preset's name, or a YAML file."""
    return QuantRecipe.load(text) if Path(text).suffix in (".yaml", ".yml") else preset(text)


def name_of(recipe: QuantRecipe) -> str | None:
    """What a preset is called; None for another recipe."""
    bases = (*PRESETS, *(f"{base}-odd" for base in ODD))
    named = (f"{base}{channels}{edges}" for base in bases for channels in ("", "-ch") for edges in ("", "-int"))
    return next((name for name in named if preset(name) == recipe), None)


# --- targets ---


@dataclass(frozen=True)
class Target:
    """Where quantizers stand: everything a target decides, by the class of a module or the name of a function.

    From this table come torch.ao's BackendConfig (`fused`, `weights`, `operands`) and what the passes place.
    """

    name: str
    fused: tuple[tuple[str, str], ...] = ()  # modules that become one, in the order of the data
    weights: frozenset[str] = frozenset()  # modules whose weight is quantized
    weight_bits: int = 8  # the most that a weight has, and whatever else takes a weight's place
    operands: Mapping[str, tuple[int, ...]] = dataclasses.field(
        default_factory=dict
    )  # what is quantized before it is read, for this reader
    signed: Mapping[str, int | None] = dataclasses.field(
        default_factory=dict
    )  # whose `operands` take a weight's place: symmetric, this axis
    reads: Mapping[str, int | None] = dataclasses.field(default_factory=dict)  # readers of codes: of so many bits, None for the recipe's
    outputs: Mapping[str, int | None] = dataclasses.field(default_factory=dict)  # producers of codes: None for the widest that is read
    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)  # outputs whose scale is known, from 0 up
    carries: frozenset[str] = frozenset()  # what hands on the codes it reads, perhaps at another scale
    per_head: frozenset[str] = frozenset()  # where a scale a head is asked for and one a tensor given: there is no kernel for it
    shared: frozenset[str] = frozenset()  # what is a copy where its inputs and its output have one scale


PRODUCTS = ("MatMul", "Match", "max_similarity")  # of two activations
WIDEST = 8
TARGETS: Mapping[str, Target] = {
    # every tensor that an integer kernel of onnxruntime produces
    "ort": Target(
        "ort",
        fused=(("Conv2d", "BatchNorm2d"),),
        weights=frozenset(("Conv2d", "Linear")),
        weight_bits=7,  # two products of 8 bits by 8 overflow the 16 that processors without VNNI add them in
        operands={"max_similarity": (0,), "Match": (0,)},  # the text: the weights of a convolution where it is constant
        signed={"max_similarity": HEAD_AXIS, "Match": None},
        reads={
            **dict.fromkeys(("Conv2d", "Linear", "Add", "Concat", *PRODUCTS)),
            **dict.fromkeys(("sigmoid", "SiLU", "Multiply", "softmax"), WIDEST),
        },
        outputs={
            **dict.fromkeys(("Conv2d", "Linear"), WIDEST),
            **dict.fromkeys(("SiLU", "Add", "Concat", "Multiply", "MatMul", "Match", "sigmoid", "softmax")),
        },
        fixed={"sigmoid": 1 / 255},
        carries=frozenset(
            (
                *("split", "getitem", "flatten", "unflatten", "transpose", "permute", "view_as", "unsqueeze"),
                *("MaxPool2d", "AdaptiveMaxPool2d", "Upsample", "ReLU"),
                *("mul", "normalize"),  # by a number; the norm of a region, which is divided by after the product
            )
        ),
        per_head=frozenset((*PRODUCTS, "Multiply")),
        shared=frozenset(("Concat",)),
    ),
    # what the published figures count, and what OpenVINO runs best; of the gate, only what weighs
    "conv-inputs": Target(
        "conv-inputs",
        fused=(("Conv2d", "BatchNorm2d"),),
        weights=frozenset(("Conv2d", "Linear")),
        operands={"Conv2d": (0,), "Linear": (0,), **dict.fromkeys(PRODUCTS, (0, 1)), "Multiply": (1,)},
    ),
}
DEFAULT_TARGET = "ort"
CPUS = ("any", "vnni")


def target_named(name: str, cpu: str = "any") -> Target:
    """A target, for processors of any kind or for those that multiply 8 bits by 8 without overflow."""
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}", where="--target", remedy=f"choose one of {', '.join(TARGETS)}")
    if cpu not in CPUS:
        raise UserError(f"unknown processor {cpu!r}", where="--cpu", remedy=f"choose one of {', '.join(CPUS)}")
    target = TARGETS[name]
    return target if cpu == "any" else dataclasses.replace(target, weight_bits=WIDEST)


# --- YAML ---


def _names() -> str:
    return f"{', '.join(PRESETS)}, each also with -ch, -int or -ch-int; {' and '.join(ODD)} with -odd before"


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


def _rule(entry: Any, number: int, path: object) -> QuantRule:
    what = f"rule {number}"
    _check_keys(entry, {field.name for field in dataclasses.fields(QuantRule)}, what, path)
    modules, optional = entry.get("modules"), entry.get("optional", False)
    if not isinstance(modules, str) or not modules:
        raise UserError(f"{what} has no `modules`", where=path, remedy="give a glob over module paths, such as '*.stem.*'")
    if not isinstance(optional, bool):
        raise UserError(f"{what}: optional is {optional!r}", where=path, remedy="give true or false")
    weight, activation = (_spec(entry.get(key), f"{what}: {key}", path) for key in ("weight", "activation"))
    try:
        return QuantRule(modules, weight, activation, optional)
    except ValueError as error:
        raise UserError(f"{what}: {error}", where=path) from error


def _spec(entry: Any, what: str, path: object) -> QuantSpec | None:
    if entry is None:
        return None
    _check_keys(entry, {field.name for field in dataclasses.fields(QuantSpec)}, what, path)
    try:
        return QuantSpec(**entry)
    except (TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else "bits are missing"
        raise UserError(f"{what}: {reason}", where=path) from error
