"""What a prepared model is: its recipe, target and phase, stages and blocks, and of every quantizer the range, what set it, what moves it,
and how much it takes away (`crqat_fx.noise` has the two kinds of SQNR).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.text import Text
from torch import Tensor
from torch.fx import Node

from crqat_fx.correct_norms import correctable
from crqat_fx.graph_view import GraphView, view
from crqat_fx.models.yolo_world import size_of
from crqat_fx.noise import EXACT, Noise
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.prepared import Prepared
from passes.fx.graph import STAGE, node_paths

NAMES_SHOWN = 8
DRAWN = 4  # pictures that noise is measured on where none are named
BLOCKS = 2  # the `depth` of a report that shows blocks; 1 is stages alone, more is every quantizer
LEARNED = {"log_scale": "scale", "zero_point": "zero"}
SAME = 1e-4  # a scale within so much of the calibrated one was not trained: its logarithm is what is stored
COLUMNS = ("bits", "end to end", "local", "clipped", "range", "scale", "zero", "scales", "set by", "learns")  # of a quantizer's row
UNMEASURED = "No SQNR: nothing was measured."
EXPLAINED = "End to end: against the float model, all noise on the way. Local: what one quantizer adds to what comes to it."


@dataclass(frozen=True)
class QuantizerFacts:
    """One quantizer. Pairs are the lowest and the highest over its channels; what depends on a range is None before there is one."""

    name: str
    of: Literal["weight", "activation"]
    tensor: str  # the path of what is rounded; of a weight, of its layer
    block: str
    stage: str
    bits: int
    symmetric: bool
    odd: bool
    channel_axis: int | None
    scales: int
    scale: tuple[float, float] | None
    zero_point: tuple[int, int] | None
    range: tuple[float, float] | None  # the lowest and the highest value that a code stands for
    on: bool
    learns: tuple[str, ...]  # what training may move; nothing where the scale is given
    trained: bool  # whether it does, in the phase that the model is in
    observer: str | None  # what the range was set by, where it was
    pictures: int | None
    moved: float | None  # the scale over the calibrated one, the geometric mean over channels
    local: float | None  # dB
    end_to_end: float | None  # dB, of what leaves it; of a weight, of what leaves its layer
    clipped: float | None  # the share of values that lie outside of its range


@dataclass(frozen=True)
class BlockFacts:
    block: str
    stage: str
    weight_bits: tuple[int, ...]  # 32 is float
    activation_bits: tuple[int, ...]
    quantizers: int
    worst: str | None  # the quantizer that takes away most by itself
    local: float | None  # its SQNR
    end_to_end: float | None  # the lowest of what leaves the block


@dataclass(frozen=True)
class PreparedReport:
    """All that `inspect` says of a prepared model."""

    path: str
    facts: Mapping[str, Any]
    stages: tuple[Mapping[str, Any], ...]
    blocks: tuple[BlockFacts, ...]
    quantizers: tuple[QuantizerFacts, ...]
    tensors: Mapping[str, float]
    measured_on: str  # pictures; empty where nothing was measured

    def as_json(self) -> dict[str, Any]:
        return {"path": self.path, "kind": "prepared", **self.facts, **{
            name: [dict(each) if isinstance(each, Mapping) else dataclasses.asdict(each) for each in getattr(self, name)]
            for name in ("stages", "blocks", "quantizers")
        }, "tensors": dict(self.tensors), "measured_on": self.measured_on or None}  # fmt: skip


def inspect_prepared(prepared: Prepared, path: str | Path, noise: Noise | None = None, pictures: str = "") -> PreparedReport:
    """`noise` was measured on `pictures`; without it a report has no SQNR."""
    seen = view(prepared.graph, prepared.target)
    quantizers = tuple(_quantizers(prepared, seen, noise))
    return PreparedReport(
        path=str(path),
        facts=_facts(prepared),
        stages=tuple(
            {
                "stage": stage.name,
                "nodes": len(stage.nodes),
                "quantizers": len(prepared.quantizers([stage.name])),
                "quantized": stage.name in prepared.phase.quantized,
                "trained": stage.name in prepared.phase.trained,
            }
            for stage in prepared.stages
        ),
        blocks=tuple(_blocks(seen, quantizers, noise)),
        quantizers=quantizers,
        tensors={} if noise is None else noise.tensors,
        measured_on=pictures if noise is not None else "",
    )


def owners_of_quantizers(prepared: Prepared, seen: GraphView) -> dict[str, tuple[Node, str]]:
    """Of every quantizer the node (as seen) whose tensor it rounds, and the block that it belongs to. A weight's belongs to its layer. An
    activation's belongs to what produces the tensor where the target quantizes outputs, else to its earliest reader, as stages have it."""
    owners: dict[str, tuple[Node, str]] = {}
    first_reader: dict[str, Node] = {}
    for read in seen.reads:
        if read.quantizer is not None:
            first_reader[read.quantizer] = min(first_reader.get(read.quantizer, read.reader), read.reader)
    for node in prepared.graph.graph.nodes:
        name, source = str(node.target), seen.seen[node]
        if node.op == "call_module" and name in seen.quantizers and name not in owners:
            by_reader = not prepared.target.outputs or source.op in ("placeholder", "get_attr")
            owners[name] = source, seen.blocks[first_reader.get(name, source) if by_reader else source]
        elif seen.weight_quantizer(source) is not None:
            owners.setdefault(f"{name}.weight_fake_quant", (source, seen.blocks[source]))
    return owners


def _facts(prepared: Prepared) -> dict[str, Any]:
    config, vocabulary, phase = prepared.config, prepared.vocabulary, prepared.phase
    learned = {id(each) for quantizer in prepared.quantizers().values() for each in quantizer.parameters()}
    return {
        "size": None if config is None else size_of(config),
        "version": None if config is None else config.version,
        "parameters": sum(each.numel() for each in prepared.graph.parameters() if id(each) not in learned),
        "target": prepared.target.name,
        "cpu": prepared.cpu,
        "method": prepared.method,
        "recipe": prepared.recipe.as_plain(),
        "picture_size": prepared.size,
        "vocabulary": None if vocabulary is None else {"count": len(vocabulary.names), "first": list(vocabulary.names[:NAMES_SHOWN])},
        "weights": prepared.weights,
        "calibrated": prepared.calibrated,
        "corrected": sum(layer.corrected for layer in correctable(prepared).values()),
        "phase": {"quantized": list(phase.quantized), "trained": list(phase.trained), "norm": phase.norm},
    }


def _quantizers(prepared: Prepared, seen: GraphView, noise: Noise | None) -> Iterator[QuantizerFacts]:
    owners = owners_of_quantizers(prepared, seen)
    rounded: dict[str, list[float]] = {}  # what leaves a quantizer, wherever it stands
    if noise is not None:
        for node, path in node_paths(prepared.graph).items():
            if str(node.target) in seen.quantizers and path in noise.tensors:
                rounded.setdefault(str(node.target), []).append(noise.tensors[path])
    stages = {name: stage.name for stage in prepared.stages for name in prepared.quantizers([stage.name])}
    for name, quantizer in prepared.quantizers().items():
        node, block = owners[name]
        tensor = seen.paths[node]
        behind = rounded.get(name) or ([noise.tensors[tensor]] if noise is not None and tensor in noise.tensors else [])
        calibration = prepared.calibrations.get(name)
        yield QuantizerFacts(
            name=name,
            of="weight" if quantizer.weight else "activation",
            tensor=tensor,
            block=block,
            stage=stages[name],
            bits=quantizer.spec.bits,
            symmetric=quantizer.spec.symmetric,
            odd=quantizer.spec.odd,
            channel_axis=quantizer.spec.channel_axis,
            scales=quantizer.scale.numel(),
            **_range(quantizer),
            on=quantizer.enabled,
            learns=tuple(LEARNED[parameter] for parameter, _ in quantizer.named_parameters()),
            trained=any(parameter.requires_grad for parameter in quantizer.parameters()),
            observer=None if calibration is None else calibration.observer,
            pictures=None if calibration is None else calibration.pictures,
            moved=None if calibration is None else _moved(quantizer, calibration.scale),
            local=None if noise is None else noise.local.get(name),
            end_to_end=min(behind, default=None),
            clipped=None if noise is None else noise.clipped.get(name),
        )


def _range(quantizer: FakeQuantize) -> dict[str, Any]:
    """Scale, zero point and the values at both ends of the codes, over all channels."""
    if not quantizer.initialised or not quantizer.scale.numel():
        return {"scale": None, "zero_point": None, "range": None}
    scale, zero = (value.double() for value in quantizer.calculate_qparams())
    ends = [(code - zero) * scale for code in (quantizer.quant_min, quantizer.quant_max)]
    return {
        "scale": (scale.min().item(), scale.max().item()),
        "zero_point": (int(zero.min()), int(zero.max())),
        "range": (ends[0].min().item(), ends[1].max().item()),
    }


def _moved(quantizer: FakeQuantize, calibrated: Tensor) -> float | None:
    scale = quantizer.scale.detach().cpu()
    return math.exp(float((scale.log() - calibrated.log()).mean())) if scale.shape == calibrated.shape else None


def _blocks(seen: GraphView, quantizers: Sequence[QuantizerFacts], noise: Noise | None) -> Iterator[BlockFacts]:
    inside: dict[str, list[Node]] = {}
    for node, block in seen.blocks.items():
        inside.setdefault(block, []).append(node)
    for block, nodes in inside.items():
        own = [each for each in quantizers if each.block == block]
        if not own and seen.bits_of_weights(nodes) == set():
            continue
        worst = min((each for each in own if each.local is not None), key=lambda each: each.local or 0.0, default=None)
        leaving = [noise.tensors[seen.paths[node]] for node in seen.leaving(nodes) if seen.paths[node] in noise.tensors] if noise else []
        yield BlockFacts(
            block=block,
            stage=nodes[0].meta[STAGE],
            weight_bits=tuple(sorted(seen.bits_of_weights(nodes))),
            activation_bits=tuple(sorted(seen.bits_read(nodes))),
            quantizers=len(own),
            worst=None if worst is None else worst.name,
            local=None if worst is None else worst.local,
            end_to_end=min(leaving, default=None),
        )


# --- as text ---


def shown(report: PreparedReport, depth: int | None = BLOCKS) -> Text:
    """The facts and the stages; from 2 on the blocks, beyond it every quantizer. None is no limit."""
    parts = [_heading(report), _aligned("stages", list(report.stages[0]), [list(map(_plain, each.values())) for each in report.stages])]
    if depth is None or depth >= BLOCKS:
        parts.append(
            _aligned("blocks", ("block", "W", "A", "quantizers", "end to end", "local", "of"), [of_block(each) for each in report.blocks])
        )
    if depth is None or depth > BLOCKS:
        for block in (each.block for each in report.blocks if each.quantizers):
            rows = [(within(each.name, block), *of_quantizer(each)) for each in report.quantizers if each.block == block]
            parts.append(_aligned(block, ("quantizer", *COLUMNS), rows))
    parts.append(Text(f"{EXPLAINED} Measured on {report.measured_on}." if report.measured_on else UNMEASURED, style="dim"))
    return Text("\n\n").join(parts)


def _heading(report: PreparedReport) -> Text:
    lines = [Text.assemble((f"{name:<14}", "dim"), value.replace("; ", f"\n{'':14}")) for name, value in summary(report).items()]
    return Text("\n").join([Text(kind_of(report), style="bold"), *lines])


def kind_of(report: PreparedReport) -> str:
    version, size = report.facts["version"], report.facts["size"]
    return "a module of your own" if version is None else f"YOLO-World v{version}, {size or 'a size of its own'}"


def summary(report: PreparedReport) -> dict[str, str]:
    """What holds of the whole model, a line each."""
    facts = report.facts
    vocabulary, phase = facts["vocabulary"], facts["phase"]
    names = "none" if vocabulary is None else f"{vocabulary['count']:,} names: {', '.join(vocabulary['first'])}"
    return {
        "file": f"{report.path} (prepared)",
        "parameters": f"{facts['parameters']:,}",
        "target": f"{facts['target']}, processors: {facts['cpu']}, learns by {facts['method']}",
        "picture size": f"{facts['picture_size']} px",
        "vocabulary": names + (", ..." if vocabulary is not None and vocabulary["count"] > len(vocabulary["first"]) else ""),
        "quantized": _listed(phase["quantized"]),
        "trained": f"{_listed(phase['trained'])} (norms: {phase['norm']})",
        "ranges": "set" if facts["calibrated"] else "not set: prepare it with --calibrate",
        "norms": f"{facts['corrected']} corrected" if facts["corrected"] else "as they were",
        "weights": {"only": "as they are", "average": "the average of a training", "raw": "the last of a training"}[facts["weights"]],
        "recipe": "; ".join(_rule(each) for each in facts["recipe"]["rules"]),
    }


def _rule(rule: Mapping[str, Any]) -> str:
    given = {key: rule[key] for key in ("weight", "activation") if rule.get(key)}
    parts = [f"{key} {spec['bits']} bits{' of odd codes' if spec.get('odd') else ''}" for key, spec in given.items()]
    return f"{rule['modules']}: {', '.join(parts) or 'float'}"


def _aligned(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Text:
    """Columns without frames: names are long, and a terminal is to wrap them and not cut them."""
    cells = [list(head), *(list(map(str, row)) for row in rows)]
    right = [all(isinstance(row[column], int) or _is_decibels(row[column]) for row in rows) for column in range(len(head))]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(cell.rjust(width) if end else cell.ljust(width) for cell, width, end in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return Text("\n").join([Text(title, style="bold"), Text(lines[0], style="dim"), *map(Text, lines[1:])])


def of_block(each: BlockFacts) -> tuple[object, ...]:
    bits = ("/".join(map(str, found)) or "-" for found in (each.weight_bits, each.activation_bits))
    worst = "" if each.worst is None else within(each.worst, each.block)
    return (each.block, *bits, each.quantizers, in_decibels(each.end_to_end), in_decibels(each.local), worst)


def of_quantizer(each: QuantizerFacts) -> tuple[str, ...]:
    """What its row says behind its name."""
    return (
        f"{each.bits}{' odd' if each.odd else ' signed' if each.symmetric else ''}",
        in_decibels(each.end_to_end),
        in_decibels(each.local) if each.on else "off",
        "-" if each.clipped is None else f"{each.clipped:.2%}",
        _ends(each.range, "0.3g", both=True),
        _ends(each.scale, "0.3g"),
        _ends(each.zero_point, "d"),
        str(each.scales),
        _set_by(each),
        _learning(each),
    )


def within(name: str, block: str) -> str:
    """A quantizer's name without what its block says already."""
    return name.removeprefix("quant.").removeprefix(f"{block}.").replace("weight_fake_quant", "weight")


def in_decibels(value: float | None) -> str:
    return "-" if value is None else "exact" if value >= EXACT else f"{value:.1f} dB"


def _is_decibels(cell: object) -> bool:
    return cell in ("-", "exact", "off") or str(cell).endswith(" dB")


def _ends(ends: tuple[float, float] | None, form: str, *, both: bool = False) -> str:
    if ends is None:
        return "-"
    lowest, highest = (format(end, form) for end in ends)
    return lowest if lowest == highest and not both else f"{lowest} .. {highest}"


def _set_by(each: QuantizerFacts) -> str:
    if not each.learns:
        return "known"
    if each.observer is None:
        return "-" if each.scale is None else "not told"
    return each.observer if each.moved is None or abs(each.moved - 1) < SAME else f"{each.observer}, then x {each.moved:.3g}"


def _learning(each: QuantizerFacts) -> str:
    return f"{', '.join(each.learns) or 'nothing'}{'' if each.trained or not each.learns else ' (frozen)'}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _plain(value: object) -> object:
    return ("yes" if value else "no") if isinstance(value, bool) else value
