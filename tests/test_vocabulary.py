"""Vocabularies and names files: what is written, what is refused, and that no file gets further than a one-line message."""

import io
import json
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crqat_fx.errors import UserError
from crqat_fx.vocabulary import Vocabulary, prompt, read_names


def rows(count: int, width: int = 8, length: float = 1.0) -> np.ndarray:
    drawn = np.random.default_rng(count).normal(size=(count, width))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * length).astype(np.float32)


def array_bytes(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=array.dtype == object)
    return content.getvalue()


def write_entries(path: Path, *, compress: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return path


NAMES = array_bytes(np.array(["cat", "dog"]))
ROWS = array_bytes(rows(2))


# --- a vocabulary ---


def test_a_saved_vocabulary_comes_back_bit_for_bit(tmp_path):
    vocabulary = Vocabulary(("cat", "Straßenbahn", "赤い星", "bow_(weapon)"), rows(4))
    vocabulary.save(tmp_path / "v.npz")
    again = Vocabulary.load(tmp_path / "v.npz")
    assert again.names == vocabulary.names
    assert again.embeddings.dtype == np.float32
    assert np.array_equal(again.embeddings, vocabulary.embeddings)
    assert np.array_equal(vocabulary.embeddings, rows(4)), "rows of length 1 are not to be touched"


def test_the_same_vocabulary_gives_the_same_bytes_and_leaves_nothing_beside_them(tmp_path):
    Vocabulary(("cat", "dog"), rows(2)).save(tmp_path / "a.npz")
    Vocabulary(["cat", "dog"], rows(2)).save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # nor does the clock or the operating system get into it
        assert {(entry.date_time, entry.create_system) for entry in archive.infolist()} == {((1980, 1, 1, 0, 0, 0), 3)}


def test_numpy_alone_reads_what_was_saved(tmp_path):
    Vocabulary(("cat", "dog"), rows(2)).save(tmp_path / "v.npz")
    with np.load(tmp_path / "v.npz", allow_pickle=False) as file:
        assert sorted(file) == ["embeddings", "names"]
        assert file["names"].tolist() == ["cat", "dog"]
        assert np.array_equal(file["embeddings"], rows(2))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("embeddings", [rows(2).astype(np.float16), rows(2).astype(">f8"), np.asfortranarray(rows(2))])
def test_reads_what_numpy_saves(tmp_path, save, embeddings):
    save(tmp_path / "v.npz", names=np.array(["cat", "dog"]), embeddings=embeddings, note=np.array(["ignored"]))
    vocabulary = Vocabulary.load(tmp_path / "v.npz")
    assert vocabulary.names == ("cat", "dog")
    assert np.allclose(vocabulary.embeddings, rows(2), rtol=0, atol=1e-3)
    assert np.allclose(np.linalg.norm(vocabulary.embeddings.astype(np.float64), axis=1), 1, rtol=0, atol=1.1e-6)


def test_embeddings_that_are_not_of_length_1_are_normalised_with_a_warning(tmp_path, caplog):
    np.savez(tmp_path / "clip.npz", names=np.array(["cat", "dog", "hat"]), embeddings=rows(3, length=10))
    vocabulary = Vocabulary.load(tmp_path / "clip.npz")
    assert np.allclose(vocabulary.embeddings, rows(3), rtol=0, atol=1e-6)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "clip.npz: 3 of 3 embeddings are not of length 1 (10 to 10): normalised" in caplog.text


def test_the_rounding_of_16_bits_is_normalised_without_a_word(caplog):
    halved = rows(64, width=512).astype(np.float16).astype(np.float32)
    assert np.abs(np.linalg.norm(halved, axis=1) - 1).max() > 3e-5
    vocabulary = Vocabulary([str(name) for name in range(64)], halved)
    assert np.abs(np.linalg.norm(vocabulary.embeddings.astype(np.float64), axis=1) - 1).max() < 1.1e-6
    assert not caplog.records


def test_a_vocabulary_keeps_its_own_copy_of_the_embeddings():
    given_rows = rows(2)
    vocabulary = Vocabulary(("cat", "dog"), given_rows)
    given_rows[:] = 7
    assert np.array_equal(vocabulary.embeddings, rows(2))
    assert vocabulary.embeddings.flags.writeable, "torch warns about arrays it may not write to"


def test_selects_names_in_the_order_asked_for():
    vocabulary = Vocabulary(("cat", "dog", "hat"), rows(3)).select(["hat", "cat"])
    assert vocabulary.names == ("hat", "cat")
    assert np.array_equal(vocabulary.embeddings, rows(3)[[2, 0]])
    assert (len(vocabulary), vocabulary.width) == (2, 8)


def test_an_unknown_name_is_refused_with_those_close_to_it():
    with pytest.raises(UserError, match=r"'alarm clok' is not among the 2 names; close to it are 'alarm clock'"):
        Vocabulary(("alarm clock", "zebra"), rows(2)).select(["alarm clok"])


@pytest.mark.parametrize(
    ("names", "embeddings", "message"),
    [
        (("cat", "dog"), rows(3), "2 names and 3 embeddings"),
        (("cat", "dog", "cat"), rows(3), "'cat' stands at 1 and 3"),
        (("cat", "  "), rows(2), "name 2 is ' '"),
        (("cat", 7), rows(2), "name 2 is 7"),
        (("cat", "a\x1b[2Jb"), rows(2), "control character"),
        (("cat", "\ud800"), rows(2), "control character"),
        ((), rows(0), "holds no names"),
        (("cat",), rows(1)[0], r"float32 of shape \[8\]"),
        (("cat",), np.ones((1, 8), np.int64), "int64"),
        (("cat", "dog"), np.stack([rows(1)[0], np.zeros(8, np.float32)]), "embedding of 'dog' is zero"),
        (("cat", "dog"), np.full((2, 8), np.nan, np.float32), r"embedding of 'cat' \(and 1 more\) is not finite"),
        (("cat",), np.full((1, 8), np.inf, np.float32), "embedding of 'cat' is not finite"),
        (("cat",), np.full((1, 8), 1e200), "embedding of 'cat' is not finite"),
    ],
)
def test_names_and_embeddings_that_make_no_vocabulary_are_refused(names, embeddings, message):
    with pytest.raises(UserError, match=message):
        Vocabulary(names, embeddings)


# --- files from outside ---


class Touch:
    """A pickle that would create a file if anything unpickled it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def spoilt(path: Path, kind: str) -> Path:
    """One unsound file of the kind named."""
    sound = write_entries(path, names=NAMES, embeddings=ROWS).read_bytes()
    long_header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    match kind:
        case "text":
            path.write_text("cat\ndog\n")
        case "empty":
            path.write_bytes(b"")
        case "npy":
            np.save(path.with_suffix(".npy"), rows(2))
            path.with_suffix(".npy").rename(path)
        case "pickle":
            path.write_bytes(pickle.dumps(Touch(path.with_name("touched"))))
        case "cut":
            path.write_bytes(sound[: len(sound) // 2])
        case "no names":
            write_entries(path, embeddings=ROWS)
        case "no entries":
            write_entries(path)
        case "pickled names":
            objects = np.empty(2, object)
            objects[:] = [Touch(path.with_name("touched")), "dog"]
            write_entries(path, names=array_bytes(objects), embeddings=ROWS)
        case "bytes for names":
            write_entries(path, names=array_bytes(np.array([b"cat", b"dog"])), embeddings=ROWS)
        case "table of names":
            write_entries(path, names=array_bytes(np.array([["cat", "dog"]])), embeddings=ROWS)
        case "no rows":
            write_entries(path, names=NAMES, embeddings=array_bytes(rows(2)[:0]))
        case "negative shape":
            header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -8)}".ljust(117) + b"\n"
            write_entries(path, names=NAMES, embeddings=long_header + header + bytes(64))
        case "huge shape":
            header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4611686018427387904)}".ljust(117) + b"\n"
            write_entries(path, names=NAMES, embeddings=long_header + header + bytes(64))
        case "unhashable header":
            write_entries(path, names=NAMES, embeddings=long_header + b"{[]: 1}".ljust(117) + b"\n" + bytes(64))
        case "no header":
            write_entries(path, names=NAMES, embeddings=b"cat")
        case "characters past unicode":
            names = bytearray(NAMES)
            names[-4:] = b"\xff\xff\xff\x7f"
            write_entries(path, names=bytes(names), embeddings=ROWS)
        case "bomb":
            bomb = array_bytes(np.zeros((2, 2**22), np.float32))
            write_entries(path, compress=zipfile.ZIP_DEFLATED, names=NAMES, embeddings=bomb)
        case "odd compression":
            write_entries(path, compress=zipfile.ZIP_LZMA, names=NAMES, embeddings=ROWS)
        case "checksum":
            path.write_bytes(sound.replace(ROWS, ROWS[:-1] + bytes([ROWS[-1] ^ 1])))
        case "encrypted":
            marked = bytearray(sound)
            marked[sound.index(b"PK\x01\x02") + 8] |= 1
            path.write_bytes(bytes(marked))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "not an .npz file"),
        ("empty", "not an .npz file"),
        ("npy", "not an .npz file"),
        ("pickle", "not an .npz file"),
        ("cut", "not an .npz file"),
        ("no names", "no array `names`, it holds 'embeddings.npy'"),
        ("no entries", "no array `names`, it holds nothing"),
        ("pickled names", "`names` is pickled"),
        ("bytes for names", r"`names` is of type \|S3, not unicode"),
        ("table of names", r"`names` is of shape \[1, 2\]"),
        ("no rows", r"`embeddings` is of shape \[0, 8\]"),
        ("negative shape", r"`embeddings` is of shape \[-2, -8\]"),
        ("huge shape", "declares 36893488147419103232 bytes and holds 64"),
        ("unhashable header", "damaged"),
        ("no header", "damaged"),
        ("characters past unicode", "damaged"),
        ("bomb", "would unpack to 33554432 bytes from a file of"),
        ("odd compression", "compressed in a way numpy does not write"),
        ("checksum", "damaged .*CRC"),
        ("encrypted", "damaged .*encrypted"),
    ],
)
def test_an_unsound_file_is_refused_in_one_line_that_names_it(tmp_path, kind, message):
    path = spoilt(tmp_path / "v.npz", kind)
    with pytest.raises(UserError, match=message) as caught:
        Vocabulary.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "what to do is missing"
    assert not (tmp_path / "touched").exists()


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Vocabulary.load(tmp_path / "none.npz")
    with pytest.raises(UserError, match="is a folder"):
        Vocabulary.load(tmp_path)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), replacement=st.binary(max_size=12), removed=st.integers(0, 12))
def test_whatever_is_overwritten_in_a_file_it_is_read_or_refused(tmp_path, position, replacement, removed):
    sound = write_entries(tmp_path / "sound.npz", names=NAMES, embeddings=ROWS).read_bytes()
    at = int(position * len(sound))
    path = tmp_path / "v.npz"
    path.write_bytes(sound[:at] + replacement + sound[at + removed :])
    logging.disable(logging.WARNING)
    try:
        vocabulary = Vocabulary.load(path)
    except UserError:
        return
    finally:
        logging.disable(logging.NOTSET)
    assert len(vocabulary.names) == len(vocabulary.embeddings)


# --- names files ---


def test_reads_one_name_a_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeff# animals\ncat\r\n\n  polar bear  \nmonitor/tv\n#end\nzèbre".encode())
    assert read_names(path) == ("cat", "polar bear", "monitor/tv", "zèbre")


def test_reads_a_json_list_of_names_or_of_synonyms(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps(["person", ["aerosol can", "spray can"], "salt, pepper"]))
    assert read_names(path) == ("person", "aerosol can", "salt, pepper")


def test_classes_that_share_their_first_synonym_stay_apart_and_keep_their_prompt(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps([["bow", "bow weapon"], ["bow", "bow decorative ribbons"], ["fish"], ["fish", "fish food"]]))
    names = read_names(path)
    assert names == ("bow/bow weapon", "bow/bow decorative ribbons", "fish", "fish/fish food")
    assert [prompt(name) for name in names] == ["bow", "bow", "fish", "fish"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", "cat"),
        ("polar bear", "polar bear"),
        ("alarm_clock", "alarm clock"),
        ("bow_(weapon)", "bow"),
        ("home_plate_(baseball)", "home plate"),
        ("monitor_(computer_equipment) computer_monitor", "monitor"),
        ("Band_Aid", "Band Aid"),
        ("flip-flop_(sandal)", "flip-flop"),
        ("Monitor/TV", "Monitor"),
        ("person (sitting)", "person (sitting)"),
        ("/", "/"),
    ],
)
def test_a_prompt_is_the_bare_name_first_synonym(name, expected):
    assert prompt(name) == expected


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("names.txt", b"cat\ndog\ncat\n", "'cat' stands on lines 1 and 3"),
        ("names.txt", b"cat, dog, hat\n", "line 1 holds a comma"),
        ("names.txt", b"\n# nothing\n", "holds no names"),
        ("names.txt", b"caf\xe9\n", "not text in UTF-8"),
        ("names.txt", b"cat\x00dog\n", "control character"),
        ("names.json", b"cat\ndog\n", "is no JSON"),
        ("names.json", b"[" * 100_000, "is no JSON"),
        ("names.json", b'{"0": "cat"}', "holds a dict, not a list"),
        ("names.json", b"[]", "holds no names"),
        ("names.json", b'["cat", []]', r"entry 2 is '\[\]'"),
        ("names.json", b'["cat", 7]', "entry 2 is '7'"),
        ("names.json", b'[["cat"], ["dog", " "]]', "entry 2 is "),
        ("names.json", b'["cat", "cat"]', "'cat' stands at 1 and 2"),
    ],
)
def test_an_unsound_names_file_is_refused(tmp_path, file, content, message):
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_names(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_names_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_names(tmp_path / "names.txt")


@pytest.mark.parametrize("read", [Vocabulary.load, read_names])
def test_a_path_longer_than_any_is_an_error_of_one_line(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(UserError, match=r"cannot be read|no such file") as raised:
        read(tmp_path / ("x" * 300))
    assert "\n" not in str(raised.value)
