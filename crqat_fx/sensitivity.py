"""Which blocks suffer from quantization: each is quantized alone, with all others in float, and what comes out is compared with float.

Alone, and not the other way round (a block in float, the others quantized): so every block is measured against the same float outputs, and
a small block's noise is not lost in that of all others. Noises of blocks that are quantized alone also add up, nearly, to that of several
together, which is what a recipe for a budget is chosen by (`crqat_fx.mixed_recipe`).

The SQNR is that of detections: of the logits and of the bins of box distances, each level's positions weighted by the best score that the
float model has there. On the drawn task it follows the AP that a block costs alone far better than the plain SQNR of outputs, which is
ruled by background. A block has the quantizers that `owners_of_quantizers` gives it, and each of them is in one block.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from crqat_fx.data.samples import EvaluationSet
from crqat_fx.errors import UserError
from crqat_fx.evaluate import evaluate, read_picture_or_skip
from crqat_fx.graph_view import view
from crqat_fx.noise import Energy, decibels, evaluating, turned_on
from crqat_fx.pipelines import BINS, LOGITS
from crqat_fx.prepared_inspection import BlockFacts, inspect_prepared, owners_of_quantizers
from crqat_fx.progress import Progress
from crqat_fx.quantize.calibrate import picture_batches
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.torch_detector import TorchDetector
from crqat_fx.trace import Example
from passes.fx.graph import module_of

logger = logging.getLogger(__name__)

ALL = "all"  # every block at once
Levels = tuple[Sequence[Tensor], Sequence[Tensor]]  # logits and bins


@dataclass(frozen=True)
class BlockSensitivity:
    """One block quantized alone, at the bits that its quantizers have."""

    block: str
    stage: str
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    quantizers: int
    share: float  # noise over signal of the detections
    ap: float | None  # of the model with this block alone quantized

    @property
    def db(self) -> float:
        return decibels(self.share)


@dataclass(frozen=True)
class Sensitivity:
    """Blocks in the order of the data. The AP is None where none was asked for."""

    blocks: tuple[BlockSensitivity, ...]
    share: float  # with all of them quantized
    float_ap: float | None
    ap: float | None  # with all of them quantized
    pictures: int
    ap_pictures: int

    def as_json(self) -> dict[str, Any]:
        return {
            "blocks": [asdict(each) | {"db": each.db} for each in self.blocks],
            "all": {"share": self.share, "db": decibels(self.share), "ap": self.ap},
            "float": {"ap": self.float_ap},
            "pictures": self.pictures,
            "ap_pictures": self.ap_pictures,
        }


@dataclass(frozen=True)
class FirstPictures:
    """The first pictures of a set, with their truth."""

    whole: EvaluationSet
    count: int

    @property
    def coco(self) -> dict[str, Any]:
        images = self.whole.coco["images"][: self.count]
        kept = {image["id"] for image in images}
        annotations = [each for each in self.whole.coco["annotations"] if each["image_id"] in kept]
        return self.whole.coco | {"images": images, "annotations": annotations}

    def __len__(self) -> int:
        return min(self.count, len(self.whole))

    def picture(self, index: int) -> np.ndarray:
        return self.whole.picture(index)

    def readable(self) -> Iterator[np.ndarray]:
        return (picture for index in range(len(self)) if (picture := read_picture_or_skip(self, index)) is not None)


def sensitivity(
    prepared: Prepared,
    dataset: EvaluationSet,
    *,
    pictures: int = 16,
    ap_pictures: int = 0,
    batch: int = 4,
    progress: Progress | None = None,
) -> Sensitivity:
    """The noise is measured on the set's first `pictures`, with the model's own vocabulary; the AP on its first `ap_pictures`. Quantizers,
    phase and mode stay as they were."""
    check_measurable(prepared)
    facts = {each.block: each for each in inspect_prepared(prepared, "").blocks if each.quantizers}
    shown = FirstPictures(dataset, pictures)
    shares = noise_of_blocks(prepared, picture_batches(prepared, shown.readable(), batch), total=len(shown), progress=progress)
    scores: dict[str | None, float | None] = {}
    if ap_pictures:
        scored = FirstPictures(dataset, ap_pictures)
        for number, block in enumerate((None, ALL, *facts)):
            told = _within(progress, number, len(facts) + 2, f"AP, {'float' if block is None else block}")
            scores[block] = ap_of(prepared, scored, block, batch=batch, progress=told)
    return Sensitivity(
        tuple(_of_block(each, shares[each.block], scores.get(each.block)) for each in facts.values()),
        share=shares[ALL],
        float_ap=scores.get(None),
        ap=scores.get(ALL),
        pictures=len(shown),
        ap_pictures=min(ap_pictures, len(dataset)),
    )


def check_measurable(prepared: Prepared) -> None:
    if prepared.config is None:
        raise UserError("is no YOLO-World, whose outputs are compared here", where="the prepared model", remedy="prepare a YOLO-World")
    if not prepared.calibrated:
        raise UserError("its quantizers have no ranges", where="the prepared model", remedy="prepare it again with --calibrate")


def _of_block(facts: BlockFacts, share: float, ap: float | None) -> BlockSensitivity:
    return BlockSensitivity(facts.block, facts.stage, facts.weight_bits, facts.activation_bits, facts.quantizers, share, ap)


def noise_of_blocks(
    prepared: Prepared, batches: Iterable[Example], *, total: int | None = None, progress: Progress | None = None
) -> dict[str, float]:
    """Of every block quantized alone the share of noise in the detections, and that of `ALL` at once."""
    quantizers, owners = prepared.quantizers(), _blocks_of_quantizers(prepared)
    blocks = list(dict.fromkeys(owners[name] for name in quantizers))
    behind = {block: _behind(prepared, {name for name, own in owners.items() if own == block}) for block in blocks}
    behind[ALL] = set(prepared.graph.graph.nodes)
    energies = {block: (Energy(), Energy()) for block in behind}
    seen = 0
    with evaluating(prepared.graph), torch.no_grad():
        for inputs in batches:
            with turned_on(quantizers, _only(None, owners)):
                run = Interpreter(prepared.graph, garbage_collect_values=False)
                exact: Levels = run.run(*inputs)
                known = dict(run.env)
            weights = [logits.sigmoid().amax(1, keepdim=True).sqrt() for logits in exact[LOGITS]]
            for number, block in enumerate(behind, 1):
                with turned_on(quantizers, _only(block, owners)):
                    rest = {node: value for node, value in known.items() if node not in behind[block] or node.op == "placeholder"}
                    rounded: Levels = Interpreter(prepared.graph).run(initial_env=rest)
                for energy, entry in zip(energies[block], (LOGITS, BINS), strict=True):
                    for weight, one, other in zip(weights, exact[entry], rounded[entry], strict=True):
                        energy.add(weight * one, weight * other)
                if progress is not None:
                    batch = len(inputs[0])
                    done = (seen + batch * number / len(behind)) * len(behind)
                    progress(int(done), max(total or 0, seen + batch) * len(behind), f"noise, {block}")
            seen += len(inputs[0])
    if not seen:
        raise UserError("there was no picture to measure on", where="sensitivity", remedy="give a set with pictures that can be read")
    for block, (logits, bins) in energies.items():
        if not all(math.isfinite(each.signal + each.noise) for each in (logits, bins)):
            raise UserError(
                "gives values that are not finite where it is quantized", where=block, remedy="calibrate or train the model again"
            )
    return {block: (logits.share + bins.share) / 2 for block, (logits, bins) in energies.items()}


def ap_of(
    prepared: Prepared, dataset: EvaluationSet, block: str | None = ALL, *, batch: int = 4, progress: Progress | None = None
) -> float | None:
    """AP with one block quantized, or `ALL`, or none."""
    assert prepared.vocabulary is not None  # that batches were made with
    device = next(prepared.graph.parameters()).device
    with evaluating(prepared.graph), turned_on(prepared.quantizers(), _only(block, _blocks_of_quantizers(prepared))):
        detector = TorchDetector(prepared.graph, prepared.vocabulary, prepared.size, device=device)
        return evaluate(detector, dataset, batch_size=batch, progress=progress).scores.ap


def _blocks_of_quantizers(prepared: Prepared) -> dict[str, str]:
    return {name: block for name, (_, block) in owners_of_quantizers(prepared, view(prepared.graph, prepared.target)).items()}


def _only(block: str | None, owners: Mapping[str, str]) -> Callable[[str], bool]:
    """Whether a quantizer is on where only this block is quantized, or `ALL`, or none."""
    return lambda name: block in (owners[name], ALL)


def _behind(prepared: Prepared, names: set[str]) -> set[Node]:
    """The nodes whose values some quantizers may change."""
    changed: set[Node] = set()
    for node in prepared.graph.graph.nodes:
        own = f"{node.target}.weight_fake_quant" if hasattr(module_of(prepared.graph, node), "weight_fake_quant") else str(node.target)
        if own in names or changed.intersection(node.all_input_nodes):
            changed.add(node)
    return changed


def _within(progress: Progress | None, number: int, parts: int, at: str) -> Progress | None:
    """The progress of one evaluation of several. The counting of classes, behind its pictures, takes no time to speak of."""
    if progress is None:
        return None
    whole: Progress = progress
    return lambda done, total, what: whole(number * total + done, parts * total, at) if what == "pictures" else None
