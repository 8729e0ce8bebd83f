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

**What did not change.** Given the previous artefact (`previous_shards`), a shard whose examples and order are the same
is a hard link to the old file, and in one that changed, the ranges that did not are copied. The result has the same
bytes as without it.
"""

import hashlib
import re
import tarfile
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from molmo_model.artifacts import canonical_json, link_file
from molmo_model.data.example import SPLITS, Example, Unchanged
from molmo_model.errors import DataError

if TYPE_CHECKING:
    from molmo_model.data.previous_shards import PreviousShards

SCHEMA = "molmo/shards"
INDEX = "index.parquet"
BLOCK = 512
"""Bytes of a tar block: headers are one block, contents are padded to whole ones."""
COPIED_AT_ONCE = 16 * 2**20
"""Bytes of a shard that are gathered before they are written."""

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


@dataclass
class _Rows:
    """Where the ranges of all rows are until their shards are known; one element per row, in order."""

    splits: list[str] = field(default_factory=list)
    bits: "array[int]" = field(default_factory=lambda: array("Q"))
    """The first 64 bits of SHA-256(id)."""
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    starts: "array[int]" = field(default_factory=lambda: array("q"))
    """Place in the spool; -1: the range stands in the previous artefact."""
    old: "array[int]" = field(default_factory=lambda: array("q"))
    """Row of the previous index whose range is equal, or -1."""
    facts: "array[int]" = field(default_factory=lambda: array("q"))
    """Place in `made`; -1: the previous index says what the row is."""
    made: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the index for the examples that were made."""

    def add(self, split: str, example_id: str, size: int, start: int, old: int, made: dict[str, Any] | None) -> None:
        self.splits.append(split)
        self.bits.append(int.from_bytes(hashlib.sha256(example_id.encode()).digest()[:8], "big"))
        self.sizes.append(size)
        self.starts.append(start)
        self.old.append(old)
        self.facts.append(-1 if made is None else len(self.made))
        if made is not None:
            self.made.append(made)


def write_shards(
    examples: Iterable[tuple[str, Example | Unchanged]],
    out: str | Path,
    shard_bytes: int,
    scratch: str | Path | None = None,
    previous: "PreviousShards | None" = None,
) -> pa.Table:
    """Writes `shards-<split>-<path>.tar` files and `index.parquet`; equal examples give equal bytes.

    Args:
        examples: (split, example) pairs; their order is the order of the rows.
        out: folder to write into; created if missing.
        shard_bytes: a shard of more bytes is split, unless it holds a single example.
        scratch: folder for a temporary copy of all members that `previous` lacks, which has to be written before the
            shards are known.
        previous: what `Unchanged` examples and equal ranges are taken from.

    Returns:
        The index.

    Raises:
        DataError: an id comes twice, or a split is unknown.
        DamagedShard: a range of `previous` is not what its index says.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch or out) as spool:
        rows = _gather(examples, spool, previous)
        numbers = np.zeros(len(rows.splits), np.int64)
        offsets = np.zeros(len(rows.splits), np.int64)
        sizes, bits = np.array(rows.sizes, np.int64), np.array(rows.bits, np.uint64)
        sides = np.array(rows.splits, dtype=object)
        names: list[str] = []
        for split in SPLITS:
            for path, leaf in _leaves(np.flatnonzero(sides == split), sizes, bits, shard_bytes):
                numbers[leaf] = len(names)
                offsets[leaf] = np.cumsum(sizes[leaf]) - sizes[leaf]
                names.append(f"shards-{split}-{path or 'all'}.tar")
                _write_shard(out / names[-1], leaf, rows, spool, previous)
    table = _index(rows, [names[number] for number in numbers], offsets, previous)
    (out / INDEX).unlink(missing_ok=True)
    pq.write_table(table, out / INDEX, compression="zstd")
    return table


def _gather(
    examples: Iterable[tuple[str, Example | Unchanged]], spool: BinaryIO, previous: "PreviousShards | None"
) -> _Rows:
    """Takes in all examples; ranges that the previous artefact lacks go to the spool."""
    rows, known = _Rows(), set[str]()
    sizes = [] if previous is None else previous.sizes
    for split, example in examples:
        if split not in SPLITS:
            raise DataError(f"example {example.id!r}: split {split!r} is not one of {', '.join(SPLITS)}")
        if (key := member_key(example.id)) in known:
            raise DataError(f"example {example.id!r} comes twice; ids must be unique within a dataset")
        known.add(key)
        if isinstance(example, Unchanged):
            rows.add(split, example.id, sizes[example.row], -1, example.row, None)
            continue
        range_, made = _range(key, example)
        old = None if previous is None else previous.find(example.id, made["sha256"])
        start = -1
        if old is None:
            start = spool.tell()
            spool.write(range_)
        rows.add(split, example.id, len(range_), start, -1 if old is None else old, made)
    return rows


def member_key(example_id: str) -> str:
    """The name of an example's members up to the first dot: the id where that is safe, else a part of it and a hash."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", example_id):
        return example_id
    readable = re.sub(r"[^A-Za-z0-9]+", "-", example_id).strip("-")[:40] or "id"
    return f"{readable}_{hashlib.sha256(example_id.encode()).hexdigest()[:20]}"


def _range(key: str, example: Example) -> tuple[bytes, dict[str, Any]]:
    """An example's members, and its row of the index without what depends on its place."""
    text = _member(f"{key}.json", canonical_json(example.to_json()).encode())
    files = [
        _member(f"{key}.{number}.{_extension(file.format)}", file.data) for number, file in enumerate(example.files)
    ]
    range_ = b"".join([text, *files])
    texts = [m for c in example.conversations for m in c.messages]
    return range_, {
        "id": example.id,
        "size": len(range_),
        "text_size": len(text),
        "sha256": hashlib.sha256(range_).hexdigest(),
        "xxh3": xxhash.xxh3_64_intdigest(range_),
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
    }


def _leaves(
    rows: NDArray[np.int64], sizes: NDArray[np.int64], bits: NDArray[np.uint64], limit: int, path: str = ""
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """The leaves of the trie, as path of bits and rows in order."""
    if not len(rows):
        return
    if len(rows) == 1 or len(path) == 64 or sizes[rows].sum() <= limit:
        yield path, rows
        return
    bit = bits[rows] >> np.uint64(63 - len(path)) & np.uint64(1)
    for value in (0, 1):
        yield from _leaves(rows[bit == value], sizes, bits, limit, f"{path}{value}")


def _write_shard(
    path: Path, leaf: NDArray[np.int64], rows: _Rows, spool: BinaryIO, previous: "PreviousShards | None"
) -> None:
    """Makes one shard: a link to the old one where its rows are the same, else a file of old and new ranges."""
    path.unlink(missing_ok=True)  # it may share its bytes with another artefact
    old = np.array([rows.old[row] for row in leaf], np.int64)
    if previous is not None and np.array_equal(old, previous.rows_of(path.name)):
        link_file(previous.path / path.name, path)
        return
    with open(path, "xb", buffering=COPIED_AT_ONCE) as file:
        for row in leaf:
            if rows.starts[row] >= 0:
                spool.seek(rows.starts[row])
                file.write(spool.read(rows.sizes[row]))
            elif previous is not None:
                file.write(previous.read(rows.old[row]))
        file.write(bytes(2 * BLOCK))


def _index(rows: _Rows, shards: list[str], offsets: NDArray[np.int64], previous: "PreviousShards | None") -> pa.Table:
    """The index, of rows that were made and of rows of the previous one, in their order."""
    facts = np.array(rows.facts, np.int64)
    taken = np.array(rows.old, np.int64)[facts < 0]
    old = VIDEO_INDEX_SCHEMA.empty_table() if previous is None else previous.take(taken)
    has_films = any(row["video_sha256"] for row in rows.made) or bool(
        len(old["video_sha256"].combine_chunks().flatten())
    )
    schema = VIDEO_INDEX_SCHEMA if has_films else INDEX_SCHEMA
    place = {"split": "", "shard": "", "offset": 0}
    made = pa.Table.from_pylist([{n: (row | place)[n] for n in schema.names} for row in rows.made], schema)
    order = facts.copy()
    order[facts < 0] = len(rows.made) + np.arange(len(taken))
    table = pa.concat_tables([made, old.select(schema.names)]).take(pa.array(order)).combine_chunks()
    for name, values in (("split", rows.splits), ("shard", shards), ("offset", offsets)):
        number = schema.get_field_index(name)
        table = table.set_column(number, schema.field(name), pa.array(values, schema.field(name).type))
    return table


def _member(name: str, content: bytes) -> bytes:
    """One tar member, header and padding included; the same for the same name and content."""
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = len(content), 0o644, 0
    return header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") + content + bytes(-len(content) % BLOCK)


def _extension(image_format: str) -> str:
    """The ending that WebDataset's decoders know."""
    name = re.sub(r"[^a-z0-9]", "", image_format.lower()) or "bin"
    return {"jpeg": "jpg"}.get(name, name)
