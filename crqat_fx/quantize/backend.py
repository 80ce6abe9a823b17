"""A target and a recipe in torch.ao's terms: BackendConfig and QConfigMapping, and the one call that has torch.ao fuse, swap and place.

torch.ao fuses a convolution with its BatchNorm, swaps in modules that quantize their weight, and, where a target quantizes the inputs of
layers, places a quantizer before each. Recipes reach it by explicit module names alone: its patterns over names never reach the weights.
It works from a graph that is traced already, so that every node keeps its name, its place in the model and its stage.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import PlaceholderObserver, QConfig, QConfigMapping
from torch.ao.quantization.backend_config import BackendConfig, BackendPatternConfig, DTypeConfig
from torch.ao.quantization.fx.fuse import fuse
from torch.ao.quantization.fx.prepare import prepare as place
from torch.fx import GraphModule

from crqat_fx.errors import UserError
from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.fake_quant import FakeQuantize, fake_quantizer
from crqat_fx.quantize.integer_bias import Conv2d, Linear
from crqat_fx.recipe import Target
from passes.fx.graph import module_of, node_paths, owners_of
from passes.fx.placement import ACTIVATION, WEIGHT, entry, kinds, knows
from passes.spec import QuantSpec

logger = logging.getLogger(__name__)

FLOAT: dict[str, type[nn.Module]] = {"Conv2d": nn.Conv2d, "Linear": nn.Linear, "BatchNorm2d": nn.BatchNorm2d}
LEARNING: dict[str, type[nn.Module]] = {"Conv2d": Conv2d, "Linear": Linear}
FUSED: dict[tuple[str, str], type[ConvBn2d]] = {("Conv2d", "BatchNorm2d"): ConvBn2d}

# before its input is read, a tensor is quantized on the way: torch.ao calls that dynamic, and places nothing behind the layer
QUANTIZED_INPUT = DTypeConfig(
    input_dtype=torch.quint8, output_dtype=torch.float, weight_dtype=torch.qint8, bias_dtype=torch.float, is_dynamic=True
)
QUANTIZED_WEIGHT = DTypeConfig(input_dtype=torch.float, output_dtype=torch.float, weight_dtype=torch.qint8, bias_dtype=torch.float)


@dataclass(frozen=True)
class Quantizers:
    """How quantizers are made: what they learn by, what they are first set by, and where."""

    method: str = "lsq"
    observer: str = "omse"
    device: torch.device | None = None

    def weight(self, spec: QuantSpec) -> type[FakeQuantize]:
        return fake_quantizer(spec, self.method, self.observer, weight=True)

    def before_reader(self, spec: QuantSpec) -> type[FakeQuantize]:
        return fake_quantizer(spec, self.method, self.observer, weight=False, dynamic=True)

    def __call__(self, spec: QuantSpec, known: float | None = None) -> FakeQuantize:
        """An activation's quantizer, as `place_quantizers` asks for it."""
        kind = fake_quantizer(spec, self.method, self.observer, None if known is None else (known, 0), weight=False)
        return kind(factory_kwargs={"device": self.device})  # type: ignore[call-arg]  # the made class takes nothing else


def weight_spec(target: Target, asked: QuantSpec) -> QuantSpec:
    """How a weight is quantized for a target: as asked, no wider than the target's products bear."""
    return replace(asked, bits=min(asked.bits, target.weight_bits))


def backend_config(target: Target) -> BackendConfig:
    config = BackendConfig(target.name)
    learning: list[type[nn.Module]] = []
    for pattern in target.fused:
        fused = FUSED[pattern]
        first, second = (FLOAT[kind] for kind in pattern)
        config.set_backend_pattern_config(BackendPatternConfig((first, second)).set_fuser_method(fused.fuse).set_fused_module(fused))
        if pattern[0] in target.weights:
            learning.append(fused)
    for kind in sorted(target.weights):
        config.set_backend_pattern_config(BackendPatternConfig(FLOAT[kind]).set_qat_module(LEARNING[kind]))
        learning.append(LEARNING[kind])
    for module in learning:
        observed = BackendPatternConfig(module).set_dtype_configs([QUANTIZED_INPUT, QUANTIZED_WEIGHT])
        config.set_backend_pattern_config(observed.set_qat_module(module) if issubclass(module, ConvBn2d) else observed)
    return config


def qconfig_mapping(graph: GraphModule, target: Target, quantizers: Quantizers) -> QConfigMapping:
    """Every layer whose weight the recipe quantizes, by its own name."""
    mapping = QConfigMapping()
    for node in graph.graph.nodes:
        named = kinds(graph, node)
        weight, activation = node.meta.get(WEIGHT), node.meta.get(ACTIVATION)
        if not isinstance(weight, QuantSpec) or not knows(target.weights, named):
            continue
        before = isinstance(activation, QuantSpec) and entry(target.operands, named, ()) == (0,)
        mapping.set_module_name(
            str(node.target),
            QConfig(
                activation=quantizers.before_reader(activation) if before else PlaceholderObserver.with_args(dtype=torch.float),
                weight=quantizers.weight(weight_spec(target, weight)),
            ),
        )
    return mapping


def insert_quantizers(graph: GraphModule, target: Target, quantizers: Quantizers) -> GraphModule:
    """Has torch.ao fuse what the target fuses, swap in layers that round their weight, and place what it can. Modules are taken over."""
    _check_called_once(graph, target)
    config = backend_config(target)
    mapping = qconfig_mapping(graph, target, quantizers)
    # torch.ao tells functions by the module they were traced in; with a path of its own each node can be named
    with _silenced():
        fused: GraphModule = fuse(graph, is_qat=True, backend_config=config)
        scopes = {node.name: (path, type(module_of(fused, node))) for node, path in node_paths(fused).items()}
        placed = place(fused, mapping, True, scopes, example_inputs=(), backend_config=config)
    placed.meta.pop("_observed_graph_module_attrs", None)
    for module in placed.modules():
        if "qconfig" in vars(module):
            del module.qconfig
    for node in placed.graph.nodes:
        node.meta.pop("target_dtype_info", None)
    return placed


def _check_called_once(graph: GraphModule, target: Target) -> None:
    """A layer with a weight of its own in two places would be fused, and quantized, for one of them."""
    calls = Counter(
        str(node.target) for node in graph.graph.nodes if node.op == "call_module" and knows(target.weights, kinds(graph, node))
    )
    shared = next((path for path, count in calls.items() if count > 1), None)
    if shared is not None:
        callers = {owners_of(node)[-1] for node in graph.graph.nodes if node.target == shared and owners_of(node)}
        logger.debug("%s is called in %s", shared, ", ".join(sorted(callers)))
        raise UserError(f"is called {calls[shared]} times", where=shared, remedy="give each call a layer of its own")


@contextmanager
def _silenced() -> Iterator[Any]:
    """torch.ao says at every turn that it will be replaced: torch is pinned, and this package is the one that would notice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.ao\.quantization is deprecated.*")
        # nor that a model is built without content (meta) to be filled from a file, while its quantizers have some
        warnings.filterwarnings("ignore", message=r"Both 'meta' and 'cpu' are present in the list of devices")
        yield
