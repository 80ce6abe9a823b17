"""Gives quantizers their first scales: the model runs in float over some pictures while observers watch, then every range is searched.

Weights are seen once, folded as evaluation folds them; activations as a stream, in memory that does not grow with the pictures.

Every quantizer is set by the observer that is asked for, with two exceptions that keep the whole range: a weight by entropy, and what the
model returns by any. A logit is read for its rare high values, which decide what is found and in which order, and an observer that clips
would make them equal: they are too few for a squared error or a share of all values to tell.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import torch

from crqat_fx.errors import UserError
from crqat_fx.pictures import letterbox
from crqat_fx.progress import Progress
from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.observers import make_observer
from crqat_fx.quantize.prepared import Calibration, Prepared
from crqat_fx.trace import Example
from passes.fx.placement import quantizes, readers

logger = logging.getLogger(__name__)


PICTURES = 256


def calibrate(
    prepared: Prepared,
    batches: Iterable[Example],
    observer: str = "omse",
    count: int = PICTURES,
    *,
    stages: Collection[str] | None = None,
    progress: Progress | None = None,
) -> int:
    """Runs `count` samples of the batches of inputs through the graph, and returns how many there were. With `stages` only their quantizers
    are set, by what those of the others, as the phase has them, let through. Phase and mode stay as they were."""
    _check_count(count)
    everything = prepared.quantizers()
    prepared.refuse_unknown(stages or (), "calibration")
    chosen = {name: each for name, each in prepared.quantizers(stages).items() if each.learns}
    if stages is not None and not chosen:
        raise UserError(f"no quantizer is in {', '.join(stages)}", where="calibration", remedy="name stages of the model")
    returned = _returned(prepared)
    names = {name: _observer(observer, weight=each.weight, returned=name in returned) for name, each in chosen.items()}
    before = {name: each.enabled for name, each in everything.items()}
    training = prepared.graph.training
    try:
        for each in everything.values() if stages is None else chosen.values():
            each.enabled = False
        for name, each in chosen.items():
            each.observer = make_observer(names[name], each.spec, weight=each.weight)
            each.observing = True
        prepared.graph.eval()
        with torch.no_grad():
            for inputs, seen in first_samples(batches, count):
                prepared.graph(*inputs)
                for each in chosen.values():
                    if each.weight:
                        each.observing = False  # a weight is the same for every batch
                if progress is not None:
                    progress(seen, count, "calibrating")
        for module in prepared.graph.modules():
            if isinstance(module, ConvBn2d) and module.weight_fake_quant in chosen.values():
                module.uncorrect()  # it was of other ranges
        for name, each in chosen.items():
            _set(name, each.initialise)
            scale, zero = (value.cpu().clone() for value in each.calculate_qparams())
            prepared.calibrations[name] = Calibration(names[name], seen, scale, zero)
    finally:
        for each in chosen.values():
            each.observing = False
        for name, each in everything.items():
            each.enabled = before[name]
        prepared.graph.train(training)
    logger.info("calibrated %d quantizers on %d pictures by %s", len(chosen), seen, observer)
    return seen


def first_samples(batches: Iterable[Example], count: int) -> Iterator[tuple[Example, int]]:
    """The batches of the first `count` samples, the last one cut, and how many samples there have been by then: one at least."""
    _check_count(count)
    seen = 0
    for inputs in batches:
        taken = tuple(tensor[: count - seen] if len(tensor) == len(inputs[0]) else tensor for tensor in inputs)
        seen += len(taken[0])
        yield taken, seen
        if seen >= count:
            return
    if not seen:
        raise UserError("there was no picture to calibrate on", where="calibration", remedy="give some pictures")


def _check_count(count: int) -> None:
    if count < 1:
        raise UserError(f"calibration on {count} pictures", where="--pictures", remedy="give a number from 1")


def picture_batches(prepared: Prepared, pictures: Iterable[np.ndarray], size: int = 16) -> Iterator[Example]:
    """Inputs of a YOLO-World from pictures (uint8 RGB [H, W, 3]) of any size: letterboxed, with the prepared model's own vocabulary."""
    if prepared.vocabulary is None:
        raise UserError("has no vocabulary to calibrate with", where="the prepared model", remedy="prepare it with one: --vocabulary")
    device = next(prepared.graph.parameters()).device
    text = torch.from_numpy(prepared.vocabulary.embeddings).to(device)
    waiting: list[np.ndarray] = []
    for picture in pictures:
        waiting.append(letterbox(picture, prepared.size)[0])
        if len(waiting) == size:
            yield _inputs(waiting, text)
            waiting = []
    if waiting:
        yield _inputs(waiting, text)


def _inputs(pictures: list[np.ndarray], text: torch.Tensor) -> Example:
    images = torch.from_numpy(np.stack(pictures)).to(text.device).permute(0, 3, 1, 2).contiguous().float().div_(255)
    return images, text.expand(len(pictures), -1, -1)


def _returned(prepared: Prepared) -> set[str]:
    """The quantizers whose codes nobody reads but the graph's output."""
    graph = prepared.graph
    returned, read = set[str](), set[str]()
    for node in graph.graph.nodes:
        if quantizes(graph, node):
            alone = all(reader.op == "output" for reader, _, _ in readers(graph, prepared.target, node))
            (returned if alone else read).add(str(node.target))
    return returned - read  # one that is shared may be both


def _observer(asked: str, *, weight: bool, returned: bool) -> str:
    """Entropy compares how often values are met: a channel's few weights are no such sample, and keep their whole range."""
    return "minmax" if returned or (weight and asked == "entropy") else asked


def _set(name: str, initialise: Callable[[], None]) -> None:
    try:
        initialise()
    except UserError as error:
        raise UserError(error.what, where=name, remedy=error.remedy) from error
