"""Example cards of the report: which items are shown, and each one's picture, answers and points, ready to draw."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo_model.data.example import Image
from molmo_model.errors import EvaluationError
from molmo_model.preprocessing.points import extract_points, parse_exact

EMBED_BYTES = 24_000
"""Pictures up to this size are embedded as they are; larger ones as a reduced copy."""
EMBED_SIDE = 512
"""Longest side of a reduced copy, in pixels."""
EMBED_PIXELS = 50_000_000
"""Pictures of more pixels are not decoded."""
BROWSER_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
LONGEST_TEXT = 600
"""Characters of a prompt or answer that a card shows."""


@dataclass(frozen=True)
class Picture:
    """One picture of a card, as a data URI, with the size of the original in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Said:
    """What one checkpoint answered."""

    checkpoint: int
    """Number of the checkpoint in the report."""
    words: list[tuple[str, bool]]
    """The answer in pieces, True where a word differs from the reference's at the same place."""
    points: list[tuple[float, float]]
    """Points of the answer, in pixels."""
    score: float
    cut_off: bool
    parsed: bool


@dataclass(frozen=True)
class Card:
    """One item: question, reference, and every checkpoint's answer."""

    id: str
    prompt: str
    reference: str
    pictures: list[Picture]
    targets: list[tuple[float, float]]
    """Reference points, in pixels."""
    boxes: list[tuple[float, float, float, float]]
    """Regions that count as hit: left, top, width, height in pixels."""
    radius: float | None
    """Radius in pixels around the targets that counts as hit, where there are no boxes."""
    said: list[Said]
    example: str
    where: str
    """Dataset and row."""


def choose(scores: Sequence[float], wanted: int) -> list[int]:
    """Indices of the items to show: two thirds imperfect ones if there are as many, spread evenly, worst first.

    Args:
        scores: the primary score of each item.
        wanted: how many to choose.
    """
    imperfect = [index for index, score in enumerate(scores) if score < 1.0]
    perfect = [index for index, score in enumerate(scores) if score >= 1.0]
    bad = min(len(imperfect), max(wanted - len(perfect), -(-2 * wanted // 3)))
    chosen = spread(imperfect, bad) + spread(perfect, wanted - bad)
    return sorted(chosen, key=lambda index: (scores[index], index))


def spread(indices: Sequence[int], wanted: int) -> list[int]:
    """At most `wanted` of the indices, evenly over all, so that a sorted list is not judged by its beginning."""
    count = min(len(indices), max(0, wanted))
    return [indices[number * len(indices) // count] for number in range(count)]


def make(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    primary: str,
    pictures: Callable[[str, int], Sequence[Image]],
) -> Card:
    """The card of one item.

    Args:
        rows: its row of `predictions.jsonl` of every checkpoint.
        scores: its row of `scores.jsonl` of every checkpoint.
        primary: the score to show.
        pictures: the example's pictures by dataset and row.

    Raises:
        EvaluationError: the rows are not of the same item.
    """
    row = rows[-1]
    if any(other["id"] != row["id"] for other in (*rows, *scores)):
        raise EvaluationError(f"item {row['id']!r}: checkpoints were asked different items; run the stages again")
    references = row["references"]
    size = references["width"] or 1, references["height"] or 1
    metadata = references.get("metadata", {})
    targets = [_pixels(point, size) for point in references["points"] or ()]
    corners = [(*_pixels(box[:2], size), *_pixels(box[2:], size)) for box in metadata.get("boxes") or () if targets]
    boxes = [(left, top, round(right - left, 2), round(bottom - top, 2)) for left, top, right, bottom in corners]
    radius = metadata.get("radius") if targets and not boxes else None
    reference = written(references["answer"] or "")
    said = [
        Said(
            checkpoint=number,
            words=marked(shorten(written(answer["prediction"])), shorten(reference)),
            points=[_pixels(point, size) for point in extract_points(answer["prediction"])] if targets else [],
            score=score["scores"][primary],
            cut_off=answer["finish_reason"] == "length",
            parsed=score["parsed"],
        )
        for number, (answer, score) in enumerate(zip(rows, scores, strict=True))
    ]
    place = row["image"]
    return Card(
        id=row["id"],
        prompt=shorten(row["prompt"]),
        reference=shorten(reference),
        pictures=[embed(image) for image in pictures(place["dataset"], place["row"])],
        targets=targets,
        boxes=boxes,
        radius=None if radius is None else radius / 100 * max(size),
        said=said,
        example=row["example_id"],
        where=f"{place['dataset']} row {place['row']}",
    )


def marked(text: str, reference: str) -> list[tuple[str, bool]]:
    """The text in pieces; of texts with as many words as their reference, more than two, differing words are marked."""
    words, wanted = text.split(), reference.split()
    if len(words) != len(wanted) or len(words) < 3:
        return [(text, False)]
    return [(word, word != right) for word, right in zip(words, wanted, strict=True)]


def written(answer: str) -> str:
    """An answer that is one tag of points as `(17.7, 16.7) (50.0, 20.0)`; any other as it is, broken tags too."""
    points = parse_exact(answer)
    return " ".join(f"({x:.1f}, {y:.1f})" for x, y in points) if points else answer


def shorten(text: str) -> str:
    """At most `LONGEST_TEXT` characters, with a note of how many are left out."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT} more characters)"


def embed(image: Image) -> Picture:
    """A picture as a data URI: the original bytes if small, else a reduced WebP."""
    kind = BROWSER_FORMATS.get(image.format.upper())
    data = image.data
    if kind is None or len(data) > EMBED_BYTES:
        kind, data = "image/webp", _reduced(image)
    uri = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return Picture(uri, image.width, image.height)


def _reduced(image: Image) -> bytes:
    from PIL import Image as PILImage
    from PIL import ImageOps

    if image.width * image.height > EMBED_PIXELS:
        raise EvaluationError(f"picture of {image.width}x{image.height} pixels is too large for the report")
    with PILImage.open(io.BytesIO(image.data)) as opened:
        opened.draft("RGB", (EMBED_SIDE, EMBED_SIDE))  # lets a JPEG be decoded small
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    picture.thumbnail((EMBED_SIDE, EMBED_SIDE), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82, method=4)
    return buffer.getvalue()


def _pixels(point: Sequence[float], size: tuple[int, int]) -> tuple[float, float]:
    return round(point[0] / 100 * size[0], 2), round(point[1] / 100 * size[1], 2)
