"""The detector on a PyTorch model, and pictures in, drawings and JSON out."""

import json
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from weights_from_names import weights_from_names

from crqat_fx.checkpoint import load_model, write_checkpoint
from crqat_fx.detect import (
    DetectSettings,
    detect_pictures,
    drawing_targets,
    open_vocabulary,
    split_names,
)
from crqat_fx.draw import enlarged
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import build, config_for, decode_boxes, flatten_levels
from crqat_fx.pictures import Source, find_sources, letterbox, read_picture
from crqat_fx.torch_detector import TorchDetector, TorchModel, carried_settings
from crqat_fx.vocabulary import Vocabulary

NAMES = ("person", "red car", "café", "bus, double-decker", "tie")


def vocabulary(names: tuple[str, ...] = NAMES, width: int = 512) -> Vocabulary:
    rows = np.random.default_rng(0).normal(size=(len(names), width)).astype(np.float32)
    return Vocabulary(names, rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    built = build("pico", 1)
    built.load_state_dict(weights_from_names(built.state_dict()))
    return built


@pytest.fixture(scope="module")
def conf(model: torch.nn.Module) -> float:
    """A threshold that these weights' scores pass a few dozen times a picture, in a gap that no rounding crosses."""
    found = TorchDetector(model, vocabulary(), size=96, conf=0.0).detect(photos())
    scores = np.sort(np.concatenate([picture.scores for picture in found]))[-200:-100]
    widest = int(np.diff(scores).argmax())
    return float(scores[widest : widest + 2].mean())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, even where the command line has turned propagation off before."""
    loggers = [logging.getLogger(f"crqat_fx.{module}") for module in ("detect", "torch_detector")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def photos(count: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    sizes = [(80, 120), (200, 60), (96, 96), (33, 47)]
    return [
        cv2.resize(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8), sizes[index % 4][::-1], interpolation=cv2.INTER_CUBIC)
        for index in range(count)
    ]


def saved(path: Path, picture: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, picture[..., ::-1])[1].tobytes())
    return path


# --- the detector ---


def test_finds_what_the_model_says_step_by_step(model):
    picture = photos(1)[0]
    found = TorchDetector(model, vocabulary(), size=96, conf=0.0, iou=1.0, max_detections=30_000).detect([picture])[0]
    boxed, placement = letterbox(picture, 96)
    images = torch.from_numpy(boxed).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        logits, bins, _ = model(images, torch.from_numpy(vocabulary().embeddings)[None])
    scores = flatten_levels(logits)[0].sigmoid().numpy()
    offset, scale = np.array([placement.left, placement.top] * 2), np.array([placement.scale_x, placement.scale_y] * 2)
    boxes = np.clip((decode_boxes(bins)[0].numpy() - offset) / scale, 0, [120, 80, 120, 80])
    anchors, labels = np.unravel_index(np.argsort(-scores, axis=None, kind="stable"), scores.shape)
    assert len(found) == scores.size  # IoU 1: nothing is removed
    np.testing.assert_allclose(found.scores, scores[anchors, labels], atol=1e-6)
    gaps = -np.diff(scores[anchors, labels], prepend=2, append=-1)
    clear = (gaps[1:] > 1e-6) & (gaps[:-1] > 1e-6)  # its place in the order is no matter of rounding
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(found.labels[clear], labels[clear])
    np.testing.assert_allclose(found.boxes[clear], boxes[anchors][clear], atol=1e-3)


def test_a_batch_gives_what_single_pictures_give(model, conf):
    detector = TorchDetector(model, vocabulary(), size=96, conf=conf)
    together = detector.detect(photos())
    assert sum(len(found) for found in together) > 20
    for found, picture in zip(together, photos(), strict=True):
        alone = detector.detect([picture])[0]
        np.testing.assert_array_equal(found.labels, alone.labels)
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-6)
        height, width = picture.shape[:2]
        assert (found.boxes >= 0).all()
        assert (found.boxes <= [width, height, width, height]).all()
        assert (found.scores > conf).all()


def test_sets_the_model_to_evaluation_and_builds_no_gradients(model):
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = TorchDetector(model, vocabulary(), size=64).detect(photos(1))
    assert not model.training
    assert len(found) == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_detects_on_no_pictures_at_all(model):
    assert TorchDetector(model, vocabulary(), size=64).detect([]) == []


@pytest.mark.parametrize(
    "picture", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_refuses_an_array_that_is_no_picture(model, picture):
    with pytest.raises(UserError, match="give uint8 RGB"):
        TorchDetector(model, vocabulary(), size=64).detect([picture])


def test_a_model_that_answers_nan_is_an_error(model):
    broken = build("pico", 1)
    broken.load_state_dict(model.state_dict())
    torch.nn.init.constant_(broken.bbox_head.head_module.cls_contrasts[1].bias, torch.nan)
    with pytest.raises(UserError, match="scores are not numbers"):
        TorchDetector(broken, vocabulary(), size=64).detect(photos(1))


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta:x", "meta", "vulkan", "hpu"])
def test_refuses_a_device_that_is_not_there_and_names_those_that_are(model, device):
    with pytest.raises(UserError, match="choose among cpu") as raised:
        TorchDetector(model, vocabulary(), size=64, device=device)
    assert "\n" not in str(raised.value)


# --- settings and vocabularies ---


@pytest.mark.parametrize(
    "wrong",
    [
        {"conf": 1.5},
        {"iou": -1.0},
        {"max": 0},
        {"size": 100},
        {"size": 0},
        {"size": 32 * 1000},
        {"batch": 0},
        {"threads": 0},
        {"batch": 10**20},
        {"threads": 99_999_999_999},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"{name} is {value}"):
        DetectSettings(**wrong)


def test_splits_names_at_commas_and_heeds_quotes():
    assert split_names('person, red car,tie , "bus, double-decker",person,') == ["person", "red car", "tie", "bus, double-decker"]
    with pytest.raises(UserError, match="names nothing"):
        split_names(" , ")


def test_the_given_vocabulary_goes_before_the_carried_one_and_text_chooses_among_it(tmp_path):
    carried, given = vocabulary(), vocabulary(("boat", "kite"))
    given.save(tmp_path / "v.npz")
    model = Path("model.pt")
    assert open_vocabulary(carried, DetectSettings(), model).names == NAMES
    assert open_vocabulary(carried, DetectSettings(vocabulary=tmp_path / "v.npz"), model).names == ("boat", "kite")
    chosen = open_vocabulary(carried, DetectSettings(text='tie, "bus, double-decker"'), model)
    assert chosen.names == ("tie", "bus, double-decker")
    np.testing.assert_array_equal(chosen.embeddings, carried.embeddings[[4, 3]])
    assert open_vocabulary(None, DetectSettings(vocabulary=tmp_path / "v.npz", text="kite"), model).names == ("kite",)


def test_no_vocabulary_and_an_unknown_name_are_errors_that_name_embed():
    with pytest.raises(UserError, match=r"model.pt: carries no vocabulary; give one with --vocabulary; `crqat-fx embed"):
        open_vocabulary(None, DetectSettings(), Path("model.pt"))
    with pytest.raises(UserError, match=r"model.pt: 'zebra' is not among the 5 names.*`crqat-fx embed"):
        open_vocabulary(vocabulary(), DetectSettings(text="tie, zebra"), Path("model.pt"))


def test_opens_a_detector_from_a_file_with_its_vocabulary_and_size(tmp_path, model, conf):
    write_checkpoint(tmp_path / "model.pt", model, config_for("pico", 1), vocabulary=vocabulary(), metadata={"size": 96})
    loaded, checkpoint = load_model(tmp_path / "model.pt")
    assert carried_settings(checkpoint) == {"size": 96}
    detector = TorchModel(loaded, checkpoint).detector(DetectSettings(size=96, conf=conf, text="tie, person", max=7))
    assert detector.names == ("tie", "person")
    found = detector.detect(photos(1))[0]
    assert 0 < len(found) <= 7
    assert (found.scores > conf).all()


def test_a_picture_size_in_a_file_that_cannot_be_is_said_and_left(tmp_path, model, said):
    write_checkpoint(tmp_path / "model.pt", model, config_for("pico", 1), metadata={"size": 100})
    assert carried_settings(load_model(tmp_path / "model.pt")[1]) == {}
    assert "100" in said.text
    assert "multiple of 32" in said.text


def test_embeddings_of_another_width_are_refused(tmp_path, model):
    write_checkpoint(tmp_path / "model.pt", model, config_for("pico", 1))
    vocabulary(width=64).save(tmp_path / "v.npz")
    loaded, checkpoint = load_model(tmp_path / "model.pt")
    with pytest.raises(UserError, match="embeddings are 64 wide and the model reads 512"):
        TorchModel(loaded, checkpoint).detector(DetectSettings(vocabulary=tmp_path / "v.npz"))


# --- pictures in, drawings and JSON out ---


def test_draws_and_lists_every_picture_and_skips_what_is_none(tmp_path, model, conf, said):
    folder, out = tmp_path / "in", tmp_path / "out"
    first, second, third = photos()
    saved(folder / "a.png", first)
    saved(folder / "b" / "猫.jpg", second)
    saved(folder / "z.tif", third)
    (folder / "broken.jpg").write_bytes(b"no picture")
    steps: list[tuple[int, int, str]] = []
    detector = TorchDetector(model, vocabulary(), size=96, conf=conf)
    report = detect_pictures(detector, find_sources([folder]), out, batch=2, progress=lambda *step: steps.append(step))
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "a.png", "b/猫.jpg", "detections.json", "z.png",
    ]  # fmt: skip
    assert report.pictures == 3
    assert report.out == out
    assert [skipped.name for skipped in report.skipped] == ["broken.jpg"]
    assert "broken.jpg: is no picture that can be decoded" in report.skipped[0].reason
    assert "skipped: " in said.text
    assert "drawn in ASCII: café as cafe, 1 in all" in said.text
    assert [step[:2] for step in steps][-1] == (4, 4)
    assert len(steps) == 3
    records = json.loads((out / "detections.json").read_text(encoding="utf-8"))
    at = 0
    for image, name in enumerate(("a.png", "b/猫.jpg", "z.tif")):
        picture = read_picture(folder / name)
        found = detector.detect([picture])[0]
        assert len(found) > 5
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            record = records[at]
            assert list(record) == ["image_id", "file_name", "category_id", "category_name", "bbox", "score"]
            assert (record["image_id"], record["file_name"]) == (image, name)
            assert (record["category_id"], record["category_name"]) == (label, NAMES[label])
            assert record["bbox"] == pytest.approx([box[0], box[1], box[2] - box[0], box[3] - box[1]], abs=2e-3)
            assert record["score"] == pytest.approx(score, abs=2e-6)
            at += 1
        drawn = read_picture(out / ("z.png" if name == "z.tif" else name))
        larger, _ = enlarged(picture, found)
        assert drawn.shape == larger.shape
        assert (drawn != larger).any()
    assert at == len(records) == sum(report.counts.values())
    assert report.counts == {name: sum(record["category_name"] == name for record in records) for name in report.counts}


def test_takes_videos_frame_by_frame(tmp_path, model, conf):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 64))
    for picture in photos(3):
        writer.write(cv2.resize(picture, (96, 64)))
    writer.release()
    steps: list[tuple[int, int, str]] = []
    detector = TorchDetector(model, vocabulary(), size=96, conf=conf)
    report = detect_pictures(detector, find_sources([path]), tmp_path / "out", progress=lambda *step: steps.append(step))
    assert report.pictures == 3
    assert not report.skipped
    assert sorted(path.name for path in (tmp_path / "out" / "clip").iterdir()) == ["000000.jpg", "000001.jpg", "000002.jpg"]
    records = json.loads((tmp_path / "out" / "detections.json").read_text(encoding="utf-8"))
    assert {record["frame"] for record in records} == {0, 1, 2}
    assert {record["file_name"] for record in records} == {"clip.avi"}
    assert [step[:2] for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert steps[1][2].startswith("clip.avi frame 1: ")


def test_a_video_that_is_cut_short_counts_as_not_read_whole(tmp_path, model, said):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 64))
    for picture in photos(3) * 5:
        writer.write(cv2.resize(picture, (96, 64)))
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report = detect_pictures(TorchDetector(model, vocabulary(), size=64, conf=1.0), find_sources([path]), tmp_path / "out")
    assert 0 < report.pictures < 15
    assert [skipped.name for skipped in report.skipped] == ["clip.avi"]
    assert "of the 15 frames that it declares can be decoded" in report.skipped[0].reason
    assert "not read whole: " in said.text
    assert len(list((tmp_path / "out" / "clip").iterdir())) == report.pictures


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
def test_lists_a_file_whose_name_is_no_text(tmp_path, model, conf):
    odd = os.fsdecode(b"\xff\xfe.png")
    saved(tmp_path / "in" / odd, photos(1)[0])
    report = detect_pictures(TorchDetector(model, vocabulary(), size=96, conf=conf), find_sources([tmp_path / "in"]), tmp_path / "out")
    assert report.pictures == 1
    assert not report.skipped
    records = json.loads((tmp_path / "out" / "detections.json").read_text(encoding="utf-8"))
    assert {record["file_name"] for record in records} == {odd}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {odd, "detections.json"}


def test_leaves_no_folder_behind_when_nothing_was_kept(tmp_path, model):
    broken = build("pico", 1)
    broken.load_state_dict(model.state_dict())
    torch.nn.init.constant_(broken.bbox_head.head_module.cls_contrasts[1].bias, torch.nan)
    source = find_sources([saved(tmp_path / "a.png", photos(1)[0])])
    called: list[bool] = []
    for out in (tmp_path / "new" / "out", tmp_path / "old"):
        (tmp_path / "old").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="scores are not numbers"):
            detect_pictures(TorchDetector(broken, vocabulary(), size=64), source, out, before_drawing=lambda: called.append(True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "old"]  # the one that was there stays
    assert not called


@pytest.mark.parametrize("pictures", [0, 3])
def test_has_settings_written_once_and_before_any_drawing(tmp_path, model, pictures):
    for index in range(pictures):
        saved(tmp_path / "in" / f"{index}.png", photos(1)[0])
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    before: list[list[Path]] = []
    detect_pictures(
        TorchDetector(model, vocabulary(), size=64, conf=1.0), find_sources([tmp_path / "in"]), tmp_path / "out",
        before_drawing=lambda: before.append([path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]),
    )  # fmt: skip
    assert before == [[]]


def test_writes_an_empty_list_where_nothing_is_found(tmp_path, model):
    saved(tmp_path / "a.png", photos(1)[0])
    report = detect_pictures(TorchDetector(model, vocabulary(), size=64, conf=1.0), find_sources([tmp_path / "a.png"]), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == []
    assert report.counts == {}


def test_leaves_no_half_written_list_when_it_is_interrupted(tmp_path, model, conf):
    for name in ("a.png", "b.png"):
        saved(tmp_path / "in" / name, photos(1)[0])

    def interrupt(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detect_pictures(
            TorchDetector(model, vocabulary(), size=64, conf=conf), find_sources([tmp_path / "in"]), tmp_path / "out", progress=interrupt
        )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_drawings_get_names_of_their_own(tmp_path):
    names = ["x.jpg", "X.JPG", "x.jpg", "x.gif", "x.png", "x.mp4", "x.tar.webp", "film.mov"]
    sources = [Source(tmp_path / str(index) / name, name) for index, name in enumerate(names)]
    targets = drawing_targets(sources, Path("out"))
    assert [targets[source].as_posix() for source in sources] == [
        "out/x.jpg", "out/X-2.jpg", "out/x-3.jpg", "out/x.png", "out/x-2.png", "out/x", "out/x.tar.webp", "out/film",
    ]  # fmt: skip


def test_refuses_to_draw_over_a_picture_that_it_reads(tmp_path, model):
    original = saved(tmp_path / "a.png", photos(1)[0])
    before = original.read_bytes()
    with pytest.raises(UserError, match=r"a.png: would be overwritten by a drawing; choose another folder with --out"):
        detect_pictures(TorchDetector(model, vocabulary(), size=64), find_sources([tmp_path]), tmp_path)
    assert original.read_bytes() == before
    assert not (tmp_path / "detections.json").exists()


def test_an_out_longer_than_any_path_is_an_error(tmp_path, model):
    source = find_sources([saved(tmp_path / "a.png", photos(1)[0])])
    with pytest.raises(UserError, match="cannot be written"):
        detect_pictures(TorchDetector(model, vocabulary(), size=64), source, tmp_path / ("x" * 300))


def test_an_out_that_is_a_file_is_an_error(tmp_path, model):
    saved(tmp_path / "a.png", photos(1)[0])
    (tmp_path / "out").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be written"):
        detect_pictures(TorchDetector(model, vocabulary(), size=64), find_sources([tmp_path / "a.png"]), tmp_path / "out")


def test_a_detector_without_torch_goes_the_same_way(tmp_path):
    """One that finds the bright half of a picture, in a process where torch cannot be imported."""
    picture = np.zeros((60, 80, 3), np.uint8)
    picture[:, 40:] = 255
    saved(tmp_path / "in" / "half.png", picture)
    code = """
        import sys
        sys.modules["torch"] = None
        from pathlib import Path
        import numpy as np
        from crqat_fx.detect import detect_pictures
        from crqat_fx.detections import Selection, pick, postprocess
        from crqat_fx.pictures import find_sources, letterbox

        class Bright:
            names = ("bright",)
            def detect(self, pictures):
                found = []
                for picture in pictures:
                    boxed, placement = letterbox(picture, 32)
                    cells = boxed.mean(axis=2).reshape(4, 8, 4, 8).mean(axis=(1, 3))
                    logits = ((cells - 200) / 10).astype(np.float32)[None]
                    bins = np.zeros((64, 4, 4), np.float32)
                    bins[::16] = 30
                    found.append(postprocess([pick(logits, Selection(.5).floor)], [bins], placement, Selection(.5)))
                return found

        root = Path(sys.argv[1])
        print(detect_pictures(Bright(), find_sources([root / "in"]), root / "out").counts)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert run.stdout.strip() == "{'bright': 4}"
    records = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert all(record["bbox"][0] >= 40 for record in records)
