"""Which positions of the global stream share a pack: a pure function of the stream, two capacities and a method.

The stream is cut into windows of `window` positions. Each window is packed by itself, so a pack never spans two windows
and every position stands in exactly one pack. Packs are numbered through all windows. Two methods:

- `best_fit`: best fit decreasing in two dimensions (tokens and crops); the packs of a window in random order.
- `balanced`: `full_packs` fills them further, and the packs of a window are ordered so that those of one optimizer step
  cost alike (`like_cost`). Ranks then wait for one another less, whatever their number: `assign` deals a step's packs.

How many packs a window needs depends on its costs, so the window that pack p lies in is known from a sum over all
windows before it. It is a plan, not a state: the mixture stage packs every window of the run once and keeps, with the
mixture, the number of packs of each window and the pack of each position (two bytes). With them any pack is found by
bisection and read; without them all is computed again and comes out the same. The alternative, a fixed number of packs
per window with empty ones as padding, was not taken: it costs one to several percent of all packs for ever, to save
what fits in a few megabytes.
"""

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molmo_model.config import PackingMethod
from molmo_model.data.order import Keys, mix
from molmo_model.errors import ConfigError, DataError

Ints = NDArray[np.int64]
CostsAt = Callable[[int, int], tuple[Ints, Ints]]
"""(start, count) to tokens and crops of each of these positions."""
CROP_TOKENS = 256
"""What a crop costs, in tokens of the language model. Forward and backward of SigLIP-so400m/14 at 378 pixels (25 of its
blocks) are 0.61 TFLOP a crop: as much as 235 tokens of a language model of 1.5 billion parameters, 860 of half a
billion, 50 of 7 billion. Ranks that are level in crops are level for any of these."""
CANDIDATES = 64
"""Examples whose pairs are compared for the rest of a pack."""
POOL = 512
"""Examples of a window that a pack is filled from, at most; enough that almost any rest is met by a pair."""
PAIR_ROOM = 2.55
"""A rest with room for more average examples than this gets ordinary ones first, and a pair that fills it at the end: a
pair alone would be of the largest, and leave later packs with what does not fit together."""
_SPREAD = np.arange(CANDIDATES)
_KEPT_WINDOWS = 4
"""Planned windows kept: consecutive packs mostly ask for the same one."""


@dataclass(frozen=True)
class Capacity:
    """What one pack holds at most."""

    tokens: int
    crops: int


class TooLarge(DataError):
    """An example that no pack can hold; `number` is its place in the packed window."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def pack_window(tokens: Sequence[int] | Ints, crops: Sequence[int] | Ints, capacity: Capacity) -> list[list[int]]:
    """Packs items by best fit decreasing: largest first (by the share of the scarcer resource that they need), each
    into the pack that it leaves fullest, or into a new one.

    Returns:
        Item numbers, ascending within each pack.

    Raises:
        TooLarge: an item exceeds the capacity; says which number exceeds which.
    """
    tokens, crops = _checked(tokens, crops, capacity)
    per_token, per_crop = 1 / capacity.tokens, 1 / max(capacity.crops, 1)
    need = np.maximum(tokens * per_token, crops * per_crop)
    free_tokens, free_crops = np.empty(len(tokens), np.int64), np.empty(len(tokens), np.int64)
    free = np.empty(len(tokens))
    packs: list[list[int]] = []
    sizes = list(zip(tokens.tolist(), crops.tolist(), strict=True))
    for number in np.argsort(-need, kind="stable").tolist():
        size, images = sizes[number]
        opened = len(packs)
        fits = (free_tokens[:opened] >= size) & (free_crops[:opened] >= images)
        best = int(np.where(fits, free[:opened], np.inf).argmin()) if opened else 0
        if not opened or not fits[best]:
            best = opened
            packs.append([])
            free_tokens[best], free_crops[best] = capacity.tokens, capacity.crops
        packs[best].append(number)
        free_tokens[best] -= size
        free_crops[best] -= images
        free[best] = free_tokens[best] * per_token + free_crops[best] * per_crop
    return [sorted(pack) for pack in packs]


def _checked(tokens: Sequence[int] | Ints, crops: Sequence[int] | Ints, capacity: Capacity) -> tuple[Ints, Ints]:
    tokens, crops = np.asarray(tokens, np.int64), np.asarray(crops, np.int64)
    for number in np.flatnonzero((tokens > capacity.tokens) | (crops > capacity.crops)):
        raise TooLarge(
            int(number),
            f"needs {tokens[number]} tokens and {crops[number]} crops; "
            f"a pack holds {capacity.tokens} tokens and {capacity.crops} crops",
        )
    return tokens, crops


def full_packs(tokens: Sequence[int] | Ints, crops: Sequence[int] | Ints, capacity: Capacity) -> list[list[int]]:
    """Packs items, fuller than `pack_window` where few share a pack or crops are the scarcer resource.

    A pack begins with the next item in order of arrival; items of more than half a pack, of which no two fit together,
    begin packs at an even pace, so that none is left when their partners are gone. While there is room for several more
    it gets items that use tokens and crops alike, each about its even part of the rest; then, as long as anything fits,
    the pair (or single item) of up to `CANDIDATES` of all sizes that fills it most, tokens and crops weighted by how
    scarce they are in the whole window. What is left stays as mixed as what was there, so that the last packs find
    partners like the first ones.

    Returns:
        Item numbers, ascending within each pack.

    Raises:
        TooLarge: an item exceeds the capacity; says which number exceeds which.
    """
    tokens, crops = _checked(tokens, crops, capacity)
    filling = _Filling(tokens, crops, capacity)
    packs = []
    while filling.left:
        packs.append(filling.next())
    return packs


class _Filling:
    """The items of a window that are not packed yet. Items are known by their place in the order of falling need."""

    def __init__(self, tokens: Ints, crops: Ints, capacity: Capacity) -> None:
        of_tokens, of_crops = tokens / capacity.tokens, crops / max(capacity.crops, 1)
        need = np.maximum(of_tokens, of_crops)
        self._items = np.argsort(-need, kind="stable")
        self._places = np.argsort(self._items, kind="stable")
        """Places in order of arrival."""
        large = need > 0.5
        self._seeds = (self._places[large].tolist(), self._places[~large].tolist())
        self._heads = [0, 0]
        """How many of the large and of the other items need not be looked at again."""
        tokens_due, crops_due = float(of_tokens.sum()), float(of_crops.sum())
        self._due = max(tokens_due, crops_due)
        """Packs that all items need at least."""
        scarce = tokens_due / ((tokens_due + crops_due) or 1)
        self._value = (of_tokens * scarce + of_crops * (1 - scarce))[self._items]
        self._tokens, self._crops = tokens[self._items].astype(np.int32), crops[self._items].astype(np.int32)
        self._sizes = list(zip(self._tokens.tolist(), self._crops.tolist(), strict=True))
        self._capacity = capacity
        self._free = np.ones(len(tokens), bool)
        self._pool: Ints = np.zeros(0, np.int64)
        self._pooled = self._made = 0
        self.left = len(tokens)

    def next(self) -> list[int]:
        """The items of the next pack."""
        chosen: list[int] = []
        room_tokens, room_crops = self._capacity.tokens, self._capacity.crops
        taken = np.array([self._seed()])
        pool = self._refilled()
        while len(taken):
            self._free[taken] = False
            for place in taken.tolist():
                chosen.append(place)
                room_tokens -= self._sizes[place][0]
                room_crops -= self._sizes[place][1]
            fits = self._free[pool] & (self._tokens[pool] <= room_tokens) & (self._crops[pool] <= room_crops)
            pool = pool[fits]
            taken = self._choose(pool, room_tokens, room_crops)
        self.left -= len(chosen)
        self._made += 1
        return sorted(self._items[chosen].tolist())

    def _seed(self) -> int:
        """What the next pack begins with."""
        for which, queue in enumerate(self._seeds):
            while self._heads[which] < len(queue) and not self._free[queue[self._heads[which]]]:
                self._heads[which] += 1
        large, other = self._seeds
        on_time = self._heads[0] * self._due > self._made * len(large)
        if self._heads[0] == len(large) or (on_time and self._heads[1] < len(other)):
            return other[self._heads[1]]
        return large[self._heads[0]]

    def _refilled(self) -> Ints:
        """What packs are filled from: once half of it is gone, the next items in order of arrival come in."""
        self._pool = self._pool[self._free[self._pool]]
        if len(self._pool) <= POOL // 2 and self._pooled < len(self._places):
            more = self._places[self._pooled : self._pooled + POOL - len(self._pool)]
            self._pooled += len(more)
            self._pool = np.sort(np.concatenate([self._pool, more[self._free[more]]]))
        return self._pool

    def _choose(self, pool: Ints, room_tokens: int, room_crops: int) -> Ints:
        """What to take next, of a pool of items that fit by themselves, in order of falling need."""
        if not len(pool):
            return pool
        if len(pool) > CANDIDATES:
            means = float(self._tokens[pool].mean()), float(self._crops[pool].mean())
            room = min(room_tokens / max(means[0], 1e-9), room_crops / max(means[1], 1e-9))
            if room > PAIR_ROOM:
                return self._ordinary(pool, room_tokens, room_crops, min(int(room + 0.5), len(pool)))
            pool = pool[_SPREAD * (len(pool) - 1) // (CANDIDATES - 1)]
        return self._best_pair(pool, room_tokens, room_crops)

    def _ordinary(self, pool: Ints, room_tokens: int, room_crops: int, count: int) -> Ints:
        """All but two of the `count` items that an even division of the room would give."""
        of_tokens, of_crops = self._tokens[pool] / max(room_tokens, 1), self._crops[pool] / max(room_crops, 1)
        oddness = np.abs(of_tokens - of_crops) + np.abs(np.maximum(of_tokens, of_crops) - 1 / count)
        taken = pool[np.argsort(oddness, kind="stable")[: max(count - 2, 1)]]
        fits = np.cumsum(self._tokens[taken]) <= room_tokens
        return taken[fits & (np.cumsum(self._crops[taken]) <= room_crops)]

    def _best_pair(self, pool: Ints, room_tokens: int, room_crops: int) -> Ints:
        tokens, crops, value = self._tokens[pool], self._crops[pool], self._value[pool]
        fits = np.add.outer(tokens, tokens) <= room_tokens
        if 2 * int(crops.max()) > room_crops:
            fits &= np.add.outer(crops, crops) <= room_crops
        fills = np.where(fits, np.add.outer(value, value), -1)
        fills.flat[:: len(pool) + 1] = value  # with itself: alone
        first, second = divmod(int(fills.argmax()), len(pool))
        return pool[[first]] if first == second else pool[[first, second]]


def like_cost(costs: Ints, first: int, step: int, keys: Keys) -> list[int]:
    """An order of a window's packs in which those of one step cost alike.

    Packs are sorted by cost and cut into steps, and the steps are shuffled. The window's first and last packs share a
    step with a neighbouring window: they are those in the middle of the costs, which windows have in common.

    Args:
        costs: [N] cost of each pack.
        first: number of the window's first pack.
        step: packs per step.
        keys: [N] random numbers that shuffle.

    Returns:
        Places in `costs`.
    """
    ordered = np.argsort(costs, kind="stable")
    head = min(-first % step, len(ordered))
    tail = (len(ordered) - head) % step
    start = (len(ordered) - head - tail) // 2
    edges = ordered[start : start + head + tail]
    steps = np.concatenate([ordered[:start], ordered[start + head + tail :]]).reshape(-1, step)
    shuffled = steps[np.argsort(keys[: len(steps)], kind="stable")]
    return np.concatenate([edges[:head], shuffled.ravel(), edges[head:]]).tolist()


def assign(costs: Sequence[float], world: int) -> list[list[int]]:
    """Deals the packs of a step to ranks: equally many to each, or one fewer, and as level in cost as that allows.

    In rounds of one pack per rank, the dearest packs first; in each round the rank with the least so far gets the
    dearest (longest processing time first, Graham 1969, with equal numbers). So the i-th packs of all ranks are alike
    too, and ranks that meet after each micro-batch do not wait. Packs of one cost are dealt in turn: i to rank i mod
    world.

    Returns:
        Places in `costs`, for each rank, dearest first.

    Raises:
        ConfigError: no rank.
    """
    if world < 1:
        raise ConfigError(f"{world} ranks; packs are dealt to at least one")
    ranks: list[list[int]] = [[] for _ in range(world)]
    loads = [0.0] * world
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    for start in range(0, len(order), world):
        lightest = sorted(range(world), key=lambda rank: (loads[rank], rank))
        for rank, pack in zip(lightest, order[start : start + world], strict=False):
            ranks[rank].append(pack)
            loads[rank] += costs[pack]
    return ranks


@dataclass(frozen=True)
class Known:
    """What an earlier planning found: the packs of the first windows."""

    counts: Sequence[int] | Ints = ()
    """Packs of each window."""
    packs: NDArray[Any] | None = None
    """[N] for each position the number of its pack within its window."""


NOTHING_KNOWN = Known()


class Packing:
    """The packs of a stream.

    Args:
        costs_at: tokens and crops of positions.
        capacity: of one pack.
        window: positions that are packed together.
        known: the first windows' packs, where they are already known.
        name_at: what to call a position in an error, such as its example's id.
        method: how packs are found and ordered.
        step: packs of one optimizer step; the balanced method orders by it.

    Raises:
        ConfigError: a capacity or the window is too small to hold anything.
    """

    def __init__(
        self,
        costs_at: CostsAt,
        capacity: Capacity,
        window: int,
        known: Known = NOTHING_KNOWN,
        name_at: Callable[[int], str] = "position {}".format,
        method: PackingMethod = PackingMethod.best_fit,
        step: int = 1,
    ) -> None:
        if window < 1 or capacity.tokens < 1 or capacity.crops < 0:
            raise ConfigError(
                f"packing window of {window} examples, packs of {capacity.tokens} tokens and {capacity.crops} crops: "
                "set packing_window and sequence_length to at least 1 and crops_per_pack to at least 0"
            )
        self.capacity, self.window, self.method, self.step = capacity, window, method, step
        self._costs_at, self._name_at = costs_at, name_at
        self._ends: list[int] = np.cumsum(np.asarray(known.counts, np.int64)).tolist()
        """Number of packs in all windows up to and including each."""
        self._known = np.zeros(0, np.uint16) if known.packs is None else known.packs
        self._planned: OrderedDict[int, list[list[int]]] = OrderedDict()
        self._costs: OrderedDict[int, list[float]] = OrderedDict()

    def pack(self, number: int) -> list[int]:
        """Positions of a pack, ascending.

        Raises:
            DataError: an example of its window is larger than a pack; names it, with both numbers.
        """
        window, place = self._find(number)
        return self.packs_of(window)[place]

    def cost(self, number: int) -> float:
        """What a pack costs to compute, in tokens of the language model: a row of `sequence_length` tokens, and
        `CROP_TOKENS` for each crop in it. Packs that were not balanced count alike.

        Raises:
            DataError: as `pack`.
        """
        if self.method is PackingMethod.best_fit:
            return float(self.capacity.tokens)
        window, place = self._find(number)
        if window not in self._costs:
            _, crops = self._costs_at(window * self.window, self.window)
            self._costs[window] = [float(self._cost(crops, pack, window)) for pack in self.packs_of(window)]
            _forget(self._costs)
        return self._costs[window][place]

    def packs_of(self, window: int) -> list[list[int]]:
        """All packs of a window, as positions."""
        if (found := self._planned.get(window)) is not None:
            self._planned.move_to_end(window)
            return found
        was_planned = (window + 1) * self.window <= len(self._known)
        packs = self._read(window) if was_planned else self._plan(window)
        if window < len(self._ends) and len(packs) != self._ends[window] - self._first(window):
            raise DataError(
                f"window {window} has {len(packs)} packs, the plan says {self._ends[window] - self._first(window)}: it "
                "was made from other costs or by other code; run the mixture stage again"
            )
        if window == len(self._ends):
            self._ends.append(self._first(window) + len(packs))
        self._planned[window] = packs
        _forget(self._planned)
        return packs

    def counts(self, packs: int) -> list[int]:
        """Packs of each of the first windows, as many as hold the first `packs` packs."""
        if packs > 0:
            self._find(packs - 1)
        ends = self._ends[: bisect.bisect_left(self._ends, packs) + 1] if packs > 0 else []
        return [end - start for start, end in itertools.pairwise([0, *ends])]

    def packs(self, start: int, stop: int) -> Iterator[list[int]]:
        """Packs `start` to `stop` (exclusive)."""
        return (self.pack(number) for number in range(start, stop))

    def _find(self, number: int) -> tuple[int, int]:
        """The window of a pack, and its place there."""
        if number < 0:
            raise DataError(f"pack {number} does not exist; packs are numbered from 0")
        while not self._ends or self._ends[-1] <= number:
            self.packs_of(len(self._ends))
        window = bisect.bisect_right(self._ends, number)
        return window, number - self._first(window)

    def _first(self, window: int) -> int:
        """Number of a window's first pack."""
        while len(self._ends) < window:
            self.packs_of(len(self._ends))
        return self._ends[window - 1] if window else 0

    def _read(self, window: int) -> list[list[int]]:
        """The packs of a window that was planned before."""
        start = window * self.window
        numbers = self._known[start : start + self.window]
        positions = np.argsort(numbers, kind="stable") + start
        return [pack.tolist() for pack in np.split(positions, np.cumsum(np.bincount(numbers))[:-1])]

    def _plan(self, window: int) -> list[list[int]]:
        start = window * self.window
        tokens, crops = self._costs_at(start, self.window)
        balanced = self.method is PackingMethod.balanced
        try:
            packed = (full_packs if balanced else pack_window)(tokens, crops, self.capacity)
        except TooLarge as error:
            message = (
                f"{self._name_at(start + error.number)} {error}; raise train.sequence_length or train.crops_per_pack"
            )
            raise DataError(
                f"{message}, or draw fewer conversations of it with the mixture's max_conversations"
            ) from error
        keys = mix(np.arange(len(packed), dtype=np.uint64) + mix(np.array([window], np.uint64)))
        order: list[int] = np.argsort(keys, kind="stable").tolist()  # best fit makes the fullest first
        if balanced:
            costs = np.array([self._cost(crops, pack) for pack in packed], np.int64)
            order = like_cost(costs, self._first(window), self.step, keys)
        return [[start + item for item in packed[i]] for i in order]

    def _cost(self, crops: Ints, pack: Sequence[int], window: int = 0) -> int:
        """Of a pack of items, or of positions of a window."""
        items = np.asarray(pack) - window * self.window
        return self.capacity.tokens + CROP_TOKENS * int(crops[items].sum())


def _forget(windows: "OrderedDict[int, Any]") -> None:
    while len(windows) > _KEPT_WINDOWS:
        windows.popitem(last=False)
