import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_model.data.packing import Capacity, Packing, TooLarge, pack_window
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
        lambda start, count: (tokens[start : start + count], crops[start : start + count]), CAPACITY, window, counts
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

    packing = Packing(costs_at, CAPACITY, 16, counts)
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
