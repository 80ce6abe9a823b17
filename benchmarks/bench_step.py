"""What do quantizers cost in training? One step of S with all of them on, over the step of the float model; both targets.

python benchmarks/bench_step.py [--quick] [--version 1] [--rounds 20] [--json results.json]

320 px, batch 2, one thread. To be reached: at most 1.25 times the float step with `conv-inputs`, 1.6 times with `ort`.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes that are started

import dataclasses
import statistics

from training_step import FLOAT, Form, Options, measure, ratio

FORMS = (FLOAT, Form("conv-inputs, 4-4-8", "conv-inputs", "4-4-8"), Form("ort, 4-8-8-int", "ort", "4-8-8-int"))
MOST = {"conv-inputs, 4-4-8": 1.25, "ort, 4-8-8-int": 1.6}


def main() -> None:
    options = Options.read(__doc__, rounds=20)
    seconds, losses = measure(FORMS, options.workload, options.rounds)
    print(f"{options.workload}: forward and backward, one thread")
    results = []
    for form in FORMS:
        milliseconds, over = statistics.median(seconds[form.name]) * 1e3, ratio(seconds[form.name], seconds[FLOAT.name])
        asked = f", at most {MOST[form.name]} asked" if form.name in MOST else ""
        print(f"  {form.name:<20}{milliseconds:>9.1f} ms   {over} x float{asked}")
        results.append({"form": form.name, "milliseconds": milliseconds, "over_float": dataclasses.asdict(over), "loss": losses[form.name]})
    options.write("step", results)


if __name__ == "__main__":
    main()
