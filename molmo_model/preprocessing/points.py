"""Points as Molmo writes them in text, and back: the one place for both.

A point is (x, y) in percent of the picture's width and height, from the top left. `PointFormat` chooses how it is
written:

    molmo_v1   <point x="10.5" y="20.0" alt="cat">cat</point>
               <points x1="10.5" y1="20.0" x2="61.2" y2="9.9" alt="cats">cats</points>
    html_v1    <points coords="1 1 042 310 2 500 120">cats</points>            (Molmo2; pictures separated by a tab)
    html_v2    <points coords="1 1 042 310 2 500 120;2 3 007 990">cats</points>  (by a semicolon)

`molmo_v1` has percent with one decimal. `html` has thousandths of the picture with three digits: per picture its number
from 1 (of a clip, the frame's seconds with one decimal), then index, x and y of every point, the index going on over
pictures. Both are sorted by x, then y, after rounding.

What is read is any of these, Molmo2's `<tracks ...>` (the index is the object's), and what earlier models said:
`<points 1.5 1 42.0 31.0/>`, `Click(10.0, 20.0)`, `(10.0, 20.0)` with exactly one decimal each, `p=105,200` and
`1=105,200` in thousandths. A point outside the picture is left out and counted, never moved onto the edge.

Labels are XML-escaped, so a label cannot forge a coordinate. No torch here: scoring reads points too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from molmo_model.errors import DataError
from molmo_model.model_config import PointFormat

Point = tuple[float, float]
Frame = tuple[float, Sequence[Point]]
"""A picture's number from 1 (int) or a frame's seconds (float), and the points there."""

NO_POINTS = "There are none."
"""The answer where there is nothing to point at."""

SEPARATORS = {PointFormat.html_v1: "\t", PointFormat.html_v2: ";"}
"""What stands between two pictures or frames."""


@dataclass(frozen=True)
class Located:
    """One point that was read."""

    x: float
    """Percent of the width."""
    y: float
    """Percent of the height."""
    frame: float | None = None
    """Number of the picture, or seconds of the frame, where the format says so."""
    index: int | None = None
    """Number of the point, or in tracks of the object, where the format says so."""


@dataclass(frozen=True)
class Reading:
    """What an answer points at."""

    points: tuple[Located, ...]
    """In the order of the text."""
    outside: int
    """Points that were left out because they lie outside the picture."""
    malformed: int
    """Tags with something in their coordinates that is no point."""


# --- writing


def sorted_points(points: Sequence[Point]) -> list[Point]:
    """A new list, rounded to one decimal and sorted by x, then y, after rounding.

    Raises:
        DataError: a coordinate outside [0, 100].
    """
    _require_inside(points)
    return sorted((abs(round(float(x), 1)), abs(round(float(y), 1))) for x, y in points)


def points_to_text(
    points: Sequence[Point], label: str, style: PointFormat = PointFormat.molmo_v1, alt: str | None = None
) -> str:
    """The points of one picture as one tag; `There are none.` without points.

    Args:
        label: what the tag shows.
        alt: what is pointed at, where the tag shows something else, as inside a sentence; None is the label.

    Raises:
        DataError: a coordinate outside [0, 100].
    """
    if len(points) == 0:
        return NO_POINTS
    if style in SEPARATORS:
        return frames_to_text([(1, points)], label, style, alt)
    ordered = sorted_points(points)
    text, named = escape(label, quote=True), escape(label if alt is None else alt, quote=True)
    if len(ordered) == 1:
        ((x, y),) = ordered
        return f'<point x="{x:.1f}" y="{y:.1f}" alt="{named}">{text}</point>'
    places = " ".join(f'x{i}="{x:.1f}" y{i}="{y:.1f}"' for i, (x, y) in enumerate(ordered, start=1))
    return f'<points {places} alt="{named}">{text}</points>'


def frames_to_text(frames: Sequence[Frame], label: str, style: PointFormat, alt: str | None = None) -> str:
    """The points of several pictures, or of a clip's frames, as one tag; frames without points are left out.

    Args:
        frames: per picture its number from 1 as an int, per frame its seconds as a float, which get one decimal.

    Raises:
        DataError: a coordinate outside [0, 100], or a format that cannot tell pictures apart.
    """
    if style not in SEPARATORS:
        raise DataError(f"point format {style.value} cannot say in which picture a point lies; use html_v1 or html_v2")
    parts, index = [], 1
    for frame, points in frames:
        _require_inside(points)
        ordered = sorted((round(float(x) * 10), round(float(y) * 10)) for x, y in points)
        if ordered:
            places = " ".join(f"{n} {x:03d} {y:03d}" for n, (x, y) in enumerate(ordered, start=index))
            parts.append(f"{frame if isinstance(frame, int) else f'{frame:.1f}'} {places}")
            index += len(ordered)
    if not parts:
        return NO_POINTS
    named = "" if alt is None else f' alt="{escape(alt, quote=True)}"'
    return f'<points{named} coords="{SEPARATORS[style].join(parts)}">{escape(label, quote=True)}</points>'


def count_to_text(
    points: Sequence[Point], label: str, style: PointFormat = PointFormat.molmo_v1, first: bool = False
) -> str:
    """The points counted: `Counting the <points ...>label</points> shows a total of 3.`

    Args:
        first: the number comes first: `There are 3 <points ...>label</points>.`
    """
    if len(points) == 0:
        return NO_POINTS
    tag = points_to_text(points, label, style)
    return f"There are {len(points)} {tag}." if first else f"Counting the {tag} shows a total of {len(points)}."


def _require_inside(points: Sequence[Point]) -> None:
    for x, y in points:
        if not (0 <= x <= 100 and 0 <= y <= 100):
            raise DataError(f"point ({x}, {y}) is outside the picture; x and y are percent, from 0 to 100")


# --- reading

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_PAIR = re.compile(rf'x\d*="\s*{_NUMBER}"\s+y\d*="\s*{_NUMBER}"')
_ANY_POINT = re.compile(
    r'<(?:points|tracks)\b[^<>]*?\bcoords="(?P<coords>[^"<>]*)(?:"[^<>]*>.*?</(?:points|tracks)>)?'  # Molmo2
    r"|<points\s+(?P<bare>[\d. ]+)/>"
    r"|<points?\s(?P<tag>[^<>]*)>.*?</points?>"  # a whole tag: what its label says is no point
    rf"|{_PAIR.pattern}"  # coordinates of a tag that was never closed
    r"|(?:Click)?\((-?\d+\.\d),? ?(-?\d+\.\d)\)"
    r"|(?:\d+|p)\s*=\s*(\d{3})\s*,\s*(\d{3})(?!\d)",  # thousandths of the picture
    re.DOTALL,
)
_ALT = re.compile(r'\balt="[^"]*"')
_TRIPLET = re.compile(r"(\d+) (\d{3,4}) (\d{3,4})(?= |$)")
_BARE_TRIPLET = re.compile(r"(\d+) (\d+\.\d+) (\d+\.\d+)(?= |$)")
_FRAME = re.compile(r"(\d+(?:\.\d+)?) (.*)", re.DOTALL)

_COORDINATE = r"\s*\d+(?:\.\d+)?"
_WHOLE_TAGS = (
    rf'<point\s+x="{_COORDINATE}"\s+y="{_COORDINATE}"\s+alt="[^"]*">[^<]*</point>',
    rf'<points\s+(?:x\d+="{_COORDINATE}"\s+y\d+="{_COORDINATE}"\s+)+alt="[^"]*">[^<]*</points>',
    r'<points(?:\s+alt="[^"]*")?\s+coords="[\d\t;:,. ]+">[^<]*</points>',
)
_WHOLE_TAG = f"(?:{'|'.join(_WHOLE_TAGS)})"
_WHOLE = re.compile(rf"(?:Counting the )?{_WHOLE_TAG}(?: shows a total of \d+\.)?|There (?:is|are) \d+ {_WHOLE_TAG}\.")


def read_points(text: str) -> Reading:
    """The points of an answer, in the order of the text, and what was left out.

    Each stretch of text is read in one format only, so that `Click(...)` is one point, not two.
    """
    found: list[Located] = []
    outside = malformed = 0
    for match in _ANY_POINT.finditer(text):
        points, clean = _of_match(match)
        inside = [point for point in points if 0 <= point.x <= 100 and 0 <= point.y <= 100]
        found += inside
        outside += len(points) - len(inside)
        malformed += not clean
    return Reading(tuple(found), outside, malformed)


def extract_points(text: str) -> list[Point]:
    """The points of an answer in percent, in the order of the text; see `read_points` for what was left out."""
    return [(point.x, point.y) for point in read_points(text).points]


def parse_exact(text: str) -> list[Point] | None:
    """The points of an answer that is nothing but one tag of points, alone or counted, all of them inside the picture;
    an empty list where it says that there are none, None for any other answer."""
    text = text.strip()
    if text == NO_POINTS:
        return []
    if _WHOLE.fullmatch(text) is None:
        return None
    reading = read_points(text)
    return None if reading.outside or reading.malformed else [(point.x, point.y) for point in reading.points]


def _of_match(match: "re.Match[str]") -> tuple[list[Located], bool]:
    """The points of one stretch of text, and whether all of it was read."""
    named = match.groupdict()
    if named["coords"] is not None:
        return _of_frames(re.split(r"[\t;:,]", named["coords"]), _TRIPLET, 0.1)
    if named["bare"] is not None:
        return _of_frames([named["bare"].strip()], _BARE_TRIPLET, 1.0)
    if named["tag"] is not None:
        rest = _ALT.sub("", _PAIR.sub("", named["tag"]))
        return [Located(float(x), float(y)) for x, y in _PAIR.findall(named["tag"])], not rest.strip()
    pair_x, pair_y, tuple_x, tuple_y, thousandth_x, thousandth_y = match.groups()[-6:]
    if thousandth_x is not None:
        return [Located(int(thousandth_x) / 10, int(thousandth_y) / 10)], True
    return [Located(float(pair_x or tuple_x), float(pair_y or tuple_y))], True


def _of_frames(frames: Sequence[str], triplet: "re.Pattern[str]", unit: float) -> tuple[list[Located], bool]:
    """Points of frames such as `1 1 042 310 2 500 120`; `unit` is percent per written unit."""
    found: list[Located] = []
    clean = True
    for frame in frames:
        head = _FRAME.fullmatch(frame.strip())
        places = list(triplet.finditer(head[2])) if head else []
        clean &= head is not None and " ".join(place[0] for place in places) == head[2]
        found += [_located(head[1], *place.groups(), unit=unit) for place in places if head]
    return found, clean


def _located(frame: str, index: str, x: str, y: str, *, unit: float) -> Located:
    scale = round(1 / unit)  # dividing gives 31.0 where multiplying by 0.1 gives 31.000000000000004
    return Located(float(x) / scale, float(y) / scale, float(frame), int(index))
