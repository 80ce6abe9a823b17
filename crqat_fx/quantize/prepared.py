"""A graph with learnable quantizers: the one door to what in it is on, trained and frozen, and its file.

A file holds no code: the model's configuration, recipe, target, vocabulary, size, phase and state, and the hash of the graph's text.
Loading builds the model, runs the same passes, and refuses when what comes out is another graph than the one whose state is in the file.
"""

import dataclasses
import hashlib
import io
import logging
import pickle
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _NormBase

from crqat_fx.errors import UserError
from crqat_fx.files import written
from crqat_fx.models.yolo_world import YoloWorldConfig
from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.fake_quant import METHODS, FakeQuantize
from crqat_fx.recipe import CPUS, TARGETS, QuantRecipe, Target
from crqat_fx.unpickle import opened
from crqat_fx.vocabulary import Vocabulary
from passes.base import Step
from passes.fx.graph import STAGE, format_graph, module_of, node_paths
from passes.fx.mark_stages import Stage
from passes.fx.placement import ACTIVATION, kinds, knows, quantizes

logger = logging.getLogger(__name__)

FORMAT, FORMAT_VERSION = "crqat-fx prepared", 1
AGAIN = "prepare the model again"


@dataclass(frozen=True)
class Phase:
    """Which stages are quantized, which are trained, and whether the norms of those that are trained keep their statistics."""

    quantized: tuple[str, ...]
    trained: tuple[str, ...]
    norm: Literal["train", "frozen"] = "train"


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

    def set_phase(self, phase: Phase) -> None:
        """Turns quantizers on and off, and freezes what is not trained: parameters, scales, and the statistics of norms."""
        names = [stage.name for stage in self.stages]
        for asked in (*phase.quantized, *phase.trained):
            if asked not in names:
                raise UserError(f"unknown stage {asked!r}", where="the phase", remedy=f"choose among {', '.join(names)}")
        if phase.norm not in ("train", "frozen"):
            raise UserError(f"norm is {phase.norm!r}", where="the phase", remedy="give train or frozen")
        trained: dict[nn.Parameter, bool] = {}
        for node, module in self._called():
            stage = node.meta[STAGE]
            for parameter in self._parameters(node, module):
                # what several stages use is trained where all of them are
                trained[parameter] = trained.get(parameter, True) and stage in phase.trained
            for each in module.modules() if module is not None else ():
                if isinstance(each, FakeQuantize):
                    each.enabled = stage in phase.quantized
                if isinstance(each, ConvBn2d) or (isinstance(each, _NormBase) and not isinstance(module, ConvBn2d)):
                    each.frozen = stage not in phase.trained or phase.norm == "frozen"
                    each.train(self.graph.training)
        for parameter, learns in trained.items():
            parameter.requires_grad_(learns)
        self.phase = phase

    def border(self) -> tuple[Node, ...]:
        """What later stages read of the first, in the order of the graph, before its quantizer: what distillation compares."""
        first = self.stages[0]
        crossing = [node for node in first.nodes if any(user.meta[STAGE] != first.name for user in node.users)]
        found = []
        for node in crossing:
            source = node
            while quantizes(self.graph, source):
                source = source.all_input_nodes[0]
            if source.op != "placeholder":
                found.append(source)
        return tuple(dict.fromkeys(found))

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
        """The graph as text, and below it how each weight is quantized."""
        weights = [
            f"{name} = {type(quantizer).__name__}[{quantizer.extra_repr()}]"
            for name, quantizer in self.quantizers().items()
            if name.endswith("weight_fake_quant")
        ]
        return "\n".join([format_graph(self.graph), *weights])

    def digest(self) -> str:
        return hashlib.sha256(self.text().encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": metadata.version("crqat-fx"),
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
            "state": {key: value.detach().cpu().contiguous() for key, value in self.graph.state_dict().items()},
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        with written(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

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


def is_prepared_file(path: str | Path) -> bool:
    """Whether a file says of itself that it is a prepared model. A file that is no checkpoint at all is a UserError."""
    with opened(Path(path)) as archive:
        return isinstance(archive.contents, dict) and archive.contents.get("format") == FORMAT


def read_saved(path: str | Path) -> Saved:
    """The content of a prepared file. Nothing in it is run, and what does not fit is refused."""
    where = Path(path)
    try:
        content: Any = torch.load(where, weights_only=True, map_location="cpu")
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror or type(error).__name__})", where=where, remedy="give a prepared model"
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"is no prepared model ({type(error).__name__})", where=where, remedy=f"{AGAIN} with `crqat-fx prepare`") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError("is no prepared model", where=where, remedy="make one with `crqat-fx prepare`")
    if content.get("format_version") != FORMAT_VERSION:
        told = content.get("format_version")
        raise UserError(
            f"is a prepared model of format {told!r:.20}, and this release reads {FORMAT_VERSION}", where=where, remedy="update"
        )
    try:
        return _checked(where, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"is damaged: {type(error).__name__} {error}"[:200], where=where, remedy=AGAIN) from error


def _checked(where: Path, content: dict[Any, Any]) -> Saved:
    texts = {key: content[key] for key in ("version", "graph", "target", "cpu", "method")}
    if not all(isinstance(value, str) for value in texts.values()):
        raise TypeError("of its description")
    if texts["target"] not in TARGETS or texts["cpu"] not in CPUS or texts["method"] not in METHODS:
        raise ValueError(f"unknown target, processor or method ({texts['target']:.20}, {texts['cpu']:.20}, {texts['method']:.20})")
    state, phase, vocabulary, config = (content[key] for key in ("state", "phase", "vocabulary", "config"))
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise TypeError("of its state")
    size, parts = content["size"], content["parts"]
    if type(size) is not int or size < 1 or parts not in (1, 2, 3):
        raise ValueError("of its size or stages")
    if config is not None and not all(0 <= value <= (8 if isinstance(value, float) else 2**16) for value in config.values()):
        raise ValueError("of its configuration")
    names = {key: tuple(phase[key]) for key in ("quantized", "trained")}
    if not all(isinstance(name, str) for each in names.values() for name in each):
        raise TypeError("of its phase")
    return Saved(
        path=where,
        **texts,
        config=None if config is None else YoloWorldConfig(**config),
        parts=parts,
        recipe=QuantRecipe.from_plain(content["recipe"], where),
        size=size,
        phase=Phase(**names, norm=phase["norm"]),
        vocabulary=None if vocabulary is None else Vocabulary(tuple(vocabulary["names"]), vocabulary["embeddings"].numpy()),
        state=state,
    )
