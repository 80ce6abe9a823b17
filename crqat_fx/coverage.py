"""How much of a file onnxruntime computes in integers: counted on its optimized graph, whatever the file looks like.

Covered is a product (convolution, matrix product) that an integer kernel computes. Wanted is one that the recipe in the file's metadata
quantizes; an operator is told by its name, which is the path of the module it came from. A stray Transpose has a product before and behind
it: others move the layout of the graph's inputs or outputs.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crqat_fx.errors import UserError
from crqat_fx.metadata import PREFIX
from crqat_fx.onnx_profile import Executed, Profile, profile
from crqat_fx.onnx_run import Extent
from crqat_fx.recipe import QuantRecipe

RECIPE = f"{PREFIX}recipe"
FLOATS = frozenset(("float", "float16", "double", "bfloat16"))
BRIDGES = frozenset(("QuantizeLinear", "DequantizeLinear"))  # between codes and floats: counted, not computed with
# what onnxruntime computes on codes: by kernels of its own, or by moving them
ON_CODES = frozenset(
    (
        *("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"),
        *("Add", "Mul", "Sigmoid", "LeakyRelu", "Softmax", "Concat", "AveragePool", "GlobalAveragePool", "Where"),
        *("MaxPool", "Transpose", "Reshape", "Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Pad"),
        *("ReduceMax", "ReduceMin", "Max", "Min", "Clip", "Relu", "Identity", "Resize"),
    )
)


@dataclass(frozen=True)
class FloatOperator:
    """An operator that computes on floats, and why."""

    name: str
    kind: str
    macs: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Counted on the graph that onnxruntime runs. Without a recipe in the file nothing is wanted."""

    macs: int
    integer_macs: int
    wanted_macs: int
    wanted_integer_macs: int
    counts: Mapping[str, int]
    floats: tuple[FloatOperator, ...]
    stray_transposes: tuple[str, ...]

    @property
    def share(self) -> float:
        """Of all multiply-accumulates, those in integer kernels."""
        return self.integer_macs / self.macs if self.macs else 0.0

    @property
    def wanted_share(self) -> float | None:
        """Of the multiply-accumulates that the recipe quantizes, those in integer kernels."""
        return self.wanted_integer_macs / self.wanted_macs if self.wanted_macs else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "counts": dict(self.counts), "share": self.share, "wanted_share": self.wanted_share}


def coverage(model: str | Path, size: int = 640, batch: int = 1, texts: int = 80) -> Coverage:
    """Runs the file once. Axes that it leaves open become `size`, `batch` and `texts`."""
    path = Path(model)
    return covered(profile(path, Extent(size, batch, texts)), path)


def covered(profiled: Profile, where: object = None) -> Coverage:
    """The coverage of a file that was run already."""
    recipe = _recipe(profiled.metadata, where)
    links = _Links(profiled.nodes)
    products = [node for node in profiled.nodes if node.macs]
    wanted = [node for node in products if recipe is not None and _quantizes(recipe, node)]
    return Coverage(
        macs=_macs(products),
        integer_macs=_macs(node for node in products if node.integer),
        wanted_macs=_macs(wanted),
        wanted_integer_macs=_macs(node for node in wanted if node.integer),
        counts=dict(sorted(Counter(node.kind for node in profiled.nodes).items())),
        floats=tuple(
            FloatOperator(node.path, node.kind, node.macs, _reason(node, recipe, links)) for node in profiled.nodes if _is_float(node)
        ),
        stray_transposes=tuple(
            node.name for node in profiled.nodes if node.kind == "Transpose" and node.name in links.behind and node.name in links.before
        ),
    )


def format_coverage(report: Coverage) -> str:
    """The shares, the counts, and what is left in floats, by reason."""
    lines = [f"MACs in integer kernels   {report.integer_macs / 1e9:.2f} of {report.macs / 1e9:.2f} G, {report.share:.1%}"]
    if report.wanted_share is not None:
        wanted = f"{report.wanted_integer_macs / 1e9:.2f} of {report.wanted_macs / 1e9:.2f} G"
        lines.append(f"that the recipe wants     {wanted}, {report.wanted_share:.1%}")
    lines.append(f"stray Transposes          {len(report.stray_transposes)}")
    lines.append(f"operators                 {', '.join(f'{count} {kind}' for kind, count in report.counts.items())}")
    reasons: dict[str, Counter[str]] = {}
    for one in report.floats:
        reasons.setdefault(one.reason, Counter())[one.kind] += 1
    for reason, kinds in reasons.items():
        lines.append(f"left in floats            {', '.join(f'{count} {kind}' for kind, count in kinds.items())}: {reason}")
    if not reasons:
        lines.append("left in floats            none")
    return "\n".join(lines)


class _Links:
    """Which nodes have a product before them (`behind`) and which one after them (`before`), and who makes and reads what."""

    def __init__(self, nodes: tuple[Executed, ...]) -> None:
        self.makers = {value: node for node in nodes for value in node.outputs}
        self.readers: dict[str, list[Executed]] = {}
        for node in nodes:
            for value in node.inputs:
                self.readers.setdefault(value, []).append(node)
        self.behind: set[str] = set()
        self.before: set[str] = set()
        for node in nodes:  # in an order in which makers come first
            if any(maker.macs or maker.name in self.behind for maker in self.sources(node)):
                self.behind.add(node.name)
        for node in reversed(nodes):
            if any(reader.macs or reader.name in self.before for reader in self.targets(node)):
                self.before.add(node.name)

    def sources(self, node: Executed) -> list[Executed]:
        return [self.makers[value] for value in node.inputs if value in self.makers]

    def targets(self, node: Executed) -> list[Executed]:
        return [reader for value in node.outputs for reader in self.readers.get(value, ())]


def _is_float(node: Executed) -> bool:
    return bool(FLOATS.intersection(node.types)) and not node.integer and node.kind not in BRIDGES


def _reason(node: Executed, recipe: QuantRecipe | None, links: _Links) -> str:
    if recipe is not None and not _quantizes(recipe, node):
        return "the recipe leaves it float"
    if node.macs:
        return "the file carries no recipe" if recipe is None else "the recipe quantizes it, but no integer kernel took it"
    if node.name not in links.before:
        return "behind the last product, towards the outputs"
    if node.name not in links.behind:
        return "before the first product, from the inputs"
    if node.kind not in ON_CODES:
        return "onnxruntime has no integer kernel for it"
    alone = all(each.kind in BRIDGES for each in (*links.sources(node), *links.targets(node)))
    return "stands between codes, but was not fused" if alone else "reads or feeds an operator on floats"


def _quantizes(recipe: QuantRecipe, node: Executed) -> bool:
    return recipe.rule_for(node.path).activation is not None


def _macs(nodes: Iterable[Executed]) -> int:
    return sum(node.macs for node in nodes)


def _recipe(metadata: Mapping[str, str], where: object) -> QuantRecipe | None:
    if RECIPE not in metadata:
        return None
    try:
        plain = json.loads(metadata[RECIPE])
    except ValueError as error:
        raise UserError(f"its metadata {RECIPE} is no JSON", where=where, remedy="export it again") from error
    return QuantRecipe.from_plain(plain, where)
