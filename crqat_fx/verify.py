"""Whether an exported file computes what training saw: a ladder, each rung of which rests on the one below.

    1  stored       every code, scale and zero point in the file is the prepared model's
    2  lowered      the prepared model in evaluation and the lowered torch graph give the same codes
    3  plain        onnxruntime without optimizations, cut at every quantizer and each piece fed the codes that the lowered graph gave
                    before it: at most 1e-4 of a tensor's codes off (of a small tensor four), each by one step and where the value lay
                    between two codes; and what the file puts out, in floating point, is what the lowered graph does
    4  optimised    the same with optimizations: at most 1e-3 off, by one step
    5  accuracy     AP of both within .2, where a set is given

Of equal values between two codes one counts: a function of a code, such as a sigmoid, rounds another way wherever that code stands.

A file that leaves axes open is run at others too, and one with NMS judged by its detections (`crqat_fx.trials`).

What is off in one piece cannot add up in the next: the first tensor that departs is the one at fault. The whole file, from the picture on,
is run as well, and its steps are reported and not judged: one tie cascades through all that follows.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from crqat_fx.errors import UserError
from crqat_fx.lower import Lowered, lower
from crqat_fx.metadata import FULL, IMAGES, Metadata
from crqat_fx.onnx_cuts import LARGEST, SHIFTED, Codes, cut
from crqat_fx.onnx_detector import read_onnx
from crqat_fx.processor import sums_products_whole
from crqat_fx.progress import Progress
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.recording import Record, expected_in_file, record_lowered, record_prepared, remade_products
from crqat_fx.trials import DetectorTrials, Selected, Trial
from crqat_fx.vocabulary import Vocabulary

Array = npt.NDArray[np.generic]

TIE = 0.01  # of a step: how near to the middle between two codes a value lies that two correct sums may round to either
FEW = 4
PLAIN_SHARE, OPTIMISED_SHARE = 1e-4, 1e-3
AP_APART = 0.2
PUT_OUT = 1e-3  # of the largest value of an output in floating point
SELECTED = 1e-3  # a detection's pixels, score and label
SATURATES = "this processor has no VNNI, and the file is for one that has: sums may saturate here; prepare without --cpu vnni for any"
PICTURE_CODES = (f"quant.{IMAGES}.output.codes",)  # a picture in bytes is its codes


@dataclass(frozen=True)
class Difference:
    """How one tensor's codes compare. `steps[n]` counts those n steps off, the last all that are more; of those that are off by a step,
    `astray` those whose value lay nowhere near the middle between two codes, `repeated` those whose value did and was met before."""

    name: str
    steps: tuple[int, ...] = (0, 0, 0, 0)
    astray: int = 0
    repeated: int = 0

    @property
    def codes(self) -> int:
        return sum(self.steps)

    def within(self, share: float) -> bool:
        """One step at the most, for no more than this share of the codes, or for a few where the tensor is small."""
        few = 0 if share == 0 else FEW
        return sum(self.steps[2:]) == 0 and self.astray == 0 and self.steps[1] - self.repeated <= max(few, share * self.codes)


@dataclass(frozen=True)
class Rung:
    """What one rung found. `departs` is the first tensor that does, in the order of the data."""

    number: int | None  # None: beside the ladder
    name: str
    tensors: int
    steps: tuple[int, ...]
    passed: bool | None  # None: reported, not judged
    departs: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """The ladder; and what of the prepared model has no counterpart in the file, with the reason."""

    rungs: tuple[Rung, ...]
    collapsed: Mapping[str, str]

    @property
    def passed(self) -> bool:
        return all(rung.passed is not False for rung in self.rungs)

    @property
    def departs(self) -> str | None:
        return next((f"{rung.name}: {rung.departs}" for rung in self.rungs if rung.passed is False), None)

    def as_dict(self) -> dict[str, Any]:
        rungs = [dataclasses.asdict(rung) for rung in self.rungs]
        return {"passed": self.passed, "departs": self.departs, "rungs": rungs, "collapsed": dict(self.collapsed)}


def verify_file(
    prepared: Prepared,
    path: str | Path,
    pictures: Iterable[npt.NDArray[np.uint8]],
    *,
    vocabulary: Vocabulary | None = None,
    count: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Rungs 1 to 4 of a file that `export` wrote, on pictures (RGB [H, W, 3], of any size). `vocabulary` is the one that was given to
    `export`, where it is not the prepared model's own."""
    metadata = read_onnx(path).metadata
    texts = prepared.vocabulary if vocabulary is None else vocabulary
    _check_pair(prepared, metadata, texts, path)
    assert texts is not None  # what was checked
    lowered = lower(prepared, texts if metadata.text == "constant" else None)
    runs = DetectorTrials(onnx.load(path), metadata, texts)
    found = verify(
        prepared,
        lowered,
        runs.model,
        runs.trials(pictures),
        runs.feeds,
        runs.expected,
        runs.selected,
        given=PICTURE_CODES if metadata.input == "uint8" else (),
        count=runs.runs(count),
        threads=threads,
        progress=progress,
    )
    return explained(found, metadata.cpu)


def explained(found: Verification, cpu: str | None) -> Verification:
    """With the reason why optimised kernels depart, where a file for processors with VNNI was run on another."""
    if cpu != FULL or sums_products_whole():
        return found
    *before, fourth, whole = found.rungs
    told = fourth if fourth.passed else dataclasses.replace(fourth, detail=f"{fourth.detail}; {SATURATES}")
    return dataclasses.replace(found, rungs=(*before, told, whole))


def accuracy(prepared: float | None, file: float | None) -> Rung:
    """Rung 5: the AP of both, in percent."""
    if prepared is None or file is None:
        raise UserError("the set has no object to find: there is no AP to compare", where="--data", remedy="give a set with objects")
    apart = abs(prepared - file)
    told = f"AP {prepared:.2f} of the prepared model, {file:.2f} of the file"
    return Rung(5, "accuracy", 0, (0, 0, 0, 0), apart <= AP_APART, None if apart <= AP_APART else "AP", told)


def _check_pair(prepared: Prepared, metadata: Metadata, texts: Vocabulary | None, path: str | Path) -> None:
    """Whether a file can be of this prepared model at all."""
    again = "export the prepared model again"
    if metadata.recipe is None:
        raise UserError(
            "is a file in floats: there are no codes to verify", where=path, remedy="give one that was exported from a prepared model"
        )
    for what, here, there in (
        ("recipe", prepared.recipe.as_plain(), metadata.recipe),
        ("target", prepared.target.name, metadata.target),
        ("processor", prepared.cpu, metadata.cpu),
    ):
        if json.loads(json.dumps(here)) != there:
            raise UserError(f"is of another {what} than the prepared model", where=path, remedy=again)
    if texts is None:
        raise UserError("the prepared model has no vocabulary", where=path, remedy="give the one that was exported with --vocabulary")
    texts.check_width(metadata.text_width, path)
    if metadata.text == "constant" and texts.names != metadata.names:
        raise UserError("is of another vocabulary than the prepared model's", where=path, remedy="give it with --vocabulary")


def verify(
    prepared: Prepared,
    lowered: Lowered,
    model: onnx.ModelProto,
    trials: Iterable[Trial],
    feeds: Callable[[tuple[Tensor, ...]], Mapping[str, Array]],
    expected: Callable[[Any], Mapping[str, Array]],
    selected: Callable[[tuple[Tensor, ...], Mapping[str, Array]], Iterable[Selected]] = lambda inputs, outputs: (),
    *,
    given: Collection[str] = (),
    count: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Rungs 1 to 4 and the whole run, on inputs of the prepared model. `feeds` makes the file's inputs of them; `expected` the file's
    outputs of what the lowered graph puts out; `selected` are the detections that follow from other outputs. `given`: codes that are an
    input of the file. `count`: of trials, for the progress."""
    tell = progress or (lambda done, total, text: None)
    first, remade = stored(prepared, lowered, model), remade_products(prepared, lowered)
    second, third, fourth, whole = _Tally(0.0), _Tally(PLAIN_SHARE), _Tally(OPTIMISED_SHARE), _Tally(1.0)
    with torch.no_grad():
        for number, trial in enumerate(trials):
            inputs, at = trial.inputs, "" if trial.axes is None else f" at {trial.axes}"
            tell(number, count, "lowered graph")
            recorded, outputs = record_lowered(lowered, inputs)
            wanted = expected(outputs)
            second.add(_paired(record_prepared(prepared, inputs), recorded, remade), at)
            codes = {name: record.codes for name, record in recorded.items() if record.levels is not None}
            highest = {name: recorded[name].highest for name in codes}
            tell(number, count, "onnxruntime, from the picture on")
            unfed = cut(model, codes, highest, None).run(feeds(inputs), codes, optimised=True, threads=threads)
            whole.add((_compared(name, codes[name], found, None) for name, found in unfed.codes.items()), at)
            cuts = cut(model, codes, highest, unfed.shapes)
            for tally, optimised in ((third, False), (fourth, True)):
                tell(number, count, "onnxruntime, optimised" if optimised else "onnxruntime, plain")
                pieces = cuts.run(feeds(inputs), codes, optimised=optimised, threads=threads)
                tally.missing |= {name + at for name in codes.keys() - pieces.codes.keys() - set(given)}
                compared = (
                    _compared(name, codes[name], found, recorded[name].levels, ties_alone=not optimised)
                    for name, found in pieces.codes.items()
                )
                tally.add(compared, at)
                tally.add((_put_out(name, want, pieces.outputs[name]) for name, want in wanted.items()), at)
                tally.add_selected(selected(inputs, pieces.outputs), at)
            tell(number + 1, count, "compared")
    rungs = (
        first,
        second.rung(2, "lowered torch graph"),
        third.rung(3, "onnxruntime, plain"),
        fourth.rung(4, "onnxruntime, optimised"),
        dataclasses.replace(whole.rung(None, "from the picture on"), passed=None, departs=None, detail="reported, not judged"),
    )
    return Verification(rungs, lowered.collapsed)


class _Tally:
    """Differences by tensor, summed over batches."""

    def __init__(self, share: float) -> None:
        self.share, self.found, self.missing = share, dict[str, Difference](), set[str]()
        self.pictures = self.at_limit = self.detections = 0  # of a file with NMS

    def add(self, differences: Iterable[Difference], at: str = "") -> None:
        """`at` is where, if not at the file's usual axes."""
        for each in differences:
            name = each.name + at
            before = self.found.get(name, Difference(name))
            steps = tuple(a + b for a, b in zip(before.steps, each.steps, strict=True))
            self.found[name] = Difference(name, steps, before.astray + each.astray, before.repeated + each.repeated)

    def add_selected(self, pictures: Iterable[Selected], at: str) -> None:
        for each in pictures:
            self.pictures += 1
            if each.at_limit:
                self.at_limit += 1
                continue
            self.detections += each.wanted_count
            counts = _put_out("counts", np.array(each.wanted_count), np.array(each.count), SELECTED)
            self.add([_put_out("detections", each.wanted, each.found, SELECTED), counts], at)

    @property
    def told(self) -> str:
        """What of the detections was judged."""
        left = f", {self.at_limit} left out: an overlap lies at the limit" if self.at_limit else ""
        return f"{self.detections} detections on {self.pictures} pictures{left}" if self.pictures else ""

    def rung(self, number: int | None, name: str) -> Rung:
        steps = tuple(sum(column) for column in zip(*(each.steps for each in self.found.values()), strict=True)) or (0, 0, 0, 0)
        departs = next((each for each in self.found.values() if not each.within(self.share)), None)
        if departs is not None:
            one, two, more = departs.steps[1:]
            detail = f"of {departs.codes} values {one} are off by one step, {two} by two, {more} by more"
            detail += f"; {departs.astray} of them lay nowhere near a tie" if departs.astray else ""
            return Rung(number, name, len(self.found), steps, False, departs.name, detail)
        if self.missing or not self.found:
            first = min(self.missing, default="everything")
            return Rung(number, name, len(self.found), steps, False, first, f"{len(self.missing)} tensors are not to be found in the file")
        return Rung(number, name, len(self.found), steps, True, detail=self.told)


def _compared(name: str, want: Codes, found: Array, levels: npt.NDArray[np.float32] | None, *, ties_alone: bool = False) -> Difference:
    """`levels` are the values in steps; with `ties_alone` a code that is off must be at a tie."""
    if want.shape != found.shape:
        return Difference(name, (0, 0, 0, want.size))
    apart = np.abs(want.astype(np.int32) - found.astype(np.int32))
    counts = np.bincount(np.minimum(apart, 3).ravel(), minlength=4)
    astray, repeated = 0, 0
    if levels is not None and counts[1]:
        off = levels[apart == 1]
        tied = np.abs(np.abs(off - np.trunc(off)) - 0.5) <= TIE
        astray = int((~tied).sum()) if ties_alone else 0
        repeated = int(tied.sum()) - len(np.unique(off[tied]))
    return Difference(name, tuple(int(each) for each in counts), astray, repeated)


def _put_out(name: str, want: Array, found: Array, within: float | None = None) -> Difference:
    """An output in floating point; `within` so much, or else a share of the largest."""
    if want.shape != found.shape:
        return Difference(name, (0, 0, 0, want.size))
    wanted = want.astype(np.float64)
    limit = PUT_OUT * np.abs(wanted).max(initial=0) if within is None else within
    off = int((~(np.abs(wanted - found.astype(np.float64)) <= limit)).sum())
    return Difference(name, (want.size - off, 0, 0, off))


# --- rung 1: what is stored ---


def stored(prepared: Prepared, lowered: Lowered, model: onnx.ModelProto) -> Rung:
    """Weights and constant text, scales and zero points, as the prepared model's own quantizers have them; what lowering makes anew
    (biases, collapsed products) as the lowered graph has it."""
    values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    tally = _Tally(0.0)
    for name, want in expected_in_file(prepared, lowered):
        found = values.get(name)
        if found is None and name + SHIFTED in values:
            owner = prepared.quantizers()[name.removesuffix(".zero_point")]
            found = values[name + SHIFTED].astype(np.int32) - (LARGEST - owner.spec.highest)
        if found is None and name.endswith(".zero_point") and not want.any():
            found = want  # what is read without a zero point has one of 0
        if found is None or want.dtype.kind == "f":
            same = found is not None and np.array_equal(want, found)
            tally.add([Difference(name, (want.size, 0, 0, 0) if same else (0, 0, 0, want.size))])
        else:
            tally.add([_compared(name, want, _without_padding(found, want.shape), None)])
    return tally.rung(1, "stored codes")


def _without_padding(found: Array, shape: tuple[int, ...]) -> Array:
    """A convolution's codes without the input channels of zeros that an export adds for speed."""
    if found.ndim == len(shape) == 4 and found.shape[1] > shape[1] and not found[:, shape[1] :].any():
        return found[:, : shape[1]]
    return found


def _paired(prepared: Mapping[str, Codes], lowered: Mapping[str, Record], remade: Collection[str]) -> Iterator[Difference]:
    for name, record in lowered.items():
        if record.quantizer is None or record.quantizer not in prepared or record.quantizer in remade:
            continue
        want = prepared[record.quantizer]
        constant = record.levels is None  # one for the whole batch
        yield _compared(name, want[:1] if constant else want, record.codes, None)
