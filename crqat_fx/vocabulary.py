"""A vocabulary: the names a detector looks for and an embedding of each, in one `.npz` of two plain arrays.

    names        unicode [N], no two alike
    embeddings   float [N, D], rows of length 1 (others are normalised as they are read, and a warning says so)

A names file is what embeddings are computed from: text, one name a line, or JSON, the layout of YOLO-World's class texts. The text encoder
sees a name's `prompt`: YOLO-World's rule is the bare name, first synonym.
"""

import difflib
import io
import json
import logging
import math
import sys
import tokenize
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crqat_fx.errors import UserError
from crqat_fx.files import written

logger = logging.getLogger(__name__)

NAMES_BYTES = 2**26  # a names file of more is no names file
PLAIN_BYTES = 2**24  # what an array may unpack to whatever the file's size; beyond it, INFLATION times the file's size
INFLATION = 100
ROUNDING = 1e-6  # rows off by no more are of length 1
HALF_ROUNDING = 1e-2  # rows off by no more were of length 1 before someone stored them in 16 bits
SMALLEST_NORM = 1e-12
REMAKE = "make the file with `crqat-fx embed names.txt --out vocabulary.npz`"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Names and their embeddings, row for row. Rows that are not of length 1 are normalised; everything else wrong is a UserError."""

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]

    def __post_init__(self) -> None:
        names, embeddings = _checked(self.names, self.embeddings, "vocabulary")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "embeddings", embeddings)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def width(self) -> int:
        return int(self.embeddings.shape[1])

    def check_width(self, width: int, where: object) -> None:
        """A UserError where a model that reads embeddings of `width` cannot take these."""
        if self.width != width:
            remedy = "compute them with the text encoder that the model was trained with: `crqat-fx embed`"
            raise UserError(f"embeddings are {self.width} wide and the model reads {width}", where=where, remedy=remedy)

    def select(self, names: Iterable[str]) -> "Vocabulary":
        """The vocabulary of these names, in their order."""
        wanted = tuple(names)
        return Vocabulary(wanted, self.embeddings[rows_of(wanted, self.names)])

    def save(self, path: str | Path) -> None:
        """Writes the `.npz`, whole or not at all; the same vocabulary always gives the same bytes."""
        with written(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name, array in (("names", np.array(self.names)), ("embeddings", self.embeddings.astype("<f4"))):
                content = io.BytesIO()
                np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
                entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980 unless told otherwise
                entry.create_system = 3  # or it would tell the operating system it was written on
                archive.writestr(entry, content.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads a `.npz` that nobody vouches for: nothing in it is executed, nothing is unpacked before its size is known to be sound."""
        source = Path(path)
        try:
            if not source.is_file():
                what = "is a folder, not a vocabulary" if source.is_dir() else "no such file"
                raise UserError(what, where=source, remedy="name a vocabulary's .npz file")
            if not zipfile.is_zipfile(source):
                raise UserError("is no vocabulary: not an .npz file", where=source, remedy=REMAKE)
            with zipfile.ZipFile(source) as archive:
                allowed = max(PLAIN_BYTES, INFLATION * source.stat().st_size)
                names = _read_array(archive, "names", 1, "U", allowed, source)
                embeddings = _read_array(archive, "embeddings", 2, "f", allowed, source)
            listed = names.tolist()
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror or error})", where=source, remedy="check the file") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:
            raise UserError(f"is a damaged .npz file ({error})", where=source, remedy=REMAKE) from error
        return cls(*_checked(listed, embeddings, source))


def rows_of(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """Where among `names` each of the wanted stands; a UserError names one that is not there, and what is close to it."""
    rows = {name: row for row, name in enumerate(names)}
    for name in wanted:
        if name not in rows:
            close = difflib.get_close_matches(name, names, n=3)
            remedy = f"close to it are {', '.join(map(repr, close))}" if close else "choose among its names, or embed the name"
            raise UserError(f"{name!r} is not among the {len(names)} names", where="vocabulary", remedy=remedy)
    return [rows[name] for name in wanted]


def _read_array(archive: zipfile.ZipFile, name: str, dimensions: int, kind: str, allowed: int, path: Path) -> NDArray[Any]:
    """One array of the archive, its header checked against the entry's size and against `allowed` bytes before any of it is unpacked."""
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError:
        held = ", ".join(map(repr, archive.namelist()[:5])) or "nothing"
        raise UserError(f"is no vocabulary: no array `{name}`, it holds {held}", where=path, remedy=REMAKE) from None
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"`{name}` is compressed in a way numpy does not write", where=path, remedy=REMAKE)
    with archive.open(entry) as stream:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise UserError(f"`{name}` is an array of format {version}, not 1.0 or 2.0", where=path, remedy=REMAKE)
        shape, fortran, dtype = readers[version](stream)
        if dtype.kind == "O":
            raise UserError(
                f"`{name}` is pickled, and unpickling can run code",
                where=path,
                remedy="save it as a plain array, `np.array(names, dtype=str)`",
            )
        if dtype.kind != kind:
            wanted = {"U": "unicode", "f": "floating-point"}[kind]
            raise UserError(f"`{name}` is of type {dtype}, not {wanted}", where=path, remedy=REMAKE)
        if len(shape) != dimensions or min(shape) < 1:
            wanted = {1: "[names]", 2: "[names, width]"}[dimensions]
            raise UserError(f"`{name}` is of shape {list(shape)}, not {wanted}", where=path, remedy=REMAKE)
        size = math.prod(shape) * dtype.itemsize
        if stream.tell() + size != entry.file_size:
            raise UserError(
                f"`{name}` declares {size} bytes and holds {entry.file_size - stream.tell()}: the file is damaged",
                where=path,
                remedy=REMAKE,
            )
        if size > allowed:
            raise UserError(
                f"`{name}` would unpack to {size} bytes from a file of {path.stat().st_size}", where=path, remedy="give a file you trust"
            )
        content = stream.read(size)
    if len(content) != size:
        raise UserError(f"`{name}` ends after {len(content)} of {size} bytes: the file is damaged", where=path, remedy=REMAKE)
    if kind == "U" and np.frombuffer(content, np.dtype(np.uint32).newbyteorder(dtype.byteorder)).max(initial=0) > sys.maxunicode:
        # numpy would make strings of them
        raise UserError(f"`{name}` holds characters that do not exist: the file is damaged", where=path, remedy=REMAKE)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _checked(names: Sequence[str], embeddings: ArrayLike, where: object) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """The names as plain strings and the rows as float32 of length 1, or what is wrong with them."""
    listed = checked_names(names, where)
    rows = np.asarray(embeddings)
    if rows.ndim != 2 or rows.dtype.kind != "f" or rows.shape[1] < 1:
        raise UserError(
            f"embeddings are {rows.dtype} of shape {list(rows.shape)}", where=where, remedy="give floats of shape [names, width]"
        )
    if len(listed) != len(rows):
        raise UserError(f"{len(listed)} names and {len(rows)} embeddings", where=where, remedy="give one embedding a name")
    wide = rows.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(wide, axis=1)
    broken = np.flatnonzero(~np.isfinite(norms) | (norms < SMALLEST_NORM))
    if len(broken):
        fault = "not finite" if not np.isfinite(norms[broken[0]]) else "zero"
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UserError(f"the embedding of {listed[broken[0]]!r}{more} is {fault}", where=where, remedy="compute it again")
    error = np.abs(norms - 1)
    if error.max() > HALF_ROUNDING:
        logger.warning(
            "%s: %d of %d embeddings are not of length 1 (%.4g to %.4g): normalised",
            where, np.count_nonzero(error > HALF_ROUNDING), len(rows), norms.min(), norms.max(),
        )  # fmt: skip
    off = error > ROUNDING
    wide[off] /= norms[off, None]
    return listed, wide.astype(np.float32)


def checked_names(names: Sequence[str], where: object) -> tuple[str, ...]:
    """The names as plain strings: words, no control characters, no two alike."""
    if not len(names):
        raise UserError("holds no names", where=where, remedy="give at least one")
    for position, name in enumerate(names, 1):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"name {position} is {name!r}", where=where, remedy="give words")
        if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
            raise UserError(f"name {position}, {name[:60]!r}, holds a control character", where=where, remedy="remove it")
    if len(set(names)) != len(names):
        name = Counter(names).most_common(1)[0][0]
        positions = [str(position) for position, other in enumerate(names, 1) if other == name]
        raise UserError(f"{name!r} stands at {' and '.join(positions)}", where=where, remedy="give each name once")
    return tuple(str(name) for name in names)


# --- names files ---


def prompt(name: str) -> str:
    """What the text encoder reads for a name: the bare name, first synonym, as YOLO-World publishes its class texts.

    `monitor/tv` gives `monitor`; LVIS's `alarm_clock` gives `alarm clock` and its `bow_(weapon)` gives `bow`. Brackets without the
    underscore are the user's own words and stay.
    """
    first = name.split("/")[0].split("_(")[0].replace("_", " ").strip()
    return first or name


def read_names(path: str | Path) -> tuple[str, ...]:
    """The names in a names file, in order.

    Text: one name a line; blank lines and lines that begin with `#` are skipped; `a/b` is a name with a synonym.
    JSON: a list whose entries are names or lists of synonyms. A class goes by its first synonym; where two classes share it, each goes by
    all of its synonyms, joined by `/`: the published LVIS texts hold two times `bow`.
    """
    source = Path(path)
    try:
        if not source.is_file():
            what = "is a folder, not a names file" if source.is_dir() else "no such file"
            raise UserError(what, where=source, remedy="name a .txt or .json file")
        if source.stat().st_size > NAMES_BYTES:
            raise UserError(f"is larger than {NAMES_BYTES >> 20} MiB", where=source, remedy="give a file of names")
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("is not text in UTF-8", where=source, remedy="give one name a line") from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=source, remedy="check the file") from error
    names = _json_names(text, source) if source.suffix.lower() == ".json" else list(_text_names(text, source))
    return checked_names(names, source)


def _text_names(text: str, path: Path) -> Iterator[str]:
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        if "," in name:
            raise UserError(
                f"line {number} holds a comma: {name[:60]!r}",
                where=path,
                remedy="write one name a line, or names with commas as a JSON list",
            )
        if name in lines:
            raise UserError(f"{name!r} stands on lines {lines[name]} and {number}", where=path, remedy="give each name once")
        lines[name] = number
        yield name


def _json_names(text: str, path: Path) -> list[str]:
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"is no JSON ({error})", where=path, remedy='give a list such as ["cat", "dog"] or [["cat", "kitty"], ["dog"]]'
        ) from error
    if not isinstance(loaded, list):
        raise UserError(f"holds a {type(loaded).__name__}, not a list", where=path, remedy="give a list of names or of lists of synonyms")
    entries: list[list[str]] = []
    for position, entry in enumerate(loaded, 1):
        synonyms = [entry] if isinstance(entry, str) else entry
        if not isinstance(synonyms, list) or not synonyms or not all(isinstance(name, str) and name.strip() for name in synonyms):
            raise UserError(f"entry {position} is {str(entry)[:60]!r}", where=path, remedy="give a name or a list of synonyms")
        entries.append([name.strip() for name in synonyms])
    shared = Counter(synonyms[0] for synonyms in entries)
    return [synonyms[0] if shared[synonyms[0]] == 1 else "/".join(synonyms) for synonyms in entries]
