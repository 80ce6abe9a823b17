"""How fast are the exported integers? Every form against full precision, in onnxruntime: one process a model, in turns, one thread.

python benchmarks/bench_inference.py [--quick] [--sizes s m] [--threads 1] [--rounds 15] [--folder files/] [--json results.json]

Full precision comes as (a) this project's model as it is written and (b) the form that public exporters write (workloads.py): two
baselines, named beside every ratio. `tuned` is (a) with what a constant text allows, as `export` writes a checkpoint. All return raw
outputs for 80 texts at 640 px. Below the first table of a size: where the time goes, and what is missing to a quarter of full precision's,
the most that 8-bit kernels reach on processors that multiply four bytes in the time of one float.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from workloads import Workload

from crqat_fx.bench import BenchReport, BenchSettings, Contender, Operators, bench, format_machine, operators_of
from crqat_fx.onnx_profile import OperatorTime
from crqat_fx.onnx_run import Extent, made_up_inputs, run
from crqat_fx.onnx_session import open_session

STRAIGHT, TUNED, PUBLIC = "FP32 (a) straight", "FP32 tuned", "FP32 (b) public form"
INTEGERS = "8-8-8-int"
GROUPS = {
    "SiLU": {"QuickGelu", "Sigmoid", "Mul", "QLinearSigmoid", "QLinearMul"},
    "joins": {"Concat", "QLinearConcat", "Split", "Add", "QLinearAdd"},
    "layout": {"Transpose", "Reshape", "ReorderInput", "ReorderOutput", "Pad", "Unsqueeze", "Squeeze"},
    "upsampling": {"Upsample", "Resize", "Tile"},
    "codes": {"QuantizeLinear", "DequantizeLinear", "Clip"},
    "pools": {"MaxPool", "NhwcMaxPool", "ReduceMax"},
}  # of what is no product
CEILING = 4.0  # times full precision: what one kernel can reach


@dataclass(frozen=True)
class Entry:
    """One line of a table: what it is called, and how its file is written."""

    name: str
    write: Callable[[Workload, Path], Path]


def floats(form: str, **settings: Any) -> Callable[[Workload, Path], Path]:
    return lambda workload, path: workload.write_float(path, form, **settings)


def integers(recipe: str, **settings: Any) -> Callable[[Workload, Path], Path]:
    return lambda workload, path: workload.write_integers(path, recipe, **settings)


FP32 = (Entry(STRAIGHT, floats("straight")), Entry(TUNED, floats("tuned")), Entry(PUBLIC, Workload.write_public_form))
RECIPES = (
    Entry(INTEGERS, integers(INTEGERS)),
    Entry("4-8-8-int, int4 file", integers("4-8-8-int")),
    Entry("4-8-8-int, int8 file", integers("4-8-8-int", weights="int8")),
    Entry("4-4-8-int, int4 file", integers("4-4-8-int")),
    Entry("4-4-8-int, int8 file", integers("4-4-8-int", weights="int8")),
    Entry("4-4-8, float edges", integers("4-4-8")),
)
OPEN = ("batch", "size")
FORMS = (
    Entry(INTEGERS, integers(INTEGERS)),
    Entry("uint8 input", integers(INTEGERS, input="uint8")),
    Entry("runtime text", integers(INTEGERS, runtime_text=True)),
    Entry("FP32 runtime text", floats("tuned", runtime_text=True)),
    Entry("dynamic batch and size", integers(INTEGERS, dynamic=OPEN)),
    Entry("FP32 dynamic", floats("tuned", dynamic=OPEN)),
    Entry("runtime text, dynamic", integers(INTEGERS, runtime_text=True, dynamic=OPEN)),
)
QUICK = (*FP32, *RECIPES[:3]), (FP32[0], FORMS[0], FORMS[-1])
SAME_CODES = (("4-8-8-int, int4 file", "4-8-8-int, int8 file"), ("4-4-8-int, int4 file", "4-4-8-int, int8 file"))


def measure(workload: Workload, entries: Sequence[Entry], folder: Path, settings: BenchSettings) -> tuple[BenchReport, dict[str, Path]]:
    files = {}
    for entry in entries:
        name = "".join(letter if letter.isalnum() else "-" for letter in f"{workload.name}-{entry.name}")
        files[entry.name] = entry.write(workload, folder / f"{name}.onnx")
    return bench([Contender(name, path) for name, path in files.items()], settings), files


def show(title: str, report: BenchReport, baselines: Sequence[str]) -> None:
    print(f"\n{title}")
    print(f"{'':<24}{'MiB':>8}{'ms':>26}" + "".join(f"{'over ' + name:>28}" for name in baselines))
    for one in report.timings:
        ratios = "".join(f"{f'{one.times_faster_than(report[name]):.2f}':>28}" for name in baselines)
        print(f"{one.name:<24}{one.bytes / 2**20:>8.2f}{f'{one.milliseconds:.1f}':>26}{ratios}")


def compare_storage(files: dict[str, Path], report: BenchReport, extent: Extent) -> list[dict[str, Any]]:
    """What packing two codes to a byte changes: the size alone."""
    rows = []
    for packed, plain in SAME_CODES:
        if packed not in files:
            continue
        outputs = []
        for name in (packed, plain):
            session = open_session(files[name], 1)
            outputs.append(run(session, made_up_inputs(session, extent, files[name]), files[name]))
        same = all(np.array_equal(one, other) for one, other in zip(*outputs, strict=True))
        size = report[packed].bytes / report[plain].bytes
        speed = report[packed].times_faster_than(report[plain])
        print(f"{packed}: outputs {'equal' if same else 'DIFFER FROM'} the int8 file's bit for bit, {size:.3f} of its size, {speed:.3f} x")
        rows.append({"file": packed, "equal": same, "size": size, "times_faster": asdict(speed)})
    return rows


def group_of(one: OperatorTime) -> str:
    return "products" if one.macs else next((name for name, kinds in GROUPS.items() if one.kind in kinds), "other")


def show_distance(whole: Operators, codes: Operators) -> dict[str, tuple[float, float]]:
    """What full precision takes, what the integers take, and how much of that is above a quarter of full precision: by kind of work."""
    groups: dict[str, tuple[float, float]] = {}
    for one, place in ((one, place) for place, each in enumerate((whole, codes)) for one in each.times):
        before = groups.get(group_of(one), (0.0, 0.0))
        groups[group_of(one)] = (before[0] + one.milliseconds * (place == 0), before[1] + one.milliseconds * (place == 1))
    total = (sum(each[0] for each in groups.values()), sum(each[1] for each in groups.values()))
    print(f"\nwhere the time goes (the profiler's): {whole.path.stem}, {codes.path.stem}")
    print(f"{'':<12}{'FP32 ms':>10}{'integers':>10}{'above a quarter':>17}  operators of the integers")
    for name, (before, after) in sorted((*groups.items(), ("all", total)), key=lambda row: row[0] == "all"):
        kinds = [f"{one.kind} {one.milliseconds:.1f}" for one in codes.times if one.milliseconds > 0.1 and name == group_of(one)]
        print(f"{name:<12}{before:>10.2f}{after:>10.2f}{after - before / CEILING:>17.2f}  {', '.join(kinds)}")
    rates = [2 * one.macs / one.milliseconds / 1e6 for each in (whole, codes) for one in each.times if one.kind in ("Conv", "QLinearConv")]
    if len(rates) == 2:
        print(f"convolutions: {rates[0]:.0f} GOP/s in floats, {rates[1]:.0f} in integers, {rates[1] / rates[0]:.2f} times as many")
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--sizes", nargs="+", default=["s", "m"], help="sizes of the model (default: s m)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    sizes, pixels, texts = (["pico"], 64, 5) if options.quick else (options.sizes, 640, 80)
    settings = BenchSettings(options.threads, *((1, 1) if options.quick else (options.rounds, 3)), pixels, 1, texts)
    recipes, forms = QUICK if options.quick else ((*FP32, *RECIPES), (FP32[0], *FORMS))
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size in sizes:
            workload = Workload(size, 2, pixels, texts)
            report, files = measure(workload, recipes, folder, settings)
            show(f"v2 {size}, {pixels} px, {texts} texts", report, (STRAIGHT, PUBLIC))
            storage = compare_storage(files, report, Extent(pixels, 1, texts))
            operators = {name: operators_of(files[name], settings) for name in (STRAIGHT, INTEGERS)}
            groups = show_distance(operators[STRAIGHT], operators[INTEGERS])
            details = {"storage": storage, "groups_ms": groups, "operators": {name: each.as_json() for name, each in operators.items()}}
            results.append({"model": workload.name, **report.as_json(), **details})
            for version in (2,) if options.quick else (1, 2):
                workload = Workload(size, version, pixels, texts)
                report, _ = measure(workload, forms, folder, settings)
                show(f"v{version} {size}, other forms", report, (STRAIGHT, INTEGERS))
                results.append({"model": workload.name, "forms": True, **report.as_json()})
    print(f"\nmedians, in brackets the quartiles, of {settings.rounds} rounds; {settings.threads} thread; {format_machine(report.machine)}")
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "inference", "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
