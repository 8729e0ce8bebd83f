import hashlib
import itertools
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molmo_model.data.example import Example
from molmo_model.data.loader import Loader, Skipped, generator
from molmo_model.data.mixture import Draw
from molmo_model.data.plan import Plan
from molmo_model.errors import ConfigError, DataError, StorageError
from tests.data.builders import make_plan

PACKS = 5
STEPS = 6


def encode(example: Example, draw: Draw, key: int) -> np.ndarray:
    """Everything that must not depend on ranks and workers: the example, its conversations, and its random draws."""
    content = repr((example.to_json(), draw, generator(key).random(4).tolist()))
    return np.frombuffer(hashlib.sha256(content.encode()).digest(), np.int64)


def collate(packs: list[list[np.ndarray]]) -> dict[str, torch.Tensor]:
    """One row per pack: a hash over its examples in order; zeros for an empty pack."""
    rows = [hashlib.sha256(np.concatenate(pack).tobytes()).digest() if pack else bytes(32) for pack in packs]
    return {"row": torch.tensor([np.frombuffer(row, np.int64).tolist() for row in rows])}


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    return make_plan(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    import multiprocessing

    assert not [child for child in multiprocessing.active_children() if child.name == "molmo-loader"]


def global_batch(loaders: list[Loader], step: int) -> list[list[int]]:
    """The rows of a step in pack order: pack i is the (i // world)-th row of rank i % world."""
    world = len(loaders)
    ranks = [torch.cat([batch["row"] for batch in loader.step(step)]).tolist() for loader in loaders]
    assert len({len(rank) for rank in ranks}) == 1
    rows = [ranks[pack % world][pack // world] for pack in range(PACKS)]
    filled = sum(row != [0] * 4 for rank in ranks for row in rank)
    assert filled == PACKS  # nothing but these packs
    return rows


def loaders(plan: Plan, world: int, microbatch: int = 1, workers: int = 0) -> list[Loader]:
    return [Loader(plan, encode, collate, rank, world, PACKS, microbatch, workers) for rank in range(world)]


@pytest.fixture(scope="module")
def expected(plan) -> list[list[list[int]]]:
    (alone,) = loaders(plan, 1)
    return [global_batch([alone], step) for step in range(1, STEPS + 1)]


def test_a_step_is_made_of_the_packs_of_the_plan(plan, expected):
    for step, rows in enumerate(expected):
        packs = [plan.pack(step * PACKS + i) for i in range(PACKS)]
        by_hand = collate([[encode(plan.read(draw), draw, draw.key) for draw in pack] for pack in packs])
        assert by_hand["row"].tolist() == rows


@pytest.mark.parametrize("microbatch", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_ranks_microbatches_and_restarts_do_not_change_the_batches(plan, expected, world, microbatch):
    for start, stop in ((1, STEPS), (4, STEPS), (STEPS, STEPS), (2, 3)):
        group = loaders(plan, world, microbatch)
        assert [global_batch(group, step) for step in range(start, stop + 1)] == expected[start - 1 : stop]
        assert len({loader.microbatches for loader in group}) == 1
        shapes = {batch["row"].shape for loader in group for batch in loader.step(start)}
        assert len(shapes) == 1  # equally many rows in every micro-batch of every rank


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_workers_do_not_change_the_batches(plan, expected, world, workers):
    group = loaders(plan, world, 2, workers)
    try:
        assert [global_batch(group, step) for step in (1, 2)] == expected[:2]
        # back and ahead, as after loading a checkpoint, with batches in flight
        assert [global_batch(group, step) for step in (5, 6)] == expected[4:]
        assert global_batch(group, 3) == expected[2]
    finally:
        for loader in group:
            loader.close()


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
@pytest.mark.slow
def test_other_ways_to_start_workers(plan, expected, start_method):
    with Loader(plan, encode, collate, 0, 1, PACKS, 5, workers=1, start_method=start_method) as loader:
        assert loader.step(4)[0]["row"].tolist() == expected[3]


def test_workers_leave_the_global_generators_alone(plan):
    torch.manual_seed(3)
    before = torch.get_rng_state().clone()
    with Loader(plan, encode, collate, 0, 1, PACKS, workers=1) as loader:
        loader.step(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_prefetch_but_not_without_bound(plan, tmp_path):
    def noting(example: Example, draw: Draw, key: int) -> np.ndarray:
        with open(tmp_path / "made", "a") as file:
            file.write(f"{draw.position}\n")
        return encode(example, draw, key)

    with Loader(plan, noting, collate, 0, 1, PACKS, PACKS, workers=2) as loader:
        loader.step(1)
        deadline = time.time() + 30
        wanted = sum(
            len(plan.pack(p)) for p in range(5 * PACKS)
        )  # the step taken and two ahead for each of two workers
        while len((tmp_path / "made").read_text().split()) < wanted and time.time() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        assert len((tmp_path / "made").read_text().split()) == wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_an_example_that_cannot_be_encoded_is_named(plan, workers):
    broken = plan.pack(8)[1]

    def failing(example: Example, draw: Draw, key: int) -> np.ndarray:
        if draw.position == broken.position:
            raise ValueError("cannot decode")
        return encode(example, draw, key)

    name = plan.readers[broken.dataset].index["id"][broken.row].as_py()
    with Loader(plan, failing, collate, 0, 1, PACKS, workers=workers) as loader:
        loader.step(1)
        with pytest.raises(
            DataError, match=rf"'{name}' of dataset '{broken.dataset}'.*pack 8.*ValueError: cannot decode"
        ):
            loader.step(2)
        assert len(loader.step(3)) == PACKS  # and it can go on


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_shard_is_named(tmp_path, workers):
    plan = make_plan(tmp_path)
    broken = plan.pack(0)[0]
    reader = plan.readers[broken.dataset]
    row = reader.index.slice(broken.row, 1).to_pylist()[0]
    path = reader.path / row["shard"]
    data = bytearray(path.read_bytes())
    data[row["offset"] + 700] ^= 255
    path.write_bytes(bytes(data))
    with (
        Loader(plan, encode, collate, 0, 1, PACKS, workers=workers) as loader,
        pytest.raises(DataError, match=rf"'{row['id']}'.*SHA-256"),
    ):
        loader.step(1)


def bad_plan(folder: Path) -> tuple[Plan, set[tuple[str, int]]]:
    """A plan with a corrupt example of d0 (a flipped byte), and what `failing` refuses: three rows of d1."""
    plan = make_plan(folder)
    reader = plan.readers["d0"]
    broken = {("d0", plan.mixture.entries[0].rows.tolist()[5])}
    row = reader.index.slice(next(iter(broken))[1], 1).to_pylist()[0]
    data = bytearray((reader.path / row["shard"]).read_bytes())
    data[row["offset"] + 700] ^= 255
    (reader.path / row["shard"]).write_bytes(bytes(data))
    return plan, broken | {("d1", 3), ("d1", 7), ("d1", 12)}


def failing(example: Example, draw: Draw, key: int) -> np.ndarray:
    if (draw.dataset, draw.row) in {("d1", 3), ("d1", 7), ("d1", 12)}:
        raise ValueError(f"cannot decode <BytesIO object at 0x{id(example):x}>")
    return encode(example, draw, key)


def skipping(plan: Plan, world: int, microbatch: int, workers: int) -> list[Loader]:
    return [
        Loader(plan, failing, collate, rank, world, PACKS, microbatch, workers, skip_bad=True) for rank in range(world)
    ]


def rows_and_skipped(group: list[Loader], step: int) -> tuple[list[list[int]], list[Skipped]]:
    """The rows of a step in pack order (an empty pack is zeros), and all that was left out, in pack order."""
    ranks = [torch.cat([batch["row"] for batch in loader.step(step)]).tolist() for loader in group]
    skipped = sorted((one for loader in group for one in loader.skipped), key=lambda one: one.pack)
    return [ranks[pack % len(group)][pack // len(group)] for pack in range(PACKS)], skipped


def test_bad_examples_are_left_out_alike_whatever_the_ranks_workers_and_restarts(tmp_path):
    plan, bad = bad_plan(tmp_path)
    expected = []
    for step in range(1, STEPS + 1):
        packs = [plan.pack((step - 1) * PACKS + i) for i in range(PACKS)]
        good = [[draw for draw in pack if (draw.dataset, draw.row) not in bad] for pack in packs]
        by_hand = collate([[encode(plan.read(draw), draw, draw.key) for draw in pack] for pack in good])
        left_out = [(i, draw.dataset, draw.row) for i, pack in enumerate(packs) for draw in pack if draw not in good[i]]
        expected.append((by_hand["row"].tolist(), left_out))
    assert {row[1:] for _, left_out in expected for row in left_out} == bad
    for world, microbatch, workers, steps in (
        (1, 1, 0, range(1, 7)),
        (2, 1, 0, (3, 4, 1)),
        (3, 2, 2, (2, 5)),
        (8, 1, 0, (4,)),
    ):
        group = skipping(plan, world, microbatch, workers)
        try:
            for step in steps:
                rows, skipped = rows_and_skipped(group, step)
                assert rows == expected[step - 1][0]
                first = (step - 1) * PACKS
                assert [(s.pack - first, s.dataset, s.row) for s in skipped] == expected[step - 1][1]
                for one in skipped:
                    assert one.step == step and one.id == plan.readers[one.dataset].id(one.row)
                    wanted = r"SHA-256" if one.dataset == "d0" else r"^ValueError: cannot decode <BytesIO object>$"
                    assert re.search(wanted, one.reason)
        finally:
            for loader in group:
                loader.close()


def test_a_pack_that_loses_every_example_is_an_empty_one(plan):
    lost = {draw.position for draw in plan.pack(7)}

    def none_of_pack_7(example: Example, draw: Draw, key: int) -> np.ndarray:
        if draw.position in lost:
            raise OSError("truncated")
        return encode(example, draw, key)

    with Loader(plan, none_of_pack_7, collate, 0, 1, PACKS, skip_bad=True) as loader:
        rows = [batch["row"].tolist() for batch in loader.step(2)]
        assert rows[2] == [[0] * 4] and all(row != [[0] * 4] for row in rows[:2] + rows[3:])
        assert len(loader.skipped) == len(lost)
        assert len(loader.step(3)) == PACKS and not loader.skipped


@pytest.mark.parametrize("error", [MemoryError("full"), StorageError("the bucket is away"), ImportError("no codec")])
def test_what_is_no_fault_of_the_data_is_not_skipped(plan, error):
    def unlucky(example: Example, draw: Draw, key: int) -> np.ndarray:
        raise error

    with (
        Loader(plan, unlucky, collate, 0, 1, PACKS, skip_bad=True) as loader,
        pytest.raises(DataError, match=rf"example '.*pack 0: .*{error}"),
    ):
        loader.step(1)


class Announcing:
    """A plan that notes what it is told, and refuses to read what it was not told about."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.told = plan, Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plan, name)

    def ahead(self, draws: Any) -> None:
        self.told.update(draw.position for draw in draws)

    def read(self, draw: Draw) -> Example:
        assert self.told[draw.position] == 1, "told about once, before it is read"
        return self.plan.read(draw)


@pytest.mark.parametrize(("world", "microbatch"), [(1, 1), (2, 2)])
def test_the_plan_is_told_what_comes_next(plan, expected, world, microbatch):
    told = [Announcing(plan) for _ in range(world)]
    group = [Loader(one, encode, collate, rank, world, PACKS, microbatch) for rank, one in enumerate(told)]
    assert [global_batch(group, step) for step in (1, 2, 3)] == expected[:3]
    read = sum(len(plan.pack(pack)) for pack in range(3 * PACKS))
    assert read < sum(one.told.total() for one in told) < 2 * read  # and of the next micro-batch too


@pytest.mark.parametrize(("kind", "reason"), [("kill", "signal 9"), ("exit", "exit code 3")])
def test_a_dead_worker_is_reported_with_its_example(plan, kind, reason):
    fatal = plan.pack(6)[0]

    def deadly(example: Example, draw: Draw, key: int) -> np.ndarray:
        if draw.position == fatal.position:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(3)
        return encode(example, draw, key)

    name = plan.readers[fatal.dataset].index["id"][fatal.row].as_py()
    message = rf"worker died \({reason}\) at example '{name}' of .*pack 6"
    with Loader(plan, deadly, collate, 0, 1, PACKS, workers=2) as loader, pytest.raises(DataError, match=message):
        for step in (1, 2):  # the worker is ahead: it may take what it had ready for step 1 with it
            loader.step(step)


def test_a_worker_killed_while_idle_is_reported(plan):
    with Loader(plan, encode, collate, 0, 1, PACKS, PACKS, workers=1) as loader:
        loader.step(1)
        os.kill(loader._prefetch._workers[0]._process.pid, signal.SIGKILL)
        with pytest.raises(DataError, match=r"worker died \(signal 9\)"):
            for step in itertools.count(2):
                loader.step(step)


def test_workers_end_when_their_parent_is_killed(plan, tmp_path):
    import multiprocessing

    def parent(folder: Path) -> None:
        loader = Loader(plan, encode, collate, 0, 1, PACKS, workers=2)
        loader.step(1)
        pids = [worker._process.pid for worker in loader._prefetch._workers]
        (folder / "pids").write_text(" ".join(map(str, pids)))
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=parent, args=(tmp_path,))
    process.start()
    process.join(60)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]

    def alive(pid: int) -> bool:
        try:
            return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return False

    deadline = time.time() + 30
    while any(map(alive, pids)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


@pytest.mark.parametrize(
    "numbers", [(1, 1, 5, 1, 0), (-1, 2, 5, 1, 0), (0, 1, 0, 1, 0), (0, 1, 5, 0, 0), (0, 1, 5, 1, -1)]
)
def test_impossible_numbers_are_refused(plan, numbers):
    with pytest.raises(ConfigError, match="loader: rank"):
        Loader(plan, encode, collate, *numbers)
    with pytest.raises(ConfigError, match="step 0 does not exist"):
        Loader(plan, encode, collate, 0, 1, 5).step(0)


def test_close_keys_give_unrelated_generators():
    first = np.array([generator(key).random() for key in range(2000)])
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.08
    assert abs(first.mean() - 0.5) < 0.03
    assert generator(2**64 - 1).random() == generator(2**64 - 1).random()
