"""Example cards of the report: which items are shown, and each one's question, pictures, answers, points and regions.

A card is plain JSON for the page's script, which draws it when it is looked at. Texts are shortened here; escaping is
the page's. No torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from molmo_model.errors import EvaluationError
from molmo_model.eval.outlines import outline
from molmo_model.eval.pictures import Still
from molmo_model.preprocessing.points import parse_exact, read_points
from molmo_model.preprocessing.structured import read_boxes

LONGEST_TEXT = 600
"""Characters of a prompt or answer that a card shows."""
MOST_MARKS = 200
"""Points, boxes or outlines that are drawn of one answer or reference."""


def choose(
    scores: Sequence[float], wanted: int, unparsed: Sequence[int] = (), changed: Sequence[int] = ()
) -> list[int]:
    """Indices of the items to show, worst first: two thirds imperfect ones if there are as many, spread evenly, so that
    a sorted list is not judged by its beginning; of graded scores half of them the worst.

    Args:
        scores: of each item, 1 or more where it is as good as can be; more is better.
        wanted: how many to choose.
        unparsed: items with an answer that could not be read; up to a sixth of the cards.
        changed: items whose score differs between checkpoints, the most telling first; up to a third of the cards.
    """
    chosen = dict.fromkeys([*spread(unparsed, wanted // 6), *changed[: wanted // 3]])
    imperfect = [index for index, score in enumerate(scores) if score < 1.0]
    perfect = [index for index, score in enumerate(scores) if score >= 1.0 and index not in chosen]
    bad = min(len(imperfect), max(wanted - len(perfect), -(-2 * wanted // 3)))
    bad = max(0, bad - sum(scores[index] < 1.0 for index in chosen))
    rest = [index for index in imperfect if index not in chosen]
    if len(set(scores)) > 2:
        worst = sorted(rest, key=lambda index: scores[index])[: bad // 2]
        chosen |= dict.fromkeys(worst)
        rest, bad = [index for index in rest if index not in chosen], bad - len(worst)
    chosen |= dict.fromkeys(spread(rest, bad))
    chosen |= dict.fromkeys(spread(perfect, wanted - len(chosen)))
    return sorted(chosen, key=lambda index: (scores[index], index))


def spread(indices: Sequence[int], wanted: int) -> list[int]:
    """At most `wanted` of the indices, evenly over all."""
    count = min(len(indices), max(0, wanted))
    return [indices[number * len(indices) // count] for number in range(count)]


def make(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    name: str,
    stills: Sequence[Still],
    longest: int = LONGEST_TEXT,
) -> dict[str, Any]:
    """The card of one item, as the page's script reads it. Places are in pixels of the picture with the given number.

    Args:
        rows: its row of `predictions.jsonl` of every checkpoint.
        scores: its row of `scores.jsonl` of every checkpoint.
        name: the score to show.
        stills: the example's pictures and frames.
        longest: most characters of a text.

    Raises:
        EvaluationError: the rows are not of the same item.
    """
    row = rows[-1]
    if any(other["id"] != row["id"] for other in (*rows, *scores)):
        raise EvaluationError(f"item {row['id']!r}: checkpoints were asked different items; run the stages again")
    place = row["image"]
    return {
        "id": row["id"],
        "prompt": shorten(row["prompt"], longest),
        "reference": shorten(written(row["references"]["answer"] or ""), longest),
        "example": shorten(row["example_id"], longest),
        "where": f"{place['dataset']} row {place['row']}",
        "pictures": [
            {"key": still.key, "width": still.image.width, "height": still.image.height}
            | ({} if still.seconds is None else {"seconds": round(still.seconds, 2)})
            for still in stills
        ],
        **_targets(row["references"]),
        "answers": [_answer(said, score, name, stills, longest) for said, score in zip(rows, scores, strict=True)],
    }


def written(answer: str) -> str:
    """An answer that is one tag of points as `(17.7, 16.7) (50.0, 20.0)`; any other as it is, broken tags too."""
    points = parse_exact(answer)
    return " ".join(f"({x:.1f}, {y:.1f})" for x, y in points) if points else answer


def shorten(text: str, longest: int = LONGEST_TEXT) -> str:
    """At most `longest` characters, with a note of how many are left out; halves of surrogate pairs become `?`."""
    text = text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest} more characters)"
    return text.encode("utf-8", "replace").decode("utf-8")


def _answer(
    row: Mapping[str, Any], score: Mapping[str, Any], name: str, stills: Sequence[Still], longest: int
) -> dict[str, Any]:
    """What one checkpoint said; facts that are as usual are left out."""
    found: dict[str, Any] = {"text": shorten(written(row["prediction"]), longest), "score": score["scores"].get(name)}
    if "measured" in row:
        found["measured"] = True
    if not score["parsed"]:
        found["unparsed"] = True
    if row["finish_reason"] == "length":
        found["cut"] = True
    if score.get("read") is not None:
        found["read"] = shorten(str(score["read"]), longest)
    if "iou" in score["scores"] and stills:  # the answer's points are corners
        size = stills[0].image.width, stills[0].image.height
        found["boxes"] = [_sides(box, size) for box in read_boxes(row["prediction"]).boxes[:MOST_MARKS]]
    elif points := _said_points(row, stills):
        found["points"] = points
    return found


def _said_points(row: Mapping[str, Any], stills: Sequence[Still]) -> list[tuple[int, float, float]]:
    """(number of the picture, x, y) of every point of an answer that lies in a picture shown."""
    if not any(tag in row["prediction"] for tag in ("<", "(", "=")):
        return []  # most answers: no need to look closer
    found = []
    for point in read_points(row["prediction"]).points[:MOST_MARKS]:
        number = _picture_of(point.frame, stills)
        if number is not None:
            size = stills[number].image.width, stills[number].image.height
            found.append((number, *_pixels((point.x, point.y), size)))
    return found


def _picture_of(frame: float | None, stills: Sequence[Still]) -> int | None:
    """Number of the picture that a point is in: its own from 1 on, of films that of the frame within a second."""
    films = [number for number, still in enumerate(stills) if still.seconds is not None]
    if frame is not None and films:
        number = min(films, key=lambda number: abs((stills[number].seconds or 0.0) - frame))
        return number if abs((stills[number].seconds or 0.0) - frame) < 1.0 else None
    number = 0 if frame is None else int(frame) - 1
    return number if 0 <= number < len(stills) else None


def _targets(references: Mapping[str, Any]) -> dict[str, Any]:
    """Points and regions that are right, on the first picture: `targets`, `boxes`, `outlines`, `radius`."""
    size = references["width"] or 1, references["height"] or 1
    metadata = references.get("metadata") or {}
    targets = [_pixels(point, size) for point in (references["points"] or ())[:MOST_MARKS]]
    boxes = [_sides(box, size) for box in _boxes(metadata)]
    outlines = [path for mask in (metadata.get("masks") or ())[:MOST_MARKS] if (path := outline(mask, size))]
    radius = metadata.get("radius") if targets and not boxes and not outlines else None
    found = {"targets": targets, "boxes": boxes, "outlines": outlines}
    return {name: marks for name, marks in found.items() if marks} | (
        {} if radius is None else {"radius": round(radius / 100 * max(size), 2)}
    )


def _boxes(metadata: Mapping[str, Any]) -> Sequence[Sequence[float]]:
    """Boxes in percent: left, top, right, bottom; what is not four numbers is no box."""
    boxes = metadata.get("boxes") or ()
    return [box for box in boxes if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))][:MOST_MARKS]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sides(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, width and height in pixels of a box in percent."""
    (left, top), (right, bottom) = _pixels(box[:2], size), _pixels(box[2:], size)
    return left, top, round(right - left, 2), round(bottom - top, 2)


def _pixels(point: Sequence[float], size: tuple[int, int]) -> tuple[float, float]:
    return round(point[0] / 100 * size[0], 2), round(point[1] / 100 * size[1], 2)
