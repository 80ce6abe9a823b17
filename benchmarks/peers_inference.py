"""How fast are other tools' 8-bit files of the same models? onnxruntime's quantize_static, OpenVINO with NNCF, OpenVINO on our own file.

python benchmarks/peers_inference.py [--quick] [--sizes s m] [--threads 1] [--rounds 15] [--folder files/] [--json results.json]

Each tool is given (a) this project's model as it is written and (b) the form that public exporters write (workloads.py), and the settings
that could be best for it: all are timed, and ours is compared with the fastest. quantize_static: unsigned activations, signed weights a
scale for each channel, after its own pre-processing, as QDQ and as operators. NNCF: both presets that fit a processor. OpenVINO keeps its
defaults, for which it computes what is left in floats in bfloat16 where it can. Ranges come from the same pictures everywhere; accuracy is
not asked here. One process a file, in turns.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from workloads import CALIBRATION_PICTURES, Workload, drawn_pictures

from crqat_fx.bench import BenchReport, BenchSettings, Contender, Once, bench, format_machine
from crqat_fx.onnx_run import Extent, made_up_inputs
from crqat_fx.onnx_session import open_session

OURS, BASELINES = "ours, 8-8-8-int", {"a": "FP32 (a) straight", "b": "FP32 (b) public form"}
STATIC, OPENVINO, OWN = "quantize_static", "OpenVINO + NNCF", "OpenVINO, our conv-inputs"
TOOLS = ("onnxruntime", "openvino", "nncf", "torch")


def start_openvino(path: Path, extent: Extent, threads: int) -> Once:
    """An IR file, or an ONNX file of float pictures."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
    pictures = np.random.default_rng(0).random((extent.batch, 3, extent.size, extent.size), dtype=np.float32)
    request = compiled.create_infer_request()
    return lambda: request.infer({0: pictures})


def calibration(workload: Workload) -> list[np.ndarray]:
    pictures = drawn_pictures(CALIBRATION_PICTURES, workload.pixels)
    return [picture.transpose(2, 0, 1)[None].astype(np.float32) / 255 for picture in pictures]


def write_static(workload: Workload, source: Path, stem: Path) -> Iterator[tuple[str, Path]]:
    """By onnxruntime's own tool."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration(workload))

        def get_next(self) -> dict[str, np.ndarray] | None:
            picture = next(self.left, None)
            return None if picture is None else {"images": picture}

    prepared = stem.with_name(f"{stem.name}-pre.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)  # nothing in it is symbolic
    for name, written in (("QDQ", QuantFormat.QDQ), ("operators", QuantFormat.QOperator)):
        path = stem.with_name(f"{stem.name}-{name}.onnx")
        quantize_static(
            prepared, path, Pictures(), quant_format=written, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        yield name, path


def write_nncf(workload: Workload, source: Path, stem: Path) -> Iterator[tuple[str, Path]]:
    import nncf
    import openvino

    for preset in (nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED):
        model = openvino.Core().read_model(source)
        pictures = nncf.Dataset(calibration(workload))
        quantized = nncf.quantize(
            model, pictures, preset=preset, subset_size=CALIBRATION_PICTURES, target_device=nncf.TargetDevice.CPU,
            # changes biases, not speed, and fails on the scalar one of a match
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )  # fmt: skip
        path = stem.with_name(f"{stem.name}-{preset.value}.xml")
        openvino.save_model(quantized, path)
        yield preset.value, path


def contenders(workload: Workload, folder: Path) -> list[Contender]:
    stem = folder / workload.name
    ours = workload.write_integers(stem.with_name(f"{stem.name}-ours.onnx"), "8-8-8-int")
    sources = {
        "a": workload.write_float(stem.with_name(f"{stem.name}-a.onnx")),
        "b": workload.write_public_form(stem.with_name(f"{stem.name}-b.onnx")),
    }
    found = [Contender(OURS, ours), *(Contender(BASELINES[form], path) for form, path in sources.items())]
    for form, source in sources.items():
        written = write_static(workload, source, stem.with_name(f"{stem.name}-{form}-static"))
        found += [Contender(f"{STATIC} ({form}) {name}", path) for name, path in written]
        found.append(Contender(f"OpenVINO float ({form})", source, start_openvino))
        written = write_nncf(workload, source, stem.with_name(f"{stem.name}-{form}-nncf"))
        found += [Contender(f"{OPENVINO} ({form}) {name}", path, start_openvino) for name, path in written]
    for recipe in ("8-8-8-int", "8-8-8"):
        own = workload.write_integers(stem.with_name(f"{stem.name}-conv-inputs-{recipe}.onnx"), recipe, "conv-inputs")
        found += [Contender(f"{OWN} {recipe}", own, start_openvino)]
    return found


def distance(path: Path, extent: Extent) -> float:
    """How far OpenVINO's outputs are from onnxruntime's on one file, of the largest output."""
    import openvino

    session = open_session(path, 1)
    feed = made_up_inputs(session, extent, path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    theirs = compiled(feed["images"])
    expected = session.run(None, dict(feed))
    return max(float(np.abs(one - theirs[place]).max() / np.abs(one).max()) for place, one in enumerate(expected))


def show(workload: Workload, report: BenchReport) -> dict[str, Any]:
    ours, forms = report[OURS], list(BASELINES.values())
    print(f"\nv{workload.version} {workload.size}, {workload.pixels} px, {workload.texts} texts")
    print(f"{'':<40}{'ms':>26}{'ours is so many times as fast':>32}")
    for one in report.timings:
        print(f"{one.name:<40}{f'{one.milliseconds:.1f}':>26}{f'{ours.times_faster_than(one):.2f}':>32}")
    best = {}
    names = [one.name for one in report.timings]
    for title, kept in (
        *((f"{STATIC} on ({form})", lambda name, form=form: name.startswith(f"{STATIC} ({form})")) for form in BASELINES),
        ("OpenVINO int8", lambda name: name.startswith(OPENVINO)),
        ("OpenVINO on our file", lambda name: name.startswith(OWN)),
        *((form, lambda name, form=form: name == form) for form in forms),
    ):  # type: str, Callable[[str], bool]
        fastest = min((report[name] for name in names if kept(name)), key=lambda one: one.milliseconds.median)
        best[title] = {"fastest": fastest.name, "ours_over_it": ours.times_faster_than(fastest).median}
        print(f"over {title}: {best[title]['ours_over_it']:.2f} ({fastest.name})")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--sizes", nargs="+", default=["s", "m"], help="sizes of the model (default: s m)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # the tools' advice is for other questions
    sizes, pixels, texts = (["pico"], 64, 5) if options.quick else (options.sizes, 640, 80)
    settings = BenchSettings(options.threads, *((1, 1) if options.quick else (options.rounds, 3)), pixels, 1, texts)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size in sizes:
            workload = Workload(size, 2, pixels, texts)
            given = contenders(workload, folder)
            report = bench(given, settings)
            best = show(workload, report)
            off = distance(next(one.path for one in given if one.name.startswith(OWN)), Extent(pixels, 1, texts))
            print(f"our conv-inputs file: OpenVINO's outputs are {off:.1e} of the largest from onnxruntime's")
            results.append({"model": workload.name, **report.as_json(), "best": best, "conv_inputs_distance": off})
    tools = {name: version(name) for name in TOOLS}
    print(f"\nmedians, in brackets the quartiles; {settings.threads} thread; {format_machine(report.machine)}; {tools}")
    if options.json:
        written = {"benchmark": "inference, peers", "tools": tools, "results": results}
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
