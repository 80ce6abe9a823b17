"""What an exported file says of itself: the `crqat_fx.*` strings in an ONNX model's metadata, written by `export` and read by what runs it.

    crqat_fx.format       "1": another number is refused
    crqat_fx.version      of the package that wrote the file
    crqat_fx.names        JSON list; with runtime text those of the vocabulary that was named at export, if any
    crqat_fx.strides      JSON list, finest first
    crqat_fx.size         JSON [height, width]; of a file that takes any size {"multiple": 32, "default": 640}
    crqat_fx.outputs      decoded | raw | nms
    crqat_fx.nms          JSON {"conf": .25, "iou": .7, "max": 300}, with the outputs `nms` alone
    crqat_fx.input        float: [B, 3, H, W] in [0, 1] | uint8: [B, H, W, 3]; RGB
    crqat_fx.text         constant | runtime
    crqat_fx.text_width   of an embedding
    crqat_fx.weights      int4 | int8 | float32 | float16
    crqat_fx.recipe       JSON of the recipe; with crqat_fx.target and crqat_fx.cpu absent from a file in floats

What a file says is not believed: each string is checked as it is read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from crqat_fx.detections import LARGEST, STEP, Selection
from crqat_fx.errors import UserError
from crqat_fx.vocabulary import checked_names

FORMAT = "1"
IMAGES, TEXT = "images", "text"  # what a file's inputs are called
FULL = "vnni"  # the processor that a file is for: its weights have all their 8 bits
PREFIX = "crqat_fx."

Outputs = Literal["decoded", "raw", "nms"]
Input = Literal["float", "uint8"]
Text = Literal["constant", "runtime"]
Weights = Literal["int4", "int8", "float32", "float16"]

_AGAIN = "export it again with `crqat-fx export`"
_MOST_STRIDES = 8


@dataclass(frozen=True)
class Metadata:
    """The strings as values."""

    version: str
    names: tuple[str, ...]  # none: runtime text alone
    size: tuple[int, int]  # height, width; of a file that takes any, the default
    outputs: Outputs
    input: Input
    text: Text
    text_width: int
    weights: Weights
    multiple: int | None = None  # that height and width must be a multiple of; None: `size` is the only one
    strides: tuple[int, ...] = (8, 16, 32)
    nms: Selection | None = None  # with the outputs `nms`; its `candidates` is not the file's
    recipe: Mapping[str, Any] | None = None  # QuantRecipe.as_plain(); None: in floats
    target: str | None = None
    cpu: str | None = None

    def as_strings(self) -> dict[str, str]:
        """The metadata to write, the prefix in each key."""
        size: object = list(self.size) if self.multiple is None else {"multiple": self.multiple, "default": self.size[0]}
        strings: dict[str, str | None] = {
            "format": FORMAT,
            "version": self.version,
            "names": json.dumps(list(self.names)),
            "strides": json.dumps(list(self.strides)),
            "size": json.dumps(size),
            "outputs": self.outputs,
            "nms": None if self.nms is None else json.dumps({"conf": self.nms.conf, "iou": self.nms.iou, "max": self.nms.max}),
            "input": self.input,
            "text": self.text,
            "text_width": str(self.text_width),
            "weights": self.weights,
            "recipe": None if self.recipe is None else json.dumps(self.recipe),
            "target": self.target,
            "cpu": self.cpu,
        }
        return {f"{PREFIX}{key}": value for key, value in strings.items() if value is not None}

    @classmethod
    def read(cls, strings: Mapping[str, str], where: object) -> "Metadata":
        """The values of a file's metadata; a UserError says what is missing or cannot be."""
        given = _Strings(strings, where)
        if given.optional("format") is None:
            raise UserError(
                f"is an ONNX file that crqat-fx did not write: its metadata lacks {PREFIX}format",
                where=where,
                remedy="make one with `crqat-fx export`, from the checkpoint or the prepared model",
            )
        if given.required("format") != FORMAT:
            told = f"{given.required('format')!r:.20} (crqat-fx {given.optional('version')!r:.20})"
            raise UserError(f"is of format {told}, and this release reads {FORMAT!r}", where=where, remedy=f"update crqat-fx, or {_AGAIN}")
        text: Text = given.one_of("text", Text)
        outputs: Outputs = given.one_of("outputs", Outputs)
        size, multiple = _size(given)
        return cls(
            version=given.required("version"),
            names=_names(given, text),
            size=size,
            outputs=outputs,
            input=given.one_of("input", Input),
            text=text,
            text_width=given.whole("text_width", given.required("text_width")),
            weights=given.one_of("weights", Weights),
            multiple=multiple,
            strides=_strides(given),
            nms=_selection(given) if outputs == "nms" else None,
            recipe=_recipe(given),
            target=given.optional("target"),
            cpu=given.optional("cpu"),
        )


class _Strings:
    """Metadata by key, and the errors that name the key."""

    def __init__(self, strings: Mapping[str, str], where: object) -> None:
        self._strings = strings
        self._where = where

    def optional(self, key: str) -> str | None:
        return self._strings.get(f"{PREFIX}{key}")

    def required(self, key: str) -> str:
        value = self.optional(key)
        if value is None:
            raise UserError(f"its metadata lacks {PREFIX}{key}", where=self._where, remedy=_AGAIN)
        return value

    def one_of(self, key: str, choices: Any) -> Any:
        value = self.required(key)
        if value not in get_args(choices):
            raise self.wrong(key, value, f"one of {', '.join(get_args(choices))}")
        return value

    def whole(self, key: str, text: str) -> int:
        if not (text.isascii() and text.isdecimal() and 0 < len(text) < 10 and int(text) > 0):
            raise self.wrong(key, text, "a whole number above 0")
        return int(text)

    def parsed(self, key: str) -> Any:
        text = self.required(key)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.wrong(key, text, "JSON") from error

    def wrong(self, key: str, value: object, wanted: str) -> UserError:
        return UserError(f"its metadata {PREFIX}{key} is {str(value)[:60]!r}, not {wanted}", where=self._where, remedy=_AGAIN)

    def names(self, listed: list[Any]) -> tuple[str, ...]:
        return checked_names(listed, f"{self._where}: {PREFIX}names")


def _names(given: _Strings, text: Text) -> tuple[str, ...]:
    if text == "runtime" and given.optional("names") is None:
        return ()
    listed = given.parsed("names")
    if not isinstance(listed, list):
        raise given.wrong("names", listed, "a list of names")
    return () if text == "runtime" and not listed else given.names(listed)


def _size(given: _Strings) -> tuple[tuple[int, int], int | None]:
    size = given.parsed("size")
    if isinstance(size, list) and len(size) == 2 and all(_is_size(side, STEP) for side in size):
        return (size[0], size[1]), None
    if isinstance(size, dict) and size.keys() == {"multiple", "default"}:
        multiple, default = size["multiple"], size["default"]
        if _is_size(multiple, STEP) and _is_size(default, multiple):
            return (default, default), multiple
    wanted = f'[height, width] or {{"multiple": 32, "default": 640}}, each a multiple of {STEP} up to {LARGEST}'
    raise given.wrong("size", size, wanted)


def _is_size(value: object, multiple: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and STEP <= value <= LARGEST and value % multiple == 0


def _strides(given: _Strings) -> tuple[int, ...]:
    strides = given.parsed("strides")
    listed = strides if isinstance(strides, list) and 0 < len(strides) <= _MOST_STRIDES else []
    if not listed or not all(isinstance(stride, int) and not isinstance(stride, bool) and stride > 0 for stride in listed):
        raise given.wrong("strides", strides, "a list of whole numbers above 0")
    if any(STEP % stride for stride in listed) or sorted(set(listed)) != listed:
        raise given.wrong("strides", strides, f"divisors of {STEP}, finest first")
    return tuple(listed)


def _selection(given: _Strings) -> Selection:
    kept = given.parsed("nms")
    wanted = 'such as {"conf": 0.25, "iou": 0.7, "max": 300}'
    if not isinstance(kept, dict) or kept.keys() != {"conf", "iou", "max"} or isinstance(kept["max"], bool):
        raise given.wrong("nms", kept, wanted)
    if not isinstance(kept["max"], int) or not all(isinstance(kept[name], int | float) for name in ("conf", "iou")):
        raise given.wrong("nms", kept, wanted)
    try:
        return Selection(conf=float(kept["conf"]), iou=float(kept["iou"]), max=kept["max"])
    except (UserError, OverflowError) as error:
        raise given.wrong("nms", kept, wanted) from error


def _recipe(given: _Strings) -> Mapping[str, Any] | None:
    if given.optional("recipe") is None:
        return None
    recipe = given.parsed("recipe")
    if not isinstance(recipe, dict):
        raise given.wrong("recipe", recipe, "a recipe")
    return recipe
