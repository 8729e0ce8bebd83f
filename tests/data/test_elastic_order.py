"""The global batches of a run are one pure function of seed and step: for any number of ranks, of workers, and for any
number of ranks before and after a restart, hashes over ids, conversations and keys in pack order are the same."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molmo_model.config import MixtureEntry, MixtureRule, MixtureSchedule, PackingMethod
from molmo_model.data.example import Example
from molmo_model.data.loader import Loader
from molmo_model.data.mixture import Draw, resolve
from molmo_model.data.packing import assign
from molmo_model.data.plan import Plan, plan_packs
from tests.data.builders import cost_of, make_plan, train_config

WORLDS = (1, 2, 3, 4, 6, 8)
PACKS, STEPS = 12, 4
SETTINGS = {
    "as shipped": (MixtureSchedule.stratified, PackingMethod.best_fit),
    "balanced": (MixtureSchedule.stratified, PackingMethod.balanced),
    "sampled and balanced": (MixtureSchedule.sampled, PackingMethod.balanced),
}


def encode(example: Example, draw: Draw, key: int) -> np.ndarray:
    content = repr((example.id, draw.conversations, key, draw.epoch, draw.position))
    return np.frombuffer(hashlib.sha256(content.encode()).digest(), np.int64)


def collate(packs: list[list[np.ndarray]]) -> dict[str, torch.Tensor]:
    """One row per pack; zeros for an empty one."""
    rows = [hashlib.sha256(np.concatenate(pack).tobytes()).digest() if pack else bytes(32) for pack in packs]
    return {"row": torch.tensor([np.frombuffer(row, np.int64).tolist() for row in rows])}


@dataclass(frozen=True)
class Remembering:
    """A plan that finds each pack and reads each example once: 200 restarts ask for the same ones."""

    plan: Plan
    examples: dict[tuple[str, int], Example]
    packs: dict[int, list[Draw]] = field(default_factory=dict)

    def pack(self, number: int) -> list[Draw]:
        if number not in self.packs:
            self.packs[number] = self.plan.pack(number)
        return self.packs[number]

    def read(self, draw: Draw) -> Example:
        place = draw.dataset, draw.row
        if place not in self.examples:
            self.examples[place] = self.plan.read(draw)
        return self.examples[place]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plan, name)


def plan_of(folder: Path, schedule: MixtureSchedule, packing: PackingMethod) -> Plan:
    readers = make_plan(folder).readers
    entries = {
        "rooted": MixtureEntry(
            rate=0.7,
            rule=MixtureRule.root_size,
            entries={
                "whole": MixtureEntry(dataset="d0"),
                "styled": MixtureEntry(dataset="d1", styles=["qa", "count"], size=9.0),
            },
        ),
        "single": MixtureEntry(dataset="d0", rate=0.3, max_conversations=1),
    }
    train = train_config(packs_per_step=PACKS, packing=packing, packing_window=64)
    mixture = resolve(entries, 7, readers, cost_of, schedule)
    mixture = plan_packs(Plan.of(mixture, readers, train), PACKS * STEPS)
    return Plan.of(mixture, readers, train)


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda name: name.replace(" ", "-"))
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Remembering:
    return Remembering(plan_of(tmp_path_factory.mktemp("data"), *SETTINGS[request.param]), {})


@pytest.fixture(scope="module")
def expected(plan: Remembering) -> list[str]:
    """From the plan alone, without a loader."""
    return [digest([by_hand(plan, pack) for pack in step_packs(step)]) for step in range(1, STEPS + 1)]


def step_packs(step: int) -> range:
    return range((step - 1) * PACKS, step * PACKS)


def by_hand(plan: Remembering, pack: int) -> list[int]:
    return collate([[encode(plan.read(d), d, d.key) for d in plan.pack(pack)]])["row"][0].tolist()


def digest(rows: list[list[int]]) -> str:
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def global_batch(plan: Remembering, group: list[Loader], step: int) -> str:
    """The rows of all ranks' micro-batches, back in pack order. Also: all ranks make equally many micro-batches of
    equal shapes, with nothing in them but the step's packs."""
    packs = step_packs(step)
    dealt = assign([plan.cost(pack) for pack in packs], len(group))
    batches = [loader.step(step) for loader in group]
    assert len({tuple(tuple(one["row"].shape) for one in rank) for rank in batches}) == 1
    rows: dict[int, list[int]] = {}
    for mine, rank in zip(dealt, batches, strict=True):
        made = torch.cat([one["row"] for one in rank]).tolist()
        assert made[len(mine) :] == [[0] * 4] * (len(made) - len(mine))
        rows |= dict(zip(mine, made, strict=False))
    assert sorted(rows) == list(range(PACKS))
    return digest([rows[place] for place in sorted(rows)])


def ranks(plan: Remembering, world: int, microbatch: int, workers: int = 0) -> list[Loader]:
    return [Loader(plan, encode, collate, rank, world, PACKS, microbatch, workers) for rank in range(world)]


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    import multiprocessing

    assert not [child for child in multiprocessing.active_children() if child.name == "molmo-loader"]


def test_world_sizes_and_restarts_under_another_one_change_no_batch(plan: Remembering, expected: list[str]) -> None:
    combinations = 0
    for before, after in itertools.product(WORLDS, WORLDS):
        for saved_at, microbatch in ((1, 1), (3, 2)):
            first = ranks(plan, before, microbatch)
            seen = [global_batch(plan, first, step) for step in range(1, saved_at + 1)]
            second = ranks(plan, after, microbatch)  # all that is saved is the number of the step
            seen += [global_batch(plan, second, step) for step in range(saved_at + 1, STEPS + 1)]
            assert seen == expected, (before, after, saved_at, microbatch)
            combinations += 1
    assert combinations == 72  # for each of the three settings


@pytest.mark.slow
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 4), (2, 2), (3, 1), (4, 1), (2, 3)])
def test_worker_processes_change_no_batch(plan: Remembering, expected: list[str], world: int, workers: int) -> None:
    group = ranks(plan, world, 2, workers)
    try:
        assert [global_batch(plan, group, step) for step in (1, 2)] == expected[:2]
        assert global_batch(plan, group, 4) == expected[3]  # elsewhere, with batches in flight
    finally:
        for loader in group:
            loader.close()


def test_the_plan_read_from_its_files_and_one_computed_anew_agree(
    plan: Remembering, expected: list[str], tmp_path: Path
) -> None:
    names = {name: reader.index["id"].to_pylist() for name, reader in plan.readers.items()}
    plan.mixture.save(tmp_path, names)
    method = plan.packing.method
    train = train_config(packs_per_step=PACKS, packing=method, packing_window=64)
    from molmo_model.data.mixture import Mixture

    read = Remembering(Plan.of(Mixture.load(tmp_path), plan.readers, train), plan.examples)
    assert [digest([by_hand(read, pack) for pack in step_packs(step)]) for step in (4, 1, 3)] == [
        expected[3],
        expected[0],
        expected[2],
    ]
    forgetful = Mixture.load(tmp_path)
    forgetful.info["packing"] = {}
    anew = Remembering(Plan.of(forgetful, plan.readers, train), plan.examples)
    assert digest([by_hand(anew, pack) for pack in step_packs(4)]) == expected[3]
    assert [anew.cost(pack) for pack in step_packs(2)] == [plan.cost(pack) for pack in step_packs(2)]


def test_ranks_take_the_packs_as_they_are_numbered_where_nothing_is_balanced() -> None:
    for packs, world in itertools.product((1, 5, 6, 12), WORLDS):
        assert assign([7.0] * packs, world) == [list(range(rank, packs, world)) for rank in range(world)]


def test_text_only_packs_keep_ranks_in_step() -> None:
    # no crops at all in half of the packs: every rank still gets as many packs, and of each kind as many as can be
    costs = [512.0 + 256 * crops for crops in (0, 0, 30, 31, 0, 29, 30, 0)]
    for world in (2, 4):
        dealt = assign(costs, world)
        assert sorted(itertools.chain(*dealt)) == list(range(8))
        assert {len(mine) for mine in dealt} == {8 // world}
        assert {sum(costs[pack] == 512 for pack in mine) for mine in dealt} == {4 // world}
