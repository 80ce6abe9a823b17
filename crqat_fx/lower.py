"""From a model to the graph that is exported: integer codes between quantizers, norms folded, what depends on the text alone computed once.

`lower` takes a prepared model, `lower_float` one as published. The graph that comes out runs in torch and computes what the file will:
verification compares it with the prepared model on one side, and with the file on the other. The model that is given stays as it was.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.fx import GraphModule, Node

from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import YoloWorld, YoloWorldConfig
from crqat_fx.pipelines import float_export_passes, lowering_passes
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.quantize.rounding import SMALLEST_SCALE
from crqat_fx.recipe import QuantRecipe, Target
from crqat_fx.trace import LEAVES, Example, trace
from crqat_fx.vocabulary import Vocabulary
from passes.base import PassError, Pipeline, Step
from passes.fx.codes import Dequantize, Quantize
from passes.fx.collapse_match import CollapseMatch
from passes.fx.graph import module_of, node_paths
from passes.fx.placement import PATH
from passes.fx.to_integer_codes import CODES

Form = Literal["straight", "tuned"]


@dataclass(frozen=True)
class Lowered:
    """A graph as it is exported. `names`: of every node's value, each once; codes end in `codes`. `collapsed`: quantizers of the prepared
    model that the graph has no longer, and why. `recipe`, `target` and `cpu` are None of a float."""

    graph: GraphModule
    names: Mapping[Node, str]
    inputs: tuple[str, ...]
    vocabulary: Vocabulary | None  # None: the text is an input, or there is none
    config: YoloWorldConfig | None  # None: a module of the user's own
    size: int
    recipe: QuantRecipe | None
    target: Target | None
    cpu: str | None
    collapsed: Mapping[str, str]
    steps: tuple[Step, ...]


def lower(prepared: Prepared, vocabulary: Vocabulary | None = None) -> Lowered:
    """A prepared model as integers. With a vocabulary the text is a constant; without, an input of the graph."""
    _check_quantizers(prepared)
    text = _text(vocabulary, prepared.config)
    graph = copy.deepcopy(prepared.graph)
    passes = lowering_passes(text, detector=prepared.config is not None, weight_bits=prepared.target.weight_bits)
    steps = _run(graph, passes)
    gone = _gone(prepared, graph, passes)
    return Lowered(
        graph,
        value_names(graph),
        _inputs(graph),
        vocabulary,
        prepared.config,
        prepared.size,
        prepared.recipe,
        prepared.target,
        prepared.cpu,
        gone,
        steps,
    )


def lower_float(
    model: nn.Module,
    vocabulary: Vocabulary | None = None,
    form: Form = "tuned",
    *,
    size: int = 640,
    examples: Sequence[Example] | None = None,
    leaves: tuple[type[nn.Module], ...] = LEAVES,
) -> Lowered:
    """A model in full precision: `straight` as it is written, its norms folded; `tuned` with everything that is exact algebra."""
    if form not in get_args(Form):
        raise UserError(f"{form!r} is no form of a float graph", remedy=f"give one of {', '.join(get_args(Form))}")
    config = model.config if isinstance(model, YoloWorld) else None
    text = _text(vocabulary, config)
    graph = copy.deepcopy(trace(model, examples, leaves))
    passes = float_export_passes(text, detector=config is not None, tuned=form == "tuned")
    steps = _run(graph, passes)
    return Lowered(graph, value_names(graph), _inputs(graph), vocabulary, config, size, None, None, None, {}, steps)


def _run(graph: GraphModule, passes: Pipeline[GraphModule]) -> tuple[Step, ...]:
    graph.cpu().eval().requires_grad_(False)
    for node, path in node_paths(graph).items():
        node.meta[PATH] = path
    try:
        return passes(graph).steps
    except PassError as error:
        raise UserError(error.reason, where=error.name, remedy="see what the pass takes with `crqat-fx passes`") from error


def _gone(prepared: Prepared, graph: GraphModule, passes: Pipeline[GraphModule]) -> dict[str, str]:
    """The quantizers of a prepared model that its lowered graph does not have, and why."""
    collapsed = {name for each in passes.passes if isinstance(each, CollapseMatch) for name in each.gone}
    codes = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    standing = {str(node.meta[CODES]) for node in graph.graph.nodes if CODES in node.meta}
    return {
        name: "one convolution does what it stood between" if name in collapsed else "nothing but the text decides what it rounds"
        for name in prepared.quantizers()
        if name not in standing and name.replace("weight_fake_quant", "weight_codes") not in codes
    }


def _inputs(graph: GraphModule) -> tuple[str, ...]:
    return tuple(str(node.target) for node in graph.graph.nodes if node.op == "placeholder")


def value_names(graph: GraphModule) -> dict[Node, str]:
    """What every node's value is called in a file: by its path in the model that was given, codes with `.codes` behind, and what is read
    from them without. Where codes are read several times, `#2` and so on."""
    names: dict[Node, str] = {}
    seen: Counter[str] = Counter()
    for node in graph.graph.nodes:
        name = _name(graph, node, names)
        seen[name] += 1
        names[node] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return names


def _name(graph: GraphModule, node: Node, names: Mapping[Node, str]) -> str:
    module = module_of(graph, node)
    if isinstance(module, Dequantize):
        return names[node.all_input_nodes[0]].removesuffix("codes").rstrip("._")
    if isinstance(module, Quantize):
        return f"{node.meta[PATH]}.codes"
    if node.op in ("placeholder", "get_attr", "output"):
        return str(node.target)
    path = str(node.meta[PATH])
    if node.target is torch.nn.functional.pad:
        return f"{path}.pad"
    return f"{path}.codes" if CODES in node.meta else path


# --- what was given ---


def _check_quantizers(prepared: Prepared) -> None:
    for name, quantizer in prepared.quantizers().items():
        wrong = _wrong_with(quantizer)
        if wrong:
            raise UserError(f"the quantizer {wrong}", where=name, remedy="calibrate the model, or train it to the end of its curriculum")


def _wrong_with(quantizer: FakeQuantize) -> str:
    """Why a quantizer gives no codes, empty where it does."""
    if not quantizer.initialised:
        return "is not calibrated: it has no scale"
    if not quantizer.enabled:
        return "is switched off"
    scale = quantizer.scale.detach()
    if not bool(torch.isfinite(scale).all()):
        return "has a scale that is not finite"
    if not bool((scale > SMALLEST_SCALE).all()):
        return "has a scale of zero"
    zero = quantizer.zero_point
    return "" if zero is None or bool(torch.isfinite(zero).all()) else "has a zero point that is not finite"


def _text(vocabulary: Vocabulary | None, config: YoloWorldConfig | None) -> torch.Tensor | None:
    """[1,N,D]."""
    if vocabulary is None:
        return None
    if config is None:
        raise UserError("a vocabulary is given, and a model of your own has no input that is known to be text", remedy="leave it out")
    if vocabulary.width != config.text_width:
        raise UserError(
            f"the vocabulary is {vocabulary.width} wide, and the model reads texts of {config.text_width}",
            remedy="embed the names with the text encoder that the model was trained with",
        )
    return torch.from_numpy(vocabulary.embeddings).unsqueeze(0)
