"""Reads a file of `torch.save` as plain data, without running any of it.

    archive    a zip of stored entries: one pickle, one entry a storage
    contents   the pickle as dicts, lists, strings and numbers, `StoredTensor`s, and `Inert` stand-ins for everybody else's objects
    tensor     one `StoredTensor` read from its entry

A pickle is a program. Here its instructions are decoded by `pickletools` and followed by an interpreter that imports nothing, looks
nothing up and calls nothing: a global is only a `Name`, and constructing an object only records what it would have been made of. So a
file can at worst waste time and memory, and both are bounded by its size. Which names may be mentioned at all is an allow-list.
"""

import pickletools
import stat
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path

import torch
from torch import Tensor

from crqat_fx.errors import UserError

AGAIN = "get it again from where it was published"
MAX_INSTRUCTIONS = 2_000_000  # a training file of the largest model, optimizer and averages included, has about 200,000
MAX_DIMENSIONS = 16
MAX_KEY = 4096  # characters of a key, or of a global's name: comparing them is not free
HASHED_APART = 2**60  # numbers below it do not collide in a dict; beyond it, any number of them can be made to


@dataclass(frozen=True)
class Name:
    """A global that the pickle mentions: never imported, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{_SPELLINGS.get(self.module, self.module)}.{self.name}")


@dataclass(eq=False)
class Inert:
    """An object that was not made: what it would have been made of."""

    kind: Name
    arguments: tuple[object, ...]
    state: object = None


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: torch.dtype
    length: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that is still in the file."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def shown(text: str) -> str:
    """Text from a file as a message may show it: printable and short."""
    clean = "".join(character if character.isprintable() else "?" for character in text[:81])
    return clean if len(clean) <= 80 else f"{clean[:77]}..."


# --- what a pickle may mention ---

_SPELLINGS = {"__builtin__": "builtins", "commands": "subprocess", "copy_reg": "copyreg", "posix": "os", "nt": "os"}  # as users know them

_PACKAGES = ("ultralytics", "mmengine", "mmcv", "mmdet", "mmyolo", "yolo_world", "clip", "torch.nn", "torchvision.transforms")

_DTYPES = {
    Name("torch", f"{kind}Storage"): dtype
    for kind, dtype in {
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Double": torch.float64,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}

_INERT = frozenset(
    Name(module, name)
    for modules, names in (
        ("__builtin__ builtins", "bool bytearray bytes complex dict float frozenset int list object range slice str tuple"),
        ("_codecs", "encode"),
        ("argparse", "Namespace"),
        ("collections", "Counter defaultdict deque"),
        ("datetime", "date datetime time timedelta timezone"),
        ("numpy", "dtype ndarray"),
        ("numpy.core.multiarray numpy._core.multiarray", "_reconstruct scalar"),
        ("pathlib pathlib._local", "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"),
        ("torch", "Size device " + " ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES.values())),
        ("types", "SimpleNamespace"),
    )
    for module in modules.split()
    for name in names.split()
)


def _from_package(name: Name) -> bool:
    return any(name.module == package or name.module.startswith(f"{package}.") for package in _PACKAGES)


def _admitted(name: Name) -> bool:
    if not all(part.isidentifier() for part in (*name.module.split("."), name.name)) or name.name.startswith("__"):
        return False
    return name in _BUILDERS or name in _INERT or name in _DTYPES or _from_package(name)


# --- what constructing means: the few names whose objects are data ---


class _MalformedError(Exception):
    """The pickle breaks its own rules, or is not one that torch.save writes."""


class _RefusedError(Exception):
    """The pickle mentions something that it may not."""


def _ordered_dict(arguments: tuple[object, ...]) -> object:
    if arguments:
        raise _MalformedError("an OrderedDict made from arguments")
    return {}


def _set(arguments: tuple[object, ...]) -> object:
    if len(arguments) != 1 or not isinstance(arguments[0], list):
        raise _MalformedError("a set made from something else than a list")
    return {_key(item) for item in arguments[0]}


def _tensor(arguments: tuple[object, ...]) -> object:
    if len(arguments) not in (6, 7):
        raise _MalformedError("a tensor with too few or too many arguments")
    storage, offset, size, stride = arguments[:4]
    if isinstance(size, Inert) and size.kind == Name("torch", "Size") and len(size.arguments) == 1:
        size = size.arguments[0]
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise _MalformedError("a tensor without storage, size or stride")
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise _MalformedError("a tensor whose size and stride make no shape")
    numbers = tuple(_count(number) for number in (offset, *size, *stride))
    return StoredTensor(storage, numbers[0], numbers[1 : 1 + len(size)], numbers[1 + len(size) :])


def _parameter(arguments: tuple[object, ...]) -> object:
    if not arguments or not isinstance(arguments[0], StoredTensor):
        raise _MalformedError("a parameter without a tensor")
    return arguments[0]


def _attribute(arguments: tuple[object, ...]) -> object:
    """`getattr` as files hold it, for a method of a class or object that is inert itself. Anything else is an attempt at something."""
    match arguments:
        case ((Name() as owner) | Inert(kind=owner), str(attribute)) if (
            _from_package(owner) and attribute.isidentifier() and not attribute.startswith("_")
        ):
            return Inert(_GETATTR, arguments)
    raise _RefusedError(str(_GETATTR))


_GETATTR = Name("builtins", "getattr")
_BUILDERS: dict[Name, Callable[[tuple[object, ...]], object]] = {
    Name("collections", "OrderedDict"): _ordered_dict,
    Name("__builtin__", "set"): _set,
    Name("builtins", "set"): _set,
    Name("__builtin__", "getattr"): _attribute,
    _GETATTR: _attribute,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _MalformedError("a tensor whose size, stride or offset is no size")
    return value


def _key(value: object) -> object:
    """A key that is hashed and compared in no time: nested tuples may run out of stack, and keys of one hash take quadratic time."""
    if isinstance(value, int | float) and not -HASHED_APART < value < HASHED_APART:
        raise _MalformedError("a key beyond all counting")
    if isinstance(value, str | bytes) and len(value) > MAX_KEY:
        raise _MalformedError(f"a key of more than {MAX_KEY:,} characters")
    if value is None or isinstance(value, str | int | float | bytes | Name | Inert):
        return value
    raise _MalformedError(f"a {type(value).__name__} as a key")


# --- the interpreter ---

_LITERALS = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], object]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Interpreter:
    """The pickle machine: a stack, the stacks below its marks, and the memo."""

    def __init__(self) -> None:
        self.stack: list[object] = []
        self.below: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.copied = 0  # items of lists that sets were made from: one list may be named again and again

    def run(self, pickle: bytes) -> object:
        for index, (opcode, argument, _) in enumerate(pickletools.genops(BytesIO(pickle))):
            if index >= MAX_INSTRUCTIONS:
                raise _MalformedError(f"more than {MAX_INSTRUCTIONS:,} instructions")
            self.step(opcode.name, argument)
        if len(self.stack) != 1 or self.below:
            raise _MalformedError("a stack that does not come out even")
        return self.stack[0]

    def step(self, opcode: str, argument: object) -> None:
        if opcode in _LITERALS:
            self.push(argument)
        elif opcode in _CONSTANTS:
            self.push(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            self.push(_EMPTY[opcode]())
        elif opcode in _TUPLES:
            self.push(tuple(reversed([self.pop() for _ in range(_TUPLES[opcode])])))
        else:
            self.act(opcode, argument)

    def act(self, opcode: str, argument: object) -> None:
        match opcode:
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                index = argument if isinstance(argument, int) else len(self.memo)
                self.memo[index] = self.top()
            case "BINGET" | "LONG_BINGET":
                if not isinstance(argument, int) or argument not in self.memo:
                    raise _MalformedError("a reference to what was never stored")
                self.push(self.memo[argument])
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                self.push(tuple(self.marked()))
            case "FROZENSET":
                self.push(frozenset(_key(item) for item in self.marked()))
            case "APPEND":
                self.extend([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self.extend(self.marked())
            case "SETITEM":
                value = self.pop()
                self.update([self.pop(), value])
            case "SETITEMS":
                self.update(self.marked())
            case "GLOBAL":
                module, _, name = str(argument).partition(" ")
                self.mention(module, name)
            case "STACK_GLOBAL":
                popped = self.pop()
                self.mention(self.pop(), popped)
            case "REDUCE" | "NEWOBJ":
                arguments = self.pop()
                self.construct(self.pop(), arguments)
            case "NEWOBJ_EX":
                keywords, arguments = self.pop(), self.pop()
                if not isinstance(arguments, tuple):
                    raise _MalformedError("an object made from something else than arguments")
                self.construct(self.pop(), (*arguments, keywords))
            case "BUILD":
                state, built = self.pop(), self.top()
                if isinstance(built, Inert):
                    built.state = state
                elif not isinstance(built, dict):  # a dict of ours stands for an OrderedDict: its attributes are of no use
                    raise _MalformedError(f"a state for a {type(built).__name__}")
            case "BINPERSID":
                self.push(_storage(self.pop()))
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise _MalformedError(f"the instruction {opcode}, which torch.save never writes")

    def push(self, item: object) -> None:
        self.stack.append(item)

    def top(self) -> object:
        if not self.stack:
            raise _MalformedError("an empty stack")
        return self.stack[-1]

    def pop(self) -> object:
        item = self.top()
        self.stack.pop()
        return item

    def marked(self) -> list[object]:
        if not self.below:
            raise _MalformedError("a missing mark")
        items, self.stack = self.stack, self.below.pop()
        return items

    def extend(self, items: list[object]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(_key(item) for item in items)
        elif not isinstance(target, Inert):
            raise _MalformedError(f"items for a {type(target).__name__}")

    def update(self, items: list[object]) -> None:
        target = self.top()
        if len(items) % 2:
            raise _MalformedError("a key without a value")
        if isinstance(target, dict):
            target.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
        elif not isinstance(target, Inert):
            raise _MalformedError(f"entries for a {type(target).__name__}")

    def mention(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _MalformedError("a global whose name is no text")
        if len(module) + len(name) > MAX_KEY:
            raise _MalformedError(f"a global whose name has more than {MAX_KEY:,} characters")
        mentioned = Name(module, name)
        if not _admitted(mentioned):
            raise _RefusedError(str(mentioned))
        self.push(mentioned)

    def construct(self, kind: object, arguments: object) -> None:
        if not isinstance(kind, Name) or not isinstance(arguments, tuple):
            raise _MalformedError("a call of something that is no name")
        if kind in _DTYPES:
            raise _MalformedError("a storage made by a call")
        builder = _BUILDERS.get(kind)
        if builder is _set and arguments and isinstance(arguments[0], list):
            self.copied += len(arguments[0])
            if self.copied > MAX_INSTRUCTIONS:
                raise _MalformedError(f"sets of more than {MAX_INSTRUCTIONS:,} items")
        self.push(Inert(kind, arguments) if builder is None else builder(arguments))


def _storage(identity: object) -> Storage:
    match identity:
        case ("storage", Name() as kind, str(key), str(), int(length)) if kind in _DTYPES and length >= 0:
            return Storage(key, _DTYPES[kind], length)
    raise _MalformedError("a reference that is no storage")


# --- the archive ---


class Archive:
    """An open file of torch.save: its `contents`, and its tensors one by one."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self._file = file
        self._entries = _entries(path, file)
        self._storages: dict[str, Tensor] = {}
        if any(name == "constants.pkl" or name.startswith("code/") for name in self._entries):
            raise UserError(
                "is a TorchScript program, not a checkpoint", where=path, remedy="give the checkpoint that it was exported from"
            )
        if "byteorder" in self._entries and self._read("byteorder") != sys.byteorder.encode():
            raise UserError(
                "was written on a machine of the other byte order", where=path, remedy="save it again on a machine like this one"
            )
        self.contents = self._unpickled()

    def _read(self, name: str) -> bytes:
        start, size = self._entries[name]
        self._file.seek(start)
        return self._file.read(size)

    def _unpickled(self) -> object:
        try:
            return _Interpreter().run(self._read("data.pkl"))
        except _RefusedError as error:
            raise UserError(
                f"was refused, and nothing in it was run: it asks for {error}, which no checkpoint needs",
                where=self.path,
                remedy="delete it, or save the weights again as a plain state dict where you trust it",
            ) from error
        except _MalformedError as error:
            raise UserError(f"is damaged or was tampered with: its pickle has {error}", where=self.path, remedy=AGAIN) from error
        except ValueError as error:  # from pickletools
            raise UserError(f"is damaged or was tampered with: {shown(str(error))}", where=self.path, remedy=AGAIN) from error

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor itself, in the type it is stored in. Several may share memory, as they did when they were saved."""
        storage = stored.storage
        if stored.size == (0,):
            return torch.empty(0, dtype=storage.dtype)
        last = stored.offset + sum((size - 1) * stride for size, stride in zip(stored.size, stored.stride, strict=True))
        count = 1
        for size in stored.size:
            count *= size
        if not count or last >= storage.length or count > storage.length:
            raise UserError("is damaged or was tampered with: a tensor reaches past its storage", where=self.path, remedy=AGAIN)
        return self._stored(storage).as_strided(stored.size, stored.stride, stored.offset)

    def _stored(self, storage: Storage) -> Tensor:
        name = f"data/{storage.key}"
        if name not in self._entries:
            raise UserError(f"is damaged: the storage {shown(name)} is missing", where=self.path, remedy=AGAIN)
        start, size = self._entries[name]
        if size != storage.length * storage.dtype.itemsize:
            raise UserError(
                f"is damaged: the storage {shown(name)} has {size:,} bytes, not as many as announced", where=self.path, remedy=AGAIN
            )
        if name not in self._storages:
            content = torch.empty(size, dtype=torch.uint8)
            self._file.seek(start)
            if size and self._file.readinto(content.numpy().data) != size:
                raise UserError("was cut short while it was read", where=self.path, remedy="try again when nothing writes to it")
            self._storages[name] = content
        return self._storages[name].view(storage.dtype)


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """The archive at `path`, every guard passed; closed when the block ends."""
    readable = "name a file that you may read"
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError("is a folder, not a checkpoint", where=path, remedy="name the .pt or .pth file in it")
        if not stat.S_ISREG(status.st_mode):
            raise UserError("is no regular file", where=path, remedy="copy what it gives into a file first")
        if not status.st_size:
            raise UserError("is empty", where=path, remedy=AGAIN)
        with path.open("rb") as file:
            yield Archive(path, file)
    except FileNotFoundError as error:
        raise UserError("does not exist", where=path, remedy="name a checkpoint, or check the spelling") from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=path, remedy=readable) from error


def _entries(path: Path, file: BufferedReader) -> dict[str, tuple[int, int]]:
    """Start and size of each entry, by its name below the archive's one folder."""
    head = file.read(512)
    if not head.startswith(b"PK\x03\x04"):
        raise UserError(_other_format(head), where=path, remedy="give a .pt or .pth file as torch.save writes it")
    try:
        with zipfile.ZipFile(file) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, ArithmeticError, EOFError, struct.error) as error:
        raise UserError("is cut short or damaged: it begins as a zip archive but has no valid end", where=path, remedy=AGAIN) from error
    pickles = [info.orig_filename for info in infos if info.orig_filename.partition("/")[2] == "data.pkl"]
    if not pickles:
        raise UserError("is a zip archive, but not one of torch.save", where=path, remedy="give a .pt or .pth file")
    root = pickles[0].partition("/")[0]
    entries: dict[str, tuple[int, int]] = {}
    free = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        folder, *parts = info.orig_filename.split("/")
        name = "/".join(parts)
        wrong = None
        if folder != root or not parts or any(part in ("", ".", "..") or set(part) & set("\\:\0") for part in parts):
            wrong = "lies outside the archive's folder"
        elif info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            wrong = f"is compressed ({info.compress_size:,} bytes that unpack to {info.file_size:,}), which torch.save never does"
        elif info.flag_bits & 1:
            wrong = "is encrypted"
        elif name in entries:
            wrong = "is there twice"
        start = _start_of_entry(file, info) if wrong is None else None
        if wrong is None and (start is None or info.header_offset < free or start + info.file_size > directory):
            wrong = "does not lie within the file, or overlaps another"
        if wrong is not None or start is None:
            raise UserError(f"was refused: its entry {shown(info.orig_filename)} {wrong}", where=path, remedy=AGAIN)
        entries[name] = start, info.file_size
        free = start + info.file_size
    return entries


def _start_of_entry(file: BufferedReader, info: zipfile.ZipInfo) -> int | None:
    """Where an entry's bytes begin: after its own header, whose length the directory does not tell."""
    if info.header_offset < 0:
        return None
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) != 30 or not header.startswith(b"PK\x03\x04"):
        return None
    name_length, extra_length = struct.unpack("<HH", header[26:])
    return info.header_offset + 30 + int(name_length) + int(extra_length)


def _other_format(head: bytes) -> str:
    """What a file is that does not begin as a zip archive."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file it points to"
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        return "is in a format of torch before 1.6 or a bare pickle, neither of which is read"
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < 512 else "ignore")
    except UnicodeDecodeError:
        return "is no checkpoint"
    return "is a text file, not a checkpoint" if all(c.isprintable() or c.isspace() for c in text) else "is no checkpoint"
