"""A graph with learnable quantizers: the one door to what in it is on, trained and frozen, and its file.

A file holds no code: the model's configuration, recipe, target, vocabulary, size, phase and state, and the hash of the graph's text; out of
a training also the average of the state, which stands for the model wherever the raw state is not asked for. Loading builds the model,
runs the same passes, and refuses when what comes out is another graph than the one whose state is in the file.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _NormBase

from crqat_fx import __version__
from crqat_fx.checkpoint import write_archive
from crqat_fx.curriculum import Phase
from crqat_fx.detections import LARGEST, STEP
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import YoloWorldConfig
from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.fake_quant import METHODS, FakeQuantize
from crqat_fx.quantize.integer_bias import HeadBias, IntegerBias
from crqat_fx.recipe import CPUS, TARGETS, QuantRecipe, Target
from crqat_fx.shipped import locate
from crqat_fx.unpickle import Archive, StoredTensor, opened
from crqat_fx.vocabulary import Vocabulary
from passes.base import Step
from passes.fx.graph import STAGE, format_graph, module_of, node_paths
from passes.fx.mark_stages import Stage
from passes.fx.placement import ACTIVATION, kinds, knows, quantizes

logger = logging.getLogger(__name__)

FORMAT, FORMAT_VERSION = "crqat-fx prepared", 2
AGAIN = "prepare the model again"

Weights = Literal["only", "average", "raw"]  # of a file that has an average either it or the raw state is loaded


def border(graph: GraphModule, stage: str) -> tuple[Node, ...]:
    """What later stages read of one, in the order of a marked graph, before its quantizer: what distillation compares."""
    found = []
    for node in graph.graph.nodes:
        if node.meta[STAGE] != stage or not any(user.meta[STAGE] != stage for user in node.users):
            continue
        source = node
        while quantizes(graph, source):
            source = source.all_input_nodes[0]
        if source.op != "placeholder":
            found.append(source)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Calibration:
    """What a quantizer's range was last set by, and to: training moves it from there."""

    observer: str
    pictures: int
    scale: Tensor
    zero_point: Tensor


@dataclass
class Prepared:
    """A model with learnable quantizers. `set_phase` is the one door to what is on, trained and frozen."""

    graph: GraphModule
    recipe: QuantRecipe
    target: Target
    cpu: str
    method: str
    config: YoloWorldConfig | None  # None: a module of the user's own
    parts: Literal[1, 2, 3]  # how many stages were asked for
    vocabulary: Vocabulary | None
    size: int
    steps: tuple[Step, ...]
    weights: Weights = "only"
    calibrations: dict[str, Calibration] = dataclasses.field(default_factory=dict)  # by quantizer
    phase: Phase = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        everything = tuple(stage.name for stage in self.stages)
        self.set_phase(Phase(quantized=everything, trained=everything))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """In the order in which the data flows."""
        nodes: dict[str, list[Node]] = {}
        for node in self.graph.graph.nodes:
            nodes.setdefault(node.meta[STAGE], []).append(node)
        return tuple(Stage(name, tuple(each)) for name, each in nodes.items())

    @property
    def calibrated(self) -> bool:
        return all(quantizer.initialised for quantizer in self.quantizers().values())

    def quantizers(self, stages: Collection[str] | None = None) -> dict[str, FakeQuantize]:
        """Every quantizer by name, those of weights among them; of some stages, or of all."""
        found: dict[str, FakeQuantize] = {}
        for node in self.graph.graph.nodes:
            module = module_of(self.graph, node)
            if module is None or (stages is not None and node.meta[STAGE] not in stages):
                continue
            for name, each in module.named_modules():
                if isinstance(each, FakeQuantize):
                    found[f"{node.target}.{name}".rstrip(".")] = each
        return found

    def refuse_unknown(self, stages: Collection[str], where: str) -> None:
        names = [stage.name for stage in self.stages]
        for asked in stages:
            if asked not in names:
                raise UserError(f"unknown stage {asked!r}", where=where, remedy=f"choose among {', '.join(names)}")

    def set_phase(self, phase: Phase) -> None:
        """Turns quantizers on and off, and freezes what is not trained: parameters, scales, and the statistics of norms. With these, biases
        are rounded as in evaluation."""
        self.refuse_unknown((*phase.quantized, *phase.trained), "the phase")
        trained: dict[nn.Parameter, bool] = {}
        for node, module in self._called():
            stage = node.meta[STAGE]
            for parameter in self._parameters(node, module):
                # what several stages use is trained where all of them are
                trained[parameter] = trained.get(parameter, True) and stage in phase.trained
            for each in module.modules() if module is not None else ():
                if isinstance(each, FakeQuantize):
                    each.enabled = stage in phase.quantized
                if isinstance(each, IntegerBias | HeadBias) or (isinstance(each, _NormBase) and not isinstance(module, ConvBn2d)):
                    each.frozen = stage not in phase.trained or phase.norm == "frozen"
                    each.train(self.graph.training)
        for parameter, learns in trained.items():
            parameter.requires_grad_(learns)
        self.phase = phase

    def border(self, stage: str | None = None) -> tuple[Node, ...]:
        """What later stages read of one, of the first unless named."""
        return border(self.graph, self.stages[0].name if stage is None else stage)

    def floats(self) -> list[tuple[str, str]]:
        """What stays float and why, by path: everything that computes, and is neither quantized nor read as codes."""
        paths = node_paths(self.graph)
        reasons: list[tuple[str, str]] = []
        for node in self.graph.graph.nodes:
            named = kinds(self.graph, node)
            module = module_of(self.graph, node)
            if not named or quantizes(self.graph, node) or knows(self.target.carries, named) or node.op == "call_method":
                continue
            listed = knows(self.target.operands, named) or knows(self.target.reads, named) or knows(self.target.outputs, named)
            if not listed:
                if module is not None:
                    reasons.append((paths[node], f"{named[0]}: the target {self.target.name} has no quantizers for it"))
            elif node.meta.get(ACTIVATION) is None:
                reasons.append((paths[node], f"{named[0]}: the recipe leaves it float"))
        return reasons

    def text(self) -> str:
        """The graph as text, and below it how each weight is quantized. What rounds a bias follows from that, and is left out."""
        weights = [
            f"{name} = {type(quantizer).__name__}[{quantizer.extra_repr()}]"
            for name, quantizer in self.quantizers().items()
            if name.endswith("weight_fake_quant")
        ]
        return "\n".join([format_graph(self.graph, lambda node: isinstance(module_of(self.graph, node), HeadBias)), *weights])

    def digest(self) -> str:
        return hashlib.sha256(self.text().encode()).hexdigest()

    def save(self, path: str | Path, average: Mapping[str, Tensor] | None = None) -> None:
        """Writes the file, whole or not at all. `average` is a state of the graph to be loaded in place of its own."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": __version__,
            "graph": self.digest(),
            "config": None if self.config is None else dataclasses.asdict(self.config),
            "parts": self.parts,
            "recipe": self.recipe.as_plain(),
            "target": self.target.name,
            "cpu": self.cpu,
            "method": self.method,
            "size": self.size,
            "phase": {"quantized": list(self.phase.quantized), "trained": list(self.phase.trained), "norm": self.phase.norm},
            "vocabulary": None
            if self.vocabulary is None
            else {"names": list(self.vocabulary.names), "embeddings": torch.from_numpy(self.vocabulary.embeddings)},
            "state": _stored(self.graph.state_dict()),
            "average": None if average is None else _stored(average),
            "calibrations": {name: vars(each) for name, each in self.calibrations.items()},
        }
        write_archive(path, content)

    def _called(self) -> Iterator[tuple[Node, nn.Module | None]]:
        for node in self.graph.graph.nodes:
            yield node, module_of(self.graph, node)

    def _parameters(self, node: Node, module: nn.Module | None) -> list[nn.Parameter]:
        if module is not None:
            return list(module.parameters())
        if node.op != "get_attr":
            return []
        owner, _, last = str(node.target).rpartition(".")
        value = getattr(self.graph.get_submodule(owner), last)
        return [value] if isinstance(value, nn.Parameter) else []


def _stored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


@dataclass(frozen=True)
class Saved:
    """A prepared file, read and checked, before anything is built from it."""

    path: Path
    version: str
    graph: str
    config: YoloWorldConfig | None
    parts: Literal[1, 2, 3]
    recipe: QuantRecipe
    target: str
    cpu: str
    method: str
    size: int
    phase: Phase
    vocabulary: Vocabulary | None
    state: dict[str, Tensor]
    average: dict[str, Tensor] | None  # of a training
    calibrations: dict[str, Calibration]


def read_saved(path: str | Path) -> Saved:
    """The content of a prepared file. Nothing in it is run, and what does not fit is refused."""
    with opened(locate(path)) as archive:
        return saved_in(archive)


def holds_prepared(archive: Archive) -> bool:
    """Whether a file that is open says of itself that it is a prepared model."""
    return isinstance(archive.contents, dict) and archive.contents.get("format") == FORMAT


def saved_in(archive: Archive) -> Saved:
    """The content of a prepared file that is open."""
    where = archive.path
    if not holds_prepared(archive):
        raise UserError("is no prepared model", where=where, remedy="make one with `crqat-fx prepare`")
    content: Any = archive.contents
    if content.get("format_version") != FORMAT_VERSION:
        told = content.get("format_version")
        remedy = AGAIN if isinstance(told, int) and told < FORMAT_VERSION else "update"
        raise UserError(f"is a prepared model of format {told!r:.20}, and this release reads {FORMAT_VERSION}", where=where, remedy=remedy)
    try:
        return _checked(archive, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"is damaged: {type(error).__name__} {error}"[:200], where=where, remedy=AGAIN) from error


def _checked(archive: Archive, content: dict[Any, Any]) -> Saved:
    texts = {key: content[key] for key in ("version", "graph", "target", "cpu", "method")}
    if not all(isinstance(value, str) for value in texts.values()):
        raise TypeError("of its description")
    if texts["target"] not in TARGETS or texts["cpu"] not in CPUS or texts["method"] not in METHODS:
        raise ValueError(f"unknown target, processor or method ({texts['target']:.20}, {texts['cpu']:.20}, {texts['method']:.20})")
    state, phase, vocabulary, config = (content[key] for key in ("state", "phase", "vocabulary", "config"))
    average = content.get("average")
    size, parts = content["size"], content["parts"]
    if type(size) is not int or not 1 <= size <= LARGEST or parts not in (1, 2, 3):
        raise ValueError("of its size or stages")
    if config is not None and (size % STEP or not _makes_a_model(config)):
        raise ValueError("of its configuration")
    names = {key: tuple(phase[key]) for key in ("quantized", "trained")}
    if not all(isinstance(name, str) for each in names.values() for name in each):
        raise TypeError("of its phase")
    return Saved(
        path=archive.path,
        **texts,
        config=None if config is None else YoloWorldConfig(**config),
        parts=parts,
        recipe=QuantRecipe.from_plain(content["recipe"], archive.path),
        size=size,
        phase=Phase(names["quantized"], names["trained"], phase["norm"]),
        vocabulary=None
        if vocabulary is None
        else Vocabulary(tuple(vocabulary["names"]), _tensor(archive, vocabulary["embeddings"]).numpy()),
        state=_state(archive, state),
        average=None if average is None else _state(archive, average),
        calibrations={str(name): _calibration(archive, **each) for name, each in content.get("calibrations", {}).items()},
    )


def _makes_a_model(config: dict[Any, Any]) -> bool:
    """Whether every value is of its kind, and none so large or small that no model could be built of it."""
    follows = {field.name for field in dataclasses.fields(YoloWorldConfig) if field.default == 0}  # from others, where it is 0
    return all(
        type(value) in (int, float) and 0 < value <= 8
        if name in ("deepen", "widen")
        else type(value) is int and (name not in follows) <= value <= 2**16
        for name, value in config.items()
    )


def _state(archive: Archive, stored: dict[Any, Any]) -> dict[str, Tensor]:
    if not all(isinstance(key, str) for key in stored):
        raise TypeError("of its state")
    return {key: _tensor(archive, value) for key, value in stored.items()}


def _calibration(archive: Archive, observer: str, pictures: int, scale: object, zero_point: object) -> Calibration:
    if not isinstance(observer, str) or type(pictures) is not int:
        raise TypeError("of its calibration")
    return Calibration(observer, pictures, _tensor(archive, scale), _tensor(archive, zero_point))


def _tensor(archive: Archive, stored: object) -> Tensor:
    if not isinstance(stored, StoredTensor):
        raise TypeError("of what should be a tensor")
    return archive.tensor(stored)
