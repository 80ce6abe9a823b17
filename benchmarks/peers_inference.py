"""How fast are other tools' 8-bit files of the same models? onnxruntime's quantize_static, OpenVINO with NNCF, OpenVINO on our own file.

python benchmarks/peers_inference.py [--quick] [--models s,m] [--only static,own] [--rounds 15] [--folder files/] [--json results.json]

    static     quantize_static: unsigned activations, signed weights a scale for each channel, after its own pre-processing, as QDQ and as
               operators
    openvino   NNCF's both presets that fit a processor. OpenVINO keeps its defaults, for which it computes what is left in floats in
               bfloat16 where it can
    own        our conv-inputs files in OpenVINO and in onnxruntime, and how far apart their outputs are

Each tool is given (a) this project's model as it is written and (b) the form that public exporters write (workloads.py), and the settings
that could be best for it: all are timed, and ours is compared with the fastest. Ranges come from the same pictures everywhere; accuracy is
not asked here. One process a file, in turns.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from inference import Answer, Entry, Round, against, ask, times

from crqat_fx.bench import BenchReport, Once
from crqat_fx.onnx_run import Extent, made_up_inputs
from crqat_fx.onnx_session import open_session

if TYPE_CHECKING:
    from workloads import Workload

OURS = Entry("ours, 8-8-8-int", lambda workload, path: workload.write_integers(path, "8-8-8-int"))
SOURCES = {
    "a": Entry("FP32 (a) straight", lambda workload, path: workload.write_float(path)),
    "b": Entry("FP32 (b) public form", lambda workload, path: workload.write_public_form(path)),
}
OVER_STATIC = {"s": {"a": 1.10, "b": 1.3}, "m": {"a": 1.10, "b": 1.15}}  # times as fast as the fastest of it, to be reached
OVER_OPENVINO = {"s": 1.15, "m": 1.15}


def start_openvino(path: Path, extent: Extent, threads: int) -> Once:
    """An IR file, or an ONNX file of float pictures."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
    pictures = np.random.default_rng(0).random((extent.batch, 3, extent.size, extent.size), dtype=np.float32)
    request = compiled.create_infer_request()
    return lambda: request.infer({0: pictures})


def calibration(workload: "Workload") -> list[np.ndarray]:
    from workloads import CALIBRATION_PICTURES, drawn_pictures

    pictures = drawn_pictures(CALIBRATION_PICTURES, workload.pixels)
    return [picture.transpose(2, 0, 1)[None].astype(np.float32) / 255 for picture in pictures]


def write_static(source: Path, written: str, workload: "Workload", path: Path) -> Path:
    """By onnxruntime's own tool."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration(workload))

        def get_next(self) -> dict[str, np.ndarray] | None:
            picture = next(self.left, None)
            return None if picture is None else {"images": picture}

    prepared = path.with_name(f"{path.stem}-pre.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)  # nothing in it is symbolic
    quantize_static(
        prepared, path, Pictures(), quant_format=QuantFormat[written], per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path


def write_nncf(source: Path, preset: str, workload: "Workload", path: Path) -> Path:
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    pictures = calibration(workload)
    cpu = nncf.TargetDevice.CPU
    quantized = nncf.quantize(
        model, nncf.Dataset(pictures), preset=nncf.QuantizationPreset(preset), subset_size=len(pictures), target_device=cpu,
        # changes biases, not speed, and fails on the scalar one of a match
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )  # fmt: skip
    openvino.save_model(quantized, path.with_suffix(".xml"))
    return path.with_suffix(".xml")


def fastest(report: BenchReport, entries: Sequence[Entry], what: str, wanted: float | None) -> dict[str, object]:
    """How many times as fast as the fastest of these ours is."""
    best = min((report[one.name] for one in entries), key=lambda one: one.milliseconds.median)
    ratio = report[OURS.name].times_faster_than(best)
    print(f"- {against(f'over {what} ({best.name})', ratio, wanted)}")
    return {"fastest": best.name, "ours_over_it": ratio.median}


def ask_static(asked: Round) -> Answer:
    made = {
        form: [
            Entry(f"quantize_static ({form}) {written}", functools.partial(write_static, asked.file(source), written))
            for written in ("QDQ", "QOperator")
        ]
        for form, source in SOURCES.items()
    }
    report = asked.timed((OURS, *SOURCES.values(), *made["a"], *made["b"]))
    print(f"{times(report, (OURS.name,))}\n")
    wanted = OVER_STATIC.get(asked.workload.size, {})
    best = {form: fastest(report, entries, f"quantize_static on ({form})", wanted.get(form)) for form, entries in made.items()}
    return {**report.as_json(), "best": best}


def ask_openvino(asked: Round) -> Answer:
    floats = [Entry(f"OpenVINO float ({form})", lambda _, path: path, start_openvino) for form in SOURCES]
    for entry, source in zip(floats, SOURCES.values(), strict=True):  # the same files as onnxruntime's
        asked.files[asked.workload.name, entry.name] = asked.file(source)
    codes = [
        Entry(f"OpenVINO + NNCF ({form}) {preset}", functools.partial(write_nncf, asked.file(source), preset), start_openvino)
        for form, source in SOURCES.items()
        for preset in ("performance", "mixed")
    ]
    report = asked.timed((OURS, *floats, *codes))
    print(f"{times(report, (OURS.name,))}\n")
    return {**report.as_json(), "best": fastest(report, codes, "OpenVINO int8", OVER_OPENVINO.get(asked.workload.size))}


def ask_own(asked: Round) -> Answer:
    entries = []
    for recipe in ("8-8-8-int", "8-8-8"):
        there = Entry(
            f"OpenVINO, our conv-inputs {recipe}",
            lambda workload, path, recipe=recipe: workload.write_integers(path, recipe, "conv-inputs"),  # type: ignore[misc]
            start_openvino,
        )
        here = Entry(f"onnxruntime, our conv-inputs {recipe}", there.write)
        asked.files[asked.workload.name, here.name] = asked.file(there)
        entries += [there, here]
    report = asked.timed((OURS, *entries))
    print(f"{times(report, (OURS.name,))}\n")
    best = fastest(report, entries[::2], "OpenVINO on our file", None)
    off = distance(asked.file(entries[0]), Extent(asked.settings.size, 1, asked.settings.texts))
    print(f"- from the picture on OpenVINO's outputs are {off:.1e} of the largest from onnxruntime's")
    return {**report.as_json(), "best": best, "distance": off}


def distance(path: Path, extent: Extent) -> float:
    """How far OpenVINO's outputs are from onnxruntime's on one file, of the largest output."""
    import openvino

    session = open_session(path, 1)
    feed = made_up_inputs(session, extent, path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    theirs = compiled(feed["images"])
    expected = session.run(None, dict(feed))
    return max(float(np.abs(one - theirs[place]).max() / np.abs(one).max()) for place, one in enumerate(expected))


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)  # the tools' advice is for other questions
    questions = {"static": ask_static, "openvino": ask_openvino, "own": ask_own}
    ask("inference, peers", __doc__, questions, tools=("onnxruntime", "openvino", "nncf", "torch"))
