"""Shards: a dataset as a few tar files and an index, read at random.

A shard is a plain tar that `tar` and WebDataset read: `<key>.json` is the example without its pictures, `<key>.0.png`
and so on are the original image or film files, untouched. All members of one example stand together, so one range read
of `size` bytes at `offset` brings it, and `sha256` in `index.parquet` covers exactly that range. Headers have fixed
times, owners and modes, and say nothing about the place, so an example has the same bytes and hash wherever it lies.

**Which shard.** Each split is a binary trie over the bits of SHA-256(id): it starts as one shard, and a shard of more
than `shard_bytes` is split in two by the next bit; a leaf is a file, named by its path in the trie. So a changed
example rewrites its own shard and no other, whatever its new size, and so does one that is added or removed (at worst
its shard splits, or two halves become one again). Cutting the stream every N bytes would shift every later boundary.
Inside a shard, and in the index, examples keep the order in which they were made.
"""

import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from molmo_model.artifacts import canonical_json, read_manifest
from molmo_model.data.example import SPLITS, Example
from molmo_model.errors import ArtifactError, DataError

Ints = NDArray[np.int64]

SCHEMA = "molmo/shards"
INDEX = "index.parquet"
BLOCK = 512
"""Bytes of a tar block: headers are one block, contents are padded to whole ones."""
MAX_OPEN_FILES = 256
"""Shards that one reader keeps open; beyond these a file is opened for each read, which costs microseconds."""

INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),  # file name
        ("offset", pa.int64()),  # bytes, of the first header
        ("size", pa.int64()),  # bytes, headers and padding included
        ("text_size", pa.int64()),  # bytes of the range that hold the JSON member
        ("sha256", pa.string()),  # of the range
        ("n_images", pa.int32()),
        ("widths", pa.list_(pa.int32())),
        ("heights", pa.list_(pa.int32())),
        ("image_sha256", pa.list_(pa.string())),
        ("styles", pa.list_(pa.string())),  # one per conversation, in order
        ("n_conversations", pa.int32()),
        ("chars", pa.int64()),  # characters of all texts and labels
    ]
)

VIDEO_FIELDS = (
    pa.field("video_widths", pa.list_(pa.int32())),
    pa.field("video_heights", pa.list_(pa.int32())),
    pa.field("video_frames", pa.list_(pa.int32())),  # of the whole film
    pa.field("video_seconds", pa.list_(pa.float64())),  # of the whole film
    pa.field("video_clips", pa.list_(pa.list_(pa.float64()))),  # first and last second; empty is the whole film
    pa.field("video_sha256", pa.list_(pa.string())),  # of the file, whatever part of it is meant
)
"""Columns that follow where the dataset has films: one element per film of the example, in order."""
VIDEO_INDEX_SCHEMA = pa.schema([*INDEX_SCHEMA, *VIDEO_FIELDS])


def write_shards(
    examples: Iterable[tuple[str, Example]], out: str | Path, shard_bytes: int, scratch: str | Path | None = None
) -> pa.Table:
    """Writes `shards-<split>-<path>.tar` files and `index.parquet`; equal examples give equal bytes.

    Args:
        examples: (split, example) pairs; their order is the order of the rows.
        out: folder to write into; created if missing.
        shard_bytes: a shard of more bytes is split, unless it holds a single example.
        scratch: folder for a temporary copy of all members, which has to be written before the shards are known.

    Returns:
        The index.

    Raises:
        DataError: an id comes twice, or a split is unknown.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryFile(dir=scratch or out) as spool:
        known: set[str] = set()
        for split, example in examples:
            if split not in SPLITS:
                raise DataError(f"example {example.id!r}: split {split!r} is not one of {', '.join(SPLITS)}")
            if (key := member_key(example.id)) in known:
                raise DataError(f"example {example.id!r} comes twice; ids must be unique within a dataset")
            known.add(key)
            rows.append(_spool(spool, split, key, example))
        for split in SPLITS:
            mine = [row for row in rows if row["split"] == split]
            for path, leaf in _leaves(mine, shard_bytes):
                _write_shard(out / f"shards-{split}-{path or 'all'}.tar", leaf, spool)
    schema = VIDEO_INDEX_SCHEMA if any(row["video_sha256"] for row in rows) else INDEX_SCHEMA
    table = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema)
    pq.write_table(table, out / INDEX, compression="zstd")
    return table


def member_key(example_id: str) -> str:
    """The name of an example's members up to the first dot: the id where that is safe, else a part of it and a hash."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", example_id):
        return example_id
    readable = re.sub(r"[^A-Za-z0-9]+", "-", example_id).strip("-")[:40] or "id"
    return f"{readable}_{hashlib.sha256(example_id.encode()).hexdigest()[:20]}"


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


def _spool(spool: BinaryIO, split: str, key: str, example: Example) -> dict[str, Any]:
    """Appends an example's members to the spool; returns its row of the index and where it lies there."""
    text = _member(f"{key}.json", canonical_json(example.to_json()).encode())
    range_ = bytearray(text)
    for number, file in enumerate(example.files):
        range_ += _member(f"{key}.{number}.{_extension(file.format)}", file.data)
    start = spool.tell()
    spool.write(range_)
    texts = [m for c in example.conversations for m in c.messages]
    return {
        "id": example.id,
        "split": split,
        "size": len(range_),
        "text_size": len(text),
        "sha256": hashlib.sha256(range_).hexdigest(),
        "n_images": len(example.images),
        "widths": [image.width for image in example.images],
        "heights": [image.height for image in example.images],
        "image_sha256": [image.sha256 for image in example.images],
        "video_widths": [video.width for video in example.videos],
        "video_heights": [video.height for video in example.videos],
        "video_frames": [video.frames for video in example.videos],
        "video_seconds": [video.duration for video in example.videos],
        "video_clips": [list(video.clip or ()) for video in example.videos],
        "video_sha256": [video.sha256 for video in example.videos],
        "styles": [conversation.style for conversation in example.conversations],
        "n_conversations": len(example.conversations),
        "chars": sum(len(message.text or "") + len(message.label or "") for message in texts),
        "start": start,
        "bits": int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:8], "big"),
    }


def _leaves(rows: list[dict[str, Any]], limit: int, path: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The leaves of the trie, as path of bits and rows in order."""
    if not rows:
        return
    if len(rows) == 1 or len(path) == 64 or sum(row["size"] for row in rows) <= limit:
        yield path, rows
        return
    for bit in (0, 1):
        shift = 63 - len(path)
        yield from _leaves([row for row in rows if row["bits"] >> shift & 1 == bit], limit, f"{path}{bit}")


def _write_shard(path: Path, rows: list[dict[str, Any]], spool: BinaryIO) -> None:
    """Copies the rows' members into one tar and notes where they lie."""
    offset = 0
    with open(path, "wb") as file:
        for row in rows:
            spool.seek(row["start"])
            file.write(spool.read(row["size"]))
            row["shard"], row["offset"] = path.name, offset
            offset += row["size"]
        file.write(bytes(2 * BLOCK))


def _member(name: str, content: bytes) -> bytes:
    """One tar member, header and padding included; the same for the same name and content."""
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = len(content), 0o644, 0
    return header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") + content + bytes(-len(content) % BLOCK)


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the members in a range that `_member` made; quicker than `tarfile`, which reads any tar."""
    at = 0
    while at < len(data):
        header = data[at : at + BLOCK]
        size = int(header[124:135], 8)
        yield header[:100].rstrip(b"\0").decode("ascii"), data[at + BLOCK : at + BLOCK + size]
        at += BLOCK + size + -size % BLOCK


def _extension(image_format: str) -> str:
    """The ending that WebDataset's decoders know."""
    name = re.sub(r"[^a-z0-9]", "", image_format.lower()) or "bin"
    return {"jpeg": "jpg"}.get(name, name)
