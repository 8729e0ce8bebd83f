"""What training changes about an example's images: a window of them, their colours, their sharpness, their crops.

Everything is drawn by the example's own generator, for every epoch anew, apart from the draws of its prompts: turning
augmentation on changes no text but the places of points. Drawing (`plan_changes`) needs no pixel, so that the cost of a
draw is known before; `apply` then changes the pixels, on uint8.

A window has the picture's size again once it is shown, so an image has the tokens and crops that it had. It is drawn
for examples of one image whose conversations all answer with points, or are of a style that the params list. **No point
is ever lost:** the window grows until it holds every point of the conversations at hand and what is near it, so that
counts, and answers that speak of several points, stay true; the points are moved with it. Where their text would then
take more tokens than packs were planned for, the picture is shown whole.

Films are never changed, and evaluation changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any

import numpy as np

from molmo_model.data.example import Conversation, Message, Point
from molmo_model.errors import ConfigError
from molmo_model.model_config import AugmentationConfig
from molmo_model.preprocessing.image import Pixels, opencv

DRAWS = 14
"""Numbers drawn for each image, whatever is turned on: one setting does not change what another draws."""
MARGIN = 0.08
"""Share of the picture's sides around every point that a window shows too: what is pointed at has a size."""
LEAST_SHRUNK = 0.5
"""Least share of its sides that `resize_noise` shrinks an image to."""
INTERPOLATIONS = ("INTER_NEAREST", "INTER_LINEAR", "INTER_CUBIC", "INTER_AREA", "INTER_LANCZOS4")
"""OpenCV's interpolations that `resize_noise` draws from."""


@dataclass(frozen=True)
class AugmentationSpec:
    """See `AugmentationConfig`; a part of the `PreprocessorConfig`."""

    crop: float = 0.0
    crop_scale: tuple[float, float] = (0.6, 1.0)
    crop_stretch: float = 0.0
    crop_styles: tuple[str, ...] = ()
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    resize_noise: float = 0.0
    p_high_res: float = 0.0
    high_res_max_crops: int = 24
    high_res_styles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(
                f"augmentation.crop_scale is {list(self.crop_scale)}; it must be the least and the most share of the "
                "sides, above 0 and at most 1"
            )

    @classmethod
    def of(cls, config: AugmentationConfig) -> "AugmentationSpec":
        """What the params say."""
        fields = {name: getattr(config, name) for name in cls.__dataclass_fields__}
        return cls(**_tuples(fields))

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "AugmentationSpec":
        """What is in a checkpoint; nothing of it in most.

        Raises:
            TypeError, ValueError: unknown or wrong values.
        """
        return cls(**_tuples(dict(raw)))

    @property
    def changes_pixels(self) -> bool:
        """Whether anything is drawn at all."""
        chances = (self.crop, self.brightness, self.contrast, self.saturation, self.hue, self.resize_noise)
        return any(chances) or self.p_high_res > 0

    def may_be_finer(self, conversations: Sequence[Conversation]) -> bool:
        """Whether images that are shown with these conversations may get more crops."""
        styles = {conversation.style for conversation in conversations}
        return self.p_high_res > 0 and (not self.high_res_styles or bool(styles & set(self.high_res_styles)))


@dataclass(frozen=True)
class Change:
    """What happens to one image."""

    window: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom in pixels of what is shown; None is all of it."""
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    """Share of the colour circle."""
    shrink: float = 1.0
    """Share of the sides that it is shrunk to before it is enlarged again."""
    interpolations: tuple[str, str] = ("INTER_LINEAR", "INTER_LINEAR")
    """For shrinking and for enlarging."""
    high_res: bool = False
    """It gets up to `high_res_max_crops` crops."""


def pixel_generator(rng: np.random.Generator) -> np.random.Generator:
    """A generator of an example's own for its pixels, far ahead of `rng` in the same stream; `rng` stays as it is."""
    return np.random.Generator(rng.bit_generator.jumped())  # type: ignore[attr-defined]


def plan_changes(
    spec: AugmentationSpec,
    sizes: Sequence[tuple[int, int]],
    conversations: Sequence[Conversation],
    rng: np.random.Generator,
) -> list[Change]:
    """What happens to each image of an example.

    Args:
        sizes: width and height of each.
        conversations: those that are shown with them.
        rng: of the example's pixels; see `pixel_generator`.
    """
    cut = len(sizes) == 1 and all(_may_be_cut(conversation, spec) for conversation in conversations)
    points = [point for conversation in conversations for point in _points(conversation)]
    if not spec.may_be_finer(conversations):
        spec = replace(spec, p_high_res=0.0)
    return [_change(spec, size, points, rng.random(DRAWS), cut) for size in sizes]


def moved(conversation: Conversation, size: tuple[int, int], window: tuple[int, int, int, int]) -> Conversation:
    """A conversation about the window of a picture of this width and height: its points in percent of the window."""
    return replace(conversation, messages=tuple(_moved(one, size, window) for one in conversation.messages))


def apply(picture: Pixels, change: Change) -> Pixels:
    """A picture [H, W, 3] after its change, of the same size."""
    cv2 = opencv()
    height, width = picture.shape[:2]
    if change.window is not None:
        left, top, right, bottom = change.window
        cut = np.ascontiguousarray(picture[top:bottom, left:right])
        shrinks = cut.shape[0] > height or cut.shape[1] > width
        picture = cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if change.shrink < 1:
        smaller, larger = (getattr(cv2, name) for name in change.interpolations)
        size = max(round(width * change.shrink), 1), max(round(height * change.shrink), 1)
        shrunk = cv2.resize(np.ascontiguousarray(picture), size, interpolation=smaller)
        picture = cv2.resize(shrunk, (width, height), interpolation=larger)
    return _recoloured(picture, change)


def _recoloured(picture: Pixels, change: Change) -> Pixels:
    cv2 = opencv()
    if change.brightness != 1 or change.contrast != 1:
        values = np.arange(256) * change.brightness
        if change.contrast != 1:
            grey = float(cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY).mean()) * change.brightness
            values = grey + (values - grey) * change.contrast
        picture = values.round().clip(0, 255).astype(np.uint8)[picture]
    if change.saturation != 1:
        grey_picture = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)[:, :, None].repeat(3, axis=2)
        picture = cv2.addWeighted(picture, change.saturation, grey_picture, 1 - change.saturation, 0)
    if change.hue:
        turned = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2HSV)
        half_degrees = round(change.hue * 180)  # OpenCV counts a circle as 180
        turned[:, :, 0] = (turned[:, :, 0].astype(np.int16) + half_degrees) % 180
        picture = cv2.cvtColor(turned, cv2.COLOR_HSV2RGB)
    return picture


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _may_be_cut(conversation: Conversation, spec: AugmentationSpec) -> bool:
    """Whether a conversation stays true of a window that holds all its points."""
    said = conversation.messages[1::2]
    return conversation.style in spec.crop_styles or all(message.points is not None for message in said)


def _points(conversation: Conversation) -> list[Point]:
    every: list[Point] = []
    for message in conversation.messages:
        every += message.points or ()
        every += [point for one in message.inline for point in one.points]
    return every


def _change(spec: AugmentationSpec, size: tuple[int, int], points: Sequence[Point], drawn: Any, cut: bool) -> Change:
    chance, scale, stretch, across, down, *rest = drawn.tolist()
    brightness, contrast, saturation, hue, noise, shrink, smaller, larger, high_res = rest
    noisy = noise < spec.resize_noise
    return Change(
        window=_window(spec, size, points, scale, stretch, across, down) if cut and chance < spec.crop else None,
        brightness=1 + spec.brightness * (2 * brightness - 1),
        contrast=1 + spec.contrast * (2 * contrast - 1),
        saturation=1 + spec.saturation * (2 * saturation - 1),
        hue=spec.hue * (2 * hue - 1),
        shrink=LEAST_SHRUNK + (1 - LEAST_SHRUNK) * shrink if noisy else 1.0,
        interpolations=(_choice(smaller), _choice(larger)),
        high_res=high_res < spec.p_high_res,
    )


def _choice(drawn: float) -> str:
    return INTERPOLATIONS[int(drawn * len(INTERPOLATIONS))]


def _window(
    spec: AugmentationSpec,
    size: tuple[int, int],
    points: Sequence[Point],
    scale: float,
    stretch: float,
    across: float,
    down: float,
) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom in pixels, grown around all points; None where that is the whole picture."""
    share = spec.crop_scale[0] + (spec.crop_scale[1] - spec.crop_scale[0]) * scale
    apart = spec.crop_stretch * (2 * stretch - 1) / 2
    sides = [
        max(round(side * min(part, 1.0)), 1) for side, part in zip(size, (share + apart, share - apart), strict=True)
    ]
    window = []
    for axis, (whole, side, place) in enumerate(zip(size, sides, (across, down), strict=True)):
        begin = round((whole - side) * place)
        end = begin + side
        ticks = [point[axis] / 100 * whole for point in points]
        begin = max(min([begin, *(floor(tick - MARGIN * whole) for tick in ticks)]), 0)
        end = min(max([end, *(ceil(tick + MARGIN * whole) for tick in ticks)]), whole)
        window.append((begin, end))
    (left, right), (top, bottom) = window
    return None if (left, top, right, bottom) == (0, 0, *size) else (left, top, right, bottom)


def _moved(message: Message, size: tuple[int, int], window: tuple[int, int, int, int]) -> Message:
    def of(points: Sequence[Point]) -> tuple[Point, ...]:
        left, top, right, bottom = window
        places = ((x / 100 * size[0] - left, y / 100 * size[1] - top) for x, y in points)
        return tuple((_percent(x, right - left), _percent(y, bottom - top)) for x, y in places)

    points = None if message.points is None else of(message.points)
    inline = tuple(replace(one, points=of(one.points)) for one in message.inline)
    return replace(message, points=points, inline=inline)


def _percent(place: float, whole: int) -> float:
    return min(max(place / whole * 100, 0.0), 100.0)


def widest(conversation: Conversation) -> Conversation:
    """The conversation with its points where their text is as long as a window can make it: two digits and a tenth."""

    def of(points: Sequence[Point]) -> tuple[Point, ...]:
        return tuple((max(x, 22.2), max(y, 22.2)) for x, y in points)

    messages = tuple(
        replace(
            one,
            points=None if one.points is None else of(one.points),
            inline=tuple(replace(mark, points=of(mark.points)) for mark in one.inline),
        )
        for one in conversation.messages
    )
    return replace(conversation, messages=messages)
