"""From a model to a graph with learnable quantizers in the right places: trace, mark stages, torch.ao, the placing passes, and the check.

The model itself stays as it is: the prepared graph has a copy of its parameters, so that both can be compared, and one teach the other.
A model that nobody else has use for can be taken over instead.
"""

import copy
import gc
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node

from crqat_fx import __version__
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import YoloWorld
from crqat_fx.pipelines import prepare_passes, quantizer_passes
from crqat_fx.quantize.backend import Quantizers, insert_quantizers
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.frozen_norm import make_norms_freezable
from crqat_fx.quantize.hold import hold_to_recipe
from crqat_fx.quantize.link_biases import link_biases
from crqat_fx.quantize.prepared import AGAIN, Prepared, Saved, read_saved
from crqat_fx.recipe import DEFAULT_RECIPE, DEFAULT_TARGET, QuantRecipe, QuantRule, Target, recipe_named, target_named
from crqat_fx.trace import LEAVES, Example, trace, trace_unproved
from crqat_fx.vocabulary import Vocabulary
from passes.base import PassError, Step
from passes.fx.graph import node_paths
from passes.fx.placement import ACTIVATION, PATH, WEIGHT, kinds, knows
from passes.spec import QuantSpec

logger = logging.getLogger(__name__)

PICTURE = {"images": 1 / 255}  # a YOLO-World's pictures are bytes over 255, which 8 bits hold as they are


@contextmanager
def _uncollected() -> Iterator[None]:
    """A graph is thousands of small objects that stay: the collector would walk all of torch several times to find none of them gone."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_uncollected()
def prepare(
    model: nn.Module,
    examples: Sequence[Example] | None = None,
    recipe: QuantRecipe | str = DEFAULT_RECIPE,
    target: str = DEFAULT_TARGET,
    *,
    vocabulary: Vocabulary | None = None,
    size: int = 640,
    cpu: str = "any",
    method: str = "lsq",
    stages: Literal[1, 2, 3] | None = None,
    leaves: tuple[type[nn.Module], ...] = LEAVES,
    take_over: bool = False,
) -> Prepared:
    """The model as a graph with quantizers, to be calibrated and trained. A YOLO-World brings its own examples; another module needs
    some of its inputs. `stages`: 2 for a YOLO-World unless told otherwise, 1 for another module. `take_over`: the graph gets the model's
    own modules and parameters, not a copy, and the model is not to be used again."""
    chosen = recipe_named(recipe) if isinstance(recipe, str) else recipe
    place = target_named(target, cpu)
    parts: Literal[1, 2, 3] = stages or (2 if isinstance(model, YoloWorld) else 1)
    graph = _traced(model, examples, leaves)
    if not take_over:
        graph = copy.deepcopy(graph)
    device = next((parameter.device for parameter in graph.parameters() if not parameter.is_meta), None)
    quantizers = Quantizers(method, device=device)
    try:
        steps = prepare_passes(parts)(graph).steps
        rules = _write_rules(graph, chosen, place)
        start = time.perf_counter()
        graph = insert_quantizers(graph, place, quantizers)
        placed = sum(isinstance(module, FakeQuantize) for module in graph.modules())  # before inputs, and of weights
        steps += (Step("torch.ao", placed, time.perf_counter() - start),)
        known = PICTURE if isinstance(model, YoloWorld) else None
        steps += quantizer_passes(place, quantizers, chosen.share_scales, known)(graph).steps
    except PassError as error:
        raise UserError(error.reason, where=error.name, remedy="see what the pass takes with `crqat-fx passes`") from error
    hold_to_recipe(graph, rules, place)
    make_norms_freezable(graph)
    link_biases(graph)
    graph.train(model.training)
    config = model.config if isinstance(model, YoloWorld) else None
    return Prepared(graph, chosen, place, cpu, method, config, parts, vocabulary, size, steps)


def load_prepared(
    path: str | Path,
    model: nn.Module | None = None,
    examples: Sequence[Example] | None = None,
    leaves: tuple[type[nn.Module], ...] = LEAVES,
    *,
    raw: bool = False,
) -> Prepared:
    """A prepared model from its file: built again, checked to be the same graph, then loaded. Of a module of the user's own the file has
    no code: give the module and its examples as they were given to `prepare`. Out of a training the file has an average of the weights,
    which is taken unless the `raw` ones are asked for; `weights` of the result says which."""
    return rebuilt(read_saved(path), model, examples, leaves, raw=raw)


def rebuilt(
    saved: Saved,
    model: nn.Module | None = None,
    examples: Sequence[Example] | None = None,
    leaves: tuple[type[nn.Module], ...] = LEAVES,
    *,
    raw: bool = False,
) -> Prepared:
    """The model of a prepared file that was read."""
    path = saved.path
    if raw and saved.average is None:
        raise UserError("has no average, so that its weights are the raw ones", where=path, remedy="leave out --raw-weights")
    if saved.config is None and model is None:
        raise UserError(
            "is of a module of your own", where=path, remedy="load it from Python, giving the module: load_prepared(path, module)"
        )
    take_over = model is None
    if model is None and saved.config is not None:
        with torch.device("meta"):
            model = YoloWorld(saved.config)
    assert model is not None  # one of both
    prepared = prepare(
        model,
        examples,
        saved.recipe,
        saved.target,
        vocabulary=saved.vocabulary,
        size=saved.size,
        cpu=saved.cpu,
        method=saved.method,
        stages=saved.parts,
        leaves=leaves,
        take_over=take_over,
    )
    if prepared.digest() != saved.graph:
        raise UserError(
            f"was prepared by crqat-fx {saved.version}, whose graph of this model is another than the one built now",
            where=path,
            remedy=AGAIN if saved.version == __version__ else f"use crqat-fx {saved.version}, or {AGAIN}",
        )
    if saved.config is not None and saved.vocabulary is not None:
        saved.vocabulary.check_width(saved.config.text_width, path)
    dtypes = {name: value.dtype for name, value in prepared.graph.state_dict().items()}
    try:
        prepared.graph.load_state_dict(saved.state if raw or saved.average is None else saved.average, assign=True)
    except RuntimeError as error:
        raise UserError(f"is damaged: its state does not fit ({str(error).splitlines()[-1].strip()})", where=path, remedy=AGAIN) from error
    for name, value in prepared.graph.state_dict().items():
        if value.dtype != dtypes[name] or (value.is_floating_point() and not bool(value.isfinite().all())):
            raise UserError(f"is damaged: {name} is of another kind, or not finite", where=path, remedy=AGAIN)
    prepared.calibrations = saved.calibrations
    prepared.weights = "only" if saved.average is None else "raw" if raw else "average"
    prepared.set_phase(saved.phase)
    prepared.graph.eval()
    return prepared


def _traced(model: nn.Module, examples: Sequence[Example] | None, leaves: tuple[type[nn.Module], ...]) -> GraphModule:
    """A model without content, on the meta device, has nothing that could be proved: it is to be filled from a file, or only looked at."""
    if any(value.is_meta for value in itertools.chain(model.parameters(), model.buffers())):
        return trace_unproved(model, leaves)
    return trace(model, examples, leaves)


def _write_rules(graph: GraphModule, recipe: QuantRecipe, target: Target) -> dict[str, QuantRule]:
    """Every node's rule on the node, as the target takes it."""
    paths = node_paths(graph)
    rules = recipe.rules_for(paths.values())
    for node, path in paths.items():
        rule = rules[path]
        node.meta[PATH] = path
        node.meta[WEIGHT] = rule.weight
        node.meta[ACTIVATION] = _taken(graph, node, path, rule.activation, target)
    return rules


def _taken(graph: GraphModule, node: Node, path: str, asked: QuantSpec | None, target: Target) -> QuantSpec | None:
    """A rule's activation, where the target's kernels can do it."""
    named = kinds(graph, node)
    if asked is None or not target.outputs or not (knows(target.reads, named) or knows(target.outputs, named)):
        return asked
    if asked.channel_axis is not None and not knows(target.per_head, named):
        raise UserError(
            f"an activation with a scale for each index of axis {asked.channel_axis}: onnxruntime's integer kernels sum over it",
            where=path,
            remedy="use a recipe without -ch, or --target conv-inputs",
        )
    if asked.symmetric:
        raise UserError(
            "symmetric activations are slow in onnxruntime's integer kernels: it wants unsigned codes with a zero point",
            where=path,
            remedy="leave out `symmetric` of the activation, or use --target conv-inputs",
        )
    return asked
