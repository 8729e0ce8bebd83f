"""The reader against Python's own `tarfile`, and what it must not trust."""

import errno
import hashlib
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from molmo_model.data.example import Conversation, Example, Message
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import INDEX, write_shards
from molmo_model.data.video_file import probe_video
from molmo_model.errors import DataError, StorageError
from tests.data.builders import example, picture, rows, talk
from tests.data.films import film


def every_kind() -> list[tuple[str, Example]]:
    """Each part that an example can have."""
    points = Conversation(
        "pointing",
        (
            Message("user", label="cats"),
            Message("assistant", points=((1.5, 2.0), (99.0, 0.0)), label="cats"),
            Message("user", "and dogs?"),
            Message("assistant", points=(), label="dogs"),
        ),
        0.25,
        {"regions": [[1, 2], None]},
    )
    choice = Conversation(
        "qa", (Message("user", "which?", options=("a", "b c")), Message("assistant", "A", alternatives=("B",)))
    )
    return [
        *rows(range(40)),
        (
            "train",
            Example("points", (picture(1), picture(2)), (points, choice, talk("caption", "ü\u2028"))),
        ),
        ("eval", Example("text", (), (choice,), {"n": 1.5})),
        ("train", Example("film", (), (talk("qa", "yes"),), {}, (probe_video(film(range(0, 8 * 1001, 1001))),))),
        ("train", replace(example(3), id="with.dot/and space")),
    ]


def test_rows_are_what_tarfile_finds(tmp_path):
    made = every_kind()
    write_shards(made, tmp_path, 20_000)
    reader = ShardReader(tmp_path)
    reader.ahead(range(0, len(made), 2))  # before and after its files are open
    for row, (place, (_, one)) in enumerate(zip(reader.index.to_pylist(), made, strict=True)):
        with tarfile.open(tmp_path / place["shard"]) as tar:
            members = [member for member in tar if place["offset"] <= member.offset < place["offset"] + place["size"]]
            contents = [tar.extractfile(member).read() for member in members]
        for verify in (True, False):
            text, files = reader.members(row, verify)
            assert [bytes(text), *map(bytes, files)] == contents
        read, checked = reader.read(row), reader.read(row, full=True)
        assert read == checked == one and repr(read) == repr(one) and read.content_hash() == one.content_hash()
        assert reader.id(row) == one.id
    reader.ahead(range(len(made)))
    assert all(isinstance(file.data, bytes) for row in range(len(made)) for file in reader.read(row).files)


def doctored(folder: Path, change: bytes, to: bytes) -> ShardReader:
    """Shards whose text was changed together with the hashes of the index, as no writer of ours would."""
    write_shards(rows(range(1, 9)), folder, 10**9)
    (shard,) = folder.glob("*.tar")
    data = shard.read_bytes()
    assert change in data and len(change) == len(to)
    data = data.replace(change, to)
    shard.write_bytes(data)
    table = pq.read_table(folder / INDEX)
    ranges = [data[row["offset"] : row["offset"] + row["size"]] for row in table.to_pylist()]
    hashes = {
        "sha256": pa.array([hashlib.sha256(one).hexdigest() for one in ranges]),
        "xxh3": pa.array([xxhash.xxh3_64_intdigest(one) for one in ranges], pa.uint64()),
    }
    for name, column in hashes.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    pq.write_table(table, folder / INDEX)
    return ShardReader(folder)


def test_a_full_read_trusts_nothing(tmp_path):
    original = example(5).images[0].sha256.encode()
    reader = doctored(tmp_path / "hash", original, b"0" * 64)
    assert reader.read(4).id == "e-5"  # the ranges are what the index says
    with pytest.raises(DataError, match=r"'e-5': images\[0\].sha256"):
        reader.read(4, full=True)
    reader = doctored(tmp_path / "role", b'"role":"user"', b'"role":"uzer"')
    with pytest.raises(DataError, match=r"uzer"):
        reader.read(0, full=True)


def test_the_hash_may_be_left_out(tmp_path):
    write_shards(rows(range(9)), tmp_path, 10**9)
    reader = ShardReader(tmp_path)
    row = reader.index.slice(4, 1).to_pylist()[0]
    data = bytearray((tmp_path / row["shard"]).read_bytes())
    at = row["offset"] + row["text_size"] + 600
    data[at] ^= 1
    (tmp_path / row["shard"]).write_bytes(bytes(data))
    message = (
        rf"{row['shard']} at {row['offset']} \(row 4, example 'e-4'\): SHA-256 \w+, the index says {row['sha256']}"
    )
    for read in (reader.read, reader.members):
        with pytest.raises(DataError, match=message):
            read(4)
    text, _ = reader.members(4, verify=False)
    assert json.loads(bytes(text))["id"] == "e-4"


def test_what_the_machine_lacks_is_no_fault_of_the_data(tmp_path, monkeypatch):
    write_shards(rows(range(9)), tmp_path, 10**9)
    reader = ShardReader(tmp_path)

    def failing(number: int) -> None:
        def pread(file: int, size: int, offset: int) -> bytes:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "pread", pread)

    for number, kind in ((errno.EIO, DataError), (errno.ENOMEM, StorageError), (errno.ESTALE, StorageError)):
        failing(number)
        with pytest.raises(kind, match=r"row 3, example 'e-3'"):
            reader.read(3)
