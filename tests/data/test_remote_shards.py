"""Shards in a bucket against the same shards in a folder; faults are injected below all that could hide them."""

import contextlib
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_model import storage
from molmo_model.artifacts import write_manifest
from molmo_model.data import remote_shards
from molmo_model.data.range_cache import RangeCache
from molmo_model.data.remote_shards import GAP, LONGEST, Range, groups
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import SCHEMA, write_shards
from molmo_model.errors import ArtifactError, DataError, StorageError
from tests.data.builders import rows

ROWS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "x"
    write_shards(rows(range(ROWS)), path, 20_000)
    write_manifest(path, schema=SCHEMA, version=1, params={}, inputs={}, code="", summary={})
    return path


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAUSE", 0.01)


@pytest.fixture
def bucket(folder: Path) -> str:
    """A copy of the shards in memory, with a name of its own."""
    url = f"memory://{uuid.uuid4().hex}/x"
    storage.copy_tree(folder, url)
    return url


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int | None]]:
    """Every request for bytes, as file name, start and stop."""
    seen: list[tuple[str, int, int | None]] = []
    real = storage.read_range

    def noting(url: str, start: int = 0, stop: int | None = None) -> bytes:
        seen.append((url.rpartition("/")[2], start, stop))
        return real(url, start, stop)

    monkeypatch.setattr(storage, "read_range", noting)
    return seen


def flip(url: str, shard: str, at: int) -> None:
    data = bytearray(storage.read_range(f"{url}/{shard}"))
    data[at] ^= 1
    fsspec.filesystem("memory").pipe_file(f"{url}/{shard}", bytes(data))


def place(reader: ShardReader, row: int) -> dict[str, Any]:
    return reader.index.slice(row, 1).to_pylist()[0]


def test_a_bucket_reads_as_the_folder_it_was_copied_from(folder, bucket):
    local, remote = ShardReader(folder), ShardReader(bucket)
    assert remote.digest == local.digest and remote.index == local.index
    assert [remote.read(row) for row in range(ROWS)] == [local.read(row) for row in range(ROWS)]
    assert remote.facts(7) == local.facts(7) and remote.read(3, full=True) == local.read(3)
    remote.ahead([5, 9, 5, 41])
    for row in (9, 5, 41, 5):
        text, files = remote.members(row)
        assert (bytes(text), list(map(bytes, files))) == (
            bytes(local.members(row)[0]),
            [one.data for one in local.read(row).files],
        )
    assert pickle.loads(pickle.dumps(remote)).read(3) == local.read(3)
    with pytest.raises(DataError, match="no local folder"):
        _ = remote.path


def test_the_index_must_be_the_one_of_the_manifest(bucket):
    flip(bucket, "index.parquet", 60)
    with pytest.raises(ArtifactError, match=r"index.parquet"):
        _ = ShardReader(bucket).digest  # either unreadable, or of another hash
    with pytest.raises(StorageError, match=r"nowhere/index.parquet"):
        ShardReader(f"{bucket}/nowhere")


def test_rows_read_ahead_share_requests_and_are_fetched_once(folder, bucket, requests):
    local, remote = ShardReader(folder), ShardReader(bucket)
    shards = set(local.index["shard"].to_pylist())
    requests.clear()
    remote.ahead(range(ROWS))
    assert [remote.read(row) for row in range(ROWS)] == [local.read(row) for row in range(ROWS)]
    assert len(requests) == len(shards) < ROWS  # each shard is shorter than the longest request
    remote.read(4)
    assert len(requests) == len(shards) + 1  # handed out once, then forgotten


def test_what_is_read_ahead_is_bounded(folder, bucket, requests, monkeypatch):
    local, remote = ShardReader(folder), ShardReader(bucket)
    monkeypatch.setattr(remote_shards, "HELD", sum(local.index["size"].to_pylist()) // 4)
    remote.ahead(range(ROWS))
    assert sum(one.size for one in remote._remote._process().coming) <= remote_shards.HELD
    assert [remote.read(row) for row in range(ROWS)] == [local.read(row) for row in range(ROWS)]
    remote.ahead(range(9))
    remote.close()
    assert not remote._remote._process().coming


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 400), st.integers(1, 300)), min_size=1, max_size=12, unique=True
    )
)
def test_a_request_brings_near_ranges_of_one_shard(places):
    ends: Counter[str] = Counter()
    ranges = []
    for number, (shard, gap, size) in enumerate(places):  # ranges of a shard do not overlap
        offset = ends[shard] + gap * GAP // 200
        ranges.append(Range(shard, offset, size * LONGEST // 200, number, ""))
        ends[shard] = offset + ranges[-1].size
    made = list(groups(reversed(ranges)))
    assert sorted(one for group in made for one in group) == sorted(ranges)
    for group in made:
        assert len({one.shard for one in group}) == 1
        assert len(group) == 1 or group[-1].offset + group[-1].size - group[0].offset <= LONGEST
        assert all(b.offset - a.offset - a.size <= GAP for a, b in itertools.pairwise(group))
    for a, b in itertools.pairwise(made):  # none could have been one with the next
        span = b[0].offset + b[0].size - a[0].offset
        assert a[0].shard != b[0].shard or b[0].offset - a[-1].offset - a[-1].size > GAP or span > LONGEST


def test_a_corrupt_object_is_named_and_its_neighbours_are_read(folder, bucket, requests):
    local, remote = ShardReader(folder), ShardReader(bucket)
    row = place(local, 11)
    flip(bucket, row["shard"], row["offset"] + row["text_size"] + 600)
    for ahead in ([], range(ROWS)):
        remote.ahead(ahead)
        message = rf"{bucket}/{row['shard']} at {row['offset']} \(row 11, example 'e-11'\): SHA-256"
        with pytest.raises(DataError, match=message):
            remote.read(11)
        assert [remote.read(n) for n in (10, 12, 13)] == [local.read(n) for n in (10, 12, 13)]


def test_what_was_corrupt_on_its_way_is_fetched_again(folder, bucket, monkeypatch):
    real, seen = storage.read_range, []

    def once_wrong(url: str, start: int = 0, stop: int | None = None) -> bytes:
        data = real(url, start, stop)
        seen.append(url)
        return bytes([data[0] ^ 1]) + data[1:] if len(seen) == 1 else data

    remote = ShardReader(bucket)
    monkeypatch.setattr(storage, "read_range", once_wrong)
    assert remote.read(8) == ShardReader(folder).read(8) and len(seen) == 2


def test_missing_and_short_objects_are_faults_of_the_data(folder, bucket):
    remote, memory = ShardReader(bucket), fsspec.filesystem("memory")
    ordered = sorted((one["shard"], one["offset"], n) for n, one in enumerate(remote.index.to_pylist()))
    (shard, offset, last), first = ordered[-1], next(n for name, at, n in ordered if name == ordered[-1][0] and at == 0)
    data = memory.cat_file(f"{bucket}/{shard}")
    memory.pipe_file(f"{bucket}/{shard}", data[: offset + 100])
    message = rf"example 'e-{last}'.*has {offset + 100} bytes, the index says at least"
    remote.ahead([first, last])  # in one request, which fails
    with pytest.raises(DataError, match=message):
        remote.read(last)
    assert remote.read(first) == ShardReader(folder).read(first)
    memory.rm(f"{bucket}/{shard}")
    with pytest.raises(DataError, match=rf"example 'e-{first}'.*{shard} does not exist"):
        remote.read(first)


def test_a_place_that_cannot_be_reached_is_no_fault_of_the_data(bucket, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    remote, tried = ShardReader(bucket), []

    def unreachable(self: Any, *_: Any, **__: Any) -> bytes:
        tried.append(1)
        raise ConnectionResetError("no route")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", unreachable)
    for ahead in ([], [3]):
        tried.clear()
        remote.ahead(ahead)
        with pytest.raises(StorageError, match=r"row 3, example 'e-3'.*no route"):
            remote.read(3)
        assert len(tried) == storage.TRIES


def test_threads_share_a_reader(folder, bucket, tmp_path):
    expected = [ShardReader(folder).read(row) for row in range(ROWS)]
    remote = ShardReader(bucket, RangeCache(tmp_path / "cache", 10**9))
    order = [row * 37 % ROWS for row in range(300)]

    def read(row: int) -> Any:
        remote.ahead([row, (row + 5) % ROWS])
        return remote.read(row)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, order)) == [expected[row] for row in order]


def test_a_process_that_was_forked_reads_on(folder, bucket):
    remote = ShardReader(bucket)
    remote.ahead(range(20))
    assert remote.read(0).id == "e-0"  # threads run by now
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(remote.read, range(ROWS))
    assert found == [ShardReader(folder).read(row) for row in range(ROWS)]


# ---- the cache


def key(data: bytes) -> tuple[str, int, int]:
    return hashlib.sha256(data).hexdigest(), len(data), xxhash.xxh3_64_intdigest(data)


def stored(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("??/*")}


def test_a_cached_range_needs_no_request(folder, bucket, requests, tmp_path):
    cache = RangeCache(tmp_path / "cache", 10**9)
    first = ShardReader(bucket, cache)
    first.ahead(range(0, ROWS, 2))
    expected = [first.read(row) for row in range(ROWS)]
    second = pickle.loads(pickle.dumps(first))
    requests.clear()
    second.ahead(range(ROWS))
    assert [second.read(row) for row in range(ROWS)] == expected and not requests


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_a_damaged_file_of_the_cache_is_no_hit(folder, bucket, requests, tmp_path, damage, caplog):
    reader = ShardReader(bucket, RangeCache(tmp_path / "cache", 10**9))
    expected = reader.read(5)
    (path,) = (tmp_path / "cache").glob("??/*")
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-700] if damage == "torn" else data[:600] + bytes([data[600] ^ 1]) + data[601:])
    requests.clear()
    assert reader.read(5) == expected and len(requests) == 1
    assert path.read_bytes() == data  # and it is whole again


def test_the_cache_forgets_what_was_used_least_recently(tmp_path):
    cache = RangeCache(tmp_path, 1000)
    blocks = [bytes([number]) * 100 for number in range(14)]
    for age, block in enumerate(blocks[:10]):
        cache.put(key(block)[0], block)
        os.utime(tmp_path / key(block)[0][:2] / key(block)[0], (1000 + age, 1000 + age))
    assert len(stored(tmp_path)) == 10
    assert cache.get(*key(blocks[0])) == blocks[0]  # used now
    (tmp_path / "00").mkdir(exist_ok=True)
    (tmp_path / "00" / "left.part").write_bytes(b"by a process that was killed")
    for block in blocks[10:12]:
        cache.put(key(block)[0], block)
        assert sum(stored(tmp_path).values()) <= 1000
    assert cache.get(*key(blocks[0])) == blocks[0] and cache.get(*key(blocks[11])) == blocks[11]
    assert cache.get(*key(blocks[1])) is None and "left.part" not in stored(tmp_path)
    cache.put(key(b"x" * 1001)[0], b"x" * 1001)  # larger than all of it
    assert max(stored(tmp_path).values()) == 100


def test_a_total_that_a_kill_left_wrong_is_counted_anew(tmp_path):
    cache = RangeCache(tmp_path, 1000)
    blocks = [bytes([number]) * 100 for number in range(9)]
    for text in ("", "nonsense", "99999999"):
        for block in blocks:
            (tmp_path / "total").write_text(text)
            cache.put(key(block)[0], block)
            assert cache.get(*key(block)) == block
    assert len(stored(tmp_path)) == 9


def _fill(folder: Path, seed: int, limit: int, over: Any) -> None:
    cache = RangeCache(folder, limit)
    for number in range(150):
        data = bytes([seed % 3, number % 256]) * (
            50 + number % 20
        )  # processes with the same seed modulo 3 share ranges
        cache.put(key(data)[0], data)
        found = cache.get(*key(data))
        if found not in (None, data):
            over.value += 1
        with cache._locked():  # nobody writes for as long
            over.value += sum(stored(folder).values()) > limit


def test_processes_share_the_cache_and_its_limit(tmp_path):
    context = multiprocessing.get_context("fork")
    wrong = context.Value("i", 0)
    workers = [context.Process(target=_fill, args=(tmp_path, seed, 4000, wrong)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert wrong.value == 0
    assert 2000 < sum(stored(tmp_path).values()) <= 4000 and not list(tmp_path.glob("??/*.part"))
    assert int((tmp_path / "total").read_text()) >= sum(stored(tmp_path).values())


def test_a_cache_that_fails_does_not_stop_the_reading(folder, bucket, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    reader = ShardReader(bucket, RangeCache(tmp_path / "file", 10**9))
    with caplog.at_level(logging.WARNING):
        assert [reader.read(row).id for row in (1, 2, 1)] == ["e-1", "e-2", "e-1"]
    assert sum("keeps nothing" in record.message for record in caplog.records) == 1
    off = ShardReader(bucket, RangeCache(tmp_path / "off", 0))
    assert off.read(1).id == "e-1" and not (tmp_path / "off").exists()


# ---- a real HTTP connection that fails


class FaultyBucket(BaseHTTPRequestHandler):
    """As much of S3 as reading an object takes, with one fault for each request for bytes until none is left."""

    protocol_version = "HTTP/1.1"
    root: ClassVar[Path]
    faults: ClassVar[list[str]]
    served: ClassVar[list[str]]

    def do_HEAD(self) -> None:
        self._head(200, (self.root / self.path.lstrip("/")).stat().st_size)

    def do_GET(self) -> None:
        data = (self.root / self.path.split("?")[0].lstrip("/")).read_bytes()
        if asked := self.headers.get("Range"):
            start, stop = asked.removeprefix("bytes=").split("-")
            data = data[int(start) : int(stop) + 1]
        fault = self.faults.pop(0) if self.faults and ".tar" in self.path else "none"
        self.served.append(fault)
        if fault == "503":
            body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self._head(503, len(body))
            self.wfile.write(body)
            return
        if fault == "slow":
            time.sleep(1.5)
        self._head(206 if asked else 200, len(data) // 2 if fault == "short" else len(data))
        with_fault: dict[str, Callable[[], Any]] = {
            "dropped": lambda: (self.wfile.write(data[: len(data) // 2]), self.wfile.flush()),
            "short": lambda: self.wfile.write(data[: len(data) // 2]),
        }
        with contextlib.suppress(ConnectionError):  # the reader lost its patience
            with_fault.get(fault, lambda: self.wfile.write(data))()
        if fault == "dropped":
            self.close_connection = True

    def _head(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def faulty(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FaultyBucket]]:
    import s3fs

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").symlink_to(folder)
    FaultyBucket.root, FaultyBucket.faults, FaultyBucket.served = tmp_path, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FaultyBucket)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    s3fs.S3FileSystem.clear_instance_cache()
    yield FaultyBucket
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("fault", ["dropped", "short", "503", "slow"])
def test_faults_of_a_connection_pass(folder, faulty, fault, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 1.0)
    local, remote = ShardReader(folder), ShardReader("s3://b/x")
    assert remote.digest == local.digest
    faulty.faults[:] = [fault, fault]
    assert remote.read(4) == local.read(4)
    assert faulty.served.count(fault) == 2  # it did happen
    faulty.faults[:] = [fault]
    remote.ahead([7, 8, 9])
    assert [remote.read(row) for row in (9, 8, 7)] == [local.read(row) for row in (9, 8, 7)]
    assert json.loads(bytes(remote.members(2)[0]))["id"] == "e-2"
