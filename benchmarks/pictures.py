"""Pictures for the benchmarks of preprocessing: real photographs and scans of scikit-image, and drawn ones."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Pixels = npt.NDArray[np.uint8]

SIZES = ((480, 640), (768, 1024), (1200, 1600))
"""Height and width."""


def pictures(height: int, width: int) -> list[Pixels]:
    """Eight pictures of one size: four photographs, a scan, a drawn chart, and two of 1/f noise, whose spectrum is that
    of photographs without their smooth parts: hard to compress and slow to decode."""
    from skimage import data

    photographs = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "page")]
    scaled = [
        np.asarray(Image.fromarray(one).convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        for one in photographs
    ]
    return [*scaled, _chart(height, width), *(_noise(height, width, seed) for seed in range(2))]


def jpeg(pixels: Pixels, quality: int = 90) -> bytes:
    """The bytes of a baseline JPEG file with PIL's own subsampling (4:2:0)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _chart(height: int, width: int) -> Pixels:
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    rng = np.random.default_rng(0)
    for number, share in enumerate(rng.uniform(0.1, 0.9, 12)):
        left = width * (number + 1) / 14
        colour = tuple(rng.integers(0, 255, 3).tolist())
        draw.rectangle((left, height * (1 - share), left + width / 20, height), fill=colour)
        draw.text((left, height * (1 - share) - 14), f"{share:.2f}", fill="black")
    return np.asarray(image)


def _noise(height: int, width: int, seed: int) -> Pixels:
    rng = np.random.default_rng(seed)
    rows, cols = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(rows, cols), 1 / max(height, width))
    planes = [
        np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), (height, width)) for _ in "rgb"
    ]
    noise = np.stack(planes, axis=-1)
    noise = (noise - noise.mean()) / noise.std() * 50 + 128
    return noise.clip(0, 255).astype(np.uint8)
