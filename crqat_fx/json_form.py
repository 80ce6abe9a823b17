"""Frozen dataclasses as plain values that JSON writes, and back: every value checked against the type of its field.

Reading is strict, since a file may come from anywhere: an unknown field, a missing one, a value of another type and a number that is not
finite are refused, with where they stand.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from crqat_fx.errors import UserError
from crqat_fx.files import written

T = TypeVar("T")


def save_json(value: Any, path: str | Path) -> None:
    """Writes a dataclass; one that holds a number that is not finite is a mistake of the caller's."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(value), default=str, allow_nan=False, indent=1), encoding="utf-8")


def load_json(kind: type[T], path: str | Path) -> T:
    remedy = "give a file that crqat-fx wrote"
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
        found: T = from_plain(kind, read)
        return found
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path, remedy=remedy) from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"is no {kind.__name__.lower()} ({str(error)[:200]})", where=path, remedy=remedy) from error


def from_plain(kind: Any, value: Any, at: str = "") -> Any:
    """The value as `kind`; ValueError with the place in it where it is none."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, at)
    if origin is typing.Literal:
        return value if value in arguments and type(value) in {type(each) for each in arguments} else _refuse(kind, value, at)
    if dataclasses.is_dataclass(origin):
        return _dataclass(typing.cast(type, origin), value, at)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = (arguments[0],) * len(value) if arguments[1:] == (Ellipsis,) else arguments
        if len(kinds) != len(value):
            _refuse(kind, value, at)
        return tuple(from_plain(each, one, f"{at}[{number}]") for number, (each, one) in enumerate(zip(kinds, value, strict=True)))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {from_plain(arguments[0], name, at): from_plain(arguments[1], each, f"{at}.{name}") for name, each in value.items()}
    if origin is Path and isinstance(value, str):
        return Path(value)
    if origin is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if origin in (int, str, bool, type(None)) and type(value) is origin:
        return value if origin is not int or -(2**63) <= value < 2**63 else _refuse(kind, value, at)
    return _refuse(kind, value, at)


def _one_of(kinds: tuple[Any, ...], value: Any, at: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    refused = ""
    for kind in (each for each in kinds if each is not type(None)):  # what is wrong with it is not that it is there
        try:
            return from_plain(kind, value, at)
        except ValueError as error:
            refused = str(error)
    raise ValueError(refused)


def _dataclass(kind: type, value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        return _refuse(kind, value, at)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in fields:
            raise ValueError(f"{at or 'it'} has an unknown field {name[:40]!r}")
    needed = [
        name for name, field in fields.items() if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in needed:
        if name not in value:
            raise ValueError(f"{at or 'it'} has no {name}")
    return kind(**{name: from_plain(hints[name], each, f"{at}.{name}".removeprefix(".")) for name, each in value.items()})


def _refuse(kind: Any, value: Any, at: str) -> typing.NoReturn:
    raise ValueError(f"{at or 'it'} is {value!r:.40}, not {getattr(kind, '__name__', kind)}")
