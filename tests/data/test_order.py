import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_model.data import order as order_module
from molmo_model.data.order import Order, Schedule, Source, dealt, key_of, permute, resolve_shares
from molmo_model.errors import ConfigError, DataError


def permutation(size: int, key: int) -> list[int]:
    keys = np.full(size, key, np.uint64)
    return permute(np.arange(size), np.full(size, size), keys).tolist()


def make_order(shares=(3, 2, 1), sizes=(10, 7, 1), seed=5, names=("a", "b", "c")) -> Order:
    sources = [
        Source(
            name, f"data-{name}", np.arange(size) * 2 + 1, np.array([key_of(name, i) for i in range(size)], np.uint64)
        )
        for name, size in zip(names, sizes, strict=True)
    ]
    return Order(seed, sources, Schedule(shares))


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 1024, 1025, 65_537])
def test_permute_is_a_bijection(size):
    for key in range(3):
        assert sorted(permutation(size, key)) == list(range(size))


def test_permute_mixes_as_chance_would():
    # every value is equally likely at every place: chi-square over 4,000 keys, 5 degrees of freedom per place
    size, keys = 6, 4000
    index = np.tile(np.arange(size), keys)
    mapped = permute(index, np.full(len(index), size), np.repeat(np.arange(keys, dtype=np.uint64), size))
    counts = np.zeros((size, size))
    np.add.at(counts, (index, mapped), 1)
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum(1)
    assert chi_square.max() < 25  # p = 1e-4 per place
    # neighbours do not stay neighbours, and a large permutation has about one fixed point
    large = np.array(permutation(50_000, 3))
    assert np.mean(np.abs(np.diff(large)) < 500) < 0.03
    assert np.sum(large == np.arange(50_000)) < 10


def test_permute_maps_several_permutations_at_once():
    sizes, keys = [5, 1000, 1, 77], [3, 1, 4, 1]
    pairs = [(i, size, key) for size, key in zip(sizes, keys, strict=True) for i in range(size)]
    shuffled = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    index, size, key = (np.array(values) for values in zip(*shuffled, strict=True))
    found = permute(index, size, key.astype(np.uint64)).tolist()
    alone = {(size, key): permutation(size, key) for size, key in zip(sizes, keys, strict=True)}
    assert found == [alone[size, key][i] for i, size, key in shuffled]
    with pytest.raises(DataError, match="outside its range"):
        permute(np.array([5]), np.array([5]), np.array([0], np.uint64))


@pytest.mark.parametrize(
    ("rates", "shares"),
    [
        ({"a": 1.0}, {"a": 1}),
        ({"a": 0.8, "b": 0.2}, {"a": 4, "b": 1}),
        ({"demo": 0.15, "academic": 0.5, "pointing": 0.35}, {"demo": 3, "academic": 10, "pointing": 7}),
        ({"a": 0.1, "b": 0.7}, {"a": 1, "b": 7}),  # need not sum to one
    ],
)
def test_decimal_rates_are_kept_exactly(rates, shares):
    assert resolve_shares(rates) == shares


def test_other_rates_are_rounded_to_the_period(monkeypatch):
    monkeypatch.setattr(order_module, "MAX_PERIOD", 4096)
    rates = {f"e{i}": (i + 1) ** 0.5 for i in range(40)} | {"tiny": 1e-9}
    shares = resolve_shares(rates)
    assert sum(shares.values()) == 4096 and shares["tiny"] == 1
    total = sum(rates.values())
    assert all(abs(shares[name] - 4096 * rate / total) <= 1.1 for name, rate in rates.items())
    crowd = {f"t{i}": 1e-9 for i in range(30)} | {"big": 1.0, "large": 0.9}
    shares = resolve_shares(crowd)
    assert sum(shares.values()) == 4096 and min(shares.values()) == 1


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_must_be_positive_numbers(rate):
    with pytest.raises(ConfigError, match="rate of 'b'"):
        resolve_shares({"a": 1.0, "b": rate})
    with pytest.raises(ConfigError, match="0 rates"):
        resolve_shares({})


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_no_prefix_is_more_than_one_example_off(shares):
    schedule = Schedule(shares)
    period = sum(shares)
    seen = np.zeros(len(shares))
    for n, entry in enumerate(schedule.table, 1):
        seen[entry] += 1
        assert np.abs(seen - n * np.array(shares) / period).max() < 1
    assert seen.tolist() == shares


def test_a_long_schedule_is_stratified_too():
    shares = [int(1000 * (i + 1) ** 0.5) for i in range(30)]
    schedule = Schedule(shares)
    drawn = np.cumsum(np.eye(len(shares), dtype=np.int32)[schedule.table], axis=0)
    due = np.arange(1, schedule.period + 1)[:, None] * (np.array(shares) / schedule.period)
    assert np.abs(drawn - due).max() < 1
    for n in (0, 1, 4095, 4096, 4097, 50_000, schedule.period, 3 * schedule.period + 9_999):
        full, rest = divmod(n, schedule.period)
        expected = full * np.array(shares) + (drawn[rest - 1] if rest else 0)
        assert schedule.counts(n).tolist() == expected.tolist()


@pytest.mark.parametrize("start", [0, 3, 599, 10**12])
def test_schedule_windows_agree_with_counting(start):
    schedule = Schedule([3, 2, 1])
    entries, draws = dealt(schedule, start, 40)
    counted = schedule.counts(start)
    for entry, draw in zip(entries, draws, strict=True):
        assert draw == counted[entry]
        counted[entry] += 1
    assert counted.tolist() == schedule.counts(start + 40).tolist()


def test_a_table_of_other_shares_is_refused():
    with pytest.raises(DataError, match="the shares are"):
        Schedule([2, 1], np.array([0, 1, 1], np.int16))
    with pytest.raises(ConfigError, match="at least one position"):
        Schedule([2, 0])


def test_every_epoch_visits_every_example_once_in_another_order():
    order = make_order()
    stream = [order.example_at(n) for n in range(240)]
    for name, size in (("a", 10), ("b", 7), ("c", 1)):
        mine = [position for position in stream if position.entry == name]
        epochs = [[p.row for p in group] for _, group in itertools.groupby(mine, key=lambda p: p.epoch)]
        whole = [epoch for epoch in epochs if len(epoch) == size]
        assert len(whole) >= 240 // 6 * {"a": 3, "b": 2, "c": 1}[name] // size - 1
        assert all(sorted(epoch) == [2 * i + 1 for i in range(size)] for epoch in whole)
        assert len({tuple(epoch) for epoch in whole}) == (len(whole) if size > 1 else 1)
    assert len({position.draw for position in stream}) == 240


def test_a_position_depends_on_nothing_but_itself():
    one, other = make_order(), make_order()
    backwards = {n: other.example_at(n) for n in (10**13, 77, 3, 0)}
    assert all(one.example_at(n) == position for n, position in sorted(backwards.items()))
    window = one.window(60, 50)
    for i in range(50):
        position = one.example_at(60 + i)
        source = one.sources[window.entries[i]]
        assert (source.name, source.rows[window.examples[i]]) == (position.entry, position.row)
        assert (window.epochs[i], int(window.draws[i])) == (position.epoch, position.draw)


def test_seed_and_entry_name_decide_the_order_and_other_entries_do_not():
    def rows_of(order: Order, name: str) -> list[tuple[int, int]]:
        stream = (order.example_at(n) for n in range(120))
        return [(p.row, p.draw) for p in stream if p.entry == name][:20]

    base = rows_of(make_order(), "b")
    assert rows_of(make_order(seed=6), "b") != base
    assert rows_of(make_order(shares=(1, 2, 9), sizes=(99, 7, 3)), "b") == base
    assert rows_of(make_order(names=("a", "renamed", "c")), "renamed") != base


def test_an_example_keeps_its_draws_when_another_is_added():
    before, after = make_order(sizes=(10, 7, 1)), make_order(sizes=(11, 7, 1))

    def draws(order: Order) -> dict[tuple[int, int], int]:
        stream = (order.example_at(n) for n in range(300))
        return {(p.row, p.epoch): p.draw for p in stream if p.entry == "a"}

    old, new = draws(before), draws(after)
    shared = old.keys() & new.keys()
    assert len(shared) > 100 and all(old[place] == new[place] for place in shared)


def test_an_entry_without_examples_is_refused():
    with pytest.raises(DataError, match="'b': dataset 'data-b' has no example"):
        make_order(sizes=(10, 0, 1))
    with pytest.raises(DataError, match="3 entries, but the schedule has 2"):
        make_order(shares=(1, 1))
