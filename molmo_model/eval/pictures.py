"""Pictures inside a page: as data URIs, each once however often it is shown, and all together under a budget of bytes.

A picture of a few kilobytes stands there as it is; a larger one as a reduced WebP. Films are a few frames. No torch
here, and no library of pictures before the first one is reduced.
"""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from molmo_model.data.example import Example, Image, Video
from molmo_model.errors import EvaluationError

if TYPE_CHECKING:
    from PIL.Image import Image as Pixels

EMBED_BYTES = 24_000
"""Pictures up to this size are embedded as they are; larger ones as a reduced copy."""
EMBED_SIDE = 512
"""Longest side of a reduced copy, in pixels."""
SMALLEST_SIDE = 64
"""Longest side below which no copy is reduced further."""
EMBED_PIXELS = 50_000_000
"""Pictures of more pixels are not decoded."""
BYTES_PER_PIXEL = 0.08
"""Of a copy of little detail: where the search for a size that fits begins."""
QUALITY = 82
"""Of reduced copies, as WebP counts it."""
BROWSER_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
FRAMES = 4
"""Frames that stand for a film."""
MOST_STILLS = 6
"""Pictures and frames that are shown of one example."""


@dataclass(frozen=True)
class Picture:
    """One picture as a data URI, with the size of the original in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Still:
    """One picture of an example, or one frame of its films."""

    key: str
    """Equal for equal content: SHA-256 of the picture's file; of a frame, of the film's part and the frame's number."""
    image: Image
    seconds: float | None = None
    """When the frame is shown, from the beginning of its part; None for a picture."""

    def without_data(self) -> "Still":
        """The same without the file's bytes, for keeping."""
        return replace(self, image=replace(self.image, data=b"\0"))


class Album:
    """The pictures of a page: each content once, and all of them together under a budget.

    `add` keeps a copy as `embed` makes it; `data` gives all of them, reduced further where they would not fit.
    """

    def __init__(self, budget: int, expected: int = 1) -> None:
        """
        Args:
            budget: characters that all data URIs may have together.
            expected: how many pictures there may be; each is reduced to its share at once.
        """
        self.budget, self.share = budget, budget // max(1, expected) * 3 // 4
        self._kept: dict[str, tuple[str, bytes]] = {}

    def add(self, still: Still) -> None:
        if still.key not in self._kept:
            self._kept[still.key] = _small(still.image, self.share)

    def data(self) -> dict[str, str]:
        """Data URI by key, in the order of `add`. The small ones leave what they do not need to the large ones."""
        left, found = self.budget, {}
        for number, (key, (kind, data)) in enumerate(sorted(self._kept.items(), key=lambda item: len(item[1][1]))):
            allowed = left // (len(self._kept) - number) * 3 // 4 - 40  # base64, and the head of the URI
            found[key] = _uri(*(_reduced(data, allowed) if len(data) > allowed else (kind, data)))
            left -= len(found[key])
        return {key: found[key] for key in self._kept}


def embed(image: Image) -> Picture:
    """A picture as a data URI: the original bytes if small, else a reduced WebP.

    Raises:
        EvaluationError: too many pixels to decode.
    """
    return Picture(_uri(*_small(image)), image.width, image.height)


def stills(example: Example) -> Iterator[Still]:
    """The pictures of an example, then `FRAMES` frames of each of its films, at most `MOST_STILLS` in all."""
    left = MOST_STILLS
    for image in example.images[:left]:
        yield Still(image.sha256, image)
        left -= 1
    for video in example.videos:
        for still in _frames(video, min(FRAMES, left)):
            yield still
            left -= 1


def _frames(video: Video, wanted: int) -> Iterator[Still]:
    """Frames from the middle of as many equal stretches of the part that is meant."""
    if wanted <= 0:
        return
    from fractions import Fraction

    from PIL import Image as PILImage

    from molmo_model.data.video_file import decode_frames

    begin, end = map(Fraction, video.clip or (video.timeline.begin, video.timeline.end))
    times = [begin + (end - begin) * (2 * number + 1) / (2 * wanted) for number in range(wanted)]
    numbers = sorted({video.timeline.frame_at(time) for time in times})
    for number, pixels in decode_frames(video, numbers):
        data = _webp(PILImage.fromarray(pixels), EMBED_SIDE)
        seconds = float(video.timeline.time(number) - begin)
        yield Still(f"{video.identity}-{number}", Image(data, video.width, video.height, "WEBP"), max(seconds, 0.0))


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _small(image: Image, allowed: int | None = None) -> tuple[str, bytes]:
    """Kind and bytes of a picture: its own if the browser shows them and they are few."""
    kind = BROWSER_FORMATS.get(image.format.upper())
    most = EMBED_BYTES if allowed is None else min(allowed, EMBED_BYTES)
    if kind is not None and len(image.data) <= most:
        return kind, image.data
    if image.width * image.height > EMBED_PIXELS:
        raise EvaluationError(f"picture of {image.width}x{image.height} pixels is too large for the report")
    return _reduced(image.data, allowed)


def _reduced(data: bytes, allowed: int | None = None) -> tuple[str, bytes]:
    """A copy of `EMBED_SIDE`, or of at most `allowed` bytes, or as small as it gets."""
    from PIL import Image as PILImage
    from PIL import ImageOps

    with PILImage.open(io.BytesIO(data)) as opened:
        opened.draft("RGB", (EMBED_SIDE, EMBED_SIDE))  # lets a JPEG be decoded small
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    side = min(EMBED_SIDE, max(picture.size))
    if allowed is not None:
        fits = (allowed / BYTES_PER_PIXEL * max(picture.size) / min(picture.size)) ** 0.5
        side = max(min(side, SMALLEST_SIDE), min(side, int(fits)))
    copy = _webp(picture, side)
    while allowed is not None and len(copy) > allowed and side > SMALLEST_SIDE:
        shrink = (max(allowed, 1) / len(copy)) ** 0.5 * 0.95
        side = max(SMALLEST_SIDE, min(int(side * shrink), side * 9 // 10))
        copy = _webp(picture, side)
    return "image/webp", copy


def _webp(picture: "Pixels", side: int) -> bytes:
    from PIL import Image as PILImage

    small = picture.copy()
    small.thumbnail((side, side), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue()
