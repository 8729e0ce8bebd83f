"""Small pictures and examples for the tests of this room."""

import io
import struct
import zlib

import numpy as np
from PIL import Image as PILImage

from molmo_model.data.example import Conversation, Example, Image, Message


def png(pixels: np.ndarray) -> bytes:
    """An array as the bytes of a PNG file."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def saved(image: PILImage.Image, form: str, **options) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def headers(width: int, height: int) -> dict[str, bytes]:
    """The beginning of a file of each format, a few hundred bytes, that claims to be of this size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    small = {form: saved(PILImage.new("RGB", (16, 16), "red"), form) for form in ("JPEG", "GIF", "TIFF", "BMP", "WEBP")}
    claims = {}
    png = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    claims["PNG"] = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", png) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    claims["PPM"] = b"P6 %d %d 255\n" % (width, height) + bytes(300)
    claims["BMP"] = small["BMP"][:18] + struct.pack("<ii", width, height) + small["BMP"][26:]
    tiff = bytearray(small["TIFF"])
    (directory,) = struct.unpack_from("<I", tiff, 4)
    for entry in range(struct.unpack_from("<H", tiff, directory)[0]):
        place = directory + 2 + 12 * entry
        if (tag := struct.unpack_from("<H", tiff, place)[0]) in (256, 257):
            struct.pack_into("<HHII", tiff, place, tag, 4, 1, width if tag == 256 else height)
    claims["TIFF"] = bytes(tiff)
    most = min(width, 65535), min(height, 65535)  # two bytes a side is all that these formats have
    frame = small["JPEG"].index(b"\xff\xc0") + 5
    claims["JPEG"] = small["JPEG"][:frame] + struct.pack(">HH", most[1], most[0]) + small["JPEG"][frame + 4 :]
    claims["GIF"] = small["GIF"][:6] + struct.pack("<HH", *most) + small["GIF"][10:]
    place = small["GIF"].index(b"," + struct.pack("<4H", 0, 0, 16, 16)) + 5  # the frame has a size of its own
    claims["GIF"] = claims["GIF"][:place] + struct.pack("<HH", *most) + claims["GIF"][place + 4 :]
    sides = max(most[0], 1) - 1, max(most[1], 1) - 1  # which it cannot say 0 of
    extended = b"\0" * 4 + sides[0].to_bytes(3, "little") + sides[1].to_bytes(3, "little")
    webp = b"WEBP" + b"VP8X" + struct.pack("<I", len(extended)) + extended + small["WEBP"][12:]
    claims["WEBP"] = b"RIFF" + struct.pack("<I", len(webp)) + webp
    return claims


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
