"""Small pictures and examples for the tests of this room."""

import io

import numpy as np
from PIL import Image as PILImage

from molmo_model.data.example import Conversation, Example, Image, Message


def png(pixels: np.ndarray) -> bytes:
    """An array as the bytes of a PNG file."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def picture(height: int, width: int, seed: int = 0) -> Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image(png(pixels), width, height, "PNG")


def asked(question: str | None, answer: str, style: str = "qa", **options) -> Conversation:
    """One question with its answer."""
    return Conversation(style, (Message("user", question), Message("assistant", answer)), **options)


def example(conversations: list[Conversation], sizes: tuple[tuple[int, int], ...] = ((96, 96),)) -> Example:
    """An example with pictures of the given (height, width)."""
    images = tuple(picture(height, width, seed) for seed, (height, width) in enumerate(sizes))
    return Example("example-7", images, tuple(conversations))
