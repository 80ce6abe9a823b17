"""What a processor is told to do with weights that have all their 8 bits, and what of it is said."""

import importlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from crqat_fx import onnx_detector
from crqat_fx.checkpoint import load_model
from crqat_fx.data.shapes import ShapesTask
from crqat_fx.export import export
from crqat_fx.onnx_detector import OnnxDetector
from crqat_fx.onnx_session import open_session, summing_whole
from crqat_fx.processor import instruction_sets, processor_name, sums_products_whole
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.verify import Rung, Verification, explained

SIZE = 64
TASK = ShapesTask(size=SIZE)
TEXTS = TASK.vocabulary.select(TASK.vocabulary.names[:4])
PICTURE = TASK.draw("val", 1).image
OPTION = "session.x64quantprecision"


@pytest.mark.parametrize(
    ("machine", "flags", "whole"),
    [
        ("x86_64", {"avx2", "fma", "avx512f"}, False),
        ("AMD64", {"avx2"}, False),
        ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, True),
        ("x86_64", {"avx2", "avx_vnni"}, True),
        ("aarch64", {"asimd"}, True),
    ],
)
def test_only_x86_without_vnni_saturates(machine: str, flags: set[str], whole: bool) -> None:
    assert sums_products_whole(machine, flags) is whole


def test_this_processor_is_told() -> None:
    assert processor_name()
    if "AVX512VNNI" in instruction_sets():
        assert sums_products_whole()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for processors with VNNI, and one that says of itself that it is for any."""
    folder = tmp_path_factory.mktemp("files")
    prepared = prepare(load_model("pico-v2")[0], recipe="8-8-8-int", vocabulary=TEXTS, size=SIZE, cpu="vnni")
    calibrate(prepared, picture_batches(prepared, [PICTURE]), "minmax", 1)
    made = {cpu: folder / f"{cpu}.onnx" for cpu in ("vnni", "any")}
    model = onnx.load(export(prepared, made["vnni"], outputs="raw").path)
    next(each for each in model.metadata_props if each.key == "crqat_fx.cpu").value = "any"
    onnx.save(model, made["any"])
    return made


def test_a_file_of_full_weights_is_summed_whole_and_another_as_it_is_fastest(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[onnxruntime.InferenceSession] = []

    def noted(*arguments: object) -> onnxruntime.InferenceSession:
        opened.append(open_session(*arguments))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(onnx_detector, "open_session", noted)
    asked = {}
    for cpu, path in files.items():
        OnnxDetector(path, threads=1).detect([PICTURE])
        options = opened[-1].get_session_options()
        asked[cpu] = entry(options)
    assert asked == {"any": False, "vnni": True}


def entry(options: onnxruntime.SessionOptions) -> bool:
    try:
        return bool(options.get_session_config_entry(OPTION) == "1")
    except RuntimeError:  # it has none
        return False


def test_summed_whole_the_outputs_are_those_of_processors_with_vnni(files: dict[str, Path]) -> None:
    if not sums_products_whole():
        pytest.skip("this processor has no VNNI")
    path = files["vnni"]
    pictures = np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)
    usual, whole = (open_session(path, 1, options).run(None, {"images": pictures}) for options in (None, summing_whole()))
    for one, other in zip(usual, whole, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("cpu", "whole", "passed", "told"),
    [("vnni", False, False, True), ("vnni", False, True, False), ("vnni", True, False, False), ("any", False, False, False)],
)
def test_verification_says_why_a_file_for_other_processors_departs(
    cpu: str, whole: bool, passed: bool, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("crqat_fx.verify")  # by its name the package has the function
    monkeypatch.setattr(module, "sums_products_whole", lambda: whole)
    rungs = (Rung(3, "plain", 1, (9, 1, 0, 0), False, "x", "off"), Rung(4, "optimised", 1, (9, 1, 0, 0), passed, "x", "off"))
    found = explained(Verification((*rungs, Rung(None, "whole", 1, (9, 1, 0, 0), None)), {}), cpu)
    assert [rung.detail.startswith("off; this processor has no VNNI") for rung in found.rungs] == [False, told, False]
