"""Shards: a dataset as a few tar files and an index. `shard_reader` reads them at random.

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
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from molmo_model.artifacts import canonical_json
from molmo_model.data.example import SPLITS, Example
from molmo_model.errors import DataError

SCHEMA = "molmo/shards"
INDEX = "index.parquet"
BLOCK = 512
"""Bytes of a tar block: headers are one block, contents are padded to whole ones."""

INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),  # file name
        ("offset", pa.int64()),  # bytes, of the first header
        ("size", pa.int64()),  # bytes, headers and padding included
        ("text_size", pa.int64()),  # bytes of the range that hold the JSON member
        ("sha256", pa.string()),  # of the range
        ("xxh3", pa.uint64()),  # of the range: quick to compare at every read
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
        "xxh3": xxhash.xxh3_64_intdigest(bytes(range_)),
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


def _extension(image_format: str) -> str:
    """The ending that WebDataset's decoders know."""
    name = re.sub(r"[^a-z0-9]", "", image_format.lower()) or "bin"
    return {"jpeg": "jpg"}.get(name, name)
