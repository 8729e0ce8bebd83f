"""Reads the examples of one `shards/<dataset>` folder at random; the form is described in `shards`.

The folder may be local or in a bucket. Every range is compared with its xxh3 as it is read, which costs a fraction of
the reading; SHA-256 stays the identity, and `read(row, full=True)` compares that too. A range that agrees is what our
writer wrote, so its example is built without checking it again.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from molmo_model.artifacts import MANIFEST, Manifest, parse_manifest, read_manifest
from molmo_model.data.example import SPLITS, Example
from molmo_model.data.shards import BLOCK, INDEX, INDEX_SCHEMA, SCHEMA, VIDEO_INDEX_SCHEMA
from molmo_model.errors import ArtifactError, DataError, StorageError

if TYPE_CHECKING:
    from molmo_model.data.range_cache import RangeCache
    from molmo_model.data.remote_shards import Range, RemoteShards

Ints = NDArray[np.int64]

MAX_OPEN_FILES = 256
"""Shards that one reader keeps open; beyond these a file is opened for each read, which costs microseconds."""
_FAULTS = (errno.ENOENT, errno.EIO)
"""Failures of a local file that are the data's, and the same tomorrow; others are the machine's."""


def read_columns(path: Path | pa.BufferReader, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as one chunk per column."""
    with pq.ParquetFile(path) as file:
        return file.read(columns).combine_chunks()


def numbers(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """A column of numbers without nulls as an array. Arrow's own `to_numpy` imports pandas, which takes longer than to
    find one's place in a training of weeks."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies
    return np.from_dlpack(column)


class ShardReader:
    """Random access to the examples of one `shards/<dataset>` folder; safe under threads, fork and pickling.

    Args:
        path: folder, or URL of one (`s3://bucket/shards/x`; see `molmo_model.storage`).
        cache: keeps what comes from a bucket on a local disk; unused for a local folder.

    Raises:
        ArtifactError: the folder has no index that this code can read.
        StorageError: the bucket cannot be reached.
    """

    def __init__(self, path: str | Path, cache: "RangeCache | None" = None) -> None:
        self.place = os.fspath(path).removeprefix("file://")
        """The folder or URL, as errors name it."""
        self._cache = cache
        self._remote = _remote(self.place, cache)
        self.index = self._read_index()
        self._ids = self.index["id"].combine_chunks()
        self._places = _Places(self.index)
        self._files: dict[str, int] = {}

    def __len__(self) -> int:
        return self.index.num_rows

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.place, "cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    @property
    def path(self) -> Path:
        """The local folder.

        Raises:
            DataError: it is not local.
        """
        if self._remote is not None:
            raise DataError(f"{self.place} is no local folder; copy it, or read it through the reader")
        return Path(self.place)

    @cached_property
    def digest(self) -> str:
        """The identity of the artefact, from its manifest.

        Raises:
            ArtifactError: there is no manifest, or in a bucket the index is not the one that it lists.
        """
        manifest = manifest_at(self.place)
        if self._remote is not None and (expected := manifest.files[INDEX].sha256) != self._index_sha256:
            raise ArtifactError(
                f"{self.place}/{INDEX} has SHA-256 {self._index_sha256}, the manifest says {expected}; copy the folder "
                "again"
            )
        return manifest.digest

    def rows(self, split: str) -> list[int]:
        """Row numbers of a split, in order.

        Raises:
            DataError: there is no such split.
        """
        if split not in SPLITS:
            raise DataError(f"{self.place}: split {split!r} is not one of {', '.join(SPLITS)}")
        splits = self.index["split"].combine_chunks().dictionary_encode()
        names = splits.dictionary.to_pylist()
        return np.flatnonzero(numbers(splits.indices) == names.index(split)).tolist() if split in names else []

    def read(self, row: int, full: bool = False) -> Example:
        """The example of a row, its bytes verified.

        Args:
            row: its number in the index.
            full: compare SHA-256 of the range and of every file, and check the example as when it was made; some
                twenty times slower.

        Raises:
            DataError: there is no such row, or the shard is missing, short or corrupt; names shard, offset and id.
            StorageError: the disk or the bucket fails in a way that may pass.
        """
        data = self._bytes(row)
        text, *files = map(bytes, _contents(data))
        if not full:
            return Example.from_trusted(json.loads(text), files)
        self._require_sha256(row, data)
        return Example.from_json(json.loads(text), files)

    def members(self, row: int, verify: bool = True) -> tuple[memoryview, list[memoryview]]:
        """A row's example as it is stored: its JSON, and the files of its pictures and films, as views into one buffer.

        Args:
            row: its number in the index.
            verify: compare with the xxh3; always done for what comes from a bucket.

        Raises:
            DataError, StorageError: as `read`.
        """
        text, *files = _contents(self._bytes(row, verify))
        return text, files

    def ahead(self, rows: Iterable[int]) -> None:
        """Says which rows will be read soon, so that they are fetched in the background; does not wait."""
        if self._remote is not None:
            self._remote.ahead([self._range(row) for row in rows])
            return
        for row in rows:
            shard, offset, size = self._place_of(row)
            if (file := self._files.get(shard)) is not None:
                os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)

    def facts(self, row: int) -> Example:
        """The example of a row with one placeholder byte for each picture and film: its texts, sizes and times at a
        fraction of the reading. Not verified by hash."""
        shard, offset, _ = self._place_of(row)
        data = self._part(shard, offset, self._places.text_sizes.item(row), row)
        raw = json.loads(bytes(_contents(data)[0]))
        return Example.from_json(raw, [b"\0"] * (len(raw["images"]) + len(raw.get("videos", ()))), verify=False)

    def files(self) -> list[list[str]]:
        """Per row the SHA-256 of its pictures and films, in order."""
        hashes = self.index["image_sha256"].to_pylist()
        if "video_sha256" not in self.index.column_names:
            return hashes
        return [[*row, *films] for row, films in zip(hashes, self.index["video_sha256"].to_pylist(), strict=True)]

    def id(self, row: int) -> str:
        """The id of a row's example."""
        return str(self._ids[row].as_py())

    def close(self) -> None:
        """Gives up what is on its way from a bucket."""
        if self._remote is not None:
            self._remote.close()

    def _read_index(self) -> pa.Table:
        name = f"{self.place}/{INDEX}"
        try:
            if self._remote is None:
                index = read_columns(Path(name))
            else:
                data = self._remote.file(INDEX)
                self._index_sha256 = hashlib.sha256(data).hexdigest()
                index = read_columns(pa.BufferReader(data))
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{name} cannot be read ({error}); run the shards stage") from error
        if index.schema not in (INDEX_SCHEMA, VIDEO_INDEX_SCHEMA):
            raise ArtifactError(
                f"{name} has columns {index.schema.names}, this code reads {INDEX_SCHEMA.names}; "
                "run the shards stage again"
            )
        return index

    def _place_of(self, row: int) -> tuple[str, int, int]:
        """Shard, offset and size of a row."""
        places = self._places
        if not 0 <= row < places.rows:
            raise DataError(f"{self.place}: row {row} does not exist; there are {len(self)}")
        return places.names[places.shards.item(row)], places.offsets.item(row), places.sizes.item(row)

    def _range(self, row: int) -> "Range":
        from molmo_model.data.remote_shards import Range

        return Range(*self._place_of(row), self._places.hashes.item(row), self.index["sha256"][row].as_py())

    def _bytes(self, row: int, verify: bool = True) -> bytes:
        """The range of a row, verified."""
        shard, offset, size = self._place_of(row)
        if self._remote is None:
            data = self._part(shard, offset, size, row)
        else:
            try:
                data = self._remote.read(self._range(row))
            except (DataError, StorageError) as error:
                raise type(error)(f"{self._name(row)}: {error}") from error
        if (verify or self._remote is not None) and xxhash.xxh3_64_intdigest(data) != self._places.hashes.item(row):
            self._require_sha256(row, data)
            raise DataError(
                f"{self._name(row)}: the index contradicts itself, xxh3 differs; run the shards stage again"
            )
        return data

    def _require_sha256(self, row: int, data: bytes) -> None:
        found, expected = hashlib.sha256(data).hexdigest(), self.index["sha256"][row].as_py()
        if found != expected:
            raise DataError(
                f"{self._name(row)}: SHA-256 {found}, the index says {expected}; restore the shard or run its stage"
            )

    def _part(self, shard: str, offset: int, size: int, row: int) -> bytes:
        """Bytes of a shard. By `pread` and not through a mapping: a disk that fails, or a file that is cut while it is
        read, is then an error with a name and not the end of the process."""
        if self._remote is not None:
            try:
                return self._remote.part(shard, offset, size)
            except (DataError, StorageError) as error:
                raise type(error)(f"{self._name(row)}: {error}") from error
        try:
            if (file := self._files.get(shard)) is not None:
                data = os.pread(file, size, offset)  # has no file position, so threads and forks may share the file
            else:
                data = self._open_and_read(shard, size, offset)
        except OSError as error:
            kind = DataError if error.errno in _FAULTS else StorageError
            raise kind(f"{self._name(row)}: {error}; restore it or run the shards stage") from error
        if len(data) != size:
            raise DataError(f"{self._name(row)}: {len(data)} bytes there, the index says {size}")
        return data

    def _open_and_read(self, shard: str, size: int, offset: int) -> bytes:
        """Takes no lock, which a fork could leave locked for ever."""
        file = os.open(f"{self.place}/{shard}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(file, size, offset)
        except BaseException:
            os.close(file)
            raise
        # the limit is looked at first; a few files more, from threads that came at once, do no harm
        if len(self._files) >= MAX_OPEN_FILES or self._files.setdefault(shard, file) != file:
            os.close(file)
        return data

    def _name(self, row: int) -> str:
        shard, offset, _ = self._place_of(row)
        return f"{self.place}/{shard} at {offset} (row {row}, example {self.id(row)!r})"


class _Places:
    """What every read needs of the index, as arrays: an item of a column of Arrow takes longer than to hash a text."""

    def __init__(self, index: pa.Table) -> None:
        shards = index["shard"].combine_chunks().dictionary_encode()
        self.rows = index.num_rows
        self.names: list[str] = shards.dictionary.to_pylist()
        self.shards: NDArray[np.int32] = numbers(shards.indices)
        self.offsets: Ints = numbers(index["offset"])
        self.sizes: Ints = numbers(index["size"])
        self.text_sizes: Ints = numbers(index["text_size"])
        self.hashes: NDArray[np.uint64] = numbers(index["xxh3"])


def manifest_at(place: str) -> Manifest:
    """The manifest of the shards in a local folder or a bucket.

    Raises:
        ArtifactError: there is none, or it is no manifest of shards.
        StorageError: the bucket cannot be reached, or has no such file.
    """
    if "://" not in place:
        return read_manifest(place, SCHEMA)
    from molmo_model import storage

    return parse_manifest(storage.read_range(storage.join(place, MANIFEST)).decode("utf-8", "replace"), place, SCHEMA)


def _remote(place: str, cache: "RangeCache | None") -> "RemoteShards | None":
    """What fetches from a bucket; None for a local folder, which needs none of its libraries."""
    if "://" not in place:
        return None
    from molmo_model.data.remote_shards import RemoteShards

    return RemoteShards(place, cache)


def _contents(data: bytes) -> list[memoryview]:
    """Contents of the members in a range that `shards` made; quicker than `tarfile`, which reads any tar."""
    at, end, view, found = 0, len(data), memoryview(data), []
    while at < end:
        start = at + BLOCK
        at = start + int(data[at + 124 : at + 135], 8)
        found.append(view[start:at])
        at += -at % BLOCK
    return found
