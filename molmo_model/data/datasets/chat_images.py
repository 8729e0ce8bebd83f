"""Finds, reads and checks the images that the rows of a user's file name.

An image is trusted with nothing: it lies below the file's folder (or `image_root`), nowhere else; its header is read
before memory is spent on its pixels; then it is decoded once, because a file that is cut short is otherwise found in
the middle of a training.
"""

import base64
import binascii
import hashlib
import io
import os
import warnings
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image as PILImage

from molmo_model.config import DatasetConfig
from molmo_model.data.datasets.chat_rows import RowError
from molmo_model.data.example import Image
from molmo_model.errors import ConfigError, StorageError
from molmo_model.storage import is_remote, join, open_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Decoders that a user's file may reach. The one of JPEG also opens MPO, a JPEG with a second picture behind it that
some cameras write."""
MAX_FILE_BYTES = 256 * 2**20
KEPT = 16
"""Images in memory, because rows about one image often stand together."""
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
ORIENTATION_TAG = 0x0112


class ImageSource:
    """The images of one dataset."""

    def __init__(self, config: DatasetConfig) -> None:
        if config.path is None:
            raise ConfigError(f"a dataset of family {config.family!r} needs `path`, a .jsonl or .parquet file")
        self.root = str(config.image_root or _folder(config.path))
        self.max_pixels = config.max_image_pixels
        self._kept: OrderedDict[str, Image] = OrderedDict()

    def load(self, item: Any, field: str) -> Image:
        """The image that an entry of `images` names or holds, checked and decoded once.

        Raises:
            RowError: it is missing, lies outside the root, or is no image, too large or broken.
        """
        data = self.read(item, field)
        key = hashlib.sha256(data).hexdigest()
        if key not in self._kept:
            self._kept[key] = check_image(data, self.max_pixels, field)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def read(self, item: Any, field: str) -> bytes:
        """The bytes of an image, not yet checked."""
        if isinstance(item, dict):
            return self._read_mapping({name: value for name, value in item.items() if value is not None}, field)
        if isinstance(item, bytes):
            return item
        return self._read_path(item, field)

    def name(self, item: Any) -> str | None:
        """The relative path that an entry of `images` names; None if it holds the bytes itself or names no path."""
        if isinstance(item, dict):
            item = None if item.get("bytes") is not None else item.get("path")
        return item if isinstance(item, str) and item else None

    def digest(self, name: str) -> str:
        """SHA-256 of a named image's bytes; `missing` if it cannot be read."""
        try:
            if is_remote(self.root):
                return hashlib.sha256(self._read_path(name, "")).hexdigest()
            return _local_digest(self._local_path(name, ""))
        except RowError:
            return "missing"

    def _read_mapping(self, item: dict[str, Any], field: str) -> bytes:
        unknown = sorted(set(item) - {"path", "bytes", "base64"}, key=str)
        if unknown:
            raise RowError(
                field, f"has the unknown field {unknown[0]!r}; an image is {{path}}, {{base64}} or {{bytes}}"
            )
        if isinstance(item.get("bytes"), bytes):
            return bytes(item["bytes"])
        if "bytes" in item:
            raise RowError(f"{field}.bytes", "is no bytes; only Parquet can hold bytes, write base64 in JSON")
        if "base64" not in item:
            return self._read_path(item.get("path"), field)
        try:
            return base64.b64decode(item["base64"], validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise RowError(f"{field}.base64", f"is not base64: {error}") from error

    def _read_path(self, name: Any, field: str) -> bytes:
        if is_remote(self.root):
            self._check_name(name, field)
            try:
                with open_file(join(self.root, name), "rb") as file:
                    data: bytes = file.read(MAX_FILE_BYTES + 1)
            except StorageError as error:
                raise RowError(field, f"{name!r} cannot be read from {self.root}") from error
        else:
            try:
                data = self._local_path(name, field).read_bytes()
            except OSError as error:
                raise RowError(field, f"{name!r} cannot be read: {error.strerror}") from error
        if len(data) > MAX_FILE_BYTES:
            raise RowError(field, f"{name!r} is larger than {MAX_FILE_BYTES} bytes")
        return data

    def _local_path(self, name: Any, field: str) -> Path:
        self._check_name(name, field)
        root = Path(self.root).resolve()
        try:
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                raise RowError(field, f"{name!r} leads out of {self.root}; images must lie below it, see `image_root`")
            if not path.is_file():
                raise RowError(field, f"{name!r} does not exist below {self.root}")
            if path.stat().st_size > MAX_FILE_BYTES:
                raise RowError(field, f"{name!r} is larger than {MAX_FILE_BYTES} bytes")
        except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, a loop of links
            raise RowError(field, f"{name!r} is no path that can be read") from error
        return path

    def _check_name(self, name: Any, field: str) -> None:
        if not isinstance(name, str) or not name:
            raise RowError(field, f"is {name!r}; it must be the path of an image")
        if "://" in name or name.startswith("data:"):
            raise RowError(
                field,
                f"{name[:80]!r} is a URL; images are not fetched: copy them below {self.root}, or set `image_root` "
                "to an s3://, gs://, weka:// or hf:// folder and write paths below it",
            )
        parts = PurePosixPath(name)
        if is_remote(self.root) and (parts.is_absolute() or ".." in parts.parts or "\\" in name):
            raise RowError(field, f"{name!r} leads out of {self.root}; images must lie below it, see `image_root`")


def check_image(data: bytes, max_pixels: int, field: str) -> Image:
    """The facts of an image file, after it was decoded once.

    Raises:
        RowError: no image of `FORMATS`, an animation, too many pixels, or broken or cut short.
    """
    if not data:
        raise RowError(field, "is an empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd EXIF; both are judged here
        try:
            picture = PILImage.open(io.BytesIO(data), formats=FORMATS)
        except PILImage.DecompressionBombError as error:
            raise RowError(field, f"has more than {max_pixels} pixels (`max_image_pixels`)") from error
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise RowError(field, f"is no image of {', '.join(FORMATS)}") from error
        with picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise RowError(field, f"is {width} x {height}, more than {max_pixels} pixels (`max_image_pixels`)")
            try:
                frames = getattr(picture, "n_frames", 1) if picture.format != "MPO" else 1
                # the size of a JPEG is cut by eight in the decoder, which halves the time and reads every byte
                picture.draft(None, (1, 1))
                picture.load()
                turned = picture.getexif().get(ORIENTATION_TAG) in TURNED
            except Exception as error:
                raise RowError(field, "is broken or cut short: it does not decode") from error
            if frames > 1:
                raise RowError(field, f"has {frames} frames; only still images are read")
    name = "JPEG" if picture.format == "MPO" else str(picture.format)
    return Image(data, *((height, width) if turned else (width, height)), name)


def _folder(path: str) -> str:
    if is_remote(path):
        return path.rpartition("/")[0]
    return os.path.dirname(path) or "."


_DIGESTS: dict[tuple[str, int, int], str] = {}
"""Digests of files by path, size and time of change: one process asks for the same fingerprint several times."""


def _local_digest(path: Path) -> str:
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _DIGESTS:
        with open(path, "rb") as file:
            _DIGESTS[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _DIGESTS[key]
