"""Publishing the report, and naming the commits of its code digests."""

import json
import subprocess
from pathlib import Path

import pytest

from molmo_model.artifacts import file_sha256
from molmo_model.errors import ArtifactError, StorageError
from molmo_model.eval.report import COMMITS
from molmo_model.source_digest import ROOT, source_digest
from pipelines import commits, publish, report
from pipelines.stage import run
from tests.storage.conftest import s3_environment, s3_server  # noqa: F401


@pytest.fixture
def without_history(monkeypatch):
    """Commits are looked up in a test of their own: a second for each."""
    own = source_digest("pipelines.report")
    monkeypatch.setattr(
        commits, "find", lambda codes, most: {own: commits.Commit("c" * 40, True)} if own in codes else {}
    )


def test_the_report_is_published_to_a_bucket(workspace, settings, s3_environment, without_history):  # noqa: F811
    import s3fs

    workspace()
    fs = s3fs.S3FileSystem()
    fs.mkdir("published")
    source = Path("artifacts/report")
    assert publish.publish(settings, "s3://published/reports/a") == "s3://published/reports/a/index.html"
    page = fs.cat_file("published/reports/a/index.html").decode()
    local = (source / "index.html").read_text(encoding="utf-8")
    stamped = page[page.index('id="commits">') :].partition("</script>")[0]
    assert page != local and page.replace(stamped, 'id="commits">{}') == local
    assert "c" * 40 in page
    found = {path.removeprefix("published/reports/a/") for path in fs.find("published/reports/a")}
    plots = {f"plots/{path.name}" for path in (source / "plots").iterdir()}
    assert found == {"index.html", "report.csv", "report.json", "provenance.json", *plots}
    heads = {name: fs.call_s3("head_object", Bucket="published", Key=f"reports/a/{name}") for name in found}
    kinds = {name: head["ContentType"] for name, head in heads.items()}
    assert kinds["index.html"] == "text/html" and kinds["report.json"] == "application/json"
    assert kinds["report.csv"] == "text/csv" and kinds["plots/scene_qa.svg"] == "image/svg+xml"
    provenance = json.loads(fs.cat_file("published/reports/a/provenance.json"))
    assert provenance["files"]["report.csv"] == file_sha256(source / "report.csv")
    assert provenance["report"] == json.loads((source / "manifest.json").read_text())["digest"]


def test_the_page_goes_last_so_a_broken_upload_leaves_the_old_one(
    workspace, settings, monkeypatch, tmp_path, without_history
):
    from molmo_model import storage

    workspace()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("old")
    copied = []
    copy_file = storage._copy_file

    def breaking(source, target, size):
        copied.append(Path(target).name)
        if len(copied) == 3:
            raise StorageError("the line is dead")
        return copy_file(source, target, size)

    monkeypatch.setattr(storage, "_copy_file", breaking)
    with pytest.raises(StorageError, match="the line is dead"):
        publish.publish(settings, str(tmp_path / "site"))
    assert (tmp_path / "site" / "index.html").read_text() == "old"
    monkeypatch.setattr(storage, "_copy_file", lambda *of: copied.append(Path(of[1]).name) or copy_file(*of))
    publish.publish(settings, str(tmp_path / "site"))
    assert copied[-1] == "index.html" and COMMITS not in (tmp_path / "site" / "index.html").read_text()


def test_what_is_missing_damaged_or_out_of_date_is_not_published(workspace, settings, tmp_path, without_history):
    folder = workspace()
    site = tmp_path / "site"
    with pytest.raises(StorageError, match="unknown scheme"):
        publish.publish(settings, "ftp://host/reports")
    table = folder / "artifacts/report/report.csv"
    whole = table.read_bytes()
    table.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=r"report\.csv"):
        publish.publish(settings, str(site))
    table.write_bytes(whole)
    settings.eval.report_examples += 1
    try:
        with pytest.raises(ArtifactError, match=r"not up to date \(params eval"):
            publish.publish(settings, str(site))
    finally:
        settings.eval.report_examples -= 1
    (folder / "artifacts/report/manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json does not exist"):
        publish.publish(settings, str(site))
    assert not site.exists()
    assert run(report.STAGE, settings).digest  # for whoever comes next


@pytest.mark.slow
def test_a_code_digest_names_its_commit(tmp_path, monkeypatch):
    """In a repository of its own: a comment is no change of code; what is not committed is said to be so."""
    monkeypatch.setenv("MOLMO_STATE_DIR", str(tmp_path / "state"))
    root = tmp_path / "repo"
    (root / "pipelines").mkdir(parents=True)
    (root / "molmo_model").mkdir()
    for name in ("__init__", "source_digest", "remembered", "errors"):
        (root / "molmo_model" / f"{name}.py").write_text((ROOT / "molmo_model" / f"{name}.py").read_text())
    (root / "pipelines" / "__init__.py").write_text("")
    made = {}
    for text in ("A = 1\n", "A = 2\n", "A = 2  # a comment\n"):
        (root / "pipelines" / "work.py").write_text(text)
        for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", text)):
            identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
            subprocess.run(["git", *identity, *words], cwd=root, check=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True)
        made[text] = head.stdout.strip()
    newest = commits._digests(made["A = 2  # a comment\n"], root)
    older = commits._digests(made["A = 1\n"], root)
    assert commits._digests(made["A = 2\n"], root) == newest != older
    (first,) = older - newest
    (second,) = newest - older
    found = commits.find([first[:12], second, "f" * 64], root=root)
    assert found == {
        first[:12]: commits.Commit(made["A = 1\n"]),
        second: commits.Commit(made["A = 2  # a comment\n"]),
    }
