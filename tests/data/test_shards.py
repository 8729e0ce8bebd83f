import hashlib
import json
import multiprocessing
import os
import pickle
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_model.artifacts import write_manifest
from molmo_model.data import shard_reader
from molmo_model.data.datasets import FAMILIES, BadRow, Family
from molmo_model.data.example import Example
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import SCHEMA, member_key, write_shards
from molmo_model.errors import ArtifactError, DataError
from pipelines import shards as shards_stage
from pipelines.stage import run
from tests.data.builders import example, picture, rows, talk


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def digest(folder: Path) -> str:
    return write_manifest(folder, schema=SCHEMA, version=1, params={}, inputs={}, code="", summary={}).digest


def test_every_example_comes_back_as_it_was(tmp_path):
    made = rows(range(60))
    made[7] = ("train", example(7, images=3))
    made[8] = ("train", example(8, images=0))
    write_shards(made, tmp_path, 8_000)
    reader = ShardReader(tmp_path)
    assert len(reader) == 60
    assert [reader.read(row) for row in range(60)] == [one for _, one in made]
    assert reader.rows("eval") == [row for row, (split, _) in enumerate(made) if split == "eval"]
    assert reader.rows("train") == [row for row, (split, _) in enumerate(made) if split == "train"]
    assert reader.index["styles"].to_pylist() == [[c.style for c in one.conversations] for _, one in made]
    assert reader.index["image_sha256"].to_pylist() == [[i.sha256 for i in one.images] for _, one in made]
    assert len(set(reader.index["shard"].to_pylist())) > 4


def test_facts_are_texts_and_sizes_without_pixels(tmp_path):
    write_shards([("train", example(3, images=2))], tmp_path, 8_000)
    reader = ShardReader(tmp_path)
    facts, whole = reader.facts(0), reader.read(0)
    assert facts.conversations == whole.conversations
    assert [(i.width, i.height) for i in facts.images] == [(i.width, i.height) for i in whole.images]
    assert all(len(image.data) == 1 for image in facts.images)


def test_plain_tar_lists_the_members_and_groups_like_webdataset(tmp_path):
    made = {one.id: one for _, one in rows(range(30))}
    made["with.dot/and space"] = replace(example(31, images=2), id="with.dot/and space")
    write_shards((("train", one) for one in made.values()), tmp_path, 10**9)
    with tarfile.open(tmp_path / "shards-train-all.tar") as tar:
        members = tar.getmembers()
        contents = [(member.name, tar.extractfile(member).read()) for member in members]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    # WebDataset's rule: consecutive members with equal names up to the first dot of the file name are one sample
    samples: list[tuple[str, dict[str, bytes]]] = []
    for name, content in contents:
        folder, _, base = name.rpartition("/")
        key, _, ending = base.partition(".")
        key = f"{folder}/{key}"
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        samples[-1][1][ending] = content
    assert len(samples) == len(made) == len({key for key, _ in samples})
    for _, sample in samples:
        one = made[json.loads(sample["json"])["id"]]
        assert [sample[f"{k}.png"] for k in range(len(one.images))] == [image.data for image in one.images]
        assert len(sample) == 1 + len(one.images)


def test_tar_and_webdataset_read_what_was_put_in(tmp_path):
    import webdataset

    made = {one.id: one for _, one in rows(range(30))}
    made["with.dot/and space"] = replace(example(31, images=2), id="with.dot/and space")
    write_shards((("train", one) for one in made.values()), tmp_path, 10**9)
    shard = tmp_path / "shards-train-all.tar"
    subprocess.run(["tar", "-xf", shard], cwd=tmp_path, check=True)
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert len(samples) == len(made)
    for sample in samples:
        one = made[json.loads(sample["json"])["id"]]
        for ending, content in [("json", None), *((f"{k}.png", image.data) for k, image in enumerate(one.images))]:
            assert sample[ending] == (tmp_path / f"{sample['__key__']}.{ending}").read_bytes()
            assert content in (None, sample[ending])


def test_one_range_of_the_tar_is_one_example(tmp_path):
    write_shards(rows(range(40)), tmp_path, 8_000)
    for row in ShardReader(tmp_path).index.to_pylist():
        data = (tmp_path / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        assert hashlib.sha256(data).hexdigest() == row["sha256"]


def test_two_builds_have_one_digest_whatever_the_clock_and_folder(tmp_path, monkeypatch):
    write_shards(rows(range(50)), tmp_path / "a", 8_000)
    monkeypatch.setattr("time.time", lambda: 4e9)
    old = os.umask(0o077)
    try:
        write_shards(rows(range(50)), tmp_path / "b" / "deeper", 8_000, scratch=tmp_path)
    finally:
        os.umask(old)
    assert digest(tmp_path / "a") == digest(tmp_path / "b" / "deeper")


@pytest.mark.parametrize("text", [1, 300, 30_000])
def test_a_changed_example_rewrites_only_its_own_shard(tmp_path, text):
    before = rows(range(200))
    write_shards(before, tmp_path / "before", 8_000)
    for number in (0, 57, 133, 199):
        after = list(before)
        after[number] = (before[number][0], example(number, text=text))
        out = tmp_path / f"after{number}"
        write_shards(after, out, 8_000)
        old, new = files(tmp_path / "before"), files(out)
        changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)} - {"index.parquet"}
        own = ShardReader(tmp_path / "before").index["shard"][number].as_py().removesuffix(".tar")
        # the shard itself; if it grew too large, the parts it was split in, whose names begin with its own
        assert all(name.startswith(own) for name in changed), (own, changed)


def test_an_added_or_removed_example_rewrites_only_its_own_shard(tmp_path):
    made = rows(range(200))
    write_shards(made, tmp_path / "before", 8_000)
    write_shards(made[:90] + made[91:], tmp_path / "after", 8_000)
    old, new = files(tmp_path / "before"), files(tmp_path / "after")
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)} - {"index.parquet"}
    own = ShardReader(tmp_path / "before").index["shard"][90].as_py().removesuffix(".tar")
    assert own + ".tar" in changed
    assert all(name.startswith(own[:-1]) for name in changed)  # itself, or the parent that two halves became


def test_shards_keep_to_their_size(tmp_path):
    write_shards(rows(range(300)), tmp_path, 20_000)
    sizes = [path.stat().st_size for path in tmp_path.glob("shards-train-*.tar")]
    assert max(sizes) <= 20_000 + 1024
    assert sum(sizes) / len(sizes) > 7_000  # halving an evenly hashed set fills a shard at least a third


@pytest.mark.parametrize("place", ["json", "picture"])
def test_one_flipped_bit_is_found_and_named(tmp_path, place):
    write_shards(rows(range(20)), tmp_path, 10**9)
    reader = ShardReader(tmp_path)
    row = reader.index.slice(11, 1).to_pylist()[0]
    at = row["offset"] + (600 if place == "json" else row["text_size"] + 600)
    path = tmp_path / row["shard"]
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"e-11.*SHA-256"):
        reader.read(11)
    assert reader.read(12).id == "e-12"


def test_missing_and_cut_shards_are_named(tmp_path):
    write_shards(rows(range(20)), tmp_path, 10**9)
    path = tmp_path / "shards-train-all.tar"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"e-19.*the index says"):
        ShardReader(tmp_path).read(19)
    path.unlink()
    with pytest.raises(DataError, match=r"shards-train-all.tar.*e-1"):
        ShardReader(tmp_path).read(1)
    with pytest.raises(DataError, match="row 20 does not exist; there are 20"):
        ShardReader(tmp_path).read(20)
    (tmp_path / "index.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"index.parquet"):
        ShardReader(tmp_path)


def test_ids_must_be_unique_and_splits_known(tmp_path):
    with pytest.raises(DataError, match=r"'e-4' comes twice"):
        write_shards([*rows(range(9)), ("train", example(4))], tmp_path, 10**9)
    with pytest.raises(DataError, match=r"'test' is not one of train, eval"):
        write_shards([("test", example(4))], tmp_path, 10**9)
    with pytest.raises(DataError, match=r"'test' is not one of train, eval"):
        write_shards([], tmp_path, 10**9)
        ShardReader(tmp_path).rows("test")


@settings(max_examples=200, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=80), min_size=2, max_size=20))
def test_member_keys_are_safe_and_distinct(ids):
    keys = {member_key(one) for one in ids}
    assert len(keys) == len(ids)
    for key in keys:
        assert key.isascii() and len(key) <= 80 and "." not in key and "/" not in key and not key.startswith("_")


def test_threads_forks_and_pickles_read_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_reader, "MAX_OPEN_FILES", 3)  # fewer than there are shards
    write_shards(rows(range(80)), tmp_path, 8_000)
    reader = ShardReader(tmp_path)
    expected = [reader.read(row) for row in range(80)]
    order = [row * 37 % 80 for row in range(400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.read, order)) == [expected[row] for row in order]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(reader.read, order) == [expected[row] for row in order]
    assert pickle.loads(pickle.dumps(reader)).read(3) == expected[3]


def test_a_reader_closes_its_files(tmp_path):
    write_shards(rows(range(80)), tmp_path, 8_000)
    opened = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(tmp_path)
    for row in range(80):
        reader.read(row)
    assert len(os.listdir("/proc/self/fd")) > opened
    del reader
    assert len(os.listdir("/proc/self/fd")) == opened


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A family of 12 rows, of which the numbers in `bad` are bad; runs its stage in a folder of its own."""
    from molmo_model.config import DatasetConfig, Params

    monkeypatch.chdir(tmp_path)
    bad: set[int] = set()

    def make(config, seed):
        for number in range(12):
            if number in bad:
                yield "train", BadRow("toy.jsonl", number + 1, f"e-{number}", "images[0]", "does not exist")
            else:
                yield ("eval" if number % 4 == 0 else "train"), example(number + seed)

    family = Family(make, lambda config, seed: {"toy": str(sorted(bad))}, dict, "CC0-1.0", "made up")
    monkeypatch.setitem(FAMILIES, "toy", family)

    def build(bad_rows: set[int], tolerance: float):
        bad.clear()
        bad.update(bad_rows)
        return run(
            shards_stage.STAGE,
            Params(seed=5, datasets={"toy": DatasetConfig(family="toy", tolerance=tolerance)}),
            dataset="toy",
        )

    return build


def test_the_stage_counts_what_it_wrote(toy):
    manifest = toy(set(), 0.0)
    assert manifest.summary["examples"] == {"train": 9, "eval": 3}
    assert manifest.summary["bad_rows"] == 0 and manifest.summary["licence"] == "CC0-1.0"
    reader = ShardReader("artifacts/shards/toy")
    assert reader.digest == manifest.digest
    assert manifest.summary["bytes"] == sum(reader.index["size"].to_pylist())
    assert Path("artifacts/shards/toy/problems.jsonl").read_text() == ""
    assert toy(set(), 0.0).digest == manifest.digest


def test_bad_rows_within_the_tolerance_are_listed_and_beyond_it_refused(toy):
    manifest = toy({2, 5}, 2 / 12)
    assert manifest.summary["bad_rows"] == 2 and manifest.summary["examples"] == {"train": 7, "eval": 3}
    lines = [json.loads(line) for line in Path("artifacts/shards/toy/problems.jsonl").read_text().splitlines()]
    found = [(line["line"], line["id"], line["field"]) for line in lines]
    assert found == [(3, "e-2", "images[0]"), (6, "e-5", "images[0]")]
    with pytest.raises(DataError, match=r"2 of 12 rows are bad \(16\.67%\).*allows 16\.00%") as error:
        toy({2, 5}, 0.16)
    assert "toy.jsonl:3 id 'e-2' field images[0]: does not exist" in str(error.value)
    assert "toy.jsonl:6 id 'e-5' field images[0]: does not exist" in str(error.value)
    assert not Path("artifacts/shards/toy").exists()
    with pytest.raises(DataError, match="12 of 12 rows are bad") as error:
        toy(set(range(12)), 0.99)
    assert "and 2 more" in str(error.value)


def test_an_empty_dataset_is_refused(toy, monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", replace(FAMILIES["toy"], make=lambda config, seed: iter(())))
    with pytest.raises(DataError, match="'toy' is empty"):
        toy(set(), 0.0)


def test_example_with_unusual_formats_and_texts(tmp_path):
    one = Example("ünï/代.x", (replace(picture(1), format="JPEG"), picture(2)), (talk("qa", "ja \u2028 nein"),))
    write_shards([("train", one)], tmp_path, 10)
    assert ShardReader(tmp_path).read(0) == one
    with tarfile.open(tmp_path / "shards-train-all.tar") as tar:
        assert [name.split(".", 1)[1] for name in tar.getnames()] == ["json", "0.jpg", "1.png"]
