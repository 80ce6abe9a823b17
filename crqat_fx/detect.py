"""Pictures in, drawn pictures and a COCO-style file out, for any detector.

    sources ─ read_source ─▶ batch of pictures ─ detector.detect ─▶ draw ─▶ out/<name>
                                                                └─▶ out/detections.json

A detector is whatever has `detections.Detector`'s two members: `torch_detector` and `onnx_detector` hold one each.
"""

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np

from crqat_fx.detections import Detections, Detector, Selection, check_size
from crqat_fx.draw import ascii_name, draw, enlarged
from crqat_fx.errors import UserError
from crqat_fx.files import written
from crqat_fx.pictures import Picture, Source, count_pictures, read_source
from crqat_fx.progress import Progress
from crqat_fx.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

RESULT = "detections.json"
MOST_AT_ONCE = 2**14
MOST_THREADS = 2**12
_WRITTEN_AS_THEY_ARE = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".webp"))
_LONGEST_SIDE = 16383  # that every one of these formats holds


@dataclass(frozen=True)
class DetectSettings:
    """Settings of the command `detect`. `conf` is what a reader of the pictures wants; scoring with AP takes 0.001."""

    vocabulary: Path | None = None  # in place of the one that the model's file carries
    text: str | None = None  # names out of the vocabulary, separated by commas
    conf: float = 0.25
    iou: float = 0.7
    max: int = 300
    size: int = 640
    batch: int = 1
    device: str = "cpu"
    threads: int | None = None  # of the processor; None leaves the runtime's own choice

    def __post_init__(self) -> None:
        _ = self.selection  # checks its values
        check_size(self.size)
        if not 1 <= self.batch <= MOST_AT_ONCE:
            raise UserError(f"batch is {self.batch}", remedy=f"give a whole number from 1 to {MOST_AT_ONCE}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UserError(f"threads is {self.threads}", remedy=f"give a whole number from 1 to {MOST_THREADS}")

    @property
    def selection(self) -> Selection:
        return Selection(conf=self.conf, iou=self.iou, max=self.max)


@dataclass(frozen=True)
class Skipped:
    """A picture that could not be read, or a video that ended badly."""

    name: str
    reason: str


@dataclass(frozen=True)
class DetectReport:
    """What `detect_pictures` did."""

    out: Path
    pictures: int  # frames of videos included
    counts: Mapping[str, int]  # detections of each name, most frequent first
    skipped: tuple[Skipped, ...]


def open_vocabulary(carried: Vocabulary | None, settings: DetectSettings, model: Path) -> Vocabulary:
    """The vocabulary of `settings.vocabulary`, else the one that the model's file carries; of it the names in `settings.text`, if any."""
    vocabulary = Vocabulary.load(settings.vocabulary) if settings.vocabulary is not None else carried
    if vocabulary is None:
        raise UserError(
            "carries no vocabulary", where=model, remedy="give one with --vocabulary; `crqat-fx embed names.txt --out v.npz` makes it"
        )
    if settings.text is None:
        return vocabulary
    try:
        return vocabulary.select(split_names(settings.text))
    except UserError as error:
        remedy = f"{error.remedy}; `crqat-fx embed names.txt --out v.npz` makes a vocabulary of any names, for --vocabulary"
        raise UserError(error.what, where=settings.vocabulary or model, remedy=remedy) from error


def split_names(text: str) -> list[str]:
    """`a, b c` -> [a, b c]; a name that holds a comma stands in double quotes. Repetitions are dropped."""
    rows = list(csv.reader([text.replace("\n", " ")], skipinitialspace=True))
    names = list(dict.fromkeys(name.strip() for row in rows for name in row if name.strip()))
    if not names:
        raise UserError("names nothing", where="--text", remedy='give names separated by commas, such as "person, red car"')
    return names


def detect_pictures(
    detector: Detector,
    sources: Sequence[Source],
    out: Path,
    *,
    batch: int = 1,
    progress: Progress | None = None,
    before_drawing: Callable[[], None] | None = None,
) -> DetectReport:
    """Detects in every picture and frame; writes each, drawn, into `out`, and all detections into `out/detections.json`.

    `before_drawing` is called once, when the first detections are there and before anything is written for good: settings that it writes
    lie beside whatever follows. Where nothing follows because an error came first, `out` is not left behind as an empty folder.

    What cannot be read is logged as a warning, skipped and reported. The drawing of `a/b.jpg` is `a/b.jpg` (PNG for formats that hold more
    than a picture), that of frame 12 of `c.mp4` is `c/000012.jpg`; a name that is taken gets a number."""
    drawn = [name for name in detector.names if ascii_name(name) != name]
    if drawn:
        logger.warning(
            "names are drawn in ASCII: %s as %s, %d in all; %s holds them whole", drawn[0], ascii_name(drawn[0]), len(drawn), RESULT
        )
    targets = drawing_targets(sources, out)
    skipped: list[Skipped] = []
    counts: Counter[str] = Counter()
    done = 0
    total = count_pictures(sources)
    try:
        with _made(out), written(out / RESULT) as temporary, temporary.open("w", encoding="utf-8") as file:
            records = _Records(file, detector.names)
            pictures = _readable(sources, skipped)
            while group := list(islice(pictures, batch)):
                detected = detector.detect([picture.pixels for picture in group])
                if before_drawing is not None and not done:
                    before_drawing()
                for picture, found in zip(group, detected, strict=True):
                    records.add(done, picture, found)
                    _write_drawing(targets[picture.source], picture, draw(*enlarged(picture.pixels, found), detector.names))
                    counts.update(detector.names[label] for label in found.labels)
                    done += 1
                    if progress is not None:
                        progress(done + len(skipped), max(total, done + len(skipped)), f"{_title(picture)}: {len(found)} found")
            if before_drawing is not None and not done:
                before_drawing()
            records.close()
    except OSError as error:
        raise UserError(
            f"cannot be written to ({error.strerror})", where=out, remedy="name another folder, or make room on the disk"
        ) from error
    return DetectReport(out, done, dict(counts.most_common()), tuple(skipped))


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Takes back, when the block fails, the folders on the way to `folder` that it made and that are still empty."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    kept = False
    try:
        yield
        kept = True
    finally:
        for one in missing if not kept else ():
            with suppress(OSError):  # not empty, or not made
                one.rmdir()


def drawing_targets(sources: Sequence[Source], out: Path) -> dict[Source, Path]:
    """Where each source's drawing goes: a file for a picture, a folder for a video. No two alike, and none on top of a source."""
    targets: dict[Source, Path] = {}
    taken: Counter[str] = Counter()
    for source in sources:
        plain = out / source.name
        suffix = "" if source.is_video else plain.suffix.lower() if plain.suffix.lower() in _WRITTEN_AS_THEY_ARE else ".png"
        target = wanted = plain.with_suffix(suffix)
        while taken[_key(target)]:
            target = wanted.with_name(f"{plain.stem}-{taken[_key(wanted)] + 1}{suffix}")
            taken[_key(wanted)] += 1
        taken[_key(target)] += 1
        targets[source] = target
    originals = {source.path.resolve() for source in sources}
    for source, target in targets.items():
        resolved = target.resolve()
        if resolved in originals or any(resolved in original.parents for original in originals if source.is_video):
            raise UserError("would be overwritten by a drawing", where=source.path, remedy="choose another folder with --out")
    return targets


def _key(path: Path) -> str:
    return path.as_posix().casefold()  # many file systems take `A.jpg` for `a.jpg`


class _Records:
    """The list in `detections.json`, written as it grows: a long video's does not have to fit the memory."""

    def __init__(self, file: TextIO, names: Sequence[str]) -> None:
        self._file = file
        self._names = names
        self._separator = "[\n"

    def add(self, image_id: int, picture: Picture, found: Detections) -> None:
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
            left, top, right, bottom = box
            record: dict[str, Any] = {"image_id": image_id, "file_name": picture.source.name}
            if picture.frame is not None:
                record["frame"] = picture.frame
            record |= {"category_id": label, "category_name": self._names[label]}
            record["bbox"] = [round(value, 3) for value in (left, top, right - left, bottom - top)]
            record["score"] = round(score, 6)
            self._file.write(self._separator + json.dumps(record))
            self._separator = ",\n"

    def close(self) -> None:
        self._file.write("[]\n" if self._separator == "[\n" else "\n]\n")


def _readable(sources: Sequence[Source], skipped: list[Skipped]) -> Iterator[Picture]:
    """Every picture that can be read; the others, and videos that cannot be read to their end, are added to `skipped`."""
    for source in sources:
        given = False
        try:
            for picture in read_source(source):
                given = True
                yield picture
        except UserError as error:
            logger.warning("%s: %s", "not read whole" if given else "skipped", error)
            skipped.append(Skipped(source.name, str(error)))


def _write_drawing(target: Path, picture: Picture, drawing: np.ndarray) -> None:
    if picture.frame is not None:
        target = target / f"{picture.frame:06d}.jpg"
    if max(drawing.shape) > _LONGEST_SIDE:
        target = target.with_suffix(".png")
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if target.suffix in (".jpg", ".jpeg") else []
    _there, encoded = cv2.imencode(target.suffix, cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR), options)
    with written(target) as temporary:
        temporary.write_bytes(encoded.tobytes())


def _title(picture: Picture) -> str:
    return picture.source.name if picture.frame is None else f"{picture.source.name} frame {picture.frame}"
