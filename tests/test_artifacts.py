"""Manifests: what they promise, and that nothing broken passes for finished."""

import json
import os
from pathlib import Path

import pytest

from molmo_model import artifacts
from molmo_model.errors import ArtifactError

FACTS = {"schema": "molmo/test", "version": 3, "params": {"seed": 1}, "inputs": {"a": "0" * 64}, "code": "c"}


def make(folder: Path, **changes) -> artifacts.Manifest:
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "a.txt").write_bytes(b"abc")
    (folder / "sub" / "ü b.bin").write_bytes(bytes(range(256)))
    return artifacts.write_manifest(folder, summary={"rows": 2}, **{**FACTS, **changes})


def test_round_trip(tmp_path: Path) -> None:
    written = make(tmp_path)
    assert artifacts.verify(tmp_path, "molmo/test") == written
    assert artifacts.read_manifest(tmp_path) == written
    assert written.files["a.txt"].size == 3
    # SHA-256 of "abc": FIPS 180-2, appendix B.1
    assert written.files["a.txt"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert set(written.files) == {"a.txt", "sub/ü b.bin"}


def test_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    one = make(tmp_path / "one")
    other = make(tmp_path / "two", params={"seed": 2}, inputs={}, code="d")
    assert one.digest == other.digest
    assert make(tmp_path / "three", version=4).digest != one.digest
    (tmp_path / "one" / "a.txt").rename(tmp_path / "one" / "b.txt")
    renamed = artifacts.write_manifest(tmp_path / "one", summary={}, **FACTS)
    assert renamed.digest != one.digest


def test_bytes_of_a_manifest_do_not_depend_on_place_or_time(tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "elsewhere" / "two")
    os.utime(tmp_path / "elsewhere" / "two" / "a.txt", (0, 0))
    make(tmp_path / "elsewhere" / "two")
    first = (tmp_path / "one" / artifacts.MANIFEST).read_bytes()
    assert first == (tmp_path / "elsewhere" / "two" / artifacts.MANIFEST).read_bytes()


def break_size(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"abcd")


def break_content(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"abd")


def break_missing(folder: Path) -> None:
    (folder / "a.txt").unlink()


def break_extra(folder: Path) -> None:
    (folder / "sub" / "more").write_bytes(b"")


def break_truncated_manifest(folder: Path) -> None:
    path = folder / artifacts.MANIFEST
    path.write_bytes(path.read_bytes()[:-30])


def break_no_manifest(folder: Path) -> None:
    (folder / artifacts.MANIFEST).unlink()


def edit(folder: Path, **changes) -> None:
    path = folder / artifacts.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def break_edited_files(folder: Path) -> None:
    (folder / "a.txt").unlink()
    edit(folder, files={})


def break_newer_manifest(folder: Path) -> None:
    edit(folder, manifest_version=99)


def break_not_a_mapping(folder: Path) -> None:
    (folder / artifacts.MANIFEST).write_text("[]")


def break_files_of_another_kind(folder: Path) -> None:
    edit(folder, files={"a.txt": {"size": 3}})


def break_binary_manifest(folder: Path) -> None:
    (folder / artifacts.MANIFEST).write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (break_size, "4 bytes, the manifest says 3"),
        (break_content, "a.txt"),
        (break_missing, "a.txt"),
        (break_extra, "more"),
        (break_truncated_manifest, "manifest.json"),
        (break_no_manifest, "unfinished"),
        (break_edited_files, "edited"),
        (break_newer_manifest, "99"),
        (break_not_a_mapping, "manifest.json"),
        (break_files_of_another_kind, "manifest.json"),
        (break_binary_manifest, "manifest.json"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage, named: str) -> None:
    make(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=named):
        artifacts.verify(tmp_path)


def test_every_flipped_byte_of_a_file_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "sub" / "ü b.bin"
    data = path.read_bytes()
    for position in range(0, len(data), 17):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ArtifactError):
            artifacts.verify(tmp_path)
    path.write_bytes(data)
    artifacts.verify(tmp_path)


def test_wrong_schema_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ArtifactError, match=r"molmo/test.*molmo/other"):
        artifacts.verify(tmp_path, "molmo/other")


def test_nan_never_enters_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.write_manifest(tmp_path, summary={"loss": float("nan")}, **FACTS)
    assert not (tmp_path / artifacts.MANIFEST).exists()
    assert os.listdir(tmp_path) == ["a"]


def test_canonical_json_ignores_order_and_keeps_types() -> None:
    assert artifacts.digest_of({"a": 1, "b": [1.0]}) == artifacts.digest_of({"b": [1.0], "a": 1})
    assert artifacts.digest_of(1) != artifacts.digest_of("1")
    assert artifacts.digest_of(1) != artifacts.digest_of(1.0)
    assert artifacts.canonical_json({"ü": None}) == '{"ü":null}'


def test_path_digest(tmp_path: Path) -> None:
    manifest = make(tmp_path / "artefact")
    assert artifacts.path_digest(tmp_path / "artefact") == manifest.digest
    (tmp_path / "folder" / "x").mkdir(parents=True)
    (tmp_path / "folder" / "x" / "f").write_bytes(b"1")
    before = artifacts.path_digest(tmp_path / "folder")
    (tmp_path / "folder" / "x" / "f").write_bytes(b"2")
    assert artifacts.path_digest(tmp_path / "folder") != before
    assert artifacts.path_digest(tmp_path / "folder" / "x" / "f") == artifacts.file_sha256(tmp_path / "folder/x/f")
    with pytest.raises(ArtifactError, match="nothing"):
        artifacts.path_digest(tmp_path / "nothing")


def test_link_tree_replaces_and_shares(tmp_path: Path) -> None:
    manifest = make(tmp_path / "state")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"old")
    artifacts.link_tree(tmp_path / "state", tmp_path / "out")
    assert artifacts.verify(tmp_path / "out") == manifest
    assert (tmp_path / "out" / "a.txt").stat().st_ino == (tmp_path / "state" / "a.txt").stat().st_ino
    assert sorted(os.listdir(tmp_path)) == ["out", "state"]


def test_link_tree_copies_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(18, "Invalid cross-device link")

    manifest = make(tmp_path / "state")
    monkeypatch.setattr(artifacts.os, "link", refuse)
    artifacts.link_tree(tmp_path / "state", tmp_path / "out")
    assert artifacts.verify(tmp_path / "out") == manifest


def test_staging_of_killed_processes_is_cleared_and_that_of_others_kept(tmp_path: Path) -> None:
    make(tmp_path / "state")
    mine, other = tmp_path / ".out.abcdefgh.tmp", tmp_path / ".out.v2.abcdefgh.tmp"
    for folder in (mine, other):
        folder.mkdir()
    artifacts.link_tree(tmp_path / "state", tmp_path / "out")
    artifacts.clear_staging(tmp_path / "out")
    assert not mine.exists()
    assert other.exists()
    artifacts.discard(tmp_path / "out")
    artifacts.discard(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".out.v2.abcdefgh.tmp", "state"]


def test_atomic_text_keeps_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    artifacts.write_text_atomic(tmp_path / "x", "old")
    monkeypatch.setattr(artifacts.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        artifacts.write_text_atomic(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]
