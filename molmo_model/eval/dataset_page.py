"""A page to look at what a model is shown of a dataset: pictures with their crops and points, tokens with their loss.

`pipelines.visualize` makes it. Nothing is loaded from elsewhere and there are no scripts: pictures are data URIs,
charts inline SVG, and everything that came from data is escaped. Equal inputs give equal bytes. No torch here.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo_model.data.example import Conversation, Example, Image, Message, Point
from molmo_model.errors import DataError, MolmoError
from molmo_model.eval.pages import TEMPLATES, environment
from molmo_model.eval.pictures import Picture, embed
from molmo_model.preprocessing.preprocessor import IGNORE, PREFIX_SEGMENT, Encoded, Preprocessor
from molmo_model.preprocessing.tiling import IMAGE_TOKENS, layout, letterbox_box

THUMBNAIL = 160
"""Pixels per side of a crop's picture on the page."""
MOST_CROPS = 40
"""Crops, or frames of a film, that are drawn of one example."""
MOST_SPANS = 5000
"""Tokens, runs of image tokens counted as one, that are written of one example."""


@dataclass(frozen=True)
class Span:
    """One token, or a run of image tokens, as the page shows it."""

    text: str
    kind: str
    """`image`, `prefix`, `asked`, `learned` (a token that the loss is computed on) or `end` (learned, not fed)."""
    segment: int
    """Number of the conversation; -1 in the shared prefix."""
    title: str


@dataclass(frozen=True)
class Box:
    """A crop on its picture, in percent of width and height."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Shown:
    """One example on the page."""

    example: Example
    encoded: Encoded | DataError
    """What the model gets, or why its preprocessing refuses the example."""
    conversations: Sequence[int]
    """Which conversations were taken, in the order given to the preprocessor."""
    where: str
    """Row, split and, where it was drawn from a run's stream, entry and epoch."""
    tokens: int | None = None
    """What the mixture reserved for it; None without a mixture."""
    augmented: bool = False
    """Its pixels may have been changed, so crops are not drawn onto the picture."""


@dataclass(frozen=True)
class Page:
    """Everything that the page shows besides examples."""

    dataset: str
    facts: Mapping[str, Any]
    """Name to value, in order: family, licence, counts."""
    problems: Sequence[Mapping[str, Any]] = ()
    """Bad rows, the first of them."""
    entries: Sequence[Mapping[str, Any]] = ()
    """The run's mixture: entry, dataset, rate, examples, epochs."""
    charts: Mapping[str, str] = field(default_factory=dict)
    """Caption to SVG."""


def render(page: Page, shown: Sequence[Shown], preprocessor: Preprocessor) -> str:
    """The HTML document."""
    style = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "dataset.css"))
    return (
        environment()
        .get_template("dataset.html.j2")
        .render(page=page, style=style, examples=[_example(one, preprocessor) for one in shown])
    )


def _example(one: Shown, preprocessor: Preprocessor) -> dict[str, Any]:
    example, refused = one.example, isinstance(one.encoded, DataError)
    taken = [example.conversations[number] for number in one.conversations]
    pictures = _pictures(example.images[:MOST_CROPS]) if refused else map(embed, example.images)
    return {
        "id": example.id,
        "where": one.where,
        "error": str(one.encoded) if refused else "",
        **_as_encoded(one, preprocessor),
        "pictures": [
            {
                "picture": picture,
                "boxes": [] if one.augmented or refused else crop_boxes(picture.height, picture.width, preprocessor),
                "points": _points(taken) if len(example.images) == 1 else [],
            }
            for picture in pictures
        ],
        "films": [
            f"{video.format} {video.width} x {video.height}, {video.frames} frames, {video.duration:.2f} s"
            + (f", of which {video.clip[0]:g} to {video.clip[1]:g} s" if video.clip else "")
            for video in example.videos
        ],
        "conversations": [
            {
                "style": conversation.style,
                "weight": conversation.weight,
                "turns": [(message.role, _said(message)) for message in conversation.messages],
            }
            for conversation in taken
        ],
    }


def _as_encoded(one: Shown, preprocessor: Preprocessor) -> dict[str, Any]:
    """What a card says of the tokens and the crops; of a refused example there are none."""
    if isinstance(one.encoded, DataError):
        return {"thumbnails": [], "hidden_crops": 0, "spans": [], "hidden_spans": 0}
    written = spans(one.encoded, preprocessor)
    return {
        "tokens": len(one.encoded),
        "reserved": one.tokens,
        "learned": int((one.encoded.labels != IGNORE).sum()),
        "crops": len(one.encoded.pixels),
        "thumbnails": [_thumbnail(crop) for crop in one.encoded.pixels[:MOST_CROPS]],
        "hidden_crops": max(0, len(one.encoded.pixels) - MOST_CROPS),
        "spans": written[:MOST_SPANS],
        "hidden_spans": max(0, len(written) - MOST_SPANS),
    }


def _pictures(images: Sequence[Image]) -> Iterator[Picture]:
    """Those that can be shown: an example may be refused for a picture that no one can decode."""
    for image in images:
        try:
            yield embed(image)
        except (OSError, ValueError, MolmoError):
            continue


def crop_boxes(height: int, width: int, preprocessor: Preprocessor) -> list[Box]:
    """Where the high-resolution crops of a picture lie on it, row by row, overlaps included."""
    spec = preprocessor.config.tiling
    one = layout(height, width, spec)
    if not one.canvas[0]:
        return []
    canvas_height, canvas_width = one.canvas
    top = left = 0
    inner = canvas_height, canvas_width
    if spec.letterbox:
        box = letterbox_box(height, width, canvas_height, canvas_width)
        top, left, inner = box.top, box.left, (box.height, box.width)
    window = spec.window_patches * spec.patch_size

    def share(start: int, before: int, length: int) -> tuple[float, float]:
        """Begin and length of a crop in percent of the picture, without what lies in a bar."""
        first, last = max(start - before, 0), min(start - before + spec.crop_size, length)
        return round(100 * first / length, 3), round(100 * max(last - first, 0) / length, 3)

    boxes = []
    for row in range(one.tiling[0]):
        y, tall = share(row * window, top, inner[0])
        for col in range(one.tiling[1]):
            x, wide = share(col * window, left, inner[1])
            boxes.append(Box(x, y, wide, tall))
    return boxes


def spans(encoded: Encoded, preprocessor: Preprocessor) -> list[Span]:
    """The tokens of a sequence in order, image tokens in runs, each with what the loss makes of it.

    A token is learned where the place before it in its conversation has it as its label; what a conversation predicts
    last, its end token, is never fed and is added behind it."""
    found: list[Span] = []
    place, length = 0, len(encoded)
    while place < length:
        segment = int(encoded.segment_ids[place])
        number = -1 if segment == PREFIX_SEGMENT else segment
        if encoded.image_ids[place]:
            stop = place
            while stop < length and encoded.image_ids[stop] == encoded.image_ids[place]:
                stop += 1
            found.append(_image_span(encoded, place, stop, preprocessor))
            place = stop
            continue
        before = place - 1 if place and encoded.segment_ids[place - 1] == segment else -1
        if segment != PREFIX_SEGMENT and before < 0:
            before = _end_of_prefix(encoded)
        weight = float(encoded.loss_weights[before]) if _predicts(encoded, before, place) else 0.0
        kind = "learned" if weight else "prefix" if number < 0 else "asked"
        found.append(_text_span(int(encoded.input_ids[place]), kind, number, place, encoded, weight, preprocessor))
        last = place + 1 == length or encoded.segment_ids[place + 1] != segment
        if last and encoded.labels[place] != IGNORE and number >= 0:
            weight, label = float(encoded.loss_weights[place]), int(encoded.labels[place])
            found.append(_text_span(label, "end", number, place, encoded, weight, preprocessor))
        place += 1
    return found


def _predicts(encoded: Encoded, before: int, place: int) -> bool:
    return before >= 0 and encoded.labels[before] == encoded.input_ids[place]


def _end_of_prefix(encoded: Encoded) -> int:
    """The last place of the shared prefix: it predicts where the first conversation answers at once."""
    shared = np.flatnonzero(encoded.segment_ids == PREFIX_SEGMENT)
    return int(shared[-1]) if len(shared) else -1


def _image_span(encoded: Encoded, start: int, stop: int, preprocessor: Preprocessor) -> Span:
    kinds, counts = np.unique(encoded.input_ids[start:stop], return_counts=True)
    first = preprocessor.config.vocab_size
    names = {int(kind): IMAGE_TOKENS[int(kind) - first] for kind in kinds if int(kind) >= first}
    parts = ", ".join(f"{count} {names.get(int(kind), 'text')}" for kind, count in zip(kinds, counts, strict=True))
    title = f"places {start} to {stop - 1}; positions {encoded.position_ids[start]} to {encoded.position_ids[stop - 1]}"
    return Span(f"image {encoded.image_ids[start]}: {parts}", "image", -1, title)


def _text_span(
    token: int, kind: str, number: int, place: int, encoded: Encoded, weight: float, preprocessor: Preprocessor
) -> Span:
    text = str(preprocessor.tokenizer.decode([token])).replace("\n", "⏎") or f"<{token}>"
    fed = "" if kind == "end" else f"place {place}, position {encoded.position_ids[place]}, "
    loss = f", loss weight {weight:g}" if weight else ""
    return Span(text, kind, number, f"{fed}id {token}{loss}")


def _said(message: Message) -> str:
    if message.points is not None:
        return f"{message.label}: {_places(message.points)}"
    text = message.text if message.text is not None else f"(drawn from templates) {message.label or ''}"
    more = "".join(f" | {other}" for other in message.alternatives)
    listed = "".join(f"\n- {option}" for option in message.options)
    inline = "".join(f"\n- {one.label}, shown as {one.text}: {_places(one.points)}" for one in message.inline)
    front = "" if message.explanation is None else f"{message.explanation} | "
    return front + text + more + listed + inline


def _places(points: Sequence[Point]) -> str:
    return " ".join(f"({x:g}, {y:g})" for x, y in points) or "none"


def _points(conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
    """Every point that is an answer, or stands inside of one."""
    messages = [message for conversation in conversations for message in conversation.messages]
    found = [(message.label, message.points or ()) for message in messages]
    found += [(one.label, one.points) for message in messages for one in message.inline]
    return [{"x": round(x, 2), "y": round(y, 2), "label": label} for label, points in found for x, y in points]


def _thumbnail(crop: npt.NDArray[np.uint8]) -> Picture:
    from PIL import Image as PILImage

    picture = PILImage.fromarray(np.ascontiguousarray(crop))
    picture.thumbnail((THUMBNAIL, THUMBNAIL), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80, method=4)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return Picture(uri, crop.shape[1], crop.shape[0])
