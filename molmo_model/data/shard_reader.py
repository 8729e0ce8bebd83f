"""Reads the examples of one `shards/<dataset>` folder at random; the form is described in `shards`."""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from molmo_model.artifacts import read_manifest
from molmo_model.data.example import SPLITS, Example
from molmo_model.data.shards import BLOCK, INDEX, INDEX_SCHEMA, SCHEMA, VIDEO_INDEX_SCHEMA
from molmo_model.errors import ArtifactError, DataError

Ints = NDArray[np.int64]

MAX_OPEN_FILES = 256
"""Shards that one reader keeps open; beyond these a file is opened for each read, which costs microseconds."""


def read_columns(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as one chunk per column."""
    with pq.ParquetFile(path) as file:
        return file.read(columns).combine_chunks()


def numbers(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """A column of numbers without nulls as an array. Arrow's own `to_numpy` imports pandas, which takes longer than to
    find one's place in a training of weeks."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return np.from_dlpack(column)


class ShardReader:
    """Random access to the examples of one `shards/<dataset>` folder; safe under threads, fork and pickling.

    Raises:
        ArtifactError: the folder has no index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.index: pa.Table = read_columns(self.path / INDEX)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{self.path / INDEX} cannot be read ({error}); run the shards stage") from error
        if self.index.schema not in (INDEX_SCHEMA, VIDEO_INDEX_SCHEMA):
            raise ArtifactError(
                f"{self.path / INDEX} has columns {self.index.schema.names}, this code reads {INDEX_SCHEMA.names}; "
                "run the shards stage again"
            )
        self._places = _places(self.index)
        self._files: dict[str, int] = {}

    def __len__(self) -> int:
        return self.index.num_rows

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    @cached_property
    def digest(self) -> str:
        """The identity of the artefact, from its manifest."""
        return read_manifest(self.path, SCHEMA).digest

    def rows(self, split: str) -> list[int]:
        """Row numbers of a split, in order.

        Raises:
            DataError: there is no such split.
        """
        if split not in SPLITS:
            raise DataError(f"{self.path}: split {split!r} is not one of {', '.join(SPLITS)}")
        splits = self.index["split"].combine_chunks().dictionary_encode()
        names = splits.dictionary.to_pylist()
        return np.flatnonzero(numbers(splits.indices) == names.index(split)).tolist() if split in names else []

    def read(self, row: int) -> Example:
        """The example of a row, its bytes verified.

        Raises:
            DataError: there is no such row, or the shard is missing, short or corrupt; names shard, offset and id.
        """
        shard, offset, size = self._range(row)
        data = self._pread(shard, offset, size, row)
        found, expected = hashlib.sha256(data).hexdigest(), self._text("sha256", row)
        if found != expected:
            place = self._place(shard, offset, row)
            raise DataError(f"{place}: SHA-256 {found}, the index says {expected}; restore the shard or run its stage")
        text, *files = (content for _, content in _members(data))
        return Example.from_json(json.loads(text), files, verify=False)

    def facts(self, row: int) -> Example:
        """The example of a row with one placeholder byte for each picture and film: its texts, sizes and times at a
        fraction of the reading. Not verified by hash."""
        shard, offset, _ = self._range(row)
        data = self._pread(shard, offset, self.index["text_size"][row].as_py(), row)
        raw = json.loads(next(_members(data))[1])
        return Example.from_json(raw, [b"\0"] * (len(raw["images"]) + len(raw.get("videos", ()))), verify=False)

    def files(self) -> list[list[str]]:
        """Per row the SHA-256 of its pictures and films, in order."""
        hashes = self.index["image_sha256"].to_pylist()
        if "video_sha256" not in self.index.column_names:
            return hashes
        return [[*row, *films] for row, films in zip(hashes, self.index["video_sha256"].to_pylist(), strict=True)]

    def _range(self, row: int) -> tuple[str, int, int]:
        """Shard, offset and size of a row."""
        if not 0 <= row < len(self):
            raise DataError(f"{self.path}: row {row} does not exist; there are {len(self)}")
        names, shards, offsets, sizes = self._places
        return names[shards[row]], int(offsets[row]), int(sizes[row])

    def _text(self, column: str, row: int) -> str:
        return self.index[column][row].as_py()

    def _pread(self, shard: str, offset: int, size: int, row: int) -> bytes:
        try:
            file, keep = self._open(shard)
            try:
                data = os.pread(file, size, offset)  # has no file position, so threads and forks may share the file
            finally:
                if not keep:
                    os.close(file)
        except OSError as error:
            raise DataError(
                f"{self._place(shard, offset, row)}: {error}; restore it or run the shards stage"
            ) from error
        if len(data) != size:
            raise DataError(f"{self._place(shard, offset, row)}: {len(data)} bytes there, the index says {size}")
        return data

    def _open(self, shard: str) -> tuple[int, bool]:
        """An open shard, and whether it stays open. Takes no lock, which a fork could leave locked for ever."""
        if (file := self._files.get(shard)) is not None:
            return file, True
        file = os.open(self.path / shard, os.O_RDONLY | os.O_CLOEXEC)
        if len(self._files) >= MAX_OPEN_FILES:
            return file, False
        if (kept := self._files.setdefault(shard, file)) != file:  # another thread was first
            os.close(file)
        return kept, True

    def _place(self, shard: str, offset: int, row: int) -> str:
        return f"{self.path / shard} at {offset} (row {row}, example {self._text('id', row)!r})"


def _places(index: pa.Table) -> tuple[list[str], Ints, Ints, Ints]:
    """Shards by number, and per row the shard's number, offset and size: what every read needs."""
    shards = index["shard"].combine_chunks().dictionary_encode()
    names, columns = shards.dictionary.to_pylist(), (index["offset"], index["size"])
    return (names, numbers(shards.indices), *map(numbers, columns))


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the members in a range that `_member` made; quicker than `tarfile`, which reads any tar."""
    at = 0
    while at < len(data):
        header = data[at : at + BLOCK]
        size = int(header[124:135], 8)
        yield header[:100].rstrip(b"\0").decode("ascii"), data[at + BLOCK : at + BLOCK + size]
        at += BLOCK + size + -size % BLOCK
