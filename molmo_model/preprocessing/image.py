"""From the bytes of an image file to uint8 pixels, and to the size that a vision encoder wants.

Pixels stay uint8 from the file to the model; mean and standard deviation are applied on the device.

What differs from the reference implementation of Molmo, and why:

- Resizing works on uint8 (bilinear) and rounds once; the reference letterboxes in float32. At most one level of 255,
  and none at all with `exact`. Why OpenCV does it, and the decoding of JPEG: docs/adr/0009.
- Letterbox bars are 0 *before* normalisation, as in the reference; `crops.patch_masks` says where they lie.
- Transparent pictures are shown on white. The reference drops the alpha channel, which reveals whatever colour the
  invisible pixels happen to hold: black text on a transparent ground becomes black on black.
- 16-bit pictures keep their high byte. Broken or truncated files are errors; the reference fills the rest with grey.
"""

import io
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL import TiffImagePlugin as _tiff  # noqa: F401  decoders that PIL knows by name only once they are loaded
from PIL import WebPImagePlugin as _webp  # noqa: F401

from molmo_model.errors import DataError
from molmo_model.lookup import lookup
from molmo_model.preprocessing.tiling import letterbox_box

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
            if image.format == "JPEG" and (pixels := _decode_jpeg(data, image)) is not None:
                return pixels
            return np.asarray(upright_rgb(image))
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: more than {max_pixels} pixels; make it smaller ({error})") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: cannot be decoded ({len(data)} bytes): is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ... on broken files
        raise DataError(f"{name}: cannot be decoded ({len(data)} bytes): {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as RGB, turned upright as its EXIF orientation says; what is given stays as it is.

    Raises:
        OSError, and what else decoders raise: the image comes from a file that turns out to be broken.
    """
    image.load()
    return _to_rgb(image if _orientation(image) == UPRIGHT else ImageOps.exif_transpose(image))


UPRIGHT = 1
"""EXIF's orientation of a picture that is stored as it is shown."""


def _orientation(image: Image.Image) -> int:
    """EXIF's number of how a picture is stored; upright where EXIF says nothing that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
    except (SyntaxError, ValueError, TypeError, OSError, struct.error):  # the picture itself may be whole
        return UPRIGHT


@cache
def opencv() -> Any:
    """OpenCV, once it is needed, on one thread: images are shared out over worker processes, and its threads would not
    outlive a fork."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


def _decode_jpeg(data: bytes, opened: Image.Image) -> Pixels | None:
    """A common JPEG, whose header PIL has read, as OpenCV decodes it: the pixels are PIL's, in less time.

    None where it is no grey or colour picture that stands upright, or OpenCV gives up: PIL then decides what it is.
    """
    if opened.mode not in {"RGB", "L"} or _orientation(opened) != UPRIGHT:
        return None
    cv2 = opencv()
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    width, height = opened.size
    return pixels if pixels is not None and pixels.shape == (height, width, 3) else None


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


def resize(
    image: Pixels, height: int, width: int, method: str, *, exact: bool = False, out: Pixels | None = None
) -> Pixels:
    """`image` [H, W, 3] as [height, width, 3] by one of `RESIZE_METHODS`.

    Args:
        exact: in float32 and rounded once, as transformers' processors do it, and several times slower; otherwise
            within one level of that.
        out: where to write it, [height, width, 3] in one piece; None makes a new array.

    Raises:
        ConfigError: unknown method.
    """
    how: Resize = lookup(RESIZE_METHODS, method, "resize method")
    if out is None:
        out = np.empty((height, width, 3), dtype=np.uint8)
    inside = out
    if how.letterbox:
        box = letterbox_box(image.shape[0], image.shape[1], height, width)
        inside = out[box.top : box.top + box.height, box.left : box.left + box.width]
        if inside.shape != out.shape:
            out[...] = 0
    _interpolate(image, inside, how, exact)
    return out


def _interpolate(image: Pixels, out: Pixels, how: Resize, exact: bool) -> None:
    """Resizes [H, W, 3] to the size of `out`, on uint8 where that agrees with float32 within one level: bilinear.

    OpenCV has no bilinear filter that widens when it shrinks, so that is torch's. torch's bicubic on uint8 clips
    between its two passes and is up to 33 levels off, so it goes through float32; so do pictures that become one pixel
    wide, which its widened filter gets wrong on uint8 (up to 195 levels, seen in torch 2.13).
    """
    height, width = out.shape[:2]
    shrinks = height < image.shape[0] or width < image.shape[1]
    if out.shape == image.shape:
        out[...] = image
    elif exact or how.bicubic:
        out[...] = _interpolate_torch(image, height, width, how, in_float=True)
    elif how.antialias and shrinks:
        out[...] = _interpolate_torch(image, height, width, how, in_float=width == 1)
    else:
        cv2 = opencv()
        source = np.ascontiguousarray(image)
        if out.flags.c_contiguous:
            cv2.resize(source, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
        else:
            out[...] = cv2.resize(source, (width, height), interpolation=cv2.INTER_LINEAR)


def _interpolate_torch(image: Pixels, height: int, width: int, how: Resize, *, in_float: bool) -> Pixels:
    """The same with torch, in float32 or on uint8."""
    import torch
    from torch.nn.functional import interpolate

    whole = image.flags.writeable and image.flags.c_contiguous
    source = image if whole else image.copy()  # torch warns about read-only memory and refuses negative strides
    planes = torch.from_numpy(source).permute(2, 0, 1).unsqueeze(0)  # a channels_last view, the fast layout
    mode = "bicubic" if how.bicubic else "bilinear"
    resized = interpolate(planes.float() if in_float else planes, (height, width), mode=mode, antialias=how.antialias)
    if in_float:
        resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    pixels: Pixels = resized[0].permute(1, 2, 0).numpy()
    return pixels
