"""Boxes and counts in answers: written and read here, as points are in `preprocessing.points`. No torch here.

A box is (left, top, right, bottom) in percent of the picture. In text it is two opposite corners as points, one tag per
box, in any `PointFormat`; that is how the published evaluation of referring expressions reads boxes (allenai/molmo,
`extract_bboxes`: every two points that follow each other are corners):

    <points x1="10.5" y1="20.0" x2="61.2" y2="80.0" alt="cat">cat</points>

A bare list `[10, 20, 61, 80]` means something else in every model (pixels, thousandths, shares); it is read only where
the caller says what its numbers are.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from molmo_model.errors import DataError
from molmo_model.model_config import PointFormat
from molmo_model.preprocessing.points import NO_POINTS, points_to_text, read_points

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in percent of the picture."""


@dataclass(frozen=True)
class BoxReading:
    """The boxes of an answer."""

    boxes: tuple[Box, ...]
    """In the order of the text."""
    rejected: int
    """Boxes that are not inside the picture, or whose second corner is not to the right of and below the first, and
    points without a partner."""


def boxes_to_text(boxes: Sequence[Box], label: str, style: PointFormat = PointFormat.molmo_v1) -> str:
    """The boxes, one tag each, by their left, then their top edge; `There are none.` without boxes.

    Raises:
        DataError: a box outside the picture, or without width or height once it is rounded to a tenth of a percent.
    """
    for box in boxes:
        left, top, right, bottom = (round(edge, 1) for edge in box)
        if not (0 <= left < right <= 100 and 0 <= top < bottom <= 100):
            raise DataError(
                f"box {tuple(box)} is no box inside the picture; left < right and top < bottom are percent, 0 to 100"
            )
    corners = ([(left, top), (right, bottom)] for left, top, right, bottom in sorted(boxes))
    return " ".join(points_to_text(pair, label, style) for pair in corners) or NO_POINTS


def read_boxes(text: str, list_scale: float | None = None) -> BoxReading:
    """The boxes of an answer.

    Args:
        list_scale: what `[x1, y1, x2, y2]` counts to the right and bottom edge: 1 for shares, 100 for percent, 1000
            for thousandths; None reads no lists.
    """
    if list_scale is not None and (lists := _LIST.findall(text)):
        found = [tuple(float(number) / list_scale * 100 for number in numbers) for numbers in lists]
        odd = 0
    else:
        reading = read_points(text)
        if reading.outside:  # which corner is missing cannot be known, so no pairing can be trusted
            return BoxReading((), (len(reading.points) + reading.outside + 1) // 2)
        points = reading.points
        found = [(a.x, a.y, b.x, b.y) for a, b in zip(points[::2], points[1::2], strict=False)]
        odd = len(points) % 2
    boxes = [box for box in found if 0 <= box[0] < box[2] <= 100 and 0 <= box[1] < box[3] <= 100]
    return BoxReading(tuple((box[0], box[1], box[2], box[3]) for box in boxes), len(found) - len(boxes) + odd)


_LIST = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*[\])]")

_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_TEENS = ["eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
NUMBER_WORDS = {"none": 0} | {word: number for number, word in enumerate([*_ONES, *_TEENS, "twenty"])}
"""Numbers that are read as words, each only as a word of its own."""

_TOTAL = re.compile(r"\ba total of (\d+)\b")
_THERE_ARE = re.compile(r"\bthere (?:is|are) (\w+)\b")
_TAG = re.compile(r"<[^<>]*>")
_NONE = re.compile(r"\bnone\b")


def parse_count(text: str) -> int | None:
    """The number an answer gives, or None.

    Its last word as digits or a number word; else `a total of N` as `points.count_to_text` writes; else `There are N`
    as Molmo2 writes in front of points; else 0 for `none`. What stands inside a tag is no number.
    """
    text = _TAG.sub(" ", text).lower()
    words = text.split()
    if words and (number := _number(words[-1].rstrip(".!"))) is not None:
        return number
    if total := _TOTAL.search(text):
        return int(total[1])
    if (said := _THERE_ARE.search(text)) and (number := _number(said[1])) is not None:
        return number
    return 0 if _NONE.search(text) else None


def _number(word: str) -> int | None:
    return int(word) if word.isascii() and word.isdigit() else NUMBER_WORDS.get(word)
