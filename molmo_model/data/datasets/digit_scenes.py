"""Scenes of real handwritten digits: a canvas of cells, some of which hold one of 1,797 scanned digits.

What is known of a scene, its digits and their places, gives four task families in the style of PixMo, as one message
tree per scene:

- `scene_caption`: everything, row by row, `.` for an empty cell and `/` between rows: `3 . 5 / . 7 1 / 0 . .`
- `scene_qa`: "Which digit is in row 2, column 3?" answered by the digit, or by `empty`
- `scene_count`: how many digits there are, or how many times one digit appears
- `scene_point`: points at every copy of a digit, or at a position

Scans of evaluation scenes are never shown in training: `digit_scans.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo_model.config import DatasetConfig
from molmo_model.data.datasets import digit_scans
from molmo_model.data.datasets.digit_scans import SCAN_SIDE, enlarged, scan_split, scans
from molmo_model.data.datasets.generated import encode_png, example_generator, positions
from molmo_model.data.datasets.options import check_range, parse_options
from molmo_model.data.example import BadRow, Conversation, Example, Message, Point
from molmo_model.errors import ConfigError


@dataclass
class Options:
    """How a scene looks. The defaults are what a model of half a million parameters learns in minutes on two cores."""

    canvas: int = 96
    """Pixels per side."""
    rows: int = 3
    cols: int = 3
    min_filled: int = 3
    """Fewest cells that hold a digit; up to all of them, each number as often."""
    min_size: int = 26
    """Pixels per side of the smallest digit."""
    max_size: int = 28
    jitter: int = 2
    """A digit lies up to this many pixels off the centre of its cell, both ways, but never beyond the cell."""
    noise: int = 0
    """Grey levels up to which every pixel is brightened; noise does not compress, so it makes the shards larger."""
    questions: int = 5
    """`scene_qa` conversations of one scene, at most one of them about an empty cell."""
    asked: int = 1
    """Different digits of one scene that are counted, and that are pointed at, each in a conversation of its own."""

    def __post_init__(self) -> None:
        check_range("canvas", self.canvas, 16, 4096)
        check_range("rows", self.rows, 1, 16)
        check_range("cols", self.cols, 1, 16)
        check_range("min_filled", self.min_filled, 1, self.rows * self.cols)
        check_range("min_size", self.min_size, SCAN_SIDE, self.max_size)
        check_range("jitter", self.jitter, 0, self.canvas)
        check_range("noise", self.noise, 0, 64)
        check_range("questions", self.questions, 1, self.rows * self.cols)
        check_range("asked", self.asked, 1, 10)
        cell = self.canvas // max(self.rows, self.cols)
        if self.max_size > cell:
            raise ConfigError(f"dataset option max_size is {self.max_size}, but a cell is {cell} pixels wide or high")


@dataclass(frozen=True)
class Digit:
    """One digit of a scene."""

    scan: int
    """Index of the scan in scikit-learn's order."""
    value: int
    row: int
    """0-based."""
    col: int
    left: int
    """Pixels from the canvas's left edge."""
    top: int
    size: int
    """Pixels per side."""


def make(config: DatasetConfig, seed: int) -> Iterator[tuple[str, Example | BadRow]]:
    """(split, scene) for every example that the params ask for, training first."""
    options = parse_options(Options, config)
    for split, number in positions(config):
        yield split, _scene(options, seed, split, number)


def fingerprint(config: DatasetConfig, seed: int) -> dict[str, str]:
    """The digest of the scans."""
    return digit_scans.digest()


def _scene(options: Options, seed: int, split: str, number: int) -> Example:
    rng = example_generator("digit_scenes", seed, split, number)
    digits = _place(options, split, rng)
    conversations = (
        _caption(options, digits),
        *_questions(options, digits, rng),
        *_counts(options, digits, rng),
        *_pointing(options, digits, rng),
    )
    metadata = {"scans": [digit.scan for digit in digits]}
    return Example(f"scene-{split}-{number:06d}", (encode_png(_draw(options, digits, rng)),), conversations, metadata)


def _place(options: Options, split: str, rng: np.random.Generator) -> list[Digit]:
    """The digits of a scene, in reading order."""
    cells = options.rows * options.cols
    filled = np.sort(rng.permutation(cells)[: rng.integers(options.min_filled, cells + 1)])
    chosen = rng.choice(scan_split()[split], len(filled))
    sizes = rng.integers(options.min_size, options.max_size + 1, len(filled))
    shifts = rng.integers(-options.jitter, options.jitter + 1, (len(filled), 2))
    height, width = options.canvas // options.rows, options.canvas // options.cols
    values = scans()[1]
    digits = []
    for cell, scan, size, (down, right) in zip(filled, chosen.tolist(), sizes.tolist(), shifts.tolist(), strict=True):
        row, col = divmod(int(cell), options.cols)
        top = row * height + min(max((height - size) // 2 + down, 0), height - size)
        left = col * width + min(max((width - size) // 2 + right, 0), width - size)
        digits.append(Digit(scan, int(values[scan]), row, col, left, top, size))
    return digits


def _draw(options: Options, digits: list[Digit], rng: np.random.Generator) -> np.ndarray:
    """uint8 [canvas, canvas]: bright ink on dark paper, both a little different from scene to scene."""
    paper, ink = rng.integers(0, 24), rng.integers(200, 248)
    canvas = np.full((options.canvas, options.canvas), paper, dtype=np.uint8)
    for digit in digits:
        place = slice(digit.top, digit.top + digit.size), slice(digit.left, digit.left + digit.size)
        canvas[place] = paper + np.rint(enlarged(digit.scan, digit.size) * (ink - paper)).astype(np.uint8)
    if options.noise:
        canvas += rng.integers(0, options.noise + 1, canvas.shape, dtype=np.uint8)
    return canvas


def _caption(options: Options, digits: list[Digit]) -> Conversation:
    cells: list[list[int | None]] = [[None] * options.cols for _ in range(options.rows)]
    for digit in digits:
        cells[digit.row][digit.col] = digit.value
    answer = " / ".join(" ".join("." if value is None else str(value) for value in row) for row in cells)
    metadata = {"answer": answer, "answer_type": "grid", "cells": cells}
    return _ask("scene_caption", None, Message("assistant", answer), metadata)


def _questions(options: Options, digits: list[Digit], rng: np.random.Generator) -> Iterator[Conversation]:
    value_at = {(digit.row, digit.col): digit.value for digit in digits}
    empty = [cell for cell in np.ndindex(options.rows, options.cols) if cell not in value_at]
    asked = [digits[i] for i in rng.permutation(len(digits))]
    places = [(digit.row, digit.col) for digit in asked[: options.questions]]
    if empty:
        places = [*places[: options.questions - 1], empty[rng.integers(len(empty))]]
    for row, col in places:
        answer = str(value_at.get((row, col), "empty"))
        metadata = {"answer": answer, "answer_type": "digit" if (row, col) in value_at else "empty", "cell": [row, col]}
        question = f"Which digit is in row {row + 1}, column {col + 1}?"
        yield _ask("scene_qa", question, Message("assistant", answer), metadata)


def _counts(options: Options, digits: list[Digit], rng: np.random.Generator) -> Iterator[Conversation]:
    """All digits, and the copies of one: mostly of one that is there, drawn digit by digit so that repeated ones are
    asked about more often."""
    values = [digit.value for digit in digits]
    counted = values[rng.integers(len(values))] if rng.random() < 0.85 else int(rng.integers(10))
    counts = [("How many digits are there?", len(values))]
    for digit in (counted, *_others(options, values, counted, rng)):
        counts.append((f"How many times does the digit {digit} appear?", values.count(digit)))
    for question, count in counts:
        metadata = {"answer": count, "answer_type": "int"}
        yield _ask("scene_count", question, Message("assistant", str(count)), metadata)


def _others(options: Options, values: list[int], asked: int, rng: np.random.Generator) -> list[int]:
    """Up to `asked` - 1 further digits of a scene, other than the one that is asked about already."""
    if options.asked == 1:
        return []
    others = sorted(set(values) - {asked})
    return [others[place] for place in rng.permutation(len(others))[: options.asked - 1].tolist()]


def _pointing(options: Options, digits: list[Digit], rng: np.random.Generator) -> Iterator[Conversation]:
    one, place = (digits[i] for i in rng.integers(len(digits), size=2))
    for value in (one.value, *_others(options, [digit.value for digit in digits], one.value, rng)):
        yield _point(options, f"digit {value}", [digit for digit in digits if digit.value == value])
    yield _point(options, f"row {place.row + 1}, column {place.col + 1}", [place])


def _point(options: Options, label: str, targets: list[Digit]) -> Conversation:
    def percent(pixels: float) -> float:
        return round(100 * pixels / options.canvas, 3)

    points: tuple[Point, ...] = tuple(
        (percent(digit.left + digit.size / 2), percent(digit.top + digit.size / 2)) for digit in targets
    )
    boxes = [
        [percent(pixels) for pixels in (digit.left, digit.top, digit.left + digit.size, digit.top + digit.size)]
        for digit in targets
    ]
    metadata = {
        "answer_type": "points",
        "points": [list(point) for point in points],
        "boxes": boxes,  # left, top, right, bottom in percent, one for each point
        "radius": percent(options.min_size / 2),  # percent; a point this near to the centre lies on the digit
    }
    return _ask("scene_point", None, Message("assistant", points=points, label=label), metadata)


def _ask(style: str, question: str | None, answer: Message, metadata: dict[str, Any]) -> Conversation:
    """One question and its answer; question None is drawn from the style's prompts, with the answer's label."""
    return Conversation(style, (Message("user", question, label=answer.label), answer), metadata=metadata)
