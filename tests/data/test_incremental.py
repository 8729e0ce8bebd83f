"""An incremental build has the bytes of a full one, whatever changed, whatever was damaged, whenever it was killed."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molmo_model import remembered
from molmo_model.artifacts import MANIFEST, Manifest, file_sha256, verify, write_manifest
from molmo_model.config import DatasetConfig, Params
from molmo_model.data.datasets import chat
from molmo_model.data.example import Example, Unchanged
from molmo_model.data.previous_shards import PreviousShards
from molmo_model.data.shards import INDEX, SCHEMA, write_shards
from molmo_model.errors import ArtifactError
from molmo_model.remembered import remembering
from pipelines import shards as shards_stage
from pipelines import stage as stages
from pipelines.stage import differences, run
from tests.data.builders import example, picture, rows
from tests.kills import in_child

KEY = {"dataset": "mine"}
TARGET = Path("artifacts/shards/mine")
LIMIT = 6_000
"""Bytes of a shard: a few examples."""


def content(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir() if path.name != MANIFEST}


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.tar")}


def finish(folder: Path) -> Manifest:
    return write_manifest(folder, schema=SCHEMA, version=1, params={}, inputs={}, code="", summary={})


# The writer


@st.composite
def edits(draw: st.DrawFn) -> tuple[list[tuple[str, int, int]], list[tuple[str, int, int]], list[bool]]:
    """Two lists of (split, number, text length), the second an edit of the first, and which rows of it are to be made
    anew although they did not change."""
    count = draw(st.integers(1, 40))
    before = [("eval" if number % 7 == 3 else "train", number, number % 9 + 1) for number in range(count)]
    after = list(before)
    for kind in draw(st.lists(st.sampled_from(["change", "grow", "add", "remove", "move", "side", "shuffle"]))):
        place = draw(st.integers(0, max(len(after) - 1, 0)))
        if kind == "add" or not after:
            after.insert(place, ("train", draw(st.integers(100, 400)), 3))
        elif kind == "remove":
            del after[place]
        elif kind == "move":
            after.append(after.pop(place))
        elif kind == "shuffle":
            draw(st.randoms()).shuffle(after)
        else:
            split, number, text = after[place]
            side = ("eval" if split == "train" else "train") if kind == "side" else split
            after[place] = (side, number, {"change": text + 1, "grow": 9_000}.get(kind, text))
    after = list({number: (split, number, text) for split, number, text in after}.values())
    return before, after, draw(st.lists(st.booleans(), min_size=len(after), max_size=len(after)))


def made(wanted: list[tuple[str, int, int]]) -> list[tuple[str, Example]]:
    return [(split, example(number, text=text, images=number % 3)) for split, number, text in wanted]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits())
def test_the_writer_makes_the_bytes_of_a_full_build(tmp_path: Path, edited) -> None:
    before, after, anew = edited
    shutil.rmtree(tmp_path)
    old, new, full = tmp_path / "old", tmp_path / "new", tmp_path / "full"
    write_shards(made(before), old, LIMIT)
    finish(old)
    write_shards(made(after), full, LIMIT)
    previous = PreviousShards(old)
    rows_of = {row["id"]: number for number, row in enumerate(previous.index.to_pylist())}
    facts = {(number, text) for _, number, text in before}
    given_: list[tuple[str, Example | Unchanged]] = [
        (split, one if again or wanted[1:] not in facts else Unchanged(one.id, rows_of[one.id]))
        for (split, one), wanted, again in zip(made(after), after, anew, strict=True)
    ]
    frozen = content(old)
    write_shards(given_, new, LIMIT, previous=previous)
    assert content(new) == content(full)
    assert content(old) == frozen
    same = {name for name, digest in content(full).items() if frozen.get(name) == digest and name != INDEX}
    assert same == {name for name, inode in inodes(new).items() if inodes(old).get(name) == inode}


def test_one_changed_example_rewrites_one_shard_and_leaves_the_files_of_the_others(tmp_path: Path) -> None:
    before = rows(range(300))
    write_shards(before, tmp_path / "old", LIMIT)
    finish(tmp_path / "old")
    previous = PreviousShards(tmp_path / "old")
    after: list[tuple[str, Example | Unchanged]] = [
        (split, Unchanged(one.id, row)) for row, (split, one) in enumerate(before)
    ]
    after[133] = ("train", example(133, text=5))
    write_shards(after, tmp_path / "new", LIMIT, previous=previous)
    old, new = inodes(tmp_path / "old"), inodes(tmp_path / "new")
    assert len(old) > 30 and old.keys() == new.keys()
    assert [name for name in old if old[name] != new[name]] == [previous.index["shard"][133].as_py()]


# The stage


def write_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(picture(number, 8 + number % 5).data)


def row(number: int, images: list[str], text: str = "an answer") -> dict[str, object]:
    turns = [{"role": "user", "content": f"what is {number}?"}, {"role": "assistant", "content": text}]
    return {"id": f"r-{number}", "images": images, "messages": turns}


def write_rows(wanted: list[dict[str, object]]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in wanted))


def params(**changes: object) -> Params:
    facts = {"family": "chat", "path": "rows.jsonl", "shard_bytes": LIMIT, "eval_fraction": 0.3, "tolerance": 0.9}
    return Params(seed=5, datasets={"mine": DatasetConfig(**{**facts, **changes})})  # type: ignore[arg-type]


def build(**changes: object) -> Manifest:
    return run(shards_stage.STAGE, params(**changes), **KEY)


def full_build(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> dict[str, str]:
    """The files of a build of the same data that knows of no other."""
    here = Path.cwd()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(here, folder, ignore=shutil.ignore_patterns("artifacts", ".state", "logs"))
    monkeypatch.chdir(folder)
    build(**changes)
    files = content(folder / TARGET)
    monkeypatch.chdir(here)
    return files


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Forty rows, of which some share a picture, have two or none; the working folder is theirs."""
    monkeypatch.delenv("MOLMO_STATE_DIR", raising=False)
    monkeypatch.setattr(remembered, "RACY_SECONDS", 0.0)  # the files of a test are never old
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for number in range(30):
        write_picture(Path(f"images/{number % 3}/{number}.png"), number)
    names = [f"images/{number % 3}/{number}.png" for number in range(30)]
    wanted = [row(number, [names[number % 30]]) for number in range(36)]
    wanted += [
        row(36, names[3:5]),
        row(37, [names[5], names[5]]),
        row(38, []),
        {**row(39, [names[6]]), "split": "eval"},
    ]
    write_rows(wanted)
    return wanted


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the rows that were made into examples."""
    seen: list[str] = []
    real = chat._example

    def counting(fields, *more):
        seen.append(fields.get("id"))
        return real(fields, *more)

    monkeypatch.setattr(chat, "_example", counting)
    return seen


def test_only_the_changed_row_is_read_and_only_its_shard_is_written(mine, conversions, tmp_path, monkeypatch) -> None:
    build()
    assert len(conversions) == 40
    before = inodes(TARGET)
    mine[17] = row(17, mine[17]["images"], "another answer")
    write_rows(mine)
    conversions.clear()
    reads: list[str] = []
    monkeypatch.setattr(remembered, "_read", lambda path, real=remembered._read: reads.append(path) or real(path))
    build()
    assert conversions == ["r-17"]
    after = inodes(TARGET)
    assert len(after) > 4 and len(set(after.values()) - set(before.values())) == 1
    assert not [path for path in reads if path.endswith(".png")], "no picture was read for its digest"
    assert len([path for path in reads if path.endswith(".tar")]) == 1
    assert content(TARGET) == full_build(tmp_path / "full", monkeypatch)
    conversions.clear()
    build()
    assert conversions == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_any_chain_of_edits_gives_what_a_full_build_gives(mine, tmp_path, monkeypatch, seed) -> None:
    draw = random.Random(seed)
    build()
    options: dict[str, object] = {}
    for _ in range(14):
        kind = draw.choice(
            ["text", "picture", "gone", "add", "remove", "rename", "double", "shuffle", "join", "ask", "limit", "share"]
        )
        one = draw.choice(mine)
        if kind == "text":
            one["messages"][1]["content"] = f"answer {draw.random()}"
        elif kind == "picture":
            place = Path(f"images/{draw.randrange(3)}")
            path = draw.choice(sorted(place.iterdir()))
            info = path.stat()
            write_picture(path, draw.randrange(1000))
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # as `cp -p` leaves it
        elif kind == "gone":
            draw.choice(sorted(Path("images/1").iterdir())).unlink()
        elif kind == "add":
            mine.insert(draw.randrange(len(mine)), row(draw.randrange(100, 999), ["images/0/3.png"]))
        elif kind == "remove":
            mine.remove(one)
        elif kind == "rename":
            one["id"] = f"new-{draw.randrange(10**6)}"
        elif kind == "double":
            mine.append(dict(one))
        elif kind == "shuffle":
            draw.shuffle(mine)
        elif kind == "join":
            one["images"] = ["images/0/0.png", f"images/2/{draw.choice((2, 5, 8))}.png"]
        elif kind == "ask":
            one["split"] = draw.choice(["train", "eval"])
        elif kind == "limit":
            options["train_examples"] = draw.choice([5, 20, None])
        else:
            options["eval_fraction"] = draw.choice([0.1, 0.5])
        write_rows(mine)
        made_now = build(**options)
        assert content(TARGET) == full_build(tmp_path / "full", monkeypatch, **options), kind
        assert verify(TARGET) == made_now


def test_other_options_and_other_code_make_every_row_again(mine, conversions, monkeypatch) -> None:
    build()
    conversions.clear()
    build(options={"style": "other"})
    assert len(conversions) == 40
    conversions.clear()
    real = chat.source_digest
    monkeypatch.setattr(chat, "source_digest", lambda *one, **more: "0" + real(*one, **more))
    monkeypatch.setattr(stages, "source_digest", lambda module: "f" * 64)
    build(options={"style": "other"})
    assert len(conversions) == 40


def test_another_family_links_what_came_out_equal(mine, monkeypatch, tmp_path) -> None:
    """Without a memory of rows all are made again, and yet only the shard that changed is written."""
    from molmo_model.data.datasets import FAMILIES, Family

    number = 3

    def make(config, seed):
        for split, one in rows(range(60)):
            yield split, example(3, text=number) if one.id == "e-3" else one

    family = Family(make, lambda config, seed: {"toy": str(number)}, dict, "CC0-1.0", "made up")
    monkeypatch.setitem(FAMILIES, "toy", family)
    build(family="toy")
    before = inodes(TARGET)
    number = 4
    build(family="toy")
    assert len(set(inodes(TARGET).values()) - set(before.values())) == 1
    assert content(TARGET) == full_build(tmp_path / "full", monkeypatch, family="toy")


def shard_of(name: str) -> Path:
    table = PreviousShards(TARGET).index
    return TARGET / table["shard"][table["id"].to_pylist().index(name)].as_py()


def flip(path: Path, keep_time: bool = False) -> None:
    """Changes the last letter of the first answer in a file, in place: its state and every link share the damage."""
    info, data = path.stat(), path.read_bytes()
    at = data.index(b"an answer") + 8
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"s")
    if keep_time:
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def change(mine: list[dict[str, object]], number: int) -> None:
    mine[number]["messages"][1]["content"] = "another answer"
    write_rows(mine)


def neighbour_of(name: str) -> str:
    """Another example of the same shard that comes before it."""
    table = PreviousShards(TARGET).index.to_pylist()
    shard = shard_of(name).name
    return next(one["id"] for one in table if one["shard"] == shard and one["id"] != name)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "flipped in the shard that is rewritten": lambda own, other: flip(own),
    "flipped there, with its time put back": lambda own, other: flip(own, keep_time=True),
    "flipped in a shard that is linked": lambda own, other: flip(other),
    "cut": lambda own, other: os.truncate(other, 1000),
    "missing": lambda own, other: [path.unlink() for path in Path().rglob(other.name)],
    "index edited": lambda own, other: (TARGET / INDEX).write_bytes((TARGET / INDEX).read_bytes()[:-9] + b"123456789"),
    "manifest edited": lambda own, other: [path.write_text("{}") for path in Path().rglob(MANIFEST)],
    "memory edited": lambda own, other: [path.write_bytes(b"no") for path in Path(".state/rows").iterdir()],
    "database edited": lambda own, other: Path(".state", remembered.FILE).write_bytes(b"no" * 5000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_the_previous_artefact_is_never_carried_over(mine, damage, tmp_path, monkeypatch) -> None:
    build()
    own = shard_of("r-20")
    other = next(path for path in sorted(TARGET.glob("*.tar")) if path != own and b"an answer" in path.read_bytes())
    change(mine, 20)
    DAMAGES[damage](own, other)
    manifest = build()
    assert content(TARGET) == full_build(tmp_path / "full", monkeypatch)
    assert verify(TARGET) == manifest


def test_the_limit_a_linked_file_whose_time_was_put_back_is_found_by_verification(mine) -> None:
    """What `molmo_model.remembered` says of stale entries: a run does not see it, whoever asks for a reading does."""
    build()
    other = next(path for path in sorted(TARGET.glob("*.tar")) if path != shard_of("r-20"))
    change(mine, 20)
    flip(other, keep_time=True)
    build()
    with pytest.raises(ArtifactError, match=rf"{other.name} has SHA-256"):
        verify(TARGET)
    assert other.name in differences(shards_stage.STAGE, params(), KEY)[0]


@pytest.mark.slow
def test_killed_in_the_middle_the_old_artefact_comes_back_and_the_next_run_is_right(
    mine, tmp_path, monkeypatch
) -> None:
    old = build().digest
    before = Path("rows.jsonl").read_text()
    change(mine, 20)
    after = Path("rows.jsonl").read_text()
    wanted = full_build(tmp_path / "full", monkeypatch)
    for kill_at in range(1, 200, 8):
        Path("rows.jsonl").write_text(after)
        ended = in_child(build, kill_at)
        if kill_at % 16 == 1:  # yesterday's data cost nothing
            Path("rows.jsonl").write_text(before)
            assert build().digest == old and verify(TARGET).digest == old
            Path("rows.jsonl").write_text(after)
        build()
        assert content(TARGET) == wanted, kill_at
        if ended == 0:
            assert kill_at > 30, "the hook sees the changes"
            return
        Path("rows.jsonl").write_text(before)
        build()
        for state in Path(".state/shards").iterdir():  # only the old one is left
            if (state / "out" / MANIFEST).exists() and verify(state / "out").digest != old:
                shutil.rmtree(state)
    pytest.fail("never survived")


def test_after_a_pull_the_published_artefact_is_what_is_taken_from(mine, conversions) -> None:
    build()
    before = inodes(TARGET)
    shutil.rmtree(".state")
    change(mine, 20)
    build()
    assert len(conversions) == 80, "no row was known any more"
    assert len(set(inodes(TARGET).values()) - set(before.values())) == 1


@pytest.mark.slow
def test_two_builds_have_the_same_bytes_whatever_the_place_the_clock_and_the_order_of_sets(mine, tmp_path) -> None:
    text = "version: 2\nseed: 5\ndatasets:\n  mine: {family: chat, path: rows.jsonl, shard_bytes: 6000}\n"
    manifests = []
    for name, zone, mask, seed in (("a", "UTC", 0o022, "1"), ("b b/c", "Asia/Tokyo", 0o077, "2")):
        place = tmp_path / name
        shutil.copytree(Path.cwd(), place)
        (place / "params.yaml").write_text(text)
        for path in place.rglob("*.png"):
            os.utime(path, (len(name), 10**9))
        environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": str(len(name))}
        environment["PYTHONPATH"] = str(Path(shards_stage.__file__).parents[1])
        command = [sys.executable, "-m", "pipelines.shards"]
        subprocess.run(command, cwd=place, env=environment, umask=mask, check=True, capture_output=True)
        manifests.append((place / TARGET / MANIFEST).read_bytes())
    assert manifests[0] == manifests[1]


# The memory


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(remembered, "_read", lambda path, real=remembered._read: seen.append(path) or real(path))
    return seen


def age(path: Path) -> None:
    """As if it was not touched for long, as far as a test can say so."""
    os.utime(path, (10**9, 10**9))


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch, reads) -> None:
    monkeypatch.setattr(remembered, "RACY_SECONDS", 0.0)
    path = tmp_path / "file"
    path.write_bytes(b"one")
    for expected in (1, 1):
        with remembering(tmp_path / "state") as run_:
            assert run_.sha256(path) == hashlib.sha256(b"one").hexdigest()
        assert len(reads) == expected
    info = path.stat()
    path.write_bytes(b"two")  # of the same size
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # and time: ctime tells
    with remembering(tmp_path / "state") as run_:
        assert run_.sha256(path) == hashlib.sha256(b"two").hexdigest()
        os.link(path, tmp_path / "link")
        run_.linked(path, tmp_path / "link")
        run_.flush()
    reads.clear()
    with remembering(tmp_path / "state") as run_:
        assert run_.sha256(tmp_path / "link") == run_.sha256(path) == hashlib.sha256(b"two").hexdigest()
        path.unlink()
        assert run_.sha256(tmp_path / "link") == hashlib.sha256(b"two").hexdigest()
    assert reads == []


def test_a_file_that_may_still_be_changing_is_not_remembered(tmp_path, reads) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    for expected in (1, 2):
        with remembering(tmp_path / "state") as run_:
            run_.sha256(path)
        assert len(reads) == expected
    with remembering(tmp_path / "state") as run_:
        os.link(path, tmp_path / "link")  # of several links, only the time of change counts
        age(path)
        run_.sha256(path)
        run_.sha256(path)
    assert len(reads) == 3


def test_outside_of_a_run_everything_is_read(mine) -> None:
    build()
    assert remembered.current() is None
    for path in TARGET.glob("*.tar"):
        flip(path, keep_time=True) if b"an answer" in path.read_bytes() else None
    with pytest.raises(ArtifactError):
        verify(TARGET)


def test_many_processes_share_a_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(remembered, "RACY_SECONDS", 0.0)
    paths = [tmp_path / str(number) for number in range(60)]
    for number, path in enumerate(paths):
        path.write_bytes(str(number).encode())
    children = []
    for first in range(4):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                for path in paths[first * 10 :]:
                    with remembering(tmp_path / "state") as run_:
                        run_.sha256(path)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    with remembering(tmp_path / "state") as run_:
        for number, path in enumerate(paths):
            assert run_.sha256(path) == hashlib.sha256(str(number).encode()).hexdigest()


def test_rows_of_a_parquet_file_are_known_too(mine, conversions, tmp_path, monkeypatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write() -> None:
        held = [{"bytes": picture(int(str(one["id"])[2:])).data, "path": None} for one in mine]
        texts = [one["messages"] for one in mine]
        ids = [one["id"] for one in mine]
        pq.write_table(pa.table({"id": ids, "image": held, "messages": texts}), "rows.parquet")

    write()
    build(path="rows.parquet")
    assert len(conversions) == 40
    conversions.clear()
    mine[20]["messages"][1]["content"] = "another answer"
    mine.append(mine.pop(3))
    write()
    build(path="rows.parquet")
    assert conversions == ["r-20"]
    assert content(TARGET) == full_build(tmp_path / "full", monkeypatch, path="rows.parquet")
