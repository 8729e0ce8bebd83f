"""Short clips of real handwritten digits: one scan after another moves across a dark canvas.

What is known of a clip, its digits in order and their ways, gives four task families, as one message tree per clip:

- `clip_caption`: the digits in the order in which they appear: `3 5 7`
- `clip_qa`: "Which digit appears last?", first, or second ...
- `clip_count`: how many digits appear
- `clip_motion`: which way a digit moves: left, right, up or down

One frame tells at most one digit, and nothing of its way. Scans of evaluation clips are never shown in training:
`digit_scans.py`. The files are MPEG-4 in MP4, encoded by PyAV on one thread without times or versions in
them: the same bytes on one machine with one version of PyAV, which is part of the fingerprint.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from io import BytesIO

import numpy as np

from molmo_model.artifacts import digest_of
from molmo_model.config import DatasetConfig
from molmo_model.data.datasets import digit_scans
from molmo_model.data.datasets.digit_scans import SCAN_SIDE, enlarged, scan_split, scans
from molmo_model.data.datasets.generated import example_generator, positions
from molmo_model.data.datasets.options import check_range, parse_options
from molmo_model.data.example import BadRow, Conversation, Example, Message, Video
from molmo_model.data.video_file import probe_video
from molmo_model.errors import ConfigError

WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Steps down and to the right."""
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
CODEC_OPTIONS = {"flags": "+bitexact", "qscale": "2"}


@dataclass
class Options:
    """How a clip looks."""

    canvas: int = 64
    """Pixels per side of a frame, an even number."""
    min_digits: int = 2
    max_digits: int = 4
    size: int = 28
    """Pixels per side of a digit."""
    frames_per_digit: int = 4
    fps: int = 4
    """Frames of a second."""

    def __post_init__(self) -> None:
        check_range("canvas", self.canvas, 16, 1024)
        check_range("min_digits", self.min_digits, 1, self.max_digits)
        check_range("max_digits", self.max_digits, 1, len(PLACES))
        check_range("size", self.size, SCAN_SIDE, self.canvas)
        check_range("frames_per_digit", self.frames_per_digit, 2, 64)
        check_range("fps", self.fps, 1, 60)
        if self.canvas % 2:
            raise ConfigError(f"dataset option canvas is {self.canvas}; a film's sides must be even")


def make(config: DatasetConfig, seed: int) -> Iterator[tuple[str, Example | BadRow]]:
    """(split, clip) for every example that the params ask for, training first."""
    options = parse_options(Options, config)
    for split, number in positions(config):
        yield split, _clip(options, seed, split, number)


def fingerprint(config: DatasetConfig, seed: int) -> dict[str, str]:
    """The digest of the scans, and of the encoder's version."""
    return {**digit_scans.digest(), "PyAV": digest_of(version("av"))}


def _clip(options: Options, seed: int, split: str, number: int) -> Example:
    rng = example_generator("digit_clips", seed, split, number)
    count = int(rng.integers(options.min_digits, options.max_digits + 1))
    # no digit twice, so that "the digit 3" is one of them
    digits: dict[int, int] = {}
    for scan in rng.permutation(scan_split()[split]).tolist():
        digits.setdefault(int(scans()[1][scan]), scan)
        if len(digits) == count:
            break
    ways = [list(WAYS)[way] for way in rng.integers(len(WAYS), size=count)]
    frames = _draw(options, list(digits.values()), ways, rng)
    conversations = _conversations(list(digits), ways, rng)
    name = f"clip-{split}-{number:06d}"
    metadata = {"scans": list(digits.values()), "ways": ways}
    return Example(name, (), conversations, metadata, (_film(frames, options.fps, name),))


def _draw(options: Options, chosen: list[int], ways: list[str], rng: np.random.Generator) -> np.ndarray:
    """uint8 [frames, canvas, canvas]: each digit crosses the middle of the canvas, from rim to rim."""
    paper, ink = rng.integers(0, 24), rng.integers(200, 248)
    count, room = options.frames_per_digit, options.canvas - options.size
    frames = np.full((len(chosen) * count, options.canvas, options.canvas), paper, dtype=np.uint8)
    for place, (scan, way) in enumerate(zip(chosen, ways, strict=True)):
        drawn = paper + np.rint(enlarged(scan, options.size) * (ink - paper)).astype(np.uint8)
        for step in range(count):
            gone = 2 * step / (count - 1) - 1  # -1 at the start of the way, 1 at its end
            top, left = (round(room / 2 * (1 + gone * direction)) for direction in WAYS[way])
            frames[place * count + step, top : top + options.size, left : left + options.size] = drawn
    return frames


def _film(frames: np.ndarray, fps: int, name: str) -> Video:
    """The frames as an MP4 file."""
    import av

    file = BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream("mpeg4", rate=fps, options=CODEC_OPTIONS)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.repeat(pixels[..., None], 3, axis=2), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return probe_video(file.getvalue(), name=name)


def _conversations(digits: list[int], ways: list[str], rng: np.random.Generator) -> tuple[Conversation, ...]:
    middle = int(rng.integers(len(digits)))
    asked = int(rng.integers(len(digits)))
    places = {"last": digits[-1], PLACES[middle]: digits[middle]}
    return (
        _ask("clip_caption", "List the digits in the order in which they appear.", " ".join(map(str, digits))),
        *(_ask("clip_qa", f"Which digit appears {place}?", str(digit)) for place, digit in places.items()),
        _ask("clip_count", "How many digits appear?", str(len(digits)), len(digits)),
        _ask("clip_motion", f"Which way does the digit {digits[asked]} move?", ways[asked]),
    )


def _ask(style: str, question: str, said: str, answer: str | int | None = None) -> Conversation:
    metadata = {"answer": said if answer is None else answer, "answer_type": "text" if answer is None else "int"}
    return Conversation(style, (Message("user", question), Message("assistant", said)), metadata=metadata)
