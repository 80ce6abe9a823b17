"""Detections drawn on their picture: a box, and a label with name and score on the class's own colour.

Small pictures are enlarged first, so that labels have room; lines and letters grow with the picture. Labels stay inside it and avoid each
other where there is room, the best score choosing first.
OpenCV's fonts know ASCII alone: accents are taken off other letters (`café` is drawn as `cafe`), and a character without such a form is
drawn as its code (`\\u732b`); `ascii_name` says how a name will read.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from crqat_fx.detections import Detections

FONT = cv2.FONT_HERSHEY_SIMPLEX
LEGIBLE = 640  # pixels of the longest side that labels need, at most
_BASE_HEIGHT = 22  # of FONT's capitals at scale 1, in pixels
_PLAIN = str.maketrans(
    dict(zip("ßæÆœŒøØđĐłŁ", ("ss", "ae", "AE", "oe", "OE", "o", "O", "d", "D", "l", "L"), strict=True))
    | dict(zip("\u2018\u2019\u201c\u201d\u2013\u2014", ("'", "'", '"', '"', "-", "-"), strict=True))  # quotes and dashes
)
_TURN = 0.618_033_988_749_895  # of the colour circle from one class to the next: the golden ratio never closes

Colour = tuple[int, int, int]  # RGB


@dataclass(frozen=True)
class _Style:
    line: int  # thickness of a box
    scale: float  # of the font
    stroke: int  # thickness of a letter
    margin: int  # around a label's text
    room: int  # a label of this width need not be shortened


@dataclass(frozen=True)
class Label:
    """Where a label lies on the picture, and what it says."""

    text: str
    left: int
    top: int
    width: int
    height: int
    baseline: int  # below the text

    def meets(self, other: "Label") -> bool:
        across = self.left < other.left + other.width and other.left < self.left + self.width
        return across and self.top < other.top + other.height and other.top < self.top + self.height


def enlarged(picture: np.ndarray, detections: Detections) -> tuple[np.ndarray, Detections]:
    """The picture and what was found on it, a whole number of times larger where it is too small for labels; otherwise as they are."""
    times = LEGIBLE // max(picture.shape[:2])
    if times < 2:
        return picture, detections
    larger = cv2.resize(picture, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
    return larger, replace(detections, boxes=detections.boxes * np.float32(times))


def draw(picture: np.ndarray, detections: Detections, names: Sequence[str]) -> np.ndarray:
    """A copy of the uint8 RGB picture with the detections on it, the best on top."""
    drawn = np.ascontiguousarray(picture).copy()
    height, width = drawn.shape[:2]
    style = _style(height, width)
    colours = [colour_of(int(label)) for label in detections.labels]
    for box, colour in zip(detections.boxes[::-1], colours[::-1], strict=True):
        left, top, right, bottom = _corners(box, height, width)
        cv2.rectangle(drawn, (left, top), (right, bottom), colour, style.line)
    labels = place_labels(detections, names, height, width)
    for label, colour in zip(labels[::-1], colours[::-1], strict=True):
        _write(drawn, label, colour, style)
    return drawn


def place_labels(detections: Detections, names: Sequence[str], height: int, width: int) -> list[Label]:
    """The label of each detection: above its box where there is room; else within it, below it, or at its lower edge. Of a label that is
    larger than the picture, the upper left part is seen."""
    style = _style(height, width)
    placed: list[Label] = []
    for box, score, label in zip(detections.boxes, detections.scores, detections.labels, strict=True):
        choices = _places(f"{ascii_name(names[label])} {score:.2f}", _corners(box, height, width), height, width, style)
        placed.append(next((choice for choice in choices if not any(choice.meets(other) for other in placed)), choices[0]))
    return placed


def colour_of(label: int) -> Colour:
    """A class's colour: always the same, and far from that of the classes near it."""
    hue = label * _TURN % 1
    saturation, value = ((0.90, 0.95), (0.60, 1.0), (0.95, 0.65))[label % 3]
    pixel = np.array([[[round(hue * 360), saturation, value]]], dtype=np.float32)
    red, green, blue = (cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0] * 255).round().astype(int).tolist()
    return red, green, blue


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever has the higher contrast (WCAG's relative luminance)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (value / 255 for value in background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else (255, 255, 255)


def ascii_name(name: str) -> str:
    """The name as OpenCV can draw it."""
    plain = unicodedata.normalize("NFKD", name.translate(_PLAIN))
    bare = "".join(character for character in plain if not unicodedata.combining(character))
    return "".join(character if " " <= character <= "~" else character.encode("unicode_escape").decode() for character in bare)


def _style(height: int, width: int) -> _Style:
    side = (height * width) ** 0.5
    letters = max(side * 0.016, 8)  # height of the capitals in pixels
    scale = letters / _BASE_HEIGHT
    return _Style(
        line=max(round(side * 0.003), 1),
        scale=scale,
        stroke=max(round(scale * 2.2), 1),
        margin=max(round(letters * 0.4), 2),
        room=round(letters * 20),
    )


def _corners(box: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """Pixels of the box, inside the picture."""
    left, top, right, bottom = np.clip(np.nan_to_num(box), 0, (width - 1, height - 1) * 2).round().astype(int).tolist()
    return left, top, right, bottom


def _places(text: str, box: tuple[int, int, int, int], height: int, width: int, style: _Style) -> list[Label]:
    """Where the label can lie within the picture, the preferred place first."""
    left, top, right, bottom = box
    text = _shortened(text, min(max(right - left, width // 2, style.room), width - 2 * style.margin), style)
    (across, ascent), baseline = cv2.getTextSize(text, FONT, style.scale, style.stroke)
    label_width, label_height = across + 2 * style.margin, ascent + baseline + style.margin
    half = style.line // 2
    x = max(min(left - half, width - label_width), 0)
    lowest = max(height - label_height, 0)
    rows = [top - half - label_height, top - half, bottom + half + 1, bottom + half + 1 - label_height]
    within = [row for row in rows if 0 <= row <= lowest] or [min(max(rows[0], 0), lowest)]
    return [Label(text, x, row, label_width, label_height, baseline) for row in within]


def _shortened(text: str, width: int, style: _Style) -> str:
    """The text, or as much of the name as fits before `.. score`."""
    if cv2.getTextSize(text, FONT, style.scale, style.stroke)[0][0] <= width:
        return text
    name, _space, score = text.rpartition(" ")
    for length in range(len(name) - 1, 0, -1):
        shorter = f"{name[:length].rstrip()}.. {score}"
        if cv2.getTextSize(shorter, FONT, style.scale, style.stroke)[0][0] <= width:
            return shorter
    return score


def _write(drawn: np.ndarray, label: Label, colour: Colour, style: _Style) -> None:
    corner = (label.left + label.width - 1, label.top + label.height - 1)
    cv2.rectangle(drawn, (label.left, label.top), corner, colour, cv2.FILLED)
    foot = (label.left + style.margin, label.top + label.height - label.baseline - style.margin // 2)
    cv2.putText(drawn, label.text, foot, FONT, style.scale, text_colour(colour), style.stroke, cv2.LINE_AA)
