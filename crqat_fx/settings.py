"""Where a command's settings come from: flag, then `--config` file, then what the input file carries, then the default.

A command's settings are a frozen dataclass whose fields hold the defaults. `resolve` fills it and remembers where each value came from;
`write` puts the outcome beside the result, so that a run can be read and repeated.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from crqat_fx.errors import UserError
from crqat_fx.files import written

S = TypeVar("S")


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Settings, and for each field where its value came from: `flag`, `config`, `file` or `default`."""

    values: S
    origins: Mapping[str, str]

    def write(self, path: Path, command: str = "") -> None:
        """Writes the settings as YAML that `--config` reads again, each value's origin behind it, what was run (`command`) above."""
        assert dataclasses.is_dataclass(self.values)
        assert not isinstance(self.values, type)
        lines = [f"# {line}" for line in command.splitlines()]
        for name, value in dataclasses.asdict(self.values).items():
            text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000).removesuffix("...\n").strip()
            lines.append(f"{name}: {text}  # {self.origins[name]}")
        with written(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")

    def as_json(self) -> dict[str, dict[str, Any]]:
        """Each setting with its value and where that came from."""
        values = dataclasses.asdict(typing.cast(Any, self.values))
        return {name: {"value": _plain(value), "from": self.origins[name]} for name, value in values.items()}


def resolve(
    settings: type[S], flags: Mapping[str, Any], config: Path | None = None, carried: Mapping[str, Any] | None = None
) -> Resolved[S]:
    """Fills `settings`, a dataclass type. A flag or a carried value of None counts as not given; an unknown key is refused by name."""
    assert dataclasses.is_dataclass(settings)
    fields = {field.name: field for field in dataclasses.fields(settings)}
    hints = typing.get_type_hints(settings)
    from_config = read_config(config) if config is not None else {}
    unknown = sorted(set(from_config) - set(fields))
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r}", where=config, remedy=f"known here are {', '.join(fields)}")
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name in fields:
        for origin, source in (("flag", flags), ("config", from_config), ("file", carried or {})):
            if source.get(name) is not None:
                where = config if origin == "config" else f"--{name.replace('_', '-')}"
                values[name], origins[name] = _converted(name, source[name], hints[name], where), origin
                break
        else:
            origins[name] = "default"
    return Resolved(typing.cast(Any, settings)(**values), origins)


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"is no readable YAML ({reason})", where=path, remedy="give a file of `name: value` lines") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError("is not a mapping of settings", where=path, remedy="give a file of `name: value` lines")
    return {key.replace("-", "_"): value for key, value in loaded.items()}


def _converted(name: str, value: Any, hint: Any, where: object) -> Any:
    """The value as the field's type, or a UserError: YAML and flags both come through here, so a wrong type is caught in one place."""
    choices = _choices(hint)
    for choice in choices:
        origin = typing.get_origin(choice) or choice
        if origin is typing.Literal and value in typing.get_args(choice):
            return value
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(value)
        if origin is Path and isinstance(value, str | Path):
            return Path(value)
        if isinstance(origin, type) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
    literals = [str(word) for word in _words(hint)]
    kinds = [getattr(choice, "__name__", str(choice)) for choice in choices if choice is not type(None)]
    wanted = f"one of {', '.join(literals)}" if literals else " or ".join(kinds)
    raise UserError(f"{name} is {value!r}", where=where, remedy=f"give {wanted}")


def refuse_other_words(settings: Any) -> None:
    """Of a field that takes one of some words, any other: settings that a program makes do not come through `resolve`."""
    for name, hint in typing.get_type_hints(type(settings)).items():
        words, value = _words(hint), getattr(settings, name)
        if words and value not in words:
            raise UserError(f"{name} is {value!r}", remedy=f"give one of {', '.join(map(str, words))}")


def _words(hint: Any) -> tuple[Any, ...]:
    """Those of a Literal, alone or in a union."""
    return tuple(word for choice in _choices(hint) if typing.get_origin(choice) is typing.Literal for word in typing.get_args(choice))


def _choices(hint: Any) -> tuple[Any, ...]:
    """Those of a union; of another type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _plain(value: Any) -> Any:
    """The value as YAML can write it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
