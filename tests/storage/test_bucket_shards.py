"""Training's way to its examples when the shards lie in a bucket of a real server."""

import hashlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from molmo_model import storage
from molmo_model.artifacts import write_manifest
from molmo_model.data.example import Example
from molmo_model.data.loader import Loader, generator
from molmo_model.data.mixture import Draw
from molmo_model.data.plan import Plan
from molmo_model.data.range_cache import RangeCache
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import SCHEMA
from molmo_model.errors import ArtifactError, DataError
from tests.data.builders import make_mixture, make_plan, train_config

PACKS = 5


def encode(example: Example, draw: Draw, key: int) -> np.ndarray:
    content = repr((example.to_json(), [file.sha256 for file in example.files], draw, generator(key).random(2)))
    return np.frombuffer(hashlib.sha256(content.encode()).digest(), np.int64)


def collate(packs: list[list[np.ndarray]]) -> dict[str, torch.Tensor]:
    (pack,) = packs
    return {"row": torch.tensor(np.concatenate(pack).tolist())}


def steps(plan: Plan, workers: int, start_method: str = "fork") -> list[list[int]]:
    loader = Loader(plan, encode, collate, 0, 1, PACKS, workers=workers, start_method=start_method)
    with loader:
        return [batch["row"].tolist() for step in (1, 2, 3) for batch in loader.step(step)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two datasets as finished artefacts, and a mixture of them."""
    folder = tmp_path_factory.mktemp("data")
    plan = make_plan(folder)
    for name in plan.readers:
        write_manifest(folder / name, schema=SCHEMA, version=1, params={}, inputs={}, code="", summary={})
    return plan


@pytest.fixture(scope="module")
def expected(local: Plan) -> list[list[int]]:
    return steps(local, 0)


@pytest.fixture(params=["s3", "gs", "weka"])
def root(request: pytest.FixtureRequest, local: Plan, tmp_path: Path) -> str:
    """The shards of both datasets in a bucket of their own."""
    names = {"s3": "s3_environment", "gs": "gcs_environment", "weka": "weka_environment"}
    request.getfixturevalue(names[request.param])
    bucket = f"shards-{os.getpid()}-{abs(hash(str(tmp_path))) % 10**8}"
    storage.filesystem(f"{request.param}://").mkdir(bucket)
    url = f"{request.param}://{bucket}/prefix"
    for name, reader in local.readers.items():
        storage.copy_tree(reader.path, f"{url}/{name}")
    return url


def saved(plan: Plan, folder: Path) -> Path:
    """The plan's mixture as an artefact that names the shards by digest."""
    mixture = make_mixture(dict(plan.readers))
    mixture.info["shards"] = {name: reader.digest for name, reader in plan.readers.items()}
    folder.mkdir()
    mixture.save(folder, {name: reader.index["id"].to_pylist() for name, reader in plan.readers.items()})
    return folder


def remote_plan(local: Plan, root: str, folder: Path, cache: RangeCache | None = None) -> Plan:
    shards: dict[str, str | Path] = {name: f"{root}/{name}" for name in local.readers}
    return Plan.load(saved(local, folder), shards, train_config(), cache)


@pytest.mark.slow
def test_a_bucket_gives_the_batches_of_the_folder(local, root, expected, tmp_path):
    cache = RangeCache(tmp_path / "cache", 10**9)
    plan = remote_plan(local, root, tmp_path / "mixture", cache)
    assert steps(plan, 0) == expected
    drawn = [draw for pack in range(3 * PACKS) for draw in local.pack(pack)]
    hashes = {local.readers[draw.dataset].index["sha256"][draw.row].as_py() for draw in drawn}
    assert len(hashes) > 20 and hashes <= {path.name for path in (tmp_path / "cache").glob("??/*")}
    uncached = remote_plan(local, root, tmp_path / "again")
    # connections and threads exist before the fork
    assert uncached.readers["d0"].read(0) == local.readers["d0"].read(0)
    assert steps(uncached, 2) == expected
    if root.startswith("s3"):  # no other server makes a difference to a pickle
        assert steps(uncached, 1, "spawn") == expected

    for name, reader in local.readers.items():  # where the shards themselves are missing
        for file in ("index.parquet", "manifest.json"):
            storage.filesystem(root).pipe_file(f"{root}/bare/{name}/{file}", (reader.path / file).read_bytes())
    bare = remote_plan(local, f"{root}/bare", tmp_path / "bare", cache)
    assert steps(bare, 2) == expected  # all out of the cache
    lost = ShardReader(f"{root}/bare/d0")
    message = rf"{root}/bare/d0/shards-.*{lost.id(3)!r}.*does not exist"
    with pytest.raises(DataError, match=message):
        lost.read(3)
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(DataError, match=message):
        pool.apply(lost.read, (3,))


@pytest.mark.slow
@pytest.mark.parametrize("root", ["s3"], indirect=True)
def test_a_corrupt_object_and_other_shards_are_refused(local, root, tmp_path):
    d0 = local.readers["d0"]
    row = d0.index.slice(4, 1).to_pylist()[0]
    url = f"{root}/d0/{row['shard']}"
    data = bytearray(storage.read_range(url))
    data[row["offset"] + row["text_size"] + 600] ^= 1
    storage.filesystem(root).pipe_file(url, bytes(data))
    plan = remote_plan(local, root, tmp_path / "mixture")
    with pytest.raises(DataError, match=rf"{url} at {row['offset']} \(row 4, example {row['id']!r}\): SHA-256"):
        plan.readers["d0"].read(4)
    storage.copy_tree(local.readers["d1"].path, f"{root}/d0")  # d0 now holds what d1 should
    with pytest.raises(ArtifactError, match=r"was made from shards \w+ of dataset 'd0'.*/d0 holds"):
        remote_plan(local, root, tmp_path / "other")
