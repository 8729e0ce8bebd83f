"""Ranges of shards that lie in a bucket (`s3://`, `gs://`, `weka://`, `hf://`, any scheme of `storage`).

`ShardReader` asks for one range per example. `ahead` names those that will be asked for soon: they are fetched by
several threads at once, neighbours of one shard in one request, and `read` then takes them out of memory. What arrives
is compared with the index's xxh3; what differs is fetched once more, alone, before it counts as corrupt. A `RangeCache`
keeps verified ranges on a local disk.

Neither threads nor connections survive a fork, so both are made by the process that uses them.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import xxhash

from molmo_model import storage
from molmo_model.data.range_cache import RangeCache
from molmo_model.errors import DataError, StorageError

REQUESTS = 16
"""Requests in flight of one process and dataset."""
GAP = 64 * 1024
"""Bytes between two ranges below which one request for both is quicker than two."""
LONGEST = 16 * 2**20
"""Bytes at which a request is not lengthened any more."""
HELD = 256 * 2**20
"""Bytes read ahead and not asked for yet; beyond these the oldest are given up."""


class Range(NamedTuple):
    """Where an example lies, and the hashes of its bytes."""

    shard: str
    offset: int
    size: int
    xxh3: int
    sha256: str


class _Process:
    """What belongs to one process: its threads, and the ranges on their way."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="molmo-shards")
        self.coming: dict[Range, Future[dict[Range, bytes | Exception]]] = {}
        self.lock = threading.Lock()


class RemoteShards:
    """The files of one `shards/<dataset>` folder of a bucket; safe under threads, fork and pickling.

    Args:
        url: of the folder.
        cache: keeps ranges on a local disk; None fetches them every time.
    """

    def __init__(self, url: str, cache: RangeCache | None = None) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        self._mine = _Process()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def file(self, name: str) -> bytes:
        """A whole file.

        Raises:
            StorageError: it is not there, or its place cannot be reached.
        """
        return storage.read_range(storage.join(self.url, name))

    def part(self, shard: str, offset: int, size: int) -> bytes:
        """Any bytes of a shard, unverified and uncached.

        Raises:
            DataError: the shard is missing or too short for it.
            StorageError: its place cannot be reached, however often one tries.
        """
        url, stop = storage.join(self.url, shard), offset + size
        try:
            return storage.read_range(url, offset, stop)
        except StorageError as error:
            length = storage.file_size(url)  # raises where the place itself is the trouble
            if length is None:
                raise DataError(f"{url} does not exist") from error
            if length < stop:
                raise DataError(f"{url} has {length} bytes, the index says at least {stop}") from error
            raise

    def read(self, wanted: Range) -> bytes:
        """The bytes of a range; those that arrived ahead are handed out once.

        They may still differ from the hashes: the caller, who knows the example's name, verifies them.

        Raises:
            DataError, StorageError: as `part`.
        """
        mine = self._process()
        with mine.lock:
            coming = mine.coming.pop(wanted, None)
        data = self._one(wanted) if coming is None else coming.result()[wanted]
        if isinstance(data, Exception):
            raise data
        return data

    def ahead(self, wanted: Sequence[Range]) -> None:
        """Starts to fetch what will be read soon; does not wait."""
        mine = self._process()
        with mine.lock:
            new = [one for one in dict.fromkeys(wanted) if one not in mine.coming and not self._cached(one)]
            for group in groups(new):
                coming = mine.pool.submit(self._several, group)
                mine.coming |= dict.fromkeys(group, coming)
            held = sum(one.size for one in mine.coming)
            for one in list(mine.coming):
                if held <= HELD:
                    break
                held -= one.size
                mine.coming.pop(one).cancel()

    def close(self) -> None:
        """Gives up what is on its way."""
        mine = self._process()
        with mine.lock:
            for coming in mine.coming.values():
                coming.cancel()
            mine.coming.clear()

    def _process(self) -> _Process:
        if self._mine.pid != os.getpid():
            self._mine = _Process()
        return self._mine

    def _cached(self, wanted: Range) -> bool:
        return self.cache is not None and self.cache.holds(wanted.sha256)

    def _several(self, group: Sequence[Range]) -> dict[Range, bytes | Exception]:
        """The ranges of one request, each with its bytes or what is wrong with it."""
        start, stop = group[0].offset, max(one.offset + one.size for one in group)
        found: dict[Range, bytes | Exception] = {}
        try:
            whole = self.part(group[0].shard, start, stop - start)
        except DataError:  # the end of the shard is missing, or all of it: some of its ranges may be there
            whole = b""
        except StorageError as error:
            return dict.fromkeys(group, error)
        for one in group:
            data = whole[one.offset - start : one.offset - start + one.size]
            try:
                found[one] = self._kept(one, data) if matches(one, data) else self._one(one)
            except (DataError, StorageError) as error:
                found[one] = error
        return found

    def _one(self, wanted: Range) -> bytes:
        """One range, from the cache or by a request of its own; asked for again if it differs from its hash."""
        kept = self.cache.get(wanted.sha256, wanted.size, wanted.xxh3) if self.cache else None
        if kept is not None:
            return kept
        for _ in range(2):
            data = self.part(wanted.shard, wanted.offset, wanted.size)
            if matches(wanted, data):
                return self._kept(wanted, data)
        return data

    def _kept(self, wanted: Range, data: bytes) -> bytes:
        if self.cache is not None:
            self.cache.put(wanted.sha256, data)
        return data


def matches(wanted: Range, data: bytes) -> bool:
    """Whether these are the bytes that the index describes."""
    return len(data) == wanted.size and xxhash.xxh3_64_intdigest(data) == wanted.xxh3


def groups(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Ranges that one request brings: of one shard, with at most `GAP` bytes between two, at most `LONGEST` in all
    unless a single one is longer."""
    group: list[Range] = []
    for one in sorted(ranges):
        if group:
            end = group[-1].offset + group[-1].size
            near = one.shard == group[0].shard and one.offset - end <= GAP
            if not near or one.offset + one.size - group[0].offset > LONGEST:
                yield group
                group = []
        group.append(one)
    if group:
        yield group
