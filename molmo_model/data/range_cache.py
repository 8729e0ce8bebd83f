"""A bounded cache of verified byte ranges on a local disk, for shards that lie in a bucket.

A range is kept as one file under the SHA-256 that the index gives for it, so a changed example is another file and
nothing ever goes stale; equal examples of several datasets share one. What is read back is compared with its size and
xxh3, so a file that a kill or a full disk cut short is no hit. All files together never exceed the limit: their total
stands in a file that is changed under a lock, and the ranges used least recently make room.

A cache that fails (disk full, no permission, no locks on this file system) slows a training and does not stop it.
"""

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

log = logging.getLogger(__name__)

KEPT = 0.9
"""Share of the limit that a clean-up leaves, so that not every new file needs one."""
_TOTAL, _PART = "total", ".part"


class RangeCache:
    """Ranges by SHA-256, shared by any number of processes; safe under threads, fork and pickling.

    Args:
        folder: made when the first range is kept.
        limit: bytes of all ranges together; 0 keeps nothing.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._working = limit > 0

    def holds(self, sha256: str) -> bool:
        """Whether a file is there; only `get` knows whether it is whole."""
        return self.limit > 0 and self._file(sha256).exists()

    def get(self, sha256: str, size: int, xxh3: int) -> bytes | None:
        """The range, verified, or None; one that differs is deleted."""
        if self.limit <= 0:
            return None
        path = self._file(sha256)
        try:
            data = path.read_bytes()
            if len(data) == size and xxhash.xxh3_64_intdigest(data) == xxh3:
                os.utime(path)  # used now: access times are off on many disks
                return data
            log.warning("%s is torn or corrupt; it is fetched again", path)
            path.unlink(missing_ok=True)
        except OSError:
            pass  # not there, or another process made room just now
        return None

    def put(self, sha256: str, data: bytes) -> None:
        """Keeps a range that the caller has verified; makes room first."""
        path = self._file(sha256)
        if not self._working or len(data) > self.limit or path.exists():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as total:
                if not path.exists():  # another process was quicker
                    self._reserve(total, len(data))
                    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=_PART, delete=False) as part:
                        part.write(data)
                    os.replace(part.name, path)
        except OSError as error:
            self._working = False
            log.warning("%s keeps nothing from now on: %s", self.folder, error)

    def _file(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Counts `size` more bytes, after others have made room where needed.

        Counted before they are written: a kill in between leaves a total that is too large until the next clean-up,
        never one that is too small.
        """
        text = file.read()
        total = int(text) if text.isdigit() else self._clean(self.limit)
        if total + size > self.limit:
            total = self._clean(min(int(self.limit * KEPT), self.limit - size))
        file.seek(0)
        file.truncate()
        file.write(str(total + size).encode())
        file.flush()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file with the total, nobody else's for as long."""
        with open(os.open(self.folder / _TOTAL, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _clean(self, most: int) -> int:
        """Deletes the ranges used least recently until `most` bytes are left; returns how many are.

        Whoever writes holds the lock, so what is half written now was left by a process that is gone.
        """
        found = []
        for folder in os.scandir(self.folder):
            for entry in os.scandir(folder.path) if folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat()
                    if entry.name.endswith(_PART):
                        os.unlink(entry.path)
                    else:
                        found.append((facts.st_mtime_ns, facts.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= most:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total
