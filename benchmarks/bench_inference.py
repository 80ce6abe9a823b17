"""How fast are the exported integers? Every form against full precision, in onnxruntime: one process a model, in turns, one thread.

python benchmarks/bench_inference.py [--quick] [--models s,m] [--only float,storage] [--rounds 15] [--folder files/] [--json results.json]

    float      8-8-8-int over full precision, as (a) this project's model as it is written and (b) the form that public exporters write
               (workloads.py): two baselines, named beside every ratio. `tuned` is (a) with what a constant text allows
    storage    what packing two 4-bit codes to a byte changes: the size alone; 4-bit activations, and float edges, beside
    forms      bytes as input, text as an input, open sizes and batches, and full precision in the same forms
    v1         the same of v1, whose text is refreshed from the picture
    operators  where the time goes, and what is missing to a quarter of full precision's

All return raw outputs for 80 texts at 640 px.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from inference import Answer, Entry, Round, against, ask, table, times

from crqat_fx.bench import operators_of
from crqat_fx.onnx_run import Extent, made_up_inputs, run
from crqat_fx.onnx_session import open_session
from crqat_fx.work import by_work

if TYPE_CHECKING:
    from workloads import Workload


def floats(form: str, **settings: Any) -> Callable[["Workload", Path], Path]:
    return lambda workload, path: workload.write_float(path, form, **settings)


def integers(recipe: str, **settings: Any) -> Callable[["Workload", Path], Path]:
    return lambda workload, path: workload.write_integers(path, recipe, **settings)


OPEN = ("batch", "size")
STRAIGHT, TUNED = Entry("FP32 (a) straight", floats("straight")), Entry("FP32 tuned", floats("tuned"))
PUBLIC = Entry("FP32 (b) public form", lambda workload, path: workload.write_public_form(path))
OURS = Entry("8-8-8-int", integers("8-8-8-int"))
# of each recipe the file with two codes a byte, and the one with a code a byte
STORED = tuple(
    (Entry(f"{recipe}, int4 file", integers(recipe)), Entry(f"{recipe}, int8 file", integers(recipe, weights="int8")))
    for recipe in ("4-8-8-int", "4-4-8-int")
)
FLOAT_EDGES = Entry("4-4-8, float edges", integers("4-4-8"))
FORMS = (
    Entry("uint8 input", integers("8-8-8-int", input="uint8")),
    Entry("runtime text", integers("8-8-8-int", runtime_text=True)),
    Entry("dynamic batch and size", integers("8-8-8-int", dynamic=OPEN)),
    Entry("runtime text, dynamic", integers("8-8-8-int", runtime_text=True, dynamic=OPEN)),
    Entry("FP32 runtime text", floats("tuned", runtime_text=True)),
    Entry("FP32 dynamic", floats("tuned", dynamic=OPEN)),
)
OVER = {"s": {STRAIGHT: 3.2, PUBLIC: 3.4}, "m": {STRAIGHT: 3.3, PUBLIC: 3.5}}  # times as fast as these, to be reached
SMALLER, SLOWER = 0.52, 1.02  # an int4 file over the int8 one: its size and its time, at most


def ask_float(asked: Round) -> Answer:
    report = asked.timed((STRAIGHT, TUNED, PUBLIC, OURS))
    print(times(report, (STRAIGHT.name, PUBLIC.name)))
    print()
    for baseline in (STRAIGHT, PUBLIC):
        ratio = report[OURS.name].times_faster_than(report[baseline.name])
        print(f"- {against(f'over {baseline.name}', ratio, OVER.get(asked.workload.size, {}).get(baseline))}")
    return report.as_json()


def ask_storage(asked: Round) -> Answer:
    report = asked.timed((OURS, *(entry for pair in STORED for entry in pair), FLOAT_EDGES))
    print(times(report, (OURS.name,)))
    print()
    found = []
    extent = Extent(asked.settings.size, 1, asked.settings.texts)
    for packed, plain in STORED:
        outputs = []
        for path in (asked.file(packed), asked.file(plain)):
            session = open_session(path, 1)
            outputs.append(run(session, made_up_inputs(session, extent, path), path))
        same = all(np.array_equal(one, other) for one, other in zip(*outputs, strict=True))
        size = report[packed.name].bytes / report[plain.name].bytes
        slower = report[plain.name].times_faster_than(report[packed.name])
        judged = asked.workload.size in OVER  # in a small model scales and names weigh more
        print(f"- {packed.name}: outputs {'equal' if same else 'DIFFER FROM'} the int8 file's bit for bit")
        print(f"- {against(f'{packed.name}, size over the int8 file', size, SMALLER if judged else None, most=True)}")
        print(f"- {against(f'{packed.name}, time over the int8 file', slower, SLOWER if judged else None, most=True)}")
        found.append({"file": packed.name, "equal": same, "size": size, "time": dataclasses.asdict(slower)})
    return {**report.as_json(), "storage": found}


def ask_forms(asked: Round) -> Answer:
    report = asked.timed((STRAIGHT, OURS, *FORMS))
    print(times(report, (STRAIGHT.name, OURS.name)))
    return report.as_json()


def ask_v1(asked: Round) -> Answer:
    workload = dataclasses.replace(asked.workload, version=1)
    report = asked.timed((STRAIGHT, TUNED, OURS, STORED[0][0], *FORMS), workload)
    print(times(report, (STRAIGHT.name, OURS.name)))
    return report.as_json()


def ask_operators(asked: Round) -> Answer:
    whole, codes = (operators_of(asked.file(entry), asked.settings) for entry in (STRAIGHT, OURS))
    work = by_work([whole.times, codes.times])
    rows = []
    for one in work:
        ratio = one.times_faster(1)
        shown = "" if ratio is None else f"{ratio:.2f}"
        rows.append(
            (one.name, *(f"{each:.2f}" for each in one.milliseconds), shown, f"{one.above_ceiling(1):.2f}", "".join(one.operators[1:]))
        )
    print(table(("work", "FP32 (a) ms", "integers ms", "times as fast", "ms above a quarter", "operators of the integers"), rows))
    return {"work": [one.as_json() for one in work], "operators": [whole.as_json(), codes.as_json()]}


if __name__ == "__main__":
    ask(
        "inference",
        __doc__,
        {"float": ask_float, "storage": ask_storage, "forms": ask_forms, "v1": ask_v1, "operators": ask_operators},
    )
