"""Opening, listing and copying on every scheme, against real servers."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from molmo_model import storage
from molmo_model.errors import StorageError
from tests.storage.conftest import KEY, SECRET

BIG = 11 * 2**20  # more than one part of a multipart upload and more than one chunk


def make_tree(root: Path) -> dict[str, bytes]:
    content = {
        "manifest.json": b"{}",
        "a.txt": "grüße\n".encode(),
        "deep/er/b c.bin": bytes(range(256)),
        "empty": b"",
        "z/big": np.random.default_rng(0).bytes(BIG),
    }
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return content


def round_trip(url: str, tmp_path: Path) -> None:
    """Out, listed, read in parts, out again unchanged, and back."""
    content = make_tree(tmp_path / "source")
    total = sum(map(len, content.values()))
    assert storage.copy_tree(tmp_path / "source", url) == storage.Copied(len(content), total, 0)
    assert storage.list_files(url) == sorted(content)
    assert storage.exists(storage.join(url, "a.txt"))
    assert storage.exists(url)
    assert not storage.exists(storage.join(url, "nothing"))
    with storage.open_file(storage.join(url, "z/big")) as file:
        file.seek(BIG - 100)
        assert file.read() == content["z/big"][-100:]
    with storage.open_file(storage.join(url, "a.txt"), "r") as file:
        assert file.read() == "grüße\n"
    with storage.open_file(storage.join(url, "new/line.txt"), "w") as file:
        file.write("ü\n")
    with storage.open_file(storage.join(url, "new/line.txt")) as file:
        assert file.read() == "ü\n".encode()
    assert storage.copy_tree(tmp_path / "source", url) == storage.Copied(0, 0, len(content))
    (tmp_path / "source" / "a.txt").write_bytes(b"GRUSSE!\n")  # same size, other content
    assert storage.copy_tree(tmp_path / "source", url) == storage.Copied(1, 8, len(content) - 1)
    back = tmp_path / "back"
    storage.copy_tree(url, back)
    assert storage.list_files(back) == sorted([*content, "new/line.txt"])
    assert (back / "a.txt").read_bytes() == b"GRUSSE!\n"
    for name in set(content) - {"a.txt"}:
        assert (back / name).read_bytes() == content[name]


def test_local(tmp_path: Path) -> None:
    round_trip(str(tmp_path / "target"), tmp_path)


def test_memory(tmp_path: Path) -> None:
    round_trip("memory://storage-test/tree", tmp_path)


def test_s3(s3_environment: str, tmp_path: Path) -> None:
    storage.filesystem("s3://bucket").mkdir("bucket")
    round_trip("s3://bucket/some/tree", tmp_path)


def test_gs(gcs_environment: str, tmp_path: Path) -> None:
    storage.filesystem("gs://bucket").mkdir("bucket")
    round_trip("gs://bucket/some/tree", tmp_path)


def test_weka(weka_environment: str, tmp_path: Path) -> None:
    storage.filesystem("weka://wekabucket").mkdir("wekabucket")
    round_trip("weka://wekabucket/some/tree", tmp_path)


def test_other_libraries_know_weka(weka_environment: str) -> None:
    """A child process that never imported this project, as pandas or a torchrun worker may be."""
    code = "import fsspec; print(type(fsspec.filesystem('weka')).__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    if "Protocol not known" in done.stderr:
        pytest.skip("the project is not installed in this environment; `make setup` installs it")
    assert done.stdout.strip() == "molmo_model.weka", done.stderr


def test_wrong_key_is_explained_without_secrets(
    s3_environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "a-wrong-secret-value"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong)
    monkeypatch.setattr(storage, "PAUSE", 0.0)
    make_tree(tmp_path / "source")
    with pytest.raises(StorageError) as caught:
        storage.copy_tree(tmp_path / "source", "s3://bucket/refused")
    text = str(caught.value)
    assert "s3://bucket/refused" in text
    assert "AWS_PROFILE" in text
    for secret in (wrong, SECRET, KEY):
        assert secret not in text


def test_weka_without_endpoint_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from molmo_model.weka import WekaFileSystem

    WekaFileSystem.clear_instance_cache()
    monkeypatch.delenv("WEKA_ENDPOINT_URL", raising=False)
    with pytest.raises(StorageError, match="WEKA_ENDPOINT_URL"):
        storage.filesystem("weka://bucket/x")


@pytest.mark.parametrize("url", ["ftp://x/y", "S3://bucket", "c4://a", "https://example.com/a"])
def test_unknown_scheme_lists_the_right_ones(url: str) -> None:
    with pytest.raises(StorageError, match="s3://, gs://, weka://, hf://"):
        storage.filesystem(url)


def test_credentials_in_a_url_are_refused_and_hidden() -> None:
    with pytest.raises(StorageError) as caught:
        storage.open_file("s3://AKIA:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "GET https://b.s3.amazonaws.com/x?X-Amz-Credential=HIDE&X-Amz-Signature=HIDE&partNumber=1",
        "GET https://storage.googleapis.com/x?X-Goog-Signature=HIDE",
        "Authorization: Bearer HIDE",
        "https://user:HIDE@host/x",
        "token=HIDE",
    ],
)
def test_redaction(text: str) -> None:
    assert "HIDE" not in storage.redact(text)


def test_redaction_leaves_ordinary_text() -> None:
    text = "s3://bucket/a@b/c.txt: has 3 bytes, monkey=4"
    assert storage.redact(text) == text


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing-here"):
        storage.list_files(tmp_path / "nothing-here")
    with pytest.raises(StorageError, match="nothing-here"):
        storage.open_file(tmp_path / "nothing-here")
    with pytest.raises(StorageError, match="nothing-here"):
        storage.copy_tree("memory://nothing-here", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_one_file(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"1")
    assert storage.copy_tree(tmp_path / "one.txt", "memory://one-file") == storage.Copied(1, 1, 0)
    assert storage.list_files("memory://one-file") == ["one.txt"]
    assert storage.list_files("memory://one-file/one.txt") == ["one.txt"]


def test_is_remote(tmp_path: Path) -> None:
    assert not storage.is_remote(tmp_path)
    assert not storage.is_remote("artifacts/x")
    assert not storage.is_remote(f"file://{tmp_path}")
    assert all(storage.is_remote(f"{scheme}://b/k") for scheme in ("s3", "gs", "weka", "hf", "memory"))


class Flaky:
    """A file system whose transfers fail or lie as told; everything else is memory's."""

    def __init__(self, failures: int = 0, corrupt: bool = False, escape: bool = False) -> None:
        import fsspec

        self.inner, self.failures, self.corrupt, self.escape = fsspec.filesystem("memory"), failures, corrupt, escape
        self.order: list[str] = []

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def find(self, path: str, detail: bool = False):
        found = self.inner.find(path, detail=True)
        return {f"{path}/../evil": {"size": 1}} if self.escape else found

    def put_file(self, source: str, path: str) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionResetError("reset by peer")
        self.order.append(path)
        self.inner.put_file(source, path)
        if self.corrupt:
            data = bytearray(self.inner.cat_file(path))
            data[len(data) // 2] ^= 1
            self.inner.pipe_file(path, bytes(data))


def use(fs: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(storage.SCHEMES, "memory", storage.Scheme(lambda: fs, "look at the test"))
    monkeypatch.setattr(storage, "PAUSE", 0.0)


def test_passing_errors_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a").write_bytes(b"abc")
    use(Flaky(failures=storage.TRIES - 1), monkeypatch)
    assert storage.copy_tree(tmp_path / "s", "memory://flaky").files == 1
    use(Flaky(failures=storage.TRIES), monkeypatch)
    with pytest.raises(StorageError, match="reset by peer"):
        storage.copy_tree(tmp_path / "s", "memory://flaky2")


def test_corrupt_copy_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a").write_bytes(b"abc")
    use(Flaky(corrupt=True), monkeypatch)
    with pytest.raises(StorageError, match=hashlib.sha256(b"abc").hexdigest()):
        storage.copy_tree(tmp_path / "s", "memory://corrupt")


def test_manifest_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path / "s")
    fs = Flaky()
    use(fs, monkeypatch)
    storage.copy_tree(tmp_path / "s", "memory://ordered")
    assert fs.order[-1].endswith("/manifest.json")
    assert len(fs.order) == 5


def test_names_cannot_leave_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Flaky(escape=True), monkeypatch)
    with pytest.raises(StorageError, match="leads out"):
        storage.copy_tree("memory://tree", tmp_path / "in" / "side")
    assert not (tmp_path / "in").exists()


def test_broken_local_copy_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a").write_bytes(b"new content")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a").write_bytes(b"old")

    def broken(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"new c")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.shutil, "copyfile", broken)
    with pytest.raises(StorageError, match="No space left"):
        storage.copy_tree(tmp_path / "s", tmp_path / "t")
    assert (tmp_path / "t" / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path / "t") == ["a"]


def test_libraries_of_the_services_load_only_when_needed() -> None:
    code = (
        "import sys, molmo_model.storage as s; s.exists('/'); "
        "print([m for m in ('s3fs', 'gcsfs', 'huggingface_hub', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
