"""A recipe with as many bits in every block as a budget bears, where they do most against noise.

    choose one of some widths for every block:   sum of noise least,   sum of cost within the budget

A block's noise at each of the widths is measured with the block quantized alone (`crqat_fx.sensitivity`), in a model that is prepared and
calibrated at these widths; its cost is counted on the graph (`crqat_fx.cost`), and both add up. The recipe is the prepared model's own with
a rule for each block that differs, behind the rule for everything and before those for edges and attention, which keep what they say.

Left alone: a block in which no path follows the rule for everything.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from crqat_fx.correct_norms import correct_norms, correctable
from crqat_fx.cost import Cost, Measurement, measure, price
from crqat_fx.data.samples import EvaluationSet
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import YoloWorld
from crqat_fx.noise import decibels
from crqat_fx.progress import Progress
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.recipe import FLOAT, QuantRecipe, QuantRule
from crqat_fx.sensitivity import ALL, FirstPictures, ap_of, check_measurable, noise_of_blocks
from crqat_fx.trace import trace_unproved
from passes.fx.graph import blocks_of, module_of, node_paths
from passes.spec import ODD_BITS, QuantSpec

logger = logging.getLogger(__name__)

STEPS = 100  # that a part of the work is told in: its parts count different things
NARROWER = 1.01  # times the noise of a wider option, at least
STATES = 4096  # kept of the choices so far: exact below, and beyond it within a share of 1/4096 of the budget for each block

Pictures = Callable[[], Iterator[np.ndarray]]  # to calibrate on, from the start each time


@dataclass(frozen=True)
class Widths:
    """Bits of a block's weights and activations."""

    weight: int
    activation: int

    def __str__(self) -> str:
        return f"{self.weight}-{self.activation}"

    def covers(self, other: "Widths") -> bool:
        return self.weight >= other.weight and self.activation >= other.activation

    @classmethod
    def parse(cls, text: str) -> "Widths":
        found = re.fullmatch(r"([2-8])-([2-8])", text)
        if found is None:
            raise UserError(f"{text!r} is no pair of widths", where="--widths", remedy="give weight and activation bits such as 4-8")
        return cls(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Budget:
    """At most so many MiB or so many tera bit operations, counted as published or as an export runs the model."""

    limit: float
    of: Literal["size_mib", "bops_t"]
    counted: Literal["published", "export"] = "published"

    def spent(self, cost: Cost) -> int:
        return cost.bits if self.of == "size_mib" else cost.bops

    @property
    def exact(self) -> int:
        return math.floor(self.limit * (8 * 2**20 if self.of == "size_mib" else 10**12))

    def told(self, spent: float) -> str:
        return f"{spent / 8 / 2**20:.2f} MiB" if self.of == "size_mib" else f"{spent / 1e12:.4g} T BOPs"


@dataclass(frozen=True)
class Option:
    """One way to quantize a block: what it costs more than the model with every block as in its own recipe, and its noise alone."""

    widths: Widths
    cost: int
    share: float


@dataclass(frozen=True)
class Proposal:
    """A recipe within a budget. `options` are what there was to choose from."""

    recipe: QuantRecipe
    budget: Budget
    cost: Cost
    chosen: Mapping[str, Widths]
    options: Mapping[str, tuple[Option, ...]]
    predicted: float  # dB: of the noises of its blocks, added
    measured: float  # dB: of the model prepared and calibrated by it
    ap: float | None

    def as_json(self) -> dict[str, Any]:
        return {
            "budget": dataclasses.asdict(self.budget),
            "cost": self.cost.as_json(),
            "blocks": {block: str(widths) for block, widths in self.chosen.items()},
            "options": {
                block: [{"widths": str(each.widths), "cost": each.cost, "db": decibels(each.share)} for each in options]
                for block, options in self.options.items()
            },
            "predicted_db": self.predicted,
            "measured_db": self.measured,
            "ap": self.ap,
            "recipe": self.recipe.as_plain(),
        }


def propose(
    prepared: Prepared,
    budget: Budget,
    dataset: EvaluationSet,
    calibration: Pictures,
    widths: Sequence[Widths],
    *,
    observer: str | None = None,
    calibrated_on: int = 256,
    pictures: int = 16,
    ap_pictures: int = 0,
    batch: int = 4,
    progress: Progress | None = None,
) -> Proposal:
    """The least noise that the budget allows. Beside `widths` a block may keep those of the model's own recipe, with the ranges that the
    model has; `observer` is by default what set most of these. A budget below what the narrowest widths cost is refused."""
    check_measurable(prepared)
    model = float_model(prepared)
    measured = _measured(prepared, model)
    base = prepared.recipe
    _, weight, activation = _general(base)
    own = Widths(weight.bits, activation.bits)
    candidates = list(dict.fromkeys((own, *widths)))
    patterns = _patterns(model, base)
    spent = _spent(measured, base, prepared, budget)
    at_widths = {
        each: _spent(measured, with_blocks(base, dict.fromkeys(patterns, each), patterns), prepared, budget) for each in candidates
    }
    more = {block: {each: at_widths[each].get(block, 0) - spent.get(block, 0) for each in candidates} for block in patterns}
    left = budget.exact - sum(spent.values())
    _check_possible(budget, left, more, candidates)
    set_by = observer or _observer(prepared)
    corrected = any(layer.corrected for layer in correctable(prepared).values())  # then so is every other, to be fair
    shown = FirstPictures(dataset, pictures)

    def calibrated(recipe: QuantRecipe, part: int, what: str) -> Prepared:
        made = _prepared_by(prepared, model, recipe)
        calibrate(made, picture_batches(made, calibration()), set_by, calibrated_on, progress=_part(progress, part, parts, what))
        if corrected:
            correct_norms(made, picture_batches(made, calibration()), calibrated_on)
        return made

    def noise_in(made: Prepared, part: int, what: str) -> dict[str, float]:
        batches = picture_batches(made, shown.readable(), batch)
        return noise_of_blocks(made, batches, total=len(shown), progress=_part(progress, part, parts, what))

    parts = 2 * len(candidates) + 2
    noises: dict[Widths, dict[str, float]] = {}
    for number, each in enumerate(candidates):
        uniform = with_blocks(base, dict.fromkeys(patterns, each), patterns)
        made = prepared if each == own else calibrated(uniform, 2 * number, str(each))
        noises[each] = noise_in(made, 2 * number + 1, str(each))
    options = {block: _options(block, own, more[block], noises) for block in patterns if any(block in found for found in noises.values())}
    chosen = choose(options, left)
    recipe = with_blocks(base, {block: each for block, each in chosen.items() if each != own}, patterns)
    mix = calibrated(recipe, parts - 2, "the proposal")
    fixed = sum(share for block, share in noises[own].items() if block not in options and block != ALL)
    return Proposal(
        recipe,
        budget,
        _counted(measured, recipe, prepared, budget)[1],
        chosen,
        options,
        predicted=decibels(fixed + sum(noises[each].get(block, 0.0) for block, each in chosen.items())),
        measured=decibels(noise_in(mix, parts - 1, "the proposal")[ALL]),
        ap=ap_of(mix, FirstPictures(dataset, ap_pictures), batch=batch) if ap_pictures else None,
    )


def _part(progress: Progress | None, part: int, parts: int, what: str) -> Progress | None:
    if progress is None:
        return None
    whole: Progress = progress
    return lambda done, total, at: whole(part * STEPS + STEPS * done // total, parts * STEPS, f"{what}: {at}")


def _options(block: str, own: Widths, costs: Mapping[Widths, int], noises: Mapping[Widths, Mapping[str, float]]) -> tuple[Option, ...]:
    """A block's, its own widths first. Narrower is never better: where some pictures say so it is chance, and is not believed. Weight bits
    that cost nothing are of a block without weights, and no choice."""
    found: list[Option] = []
    for each in sorted(costs, key=lambda one: -one.weight - one.activation):
        wider = [option.share for option in found if option.widths.covers(each)]
        found.append(Option(each, costs[each], max([noises[each].get(block, 0.0), *(NARROWER * share for share in wider)])))
    real = [each for each in found if each.widths == own or each.cost != costs[own] or each.widths.activation != own.activation]
    return tuple(sorted(real, key=lambda each: each.widths != own))


# --- recipes ---


def with_blocks(recipe: QuantRecipe, widths: Mapping[str, Widths], patterns: Mapping[str, Sequence[str]]) -> QuantRecipe:
    """The recipe with widths of their own for some blocks: rules behind the last one for everything, a block within another behind it."""
    last, weight, activation = _general(recipe)
    rules = [
        QuantRule(
            pattern,
            dataclasses.replace(weight, bits=widths[block].weight, odd=weight.odd and widths[block].weight <= ODD_BITS),
            dataclasses.replace(activation, bits=widths[block].activation),
        )
        for block in sorted(widths, key=len)
        for pattern in patterns[block]
    ]
    return QuantRecipe((*recipe.rules[: last + 1], *rules, *recipe.rules[last + 1 :]), recipe.share_scales)


def _general(recipe: QuantRecipe) -> tuple[int, QuantSpec, QuantSpec]:
    """Of the rules for everything that a recipe starts with the last one: its place, and how it quantizes."""
    last = next((place for place, rule in enumerate(recipe.rules) if rule.modules != "*"), len(recipe.rules)) - 1
    rule = recipe.rules[last] if last >= 0 else FLOAT
    if rule.weight is None or rule.activation is None:
        raise UserError(
            "the recipe starts with no rule that gives everything weight and activation bits, so that blocks could have others",
            where="the prepared model",
            remedy="prepare it by a preset, or by a recipe whose first rule is for '*'",
        )
    return last, rule.weight, rule.activation


def _patterns(model: YoloWorld, recipe: QuantRecipe) -> dict[str, tuple[str, ...]]:
    """Of every block in which something follows the rule for everything, the globs of its paths."""
    with torch.device("meta"):
        graph = trace_unproved(YoloWorld(model.config))
    paths, general = node_paths(graph), recipe.rules[_general(recipe)[0]]
    inside: dict[str, list[str]] = {}
    for node, block in blocks_of(graph).items():
        if module_of(graph, node) is not None:
            inside.setdefault(block, []).append(paths[node])
    return {
        block: tuple(glob for glob in (block, f"{block}.*") if any(fnmatchcase(path, glob) for path in found))
        for block, found in inside.items()
        if any(recipe.rule_for(path) is general for path in found)
    }


# --- models ---


def float_model(prepared: Prepared) -> YoloWorld:
    """The model that was prepared, with the weights that the prepared one has now."""
    assert prepared.config is not None  # see `check_measurable`
    with torch.device("meta"):
        model = YoloWorld(prepared.config)
    graph = trace_unproved(model)
    moved: dict[str, str] = {}  # a norm that was fused stands in its convolution
    for node in graph.graph.nodes:
        before = node.all_input_nodes[0] if node.all_input_nodes else None
        if isinstance(module_of(graph, node), nn.BatchNorm2d) and before is not None and isinstance(module_of(graph, before), nn.Conv2d):
            moved[str(node.target)] = f"{before.target}.bn"
    state = prepared.graph.state_dict()
    named = {key: f"{moved[owner]}.{last}" if (owner := key.rpartition(".")[0]) in moved else key for key, last in _keys(model)}
    model.load_state_dict({key: state[name if name in state else key].detach().clone() for key, name in named.items()}, assign=True)
    return model.eval()


def _keys(model: nn.Module) -> Iterator[tuple[str, str]]:
    return ((key, key.rpartition(".")[2]) for key in model.state_dict())


def _prepared_by(prepared: Prepared, model: YoloWorld, recipe: QuantRecipe) -> Prepared:
    return prepare(
        model,
        None,
        recipe,
        prepared.target.name,
        vocabulary=prepared.vocabulary,
        size=prepared.size,
        cpu=prepared.cpu,
        method=prepared.method,
        stages=prepared.parts,
    )


def _observer(prepared: Prepared) -> str:
    """What set most of the ranges of activations."""
    quantizers = prepared.quantizers()
    names = [each.observer for name, each in prepared.calibrations.items() if name in quantizers and not quantizers[name].weight]
    return max(sorted(set(names)), key=names.count) if names else "omse"


# --- choosing ---


def _measured(prepared: Prepared, model: YoloWorld) -> Measurement:
    assert prepared.vocabulary is not None
    return measure(model, len(prepared.vocabulary), prepared.size)


def _counted(measured: Measurement, recipe: QuantRecipe, prepared: Prepared, budget: Budget) -> tuple[Mapping[str, Cost], Cost]:
    """By block, and in total."""
    report = price(measured, recipe, prepared.target.name)
    return (report.blocks, report.total) if budget.counted == "published" else (report.export, report.export_total)


def _spent(measured: Measurement, recipe: QuantRecipe, prepared: Prepared, budget: Budget) -> dict[str, int]:
    """By block, which a rule for another block does not change."""
    return {block: budget.spent(each) for block, each in _counted(measured, recipe, prepared, budget)[0].items()}


def _check_possible(budget: Budget, left: int, more: Mapping[str, Mapping[Widths, int]], candidates: Iterable[Widths]) -> None:
    least = sum(min(each.values()) for each in more.values())
    if least > left:
        raise UserError(
            f"a budget of {budget.told(budget.exact)} cannot be met: the least possible with the widths {', '.join(map(str, candidates))} "
            f"is {budget.told(budget.exact - left + least)}",
            where=f"--{budget.of.replace('_', '-')}",
            remedy="raise it, or allow narrower --widths",
        )


def choose(options: Mapping[str, Sequence[Option]], limit: int) -> dict[str, Widths]:
    """One option a block, with the least sum of noise whose sum of costs is within the limit."""
    least_of_rest = sum(min(each.cost for each in some) for some in options.values())
    states: list[tuple[int, float, Any]] = [(0, 0.0, None)]  # cost, noise, and the choice behind it: (option's block, widths, before)
    for block, some in options.items():
        least_of_rest -= min(each.cost for each in some)
        reached = sorted(
            (
                (cost + each.cost, noise + each.share, (block, each.widths, before))
                for cost, noise, before in states
                for each in some
                if cost + each.cost + least_of_rest <= limit
            ),
            key=lambda state: state[:2],
        )
        states = []
        for state in reached:
            if not states or state[1] < states[-1][1]:
                states.append(state)
        states = _thinned(states)
    if not states:
        raise ValueError("no choice is within the limit")
    chosen: dict[str, Widths] = {}
    behind = states[-1][2]
    while behind is not None:
        block, widths, behind = behind
        chosen[block] = widths
    return {block: chosen[block] for block in options}


def _thinned(states: list[tuple[int, float, Any]]) -> list[tuple[int, float, Any]]:
    """Of the states, in the order of their cost, the best of each of so many steps of it; the cheapest stays."""
    if len(states) <= STATES:
        return states
    lowest, step = states[0][0], (states[-1][0] - states[0][0]) / STATES
    kept = {math.ceil((state[0] - lowest) / step): state for state in states}  # the last of a step has the least noise
    return list(kept.values())
