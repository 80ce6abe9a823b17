"""What do quantizers cost in training? One step of S with all of them on, over the step of the float model; both targets.

python benchmarks/bench_step.py [--quick] [--version 1] [--rounds 20] [--json results.json]

320 px, batch 2, one thread. To be reached: at most 1.25 times the float step with `conv-inputs`, 1.6 times with `ort`.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes that are started

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch
from training_step import FLOAT, Form, Workload, measure, ratio

FORMS = (FLOAT, Form("conv-inputs, 4-4-8", "conv-inputs", "4-4-8"), Form("ort, 4-8-8-int", "ort", "4-8-8-int"))
MOST = {"conv-inputs, 4-4-8": 1.25, "ort, 4-8-8-int": 1.6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model, two rounds: only to see that it runs")
    parser.add_argument("--version", type=int, choices=(1, 2), default=1, help="of YOLO-World (default: 1)")
    parser.add_argument("--rounds", type=int, default=20, help="how often each form runs (default: 20)")
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    workload = Workload("pico", options.version, 64, 2, 5) if options.quick else Workload(version=options.version)
    rounds = 2 if options.quick else options.rounds
    seconds, losses = measure(FORMS, workload, rounds)
    print(f"{workload}: forward and backward, one thread")
    results = []
    for form in FORMS:
        milliseconds, over = statistics.median(seconds[form.name]) * 1e3, ratio(seconds[form.name], seconds[FLOAT.name])
        asked = f", at most {MOST[form.name]} asked" if form.name in MOST else ""
        print(f"  {form.name:<20}{milliseconds:>9.1f} ms   {over} x float{asked}")
        results.append({"form": form.name, "milliseconds": milliseconds, "over_float": dataclasses.asdict(over), "loss": losses[form.name]})
    if options.json:
        written = {"benchmark": "step", "workload": dataclasses.asdict(workload), "rounds": rounds, "torch": torch.__version__}
        options.json.write_text(json.dumps({**written, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
