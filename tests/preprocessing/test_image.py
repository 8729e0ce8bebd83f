"""Decoding pictures of real kinds, and resizing against PIL and against torch in float32."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from skimage import data as pictures
from torch.nn.functional import interpolate

from molmo_model.errors import ConfigError, DataError
from molmo_model.preprocessing.image import RESIZE_METHODS, decode_image, letterbox_size, resize
from tests.preprocessing.examples import png


def saved(image: PILImage.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_lossless_files_come_back_exactly(form):
    pixels = noise(23, 31, 3)
    decoded = decode_image(saved(PILImage.fromarray(pixels), form, **({"lossless": True} if form == "WEBP" else {})))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("name", ["astronaut", "camera", "coins", "page", "moon", "logo", "horse", "chelsea", "text"])
def test_real_pictures(name):
    """Colour, grey, scans, transparency (logo) and one-bit (horse)."""
    original = getattr(pictures, name)()
    grey = original.astype(np.uint8) * 255 if original.dtype == bool else original
    decoded = decode_image(png(original if original.dtype != bool else grey))
    assert decoded.shape == (*original.shape[:2], 3)
    if original.ndim == 2:
        np.testing.assert_array_equal(decoded, np.repeat(grey[:, :, None], 3, axis=2))
    elif original.shape[2] == 3:
        np.testing.assert_array_equal(decoded, original)


def test_jpeg_is_what_pil_reads():
    data = saved(PILImage.fromarray(pictures.astronaut()), "JPEG", quality=85)
    np.testing.assert_array_equal(decode_image(data), np.asarray(PILImage.open(io.BytesIO(data)).convert("RGB")))


def test_palette_and_one_bit():
    pixels = noise(9, 8, 3) // 128 * 255
    for mode, form in (("P", "PNG"), ("P", "GIF")):
        data = saved(PILImage.fromarray(pixels).convert(mode, palette=PILImage.Palette.ADAPTIVE), form)
        np.testing.assert_array_equal(decode_image(data), pixels)
    bits = pixels[:, :, 0] > 0
    np.testing.assert_array_equal(decode_image(saved(PILImage.fromarray(bits), "PNG"))[:, :, 1], bits * 255)


def test_transparency_is_shown_on_white():
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (200, 0, 0, 0)  # an invisible red
    pixels[1, 2] = (0, 0, 0, 51)  # a fifth of black
    decoded = decode_image(png(pixels))
    assert decoded[0, 0].tolist() == [10, 20, 30]
    assert decoded[0, 1].tolist() == [255, 255, 255]
    assert decoded[1, 2].tolist() == [204, 204, 204]
    palette = PILImage.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([5, 6, 7, 8, 9, 10])
    assert decode_image(saved(palette, "PNG", transparency=0)).tolist() == [[[255] * 3, [8, 9, 10]]]
    grey = np.array([[[100, 255], [100, 0]]], dtype=np.uint8)
    assert decode_image(png(grey)).tolist() == [[[100] * 3, [255] * 3]]


def test_sixteen_bits_keep_the_high_byte():
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        decoded = decode_image(saved(PILImage.fromarray(values), form))
        assert decoded[:, :, 0].tolist() == [[0, 0, 1, 128, 255]]
    floats = np.array([[0, 0.5, 1]], dtype=np.float32)
    assert decode_image(saved(PILImage.fromarray(floats), "TIFF"))[0, :, 2].tolist() == [0, 128, 255]
    assert decode_image(saved(PILImage.fromarray(floats * 200), "TIFF"))[0, :, 2].tolist() == [0, 100, 200]


def test_cmyk():
    cmyk = PILImage.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 255, 255, 0]]] * 8, dtype=np.uint8), "CMYK")
    decoded = decode_image(saved(cmyk, "TIFF"))
    assert decoded[0].tolist() == [[255] * 3, [0] * 3, [255, 0, 0]]
    jpeg = decode_image(saved(cmyk.resize((48, 48), PILImage.Resampling.NEAREST), "JPEG", quality=95))
    assert jpeg.shape == (48, 48, 3) and np.abs(jpeg[24, 40].astype(int) - [255, 0, 0]).max() < 30


# what a reader must do to the stored pixels, by the EXIF standard's orientation number
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation(orientation, form):
    stored = noise(5, 7, 3).repeat(8, axis=0).repeat(8, axis=1)
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    data = saved(PILImage.fromarray(stored), form, exif=exif)
    plain = decode_image(saved(PILImage.fromarray(stored), form))
    np.testing.assert_array_equal(decode_image(data), UPRIGHT[orientation](plain))


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1)])
def test_thin_pictures(shape):
    pixels = noise(*shape, 3)
    np.testing.assert_array_equal(decode_image(png(pixels)), pixels)
    for method in RESIZE_METHODS:
        assert resize(pixels, 64, 96, method).shape == (64, 96, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_truncated_files_are_errors(form):
    data = saved(PILImage.fromarray(pictures.astronaut()[:100, :100]), form)
    with pytest.raises(DataError, match=r"photo 7: cannot be decoded"):
        decode_image(data[: len(data) * 2 // 3], name="photo 7")


@pytest.mark.parametrize(
    "data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>"]
)
def test_what_is_no_picture_is_an_error(data):
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(data)


@pytest.mark.parametrize("side", [8_000, 100_000])
def test_a_bomb_is_refused_from_its_header(side):
    """A PNG of a hundred bytes that claims gigabytes of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="50000000"):
        decode_image(data)


def test_the_bound_counts_pixels():
    assert decode_image(png(noise(10, 10, 3)), max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(DataError, match="10 x 11 pixels are more than 100"):
        decode_image(png(noise(11, 10, 3)), max_pixels=100)


def in_float(image: np.ndarray, height: int, width: int, mode: str, antialias: bool) -> np.ndarray:
    planes = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    resized = interpolate(planes, (height, width), mode=mode, antialias=antialias).round().clamp(0, 255)
    return resized[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("image", [pictures.astronaut(), pictures.chelsea(), noise(96, 96, 3)], ids=["a", "b", "noise"])
@pytest.mark.parametrize("size", [(378, 378), (64, 64), (644, 378), (64, 800)])
def test_squashing_equals_float32_within_a_level(image, size):
    ours = resize(image, *size, "siglip").astype(int)
    assert np.abs(ours - in_float(image, *size, "bilinear", False)).max() <= 1
    for method in ("dino", "metaclip"):
        np.testing.assert_array_equal(resize(image, *size, method), in_float(image, *size, "bicubic", True))


@pytest.mark.parametrize("size", [(336, 336), (64, 64), (560, 336)])
def test_letterbox(size):
    """Black bars around what PIL makes of the picture, within two levels of its own rounding."""
    image = pictures.chelsea()  # 300 x 451
    ours = resize(image, *size, "default")
    np.testing.assert_array_equal(ours, resize(image, *size, "clip"))
    height, width = letterbox_size(300, 451, *size)
    assert (width == size[1] or height == size[0]) and abs(height / width - 300 / 451) < 0.02
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    inner = ours[top : top + height, left : left + width]
    expected = np.asarray(PILImage.fromarray(image).resize((width, height), PILImage.Resampling.BILINEAR))
    assert np.abs(inner.astype(int) - expected).max() <= 2
    frame = ours.copy()
    frame[top : top + height, left : left + width] = 0
    assert not frame.any()


def test_letterbox_size_is_cut_off_in_float32():
    assert letterbox_size(480, 640, 336, 336) == (251, 336)  # 0.525 is 0.52499998 in float32
    assert letterbox_size(100, 300, 336, 336) == (112, 336)
    assert letterbox_size(1, 5000, 336, 336) == (1, 336)
    assert letterbox_size(7, 3, 100, 50) == (100, 42)


@pytest.mark.parametrize("method", RESIZE_METHODS)
def test_resizing_leaves_its_input_alone(method):
    image = noise(40, 50, 3)
    before = image.copy()
    image.flags.writeable = False
    resize(image, 33, 44, method)
    np.testing.assert_array_equal(image, before)
    same = resize(image, 40, 50, method)
    np.testing.assert_array_equal(same, image)
    flat = np.full((30, 30, 3), 77, dtype=np.uint8)
    assert (resize(flat, 64, 64, method) == 77).all()


def test_unknown_method_lists_the_known():
    with pytest.raises(ConfigError, match="siglip"):
        resize(noise(4, 4, 3), 8, 8, "siglib")
