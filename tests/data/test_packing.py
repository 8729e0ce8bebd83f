import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_model.config import PackingMethod
from molmo_model.data.packing import (
    NOTHING_KNOWN,
    Capacity,
    Known,
    Packing,
    TooLarge,
    assign,
    full_packs,
    like_cost,
    pack_window,
)
from molmo_model.errors import ConfigError, DataError

CAPACITY = Capacity(tokens=100, crops=10)
items = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 10)), max_size=40)


def best_fit_by_hand(sizes: list[tuple[int, int]], capacity: Capacity) -> list[list[int]]:
    """The rule, in its plainest form."""
    packs: list[list[int]] = []

    def need(item: int) -> float:
        return max(sizes[item][0] * (1 / capacity.tokens), sizes[item][1] * (1 / capacity.crops))

    def left(pack: list[int]) -> tuple[int, int]:
        return capacity.tokens - sum(sizes[i][0] for i in pack), capacity.crops - sum(sizes[i][1] for i in pack)

    for item in sorted(range(len(sizes)), key=lambda i: (-need(i), i)):
        fitting = [p for p in packs if left(p)[0] >= sizes[item][0] and left(p)[1] >= sizes[item][1]]
        if fitting:
            emptiness = [left(p)[0] * (1 / capacity.tokens) + left(p)[1] * (1 / capacity.crops) for p in fitting]
            fitting[emptiness.index(min(emptiness))].append(item)
        else:
            packs.append([item])
    return [sorted(pack) for pack in packs]


def fewest_packs(sizes: list[tuple[int, int]], capacity: Capacity) -> int:
    """By trying everything."""

    def place(item: int, packs: list[tuple[int, int]], best: int) -> int:
        if len(packs) >= best:
            return best
        if item == len(sizes):
            return len(packs)
        tokens, crops = sizes[item]
        for i, (t, c) in enumerate(packs):
            if t >= tokens and c >= crops:
                best = min(best, place(item + 1, [*packs[:i], (t - tokens, c - crops), *packs[i + 1 :]], best))
        return min(best, place(item + 1, [*packs, (capacity.tokens - tokens, capacity.crops - crops)], best))

    return place(0, [], len(sizes) + 1)


@settings(max_examples=200, deadline=None)
@given(items)
def test_packs_hold_every_item_once_and_keep_to_both_capacities(sizes):
    packs = pack_window([t for t, _ in sizes], [c for _, c in sizes], CAPACITY)
    assert sorted(itertools.chain(*packs)) == list(range(len(sizes)))
    for pack in packs:
        assert pack and pack == sorted(pack)
        assert sum(sizes[i][0] for i in pack) <= CAPACITY.tokens
        assert sum(sizes[i][1] for i in pack) <= CAPACITY.crops
    assert packs == best_fit_by_hand(sizes, CAPACITY)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(10, 70), st.integers(1, 7)), min_size=1, max_size=7))
def test_packs_are_close_to_the_fewest_possible(sizes):
    packs = pack_window([t for t, _ in sizes], [c for _, c in sizes], CAPACITY)
    assert len(packs) <= fewest_packs(sizes, CAPACITY) + 1


def test_packs_are_full_on_a_window_of_ordinary_examples():
    rng = np.random.default_rng(0)
    crops = rng.choice([1, 5, 7, 9, 13], 1024)
    tokens = crops * 150 + rng.integers(20, 400, 1024)
    packs = pack_window(tokens, crops, Capacity(8192, 96))
    assert tokens.sum() / (len(packs) * 8192) > 0.98


@pytest.mark.parametrize(("tokens", "crops"), [(101, 0), (0, 11)])
def test_an_item_larger_than_a_pack_is_refused_with_both_numbers(tokens, crops):
    with pytest.raises(
        TooLarge, match=f"{tokens} tokens and {crops} crops; a pack holds 100 tokens and 10 crops"
    ) as error:
        pack_window([5, tokens], [1, crops], CAPACITY)
    assert error.value.number == 1


def make_packing(window: int = 16, counts=(), seed: int = 0) -> Packing:
    rng = np.random.default_rng(seed)
    tokens, crops = rng.integers(1, 60, 4000), rng.integers(0, 5, 4000)
    return Packing(
        lambda start, count: (tokens[start : start + count], crops[start : start + count]),
        CAPACITY,
        window,
        Known(counts),
    )


def test_every_position_stands_in_exactly_one_pack():
    packing = make_packing()
    packs = list(packing.packs(0, 400))
    whole = sum(packing.counts(400))
    packs = [packing.pack(p) for p in range(whole)]
    positions = sorted(itertools.chain(*packs))
    assert positions == list(range(len(positions))) and len(positions) % 16 == 0
    windows = [{position // 16 for position in pack} for pack in packs]
    assert all(len(window) == 1 for window in windows)
    assert [min(w) for w in windows] == sorted(min(w) for w in windows)


def test_a_pack_is_a_pure_function_of_its_number():
    expected = list(make_packing().packs(0, 300))
    backwards = make_packing()
    assert [backwards.pack(p) for p in reversed(range(300))] == expected[::-1]
    counts = make_packing().counts(300)
    for p in (299, 0, 150, 17):
        fresh = make_packing(counts=counts)
        assert fresh.pack(p) == expected[p]
        assert make_packing(counts=counts[:5]).pack(p) == expected[p]  # the plan ends early: the rest is computed


def test_known_counts_spare_all_windows_but_one():
    asked = []
    base = make_packing()
    counts = base.counts(300)

    def costs_at(start: int, count: int):
        asked.append(start)
        return base._costs_at(start, count)

    packing = Packing(costs_at, CAPACITY, 16, Known(counts))
    assert packing.pack(299) == base.pack(299)
    assert len(asked) == 1


def test_counts_cover_the_packs_asked_for():
    packing = make_packing()
    assert packing.counts(0) == []
    for packs in (1, 2, 50, 51):
        counts = packing.counts(packs)
        assert sum(counts) >= packs > sum(counts[:-1])
        assert counts == [len(packing.packs_of(window)) for window in range(len(counts))]


def test_a_plan_made_from_other_costs_is_noticed():
    counts = make_packing().counts(300)
    with pytest.raises(
        DataError, match=r"window 0 has \d+ packs, it was planned|window 0 has \d+ packs, the plan says"
    ):
        make_packing(counts=[counts[0] + 1, *counts[1:]]).pack(0)


def test_too_large_examples_are_named_with_a_way_out():
    packing = Packing(lambda s, c: (np.full(c, 101), np.zeros(c, int)), CAPACITY, 4, name_at=lambda n: f"example x{n}")
    with pytest.raises(DataError, match=r"example x0 needs 101 tokens.*100 tokens.*sequence_length.*max_conversations"):
        packing.pack(0)
    with pytest.raises(DataError, match="pack -1 does not exist"):
        packing.pack(-1)


@pytest.mark.parametrize("numbers", [(0, 10, 4), (100, -1, 4), (100, 10, 0)])
def test_useless_capacities_are_refused(numbers):
    tokens, crops, window = numbers
    with pytest.raises(ConfigError, match="packing window"):
        Packing(lambda s, c: (np.zeros(c, int), np.zeros(c, int)), Capacity(tokens, crops), window)


def test_packs_of_a_window_are_shuffled():
    # best fit puts the largest examples into the first packs; training must not see every window in that order
    packing = make_packing(window=256)
    tokens, _ = packing._costs_at(0, 2560)
    largest = [[tokens[pack].max() for pack in packing.packs_of(window)] for window in range(8)]
    falling = [np.mean(np.diff(sizes) <= 0) for sizes in largest]
    assert 0.3 < np.mean(falling) < 0.8


def films_and_photos(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Costs of which neither tokens nor crops alone decide: films have 90 tokens a crop, photos 170, texts no crop."""
    rng = np.random.default_rng(seed)
    kind = rng.random(count)
    frames = np.clip(np.exp(rng.normal(np.log(70), 0.8, count)), 8, 128).astype(int)
    crops = np.where(kind < 0.35, frames, rng.integers(3, 10, count))
    tokens = np.where(kind < 0.35, 90, 170) * crops + rng.integers(20, 600, count)
    text = kind > 0.9
    return np.where(text, rng.integers(30, 6000, count), tokens), np.where(text, 0, crops)


@settings(max_examples=100, deadline=None)
@given(items)
def test_full_packs_hold_every_item_once_and_keep_to_both_capacities(sizes):
    tokens, crops = [t for t, _ in sizes], [c for _, c in sizes]
    packs = full_packs(tokens, crops, CAPACITY)
    assert sorted(itertools.chain(*packs)) == list(range(len(sizes)))
    for pack in packs:
        assert pack and pack == sorted(pack)
        assert sum(tokens[i] for i in pack) <= CAPACITY.tokens and sum(crops[i] for i in pack) <= CAPACITY.crops
    assert packs == full_packs(tokens, crops, CAPACITY)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(10, 70), st.integers(1, 7)), min_size=1, max_size=7))
def test_full_packs_are_close_to_the_fewest_possible(sizes):
    packs = full_packs([t for t, _ in sizes], [c for _, c in sizes], CAPACITY)
    assert len(packs) <= fewest_packs(sizes, CAPACITY) + 1


def test_full_packs_of_a_large_window_reach_the_bound():
    capacity = Capacity(16384, 128)
    tokens, crops = films_and_photos(3000)
    packs = full_packs(tokens, crops, capacity)
    assert sorted(itertools.chain(*packs)) == list(range(3000))
    assert all(tokens[p].sum() <= 16384 and crops[p].sum() <= 128 for p in packs)
    bound = max(tokens.sum() / 16384, crops.sum() / 128)  # no packing has fewer
    assert bound / len(packs) > 0.965
    assert len(packs) < 0.98 * len(pack_window(tokens, crops, capacity))
    # few items share a pack, none of a size that divides it
    rng = np.random.default_rng(1)
    tokens = np.clip(rng.normal(1110, 260, 3000), 450, 2500).astype(int)
    packs = full_packs(tokens, np.ones(3000, int), Capacity(4096, 32))
    assert (
        tokens.sum() / 4096 / len(packs)
        > 0.99
        > tokens.sum() / 4096 / len(pack_window(tokens, tokens * 0, Capacity(4096, 32)))
    )
    with pytest.raises(TooLarge, match="needs 5000 tokens"):
        full_packs([10, 5000], [0, 0], Capacity(4096, 32))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(0, 50), st.integers(1, 8))
def test_steps_are_made_of_like_packs(costs, first, step):
    order = like_cost(np.array(costs), first, step, np.arange(len(costs), dtype=np.uint64)[::-1])
    assert sorted(order) == list(range(len(costs)))
    head = min(-first % step, len(costs))
    whole = [order[start : start + step] for start in range(head, len(costs) - step + 1, step)]
    edges = {*order[:head], *order[head + step * len(whole) :]}
    kept = sorted(cost for i, cost in enumerate(costs) if i not in edges)
    ranges = sorted((min(costs[i] for i in group), max(costs[i] for i in group)) for group in whole)
    assert ranges == sorted((kept[i], kept[i + step - 1]) for i in range(0, len(kept), step))  # no two overlap


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_packs_are_dealt_evenly(costs, world):
    ranks = assign(costs, world)
    assert len(ranks) == world and sorted(itertools.chain(*ranks)) == list(range(len(costs)))
    assert {len(mine) for mine in ranks} <= {len(costs) // world, -(-len(costs) // world)}
    loads = [sum(costs[i] for i in mine) for mine in ranks]
    if costs and len(costs) % world == 0:
        assert max(loads) - min(loads) <= max(costs) - min(costs)
    with pytest.raises(ConfigError, match="0 ranks"):
        assign(costs, 0)


@pytest.mark.parametrize("step", [16, 32])
def test_ranks_are_level_and_the_packs_of_a_step_are_the_same_for_all(step):
    tokens, crops = films_and_photos(3 * 2048)

    def costs_at(start, count):
        return tokens[start : start + count], crops[start : start + count]

    packing = Packing(costs_at, Capacity(16384, 128), 2048, method=PackingMethod.balanced, step=step)
    number = sum(len(packing.packs_of(window)) for window in range(3)) // step
    uneven = {2: [], 4: [], 8: []}
    for costs in ([packing.cost(p) for p in range(s * step, (s + 1) * step)] for s in range(number)):
        for world, found in uneven.items():
            loads = [sum(costs[i] for i in mine) for mine in assign(costs, world)]
            found.append(max(loads) / np.mean(loads))
    assert all(np.mean(found) < 1.005 for found in uneven.values())
    worst = max(max(found) for found in uneven.values())
    assert worst <= 1.03 if step == 32 else worst < 1.1
    as_numbered = [packing.cost(p) for p in range(8)]
    assert len(set(as_numbered)) > 1  # costs are told apart at all
    assert packing.cost(3) == 16384 + 256 * crops[packing.pack(3)].sum()


@pytest.mark.parametrize("method", PackingMethod)
def test_packs_that_were_planned_before_are_read_not_computed(method):
    tokens, crops = films_and_photos(1024)

    def packing(known=NOTHING_KNOWN, costs_at=lambda s, c: (tokens[s : s + c], crops[s : s + c])):
        return Packing(costs_at, Capacity(16384, 128), 256, known, method=method, step=6)

    first = packing()
    windows = [first.packs_of(window) for window in range(4)]
    places = np.empty(1024, np.uint16)
    for window in windows:
        for number, pack in enumerate(window):
            places[pack] = number
    known = Known([len(window) for window in windows], places)

    def refuse(start, count):
        raise AssertionError("costs are asked for")

    read = packing(known, refuse)
    total = sum(map(len, windows))
    assert [read.pack(n) for n in reversed(range(total))] == list(itertools.chain(*windows))[::-1]
    partly = packing(Known(known.counts[:2], places[:512]))
    assert [partly.pack(n) for n in range(total)] == list(itertools.chain(*windows))
    with pytest.raises(DataError, match=r"window 0 has \d+ packs, the plan says"):
        packing(Known([len(windows[0]) + 1], places)).pack(0)
