"""Reading pictures, finding them, and the letterbox."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from crqat_fx import pictures
from crqat_fx.errors import UserError
from crqat_fx.headers import declared_size, frame_count, orientation
from crqat_fx.pictures import Source, count_pictures, find_sources, letterbox, read_frames, read_picture, read_source

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)


def saved(path: Path, samples: np.ndarray) -> Path:
    """Writes samples in OpenCV's order of channels."""
    path.write_bytes(cv2.imencode(path.suffix, samples)[1].tobytes())
    return path


def with_exif(path: Path, samples: np.ndarray, orientation: int, order: str) -> Path:
    directory = struct.pack(f"{order}HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + directory
    _, encoded = cv2.imencodeWithMetadata(path.suffix, samples, [cv2.IMAGE_METADATA_EXIF], [np.frombuffer(exif, np.uint8)])
    path.write_bytes(np.asarray(encoded).tobytes())
    return path


def png(width: int, height: int, depth: int, kind: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG put together by hand, for the forms that OpenCV does not write."""
    parts = {"IHDR": struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0), **chunks, "IDAT": zlib.compress(rows), "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name.encode() + body + struct.pack(">I", zlib.crc32(name.encode() + body))
        for name, body in parts.items()
    )


def video(path: Path, frames: int = 4) -> Path:
    code = {".avi": "MJPG", ".flv": "FLV1", ".mkv": "MJPG", ".webm": "VP80", ".wmv": "WMV2"}.get(path.suffix, "mp4v")
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*code), 10, (64, 48))
    for index in range(frames):
        writer.write(np.full((48, 64, 3), (40 * index, 0, 255 - 40 * index), np.uint8))
    writer.release()
    return path


# --- reading ---


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_turns_a_picture_upright_as_opencv_does(tmp_path, suffix, orientation, order):
    path = with_exif(tmp_path / f"turned{suffix}", noise(5, 7), orientation, order)
    expected = cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    assert expected.shape == ((7, 5, 3) if orientation >= 5 else (5, 7, 3))
    np.testing.assert_array_equal(read_picture(path), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turns_an_avif_upright_by_its_own_properties_alone(tmp_path, orientation):
    samples = np.zeros((40, 56, 3), np.uint8)
    samples[:20, :28], samples[:20, 28:], samples[20:, :28] = (0, 0, 255), (0, 255, 0), (255, 0, 0)
    expected = read_picture(with_exif(tmp_path / "turned.png", samples, orientation, ">"))
    path = with_exif(tmp_path / "turned.avif", samples, orientation, ">")  # its writer puts the orientation into the properties too
    tag = struct.pack(">HHIH", 0x0112, 3, 1, orientation)
    content = path.read_bytes()
    assert content.count(tag) == 1
    for other in (1, 6):  # what Exif says must not count
        path.write_bytes(content.replace(tag, struct.pack(">HHIH", 0x0112, 3, 1, other)))
        read = read_picture(path)
        assert read.shape == expected.shape
        assert np.abs(read.astype(int) - expected).mean() < 20


def test_reads_an_avif_whose_properties_make_no_sense(tmp_path):
    content = with_exif(tmp_path / "turned.avif", noise(40, 56), 6, ">").read_bytes()
    generator = np.random.default_rng(3)
    for _ in range(300):
        damaged = bytearray(content)
        for place in generator.integers(0, content.index(b"mdat"), 4):
            damaged[place] = generator.integers(256)
        assert declared_size(bytes(damaged)) is None or orientation(bytes(damaged), b"") in range(1, 9)


def test_lays_a_transparent_picture_on_the_grey_of_the_padding(tmp_path):
    samples = noise(6, 8, 4)
    samples[..., 3] = np.array([0, 1, 63, 127, 128, 200, 254, 255])
    alpha = samples[..., 3:] / 255
    expected = np.round(samples[..., 2::-1] * alpha + 114 * (1 - alpha))
    read = read_picture(saved(tmp_path / "glass.png", samples))
    np.testing.assert_array_equal(read, expected)
    assert (read[:, 0] == 114).all()
    np.testing.assert_array_equal(read[:, 7], samples[:, 7, 2::-1])


def test_turns_a_transparent_picture_too(tmp_path):
    samples = noise(5, 7, 4)
    samples[..., 3] = 255
    samples[0, 0, 3] = 0
    read = read_picture(with_exif(tmp_path / "turned.png", samples, 6, ">"))  # 6: the first row is the right side
    assert read.shape == (7, 5, 3)
    np.testing.assert_array_equal(read[0, 4], [114, 114, 114])
    np.testing.assert_array_equal(read[1, 4], samples[0, 1, 2::-1])


def test_reads_grey_palette_and_one_bit_pictures_as_rgb(tmp_path):
    grey = saved(tmp_path / "grey.png", np.array([[0, 100, 255]], np.uint8))
    np.testing.assert_array_equal(read_picture(grey), [[[0] * 3, [100] * 3, [255] * 3]])
    palette = tmp_path / "palette.png"
    palette.write_bytes(png(3, 1, 8, 3, b"\0\0\1\2", PLTE=bytes([255, 0, 0, 0, 255, 0, 1, 2, 3])))
    np.testing.assert_array_equal(read_picture(palette), [[[255, 0, 0], [0, 255, 0], [1, 2, 3]]])
    palette.write_bytes(png(3, 1, 8, 3, b"\0\0\1\2", PLTE=bytes([255, 0, 0, 0, 255, 0, 1, 2, 3]), tRNS=bytes([255, 0])))
    np.testing.assert_array_equal(read_picture(palette), [[[255, 0, 0], [114, 114, 114], [1, 2, 3]]])
    one_bit = tmp_path / "one.png"
    one_bit.write_bytes(png(4, 1, 1, 0, b"\0\x50"))
    np.testing.assert_array_equal(read_picture(one_bit)[0, :, 0], [0, 255, 0, 255])
    grey_alpha = tmp_path / "glass.png"
    grey_alpha.write_bytes(png(2, 1, 8, 4, bytes([0, 9, 255, 9, 0])))
    np.testing.assert_array_equal(read_picture(grey_alpha), [[[9] * 3, [114] * 3]])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_scales_16_bits_to_8_over_their_full_range(tmp_path, suffix, channels):
    samples = noise(9, 11, channels, np.uint16)
    samples[0, 0], samples[0, 1], samples[0, 2] = 0, 65535, 257 * 77
    read = read_picture(saved(tmp_path / f"deep{suffix}", samples))
    np.testing.assert_array_equal(read, np.broadcast_to(np.rint(samples[..., ::-1] / 257), read.shape))
    assert read.dtype == np.uint8
    assert read[0, 2].tolist() == [77, 77, 77]


def test_reads_a_transparent_picture_of_16_bits(tmp_path):
    samples = np.array([[[65535, 0, 257 * 5, 65535], [1, 2, 3, 0]]], np.uint16)
    np.testing.assert_array_equal(read_picture(saved(tmp_path / "deep.png", samples)), [[[5, 0, 255], [114, 114, 114]]])


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".jp2", ".jpg", ".png", ".ppm", ".tiff", ".webp", ".avif"])
def test_reads_every_usual_format(tmp_path, suffix):
    samples = np.zeros((40, 56, 3), np.uint8)
    samples[:, :28] = (0, 85, 255)  # BGR
    read = read_picture(saved(tmp_path / f"picture{suffix}", samples))
    assert read.shape == (40, 56, 3)
    assert read.flags.c_contiguous
    assert abs(read[20, 10].astype(int) - [255, 85, 0]).max() < 32
    assert read[20, 50].max() < 32


def test_reads_a_path_that_is_not_ascii(tmp_path):
    folder = tmp_path / "Fotos von Jürgen 猫"
    folder.mkdir()
    samples = noise(3, 4)
    np.testing.assert_array_equal(read_picture(saved(folder / "naïve.png", samples)), samples[..., ::-1])


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5000, 3), (5000, 1, 3)])
def test_reads_and_letterboxes_pictures_of_any_shape(tmp_path, shape):
    read = read_picture(saved(tmp_path / "thin.png", noise(*shape)))
    boxed, placement = letterbox(read, 64)
    assert boxed.shape == (64, 64, 3)
    assert (placement.height, placement.width) == shape[:2]
    assert placement.scale_x > 0
    assert placement.scale_y > 0


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("empty.jpg", b"", "is empty"),
        ("text.jpg", b"no picture at all\n" * 9, "no picture that can be decoded"),
        ("cut.png", None, "no picture that can be decoded"),
        ("ones.jpg", b"\xff\xd8" + b"\xff" * 2_000_000, "no picture that can be decoded"),
        ("bytes.tif", b"II*\0\xff\xff\xff\xff", "no picture that can be decoded"),
    ],
)
def test_refuses_what_is_no_picture_in_one_line(tmp_path, capfd, name, content, what):
    path = tmp_path / name
    path.write_bytes(cv2.imencode(".png", noise(50, 50))[1].tobytes()[:900] if content is None else content)
    with pytest.raises(UserError, match=what) as raised:
        read_picture(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""  # OpenCV's own lines are kept back


def test_refuses_a_folder_a_missing_file_and_floating_point_samples(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        read_picture(tmp_path)
    with pytest.raises(UserError, match="is not a file"):
        read_picture(tmp_path / "missing.png")
    with pytest.raises(UserError, match="holds float32 samples; convert it to 8 or 16 bits"):
        read_picture(saved(tmp_path / "light.tiff", RNG.random((4, 4, 3), dtype=np.float32)))


@pytest.mark.parametrize("suffix", [".avif", ".bmp", ".gif", ".jp2", ".jpg", ".png", ".tiff", ".webp"])
def test_decodes_nothing_whose_header_declares_too_many_pixels(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(pictures, "MOST_PIXELS", 32 * 48 - 1)
    assert read_picture(saved(tmp_path / f"small{suffix}", noise(32, 47))).shape == (32, 47, 3)
    with pytest.raises(UserError, match="is a picture of 48 x 32 pixels, more than the 1,535 that are read"):
        read_picture(saved(tmp_path / f"large{suffix}", noise(32, 48)))


def test_reads_the_size_of_every_form_of_webp_and_of_a_jpeg_with_a_thumbnail(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_PIXELS", 100)
    lossless = cv2.imencode(".webp", noise(30, 17), [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    extended = cv2.imencode(".webp", noise(30, 17, 4), [cv2.IMWRITE_WEBP_QUALITY, 50])[1].tobytes()
    lossy = cv2.imencode(".webp", noise(30, 17), [cv2.IMWRITE_WEBP_QUALITY, 50])[1].tobytes()
    assert (lossless[12:16], extended[12:16], lossy[12:16]) == (b"VP8L", b"VP8X", b"VP8 ")
    picture, thumbnail = (cv2.imencode(".jpg", noise(*shape))[1].tobytes() for shape in ((30, 17), (4, 4)))
    nested = picture[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + picture[2:]
    for index, content in enumerate((lossless, extended, lossy, nested)):
        path = tmp_path / f"{index}.bin"
        path.write_bytes(content)
        with pytest.raises(UserError, match="a picture of 17 x 30 pixels"):
            read_picture(path)


def test_refuses_a_decompression_bomb_before_it_unpacks(tmp_path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(30_000, 30_000, 8, 2, bytes(90_001 * 100)))
    assert bomb.stat().st_size < 20_000
    with pytest.raises(UserError, match=r"a picture of 30000 x 30000 pixels, more than the 134,217,728 that are read; shrink it"):
        read_picture(bomb)


def test_refuses_a_file_of_too_many_bytes_before_reading_it(tmp_path, monkeypatch):
    path = saved(tmp_path / "picture.png", noise(10, 10))
    monkeypatch.setattr(pictures, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="is larger than"):
        read_picture(path)


# --- finding ---


def test_finds_pictures_and_videos_in_folders_sorted_and_leaves_the_rest(tmp_path):
    for name in ("b.PNG", "a/z.jpg", "a/y.jpeg", "notes.txt", ".hidden.png", ".cache/x.png", "film.mp4", "out/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_sources([tmp_path], without=tmp_path / "out")
    assert [source.name for source in found] == ["a/y.jpeg", "a/z.jpg", "b.PNG", "film.mp4"]
    assert [source.is_video for source in found] == [False, False, False, True]
    assert found[0].path == tmp_path / "a" / "y.jpeg"


def test_takes_each_file_once_in_the_order_given_and_trusts_a_file_named_outright(tmp_path):
    for name in ("b.png", "a.png", "scan", "[1].png"):
        (tmp_path / name).write_bytes(b"x")
    found = find_sources([tmp_path / "scan", tmp_path / "b.png", tmp_path / "[1].png", tmp_path])
    assert [source.name for source in found] == ["scan", "b.png", "[1].png", "a.png"]


def test_expands_patterns_and_names_files_from_their_fixed_part(tmp_path, monkeypatch):
    for name in ("day1/cam.png", "day2/cam.png", "day2/cam.txt", "day2/deep/cam.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    assert [source.name for source in find_sources([tmp_path / "day*" / "*.*"])] == ["day1/cam.png", "day2/cam.png"]
    assert [source.name for source in find_sources([f"{tmp_path}/**/cam.png"])] == ["day1/cam.png", "day2/cam.png", "day2/deep/cam.png"]
    monkeypatch.chdir(tmp_path)
    assert [source.name for source in find_sources(["day2/*.png"])] == ["cam.png"]
    assert [source.name for source in find_sources(["day*/../../*/day1/cam.png"])] == ["cam.png"]  # never out of the output folder


@pytest.mark.parametrize(
    ("place", "what"), [("missing.png", "does not exist"), ("*.png", "holds no picture"), ("empty", "holds no picture")]
)
def test_a_place_without_pictures_is_an_error_that_names_it(tmp_path, place, what):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=what) as raised:
        find_sources([tmp_path / place])
    assert str(tmp_path / place) in str(raised.value)


def test_says_that_all_there_is_lies_where_results_go(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    for place in (tmp_path / "photos", tmp_path / "photos" / "*.png"):
        with pytest.raises(
            UserError, match=r"holds pictures or videos, but they lie in .*photos, where results go; choose another"
        ) as raised:
            find_sources([place], without=tmp_path / "photos")
        assert str(raised.value).startswith(str(place))
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="holds no picture or video"):
        find_sources([tmp_path / "notes"], without=tmp_path / "notes")


@pytest.mark.parametrize("suffix", [".png", "", "/*.png"])
def test_a_path_longer_than_any_is_an_error_of_one_line(tmp_path, suffix):
    with pytest.raises(UserError, match=r"cannot be read|does not exist|holds no picture") as raised:
        find_sources([f"{tmp_path}/{'x' * 300}{suffix}"])
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"cannot be read|is not a file"):
        read_picture(tmp_path / f"{'x' * 300}.png")


@pytest.mark.skipif(os.name != "posix", reason="limits of paths")
def test_a_file_in_a_folder_that_cannot_be_looked_at_is_found_and_fails_when_read(tmp_path, monkeypatch):
    folder = tmp_path
    monkeypatch.chdir(folder)
    while len(str(folder)) < 4000:  # paths may have 4095 bytes
        folder = folder / "deep"
        os.mkdir("deep")  # noqa: PTH102 (an absolute path would be too long at the end)
        os.chdir("deep")
    Path(f"{'x' * 120}.png").write_bytes(b"x")
    found = find_sources([folder])
    assert [source.name for source in found] == [f"{'x' * 120}.png"]
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)"):
        list(read_source(found[0]))


def test_no_place_at_all_is_an_error():
    with pytest.raises(UserError, match="no picture is named"):
        find_sources([])


# --- videos ---


def test_reads_a_video_frame_by_frame(tmp_path):
    source = Source(video(tmp_path / "film 1.avi"), "film 1.avi")
    frames = list(read_source(source))
    assert [picture.frame for picture in frames] == [0, 1, 2, 3]
    assert count_pictures([source, Source(tmp_path / "b.png", "b.png")]) == 5
    for index, picture in enumerate(frames):
        assert picture.pixels.shape == (48, 64, 3)
        assert abs(picture.pixels[20, 20].astype(int) - [255 - 40 * index, 0, 40 * index]).max() < 12


def test_reads_a_video_lazily(tmp_path):
    frames = read_frames(video(tmp_path / "film.avi", frames=30))
    assert next(frames).shape == (48, 64, 3)
    frames.close()


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"no video at all", "is no video"), (b"", "is no video"), (b"\xef\xbb\xbf#EXTM3U\nhttp://127.0.0.1:9/a.ts\n", "is a playlist")],
)
def test_refuses_what_is_no_video(tmp_path, content, what):
    path = tmp_path / "film.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=what):
        list(read_frames(path))
    assert count_pictures([Source(path, "film.mp4")]) == 1


def cut(path: Path, share: float = 0.5) -> Path:
    """The beginning of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def frames_until_error(path: Path, what: str) -> int:
    frames: list[np.ndarray] = []
    with pytest.raises(UserError, match=what) as raised:
        frames.extend(read_frames(path))
    assert str(raised.value).startswith(str(path))
    return len(frames)


def test_a_video_that_is_cut_short_ends_in_an_error_after_its_frames(tmp_path):
    count = frames_until_error(cut(video(tmp_path / "film.avi", 30)), r"cut short: \d+ of the 30 frames that it declares can be decoded")
    assert 0 < count < 30
    count = frames_until_error(cut(video(tmp_path / "film.mkv", 30)), r"cut short: it ends after \d\.\d of the 3\.0 s that it declares")
    assert 0 < count < 27


@pytest.mark.parametrize("suffix", [".avi", ".mov", ".mp4"])
def test_a_video_with_damage_in_its_middle_ends_in_an_error(tmp_path, suffix):
    path = video(tmp_path / f"film{suffix}", 30)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)
    assert 5 < frames_until_error(path, "of the 30 frames that it declares can be decoded") < 30


@pytest.mark.parametrize("suffix", [".avi", ".flv", ".mkv", ".mov", ".mp4", ".ts", ".webm", ".wmv"])
def test_a_sound_video_of_any_container_is_read_to_its_end(tmp_path, suffix):
    assert len(list(read_frames(video(tmp_path / f"film{suffix}", 30)))) == 30


def test_frames_that_an_edit_of_an_mp4_leaves_out_are_not_missed(tmp_path):
    path = video(tmp_path / "film.mp4", 30)
    assert frame_count(path) == "exact"
    content = bytearray(path.read_bytes())
    edit = content.index(b"elst") + 12
    length, start = struct.unpack_from(">Ii", content, edit)
    struct.pack_into(">I", content, edit, length // 2)
    path.write_bytes(content)
    assert start == 0
    assert frame_count(path) == "unknown"
    assert len(list(read_frames(path))) == 15


def test_an_index_of_a_video_that_makes_no_sense_tells_nothing(tmp_path):
    path = video(tmp_path / "film.mp4", 3)
    content = path.read_bytes()
    generator = np.random.default_rng(5)
    told = set()
    for _ in range(300):
        damaged = bytearray(content)
        for place in generator.integers(content.index(b"moov") - 4, len(content), 8):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        told.add(frame_count(path))
    assert told == {"exact", "unknown"}


def test_ffmpeg_keeps_its_own_lines_to_itself(tmp_path):
    path = video(tmp_path / "film.mp4", 30)
    content = bytearray(path.read_bytes())
    frames = content.index(b"mdat")
    content[frames + 400 : frames + 800] = bytes(400)
    path.write_bytes(content)
    code = """
import os, sys
import cv2
from crqat_fx.errors import UserError
from crqat_fx.pictures import read_frames
if sys.argv[2] == "loud":
    cv2.VideoCapture(sys.argv[1], cv2.CAP_FFMPEG).read()  # OpenCV asks once how loud FFmpeg shall be
before = dict(os.environ)
try:
    print(sum(1 for _ in read_frames(sys.argv[1])))
except UserError as error:
    print(error)
assert dict(os.environ) == before
"""
    runs = [subprocess.run([sys.executable, "-c", code, str(path), how], capture_output=True, text=True) for how in ("quiet", "loud")]
    assert [run.returncode for run in runs] == [0, 0]
    assert runs[0].stderr == ""
    assert runs[1].stderr != ""  # the damage is one that FFmpeg speaks of
    assert runs[0].stdout == runs[1].stdout
    assert "of the 30 frames that it declares can be decoded" in runs[0].stdout


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
def test_a_file_whose_name_is_no_text_is_read_or_refused(tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    assert read_picture(saved(Path(f"{odd}.png"), noise(3, 4))).shape == (3, 4, 3)
    video(tmp_path / "film.avi").rename(f"{odd}.avi")
    with pytest.raises(UserError, match="a video whose name is not UTF-8, which OpenCV cannot open"):
        list(read_frames(Path(f"{odd}.avi")))


def test_never_takes_a_broken_video_for_a_series_of_pictures(tmp_path):
    for index in range(3):
        saved(tmp_path / f"shot_{index}.png", noise(8, 8)).rename(tmp_path / f"shot_{index}.avi")
    pattern = tmp_path / "shot_%d.avi"
    pattern.write_bytes(b"junk")
    with pytest.raises(UserError, match="is no video"):
        list(read_frames(pattern))


# --- the letterbox ---


@pytest.mark.parametrize(
    ("shape", "size", "scale", "padding"),  # scale x, y; padding top, bottom, left, right
    [
        ((480, 640), 640, (1, 1), (80, 80, 0, 0)),
        ((480, 500), (320, 256), (0.512, 245 / 480), (37, 38, 0, 0)),  # 245.76 is truncated
        ((1080, 1920), 640, (1 / 3, 1 / 3), (140, 140, 0, 0)),
        ((500, 333), 640, (426 / 333, 1.28), (0, 0, 107, 107)),  # 426.24 is truncated
        ((500, 334), 640, (427 / 334, 1.28), (0, 0, 106, 107)),  # the odd column lies to the right
        ((334, 500), 640, (1.28, 427 / 334), (106, 107, 0, 0)),
        ((638, 10), 640, (10 / 10, 639 / 638), (0, 1, 315, 315)),  # 638 * (640 / 638) is a hair under 640
        ((1, 1), 640, (640, 640), (0, 0, 0, 0)),
        ((1, 5000), 640, (0.128, 1), (319, 320, 0, 0)),
    ],
)
def test_places_a_picture_in_its_letterbox_as_published(shape, size, scale, padding):
    picture = np.full((*shape, 3), 200, np.uint8)
    boxed, placement = letterbox(picture, size)
    assert (placement.scale_x, placement.scale_y) == pytest.approx(scale, abs=1e-12)
    inside = (boxed == 200).all(axis=2)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    height, width = boxed.shape[:2]
    assert (rows[0], height - 1 - rows[-1], columns[0], width - 1 - columns[-1]) == padding
    assert (placement.top, placement.left) == (padding[0], padding[2])
    assert (boxed[~inside] == 114).all()
    assert placement.canvas == (height, width) == ((640, 640) if size == 640 else size)


def test_shrinks_by_area_and_grows_bilinearly():
    picture = noise(128, 128)
    shrunk, _ = letterbox(picture, 64)
    np.testing.assert_array_equal(shrunk, np.floor(picture.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3), dtype=np.float64) + 0.5))
    edge = np.zeros((2, 2, 3), np.uint8)
    edge[:, 1] = 200
    grown, _ = letterbox(edge, 8)
    np.testing.assert_array_equal(grown[0, :, 0], [0, 0, 25, 75, 125, 175, 200, 200])


def test_leaves_a_picture_of_the_right_size_as_it_is():
    picture = noise(64, 64)
    boxed, placement = letterbox(picture, 64)
    np.testing.assert_array_equal(boxed, picture)
    assert (placement.scale_x, placement.scale_y, placement.left, placement.top) == (1, 1, 0, 0)


def test_reading_detecting_and_drawing_import_no_torch():
    code = "import sys; import crqat_fx.detect, crqat_fx.draw, crqat_fx.detections, crqat_fx.pictures; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
