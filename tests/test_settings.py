"""Flag, then config file, then what the input carries, then default; and files that are whole or not there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from crqat_fx.errors import UserError
from crqat_fx.files import written
from crqat_fx.settings import read_config, resolve


@dataclass(frozen=True)
class Example:
    rate: float = 0.5
    size: int = 640
    amp: Literal["off", "bf16"] = "off"
    name: str | None = None
    flip: bool = True
    scales: tuple[float, ...] = (1.0,)
    folder: Path | None = None


def config_file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_each_source_gives_way_to_the_one_before_it(tmp_path):
    config = config_file(tmp_path, "rate: 2\nsize: 320\nname: config\n")
    resolved = resolve(Example, {"rate": 3.0, "size": None}, config, {"size": 160, "name": "file", "amp": "bf16"})
    assert resolved.values == Example(rate=3.0, size=320, name="config", amp="bf16")
    assert resolved.origins == {
        "rate": "flag",
        "size": "config",
        "amp": "file",
        "name": "config",
        "flip": "default",
        "scales": "default",
        "folder": "default",
    }


def test_what_is_written_beside_a_result_reads_back_as_the_same_settings(tmp_path):
    resolved = resolve(Example, {"rate": 1e-4, "scales": [0.5, 2.0], "folder": tmp_path, "flip": False, "name": "on: # off"})
    resolved.write(tmp_path / "settings.yaml")
    again = resolve(Example, {}, tmp_path / "settings.yaml")
    assert again.values == resolved.values
    text = (tmp_path / "settings.yaml").read_text()
    assert "rate: 0.0001  # flag" in text
    assert "size: 640  # default" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratte: 1", r"run\.yaml: unknown setting 'ratte'; known here are rate, size"),
        ("rate: fast", r"run\.yaml: rate is 'fast'; give float"),
        ("size: 1.5", r"size is 1\.5; give int"),
        ("size: true", "size is True; give int"),
        ("amp: fp8", "amp is 'fp8'; give one of off, bf16"),
        ("- 1", "is not a mapping"),
        ("a: [", "is no readable YAML"),
        ("rate: 2020-13-45", "is no readable YAML"),
        ("[" * 3000, "is no readable YAML"),
        ("!!python/object/apply:os.system ['true']", "is no readable YAML"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as refused:
        resolve(Example, {}, config_file(tmp_path, text))
    assert "\n" not in str(refused.value)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        read_config(tmp_path / "nowhere.yaml")


def test_an_empty_config_sets_nothing(tmp_path):
    assert resolve(Example, {}, config_file(tmp_path, "")).values == Example()


def test_a_file_takes_its_place_whole(tmp_path):
    target = tmp_path / "new" / "result.txt"
    with written(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["result.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "result.txt"
    target.write_text("old")

    def fail_half_way() -> None:
        with written(target) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.txt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/result\.txt: cannot be written"), written(tmp_path / "file" / "result.txt"):
        pass
    with pytest.raises(UserError, match="is a folder"), written(tmp_path):
        pass
    with pytest.raises(UserError, match="cannot be written"), written(tmp_path / ("long" * 100)):
        pass
