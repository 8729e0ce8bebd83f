"""The journal of predictions: what a model once answered is never computed again, and never mistaken for another's.

An append-only JSONL file per writer in one folder. Every line carries its own checksum and the key of one answer. The
key is a digest of everything that can change the answer (`Identity`, the files of pictures and films, the prompt) and
of nothing else: paths, batch sizes and ranks are recorded beside the answer for the curious. A kill loses at most the
batch in flight. Several writers (tasks, ranks, machines) share a folder without talking to each other: each appends to
its own file and reads all; journals merge by copying files into one folder. A question that was asked again on purpose
has a line of a later turn, which wins; the older lines stay as history.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from molmo_model.artifacts import Manifest, canonical_json, digest_of

LIBRARIES = ("av", "numpy", "opencv-python-headless", "pillow", "tokenizers", "torch", "transformers")
"""Installed packages whose version can change an answer."""
QUANTIZING_LIBRARIES = ("bitsandbytes",)
"""As `LIBRARIES`, where weights have fewer bits."""
MODEL_FILES = ("config.json", "generation_config.json")
PREPROCESSOR_FILE = "molmo_preprocessor.json"
OTHER_FILES = ("params.json", "model.safetensors.index.json", "chat_template.jinja")
"""Files of a checkpoint that no answer depends on; all further files at its top are the tokenizer's. The chat template
is for transformers' programs: our prompts are the preprocessor's."""
CHECKSUM_CHARACTERS = 16
"""Hex characters of SHA-256 before every line: 64 bits tell damage from data."""
FOLDER_CHARACTERS = 20
"""Hex characters of a weights' digest that name the folder of its journals."""
SYNC_SECONDS = 2.0
"""Lines are handed to the system at once, so a kill of the process loses none; they are forced onto the disk this
often, so a power cut loses seconds."""


@dataclass(frozen=True)
class Identity:
    """Everything that can change an answer, besides the question itself. Digests are SHA-256 hex."""

    weights: str
    """Digest over the safetensors files."""
    config: str
    """Digest over the model's and the generation's configuration."""
    preprocessor: str
    """Digest over `molmo_preprocessor.json`."""
    tokenizer: str
    """Digest over the tokenizer's files."""
    code: str
    """Digest of the sources that turn a question into an answer: those of the engine."""
    versions: Mapping[str, str]
    """Installed versions of the libraries that compute."""
    decoding: Mapping[str, Any]
    """Strategy and its settings, such as the most new tokens."""
    precision: str
    engine: str = "generate"
    """What answers, resolved: never `auto`."""

    @cached_property
    def whole(self) -> str:
        """SHA-256 over all fields."""
        return digest_of(asdict(self))

    @property
    def digest(self) -> str:
        """A short name of this identity in the journal's lines."""
        return self.whole[:CHECKSUM_CHARACTERS]

    def key(self, images: Sequence[Any], prompt: Sequence[str]) -> str:
        """The key of one answer.

        Args:
            images: of the original files in order, what tells each from any other: at least the digest of its bytes.
            prompt: the texts, turn by turn, up to where the answer begins.
        """
        return digest_of({"identity": self.whole, "images": list(images), "prompt": list(prompt)})


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def weights_digest(checkpoint: Manifest) -> str:
    """Digest over the safetensors files of a checkpoint; names the folder of its journals."""
    return digest_of(
        {name: entry.sha256 for name, entry in checkpoint.files.items() if "/" not in name and _is_weights(name)}
    )


def identity_of(
    checkpoint: Manifest, code: str, decoding: Mapping[str, Any], precision: str, engine: str = "generate"
) -> Identity:
    """The identity of a checkpoint's answers, from the hashes in its manifest and the installed libraries.

    Args:
        checkpoint: the checkpoint's manifest; its optimizer state, record of the params and chat template do not count.
        code: digest of the sources that answer.
        decoding, precision, engine: as in `Identity`.
    """
    known = {*MODEL_FILES, PREPROCESSOR_FILE, *OTHER_FILES}
    top = {name: entry.sha256 for name, entry in checkpoint.files.items() if "/" not in name}

    def digest(wanted: Callable[[str], bool]) -> str:
        return digest_of({name: sha256 for name, sha256 in top.items() if wanted(name)})

    quantized = decoding.get("quantization", "none") != "none"
    return Identity(
        weights=weights_digest(checkpoint),
        config=digest(lambda name: name in MODEL_FILES),
        preprocessor=digest(lambda name: name == PREPROCESSOR_FILE),
        tokenizer=digest(lambda name: not _is_weights(name) and name not in known),
        code=code,
        versions={name: _version(name) for name in (*LIBRARIES, *(QUANTIZING_LIBRARIES if quantized else ()))},
        decoding=decoding,
        precision=precision,
        engine=engine,
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


@dataclass(frozen=True)
class Entry:
    """One line of a journal that holds an answer."""

    key: str
    answer: dict[str, Any]
    made: dict[str, Any]
    """Circumstances that should not change an answer: engine, batch size, ranks, device, checkpoint, task."""
    turn: int = 0
    """How many times the question had been asked again on purpose."""
    at: int = 0
    """Seconds since the epoch; 0 in lines of before this was kept."""
    identity: str = ""
    """`Identity.digest`; its facts stand on a line of their own."""

    def stands_over(self, other: "Entry | None") -> bool:
        """Whether this one is the answer to use: of the latest turn, there the first that was written."""
        if other is None:
            return True
        mine, its = (self.turn, -self.at), (other.turn, -other.at)
        return mine > its or (mine == its and canonical_json(self.answer) < canonical_json(other.answer))


@dataclass(frozen=True)
class Line:
    """One line of a journal's file: an answer, the facts of an identity, or damage (all None)."""

    number: int
    """From 1."""
    raw: bytes
    """With its newline."""
    entry: Entry | None = None
    facts: tuple[str, dict[str, Any]] | None = None
    """An identity's digest, and what a listing says of it."""

    @property
    def damaged(self) -> bool:
        return self.entry is None and self.facts is None


def read_lines(path: Path, start: int = 0, number: int = 0) -> Iterator[Line]:
    """The complete lines of a journal's file from byte `start` on, which `number` lines precede.

    A last line without its newline is left out: its writer may be in the middle of it.
    """
    with open(path, "rb") as file:
        file.seek(start)
        for raw in file:
            number += 1
            if raw.endswith(b"\n"):
                yield _line(number, raw)


def _line(number: int, raw: bytes) -> Line:
    record = unseal(raw)
    if record is None:
        return Line(number, raw)
    try:
        if "facts" in record:
            return Line(number, raw, facts=(record["identity"], dict(record["facts"])))
        fields = {name: record[name] for name in ("turn", "at", "identity") if name in record}
        return Line(number, raw, Entry(record["key"], record["answer"], record["made"], **fields))
    except (KeyError, TypeError, ValueError):
        return Line(number, raw)


class Journal:
    """Answers by key, on disk; use as a context manager.

    Attributes:
        problems: what was repaired or skipped while reading, one sentence each, naming file and line.
    """

    def __init__(self, folder: str | Path, writer: str, others: bool = True) -> None:
        """Opens the folder's journals for reading and `<writer>.jsonl` for appending.

        Args:
            others: also read what other writers wrote.

        Waits while another process appends to the same file; its answers are then read too.
        """
        self.path = Path(folder) / f"{writer}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.problems: list[str] = []
        self._entries: dict[str, Entry] = {}
        self._read_to: dict[Path, tuple[int, int]] = {}
        self._introduced: set[str] = set()
        self._file = _locked(self.path)
        self._synced = time.monotonic()
        self._others = others
        self._repair()
        self.refresh()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forces what was written onto the disk and lets the next writer in."""
        self.sync()
        os.close(self._file)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> dict[str, Any] | None:
        """The recorded answer, or None."""
        found = self._entries.get(key)
        return None if found is None else found.answer

    def turn(self, key: str) -> int:
        """The turn of the recorded answer; -1 where there is none."""
        found = self._entries.get(key)
        return -1 if found is None else found.turn

    def append(
        self,
        answers: Iterable[tuple[str, Mapping[str, Any]]],
        made: Mapping[str, Any],
        identity: str = "",
        turns: Mapping[str, int] | None = None,
    ) -> None:
        """Records (key, answer) pairs; a kill of the process after the return loses none of them.

        Args:
            answers: plain JSON values by key.
            made: circumstances that should not change an answer (batch size, rank, device), kept for inspection.
            identity: digest of the identity, whose facts `introduce` wrote.
            turns: of keys that are asked again on purpose, how many times they have been now.
        """
        lines, at = b"", int(time.time())
        for key, answer in answers:
            turn = (turns or {}).get(key, 0)
            entry = Entry(key, dict(answer), dict(made), turn, at, identity)
            lines += seal({name: value for name, value in vars(entry).items() if value or name in _ALWAYS})
            if entry.stands_over(self._entries.get(key)):
                self._entries[key] = entry
        self._write(lines)

    def introduce(self, identity: str, facts: Mapping[str, Any]) -> None:
        """Says once per file what an identity stands for, for people who list the journal."""
        if identity not in self._introduced:
            self._introduced.add(identity)
            self._write(seal({"identity": identity, "facts": dict(facts)}))

    def sync(self) -> None:
        """Forces what was written onto the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def refresh(self) -> None:
        """Reads what was added to the folder's files, by whomever."""
        for path in sorted(self.path.parent.glob("*.jsonl")) if self._others else [self.path]:
            start, number = self._read_to.get(path, (0, 0))
            for line in read_lines(path, start, number):
                start, number = start + len(line.raw), line.number
                self._take(path, line)
            self._read_to[path] = start, number

    def _take(self, path: Path, line: Line) -> None:
        if line.entry is not None and line.entry.stands_over(self._entries.get(line.entry.key)):
            self._entries[line.entry.key] = line.entry
        elif line.facts is not None and path == self.path:
            self._introduced.add(line.facts[0])
        elif line.damaged:
            self.problems.append(
                f"{path}:{line.number}: checksum does not match, the line is skipped and computed again"
            )

    def _write(self, lines: bytes) -> None:
        view = memoryview(lines)
        while view:
            view = view[os.write(self._file, view) :]
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def _repair(self) -> None:
        """Cuts a last line without its newline: the batch in flight when the writer was killed."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            line = data.count(b"\n") + 1
            os.truncate(self._file, whole)
            self.problems.append(f"{self.path}:{line}: torn last line of {len(data) - whole} bytes removed")


_ALWAYS = ("key", "answer", "made")


def _locked(path: Path, wait: bool = True) -> int:
    """A file descriptor for appending that nobody else holds. A file that was put in its place while this waited, as
    pruning does, is opened instead.

    Raises:
        BlockingIOError: another process appends to it, and `wait` is False.
    """
    while True:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a journal's file, so that nobody appends to it.

    Raises:
        BlockingIOError: somebody does just now.
    """
    file = _locked(path, wait=False)
    try:
        yield
    finally:
        os.close(file)


def seal(record: Mapping[str, Any]) -> bytes:
    """One line of a journal: checksum, space, canonical JSON, newline."""
    body = canonical_json(record).encode()
    return hashlib.sha256(body).hexdigest()[:CHECKSUM_CHARACTERS].encode() + b" " + body + b"\n"


def unseal(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None when the line is not exactly what `seal` wrote."""
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    if hashlib.sha256(body).hexdigest()[:CHECKSUM_CHARACTERS].encode() != checksum:
        return None
    record: dict[str, Any] = json.loads(body)
    return record
