"""One way to open, list and copy files, whatever holds them: a folder, S3, Google Cloud, Weka, the Hugging Face hub.

A place is a path or a URL of a scheme in `SCHEMES`; everything below goes over fsspec. Credentials come from where each
service keeps them (`~/.aws`, `AWS_*`, application default credentials, `HF_TOKEN`, `WEKA_*`), never from a URL.

    open_file("s3://bucket/data.jsonl", "rb")      copy_tree("artifacts/report", "gs://bucket/report")
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
import fsspec.asyn

from molmo_model.artifacts import MANIFEST
from molmo_model.errors import StorageError

# gcsfs otherwise asks each new bucket over gRPC whether it is hierarchical, up to a minute where that is blocked
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

CHUNK = 8 * 2**20
"""Bytes read at once."""
TRIES = 4
"""Attempts at one transfer; the pause before the next one doubles from `PAUSE`."""
PAUSE = 0.5
"""Seconds before the second attempt."""
PATIENCE = 60.0
"""Seconds that one attempt at a range may take."""

_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    StorageError,
)
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables whose values never appear in an error."""
_CREDENTIAL = re.compile(
    r"(?i)\b((?:x-amz-|x-goog-)?(?:signature|credential|security-token|token|secret|key|password)=)[^&\s'\"]+"
)


@dataclass(frozen=True)
class Scheme:
    """One kind of place: how to make its file system, and what to check when it fails."""

    make: Callable[[], Any]
    """Makes the fsspec file system; imports its library inside."""
    remedy: str
    """What a person checks when a call fails."""


@dataclass(frozen=True)
class Copied:
    """What `copy_tree` did: files sent and their bytes, and files that were already there."""

    files: int
    bytes: int
    unchanged: int


_inherited: list[list[Any]] = []
"""In a forked process: what its parent had open. See `_hold`."""


def _hold() -> None:
    """Keeps what fsspec has open alive in a process about to be forked.

    A child has the parent's connections and, worse, shares its epoll object. fsspec forgets all of it there, and the
    connections' finalizers would then take the parent's sockets out of that epoll: the parent would wait for ever for
    answers that arrive. Held, they are never finalized in the child.
    """
    classes, held = [fsspec.AbstractFileSystem], [fsspec.asyn.loop[0], fsspec.asyn.iothread[0]]
    for one in classes:
        classes += [other for other in one.__subclasses__() if other not in classes]
        held += getattr(one, "_cache", {}).values()
    _inherited.append(held)


os.register_at_fork(before=_hold, after_in_parent=_inherited.pop)


def _fsspec(protocol: str) -> Callable[[], Any]:
    return lambda: fsspec.filesystem(protocol)


def _weka() -> Any:
    from molmo_model.weka import WekaFileSystem

    fsspec.register_implementation("weka", WekaFileSystem, clobber=True)
    return WekaFileSystem()


SCHEMES: dict[str, Scheme] = {
    "file": Scheme(_fsspec("file"), "check the path and its permissions"),
    "memory": Scheme(_fsspec("memory"), "a memory:// place lives only as long as its process"),
    "s3": Scheme(
        _fsspec("s3"), "check the bucket, AWS_PROFILE or AWS_ACCESS_KEY_ID, and AWS_ENDPOINT_URL if not Amazon"
    ),
    "gs": Scheme(_fsspec("gs"), "check the bucket and `gcloud auth application-default login`"),
    "weka": Scheme(_weka, "check the bucket, WEKA_ENDPOINT_URL and WEKA_PROFILE (a profile of ~/.aws/credentials)"),
    "hf": Scheme(
        _fsspec("hf"), "check hf://<owner>/<model> or hf://datasets/<owner>/<name>, and HF_TOKEN if it is private"
    ),
}
"""Scheme of a URL -> its file system. A new scheme is one entry here."""


def scheme_of(url: str | os.PathLike[str]) -> str:
    """The scheme of a URL; `file` for a plain path.

    Raises:
        StorageError: the scheme is unknown, or the URL carries credentials.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return "file"
    if "@" in rest.split("/", 1)[0]:
        raise StorageError(f"{redact(text)} carries credentials; put them into the service's own configuration instead")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StorageError(f"{redact(text)}: unknown scheme {scheme}://; known: {known}, or a plain path")
    return scheme


def is_remote(url: str | os.PathLike[str]) -> bool:
    """Whether the place is not a file or folder of this machine."""
    return scheme_of(url) != "file"


def filesystem(url: str | os.PathLike[str]) -> Any:
    """The fsspec file system that serves a URL."""
    scheme = scheme_of(url)
    with _explained(url):
        return SCHEMES[scheme].make()


def open_file(url: str | os.PathLike[str], mode: str = "rb") -> IO[Any]:
    """Opens a file. Text is UTF-8. Writing to a local place makes its folder.

    Raises:
        StorageError: naming the URL and what to check.
    """
    fs, path = _resolve(url)
    text = {} if "b" in mode else {"encoding": "utf-8"}
    with _explained(url):
        if not is_remote(url) and mode[0] in "wax":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        file: IO[Any] = fs.open(path, mode, **text)
        return file


def exists(url: str | os.PathLike[str]) -> bool:
    """Whether a file or a folder is there."""
    fs, path = _resolve(url)
    with _explained(url):
        return bool(_retry(lambda: fs.exists(path)))


def list_files(url: str | os.PathLike[str]) -> list[str]:
    """Names of all files below a folder or prefix, relative to it, sorted; the file's own name if it is one file.

    Raises:
        StorageError: nothing is there, or a name leads out of the folder.
    """
    return sorted(_sizes(url))


def read_range(url: str | os.PathLike[str], start: int = 0, stop: int | None = None) -> bytes:
    """Bytes `start` to `stop` of a file (None: to its end), tried again after errors that may pass; an answer that is
    cut short or takes longer than `PATIENCE` is one.

    Safe under threads and fork.

    Raises:
        StorageError: naming the URL and what to check.
    """
    fs, path = _resolve(url)

    def read() -> bytes:
        if fs.async_impl:
            part = {"start": start, "end": stop} if start or stop is not None else {}
            data: bytes = fsspec.asyn.sync(fs.loop, fs._cat_file, path, timeout=PATIENCE, **part)
        else:  # without a read-ahead of megabytes behind the range
            data = fs.cat_file(path, start=start, end=stop, cache_type="none")
        if stop is not None and len(data) != stop - start:
            raise OSError(f"{len(data)} bytes arrived from {start} on, {stop - start} were asked for")
        return data

    with _explained(url):
        return bytes(_retry(read))


def file_size(url: str | os.PathLike[str]) -> int | None:
    """Bytes of a file as its place says now; None if it is not there.

    Raises:
        StorageError: naming the URL and what to check.
    """
    fs, path = _resolve(url)

    def ask() -> int | None:
        fs.invalidate_cache()
        try:
            return int(fs.info(path)["size"])
        except FileNotFoundError:
            return None

    with _explained(url):
        size: int | None = _retry(ask)
        return size


def join(url: str | os.PathLike[str], name: str) -> str:
    """The URL of `name` below `url`."""
    return f"{os.fspath(url).rstrip('/')}/{name}"


def copy_tree(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Copied:
    """Copies every file below `source` to the same name below `target` and reads it back: size and SHA-256 must agree.

    A file that is already there with equal content is left alone, so a broken copy goes on where it was. Passing errors
    are tried again. `manifest.json` goes last, so that half an artefact never looks finished. What `target` holds
    besides stays.

    Raises:
        StorageError: `source` is empty or missing, a transfer failed, or the copy differs, with both numbers.
    """
    fs, root = _resolve(source)
    sizes = _sizes(source)
    with _explained(source):
        single = bool(_retry(lambda: fs.isfile(root)))
    copied = total = 0
    for name in sorted(sizes, key=lambda name: (PurePosixPath(name).name == MANIFEST, name)):
        size = sizes[name]
        if _copy_file(os.fspath(source) if single else join(source, name), join(target, name), size):
            copied, total = copied + 1, total + size
    return Copied(copied, total, len(sizes) - copied)


def redact(text: str) -> str:
    """The text without credentials: none of URLs, of signed queries, of headers or of the environment."""
    text = re.sub(r"(\w+://)[^/\s@]+@", r"\1***@", text)
    text = _CREDENTIAL.sub(r"\1***", text)
    text = re.sub(r"(?i)\b(bearer|basic) [\w.~+/=-]+", r"\1 ***", text)
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return text


def _resolve(url: str | os.PathLike[str]) -> tuple[Any, str]:
    fs = filesystem(url)
    return fs, fs._strip_protocol(os.fspath(url))


def _sizes(url: str | os.PathLike[str]) -> dict[str, int]:
    """Size in bytes of every file below a place, by relative name."""
    fs, root = _resolve(url)
    with _explained(url):
        fs.invalidate_cache()
        found: dict[str, Any] = _retry(lambda: fs.find(root, detail=True))
    sizes = {}
    for path, info in found.items():
        name = PurePosixPath(path).name if path == root else path[len(root) :].lstrip("/")
        if not name:
            continue  # the marker object of an empty folder
        if ".." in PurePosixPath(name).parts:
            raise StorageError(f"{redact(os.fspath(url))}: the name {name!r} leads out of its folder; it is not copied")
        sizes[name] = int(info["size"])
    if not sizes:
        remedy = SCHEMES[scheme_of(url)].remedy
        raise StorageError(f"{redact(os.fspath(url))}: no file is there; {remedy}")
    return sizes


def _copy_file(source: str, target: str, size: int) -> bool:
    """Copies and checks one file; False when an equal one was there."""
    with contextlib.ExitStack() as stack:
        local = Path(_resolve(source)[1])
        if is_remote(source):  # through a local file: an upload that breaks off must not become an object
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="molmo-copy-"))
            local = Path(folder) / "file"
            _transfer(source, lambda fs, path: fs.get_file(path, str(local)))
        if local.stat().st_size != size:
            raise StorageError(
                f"{redact(source)}: {local.stat().st_size} bytes arrived where {size} are listed; copy again"
            )
        digest = _sha256(str(local))
        if exists(target) and _size(target) == size and _sha256(target) == digest:
            return False
        if is_remote(target):
            _transfer(target, lambda fs, path: fs.put_file(str(local), path))
        else:
            with _explained(target):
                _place(local, Path(_resolve(target)[1]))
        if _size(target) != size:
            raise StorageError(
                f"{redact(target)} has {_size(target)} bytes after the copy, its source {size}; copy again"
            )
        if (copy := _sha256(target)) != digest:
            raise StorageError(f"{redact(target)} has SHA-256 {copy} after the copy, its source {digest}; copy again")
    return True


def _place(local: Path, target: Path) -> None:
    """Copies beside the target and renames, so that nobody reads a half file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        shutil.copyfile(local, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _transfer(url: str, work: Callable[[Any, str], Any]) -> None:
    fs, path = _resolve(url)
    with _explained(url):
        _retry(lambda: work(fs, path))


def _size(url: str) -> int:
    size = file_size(url)
    if size is None:
        raise StorageError(f"{redact(url)} is gone; something else deletes files there")
    return size


def _sha256(url: str) -> str:
    fs, path = _resolve(url)

    def digest() -> str:
        value = hashlib.sha256()
        with fs.open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                value.update(chunk)
        return value.hexdigest()

    with _explained(url):
        return str(_retry(digest))


def _retry(work: Callable[[], Any]) -> Any:
    """The result of `work`, tried again after errors that may pass."""
    for attempt in range(TRIES):
        try:
            return work()
        except _PERMANENT:
            raise
        except Exception:  # each library has its own passing errors; the last one is raised
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE * 2**attempt)
    raise StorageError("no attempt was made")


@contextlib.contextmanager
def _explained(url: str | os.PathLike[str]) -> Iterator[None]:
    """Turns any failure into a `StorageError` with the URL, the reason and the remedy, without secrets."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        reason = redact(f"{type(error).__name__}: {error}")
        message = f"{redact(os.fspath(url))}: {reason}; {SCHEMES[scheme_of(url)].remedy}"
        raised = StorageError(message)
        if reason != f"{type(error).__name__}: {error}":
            raise raised from None  # the cause would print what was just taken out
        raise raised from error
