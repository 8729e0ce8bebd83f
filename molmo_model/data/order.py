"""Which example stands at position n of the global stream: a pure function of (seed, mixture, n).

Nothing is replayed and nothing is remembered, so resuming at any position costs microseconds, and ranks and workers
agree without talking. Two parts:

- `Schedule` says which entry of the mixture position n draws from, and how often that entry was drawn before: one
  period of a fixed, perfectly stratified sequence, repeated. No prefix has more than one example too many or too few of
  any entry. `SampledSchedule` throws a weighted die for each position instead, which nothing repeats.
- `permute` says which example the k-th draw of an entry is: epoch k // N visits all N examples in an order of its own,
  a keyed bijection that is computed, never stored (a Feistel network, walked until it lands inside [0, N)).

Every position also has a key for a generator of its own, from which prompts and conversations are drawn. It depends on
the seed, the entry's name, the example's id and the epoch: another example in the dataset does not change it.
"""

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molmo_model.artifacts import canonical_json
from molmo_model.errors import ConfigError, DataError

Keys = NDArray[np.uint64]
Ints = NDArray[np.int64]
Entries = NDArray[np.int16]
"""Numbers of entries of a mixture."""

ROUNDS = 8
"""Rounds of the Feistel network; four already pass for random (Luby and Rackoff 1988), small halves want more."""
MAX_PERIOD = 2**20
"""Longest period of a schedule; rates that need a longer one are rounded, to within one position in 2**20."""
_CHUNK = 4096
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * _GOLDEN
_POWERS = 2 ** np.arange(63, dtype=np.int64)


def mix(x: Keys) -> Keys:
    """A bijection of 64-bit numbers without visible pattern, element-wise: the finalizer of SplitMix64 (Steele, Lea and
    Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: Any) -> int:
    """A 64-bit key from plain values."""
    return int.from_bytes(hashlib.sha256(canonical_json(list(parts)).encode()).digest()[:8], "little")


def subkey(keys: Keys, numbers: NDArray[Any]) -> Keys:
    """Keys for the numbered children of keys, element-wise."""
    return mix(keys + (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def permute(index: Ints, size: Ints, keys: Keys) -> Ints:
    """Where each index goes under the permutation of [0, size) that its key names; element-wise, so that indices of
    several permutations can be mapped at once.

    An alternating Feistel network on ceil(log2 size) bits permutes a range below 2 * size; a value outside [0, size)
    is permuted again until it lands inside, which keeps the map a bijection (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains").

    Raises:
        DataError: an index lies outside [0, size).
    """
    if bool(((index < 0) | (index >= size)).any()):
        raise DataError(
            f"permute: an index lies outside its range: {index.min()}..{index.max()}, sizes from {size.min()}"
        )
    bits = np.maximum(np.searchsorted(_POWERS, size), 2).astype(np.uint64)
    out = index.astype(np.uint64)
    limit = size.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        out[todo] = _feistel(out[todo], bits[todo], keys[todo])
        todo = todo[out[todo] >= limit[todo]]
    return out.astype(np.int64)


def _feistel(x: Keys, bits: Keys, keys: Keys) -> Keys:
    low = bits // np.uint64(2)
    low_mask, high_mask = (np.uint64(1) << low) - np.uint64(1), (np.uint64(1) << (bits - low)) - np.uint64(1)
    left, right = x >> low, x & low_mask
    for first, second in zip(_ROUND_KEYS[::2], _ROUND_KEYS[1::2], strict=True):
        left = left ^ (mix((keys + first) ^ (right * _GOLDEN)) & high_mask)
        right = right ^ (mix((keys + second) ^ (left * _GOLDEN)) & low_mask)
    return (left << low) | right


def exact_rate(name: str, rate: float) -> Fraction:
    """A rate as it is written in decimal.

    Raises:
        ConfigError: it is not a finite number above 0.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"rate of {name!r} is {rate}; it must be a finite number above 0")
    return Fraction(repr(float(rate)))


def resolve_shares(rates: Mapping[str, float | Fraction]) -> dict[str, int]:
    """Positions per period that each name gets: whole numbers in the ratio of the rates, as written in decimal.

    The period, their sum, is the least common denominator, so the rates hold exactly; where that exceeds `MAX_PERIOD`
    they are rounded to it by largest remainder, with at least one position each.

    Raises:
        ConfigError: there is no rate, or one that is not a finite number above 0.
    """
    exact = {n: rate if isinstance(rate, Fraction) else exact_rate(n, rate) for n, rate in rates.items()}
    if not 0 < len(rates) <= MAX_PERIOD // 64:
        raise ConfigError(f"{len(rates)} rates; a mixture has between 1 and {MAX_PERIOD // 64} entries")
    total = sum(exact.values())
    exact = {name: rate / total for name, rate in exact.items()}
    period = math.lcm(*(rate.denominator for rate in exact.values()))
    if period <= MAX_PERIOD:
        return {name: int(rate * period) for name, rate in exact.items()}
    wanted = {name: max(rate * MAX_PERIOD, Fraction(1)) for name, rate in exact.items()}
    shares = {name: math.floor(value) for name, value in wanted.items()}
    by_remainder = sorted(shares, key=lambda name: (shares[name] - wanted[name], name))
    short = MAX_PERIOD - sum(shares.values())
    for name in by_remainder[: max(short, 0)]:
        shares[name] += 1
    for _ in range(-short):  # many entries were lifted to one position: the largest pay
        shares[max(shares, key=lambda name: (shares[name], name))] -= 1
    return shares


class Schedule:
    """Which entry each position draws from: entry i takes `shares[i]` of every `sum(shares)` positions, and after any n
    positions it has been drawn more than n * rate - 1 and fewer than n * rate + 1 times.

    The j-th draw of an entry (from 1) may stand at positions (j - 1) / rate < n <= j / rate, counted from 1; giving
    each position to the open draw that must come first meets all of these (earliest deadline first on one processor,
    as in the fair scheduling of Baruah, Cohen, Plaxton and Varvel 1996, "Proportionate progress").

    Args:
        shares: positions of one period, by entry.
        table: entry of each position of a period, when it is already known.
    """

    def __init__(self, shares: Sequence[int], table: Entries | None = None) -> None:
        self.shares: Ints = np.asarray(shares, np.int64)
        if not len(self.shares) or self.shares.min() < 1:
            raise ConfigError(f"shares {list(shares)}: every entry needs at least one position")
        self.period = int(self.shares.sum())
        self.table = _earliest_deadline_first(self.shares.tolist()) if table is None else np.asarray(table, np.int16)
        self._before = _running(self.table, len(self.shares))
        drawn = self._before[-1].tolist()
        if len(self.table) != self.period or drawn != self.shares.tolist():
            raise DataError(f"schedule has {drawn} positions by entry, the shares are {list(shares)}")

    def entries(self, positions: Ints) -> Entries:
        """Entry of each position."""
        return self.table[positions % self.period]

    def counts(self, n: int) -> Ints:
        """How often each entry is drawn in the first n positions."""
        periods, rest = divmod(n, self.period)
        chunk = rest // _CHUNK
        tail = np.bincount(self.table[chunk * _CHUNK : rest], minlength=len(self.shares))
        return periods * self.shares + self._before[chunk] + tail


class SampledSchedule:
    """As `Schedule`, but which entry a position draws from is thrown for each position by itself, from a number that
    follows from the key and the position. Nothing repeats: not the sequence of entries, nor, within one entry, an
    example before all its others were drawn.

    How often an entry was drawn before is counted: once for the whole run, at every 4,096th position (`known`, which
    the mixture keeps), and from there to the position. Beyond what is known it is counted when it is asked for.

    Args:
        shares: rates of the entries, as whole numbers.
        key: of the dice.
        known: [C, entries] draws of each entry before every 4,096th position, where they were counted before.
    """

    def __init__(self, shares: Sequence[int], key: int, known: Ints | None = None) -> None:
        self.shares: Ints = np.asarray(shares, np.int64)
        if not len(self.shares) or self.shares.min() < 1:
            raise ConfigError(f"shares {list(shares)}: every entry needs at least one position")
        self.period = int(self.shares.sum())
        """Sum of the shares; nothing repeats after it."""
        if self.period >= 2**32:
            raise ConfigError(f"shares sum to {self.period}; a sampled schedule takes less than {2**32}")
        self._key = np.array([key], np.uint64)
        self._ends = np.cumsum(self.shares)
        self._before: list[Ints] = [np.zeros(len(self.shares), np.int64)] if known is None else list(known)
        due = np.arange(len(self._before)) * _CHUNK
        if any(row.shape != self.shares.shape for row in self._before) or [int(r.sum()) for r in self._before] != (
            due.tolist()
        ):
            raise DataError(f"counts of a sampled schedule are not those of {len(self.shares)} entries")

    def entries(self, positions: Ints) -> Entries:
        """Entry of each position."""
        dice = subkey(self._key, positions) >> np.uint64(32)
        places = (dice * np.uint64(self.period)) >> np.uint64(32)
        return np.searchsorted(self._ends, places.astype(np.int64), side="right").astype(np.int16)

    def counts(self, n: int) -> Ints:
        """How often each entry is drawn in the first n positions."""
        chunk, rest = divmod(n, _CHUNK)
        while len(self._before) <= chunk:
            self._before.append(self._before[-1] + self._drawn(len(self._before) - 1, _CHUNK))
        return self._before[chunk] + self._drawn(chunk, rest)

    def known(self, n: int) -> Ints:
        """What spares counting again up to position n."""
        self.counts(n)
        return np.stack(self._before[: n // _CHUNK + 1])

    def _drawn(self, chunk: int, count: int) -> Ints:
        entries = self.entries(chunk * _CHUNK + np.arange(count))
        return np.bincount(entries, minlength=len(self.shares))


def _running(table: Entries, entries: int) -> Ints:
    """Draws of each entry before every `_CHUNK`-th position of a table, and in all of it."""
    starts = range(0, len(table), _CHUNK)
    counts = [np.bincount(table[start : start + _CHUNK], minlength=entries) for start in starts]
    return np.cumsum([np.zeros(entries, np.int64), *counts], axis=0)


def dealt(schedule: Schedule | SampledSchedule, start: int, count: int) -> tuple[Entries, Ints]:
    """Entry, and number of its earlier draws, of each of `count` positions from `start`."""
    entries = schedule.entries(start + np.arange(count))
    order = np.argsort(entries, kind="stable")
    ordered = entries[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count) - np.repeat(first, np.diff(first, append=count))
    return entries, schedule.counts(start)[entries] + rank


def _earliest_deadline_first(shares: list[int]) -> Entries:
    period = sum(shares)
    table = np.empty(period, np.int16)
    # (release, deadline, entry, draw) of waiting draws; (deadline, entry, draw) of those that may be taken
    waiting = [(1, -(-period // share), entry, 1) for entry, share in enumerate(shares)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    for position in range(1, period + 1):
        while waiting and waiting[0][0] <= position:
            _, deadline, entry, draw = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline, entry, draw))
        _, entry, draw = heapq.heappop(ready)
        table[position - 1] = entry
        share = shares[entry]
        heapq.heappush(waiting, (draw * period // share + 1, -(-(draw + 1) * period // share), entry, draw + 1))
    return table


@dataclass(frozen=True)
class Source:
    """What one entry of a mixture draws from."""

    name: str
    dataset: str
    rows: Ints
    """Row numbers in the dataset's index, one per example."""
    keys: Keys
    """A key per example, from its id."""


@dataclass(frozen=True)
class Position:
    """What stands at one position of the stream."""

    entry: str
    dataset: str
    row: int
    """In the dataset's index."""
    epoch: int
    """How often the entry has been through all its examples."""
    draw: int
    """Key of the position's own generator."""


@dataclass(frozen=True)
class Window:
    """Several positions as arrays of one length."""

    entries: Entries
    examples: Ints
    """Number of the example within its entry."""
    epochs: Ints
    draws: Keys
    """Key of each position's own generator."""

    def take(self, places: NDArray[Any]) -> "Window":
        """Some of the positions."""
        return Window(self.entries[places], self.examples[places], self.epochs[places], self.draws[places])


class Order:
    """The global stream of a mixture.

    Args:
        seed: of the experiment.
        sources: the entries, in the schedule's order.
        schedule: which entry each position draws from.
        keys: the sources' keys one after another, where they are at hand.

    Raises:
        DataError: an entry has no example.
    """

    def __init__(
        self, seed: int, sources: Sequence[Source], schedule: Schedule | SampledSchedule, keys: Keys | None = None
    ) -> None:
        for source in sources:
            if not len(source.rows):
                raise DataError(f"mixture entry {source.name!r}: dataset {source.dataset!r} has no example for it")
        if len(sources) != len(schedule.shares):
            raise DataError(f"{len(sources)} entries, but the schedule has {len(schedule.shares)}")
        self.sources, self.schedule = list(sources), schedule
        self._sizes: Ints = np.array([len(source.rows) for source in sources], np.int64)
        self._bases: Ints = np.concatenate([[0], np.cumsum(self._sizes)])[:-1].astype(np.int64)
        self._example_keys: Keys = np.concatenate([source.keys for source in sources]) if keys is None else keys
        self._order_keys: Keys = np.array([key_of("order", seed, source.name) for source in sources], np.uint64)
        self._draw_keys: Keys = np.array([key_of("draw", seed, source.name) for source in sources], np.uint64)

    def window(self, start: int, count: int) -> Window:
        """Positions `start` to `start + count` (exclusive)."""
        return self._window(*dealt(self.schedule, start, count))

    def at(self, positions: Sequence[int]) -> Window:
        """Any positions."""
        entries = self.schedule.entries(np.asarray(positions, np.int64))
        draws = [self.schedule.counts(n)[entry] for n, entry in zip(positions, entries, strict=True)]
        return self._window(entries, np.array(draws, np.int64))

    def _window(self, entries: Entries, draws: Ints) -> Window:
        sizes = self._sizes[entries]
        epochs = draws // sizes
        examples = permute(draws % sizes, sizes, subkey(self._order_keys[entries], epochs))
        own = self._example_keys[self._bases[entries] + examples]
        return Window(entries, examples, epochs, subkey(self._draw_keys[entries] ^ mix(own), epochs))

    def example_at(self, n: int) -> Position:
        """What stands at position n, from 0."""
        window = self.at([n])
        source = self.sources[window.entries[0]]
        row, epoch = int(source.rows[window.examples[0]]), int(window.epochs[0])
        return Position(source.name, source.dataset, row, epoch, int(window.draws[0]))
