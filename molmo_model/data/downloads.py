"""What could be had of a dataset of URLs: the survivors' list, and the store of the files that it names.

Web pages rot: of a published list of pictures a fifth may be gone. `python -m pipelines.download` asks every URL once
(`fetching.py`) and writes a list with one row per URL, the failures included. That list is versioned with the
experiment; shards are made of it and of nothing else, so numbers that depend on which pictures were still there depend
on a file that everybody can look at. This room only reads: no network is touched here.

The store holds each content once, under its SHA-256, whichever URL or dataset it came from:
`$MOLMO_DOWNLOAD_DIR/<first two digits>/<sha256>`, by default below `.state/downloads` (`$MOLMO_STATE_DIR/downloads`).
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from molmo_model.errors import DataError, StorageError
from molmo_model.storage import is_remote, open_file

VERSION = 1
"""Of the list's schema, in its metadata under `VERSION_KEY`."""
VERSION_KEY = b"molmo/downloads"


class Status(StrEnum):
    """What became of a URL: `ok`, or the kind of failure."""

    OK = "ok"
    BAD_URL = "bad_url"
    """No http or https URL, or one with a user's name or password in it."""
    BLOCKED = "blocked"
    """It, its name's address or a redirect leads to an address that is not public."""
    DNS = "dns"
    """The host has no address."""
    CONNECTION = "connection"
    """No connection, or it broke before the answer."""
    TLS = "tls"
    """The host's certificate or encryption is not valid."""
    TIMEOUT = "timeout"
    GONE = "gone"
    """The server says that it is not there (404, 410)."""
    FORBIDDEN = "forbidden"
    """The server will not give it to us (401, 403, 451)."""
    RATE_LIMITED = "rate_limited"
    """The server asks to come later (429) than we wait."""
    SERVER_ERROR = "server_error"
    """5xx, however often it was asked."""
    HTTP = "http"
    """Another answer than 200; `http_status` says which."""
    REDIRECT = "redirect"
    """Redirects in a circle, too many, or to no URL."""
    INCOMPLETE = "incomplete"
    """The body ended early."""
    TOO_LARGE = "too_large"
    """More bytes than allowed."""
    TOO_MANY_PIXELS = "too_many_pixels"
    UNREADABLE = "unreadable"
    """No image or film that the project reads: a page in place of a picture, an animation, an empty or broken file."""
    CHANGED = "changed"
    """Its SHA-256 is not the expected one."""
    PROTOCOL = "protocol"
    """An answer that is no valid HTTP."""


@dataclass(frozen=True, slots=True)
class Download:
    """One row of the list. Failures have no content: hash and format are empty, sizes 0."""

    url: str
    status: Status
    reason: str = ""
    """Why it failed, in words."""
    http_status: int = 0
    """Of the last answer; 0 where there was none."""
    sha256: str = ""
    bytes: int = 0
    format: str = ""
    """By content, such as JPEG or MP4."""
    width: int = 0
    """Pixels as the file's header says; a picture may be shown turned."""
    height: int = 0

    @property
    def ok(self) -> bool:
        return self.status is Status.OK


COLUMNS = tuple(field.name for field in dataclasses.fields(Download))


def is_url(item: Any) -> bool:
    """Whether an entry of a row is the URL of a file on the web, as a list can hold it."""
    if not isinstance(item, str) or not item.lower().startswith(("http://", "https://")):
        return False
    return item.encode("utf-8", "replace").decode() == item  # half a surrogate pair is no text


class MissingDownload(DataError):
    """The list says that this URL could not be had. A known gap: whoever reads rows lists it and goes on."""

    def __init__(self, url: str, row: Download) -> None:
        self.reason = f"{row.status.value}: {row.reason}"
        super().__init__(f"{url!r} could not be downloaded: {self.reason}")


class Store:
    """Files by their SHA-256 in a local folder."""

    def __init__(self, folder: Path | None = None) -> None:
        state = os.environ.get("MOLMO_STATE_DIR", ".state")
        self.folder = folder or Path(os.environ.get("MOLMO_DOWNLOAD_DIR") or Path(state) / "downloads")

    def path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def holds(self, row: Download) -> bool:
        """Whether the content of a row is there, by its size; `Survivors.get` checks the hash."""
        try:
            return self.path(row.sha256).stat().st_size == row.bytes
        except OSError:
            return False

    def adopt(self, part: Path, sha256: str) -> None:
        """Moves a finished file to its place."""
        path = self.path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, path)


class Survivors:
    """The list of a dataset and the files of those URLs that survived."""

    def __init__(self, path: str | Path, store: Store | None = None) -> None:
        """Opens nothing yet: all of the following raise `DataError` where there is no list or a broken one, and
        `StorageError` where it cannot be opened."""
        self.path, self.store = str(path), store or Store()

    @cached_property
    def _rows(self) -> dict[str, Download]:
        return {row.url: row for row in read_list(self.path)}

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, url: str) -> Download:
        """What became of a URL.

        Raises:
            DataError: the list does not have it.
        """
        if url not in self._rows:
            raise DataError(
                f"{self.path}: has no {url!r} among its {len(self)} URLs; the list is older than the data: run "
                "`python -m pipelines.download dataset=NAME` again"
            )
        return self._rows[url]

    def get(self, url: str) -> bytes:
        """The file of a URL, its hash compared with the list's.

        Raises:
            MissingDownload: the list says that it could not be had.
            DataError: the list does not have the URL, or the store lacks its content or holds another.
        """
        row = self.row(url)
        if not row.ok:
            raise MissingDownload(url, row)
        path = self.store.path(row.sha256)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{url!r}: its content {row.sha256} is not in {self.store.folder} ({error.strerror}); fetch it with "
                "`python -m pipelines.download dataset=NAME from_list=true`, or set MOLMO_DOWNLOAD_DIR"
            ) from error
        found = hashlib.sha256(data).hexdigest()
        if found != row.sha256:
            raise DataError(
                f"{url!r}: {path} has sha256 {found}, the list {self.path} says {row.sha256}; delete that file and run "
                "`python -m pipelines.download dataset=NAME from_list=true`"
            )
        return data

    def sha256(self, url: str) -> str:
        """SHA-256 of a URL's file by the list; empty where it has none."""
        return self._rows[url].sha256 if url in self._rows else ""

    def digest(self) -> str:
        """SHA-256 of the list's file, for the identity of what is made with it; cheap next to reading it."""
        _check_there(self.path)
        digest = hashlib.sha256()
        with open_file(self.path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        return digest.hexdigest()


def read_list(path: str | Path) -> list[Download]:
    """The rows of a list, in its order.

    Raises:
        DataError: it is not there, no such list, of another version, or breaks the contract `downloads`.
        StorageError: it cannot be opened.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from molmo_model.data.schemas import check_table

    _check_there(path)
    try:
        with open_file(path, "rb") as file:
            table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    version = (table.schema.metadata or {}).get(VERSION_KEY)
    if version != str(VERSION).encode():
        found = "none" if version is None else repr(version.decode("utf-8", "replace"))
        raise DataError(
            f"{path}: the version of a list of downloads is {found}, this program reads '{VERSION}'; "
            "`python -m pipelines.download dataset=NAME` writes one"
        )
    check_table(table, "downloads", str(path))
    return [from_fields(fields) for batch in table.to_batches() for fields in batch.to_pylist()]


def _check_there(path: str | Path) -> None:
    if not is_remote(path) and not Path(path).exists():
        raise DataError(f"there is no list of downloads {path}; `python -m pipelines.download dataset=NAME` writes it")


def write_list(path: Path, rows: Iterable[Download]) -> None:
    """Writes a list atomically; the same rows give the same bytes.

    Raises:
        DataError: a URL stands twice.
        StorageError: it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from molmo_model.data.schemas import check_table

    types = {str: pa.string(), Status: pa.string(), int: pa.int64()}
    fields = [pa.field(field.name, types[field.type], nullable=False) for field in dataclasses.fields(Download)]  # type: ignore[index]
    schema = pa.schema(fields, metadata={VERSION_KEY: str(VERSION)})
    rows = list(rows)
    table = pa.table({name: [getattr(row, name) for row in rows] for name in COLUMNS}, schema=schema)
    check_table(table, "downloads", str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            try:
                pq.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        path.chmod(0o644)  # a temporary file is its owner's alone
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; check the folder and the disk") from error


def to_line(row: Download) -> bytes:
    """A row as one line of JSON; equal rows give equal bytes."""
    return json.dumps({name: getattr(row, name) for name in COLUMNS}, sort_keys=True).encode() + b"\n"


def from_fields(fields: dict[str, Any]) -> Download:
    """The row of a mapping of all its columns.

    Raises:
        TypeError, ValueError: it is none.
    """
    return Download(**{**fields, "status": Status(fields["status"])})
