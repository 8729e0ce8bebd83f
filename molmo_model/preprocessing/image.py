"""From the bytes of an image file to uint8 pixels, and to the size that a vision encoder wants.

Pixels stay uint8 from the file to the model; mean and standard deviation are applied on the device.

What differs from the reference implementation of Molmo, and why:

- Resizing works on uint8 (bilinear) and rounds once; the reference letterboxes in float32. At most one level of 255.
- Letterbox bars are 0 *before* normalisation, as in the reference; a mask of them is not made.
- Transparent pictures are shown on white. The reference drops the alpha channel, which reveals whatever colour the
  invisible pixels happen to hold: black text on a transparent ground becomes black on black.
- 16-bit pictures keep their high byte. Broken or truncated files are errors; the reference fills the rest with grey.
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from PIL import TiffImagePlugin as _tiff  # noqa: F401  decoders that PIL knows by name only once they are loaded
from PIL import WebPImagePlugin as _webp  # noqa: F401

from molmo_model.config import lookup
from molmo_model.errors import DataError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Decoders that untrusted bytes may reach; PIL knows others that start external programs."""

MAX_PIXELS = 50_000_000
"""Default bound on the pixels of one image, before decoding: 150 MB as RGB."""


@dataclass(frozen=True)
class Resize:
    """How an image comes to an exact size."""

    letterbox: bool
    """Keep the aspect ratio and fill up with black bars; otherwise squash."""
    bicubic: bool
    """Bicubic instead of bilinear."""
    antialias: bool
    """Widen the filter when shrinking."""


RESIZE_METHODS: dict[str, Resize] = {
    "default": Resize(letterbox=True, bicubic=False, antialias=True),
    "clip": Resize(letterbox=True, bicubic=False, antialias=True),
    "siglip": Resize(letterbox=False, bicubic=False, antialias=False),
    "dino": Resize(letterbox=False, bicubic=True, antialias=True),
    "metaclip": Resize(letterbox=False, bicubic=True, antialias=True),
}
"""The resizing that each family of encoders was used with in Molmo; `clip` is another name of `default`."""


def decode_image(data: bytes, *, name: str = "image", max_pixels: int = MAX_PIXELS) -> Pixels:
    """The picture in an image file as RGB [H, W, 3], turned upright as its EXIF orientation says.

    Args:
        data: the file's bytes; of an animation the first frame is taken.
        name: what to call it in errors.
        max_pixels: larger pictures are refused from their header, before memory is spent on them.

    Raises:
        DataError: not an image of `FORMATS`, too large, truncated or broken.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(f"{name}: {width} x {height} pixels are more than {max_pixels}; make it smaller")
            image.load()
            upright = ImageOps.exif_transpose(image)
            return np.asarray(_to_rgb(upright))
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: more than {max_pixels} pixels; make it smaller ({error})") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ... on broken files
        raise DataError(f"{name}: cannot be decoded ({len(data)} bytes): {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as RGB; see the module for transparency and 16 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values: npt.NDArray[np.generic]) -> Pixels:
    """Grey values [H, W] of 16 or 32 bits as uint8: integers count as 16-bit, floats as 0-1 or else as 0-255."""
    if values.dtype.kind == "f":
        scaled = np.nan_to_num(values) * (255 if np.nanmax(values, initial=0) <= 1 else 1)
        return scaled.round().clip(0, 255).astype(np.uint8)
    return (values.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)


def resize(image: Pixels, height: int, width: int, method: str) -> Pixels:
    """`image` [H, W, 3] as [height, width, 3] by one of `RESIZE_METHODS`.

    Raises:
        ConfigError: unknown method.
    """
    how: Resize = lookup(RESIZE_METHODS, method, "resize method")
    if not how.letterbox:
        return _interpolate(image, height, width, how)
    inner_height, inner_width = letterbox_size(image.shape[0], image.shape[1], height, width)
    inner = _interpolate(image, inner_height, inner_width, how)
    if (inner_height, inner_width) == (height, width):
        return inner
    framed = np.zeros((height, width, 3), dtype=np.uint8)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    framed[top : top + inner_height, left : left + inner_width] = inner
    return framed


def letterbox_size(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    """Height and width of the picture inside the frame `to_height x to_width`.

    The scale is a float32 and the product is cut off, as the published models were trained; at least one pixel.
    """
    scale = min(np.float32(to_height) / np.float32(height), np.float32(to_width) / np.float32(width))
    inner_height, inner_width = int(np.float32(height) * scale), int(np.float32(width) * scale)
    return max(1, min(inner_height, to_height)), max(1, min(inner_width, to_width))


def _interpolate(image: Pixels, height: int, width: int, how: Resize) -> Pixels:
    """Resizes [H, W, 3] on uint8 where that agrees with float32 within one level: in bilinear mode.

    torch's bicubic on uint8 clips between its two passes and is up to 33 levels off, so it goes through float32.
    """
    if image.shape[:2] == (height, width):
        return image
    import torch
    from torch.nn.functional import interpolate

    source = image if image.flags.writeable else image.copy()  # torch warns about read-only memory
    planes = torch.from_numpy(source).permute(2, 0, 1).unsqueeze(0)  # a channels_last view, the fast layout
    if how.bicubic:
        resized = interpolate(planes.float(), (height, width), mode="bicubic", antialias=how.antialias)
        resized = resized.round().clamp(0, 255).to(torch.uint8)
    else:
        resized = interpolate(planes, (height, width), mode="bilinear", antialias=how.antialias)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
