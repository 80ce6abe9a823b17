"""An ONNX file cut at its quantizers: each piece can be fed the codes that another run recorded, and a difference stays where it arose.

    before:   piece 1 -> codes -> piece 2            after:   piece 1 -> codes (an output);   codes.fed (an input) -> piece 2

A value is cut where it bears a recorded name: `NAME.codes`; or `NAME.codes.nhwc`, the same codes as a map with all its channels last; or
`NAME.codes.shifted`, where the highest code is 255, so that the type's own end is what clips.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper

from crqat_fx.errors import UserError
from crqat_fx.onnx_session import EXPORT, FAILURES, reason_of

Codes = npt.NDArray[np.integer[Any]]
Shape = tuple[int, ...]
CHANNELS_LAST, SHIFTED = ".nhwc", ".shifted"
LARGEST = 255
FED = ".fed"


@dataclass(frozen=True)
class Place:
    """Where a recorded tensor is in the file, and how its codes are written there."""

    value: str
    shift: int = 0

    def laid_out(self, codes: Codes, shape: Shape) -> Codes:
        """Recorded codes as the file has them, in the shape that it has."""
        if self.value.endswith(CHANNELS_LAST):
            codes = np.moveaxis(codes.reshape(len(codes), shape[-1], -1), 1, -1).reshape(shape)
        return codes if self.shift == 0 else (codes.astype(np.int16) + self.shift).astype(codes.dtype)

    def as_recorded(self, codes: Codes, shape: Shape) -> Codes:
        """The file's codes in the shape that was recorded; below 0 where the file has a code that there is not."""
        if self.value.endswith(CHANNELS_LAST):
            codes = np.moveaxis(codes.reshape(len(codes), -1, codes.shape[-1]), -1, 1).reshape(shape)
        return codes if self.shift == 0 else codes.astype(np.int16) - self.shift


@dataclass(frozen=True)
class Found:
    """What a run gave by recorded name: the codes in the shape that was recorded, and the shape that the file has them in. And the file's
    own outputs."""

    codes: Mapping[str, Codes]
    shapes: Mapping[str, Shape]
    outputs: Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Pieces:
    """A file in pieces, all of which one run computes, and where in it the recorded names are."""

    model: onnx.ModelProto
    values: Mapping[str, Place]  # by recorded name
    shapes: Mapping[str, Shape]  # that they have in the file; empty where none is fed
    outputs: tuple[str, ...]  # of the file itself

    @property
    def asked(self) -> tuple[str, ...]:
        """What a run puts out: the codes, and the file's outputs."""
        return (*(place.value for place in self.values.values()), *self.outputs)

    def feeds(self, recorded: Mapping[str, Codes], taken: Collection[str]) -> dict[str, Codes]:
        """The recorded codes by the names of `taken` inputs: a piece that leads to no output is dropped, and its input with it."""
        return {
            place.value + FED: place.laid_out(recorded[name], self.shapes[name])
            for name, place in self.values.items()
            if place.value + FED in taken
        }

    def found(self, given: Mapping[str, npt.NDArray[Any]], recorded: Mapping[str, Codes]) -> Found:
        """What a run gave."""
        return Found(
            {name: place.as_recorded(given[place.value], recorded[name].shape) for name, place in self.values.items()},
            {name: given[place.value].shape for name, place in self.values.items()},
            {name: given[name] for name in self.outputs},
        )

    def run(
        self,
        inputs: Mapping[str, npt.NDArray[np.generic]],
        recorded: Mapping[str, Codes],
        *,
        optimised: bool,
        threads: int | None = None,
    ) -> Found:
        """By onnxruntime."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of every input that no piece reads
        if threads is not None:
            options.intra_op_num_threads = threads
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
        try:
            session = onnxruntime.InferenceSession(self.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except FAILURES as error:
            raise UserError(f"cannot be cut into pieces ({reason_of(error)})", where="the file", remedy=EXPORT) from error
        fed = self.feeds(recorded, {each.name for each in session.get_inputs()})
        try:
            given = session.run(self.asked, {**inputs, **fed})
        except FAILURES as error:
            raise UserError(f"cannot be run in pieces ({reason_of(error)})", where="the file", remedy=EXPORT) from error
        return self.found(dict(zip(self.asked, given, strict=True)), recorded)


def cut(model: onnx.ModelProto, recorded: Mapping[str, Codes], highest: Mapping[str, int], shapes: Mapping[str, Shape] | None) -> Pieces:
    """The file cut at every recorded name that it bears; `highest` is the highest code of each. Without `shapes` (the file's, which a
    first run tells) nothing is fed: the codes are put out, and go on as they are."""
    pieces = onnx.ModelProto()
    pieces.CopyFrom(model)
    graph = pieces.graph
    made = {output for node in graph.node for output in node.output}
    outputs = tuple(each.name for each in graph.output)
    values = {}
    for name in recorded:
        places = (Place(name), Place(name + CHANNELS_LAST), Place(name + SHIFTED, LARGEST - highest[name]))
        found = next((place for place in places if place.value in made), None)
        if found is not None:
            values[name] = found
    if not values:
        raise UserError("has none of the prepared model's tensors by name", where="the file", remedy=EXPORT)
    cuts = {place.value for place in values.values()}
    if shapes is not None:
        for node in graph.node:
            for index, value in enumerate(node.input):
                if value in cuts:
                    node.input[index] = value + FED
    for name, place in values.items():
        kind = helper.np_dtype_to_tensor_dtype(recorded[name].dtype)
        if place.value not in outputs:
            graph.output.append(helper.make_tensor_value_info(place.value, kind, None))
        if shapes is not None:
            graph.input.append(helper.make_tensor_value_info(place.value + FED, kind, shapes[name]))
    return Pieces(pieces, values, shapes or {}, outputs)
