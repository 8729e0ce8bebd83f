"""Finds, reads and checks the images that the rows of a user's file name.

An image is trusted with nothing: it lies below the file's folder (or `image_root`), nowhere else; its header is read
before memory is spent on its pixels; then it is decoded once, because a file that is cut short is otherwise found in
the middle of a training.
"""

import base64
import binascii
import contextlib
import hashlib
import io
import os
import stat
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image as PILImage

from molmo_model import remembered
from molmo_model.config import DatasetConfig
from molmo_model.data.datasets.chat_rows import RowError
from molmo_model.data.downloads import MissingDownload, Survivors, is_url
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
BROKEN = "is broken or cut short: it does not decode"


class NoImage(RowError):
    """Bytes that no decoder of `FORMATS` takes."""


class TooManyPixels(RowError):
    """A picture that is not decoded because of its size."""


class ImageSource:
    """The images of one dataset.

    Args:
        root: where relative paths start; default is `image_root`, else the folder of `path`.
    """

    def __init__(self, config: DatasetConfig, root: str | None = None) -> None:
        if root is None and config.path is None:
            raise ConfigError(f"a dataset of family {config.family!r} needs `path`, a .jsonl or .parquet file")
        self.root = str(root or config.image_root or _folder(str(config.path)))
        self.max_pixels = config.max_image_pixels
        self.downloads = config.downloads
        self._survivors: Survivors | None = None
        self._remote = is_remote(self.root)
        self._folders: dict[str, str] = {}
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
        """SHA-256 of a named image's bytes; `missing` if it cannot be read. Within a run of a stage, as it was when the
        run first asked, and not read where nothing touched it since an earlier one."""
        run = remembered.current()
        return self._digest(name) if run is None else run.input(f"{self.root}/{name}", lambda: self._digest(name))

    def _digest(self, name: str) -> str:
        try:
            if self.downloads is not None and is_url(name):
                return self._list().sha256(name) or "missing"
            if (plain := self._plain_path(name)) is not None:
                return local_digest(*plain)
            if self._remote:
                return hashlib.sha256(self._read_path(name, "")).hexdigest()
            return local_digest(self._local_path(name, ""))
        except (RowError, OSError):
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

    def _list(self) -> Survivors:
        """The list of downloads, read when the first URL is met."""
        if self._survivors is None:
            self._survivors = Survivors(str(self.downloads))
        return self._survivors

    def _read_path(self, name: Any, field: str) -> bytes:
        if self.downloads is not None and is_url(name):
            try:
                return self._list().get(name)
            except MissingDownload as error:
                raise RowError(field, f"{name} was not downloaded: {error.reason}", known=True) from error
        if self._remote:
            self._check_name(name, field)
            try:
                with open_file(join(self.root, name), "rb") as file:
                    data: bytes = file.read(MAX_FILE_BYTES + 1)
            except StorageError as error:
                raise RowError(field, f"{name!r} cannot be read from {self.root}") from error
        else:
            try:
                plain = self._plain_path(name)
                with open(plain[0] if plain else self._local_path(name, field), "rb") as file:
                    data = file.read(MAX_FILE_BYTES + 1)
            except OSError as error:
                raise RowError(field, f"{name!r} cannot be read: {error.strerror}") from error
        if len(data) > MAX_FILE_BYTES:
            raise RowError(field, f"{name!r} is larger than {MAX_FILE_BYTES} bytes")
        return data

    def _plain_path(self, name: Any) -> tuple[str, os.stat_result] | None:
        """What `_local_path` gives for a file that lies where its name says, and the file's state: a folder is resolved
        once for all files in it. None where that cannot be said."""
        if self._remote or not isinstance(name, str) or name[:1] == "/" or name[:5] == "data:" or "://" in name:
            return None
        folder, _, base = name.rpartition("/")
        if base in ("", ".", ".."):
            return None
        try:
            if (real := self._folders.get(folder)) is None:
                root = Path(self.root).resolve()
                resolved = (root / folder).resolve()
                real = self._folders[folder] = str(resolved) if resolved.is_relative_to(root) else ""
            path = f"{real}/{base}"
            info = os.lstat(path) if real else None
        except (OSError, ValueError, RuntimeError):
            return None
        return (path, info) if info and stat.S_ISREG(info.st_mode) and info.st_size <= MAX_FILE_BYTES else None

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
                "to an s3://, gs://, weka:// or hf:// folder and write paths below it, or download what http:// and "
                "https:// name with `python -m pipelines.download`",
            )
        parts = PurePosixPath(name)
        if is_remote(self.root) and (parts.is_absolute() or ".." in parts.parts or "\\" in name):
            raise RowError(field, f"{name!r} leads out of {self.root}; images must lie below it, see `image_root`")


def check_image(data: bytes, max_pixels: int, field: str) -> Image:
    """The facts of an image file, after it was decoded once.

    Raises:
        RowError: no image of `FORMATS`, an animation, too many pixels, or broken or cut short.
    """
    with _quiet(), open_image(data, max_pixels, field) as picture:
        width, height = picture.size
        try:
            # the size of a JPEG is cut by eight in the decoder, which halves the time and reads every byte
            picture.draft(None, (1, 1))
            picture.load()
            turned = picture.getexif().get(ORIENTATION_TAG) in TURNED
        except Exception as error:
            raise RowError(field, BROKEN) from error
    name = "JPEG" if picture.format == "MPO" else str(picture.format)
    return Image(data, *((height, width) if turned else (width, height)), name)


def open_image(data: bytes, max_pixels: int, field: str) -> PILImage.Image:
    """An image file as far as its header says it; its pixels may still be broken.

    Raises:
        NoImage: no image of `FORMATS`.
        TooManyPixels: of them.
        RowError: an empty file, an animation, or broken already.
    """
    if not data:
        raise RowError(field, "is an empty file")
    with _quiet():
        try:
            picture = PILImage.open(io.BytesIO(data), formats=FORMATS)
        except PILImage.DecompressionBombError as error:
            raise TooManyPixels(field, f"has more than {max_pixels} pixels (`max_image_pixels`)") from error
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise NoImage(field, f"is no image of {', '.join(FORMATS)}") from error
        width, height = picture.size
        if width * height > max_pixels:
            raise TooManyPixels(field, f"is {width} x {height}, more than {max_pixels} pixels (`max_image_pixels`)")
        try:
            # not counted: a file of a few megabytes may hold a million empty frames
            moves = picture.format != "MPO" and getattr(picture, "is_animated", False)
        except Exception as error:
            raise RowError(field, BROKEN) from error
    if moves:
        raise RowError(field, "has at least 2 frames; only still images are read")
    return picture


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of large pictures and odd EXIF; both are judged here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _folder(path: str) -> str:
    if is_remote(path):
        return path.rpartition("/")[0]
    return os.path.dirname(path) or "."


_DIGESTS: dict[tuple[str, int, int], str] = {}
"""Digests of files by path, size and time of change: one process asks for the same fingerprint several times."""


def local_digest(path: str | Path, info: os.stat_result | None = None) -> str:
    """SHA-256 of a file of this machine, read again only when it has changed.

    Args:
        path: of the file.
        info: its state, where the caller has just asked for it.
    """
    info = info or os.stat(path)
    if (run := remembered.current()) is not None:
        return run.sha256(path, info)
    key = (str(path), info.st_size, info.st_mtime_ns)
    if key not in _DIGESTS:
        with open(path, "rb") as file:
            _DIGESTS[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _DIGESTS[key]
