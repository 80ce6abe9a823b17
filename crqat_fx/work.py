"""Operators by the work that they do, whether on floats or on codes: so that a file's time can be held against another's, kind by kind.

An 8-bit kernel multiplies up to four bytes in the time of one float: a quarter of full precision's time is as far as products can come, and
what a kind of work takes beyond that quarter is what is missing to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crqat_fx.onnx_profile import OperatorTime

CEILING = 4.0
PRODUCTS, OTHER, ALL = "products", "other", "all"
# of what is no product
WORK: Mapping[str, frozenset[str]] = {
    "activations and gates": frozenset(("QuickGelu", "Sigmoid", "Mul", "QLinearSigmoid", "QLinearMul", "Relu", "Gelu", "Div")),
    "joins and sums": frozenset(("Concat", "QLinearConcat", "Split", "Add", "QLinearAdd", "Sum", "Slice", "Gather")),
    "layout": frozenset(
        ("Transpose", "Reshape", "ReorderInput", "ReorderOutput", "Pad", "Unsqueeze", "Squeeze", "Expand", "Flatten", "Identity")
    ),
    "upsampling": frozenset(("Upsample", "Resize", "Tile")),
    "floats to codes and back": frozenset(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Clip", "Cast")),
    "pools and maxima": frozenset(("MaxPool", "NhwcMaxPool", "AveragePool", "GlobalAveragePool", "QLinearAveragePool", "ReduceMax")),
    "norms and softmax": frozenset(
        ("LayerNormalization", "SkipLayerNormalization", "ReduceL2", "ReduceMean", "Pow", "Sqrt", "Softmax", "QLinearSoftmax")
    ),
}


@dataclass(frozen=True)
class Work:
    """What one kind of work takes in each of some files."""

    name: str
    milliseconds: tuple[float, ...]
    operators: tuple[str, ...]  # of each file, the slowest first

    def times_faster(self, place: int) -> float | None:
        """The first file's time over another's; None where that one has none of it."""
        return self.milliseconds[0] / self.milliseconds[place] if self.milliseconds[place] else None

    def above_ceiling(self, place: int) -> float:
        """Milliseconds of a file beyond a quarter of the first one's."""
        return self.milliseconds[place] - self.milliseconds[0] / CEILING

    def as_json(self) -> dict[str, Any]:
        others = range(1, len(self.milliseconds))
        return {
            "work": self.name,
            "ms": list(self.milliseconds),
            "times_faster": [self.times_faster(place) for place in others],
            "ms_above_a_quarter": [self.above_ceiling(place) for place in others],
            "operators": list(self.operators),
        }


def by_work(files: Sequence[Sequence[OperatorTime]]) -> tuple[Work, ...]:
    """Every kind of work that a file does, what the last one takes longest for first, and all of it together at the end."""
    groups: dict[str, list[list[OperatorTime]]] = {}
    for place, times in enumerate(files):
        for one in times:
            groups.setdefault(work_of(one), [[] for _ in files])[place].append(one)
    found = [_summed(name, group) for name, group in groups.items()]
    return (*sorted(found, key=lambda work: -work.milliseconds[-1]), _summed(ALL, files))


def work_of(one: OperatorTime) -> str:
    return PRODUCTS if one.macs else next((name for name, kinds in WORK.items() if one.kind in kinds), OTHER)


def _summed(name: str, files: Sequence[Sequence[OperatorTime]]) -> Work:
    slowest = (sorted(times, key=lambda one: -one.milliseconds) for times in files)
    return Work(
        name,
        tuple(sum(one.milliseconds for one in times) for times in files),
        tuple(", ".join(f"{one.nodes} {one.kind} {one.milliseconds:.2f}" for one in times) for times in slowest) if name != ALL else (),
    )
