"""`dvc push`, a wiped cache and `dvc pull` against a real S3 server and a real Google Cloud Storage server."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def dvc(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    command = [str(BIN / "dvc"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"dvc {' '.join(arguments)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_project(folder: Path) -> None:
    """A DVC project of one stage whose artefact is a folder with a file in a folder."""
    folder.mkdir()
    dvc(folder, "init", "--no-scm", "-q")
    (folder / "make.py").write_text(
        "import pathlib\n"
        "out = pathlib.Path('artifacts/shards/a'); (out / 'deep').mkdir(parents=True)\n"
        "(out / 'shards-000000.tar').write_bytes(bytes(range(256)) * 400)\n"
        "(out / 'deep' / 'manifest.json').write_text('{}')\n"
    )
    (folder / "dvc.yaml").write_text(
        "stages:\n  shards:\n    cmd: python make.py\n    deps: [make.py]\n    outs: [artifacts/shards/a]\n"
    )
    dvc(folder, "repro", "-q")


def content(folder: Path) -> dict[str, bytes]:
    root = folder / "artifacts"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def push_wipe_pull(folder: Path) -> None:
    before = content(folder)
    assert sorted(before) == ["shards/a/deep/manifest.json", "shards/a/shards-000000.tar"]
    dvc(folder, "push", "-q")
    assert "in sync" in dvc(folder, "status", "-c")
    shutil.rmtree(folder / ".dvc" / "cache")
    shutil.rmtree(folder / "artifacts")
    dvc(folder, "pull", "-q")
    assert content(folder) == before
    assert "up to date" in dvc(folder, "status")
    (folder / "make.py").write_text((folder / "make.py").read_text().replace("400", "401"))
    assert "changed" in dvc(folder, "status")


def test_s3(s3_environment: str, tmp_path: Path) -> None:
    from molmo_model import storage

    storage.filesystem("s3://dvcbucket").mkdir("dvcbucket")
    folder = tmp_path / "project"
    make_project(folder)
    dvc(folder, "remote", "add", "-d", "store", "s3://dvcbucket/store")
    dvc(folder, "remote", "modify", "store", "endpointurl", s3_environment)
    push_wipe_pull(folder)
    assert storage.list_files("s3://dvcbucket/store")


@pytest.mark.slow
def test_gs(gcs_environment: str, tmp_path: Path) -> None:
    from molmo_model import storage

    storage.filesystem("gs://dvcbucket").mkdir("dvcbucket")
    folder = tmp_path / "project"
    make_project(folder)
    dvc(folder, "remote", "add", "-d", "store", "gs://dvcbucket/store")
    dvc(folder, "remote", "modify", "store", "endpointurl", gcs_environment)
    dvc(folder, "remote", "modify", "store", "allow_anonymous_login", "true")
    push_wipe_pull(folder)
    assert storage.list_files("gs://dvcbucket/store")
