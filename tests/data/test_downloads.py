"""Lists of downloads: what a kill costs, what the list promises, what shards are made of."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molmo_model.config import params_from_dict
from molmo_model.data.download_run import Journal, Retry, Run
from molmo_model.data.downloads import (
    Download,
    MissingDownload,
    Status,
    Store,
    Survivors,
    read_list,
    to_line,
    write_list,
)
from molmo_model.data.fetching import Limits
from molmo_model.errors import ConfigError, DataError
from pipelines import shards, stage, state
from pipelines.download import main, parse, urls_of
from tests.data.builders import picture
from tests.data.web import Site, after, answer

ROOT = Path(__file__).resolve().parents[2]
PNG = picture(1).data
OPTIONS = ("backoff_s=0.01", "retries=1", "read_s=2")


@pytest.fixture
def site():
    with Site() as server:
        yield server


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MOLMO_STATE_DIR", "MOLMO_DOWNLOAD_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "params.yaml").write_text("version: 2\nseed: 3\ndatasets: {}\n")
    return tmp_path


def sha(data):
    return hashlib.sha256(data).hexdigest()


# ---- store, list, journal


def ok_row(url="http://h/a", data=PNG):
    return Download(url, Status.OK, "", 200, sha(data), len(data), "PNG", 9, 7)


def stored(store, data=PNG):
    path = store.path(sha(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_survivors_give_what_was_hashed_and_nothing_else(tmp_path):
    store = Store(tmp_path / "store")
    dead = Download("http://h/dead", Status.GONE, "the server answers 404", 404)
    write_list(tmp_path / "list.parquet", [ok_row(), dead])
    survivors = Survivors(tmp_path / "list.parquet", store)
    with pytest.raises(DataError, match=rf"http://h/a.*{sha(PNG)}.*{store.folder}.*from_list=true"):
        survivors.get("http://h/a")
    path = stored(store)
    assert survivors.get("http://h/a") == PNG
    with pytest.raises(MissingDownload) as missing:
        survivors.get("http://h/dead")
    assert missing.value.reason == "gone: the server answers 404"
    with pytest.raises(DataError, match="older than the data"):
        survivors.get("http://h/new")
    path.write_bytes(PNG[:-1] + b"x")
    with pytest.raises(DataError, match="delete that file"):
        survivors.get("http://h/a")
    assert (survivors.sha256("http://h/a"), survivors.sha256("http://h/dead")) == (sha(PNG), "")


def test_the_digest_follows_every_column_and_the_order(tmp_path):
    dead = Download("http://h/dead", Status.GONE, "the server answers 404", 404)
    lists = [
        [ok_row(), dead],
        [dead, ok_row()],
        [ok_row(), Download("http://h/dead", Status.TIMEOUT, "the server answers 404", 404)],
        [ok_row(), Download("http://h/dead", Status.GONE, "else", 404)],
        [ok_row(data=PNG + b"x"), dead],
        [ok_row()],
    ]
    digests = []
    for number, rows in enumerate(lists):
        for name in ("a", "b"):
            write_list(tmp_path / name / f"{number}.parquet", rows)
        one, other = (tmp_path / name / f"{number}.parquet" for name in ("a", "b"))
        assert one.read_bytes() == other.read_bytes()
        digests.append(Survivors(one).digest())
        assert digests[-1] == Survivors(other).digest()
    assert len(set(digests)) == len(lists)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row | {"sha256": "xyz"}, "sha256"),
        (lambda row: row | {"status": "fine"}, "status"),
        (lambda row: row | {"status": "gone"}, "a reason"),
        (lambda row: row | {"bytes": 0}, "hash, size"),
        (lambda row: row | {"url": ""}, "url"),
        (lambda row: {k: v for k, v in row.items() if k != "reason"}, "reason"),
    ],
)
def test_a_list_that_breaks_its_contract_is_refused(tmp_path, change, words):
    path = tmp_path / "list.parquet"
    write_list(path, [ok_row()])
    table = pq.read_table(path)
    rows = [change(row) for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(DataError, match=words):
        len(Survivors(path))


def test_what_is_no_list_is_refused(tmp_path):
    path = tmp_path / "list.parquet"
    for use in (len, Survivors.digest, lambda survivors: survivors.get("http://h/a")):
        with pytest.raises(DataError, match=r"no list of downloads .*pipelines.download"):
            use(Survivors(path))
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        len(Survivors(path))
    pq.write_table(pa.table({"url": ["a"]}), path)
    with pytest.raises(DataError, match="version of a list of downloads is none"):
        len(Survivors(path))
    write_list(path, [ok_row()])
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"molmo/downloads": b"9"}), path)
    with pytest.raises(DataError, match="is '9', this program reads '1'"):
        len(Survivors(path))
    with pytest.raises(DataError, match="unique"):
        write_list(path, [ok_row(), ok_row()])
    assert pq.read_table(path).schema.metadata[b"molmo/downloads"] == b"9"  # as it was


def test_a_torn_journal_loses_its_last_line_only(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    assert journal.read() == (None, {})
    rows = [ok_row(f"http://h/{number}") for number in range(3)]
    journal.start({"list": ""}, rows[:1])
    with journal.appending() as add:
        for row in rows[1:]:
            add(row)
    whole = journal.path.read_bytes()
    for length in range(len(whole) - len(to_line(rows[2])), len(whole)):
        journal.path.write_bytes(whole[:length])
        head_line, found = journal.read()
        assert head_line == {"list": ""} and list(found.values()) == rows[:2]
    with journal.appending() as add:
        add(rows[2])
    assert journal.path.read_bytes() == whole
    journal.path.write_bytes(whole[:3])
    assert journal.read() == (None, {})
    journal.path.write_bytes(whole.replace(b'"ok"', b'"fine"', 1))
    with pytest.raises(DataError, match=r"a.jsonl:2 "):
        journal.read()


def test_one_run_of_a_dataset_at_a_time(tmp_path):
    run = Run("a", Store(tmp_path), {}, "", Retry.NONE)
    with run.alone(), pytest.raises(DataError, match="another process"), run.alone():
        pass
    with run.alone():
        pass


# ---- the command


def command(*arguments, loopback=True):
    """The exit code of `python -m pipelines.download`, here."""
    try:
        main([*arguments, *OPTIONS], loopback=loopback)
    except SystemExit as end:
        return end.code
    return 0


def write_urls(urls, name="urls.txt"):
    Path(name).write_text("# a list\n\n" + "".join(f"{url}\n" for url in urls), encoding="utf-8")


LIST = Path("data/downloads/photos.parquet")


def test_a_list_is_made_once_and_serves_colleagues(site, workspace, capsys, monkeypatch):
    others = [picture(number).data for number in range(5)]
    site.replies = {f"/{n}": answer(data) for n, data in enumerate(others)} | {"/5": answer(others[0])}
    urls = [site.url(f"/{n}") for n in (3, 1, 5, 0, 2, 4, 7, 8)]
    write_urls([*urls, urls[0]])
    assert command("dataset=photos", "urls=urls.txt") == 0
    said = capsys.readouterr().out
    assert "6 of 8 URLs kept (75.0%), 5 different files" in said and "gone" in said and "127.0.0.1 (2)" in said
    assert "1 repetitions" in said and "datasets.photos.downloads: data/downloads/photos.parquet" in said
    first = LIST.read_bytes()
    assert [row.url for row in read_list(LIST)] == urls
    assert max(site.asked.values()) == 1
    survivors = Survivors(LIST)
    assert [survivors.get(url) for url in urls[:6]] == [others[n] for n in (3, 1, 0, 0, 2, 4)]

    # again: nothing is asked; dead ones on request; all on request
    assert command("dataset=photos", "urls=urls.txt") == 0
    assert sum(site.asked.values()) == 8 and LIST.read_bytes() == first
    assert "stays as it is" in capsys.readouterr().out
    assert command("dataset=photos", "urls=urls.txt", "retry=failed") == 0
    assert site.asked["/7"] == site.asked["/8"] == 2 and sum(site.asked.values()) == 10
    assert command("dataset=photos", "urls=urls.txt", "retry=all") == 0
    assert sum(site.asked.values()) == 18 and LIST.read_bytes() == first

    # a colleague has the list and no files: only survivors are asked, either way
    for number, more in enumerate((("from_list=true",), ("urls=urls.txt",))):
        monkeypatch.setenv("MOLMO_DOWNLOAD_DIR", f"colleague-{number}")
        site.asked.clear()
        assert command("dataset=photos", *more) == 0
        assert site.asked == {f"/{n}": 1 for n in range(6)}
        assert LIST.read_bytes() == first
        assert Survivors(LIST).get(urls[0]) == others[3]
    # a lost file is fetched, and only that
    Store().path(sha(others[2])).unlink()
    site.asked.clear()
    assert command("dataset=photos", "from_list=true") == 0
    assert site.asked == {"/2": 1}

    # two clean runs, in another order of answers, give one list
    LIST.unlink()
    monkeypatch.setenv("MOLMO_DOWNLOAD_DIR", "clean")
    site.replies["/3"] = after(0.2, site.replies["/3"])
    assert command("dataset=photos", "urls=urls.txt", "concurrency=3") == 0
    assert LIST.read_bytes() == first


@pytest.mark.parametrize("way", ["from_list=true", "urls=urls.txt"])
def test_a_list_never_loses_files_unasked(site, workspace, capsys, monkeypatch, way):
    site.replies = {f"/{n}": answer(picture(n).data) for n in range(3)}
    urls = [site.url(f"/{n}") for n in range(4)]
    write_urls(urls)
    assert command("dataset=photos", "urls=urls.txt") == 0
    first = LIST.read_bytes()
    site.replies |= {"/0": answer(picture(9).data), "/1": answer(status=410), "/3": answer(PNG)}
    monkeypatch.setenv("MOLMO_DOWNLOAD_DIR", "colleague")
    site.asked.clear()
    for again in range(2):
        capsys.readouterr()
        assert command("dataset=photos", way) == 2
        said = capsys.readouterr()
        assert "2 files" in said.err and "changed: has sha256" in said.err and "gone" in said.err
        assert "update=true" in said.err
        assert LIST.read_bytes() == first
        assert site.asked == {"/0": 1, "/1": 1, "/2": 1}, again  # known by now
    assert not Store().path(sha(picture(9).data)).exists()
    assert command("dataset=photos", way, "retry=failed") == 2
    assert [site.asked[f"/{n}"] for n in range(3)] == [2, 2, 1]
    assert command("dataset=photos", way, "update=true") == 0
    assert [site.asked[f"/{n}"] for n in range(3)] == [2, 2, 1]
    rows = read_list(LIST)
    assert [row.url for row in rows] == urls
    dead = Status.OK if way != "from_list=true" else Status.GONE  # only retry=failed of the source asks what was dead
    assert [row.status for row in rows] == [Status.CHANGED, Status.GONE, Status.OK, dead]


def test_a_newer_list_goes_before_the_journal_of_an_older_one(site, workspace, monkeypatch):
    site.replies = {"/0": answer(status=500), "/1": answer(PNG)}
    urls = [site.url("/0"), site.url("/1")]
    write_urls(urls)
    run = Run("photos", Store(), {}, "", Retry.NONE)
    run.journal.start({"list": "", "retry": "none", "done": False}, [Download(urls[0], Status.TIMEOUT, "slow")])
    write_list(LIST, [ok_row(urls[0]), Download(urls[1], Status.GONE, "404", 404)])  # pulled meanwhile
    site.replies["/0"] = answer(PNG)
    assert command("dataset=photos", "urls=urls.txt") == 0
    assert site.asked == {"/0": 1}
    assert [row.status for row in read_list(LIST)] == [Status.OK, Status.GONE]


CHILD = "import sys; from pipelines.download import main; main(sys.argv[1:], loopback=True)"


PLAIN_SIGNALS = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.pthread_sigmask(signal.SIG_SETMASK, []);"
)
"""As a shell starts a program: a test runner's worker may ignore or block what it hands down."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_asks_only_for_the_rest(site, workspace, capsys, kind):
    count, at_once = 120, 4
    site.replies = {
        f"/{n}": after(0.1, answer(picture(n).data if n % 5 else b"", 200 if n % 5 else 404)) for n in range(count)
    }
    write_urls(site.url(f"/{n}") for n in range(count))
    arguments = [sys.executable, "-c", PLAIN_SIGNALS + CHILD, "dataset=photos", "urls=urls.txt"]
    arguments.append(f"per_host={at_once}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while sum(site.asked.values()) < 40 and time.monotonic() < deadline:
            time.sleep(0.005)
        child.send_signal(kind)
        _, said = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 75), said
    assert "Traceback" not in said
    before = sum(site.asked.values())
    assert 40 <= before < count and not LIST.exists()
    assert command("dataset=photos", "urls=urls.txt") == 0
    assert "96 of 120 URLs kept" in capsys.readouterr().out
    assert count <= sum(site.asked.values()) <= count + at_once  # what was in flight is asked twice, nothing else
    rows = read_list(LIST)
    assert [row.ok for row in rows] == [n % 5 != 0 for n in range(count)]
    assert all(Survivors(LIST).get(row.url) for row in rows if row.ok)
    left = [path for path in Path(".state/downloads").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert len(left) == 96


def test_files_of_urls_in_three_forms(workspace):
    urls, digest = ["http://h/ä", "http://h/b"], sha(PNG)
    write_urls(urls)
    assert list(urls_of("urls.txt")) == [(url, None) for url in urls]
    Path("urls.jsonl").write_text(
        f'{{"url": "{urls[0]}", "sha256": "{digest.upper()}", "x": 1}}\n{{"url": "{urls[1]}"}}\n'
    )
    assert list(urls_of("urls.jsonl")) == [(urls[0], digest), (urls[1], None)]
    pq.write_table(pa.table({"url": urls, "sha256": [digest, None], "x": [[1], []]}), "urls.parquet")
    assert list(urls_of("urls.parquet")) == [(urls[0], digest), (urls[1], None)]
    Path("urls.jsonl").write_text('{"url": "http://h"}\n{"link": "http://h"}\n')
    with pytest.raises(DataError, match=r"urls.jsonl:2: url is None"):
        list(urls_of("urls.jsonl"))
    Path("urls.jsonl").write_text('{"url": "http://h", "sha256": "123"}\n')
    with pytest.raises(DataError, match=r"urls.jsonl:1: sha256 is '123'"):
        list(urls_of("urls.jsonl"))
    Path("urls.txt").write_bytes(b"http://h/\xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        list(urls_of("urls.txt"))
    with pytest.raises(ConfigError, match=r"urls.csv must end with .txt, .jsonl or .parquet"):
        list(urls_of("urls.csv"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["urls=a.txt"], "dataset= is missing"),
        (["dataset=a", "colour=red"], "no option"),
        (["dataset=a", "dataset=b"], "twice"),
        (["dataset=../a"], "must be a name"),
        (["dataset=a", "retry=some"], "some"),
        (["dataset=a", "from_list=yes"], "neither true nor false"),
        (["dataset=a", "from_list=true", "urls=a.txt"], "leave urls"),
        (["dataset=a", "concurrency=0"], "concurrency=0"),
        (["dataset=a", "per_host=two"], "per_host=two"),
        (["dataset=a", "max_bytes=999999999999"], "max_bytes"),
        (["dataset=a", "total_s=inf"], "total_s"),
        (["dataset=a", "total_s=nan"], "total_s"),
        (["dataset=a", "user_agent=a\r\nX: b"], "printable"),
    ],
)
def test_wrong_options_are_refused_by_name(arguments, words):
    with pytest.raises(ConfigError, match=words):
        parse(arguments)


def test_refusals_of_the_command(workspace, capsys):
    write_urls([])
    Path("params.yaml").write_text("version: 2\ndatasets:\n  d: {family: digit_scenes}\n")
    for arguments, words in (
        (("dataset=nobody",), "nobody"),
        (("dataset=d",), "names nothing by URL"),
        (("dataset=photos", "urls=urls.txt"), "no URL in urls.txt"),
        (("dataset=photos", "from_list=true"), "no list"),
        (("dataset=photos", "urls=urls.txt", "list=s3://b/list.parquet"), "local file"),
    ):
        assert command(*arguments) == 2
        assert words in capsys.readouterr().err


def test_without_a_network_no_list_is_written(workspace, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        write_urls(f"http://127.0.0.1:{taken.getsockname()[1]}/{n}" for n in range(30))
        assert command("dataset=photos", "urls=urls.txt") == 2
        said = capsys.readouterr()
        assert "is there a network" in said.err and "0 of 30 URLs kept" in said.out
        assert not LIST.exists()
        assert command("dataset=photos", "urls=urls.txt", "update=true") == 0
    assert command("dataset=photos", "urls=urls.txt") == 0  # known by now, nothing is asked
    assert {(row.status, row.reason) for row in read_list(LIST)} == {
        (Status.CONNECTION, "no connection: Connection refused")
    }


def test_files_are_never_pruned(workspace):
    path = stored(Store())
    os.utime(path, (0, 0))
    params = params_from_dict({"version": 2, "datasets": {}}, "test")
    assert state.prune(params, days=1, journals=True) == []
    assert path.exists()


# ---- shards


def rows_of(urls):
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    lines = [{"id": f"r{n}", "images": [url], "messages": talk, "split": "train"} for n, url in enumerate(urls)]
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_shards_are_made_of_survivors_and_depend_on_the_list(site, workspace):
    """Rows of the own-data family that name pictures by URL, from the command to the shards."""
    site.replies = {f"/{n}": answer(picture(n).data) for n in range(3)}
    urls = [site.url(f"/{n}") for n in (0, 1, 7, 2)]
    rows_of(urls)
    Path("params.yaml").write_text(
        "version: 2\nseed: 3\ndatasets:\n  photos: {family: chat, path: rows.jsonl, eval_fraction: 0.0,"
        " downloads: data/downloads/photos.parquet}\n"
    )
    from molmo_model.config import load_params

    params = load_params("params.yaml")
    with pytest.raises(DataError, match="no list of downloads"):
        stage.run(shards.STAGE, params, dataset="photos")
    assert command("dataset=photos") == 0
    first = stage.run(shards.STAGE, params, dataset="photos")
    assert first.summary["examples"] == {"train": 3, "eval": 0}
    assert (first.summary["bad_rows"], first.summary["missing_downloads"]) == (0, 1)  # tolerance 0 bears it
    (line,) = Path("artifacts/shards/photos/problems.jsonl").read_text().splitlines()
    problem = json.loads(line)
    assert (problem["id"], problem["field"], problem["known"]) == ("r2", "images[0]", True)
    assert "gone: the server answers 404" in problem["reason"]
    assert stage.differences(shards.STAGE, params, {"dataset": "photos"}) == []

    site.replies["/7"] = answer(picture(7).data)  # the page is there again
    assert command("dataset=photos", "retry=failed") == 0
    assert any("downloads" in line for line in stage.differences(shards.STAGE, params, {"dataset": "photos"}))
    second = stage.run(shards.STAGE, params, dataset="photos")
    assert second.summary["examples"] == {"train": 4, "eval": 0}
    assert second.digest != first.digest

    rows_of([*urls, site.url("/8")])  # a row that the list does not know is no gap, it is a mistake
    with pytest.raises(DataError, match="older than the data"):
        stage.run(shards.STAGE, params, dataset="photos")


def test_the_guide_is_true(site, workspace, capsys, monkeypatch):
    """Its rows and its YAML are written, its commands run in order, and its tables name what there is."""
    guide = (ROOT / "docs" / "guides" / "url_datasets.md").read_text(encoding="utf-8")
    (rows,) = re.findall(r"```json\n(.*?)```", guide, re.DOTALL)
    (yaml_text,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    Path("params.yaml").write_text("version: 2\nseed: 3\n" + yaml_text)
    Path("data/photos").mkdir(parents=True)
    Path("data/photos/rows.jsonl").write_text(rows.replace("https://example.org", site.url("")))
    Path("data/photos/urls.txt").write_text(site.url("/cat.png\n"))
    site.replies = {"/cat.png": answer(picture(1).data), "/dog.png": answer(picture(2).data)}
    lines = [line.strip() for line in guide.splitlines() if line.startswith("    python -m pipelines.")]
    assert len(lines) == 6
    for line in lines:
        name, *arguments = line.removeprefix("python -m pipelines.").split(" ")
        if name == "shards":
            stage.main(shards.STAGE, arguments)
            assert "missing_downloads: 1" in capsys.readouterr().out
        else:
            assert command(*arguments) == 0, capsys.readouterr().err
    assert sorted(path.name for path in Path("data/downloads").iterdir()) == ["more.parquet", "photos.parquet"]
    assert site.asked == {"/cat.png": 2, "/dog.png": 1, "/gone/yak.png": 2}  # of the second list, and retry=failed
    columns, statuses = guide.split("## The list")[1].split("## What it may cost")[0].split("| status | |")
    named = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in columns.splitlines() if line.startswith("| `")]
    assert list(chain(*named)) == list(Download.__dataclass_fields__)
    named = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in statuses.splitlines() if line.startswith("| `")]
    assert sorted(chain(*named)) == sorted(status.value for status in Status)
    limits = Limits()
    for name, value in re.findall(r"`(\w+)=(\d+)`", guide):
        assert float(value) == getattr(limits, name)
