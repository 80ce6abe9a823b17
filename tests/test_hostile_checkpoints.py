"""Files that are no checkpoint, or worse: each is refused in one line that says what, where and what to do, and nothing in it is run.

`python tests/test_hostile_checkpoints.py` writes the table of files and messages.
"""

import importlib
import math
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import NAMES, Call, archive, embeddings, name, official, pickled, text, weights, write_foreign_files
from torch import Tensor
from torch.storage import TypedStorage

from crqat_fx import unpickle
from crqat_fx.checkpoint import read_checkpoint, write_checkpoint
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import config_for
from crqat_fx.vocabulary import Vocabulary

STEM = "backbone.image_model.stem.conv.weight"
COUNTER = "backbone.image_model.stem.bn.num_batches_tracked"
VARIANCE = "backbone.image_model.stem.bn.running_var"
GATE = "neck.top_down_layers.0.attn_block"
CONTRAST = "bbox_head.head_module.cls_contrasts.0"

Build = Callable[[Path], Path]


@dataclass(frozen=True)
class Hostile:
    """A file made by `build` in a folder, and what its message has to say."""

    title: str
    build: Build
    says: str


# --- pickles that run code where they are unpickled ---


def canary(folder: Path) -> Path:
    """What a file's code makes if it runs."""
    return folder / "canary"


def trap(folder: Path) -> None:
    """A module that can be imported: importing it makes the canary, and so does giving its object a state."""
    code = f"touch = lambda *_: open({str(canary(folder))!r}, 'w')\nclass Trap:\n    __setstate__ = touch\ntouch()\n"
    (folder / "canary_trap.py").write_text(code)


def calls(function: Callable[..., object], *arguments: object) -> Build:
    """Sound weights beside a `meta` that calls a function; CANARY in an argument becomes the canary's path."""

    def build(folder: Path) -> Path:
        filled = [item.replace("CANARY", str(canary(folder))) if isinstance(item, str) else item for item in arguments]
        return official(folder / "model.pth", weights("pico", 2), meta={"hook": Call(function, *filled)})

    return build


def calls_within(folder: Path) -> Path:
    inner = Call(os.system, f"echo > {canary(folder)}")
    return official(folder / "model.pth", weights("pico", 2), meta=Call(list, [OrderedDict(a={"b": Call(tuple, [inner])})]))


def calls_hub(folder: Path) -> Path:
    (folder / "hubconf.py").write_text(f"open({str(canary(folder))!r}, 'w')\ndef model(): ...\n")
    return official(folder / "model.pth", weights("pico", 2), meta=Call(torch.hub._load_local, str(folder), "model"))


def chains_attributes(folder: Path) -> Path:
    """getattr(getattr(torch.nn.Module, "__init__"), "__globals__"): one step from a module's builtins, none of them named."""
    take = name("__builtin__", "getattr")
    inner = take + name("torch.nn", "Module") + text("__init__") + b"\x86R"
    return archive(folder / "model.pth", pickled(take, inner, text("__globals__"), b"\x86R"))


def sets_state(folder: Path) -> Path:
    trap(folder)
    return archive(folder / "model.pth", pickled(name("canary_trap", "Trap"), b")\x81}", text("a"), b"K\x01sb"))


def imports(folder: Path) -> Path:
    trap(folder)
    return archive(folder / "model.pth", pickled(name("canary_trap", "touch")))


def by_hand(*instructions: bytes) -> Build:
    return lambda folder: archive(folder / "model.pth", pickled(*instructions))


def takes(owner: bytes, attribute: str) -> Build:
    return by_hand(name("builtins", "getattr"), owner, text(attribute), b"\x86R")


MAKE_A_CANARY = [
    Hostile("calls os.system", calls(os.system, "echo > CANARY"), "os.system"),
    Hostile("calls builtins.eval", calls(eval, "open('CANARY', 'w')"), "builtins.eval"),
    Hostile("calls builtins.exec", calls(exec, "open('CANARY', 'w')"), "builtins.exec"),
    Hostile("calls io.open", calls(open, "CANARY", "w"), "io.open"),
    Hostile("calls torch.hub on a local folder", calls_hub, "torch.hub._load_local"),
    Hostile("nests a call in calls that are harmless", calls_within, "os.system"),
    Hostile("has a __setstate__ trap", sets_state, "canary_trap.Trap"),
    Hostile("imports a module for its side effect", imports, "canary_trap.touch"),
]

RUN_CODE = [
    Hostile("calls torch.hub.load", calls(torch.hub.load, "a/b", "c"), "torch.hub.load"),
    Hostile("calls subprocess.Popen", calls(subprocess.Popen, ["true"]), "subprocess.Popen"),
    Hostile("calls importlib.import_module", calls(importlib.import_module, "this"), "importlib.import_module"),
    Hostile("unpickles bytes within", calls(torch.storage._load_from_bytes, b"x"), "torch.storage._load_from_bytes"),
    Hostile("chains getattr", chains_attributes, "builtins.getattr"),
    Hostile("takes an attribute of a class of torch", takes(name("torch", "Size"), "count"), "builtins.getattr"),
    Hostile("takes a private attribute of a stand-in", takes(name("ultralytics", "nn"), "_modules"), "builtins.getattr"),
    Hostile("calls what getattr gave", by_hand(name("builtins", "getattr"), name("clip", "a"), text("b"), b"\x86R)R"), "no name"),
    Hostile("names os.system through torch.nn", by_hand(text("torch.nn"), text("modules.os.system"), b"\x93"), "modules.os.system"),
    Hostile("names a dunder of torch.nn", by_hand(name("torch.nn", "__builtins__")), "torch.nn.__builtins__"),
    Hostile("names a class of torch.jit", by_hand(name("torch.jit._script", "RecursiveScriptModule"), b")\x81}b"), "torch.jit._script"),
    Hostile("uses the extension registry", by_hand(b"\x82\x01"), "EXT1"),
    Hostile("calls by INST", by_hand(b"(", text("echo"), b"iposix\nsystem\n"), "INST"),
    Hostile("calls by OBJ", by_hand(b"(", name("torch.nn", "Module"), b"o"), "OBJ"),
    Hostile("smuggles escape codes into a name", by_hand(text("os\x1b[2J\n"), text("x"), b"\x93"), "os?[2J?.x"),
]

# --- pickles that break the rules ---


def with_stem(*parts: object) -> Build:
    """An official file whose stem is recorded with these in place of its offset, size and stride."""

    def build(folder: Path) -> Path:
        state = weights("pico", 2)
        stem = state[STEM]
        storage = TypedStorage(wrap_storage=stem.untyped_storage(), dtype=stem.dtype, _internal=True)
        recorded = (*parts, *(0, tuple(stem.shape), stem.stride())[len(parts) :])
        record = Call(torch._utils._rebuild_tensor_v2, storage, *recorded, False, OrderedDict())
        return official(folder / "model.pth", {**state, STEM: record})

    return build


def entries_changed(change: Callable[[dict[str, bytes]], object]) -> Build:
    """A sound official file whose entries are changed."""

    def build(folder: Path) -> Path:
        sound = official(folder / "archive", weights("pico", 2))
        with zipfile.ZipFile(sound) as file:
            entries = {item: file.read(item) for item in file.namelist() if item != "archive/version"}
        sound.unlink()
        change(entries)
        return archive(folder / "model.pth", entries.pop("archive/data.pkl"), entries)

    return build


STORAGE = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x01tQ"
TENSOR = name("torch._utils", "_rebuild_tensor_v2") + b"(" + STORAGE + b"K\x00K\x01\x85K\x01\x85\x89}tR"
COLLIDING = b"".join(b"\x8a\x0b" + (index * (2**61 - 1)).to_bytes(11, "little") + b"N" for index in range(1, 1000))
LIST_OF_A_THOUSAND = b"](" + b"N" * 1000 + b"e"
BREAK_RULES = [
    Hostile("keys whose hashes collide", by_hand(b"}(", COLLIDING, b"u"), "a key beyond all counting"),
    Hostile("items of a set whose hashes collide", by_hand(b"\x8f(", COLLIDING, b"\x90"), "a key beyond all counting"),
    Hostile("infinity as a key", by_hand(b"}G", struct.pack(">d", math.inf), b"Ns"), "a key beyond all counting"),
    Hostile("key of megabytes", by_hand(b"}", text("k" * 10**6), b"Ns"), "a key of more than 4,096 characters"),
    Hostile("global of megabytes", by_hand(name("torch.nn", "M" * 10**6)), "a global whose name has more than 4,096 characters"),
    Hostile(
        "one list made into sets over and over",
        by_hand(LIST_OF_A_THOUSAND, b"\x85q\x01", name("builtins", "set"), b"q\x02", b"h\x02h\x01R" * 2001),
        "sets of more than 2,000,000 items",
    ),
    Hostile("offset beyond the storage", with_stem(10**12), "reaches past its storage"),
    Hostile("stride beyond the storage", with_stem(0, (8, 3, 3, 3), (2**62, 9, 3, 1)), "reaches past its storage"),
    Hostile("terabytes from one number", with_stem(0, (8, 3, 2**20, 2**20), (0, 0, 0, 0)), "8, 3, 1048576, 1048576"),
    Hostile("negative offset", with_stem(-1), "no size"),
    Hostile("size in fractions", with_stem(0, (8.5, 3, 3, 3)), "no size"),
    Hostile("a thousand dimensions", with_stem(0, (1,) * 1000, (1,) * 1000), "no shape"),
    Hostile("storage that is not there", entries_changed(lambda entries: entries.pop("archive/data/0")), "data/0 is missing"),
    Hostile("storage too short", entries_changed(lambda entries: entries.update({"archive/data/0": b"1234"})), "has 4 bytes"),
    Hostile("reference that is no storage", by_hand(b"(", text("module"), name("torch.nn", "Linear"), b"tQ"), "no storage"),
    Hostile("storage made by a call", by_hand(name("torch", "FloatStorage"), b")R"), "made by a call"),
    Hostile("state for a tensor", by_hand(TENSOR, b"}b"), "a state for a StoredTensor"),
    Hostile("attributes planted on a list", by_hand(b"]}b"), "a state for a list"),
    Hostile("tuples nested deep as a key", by_hand(b"})", b"\x85" * 100_000, b"Ns"), "a tuple as a key"),
    Hostile("empty stack", by_hand(b"R"), "empty stack"),
    Hostile("reference to nothing", by_hand(b"h\x07"), "never stored"),
    Hostile("string longer than the file", by_hand(b"X\xff\xff\xff\x7f"), "damaged"),
    Hostile("noise for a pickle", lambda folder: archive(folder / "model.pth", bytes(range(256))), "damaged"),
]

# --- archives that are none, or that lie ---


def written(content: bytes, file: str = "model.pt") -> Build:
    def build(folder: Path) -> Path:
        (folder / file).write_bytes(content)
        return folder / file

    return build


def bytes_changed(change: Callable[[bytearray], object]) -> Build:
    """A sound official file whose bytes are changed."""

    def build(folder: Path) -> Path:
        path = official(folder / "model.pth", weights("pico", 2))
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)
        return path

    return build


def appended(entry: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> Build:
    def build(folder: Path) -> Path:
        path = official(folder / "model.pth", weights("pico", 2))
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a", compression) as file:
            warnings.simplefilter("ignore")  # zipfile's own, of a name that is there twice
            file.writestr(entry, content)
        return path

    return build


def directory(content: bytearray, entry: int) -> int:
    """Where the archive's directory records an entry."""
    (start,) = struct.unpack_from("<I", content, content.rindex(b"PK\x05\x06") + 16)
    for _ in range(entry):
        start += 46 + sum(struct.unpack_from("<HHH", content, start + 28))
    return start


def truncated(content: bytearray) -> None:
    del content[len(content) // 2 :]


def overlapping(content: bytearray) -> None:
    struct.pack_into("<I", content, directory(content, 5) + 42, *struct.unpack_from("<I", content, directory(content, 4) + 42))


def too_large(content: bytearray) -> None:
    struct.pack_into("<II", content, directory(content, 4) + 20, 2**31, 2**31)


def encrypted(content: bytearray) -> None:
    content[directory(content, 4) + 8] |= 1


def old_tar(folder: Path) -> Path:
    path = folder / "model.pt"
    (folder / "pickle").write_bytes(pickle.dumps({}))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        file.add(folder / "pickle", "pickle")
    return path


def old_stream(folder: Path) -> Path:
    torch.save({"state_dict": weights("pico", 2)}, folder / "model.pt", _use_new_zipfile_serialization=False)
    return folder / "model.pt"


def an_npz(folder: Path) -> Path:
    np.savez(folder / "vocabulary.npz", names=np.array(NAMES))
    return folder / "vocabulary.npz"


def a_folder(folder: Path) -> Path:
    (folder / "model.pt").mkdir()
    return folder / "model.pt"


def a_loop(folder: Path) -> Path:
    (folder / "model.pt").symlink_to("model.pt")
    return folder / "model.pt"


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.pt")
    return folder / "model.pt"


OTHER_ENDIAN = {"little": b"big", "big": b"little"}[sys.byteorder]
NO_ARCHIVES = [
    Hostile("missing file", lambda folder: folder / "model.pt", "does not exist"),
    Hostile("folder", a_folder, "is a folder"),
    Hostile("empty file", written(b""), "is empty"),
    Hostile("text file", written("name: größe\n".encode() * 99), "is a text file"),
    Hostile("Git LFS pointer", written(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"), "is a Git LFS pointer"),
    Hostile("noise", written(bytes(range(255, 0, -1)) * 9), "is no checkpoint"),
    Hostile("bare pickle", written(pickle.dumps({})), "bare pickle"),
    Hostile("torch's stream of before 1.6", old_stream, "before 1.6"),
    Hostile("torch's tar of before 0.4", old_tar, "before 1.6"),
    Hostile("another zip archive", an_npz, "not one of torch.save"),
    Hostile("TorchScript program", entries_changed(lambda entries: entries.update({"archive/constants.pkl": b"."})), "TorchScript"),
    Hostile("other byte order", entries_changed(lambda entries: entries.update({"archive/byteorder": OTHER_ENDIAN})), "byte order"),
    Hostile("truncated zip", bytes_changed(truncated), "is cut short"),
    Hostile("last byte missing", bytes_changed(lambda content: content.pop()), "is cut short"),
    Hostile("zip bomb entry", appended("model/data/bomb", bytes(2**24), zipfile.ZIP_DEFLATED), "data/bomb is compressed"),
    Hostile("entries that overlap", bytes_changed(overlapping), "overlaps another"),
    Hostile("entry larger than the file", bytes_changed(too_large), "does not lie within the file"),
    Hostile("encrypted entry", bytes_changed(encrypted), "is encrypted"),
    Hostile("entry that climbs out", appended("model/../../evil", b""), "outside the archive's folder"),
    Hostile("entry that climbs out the Windows way", appended("model/..\\evil", b""), "outside the archive's folder"),
    Hostile("entry of another folder", appended("other/data.pkl", b"."), "outside the archive's folder"),
    Hostile("entry that is there twice", appended("model/data/0", b""), "is there twice"),
]
if hasattr(os, "mkfifo"):
    NO_ARCHIVES += [Hostile("file that cannot be read", a_loop, "cannot be read"), Hostile("pipe", a_pipe, "is no regular file")]

# --- contents that are no model, or not all of one ---


def holding(change: Callable[[dict[str, Tensor]], object]) -> Build:
    """An official file whose state dict is changed."""

    def build(folder: Path) -> Path:
        state = weights("pico", 2)
        change(state)
        return official(folder / "model.pth", state)

    return build


def saved(content: object) -> Build:
    def build(folder: Path) -> Path:
        torch.save(content, folder / "model.pt")
        return folder / "model.pt"

    return build


def broken(value: float) -> Build:
    return holding(lambda state: state[STEM].view(-1)[5:6].fill_(value))


def re_parameterised(state: dict[str, Tensor]) -> None:
    del state[f"{GATE}.guide_fc.weight"], state[f"{GATE}.guide_fc.bias"]
    state[f"{GATE}.guide_weight"] = torch.zeros(80, 32)


NO_MODELS = [
    Hostile("wrong shape", holding(lambda state: state.update({f"{GATE}.bias": torch.zeros(7)})), "1 of another shape (neck"),
    Hostile("one key missing", holding(lambda state: state.pop(f"{GATE}.bias")), f"1 missing ({GATE}.bias)"),
    Hostile("all towers missing", holding(lambda state: [state.pop(key) for key in list(state) if "_preds" in key]), "84 missing"),
    Hostile("extra key", holding(lambda state: state.update({"neck.more": torch.zeros(7)})), "1 unknown (neck.more)"),
    Hostile("escape codes in a key", holding(lambda state: state.update({"\x1b[31mred": torch.zeros(7)})), "1 unknown (?[31mred)"),
    Hostile(
        "one text width here, another there", holding(lambda s: s.update({f"{GATE}.guide_fc.weight": torch.zeros(16, 8)})), "of another"
    ),
    Hostile("NaN weights", broken(math.nan), f"NaN or infinite weights in 1 of 411 entries ({STEM})"),
    Hostile("negative variances", holding(lambda state: state[VARIANCE].neg_()), f"negative variances in 1 of 411 entries ({VARIANCE})"),
    Hostile("infinite weights", broken(-math.inf), "NaN or infinite weights in 1 of"),
    Hostile("whole numbers for weights", holding(lambda state: state.update({STEM: state[STEM].to(torch.int8)})), "is of type int8"),
    Hostile("fractions for counters", holding(lambda state: state.update({COUNTER: torch.tensor(0.5)})), "is of type float32"),
    Hostile("unknown size", holding(lambda state: state.update({STEM: torch.zeros(24, 3, 3, 3)})), "its stem has 24 channels"),
    Hostile("stem of no channels", holding(lambda state: state.update({STEM: torch.zeros(3)})), "has no such shape"),
    Hostile("prompt-tuned", holding(lambda state: state.update({"embeddings": torch.zeros(80, 512)})), "is prompt-tuned"),
    Hostile("prompt-tuned by an adapter", holding(lambda state: state.update({"adapter.0.weight": torch.zeros(8, 8)})), "is prompt-tuned"),
    Hostile("re-parameterised", holding(re_parameterised), "is re-parameterised"),
    Hostile("re-parameterised head", holding(lambda s: s.update({f"{CONTRAST}.conv.weight": torch.zeros(8, 8)})), "is re-parameterised"),
    Hostile("another detector", saved({"state_dict": {"backbone.stem.conv.weight": torch.zeros(8, 3, 3, 3)}}), "is no YOLO-World"),
    Hostile("no entries", saved({}), "is no YOLO-World"),
    Hostile("state dict with a string", saved({"state_dict": {"a": "b"}}), "a is no tensor"),
    Hostile("state dict that is a list", saved({"state_dict": [1, 2]}), "holds no state dict"),
    Hostile("list", saved([1, 2]), "holds list, not a checkpoint"),
    Hostile("tensor", saved(torch.zeros(3)), "not a checkpoint"),
    Hostile("layer", saved(torch.nn.Linear(2, 2)), "holds torch.nn.modules.linear.Linear"),
    Hostile("model that is a layer", saved({"model": torch.nn.Linear(2, 2)}), "holds torch.nn.modules.linear.Linear, no YOLO-World"),
]

# --- this project's own files, tampered with ---


def own(change: Callable[[dict[str, dict[str, object]]], object]) -> Build:
    def build(folder: Path) -> Path:
        path = folder / "own.pt"
        vocabulary = Vocabulary(NAMES, embeddings().numpy())
        write_checkpoint(path, weights("pico", 2), config_for("pico", 2), vocabulary=vocabulary, metadata={"size": 320})
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
        return path

    return build


def config(**changes: object) -> Build:
    return own(lambda content: content["config"].update(changes))


def doubled(content: dict[str, object]) -> None:
    bomb: object = []
    for _ in range(15):
        bomb = [bomb] * 15
    content["metadata"] = {"bomb": bomb}


NO_CONFIG = "describes no YOLO-World"
TAMPERED = [
    Hostile("format of the future", own(lambda content: content.update(format_version=99)), "format 99, and this release reads format 1"),
    Hostile("format of no number", own(lambda content: content.update(format_version="\x1b[31m")), "of format unknown"),
    Hostile("own file of another version", config(version=1), "does not fit YOLO-World v1-PICO: of 416 entries"),
    Hostile("version 3", config(version=3), NO_CONFIG),
    Hostile("a billion layers", config(deepen=1e9), NO_CONFIG),
    Hostile("a thousand layers, as a whole number", config(deepen=1000), NO_CONFIG),
    Hostile("a thousand times the width, as a whole number", config(widen=1000), NO_CONFIG),
    Hostile("a width that is true", config(class_width=True), NO_CONFIG),
    Hostile("NaN layers", config(deepen=math.nan), NO_CONFIG),
    Hostile("no attention heads", config(pool_heads=0), NO_CONFIG),
    Hostile("unknown setting", config(more=1), NO_CONFIG),
    Hostile("no configuration", own(lambda content: content.pop("config")), NO_CONFIG),
    Hostile("no weights", own(lambda content: content.pop("state")), "holds no state dict"),
    Hostile("fewer names than embeddings", own(lambda content: content["vocabulary"].update(names=["one"])), "not names and embeddings"),
    Hostile("names that are numbers", own(lambda content: content["vocabulary"].update(names=[1, 2, 3, 4, 5])), "name 1 is 1"),
    Hostile("narrow embeddings", own(lambda c: c["vocabulary"].update(embeddings=torch.ones(5, 3))), "not names and embeddings"),
    Hostile("NaN embeddings", own(lambda c: c["vocabulary"].update(embeddings=torch.full((5, 512), math.nan))), "is not finite"),
    Hostile("vocabulary that is a list", own(lambda content: content.update(vocabulary=[])), "not names and embeddings"),
    Hostile("metadata with a tensor", own(lambda content: content["metadata"].update(a=torch.zeros(1))), "metadata holds a StoredTensor"),
    Hostile("metadata that unfolds without end", own(doubled), "more than plain data"),
    Hostile("metadata that is a list", own(lambda content: content.update(metadata=[])), "no mapping"),
]

ALL = [*MAKE_A_CANARY, *RUN_CODE, *BREAK_RULES, *NO_ARCHIVES, *NO_MODELS, *TAMPERED]

UNUSABLE = [  # written by a process that has stand-ins for ultralytics
    ("fused ultralytics model", "fused.pt", "is fused"),
    ("ultralytics model with a fused head", "fused-head.pt", "is fused"),
    ("ultralytics model that reads no text", "no-text.pt", "holds ultralytics.nn.tasks.DetectionModel, which reads no text"),
    ("ultralytics model of other bins", "other-bins.pt", "other bins than 0 to 15"),
    ("module that contains itself", "cyclic.pt", "no tree of modules"),
]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert caught.value.remedy
    assert message.isprintable()  # one line, and nothing that a terminal obeys
    assert len(message) < len(str(path)) + 400
    return message


@pytest.mark.parametrize("hostile", ALL, ids=lambda hostile: hostile.title)
def test_refuses_in_one_line_and_runs_nothing(hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hostile.build(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert hostile.says in refusal(path)
    assert not canary(tmp_path).exists()
    assert sorted(tmp_path.rglob("*")) == before
    assert "canary_trap" not in sys.modules


@pytest.fixture(scope="module")
def unusable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unusable")
    write_foreign_files(folder, "unusable")
    return folder


@pytest.mark.parametrize(("title", "file", "says"), UNUSABLE, ids=[title for title, *_ in UNUSABLE])
def test_refuses_a_model_of_ultralytics_that_cannot_be_used(unusable: Path, title: str, file: str, says: str) -> None:
    assert says in refusal(unusable / file), title


def test_the_traps_are_live(tmp_path: Path) -> None:
    """The same files do make their canary where they are unpickled for real."""
    folders = []
    for index, hostile in enumerate(MAKE_A_CANARY):
        folders.append(tmp_path / str(index))
        folders[-1].mkdir()
        hostile.build(folders[-1])
    code = """
import contextlib, sys, torch
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    sys.modules.pop("canary_trap", None)
    with contextlib.suppress(Exception):
        torch.load(f"{folder}/model.pth", weights_only=False)
    sys.path.pop(0)
"""
    subprocess.run([sys.executable, "-c", code, *map(str, folders)], check=True, capture_output=True)
    assert [hostile.title for hostile, folder in zip(MAKE_A_CANARY, folders, strict=True) if not canary(folder).exists()] == []


@pytest.mark.parametrize("package", ["ultralytics", "mmengine", "mmdet", "clip"])
def test_imports_no_package_that_a_file_may_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"open({str(canary(tmp_path))!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = archive(tmp_path / "model.pth", pickled(name(package, "Model"), b")\x81}", text("training"), b"\x88sb"))
    with unpickle.opened(path) as opened:
        content = opened.contents
    assert isinstance(content, unpickle.Inert)
    assert str(content.kind) == f"{package}.Model"
    assert content.state == {"training": True}
    assert not canary(tmp_path).exists()
    assert package not in sys.modules


def test_stops_after_so_many_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "model.pth", pickled(b"(" * 1000))
    monkeypatch.setattr(unpickle, "MAX_INSTRUCTIONS", 500)
    assert "more than 500 instructions" in refusal(path)


def stored_tensors(content: object) -> Iterator[unpickle.StoredTensor]:
    if isinstance(content, unpickle.StoredTensor):
        yield content
    if isinstance(content, dict):
        for value in content.values():
            yield from stored_tensors(value)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # pickletools decodes instructions that are refused next
def test_no_damage_gets_past_its_errors(tmp_path: Path) -> None:
    """Bytes changed anywhere, the archive's own records included, are read or refused: no other exception."""
    state = OrderedDict(a=torch.ones(3, 2), b=torch.nn.Parameter(torch.zeros(2)))
    torch.save({"state_dict": state, "meta": {"x": [1, (2.0, None)], "s": {"t"}}}, tmp_path / "sound.pt")
    sound = (tmp_path / "sound.pt").read_bytes()
    structure = sound.index(b"PK\x05\x06") - 2000
    random = np.random.Generator(np.random.PCG64(7))
    refused = 0
    for round_number in range(400):
        damaged = bytearray(sound)
        span = (0, 1500) if round_number % 2 else (max(structure, 0), len(sound))  # the pickle stands first, the directory last
        for place in random.integers(*span, size=random.integers(1, 5)):
            damaged[place] = random.integers(256)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            with unpickle.opened(tmp_path / "damaged.pt") as opened:
                for stored in stored_tensors(opened.contents):
                    opened.tensor(stored)
        except UserError:
            refused += 1
    assert 100 < refused < 400


def table() -> str:
    """Each hostile file beside its message, paths left out."""
    rows = ["| file | message |", "|---|---|"]
    with tempfile.TemporaryDirectory() as root:
        write_foreign_files(Path(root), "unusable")
        files = {title: Path(root) / file for title, file, _ in UNUSABLE}
        for index, hostile in enumerate(ALL):
            folder = Path(root) / str(index)
            folder.mkdir()
            files[hostile.title] = hostile.build(folder)
        for title, path in files.items():
            message = refusal(path).removeprefix(f"{path.parent}{os.sep}")
            rows.append(f"| {title} | {message.replace('|', '/')} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
