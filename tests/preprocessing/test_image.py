"""Decoding pictures of real kinds, and resizing against PIL and against torch in float32."""

import io
import multiprocessing
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from skimage import data as pictures
from torch.nn.functional import interpolate

from molmo_model.errors import ConfigError, DataError
from molmo_model.preprocessing.image import RESIZE_METHODS, decode_image, resize
from molmo_model.preprocessing.tiling import Box, letterbox_box, letterbox_size
from tests.preprocessing.examples import headers, png, saved


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


def as_pil_reads(data: bytes) -> np.ndarray:
    image = PILImage.open(io.BytesIO(data))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (17, 33), (200, 220)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"optimize": True}], ids=str)
def test_every_kind_of_jpeg_is_what_pil_reads(shape, subsampling, options):
    """The decoder is OpenCV's: the same pixels to the bit, in colour and in grey."""
    picture = PILImage.fromarray(np.resize(pictures.astronaut()[:200, :220], (*shape, 3)))
    for image in (picture, picture.convert("L")):
        data = saved(image, "JPEG", subsampling=subsampling, **options)
        np.testing.assert_array_equal(decode_image(data), as_pil_reads(data))


def test_damaged_jpegs_are_errors_or_what_pil_reads():
    """Bytes changed, cut out and cut off. OpenCV may fill up a picture that PIL gives up; it shows no other."""
    rng = np.random.default_rng(0)
    whole = saved(PILImage.fromarray(pictures.astronaut()[:96, :120]), "JPEG", quality=90)
    read = 0
    for turn in range(150):
        data = bytearray(whole)
        place = int(rng.integers(2, len(data)))
        if turn % 3 == 0:
            data = data[:place]
        elif turn % 3 == 1:
            data[place] = int(rng.integers(0, 256))
        else:
            del data[place : place + int(rng.integers(1, 40))]
        try:
            ours = decode_image(bytes(data))
        except DataError:
            with pytest.raises((OSError, SyntaxError, ValueError)):
                PILImage.open(io.BytesIO(bytes(data))).load()
            continue
        assert turn % 3 != 0, "a truncated file was taken for a whole one"
        try:
            theirs = as_pil_reads(bytes(data))
        except OSError:
            continue
        np.testing.assert_array_equal(ours, theirs)
        read += 1
    assert read > 50


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("PNG", "LA", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("PNG", "I;16", {}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "YCbCr", {}),
        ("TIFF", "LAB", {}),
        ("TIFF", "LA", {}),
        ("TIFF", "F", {}),
        ("TIFF", "I", {}),
        ("JPEG", "CMYK", {"quality": 95}),
        ("JPEG", "YCbCr", {"quality": 95}),
        ("GIF", "P", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("BMP", "P", {}),
        ("BMP", "L", {}),
        ("PPM", "1", {}),
        ("PPM", "L", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(40, 50), (1, 30), (30, 1), (1, 1)])
def test_every_mode_shows_the_same_picture(form, mode, options, shape):
    """A grey ramp, saved in each mode, comes back as three equal channels within what the mode can hold."""
    grey = np.linspace(0, 255, shape[0] * shape[1]).reshape(shape).round().astype(np.uint8)
    image = PILImage.fromarray(grey)
    if mode == "1":
        grey = (grey > 127).astype(np.uint8) * 255
        image = PILImage.fromarray(grey).convert("1")
    elif mode == "I;16":
        image = PILImage.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        image = PILImage.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        image = PILImage.fromarray(grey.astype(np.float32))
    elif mode == "CMYK":
        zeros = np.zeros((*shape, 3), dtype=np.uint8)
        image = PILImage.fromarray(np.dstack([zeros, 255 - grey]), "CMYK")
    elif mode == "LAB":
        lab = np.dstack([grey, np.zeros((*shape, 2), dtype=np.uint8)])
        image = PILImage.frombytes("LAB", (shape[1], shape[0]), lab.tobytes())
    elif mode == "P":
        image = image.convert("RGB").convert("P", palette=PILImage.Palette.ADAPTIVE)
    else:
        image = image.convert("RGB").convert(mode)
    decoded = decode_image(saved(image, form, **options)).astype(int)
    assert decoded.shape == (*shape, 3)
    if mode == "LAB":  # lightness is no grey level: only order and neutrality are kept
        assert (np.ptp(decoded, axis=2) <= 3).all() and (np.diff(decoded[..., 1].ravel()) >= 0).all()
        return
    allowed = {"P": 3, "YCbCr": 3, "CMYK": 3}.get(mode, 0)
    assert np.abs(decoded - grey[..., None]).max() <= allowed


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [PILImage.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert PILImage.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(decode_image(data), np.full((20, 30, 3), (255, 0, 0)))


def test_sixteen_bit_colour_keeps_the_high_byte():
    values = noise(5, 6, 3).astype(np.uint16) * 256 + noise(5, 6, 3, seed=1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 6, 5, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_image(data), values >> 8)


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


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"no exif at all", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"])
def test_exif_that_cannot_be_read_is_no_reason_to_refuse_a_picture(exif, form):
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(PILImage.new("RGB", (30, 20), "red"), form, exif=exif, **options)
    assert np.abs(decode_image(data).astype(int) - (255, 0, 0)).max() <= 1


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


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "PPM", "WEBP"])
@pytest.mark.parametrize("side", [8_000, 100_000])
def test_a_bomb_is_refused_from_its_header(side, form):
    """A file of a few hundred bytes that claims gigabytes of pixels."""
    with pytest.raises(DataError, match=r"photo 7: (.*50000000|cannot be decoded)"):
        decode_image(headers(side, side)[form], name="photo 7")


BOUNDED = """
import resource, sys
import numpy as np
from PIL import Image
from molmo_model.errors import DataError
from molmo_model.preprocessing.image import decode_image
from tests.preprocessing.examples import headers, saved

decode_image(saved(Image.new("RGB", (64, 64)), "JPEG"))
claims = headers(100_000, 100_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for form, data in claims.items():
    try:
        decode_image(data)
    except DataError as error:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(form, round(grown), error)
    else:
        sys.exit(f"{form} was decoded")
"""


def test_bombs_cost_no_memory():
    """Ten gigapixels as each format can claim them: seen 0 MiB of growth, 8 allowed; an image of them is 30 GB."""
    done = subprocess.run([sys.executable, "-c", BOUNDED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    growth = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert len(growth) == 7 and max(growth.values()) <= 8, done.stdout


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "PPM", "WEBP"])
@pytest.mark.parametrize("size", [(0, 0), (0, 10), (10, 0)])
def test_pictures_without_pixels_are_errors(form, size):
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(headers(*size)[form])


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


def work(seed: int) -> bytes:
    """Decoding and resizing of one picture."""
    picture = decode_image(saved(PILImage.fromarray(noise(300, 451, 3, seed=seed)), "JPEG"))
    return b"".join(resize(picture, 644, 378, method).tobytes() for method in RESIZE_METHODS)


def test_the_same_bytes_again_and_in_forked_workers():
    here = [work(seed) for seed in range(4)]
    assert here == [work(seed) for seed in range(4)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(work, range(4)).get(timeout=60) == here


@pytest.mark.parametrize("method", RESIZE_METHODS)
@pytest.mark.parametrize("size", [(378, 378), (64, 64), (644, 910), (150, 226), (600, 902), (1, 1), (3, 2000)])
def test_exact_resizing_is_that_of_float32_and_the_fast_one_within_a_level(method, size):
    """Shrinking, growing, by exact halves and doubles."""
    image, how = pictures.chelsea(), RESIZE_METHODS[method]
    exact, fast = (resize(image, *size, method, exact=exact) for exact in (True, False))
    box = letterbox_box(300, 451, *size) if how.letterbox else Box(0, 0, *size)
    inside = (slice(box.top, box.top + box.height), slice(box.left, box.left + box.width))
    expected = np.zeros((*size, 3), dtype=np.uint8)
    mode = "bicubic" if how.bicubic else "bilinear"
    expected[inside] = in_float(image, box.height, box.width, mode, how.antialias)
    np.testing.assert_array_equal(exact, expected)
    assert np.abs(fast.astype(int) - exact).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 40_000), (40_000, 1), (80, 1), (700, 2), (40_000, 9), (2, 3)])
def test_extreme_shapes_within_a_level_of_float32(shape):
    """Long thin pictures too: torch's own uint8 filter is up to 195 levels off where the result is one pixel wide."""
    image = noise(*shape, 3)
    for method in ("siglip", "default"):
        exact, fast = (resize(image, 70, 90, method, exact=exact).astype(int) for exact in (True, False))
        assert np.abs(fast - exact).max() <= 1


@pytest.mark.parametrize("method", RESIZE_METHODS)
@pytest.mark.parametrize("exact", [False, True])
def test_resizing_writes_where_it_is_told(method, exact):
    """A crop of a larger array is filled whole, and nothing beside it is touched; strided sources are read right."""
    image = noise(90, 120, 3)
    crops = np.full((3, 64, 64, 3), 7, dtype=np.uint8)
    assert resize(image, 64, 64, method, exact=exact, out=crops[1]) is not None
    np.testing.assert_array_equal(crops[1], resize(image, 64, 64, method, exact=exact))
    assert (crops[[0, 2]] == 7).all()
    turned = image[::-1].swapaxes(0, 1)
    np.testing.assert_array_equal(
        resize(turned, 64, 70, method, exact=exact), resize(turned.copy(), 64, 70, method, exact=exact)
    )


def test_nothing_heavy_is_loaded_before_the_first_picture():
    """Stages that only plan import the preprocessor, too."""
    code = (
        "import sys, molmo_model.preprocessing.preprocessor; print({'cv2', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
