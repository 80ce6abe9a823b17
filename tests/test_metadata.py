"""What exported files say of themselves: written, read back, and not believed."""

from dataclasses import replace

import pytest
from onnx_files import METADATA

from crqat_fx.detections import Selection
from crqat_fx.errors import UserError
from crqat_fx.metadata import Metadata

EVERYTHING = Metadata(
    version="1.2.3",
    names=("red", "café", 'a "quoted", name'),
    size=(480, 640),
    outputs="nms",
    input="uint8",
    text="constant",
    text_width=512,
    weights="int4",
    strides=(8, 16),
    nms=Selection(conf=0.25, iou=0.6, max=100),
    recipe={"rules": [{"modules": "*", "weight": 4}]},
    target="ort",
    cpu="vnni",
)


@pytest.mark.parametrize(
    "metadata",
    [
        METADATA,
        EVERYTHING,
        replace(METADATA, multiple=32, size=(640, 640)),
        replace(METADATA, text="runtime", names=()),
        replace(METADATA, text="runtime", outputs="raw"),
    ],
)
def test_what_is_written_is_read_back(metadata):
    strings = metadata.as_strings()
    assert all(isinstance(value, str) for value in strings.values())
    assert Metadata.read(strings, "m.onnx") == metadata


def test_the_strings_are_those_of_the_contract():
    assert EVERYTHING.as_strings() == {
        "crqat_fx.format": "1",
        "crqat_fx.version": "1.2.3",
        "crqat_fx.names": '["red", "caf\\u00e9", "a \\"quoted\\", name"]',
        "crqat_fx.strides": "[8, 16]",
        "crqat_fx.size": "[480, 640]",
        "crqat_fx.outputs": "nms",
        "crqat_fx.nms": '{"conf": 0.25, "iou": 0.6, "max": 100}',
        "crqat_fx.input": "uint8",
        "crqat_fx.text": "constant",
        "crqat_fx.text_width": "512",
        "crqat_fx.weights": "int4",
        "crqat_fx.recipe": '{"rules": [{"modules": "*", "weight": 4}]}',
        "crqat_fx.target": "ort",
        "crqat_fx.cpu": "vnni",
    }
    dynamic = replace(METADATA, multiple=32, size=(640, 640)).as_strings()
    assert dynamic["crqat_fx.size"] == '{"multiple": 32, "default": 640}'
    assert not dynamic.keys() & {"crqat_fx.nms", "crqat_fx.recipe", "crqat_fx.target", "crqat_fx.cpu"}


@pytest.mark.parametrize("key", ["version", "names", "strides", "size", "outputs", "nms", "input", "text", "text_width", "weights"])
def test_what_is_missing_is_named(key):
    strings = EVERYTHING.as_strings()
    del strings[f"crqat_fx.{key}"]
    with pytest.raises(UserError, match=f"m.onnx: its metadata lacks crqat_fx.{key}; export it again"):
        Metadata.read(strings, "m.onnx")


@pytest.mark.parametrize("strings", [{}, {"names": "{0: 'person'}", "stride": "32", "task": "detect"}])
def test_another_projects_file_is_told_by_what_it_lacks(strings):
    with pytest.raises(UserError, match=r"did not write: its metadata lacks crqat_fx.format; make one with `crqat-fx export`"):
        Metadata.read(strings, "m.onnx")


def test_another_format_is_refused_and_says_what_wrote_it():
    strings = METADATA.as_strings() | {"crqat_fx.format": "2", "crqat_fx.version": "9.0"}
    with pytest.raises(UserError, match=r"is of format '2' \(crqat-fx '9.0'\), and this release reads '1'; update crqat-fx"):
        Metadata.read(strings, "m.onnx")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("names", "not json"),
        ("names", "[" * 100_000),
        ("names", '{"0": "red"}'),
        ("names", "[]"),
        ("names", '["red", 3]'),
        ("names", '["red", "red"]'),
        ("names", '["red", "two\\nlines"]'),
        ("strides", "[8, 16, 30]"),
        ("strides", "[16, 8]"),
        ("strides", "[8, 8]"),
        ("strides", "[0]"),
        ("strides", "8"),
        ("strides", "[true]"),
        ("size", "[640]"),
        ("size", "[640, 650]"),
        ("size", "[640, 99999968]"),
        ("size", "[0, 0]"),
        ("size", "[true, true]"),
        ("size", '{"multiple": 32}'),
        ("size", '{"multiple": 64, "default": 96}'),
        ("size", "640"),
        ("outputs", "boxes"),
        ("input", "float16"),
        ("text", ""),
        ("text_width", "-1"),
        ("text_width", "0"),
        ("text_width", "²"),
        ("text_width", "9" * 5000),
        ("weights", "int2"),
        ("recipe", "[]"),
        ("nms", "[]"),
        ("nms", '{"conf": 0.2, "iou": 0.7}'),
        ("nms", '{"conf": 2, "iou": 0.7, "max": 3}'),
        ("nms", '{"conf": NaN, "iou": 0.7, "max": 3}'),
        ("nms", '{"conf": 0.2, "iou": "0.7", "max": 3}'),
        ("nms", '{"conf": 0.2, "iou": 0.7, "max": 3.5}'),
        ("nms", '{"conf": 1' + "0" * 400 + ', "iou": 0.7, "max": 3}'),
    ],
)
def test_what_cannot_be_is_refused_by_its_key_in_one_short_line(key, value):
    with pytest.raises(UserError, match=rf"crqat_fx\.{key}") as raised:
        Metadata.read(EVERYTHING.as_strings() | {f"crqat_fx.{key}": value}, "m.onnx")
    assert len(str(raised.value)) < 300
