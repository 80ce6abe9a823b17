"""How long do the passes take? Tracing and marking the stages of every size: of X, marking is to take less than 50 ms.

python benchmarks/bench_passes.py [--quick] [--json results.json]

One thread; models without weights, as neither reads a number; medians of wall time. Tracing is without its proof, which runs the model.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from crqat_fx.cost import model_on_paper
from crqat_fx.models.yolo_world import SIZES
from crqat_fx.pipelines import mark_stages
from crqat_fx.trace import trace_unproved


def milliseconds(deed: Callable[[], object], runs: int) -> float:
    """The median, after one run that warms caches."""
    deed()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        deed()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def figures_of(name: str, runs: int) -> dict[str, float | str]:
    model = model_on_paper(name)
    graph = trace_unproved(model)
    marking = mark_stages(3)
    return {
        "model": name,
        "nodes": len(graph.graph.nodes),
        "trace_ms": milliseconds(lambda: trace_unproved(model), runs),
        "mark_stages_ms": milliseconds(lambda: marking(graph), runs),  # a marked graph takes as long as a fresh one
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="v1 X alone, few runs")
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ["yolo-world-v1-x"] if options.quick else [f"yolo-world-v{version}-{size}" for version in (1, 2) for size in SIZES]
    runs = 5 if options.quick else 21
    results = []
    print(f"{'model':<18}{'nodes':>6}{'trace ms':>10}{'mark-stages ms':>16}")
    for name in names:
        figures = figures_of(name, runs)
        print(f"{name:<18}{figures['nodes']:>6}{figures['trace_ms']:>10.1f}{figures['mark_stages_ms']:>16.1f}")
        results.append(figures)
    if options.json:
        machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        written = {"benchmark": "passes", **machine, "runs": runs, "results": results}
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
