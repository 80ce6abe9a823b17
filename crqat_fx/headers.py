"""What the header of a file says, read without decoding: a picture's size and which way up it is, whether a video counts its frames.

    size          PNG, JPEG, GIF, BMP, WebP, TIFF, JPEG 2000 and AVIF
    orientation   tag 0x0112 of an Exif block; in AVIF, whose Exif orientation must be disregarded, the properties `irot` and `imir`
    frames        AVI counts them, and so do MP4 and QuickTime unless an edit cuts some away; other containers give a duration

Nobody vouches for these bytes: what makes no sense is passed over, and no length in them is believed.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

_JPEG_MARKER = re.compile(rb"\xff([^\xff\0])")
_MOST_OF_AN_INDEX = 2**26  # bytes of an MP4's `moov`: a day of video has less
_MOST_BOXES = 10_000  # side by side
_UNMIRRORED = {0: 1, 1: 8, 2: 3, 3: 6}  # quarter turns to the left, as an Exif orientation
_MIRRORED = ({0: 4, 1: 5, 2: 2, 3: 7}, {0: 2, 1: 7, 2: 4, 3: 5})  # then top to bottom, or left to right

FrameCount = Literal["exact", "estimate", "unknown"]


def orientation(data: bytes, exif: bytes) -> int:
    """As Exif counts them, 1 to 8, of a picture file and the Exif block that was found in it."""
    if data[4:8] != b"ftyp":
        return _exif_orientation(exif)
    try:
        properties = _avif_properties(data)
    except struct.error:
        return 1
    turn, mirror = properties.get(b"irot", b""), properties.get(b"imir", b"")
    table = _MIRRORED[mirror[0] & 1] if mirror else _UNMIRRORED
    return table[turn[0] & 3 if turn else 0]


def frame_count(path: Path) -> FrameCount:
    """What the number of frames that FFmpeg reports for a video is worth."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"AVI ":
            return "exact"
        if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return "estimate"
        try:
            return _counted_in(_movie(file))
        except (struct.error, ZeroDivisionError):
            return "unknown"


def _exif_orientation(exif: bytes) -> int:
    """The value of tag 0x0112 in an Exif block's first directory, 1 where there is none that makes sense."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    values = dict(_short_tags(exif, order))
    orientation = values.get(0x0112, 1)
    return orientation if 1 <= orientation <= 8 else 1


def _short_tags(data: bytes, order: str) -> Iterator[tuple[int, int]]:
    """(tag, value) of the single whole numbers in the first directory of a TIFF structure, as far as it goes."""
    if len(data) < 8:
        return
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for offset in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        tag, kind = struct.unpack_from(f"{order}HH", data, offset)
        if kind in (3, 4):
            yield tag, struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", data, offset + 8)[0]


def declared_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) as the header of a compressed format says, None where the header is not read here or is too short."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _pair(">II", data, 16)
        if data.startswith(b"\xff\xd8"):
            return _jpeg_size(data)
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _pair("<HH", data, 6)
        if data.startswith(b"BM"):
            width, height = _pair("<HH" if data[14:18] == b"\x0c\0\0\0" else "<ii", data, 18)
            return abs(width), abs(height)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp_size(data)
        if data.startswith((b"II*\0", b"MM\0*")):
            values = dict(_short_tags(data, "<" if data.startswith(b"II") else ">"))
            return values.get(256, 0), values.get(257, 0)
        codestream = data.find(b"\xff\x4f\xff\x51", 0, 65536) if data.startswith((b"\0\0\0\x0cjP", b"\xff\x4f")) else -1
        if codestream >= 0:
            right, bottom = _pair(">II", data, codestream + 8)
            left, top = _pair(">II", data, codestream + 16)
            return right - left, bottom - top
        if data[4:8] == b"ftyp":
            return _pair(">II", _avif_properties(data).get(b"ispe", b""), 4)
    except struct.error:
        return None
    return None


def _pair(form: str, data: bytes, offset: int) -> tuple[int, int]:
    first, second = struct.unpack_from(form, data, offset)
    return first, second


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """From the frame header, past the segments before it (a thumbnail in one of them has a frame header of its own)."""
    offset = 2
    while match := _JPEG_MARKER.search(data, offset):
        marker, offset = match[1][0], match.end()
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = _pair(">HH", data, offset + 3)
            return width, height
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:
            offset += struct.unpack_from(">H", data, offset)[0]
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = _pair("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


# --- boxes: AVIF, MP4, QuickTime ---


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start and end of the content) of each box in a row, as far as they make sense."""
    for _ in range(_MOST_BOXES):
        if start + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, content)
            content += 8
        following = start + size if size else end
        if not content <= following <= end:
            return
        yield kind, content, following
        start = following


def _first_boxes(data: bytes, start: int, end: int) -> dict[bytes, tuple[int, int]]:
    found: dict[bytes, tuple[int, int]] = {}
    for kind, content, following in _boxes(data, start, end):
        found.setdefault(kind, (content, following))
    return found


def _avif_properties(data: bytes) -> dict[bytes, bytes]:
    """The properties of an AVIF's primary item, by kind."""
    start, end = _first_boxes(data, 0, len(data)).get(b"meta", (0, 0))
    inside = _first_boxes(data, start + 4, end)
    if not {b"pitm", b"iprp"} <= inside.keys():
        return {}
    start, _ = inside[b"pitm"]
    (version,) = struct.unpack_from(">B", data, start)
    (primary,) = struct.unpack_from(">I" if version else ">H", data, start + 4)
    around = _first_boxes(data, *inside[b"iprp"])
    if not {b"ipco", b"ipma"} <= around.keys():
        return {}
    properties = list(_boxes(data, *around[b"ipco"]))
    start, end = around[b"ipma"]
    found: dict[bytes, bytes] = {}
    for index in _associated(data[start:end], primary):
        if 0 < index <= len(properties):
            kind, content, following = properties[index - 1]
            found.setdefault(kind, data[content:following])
    return found


def _associated(table: bytes, item: int) -> list[int]:
    """The numbers of an item's properties, from 1, in an `ipma` box."""
    version, flags, count = struct.unpack_from(">B3sI", table, 0)
    one = ">H" if flags[2] & 1 else ">B"
    place = 8
    for _ in range(count):
        name = ">I" if version else ">H"
        (listed,) = struct.unpack_from(name, table, place)
        (length,) = struct.unpack_from(">B", table, place + struct.calcsize(name))
        place += struct.calcsize(name) + 1
        if listed == item:
            marked = 0x80 if one == ">B" else 0x8000  # as essential
            return [struct.unpack_from(one, table, place + at * struct.calcsize(one))[0] & ~marked for at in range(length)]
        place += length * struct.calcsize(one)
    return []


def _movie(file: BinaryIO) -> bytes:
    """The content of the `moov` box, none where there is none or it is no index."""
    place = 0
    for _ in range(_MOST_BOXES):
        file.seek(place)
        head = file.read(16)
        size, kind = struct.unpack_from(">I4s", head, 0)
        length = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", head, 8)
            length = 16
        if size < length or size >= 2**62:
            return b""
        if kind == b"moov":
            file.seek(place + length)
            return file.read(size - length) if size <= _MOST_OF_AN_INDEX else b""
        place += size
    return b""


def _counted_in(movie: bytes) -> FrameCount:
    inside = _first_boxes(movie, 0, len(movie))
    if b"mvhd" not in inside:
        return "unknown"
    if b"mvex" in inside:  # in fragments, which the index does not count
        return "estimate"
    ticks, _ = _times(movie, inside[b"mvhd"][0])
    for kind, start, end in _boxes(movie, 0, len(movie)):
        track = _first_boxes(movie, start, end) if kind == b"trak" else {}
        media = _first_boxes(movie, *track.get(b"mdia", (0, 0)))
        if not {b"hdlr", b"mdhd"} <= media.keys() or movie[media[b"hdlr"][0] + 8 : media[b"hdlr"][0] + 12] != b"vide":
            continue
        media_ticks, duration = _times(movie, media[b"mdhd"][0])
        edits = _first_boxes(movie, *track.get(b"edts", (0, 0)))
        shown = _shown(movie, edits[b"elst"][0]) if b"elst" in edits else None
        whole = shown is None or (len(shown) == 1 and (shown[0] + 2) / ticks >= duration / media_ticks)
        return "exact" if whole else "unknown"
    return "unknown"


def _times(movie: bytes, start: int) -> tuple[int, int]:
    """Ticks a second and duration in ticks, of an `mvhd` or `mdhd` box."""
    (version,) = struct.unpack_from(">B", movie, start)
    ticks, duration = struct.unpack_from(">IQ", movie, start + 20) if version == 1 else struct.unpack_from(">II", movie, start + 12)
    return ticks, duration


def _shown(movie: bytes, start: int) -> list[int]:
    """The lengths of the parts that an `elst` box shows; its pauses are left out."""
    version, _, count = struct.unpack_from(">B3sI", movie, start)
    entry = ">QqI" if version == 1 else ">IiI"
    parts = (struct.unpack_from(entry, movie, start + 8 + at * struct.calcsize(entry)) for at in range(count))
    return [length for length, begins, _ in parts if begins >= 0]
