"""Artefacts: directories that end with a manifest, and what the manifest promises.

A stage fills a directory and writes `manifest.json` last and atomically; a directory without one is unfinished. The
manifest lists every file with size and SHA-256, the params, input digests and code digest that the content was made
from, and one digest over the content, which is the artefact's identity everywhere (Dagster's `DataVersion` too).
Nothing in it depends on when or where it was made.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from molmo_model import remembered
from molmo_model.errors import ArtifactError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class FileEntry:
    """One file of an artefact: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artefact is and what it was made from. `digest` covers schema, version and files, so equal content has
    an equal digest whatever it was made from; `params`, `inputs` and `code` say what would have to be equal to make it
    again."""

    schema: str
    version: int
    params: dict[str, Any]
    inputs: dict[str, str]
    code: str
    files: dict[str, FileEntry]
    summary: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    def content_digest(self) -> str:
        files = {name: asdict(entry) for name, entry in self.files.items()}
        return digest_of({"schema": self.schema, "version": self.version, "files": files})


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of a plain value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Sha256 = Callable[[Path], str]
"""How the functions below get a file's SHA-256: `file_sha256` really reads it; `Remembered.sha256` of a run may not."""


def path_digest(path: str | Path, sha256: Sha256 = file_sha256) -> str:
    """The digest of an input: an artefact's own digest, else a hash of the file, or of every file below the folder.

    Raises:
        ArtifactError: nothing is there.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        return read_manifest(path).digest
    if path.is_file():
        return sha256(path)
    if path.is_dir():
        return digest_of({name: sha256(path / name) for name in _files(path)})
    raise ArtifactError(f"{path} does not exist; run the stage that makes it")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes a file so that a reader, or a kill, sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
            raise


def write_manifest(
    directory: str | Path,
    *,
    schema: str,
    version: int,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    code: str,
    summary: Mapping[str, Any],
    sha256: Sha256 = file_sha256,
) -> Manifest:
    """Hashes every file below `directory` and writes its manifest, last and atomically.

    Sub-directories that are artefacts themselves are listed by their own files, manifest included.
    """
    directory = Path(directory)
    files = {name: FileEntry((directory / name).stat().st_size, sha256(directory / name)) for name in _files(directory)}
    manifest = Manifest(schema, version, dict(params), dict(inputs), code, files, dict(summary))
    manifest = Manifest(**{**manifest.__dict__, "digest": manifest.content_digest()})
    document = {"manifest_version": MANIFEST_VERSION, **asdict(manifest)}
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_text_atomic(directory / MANIFEST, text + "\n")
    return manifest


def read_manifest(directory: str | Path, schema: str | None = None) -> Manifest:
    """Reads and checks a manifest; not yet the files (see `verify`).

    Raises:
        ArtifactError: there is none, it is no valid manifest, its digest does not cover its files, or it is of
            another schema.
    """
    path = Path(directory) / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} does not exist: {directory} is unfinished or not an artefact; run its stage"
        ) from error
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); delete {directory} and run its stage again") from error
    return parse_manifest(text, str(directory), schema)


def parse_manifest(text: str, directory: str, schema: str | None = None) -> Manifest:
    """The manifest of a text; `directory` is what to call its place, which may be in a bucket. Raises as
    `read_manifest`."""
    path = f"{directory}/{MANIFEST}"
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read ({error}); delete {directory} and run its stage again") from error
    try:
        if document["manifest_version"] != MANIFEST_VERSION:
            raise ArtifactError(
                f"{path}: manifest version {document['manifest_version']}, this code reads {MANIFEST_VERSION}"
            )
        files = {name: FileEntry(**entry) for name, entry in document["files"].items()}
        fields = ("schema", "version", "params", "inputs", "code", "summary", "digest")
        manifest = Manifest(files=files, **{name: document[name] for name in fields})
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is not a manifest ({error!r}); delete {directory} and run its stage again"
        ) from error
    if manifest.digest != manifest.content_digest():
        raise ArtifactError(
            f"{path}: digest {manifest.digest} but its files give {manifest.content_digest()}; it was edited"
        )
    if schema is not None and manifest.schema != schema:
        raise ArtifactError(f"{path}: schema {manifest.schema!r} where {schema!r} is needed")
    return manifest


def verify(directory: str | Path, schema: str | None = None, sha256: Sha256 = file_sha256) -> Manifest:
    """Reads the manifest and checks every file: none missing, none more, sizes and hashes as listed.

    Raises:
        ArtifactError: naming the first file that differs, with both numbers.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, schema)
    present = set(_files(directory))
    for name in sorted(set(manifest.files) - present):
        raise ArtifactError(f"{directory / name} is missing; delete {directory} and run its stage again")
    for name in sorted(present - set(manifest.files)):
        raise ArtifactError(
            f"{directory / name} is not in the manifest; delete it, or {directory} and run its stage again"
        )
    for name, entry in manifest.files.items():
        verify_file(directory / name, entry, sha256)
    return manifest


def verify_file(path: str | Path, entry: FileEntry, sha256: Sha256 = file_sha256) -> None:
    """Checks one file against its manifest entry; raises `ArtifactError` with both numbers."""
    size = Path(path).stat().st_size
    if size != entry.size:
        raise ArtifactError(
            f"{path} has {size} bytes, the manifest says {entry.size}; restore it or run its stage again"
        )
    digest = sha256(Path(path))
    if digest != entry.sha256:
        raise ArtifactError(f"{path} has SHA-256 {digest}, the manifest says {entry.sha256}; it is corrupt")


def link_tree(source: str | Path, target: str | Path) -> None:
    """Makes `target` a tree of hard links to `source` (copies across file systems), replacing what was there.

    The tree is built beside `target` and renamed, so a kill leaves the old tree, none, or the new one.
    """
    source, target = Path(source), Path(target)
    staging = _staging(target)
    try:
        shutil.copytree(source, staging / "tree", copy_function=_link_or_copy)
        if target.exists():
            os.rename(target, staging / "old")
        os.rename(staging / "tree", target)
        for name in _files(target):
            remembered.linked(source / name, target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def discard(directory: str | Path) -> None:
    """Deletes an artefact. It is renamed first, so a kill leaves nothing that looks finished and is not."""
    directory = Path(directory)
    if directory.exists():
        staging = _staging(directory)
        os.rename(directory, staging / "old")
        shutil.rmtree(staging)


def clear_staging(target: str | Path) -> None:
    """Deletes what killed processes left beside `target`. Only for the one process that may replace it now."""
    target = Path(target)
    for left_over in target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)


def _staging(target: Path) -> Path:
    """A fresh hidden folder beside `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))


def link_file(source: str | Path, target: str | Path) -> None:
    """Makes `target` a hard link to `source`, or a copy across file systems."""
    _link_or_copy(str(source), str(target))
    remembered.linked(source, target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _files(directory: Path) -> Iterator[str]:
    """Relative POSIX paths of the files below `directory`, sorted, without its own manifest and temporary files."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return iter(sorted(name for name in names if name != MANIFEST and not name.startswith(f".{MANIFEST}.")))
