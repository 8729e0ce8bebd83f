"""One run of `python -m pipelines.download`: from what is known already to a row for every URL.

A run may be killed at any moment. What it has settled is in a journal beside the store, so the same command goes on and
asks only for the rest. What the versioned list says is settled too, its failures included, until somebody asks for them
again; so who has the list of a colleague and no file asks for the files of that list, with its hashes.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from molmo_model.data.downloads import Download, Store, from_fields, to_line
from molmo_model.data.fetching import Limits, download
from molmo_model.errors import DataError, StorageError


class Retry(StrEnum):
    """Which settled URLs are asked again."""

    NONE = "none"
    FAILED = "failed"
    ALL = "all"


@dataclass(frozen=True)
class Run:
    """What a run goes from."""

    name: str
    """Of the journal: the dataset's, which no other run may have at the same time."""
    store: Store
    listed: Mapping[str, Download]
    """The rows of the list that is there, by URL."""
    list_sha256: str
    """Of that list's file; empty where there is none."""
    retry: Retry = Retry.NONE

    @property
    def journal(self) -> "Journal":
        return Journal(self.store.folder / "journal" / f"{self.name}.jsonl")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One run of this name at a time in one store; a kill frees the lock.

        Raises:
            DataError: another process has it.
        """
        path = self.journal.path.with_suffix(".lock")
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")  # noqa: SIM115  closed below
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"{self.name} is being downloaded into {self.store.folder} by another process"
                ) from error
            yield

    def settle(
        self, wanted: Mapping[str, str | None], limits: Limits, bar: Callable[[int], Any], *, loopback: bool = False
    ) -> dict[str, Download]:
        """The row of every wanted URL, in order, after those that are not settled were asked for.

        Args:
            wanted: URLs with the SHA-256 that their content must have, where it is known.
            limits: of the download.
            bar: told how many URLs are to be asked for, then 0 whenever one is settled.
            loopback: for tests, see `fetching.download`.

        Raises:
            StorageError: store or journal cannot be written.
            KeyboardInterrupt: all that was settled is in the journal.
        """
        known = self._known()
        found = {url: row for url, row in known.items() if url in wanted and self._stands(row, wanted[url])}
        asked = [(url, sha256 or self._pin(url)) for url, sha256 in wanted.items() if url not in found]
        bar(len(asked))
        with self.journal.appending() as add:

            def settled(row: Download) -> None:
                add(row)
                found[row.url] = row
                bar(0)

            scratch = self.store.folder / "incoming" / self.name
            download(asked, self.store, scratch, settled, limits, loopback=loopback)
        rows = {url: found[url] for url in wanted}
        self.journal.start(self._head | {"done": True}, rows.values())  # asks nothing again until the list is written
        return rows

    @property
    def _head(self) -> dict[str, Any]:
        """First line of the journal of exactly this run, while it is not done."""
        return {"list": self.list_sha256, "retry": self.retry.value, "done": False}

    def _known(self) -> dict[str, Download]:
        """What is settled already, by URL: in the journal of an unfinished run, or in the list.

        The journal goes before the list that it started from. Where the list is another by now, pulled from a
        colleague, the list goes before.
        """
        old, rows = self.journal.read()
        if old != self._head:
            if old is None or self.retry is Retry.ALL:
                rows = {}
            if old is not None and old.get("list") != self.list_sha256:
                rows = {url: row for url, row in rows.items() if url not in self.listed}
            if self.retry is Retry.FAILED:
                rows = {url: row for url, row in rows.items() if row.ok}
            self.journal.start(self._head, rows.values())
        if self.retry is Retry.ALL:
            return rows
        return {url: row for url, row in self.listed.items() if row.ok or self.retry is Retry.NONE} | rows

    def _stands(self, row: Download, expected: str | None) -> bool:
        """Whether a settled row still holds: a failure does, a file only if it is in the store and the one expected."""
        return not row.ok or (expected in (None, row.sha256) and self.store.holds(row))

    def _pin(self, url: str) -> str | None:
        """The content that the list has of a URL, unless everything is to be asked anew."""
        row = None if self.retry is Retry.ALL else self.listed.get(url)
        return row.sha256 if row is not None and row.ok else None


class Journal:
    """What a run has settled so far: one JSON line per URL behind a first line that says what the run goes from.

    Append-only, so that a kill at any moment loses at most the last line, which is cut off when it is torn.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[dict[str, Any] | None, dict[str, Download]]:
        """The first line and the settled rows by URL; None and nothing where there is no journal.

        Raises:
            DataError: a line other than the last is broken.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None, {}
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        head: dict[str, Any] | None = None
        rows: dict[str, Download] = {}
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                fields = json.loads(line)
                if number == 1:
                    head = dict(fields)
                else:
                    rows[fields["url"]] = from_fields(fields)
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{self.path}:{number} is no line of a journal of downloads: {error}; delete the file to begin anew"
                ) from error
        return head, rows

    def start(self, head: dict[str, Any], rows: Iterable[Download]) -> None:
        """Replaces the journal by one with these rows, atomically."""
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            with open(new, "wb") as file:
                file.write(json.dumps(head, sort_keys=True).encode() + b"\n")
                file.writelines(to_line(row) for row in rows)
            os.replace(new, self.path)

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[Download], None]]:
        """A function that adds one row, written when it returns: a kill of the process does not lose it."""
        with _writing(self.path):
            file = open(self.path, "ab")  # noqa: SIM115  closed below
        with file:

            def add(row: Download) -> None:
                with _writing(self.path):
                    file.write(to_line(row))
                    file.flush()

            yield add

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; check the disk, then run it again") from error
