"""What the generated families share: how many examples, a generator of random numbers for each, and fixed splits."""

import hashlib
import importlib.util
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from molmo_model.config import DatasetConfig
from molmo_model.data.example import Image
from molmo_model.errors import ConfigError, DataError


def positions(config: DatasetConfig) -> Iterator[tuple[str, int]]:
    """(split, number) of every example to generate, training first.

    Raises:
        ConfigError: a number of examples is missing or negative; a generated family has no natural end.
    """
    counts = {"train": config.train_examples, "eval": config.eval_examples}
    for split, count in counts.items():
        if count is None or count < 0:
            raise ConfigError(
                f"{split}_examples of a dataset of family {config.family!r} is {count}; it is generated, "
                "so say how many examples to make, 0 or more"
            )
        yield from ((split, number) for number in range(count))


def example_generator(family: str, seed: int, split: str, number: int) -> np.random.Generator:
    """A generator of one example alone, so that example `number` is the same however many others are made."""
    name = f"{family}/{seed}/{split}/{number}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def held_out(names: list[str], count: int) -> set[str]:
    """The `count` names with the smallest hashes: a choice that depends on nothing but the names."""
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        DataError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"package {package!r}, whose files hold the data, is not installed; run the README's set-up")
    return Path(spec.origin).parent


def encode_png(pixels: np.ndarray | PILImage.Image) -> Image:
    """A PNG file of uint8 pixels [H, W] (grey) or [H, W, 3] (RGB)."""
    picture = PILImage.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    file = BytesIO()
    picture.save(file, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return Image(file.getvalue(), picture.width, picture.height, "PNG")
