"""The journal of predictions: what a model once answered is never computed again, and never mistaken for another's.

An append-only JSONL file per writer in one folder. Every line carries its own checksum and the key of one answer. The
key is a digest of everything that can change the answer (`Identity` plus images and prompt) and of nothing else: paths,
batch sizes and ranks are recorded beside the answer for the curious. A kill loses at most the batch in flight. Several
writers (tasks, ranks, machines) share a folder without talking to each other: each appends to its own file and reads
all; journals merge by copying files into one folder.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from molmo_model.artifacts import Manifest, canonical_json, digest_of

LIBRARIES = ("av", "numpy", "opencv-python-headless", "pillow", "tokenizers", "torch", "transformers")
"""Installed packages whose version can change an answer."""
MODEL_FILES = ("config.json", "generation_config.json")
PREPROCESSOR_FILE = "molmo_preprocessor.json"
OTHER_FILES = ("params.json", "model.safetensors.index.json", "chat_template.jinja")
"""Files of a checkpoint that no answer depends on; all further files at its top are the tokenizer's. The chat template
is for transformers' programs: our prompts are the preprocessor's."""
CHECKSUM_CHARACTERS = 16
"""Hex characters of SHA-256 before every line: 64 bits tell damage from data."""


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
    """Digest of the sources that turn a question into an answer."""
    versions: Mapping[str, str]
    """Installed versions of the libraries that compute."""
    decoding: Mapping[str, Any]
    """Strategy and its settings, such as the most new tokens."""
    precision: str

    def key(self, images: Sequence[str], prompt: Sequence[str]) -> str:
        """The key of one answer.

        Args:
            images: digests of the original image bytes, in order.
            prompt: the texts, turn by turn, up to where the answer begins.
        """
        return digest_of({**asdict(self), "images": list(images), "prompt": list(prompt)})


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def weights_digest(checkpoint: Manifest) -> str:
    """Digest over the safetensors files of a checkpoint; names the folder of its journals."""
    return digest_of(
        {name: entry.sha256 for name, entry in checkpoint.files.items() if "/" not in name and _is_weights(name)}
    )


def identity_of(checkpoint: Manifest, code: str, decoding: Mapping[str, Any], precision: str) -> Identity:
    """The identity of a checkpoint's answers, from the hashes in its manifest and the installed libraries.

    Args:
        checkpoint: the checkpoint's manifest; its optimizer state, record of the params and chat template do not count.
        code: digest of the sources that answer.
        decoding, precision: as in `Identity`.
    """
    known = {*MODEL_FILES, PREPROCESSOR_FILE, *OTHER_FILES}
    top = {name: entry.sha256 for name, entry in checkpoint.files.items() if "/" not in name}

    def digest(wanted: Callable[[str], bool]) -> str:
        return digest_of({name: sha256 for name, sha256 in top.items() if wanted(name)})

    return Identity(
        weights=weights_digest(checkpoint),
        config=digest(lambda name: name in MODEL_FILES),
        preprocessor=digest(lambda name: name == PREPROCESSOR_FILE),
        tokenizer=digest(lambda name: not _is_weights(name) and name not in known),
        code=code,
        versions={name: version(name) for name in LIBRARIES},
        decoding=decoding,
        precision=precision,
    )


class Journal:
    """Answers by key, on disk; use as a context manager.

    Attributes:
        problems: what was repaired or skipped while reading, one sentence each, naming file and line.
    """

    def __init__(self, folder: str | Path, writer: str) -> None:
        """Opens the folder's journals for reading and `<writer>.jsonl` for appending.

        Waits while another process appends to the same file; its answers are then read too.
        """
        self.path = Path(folder) / f"{writer}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.problems: list[str] = []
        self._answers: dict[str, dict[str, Any]] = {}
        self._file = open(self.path, "ab")  # noqa: SIM115  closed by close()
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._repair()
        for path in sorted(self.path.parent.glob("*.jsonl")):
            self._read(path)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> dict[str, Any] | None:
        """The recorded answer, or None."""
        return self._answers.get(key)

    def append(self, answers: Iterable[tuple[str, Mapping[str, Any]]], made: Mapping[str, Any]) -> None:
        """Records a batch of (key, answer) and returns once it is on the disk.

        Args:
            answers: plain JSON values by key.
            made: circumstances that should not change an answer (batch size, rank, device), kept for inspection.
        """
        lines = b""
        for key, answer in answers:
            lines += seal({"key": key, "answer": dict(answer), "made": dict(made)})
            self._answers[key] = dict(answer)
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _repair(self) -> None:
        """Cuts a last line without its newline: the batch in flight when the writer was killed."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            line = data.count(b"\n") + 1
            self._file.truncate(whole)
            self.problems.append(f"{self.path}:{line}: torn last line of {len(data) - whole} bytes removed")

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]  # another writer may be in the middle of its last line
        for number, line in enumerate(complete.splitlines(keepends=True), start=1):
            record = unseal(line)
            if record is None:
                self.problems.append(
                    f"{path}:{number}: checksum does not match, the line is skipped and computed again"
                )
            else:
                self._answers.setdefault(record["key"], record["answer"])


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
