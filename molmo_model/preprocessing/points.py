"""Points as Molmo (v1) writes them in text, and back.

A point is (x, y) in percent of the picture's width and height, from the top left. Written are one decimal each,
sorted by x, then y, after rounding:

    <point x="10.5" y="20.0" alt="cat">cat</point>
    <points x1="10.5" y1="20.0" x2="61.2" y2="9.9" alt="cats">cats</points>

Labels are XML-escaped, so a label cannot forge a coordinate. No torch here: scoring reads points too.
"""

import re
from collections.abc import Iterator, Sequence
from html import escape

from molmo_model.errors import DataError

Point = tuple[float, float]

NO_POINTS = "There are none."
"""The answer where there is nothing to point at."""

_NUMBER = r"(\d+(?:\.\d+)?)"
_PAIR = re.compile(rf'x\d*="\s*{_NUMBER}"\s+y\d*="\s*{_NUMBER}"')
_ANY_POINT = re.compile(
    r"<points?\s(?P<tag>[^<>]*)>.*?</points?>"  # a whole tag: what its label says is no point
    rf"|{_PAIR.pattern}"  # coordinates of a tag that was never closed
    r"|(?:Click)?\((\d+\.\d),? ?(\d+\.\d)\)"
    r"|(?:\d+|p)\s*=\s*(\d{3})\s*,\s*(\d{3})(?!\d)",  # thousandths of the picture
    re.DOTALL,
)


def sorted_points(points: Sequence[Point]) -> list[Point]:
    """A new list, rounded to one decimal and sorted by x * 10000 + y after rounding.

    Raises:
        DataError: a coordinate outside [0, 100].
    """
    for x, y in points:
        if not (0 <= x <= 100 and 0 <= y <= 100):
            raise DataError(f"point ({x}, {y}) is outside the picture; x and y are percent, from 0 to 100")
    return sorted((abs(round(float(x), 1)), abs(round(float(y), 1))) for x, y in points)


def points_to_text(points: Sequence[Point], label: str) -> str:
    """The points as one tag; `There are none.` without points.

    Raises:
        DataError: a coordinate outside [0, 100].
    """
    if len(points) == 0:
        return NO_POINTS
    ordered = sorted_points(points)
    text = escape(label, quote=True)
    if len(ordered) == 1:
        ((x, y),) = ordered
        return f'<point x="{x:.1f}" y="{y:.1f}" alt="{text}">{text}</point>'
    places = " ".join(f'x{i}="{x:.1f}" y{i}="{y:.1f}"' for i, (x, y) in enumerate(ordered, start=1))
    return f'<points {places} alt="{text}">{text}</points>'


def count_to_text(points: Sequence[Point], label: str) -> str:
    """The points counted: `Counting the <points ...>label</points> shows a total of 3.`"""
    if len(points) == 0:
        return NO_POINTS
    return f"Counting the {points_to_text(points, label)} shows a total of {len(points)}."


def extract_points(text: str) -> list[Point]:
    """The points of an answer in percent, in the order of the text.

    Read are the tags, `Click(10.0, 20.0)`, `(10.0, 20.0)` with exactly one decimal each, and `p=105,200` or
    `1=105,200` in thousandths. A point with a coordinate above 100 is dropped. Each stretch of text is read in one
    format only, so that `Click(...)` is one point, not two.
    """
    return [point for point in _coordinates(text) if max(point) <= 100]


def _coordinates(text: str) -> Iterator[Point]:
    for match in _ANY_POINT.finditer(text):
        tag, pair_x, pair_y, tuple_x, tuple_y, thousandth_x, thousandth_y = match.groups()
        if tag is not None:
            for x, y in _PAIR.findall(tag):
                yield float(x), float(y)
        elif pair_x is not None:
            yield float(pair_x), float(pair_y)
        elif tuple_x is not None:
            yield float(tuple_x), float(tuple_y)
        else:
            yield int(thousandth_x) / 10, int(thousandth_y) / 10
