"""Journals that a team shares through a bucket, or any place of `molmo_model.storage`.

    <place>/<weights>/<machine>-<writer>-<SHA-256 of the content>.jsonl

Every object is a piece of one writer's journal, whole lines, and is never written twice: its name holds the digest of
its content, so two machines cannot overwrite each other and a damaged transfer is noticed. What was fetched lies beside
the own files and is read like them. Nothing is lost where the place fails: lines stay in the local journal, the failure
is told, and the next run or `python -m pipelines.journal push` publishes them.
"""

import contextlib
import hashlib
import json
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_model.artifacts import write_text_atomic
from molmo_model.errors import MolmoError, StorageError
from molmo_model.eval.journal import Journal, read_lines
from molmo_model.storage import copy_tree, exists, join, list_files, read_range, redact

PUBLISH_SECONDS = 30.0
"""Between two pieces of what is being answered."""
LAST_SECONDS = 60.0
"""What the last piece may take before it is left to the next run."""
REQUESTS = 8
"""Pieces that are fetched at the same time."""
PIECE_BYTES = 32 * 2**20
"""Most bytes of a piece, unless one line has more."""
FETCHED = "fetched."
"""What names of files begin with that came from the shared place."""
PUBLISHED = "published.json"
"""In a folder of journals: by place, how many bytes of each own file are published, and as which pieces."""
MACHINE = "machine"
"""Beside the folders of journals: a random name of this machine's journals, for people who look into the bucket."""
_DIGEST = re.compile(r"-([0-9a-f]{64})\.jsonl$")

Say = Callable[[str], object]


def fetch(place: str, folder: Path) -> int:
    """Brings the pieces of one folder of journals that are not here yet; returns how many.

    Args:
        folder: of the local journal, named by the weights.

    Raises:
        StorageError: the place cannot be reached, or a piece is not what its name says; all others are kept.
    """
    source = join(place, folder.name)
    try:
        names = list_files(source)
    except StorageError:
        if exists(source):
            raise
        return 0  # nobody has published anything
    known = {*_sent(place, folder).pieces, *(path.name.removeprefix(FETCHED) for path in folder.glob(FETCHED + "*"))}
    new = [name for name in names if _DIGEST.search(name) and "/" not in name and name not in known]
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = [pool.submit(_fetch_one, source, name, folder) for name in new]
    for failure in filter(None, (one.exception() for one in asked)):
        raise failure
    return len(new)


def push(place: str, folder: Path, files: list[Path] | None = None) -> int:
    """Publishes what is new in own files of one folder of journals; returns how many pieces that took.

    Args:
        files: the own files to look at; None looks at all.

    Raises:
        StorageError: the place cannot be written.
    """
    pieces = 0
    for path in sorted(folder.glob("*.jsonl")) if files is None else files:
        if path.name.startswith(FETCHED) or not path.exists():
            continue
        while read := _next(path, _sent(place, folder).bytes.get(path.name, 0)):
            size, piece = read
            name = f"{_machine(folder)}-{path.stem}-{hashlib.sha256(piece).hexdigest()}.jsonl"
            if piece:
                with tempfile.TemporaryDirectory(prefix="molmo-journal-") as outgoing:
                    (Path(outgoing) / name).write_bytes(piece)
                    copy_tree(Path(outgoing) / name, join(place, folder.name))
                pieces += 1
            _note(place, folder, path.name, size, name)
    return pieces


def published_folders(place: str) -> list[str]:
    """Names of the folders of journals at a place.

    Raises:
        StorageError: the place cannot be reached, or nothing is there.
    """
    return sorted({name.split("/")[0] for name in list_files(place) if name.count("/") == 1 and _DIGEST.search(name)})


def rewritten(folder: Path, name: str, before: int, after: int) -> None:
    """A file of `before` bytes was rewritten with `after`: what of it was published is no longer its beginning. Where
    all was, nothing of it is published again."""
    with _LOCK:
        document = _read_sent(folder)
        for sent in document.values():
            if name in sent["bytes"]:
                sent["bytes"][name] = after if sent["bytes"][name] == before else 0
        if document:
            write_text_atomic(folder / PUBLISHED, json.dumps(document))


@contextlib.contextmanager
def publishing(place: str, journal: Journal, say: Say) -> Iterator[Callable[[], None]]:
    """Gives a function that brings what others have answered; what is answered within the block is published, all the
    while and at its end. Failures are told and never raised.

    Args:
        journal: of the folder; its own file and those of its ranks are published.
        say: is told, in sentences.
    """
    folder, stop, told = journal.path.parent, threading.Event(), set[str]()

    def tell(error: BaseException, what: str) -> None:
        if what not in told:
            told.add(what)
            reason = str(error) if isinstance(error, MolmoError) else redact(f"{type(error).__name__}: {error}")
            say(f"{what}: {reason}")

    def bring() -> None:
        try:
            if count := fetch(place, folder):
                say(f"{count} pieces of journals fetched from {redact(place)}")
        except Exception as error:  # a shared place may fail in any way, and the own journal does not depend on it
            tell(error, "not all that others answered could be fetched; going on with what is here")
        journal.refresh()

    def own() -> list[Path]:
        return [journal.path, *sorted(folder.glob(f"{journal.path.stem}.rank-*.jsonl"))]

    def send() -> None:
        try:
            push(place, folder, own())
        except Exception as error:
            tell(error, f"answers are kept in {folder} and not yet shared (`python -m pipelines.journal push` does it)")

    def publish() -> None:
        while not stop.wait(PUBLISH_SECONDS):
            send()
        send()

    worker = threading.Thread(target=publish, name="publish journal", daemon=True)
    worker.start()
    try:
        yield bring
    finally:
        stop.set()
        worker.join(LAST_SECONDS)
        if worker.is_alive():
            tell(TimeoutError(f"{redact(place)} takes longer than {LAST_SECONDS:g} s"), "answers are not yet shared")


@dataclass(frozen=True)
class _Sent:
    """What of a folder is published at a place."""

    bytes: dict[str, int]
    """Of each own file."""
    pieces: list[str]


_LOCK = threading.Lock()


def _sent(place: str, folder: Path) -> _Sent:
    return _Sent(**_read_sent(folder).get(place.rstrip("/"), {"bytes": {}, "pieces": []}))


def _note(place: str, folder: Path, name: str, size: int, piece: str) -> None:
    with _LOCK:
        document = _read_sent(folder)
        sent = document.setdefault(place.rstrip("/"), {"bytes": {}, "pieces": []})
        sent["bytes"][name] = sent["bytes"].get(name, 0) + size
        sent["pieces"].append(piece)
        write_text_atomic(folder / PUBLISHED, json.dumps(document))


def _read_sent(folder: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads((folder / PUBLISHED).read_text(encoding="utf-8"))
        return document
    except (OSError, ValueError):
        return {}  # published once more, which harms nobody


def _next(path: Path, start: int) -> tuple[int, bytes] | None:
    """How many bytes of a file from `start` on are whole lines, at most about `PIECE_BYTES`, and those of them that are
    not damaged; None at its end."""
    size, lines = 0, []
    for line in read_lines(path, start):
        size += len(line.raw)
        if not line.damaged:
            lines.append(line.raw)
        if size >= PIECE_BYTES:
            break
    return (size, b"".join(lines)) if size else None


def _fetch_one(source: str, name: str, folder: Path) -> None:
    data, match = read_range(join(source, name)), _DIGEST.search(name)
    digest = hashlib.sha256(data).hexdigest()
    if match is None or match[1] != digest:
        raise StorageError(f"{redact(join(source, name))} has SHA-256 {digest}, not that of its name; delete it")
    write_text_atomic(folder / (FETCHED + name), data.decode("utf-8"))


def _machine(folder: Path) -> str:
    """The random name of this machine's journals."""
    path = folder.parent / MACHINE
    with contextlib.suppress(OSError):
        if re.fullmatch(r"[0-9a-f]{12}", text := path.read_text(encoding="utf-8").strip()):
            return text
    write_text_atomic(path, secrets.token_hex(6) + "\n")
    return path.read_text(encoding="utf-8").strip()
