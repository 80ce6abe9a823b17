"""Pictures as the detector wants them: found in folders, globs and videos, read upright as 8-bit RGB, and letterboxed.

- Exif orientation is respected, and AVIF's own. A transparent picture lies on the padding's grey (114): what it hides is not detected.
- 16-bit samples are scaled from their full range to 8 bit; grey and palette pictures become RGB; of an animation, the first frame counts.
  Floating-point samples are refused: their range is not known.
- A file is read only when it is of at most `MOST_BYTES`, and decoded only when its header says at most `MOST_PIXELS`. (Uncompressed
  formats, whose header is not read, have OpenCV's own bounds.)
- A video that gives fewer frames than its container declares ends in an error, after the frames that it did give.
"""

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from crqat_fx.errors import UserError
from crqat_fx.headers import declared_size, frame_count, orientation

PICTURE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".dib", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
VIDEO_SUFFIXES = frozenset((".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"))
MOST_BYTES = 2**30
MOST_PIXELS = 2**27
_FFMPEG_LEVEL, _FFMPEG_QUIET = "OPENCV_FFMPEG_LOGLEVEL", "-8"
PADDING = 114  # the grey level around a letterboxed picture, as published


@dataclass(frozen=True)
class Source:
    """A file that holds a picture or a video."""

    path: Path
    name: str  # with forward slashes: relative to the folder or to the fixed part of the pattern that found it, else the file's name

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Picture:
    """One picture, or one frame of a video."""

    source: Source
    pixels: np.ndarray  # uint8 [H, W, 3], RGB
    frame: int | None = None  # counted from 0


@dataclass(frozen=True)
class Placement:
    """How a picture lies in its letterbox: x' = x * scale_x + left, y' = y * scale_y + top."""

    height: int  # of the original
    width: int
    scale_x: float
    scale_y: float
    left: int
    top: int
    canvas: tuple[int, int]  # height, width of the letterbox


def letterbox(picture: np.ndarray, size: int | tuple[int, int]) -> tuple[np.ndarray, Placement]:
    """The picture resized with its aspect kept to fit `size` (height, width), centred on grey. As published, the resized sides are
    truncated, not rounded, and an odd row or column of padding goes below or to the right."""
    canvas = (size, size) if isinstance(size, int) else size
    height, width = picture.shape[:2]
    ratio = min(canvas[0] / height, canvas[1] / width)
    inner_height, inner_width = max(int(height * ratio), 1), max(int(width * ratio), 1)
    resized = picture
    if ratio != 1:
        interpolation = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR
        resized = cv2.resize(picture, (inner_width, inner_height), interpolation=interpolation)
    top, left = (canvas[0] - inner_height) // 2, (canvas[1] - inner_width) // 2
    padded = np.full((*canvas, 3), PADDING, dtype=np.uint8)
    padded[top : top + inner_height, left : left + inner_width] = resized
    return padded, Placement(height, width, inner_width / width, inner_height / height, left, top, canvas)


def find_sources(places: Iterable[str | Path], without: Path | None = None) -> list[Source]:
    """The pictures and videos that `places` name: files, folders (searched through, sorted, hidden files left out) and glob patterns.

    Each file is taken once; what lies in the folder `without` (a former result, say) is left out of folders and patterns. A place that
    names nothing is an error."""
    excluded = without.resolve() if without is not None else None
    found: dict[Path, Source] = {}
    for place in places:
        try:
            sources = _named_by(place, excluded)
            left_out = excluded is not None and not sources and bool(_named_by(place, None))
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})", where=place, remedy="check the path and its permissions") from error
        if left_out:
            remedy = "choose another folder with --out, or name the files themselves"
            raise UserError(f"holds pictures or videos, but they lie in {without}, where results go", where=place, remedy=remedy)
        if not sources:
            raise UserError("holds no picture or video", where=place, remedy=f"known are files that end in {_known_suffixes()}")
        for source in sources:
            found.setdefault(source.path.resolve(), source)
    if not found:
        raise UserError("no picture is named", remedy="give files, folders or patterns")
    return list(found.values())


def _named_by(place: str | Path, excluded: Path | None) -> list[Source]:
    path = Path(place)
    if path.is_file():
        return [Source(path, path.name)]
    if path.is_dir():
        names = sorted(entry.relative_to(path).as_posix() for entry in path.rglob("*"))
        visible = (name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts))
        return [Source(path / name, name) for name in visible if _is_known(path / name, excluded)]
    if not glob.has_magic(str(place)):
        raise UserError("does not exist", where=place, remedy="name a picture, a video, a folder or a pattern such as 'photos/*.jpg'")
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    matches = (Path(match) for match in sorted(glob.glob(str(place), recursive=True)))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    return [Source(match, _name_within(fixed, match)) for match in matches if _is_known(match, excluded)]


def _name_within(folder: Path, path: Path) -> str:
    name = path.relative_to(folder)
    return name.name if ".." in name.parts else name.as_posix()


def _is_known(path: Path, excluded: Path | None) -> bool:
    try:
        if path.suffix.lower() not in PICTURE_SUFFIXES | VIDEO_SUFFIXES or not path.is_file():
            return False
    except OSError:  # told when it is read
        return True
    return excluded is None or excluded not in path.resolve().parents


def _known_suffixes() -> str:
    return " ".join(sorted(suffix[1:] for suffix in PICTURE_SUFFIXES | VIDEO_SUFFIXES))


def read_source(source: Source) -> Iterator[Picture]:
    """The picture of a file, or the frames of a video, one at a time."""
    if not source.is_video:
        yield Picture(source, read_picture(source.path))
        return
    for index, frame in enumerate(read_frames(source.path)):
        yield Picture(source, frame, index)


def count_pictures(sources: Sequence[Source]) -> int:
    """How many pictures `read_source` will give, where a video counts what its header says: good enough for a progress bar."""
    return sum(_declared_frames(source.path) if source.is_video else 1 for source in sources)


def read_picture(path: str | Path) -> np.ndarray:
    """A picture file as uint8 RGB [H, W, 3], upright."""
    path = Path(path)
    data = _read_bytes(path)
    declared = declared_size(data)
    if declared is not None and declared[0] * declared[1] > MOST_PIXELS:
        raise UserError(
            f"is a picture of {declared[0]} x {declared[1]} pixels, more than the {MOST_PIXELS:,} that are read",
            where=path,
            remedy="shrink it or cut it into tiles",
        )
    try:
        with _quiet_opencv():
            decoded, kinds, blocks = cv2.imdecodeWithMetadata(np.frombuffer(data, np.uint8), flags=cv2.IMREAD_UNCHANGED)
    except (cv2.error, MemoryError) as error:
        raise UserError("is no picture that can be decoded", where=path, remedy="convert it to PNG or JPEG") from error
    if decoded is None:
        raise UserError("is no picture that can be decoded", where=path, remedy="convert it to PNG or JPEG")
    exif = next((block.tobytes() for kind, block in zip(kinds, blocks, strict=True) if kind == cv2.IMAGE_METADATA_EXIF), b"")
    return np.ascontiguousarray(_upright(_rgb(_eight_bit(decoded, path)), orientation(data, exif)))


def read_frames(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video file as uint8 RGB [H, W, 3], one at a time."""
    path = Path(path)
    capture = _open_video(path)
    try:
        count, reached = 0, 0.0
        while True:
            there, frame = capture.read()
            if not there:
                break
            count += 1
            reached = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if not count:
            raise UserError("is a video without a frame that can be decoded", where=path, remedy="convert it to H.264 in MP4")
        _check_end(path, capture, count, reached)
    finally:
        capture.release()


def _check_end(path: Path, capture: cv2.VideoCapture, count: int, reached: float) -> None:
    """Compares what was decoded, `count` frames up to second `reached`, with what the container declares."""
    declared, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    kind = frame_count(path)
    if kind == "unknown" or not 1 <= declared < 2**31:
        return
    remedy = "its other frames were used; get the file again"
    if kind == "exact" and count < declared:
        what = f"is damaged or cut short: {count:,} of the {declared:,.0f} frames that it declares can be decoded"
        raise UserError(what, where=path, remedy=remedy)
    # an estimate is the duration times the mean rate, which need not be the rate of every part
    if kind == "estimate" and rate > 0 and count < 0.9 * declared and reached + 1 / rate < 0.9 * declared / rate:
        what = f"is damaged or cut short: it ends after {reached + 1 / rate:.1f} of the {declared / rate:.1f} s that it declares"
        raise UserError(what, where=path, remedy=remedy)


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # a device or a pipe would never end
            raise UserError("is not a file", where=path, remedy="name a picture file")
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"is larger than {MOST_BYTES // 2**20} MiB", where=path, remedy="shrink it or cut it into tiles")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path, remedy="check the file and its permissions") from error
    if not data:
        raise UserError("is empty", where=path, remedy="give a picture file")
    return data


def _open_video(path: Path) -> cv2.VideoCapture:
    """Opens by FFmpeg alone: OpenCV's other readers take a name with digits for a series of pictures, or for a camera."""
    try:
        with path.open("rb") as file:
            start = file.read(16).lstrip(b"\xef\xbb\xbf \r\n\t")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path, remedy="check the file and its permissions") from error
    if start.startswith((b"#EXTM3U", b"ffconcat")):
        raise UserError("is a playlist, which may name any file or address", where=path, remedy="give the video itself")
    name = os.fspath(path.resolve())
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError("is a video whose name is not UTF-8, which OpenCV cannot open", where=path, remedy="rename it") from error
    with _quiet_opencv():
        capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
    if not capture.isOpened():
        capture.release()
        raise UserError("is no video that can be decoded", where=path, remedy="convert it to H.264 in MP4")
    return capture


def _declared_frames(path: Path) -> int:
    try:
        capture = _open_video(path)
    except UserError:  # told when it is read
        return 1
    frames = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    capture.release()
    return int(frames) if 1 <= frames < 2**31 else 1


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Without OpenCV's and FFmpeg's own lines on stderr: what went wrong is raised."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    chosen = os.environ.get(_FFMPEG_LEVEL)
    os.environ[_FFMPEG_LEVEL] = _FFMPEG_QUIET if chosen is None else chosen  # read once, when OpenCV first opens a video
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
        if chosen is None:
            del os.environ[_FFMPEG_LEVEL]


def _eight_bit(samples: np.ndarray, path: Path) -> np.ndarray:
    if samples.dtype == np.uint8:
        return samples
    if samples.dtype == np.uint16:
        return cv2.convertScaleAbs(samples, alpha=255 / 65535)
    raise UserError(f"holds {samples.dtype} samples", where=path, remedy="convert it to 8 or 16 bits a channel")


def _rgb(samples: np.ndarray) -> np.ndarray:
    """uint8 grey, BGR or BGRA as RGB."""
    if samples.ndim == 2:
        return cv2.cvtColor(samples, cv2.COLOR_GRAY2RGB)
    if samples.shape[2] == 1:
        return cv2.cvtColor(samples[..., 0], cv2.COLOR_GRAY2RGB)
    if samples.shape[2] == 3:
        return cv2.cvtColor(samples, cv2.COLOR_BGR2RGB)
    alpha = samples[..., 3:].astype(np.uint16)
    colour = samples[..., 2::-1] * alpha
    colour += PADDING * (255 - alpha)
    colour += 127  # rounds; the sum still fits 16 bits
    colour //= 255
    return colour.astype(np.uint8)


def _upright(picture: np.ndarray, turned: int) -> np.ndarray:
    """Undoes an Exif orientation: 2 to 4 mirror and turn, 5 to 8 also swap the sides."""
    if turned >= 5:
        picture = picture.transpose(1, 0, 2)
    if turned in (3, 4, 7, 8):
        picture = picture[::-1]
    if turned in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    return picture
