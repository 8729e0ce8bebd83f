"""What a run may remember of earlier ones: digests of files that did not change since, and facts about texts.

`pipelines.stage.run` opens one SQLite file in the state folder for as long as it works (`remembering`). Within it
`sha256` reads a file only where its size, time of change, inode or device differ from when it was last read; outside
of it, and so whenever a person asks for a verification, every file is really read. The file may be deleted at any time:
all that is lost is time. A kill loses the last few entries; two stages at once wait for one another.

What protects from a stale entry, a file that changed although size and time did not:

- a file that changed less than `RACY_SECONDS` before it was read is not remembered, as git does with its index, because
  a second change might fall into the same tick of the file system's clock;
- where nobody made hard links to a file, its inode's time of change (ctime) must be equal too, which no program can set
  back: `cp -p`, `touch -r` and `rsync --times` over a file are found. Making and deleting hard links changes ctime,
  therefore it says nothing for artefacts, which share their files with their state.

What is left is a bit that rots on the disk, or an artefact's file that was edited with its time put back. Verification
(`pipelines.stage.differences`, `molmo_model.artifacts.verify`) and every read of an example in training find those by
their hashes.
"""

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

FILE = "remembered.sqlite"
RACY_SECONDS = 2.0
"""A file must be this much older than its reading to be remembered; FAT counts time in steps of 2 seconds."""
BATCH = 1000
"""New entries that are held in memory before they are written."""
_TABLES = """
CREATE TABLE IF NOT EXISTS files (folder TEXT, name TEXT, state TEXT, changed INTEGER, links INTEGER, sha256 TEXT,
  PRIMARY KEY (folder, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""

MOST_LOADED = 1_000_000
"""Entries that are read by whole folders, which is quicker; beyond these each file is looked up alone."""

_ENTRIES = "SELECT name, state, changed, links, sha256 FROM files"
_Entry = tuple[str, int, int, str]
"""State (size, mtime, inode, device), ctime, hard links, SHA-256."""


class Remembered:
    """The memory of one run. One thread of one process uses it; a forked child that does reads every file.

    Attributes:
        folder: where it lies, and where other memories may lie beside it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._process = os.getpid()
        self._new_files: dict[str, _Entry] = {}
        self._new_facts: dict[str, str] = {}
        self._inputs: dict[str, str] = {}
        self._folders: dict[str, dict[str, _Entry]] = {}
        self._loaded = 0
        self.shared: dict[str, Any] = {}
        """What parts of this run hand to one another, by name."""
        self._database: sqlite3.Connection | None = None
        with contextlib.suppress(OSError, sqlite3.Error):  # a memory that cannot be had costs time, nothing else
            self._database = _open(self.folder / FILE)

    def sha256(self, path: str | Path, info: os.stat_result | None = None) -> str:
        """SHA-256 of a file in hexadecimal.

        Args:
            path: of the file.
            info: its state, where the caller has just asked for it; then `path` is absolute and no symbolic link.

        Raises:
            OSError: it cannot be read.
        """
        path = os.path.abspath(path) if info is None else str(path)
        if os.getpid() != self._process:
            return _read(path)[0]
        info = info or os.stat(path)
        known = self._known(path)
        if known is not None and _unchanged(known, info):
            return known[3]
        digest, entry = _read(path)
        if entry is not None:
            self._learn(path, entry)
        return digest

    def input(self, place: str, digest: Callable[[], str]) -> str:
        """The digest of an input as it was when this run first asked: that is what the fingerprint of its artefact
        says.

        Args:
            place: path or URL.
            digest: gets it, where this run has not asked yet.
        """
        if (found := self._inputs.get(place)) is None:
            found = self._inputs[place] = digest()
        return found

    def fact(self, key: str, make: Callable[[], str]) -> str:
        """What `make` returns, from memory where it is known; `key` must determine it wholly."""
        found = self._new_facts.get(key)
        if found is None and os.getpid() == self._process:
            rows = self._ask("SELECT value FROM facts WHERE key = ?", key)
            found = rows[0][0] if rows else None
        if found is None:
            found = self._new_facts[key] = make()
        return found

    def linked(self, source: str | Path, target: str | Path) -> None:
        """`target` has become a hard link to `source`: what is known of one file holds for both names."""
        source, target = os.path.abspath(source), os.path.abspath(target)
        known = self._known(source) if os.getpid() == self._process else None
        if known is None:
            return
        info = os.stat(target)
        if _unchanged(known, info) and _state(os.stat(source)) == _state(info):  # a copy has another inode
            for path in (source, target):
                self._learn(path, _entry(info, known[3]))

    def forget(self, path: str | Path) -> None:
        """The file is to be read again at the next question, whatever its state."""
        path = os.path.abspath(path)
        self._new_files.pop(path, None)
        self._inputs.pop(path, None)
        folder, _, name = path.rpartition("/")
        self._folders.get(folder, {}).pop(name, None)
        self._write("DELETE FROM files WHERE folder = ? AND name = ?", [(folder, name)])

    def flush(self) -> None:
        """Writes what is new, so that a kill does not lose it."""
        if os.getpid() != self._process:
            return
        files = [(*path.rpartition("/")[::2], *entry) for path, entry in self._new_files.items()]
        self._write("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", files)
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(self._new_facts.items()))
        self._new_files.clear()
        self._new_facts.clear()

    def close(self) -> None:
        self.flush()
        if self._database is not None and os.getpid() == self._process:
            self._database.close()
        self._database = None

    def _known(self, path: str) -> _Entry | None:
        if (found := self._new_files.get(path)) is not None:
            return found
        folder, _, name = path.rpartition("/")
        if (entries := self._folders.get(folder)) is None:
            if self._loaded >= MOST_LOADED:
                rows = self._ask(f"{_ENTRIES} WHERE folder = ? AND name = ?", folder, name)
                return rows[0][1:] if rows else None
            rows = self._ask(f"{_ENTRIES} WHERE folder = ?", folder)
            entries = self._folders[folder] = {row[0]: row[1:] for row in rows}
            self._loaded += len(entries)
        return entries.get(name)

    def _learn(self, path: str, entry: _Entry) -> None:
        self._new_files[path] = entry
        folder, _, name = path.rpartition("/")
        if folder in self._folders:
            self._folders[folder][name] = entry
        if len(self._new_files) >= BATCH:
            self.flush()

    def _ask(self, question: str, *keys: str) -> list[Any]:
        """The rows that answer a question; none where there is no memory."""
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error, UnicodeEncodeError):
                return self._database.execute(question, keys).fetchall()
        return []

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if self._database is None or not rows:
            return
        with contextlib.suppress(sqlite3.Error, UnicodeEncodeError), self._database:
            self._database.executemany(statement, rows)


_CURRENT: ContextVar[Remembered | None] = ContextVar("remembered", default=None)


@contextlib.contextmanager
def remembering(folder: str | Path) -> Iterator[Remembered]:
    """Uses the memory in `folder` until the end of the block; a block within another one shares its memory."""
    if (outer := _CURRENT.get()) is not None and outer.folder == Path(folder):
        yield outer
        return
    memory = Remembered(folder)
    token = _CURRENT.set(memory)
    try:
        yield memory
    finally:
        _CURRENT.reset(token)
        memory.close()


def current() -> Remembered | None:
    """The memory that is in use, if one is."""
    return _CURRENT.get()


def fact(key: str, make: Callable[[], str]) -> str:
    """`Remembered.fact` of the memory in use; without one `make` is called."""
    memory = _CURRENT.get()
    return make() if memory is None else memory.fact(key, make)


def linked(source: str | Path, target: str | Path) -> None:
    """`Remembered.linked` of the memory in use, if one is."""
    memory = _CURRENT.get()
    if memory is not None:
        memory.linked(source, target)


def _open(path: Path) -> sqlite3.Connection:
    """The database; one that is broken is begun anew."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connect(path)
    except sqlite3.OperationalError:  # locked, read-only, no space: not broken
        raise
    except sqlite3.DatabaseError:
        path.unlink(missing_ok=True)
        return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=30, check_same_thread=False)
    try:
        database.executescript(_TABLES)
        for table in ("files", "facts"):
            database.execute(f"SELECT * FROM {table} LIMIT 1").fetchone()
    except sqlite3.Error:
        database.close()
        raise
    return database


def _read(path: str) -> tuple[str, _Entry | None]:
    """The digest of a file, and what to remember of it; nothing where it may just be changing."""
    with open(path, "rb") as file:
        started, before = time.time_ns(), os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    newest = max(before.st_mtime_ns, before.st_ctime_ns if before.st_nlink == 1 else 0)
    entry = _entry(before, digest)
    calm = newest < started - RACY_SECONDS * 1e9 and entry[:2] == _entry(after, digest)[:2]
    return digest, entry if calm else None


def _entry(info: os.stat_result, digest: str) -> _Entry:
    return _state(info), info.st_ctime_ns, info.st_nlink, digest


def _state(info: os.stat_result) -> str:
    return f"{info.st_size}:{info.st_mtime_ns}:{info.st_ino}:{info.st_dev}"


def _unchanged(known: _Entry, info: os.stat_result) -> bool:
    state, changed, links, _ = known
    return state == _state(info) and (changed == info.st_ctime_ns or links != 1 or info.st_nlink != 1)
