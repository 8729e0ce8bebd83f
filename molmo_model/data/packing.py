"""Which positions of the global stream share a pack: a pure function of the stream and two capacities.

The stream is cut into windows of `window` positions. Each window is packed by itself, best fit decreasing in two
dimensions (tokens and crops), so a pack never spans two windows and every position stands in exactly one pack. Packs
are numbered through all windows.

How many packs a window needs depends on its costs, so the window that pack p lies in is known from a sum over all
windows before it. That sum is cheap, and it is a plan, not a state: the mixture stage computes the packs of every
window of the run once and keeps the counts with the mixture (one small number per window). With them any pack is found
by bisection and the packing of one window, in milliseconds; without them the counts are recomputed and come out the
same. The alternative, a fixed number of packs per window with empty ones as padding, was not taken: it costs one to
several percent of all packs for ever, to save what fits in a few kilobytes.
"""

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molmo_model.data.order import mix
from molmo_model.errors import ConfigError, DataError

Ints = NDArray[np.int64]
CostsAt = Callable[[int, int], tuple[Ints, Ints]]
"""(start, count) to tokens and crops of each of these positions."""
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
    tokens, crops = np.asarray(tokens, np.int64), np.asarray(crops, np.int64)
    for number in np.flatnonzero((tokens > capacity.tokens) | (crops > capacity.crops)):
        raise TooLarge(
            int(number),
            f"needs {tokens[number]} tokens and {crops[number]} crops; "
            f"a pack holds {capacity.tokens} tokens and {capacity.crops} crops",
        )
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


class Packing:
    """The packs of a stream.

    Args:
        costs_at: tokens and crops of positions.
        capacity: of one pack.
        window: positions that are packed together.
        counts: packs of the first windows, where they are already known.
        name_at: what to call a position in an error, such as its example's id.

    Raises:
        ConfigError: a capacity or the window is too small to hold anything.
    """

    def __init__(
        self,
        costs_at: CostsAt,
        capacity: Capacity,
        window: int,
        counts: Sequence[int] | Ints = (),
        name_at: Callable[[int], str] = "position {}".format,
    ) -> None:
        if window < 1 or capacity.tokens < 1 or capacity.crops < 0:
            raise ConfigError(
                f"packing window of {window} examples, packs of {capacity.tokens} tokens and {capacity.crops} crops: "
                "set packing_window and sequence_length to at least 1 and crops_per_pack to at least 0"
            )
        self.capacity, self.window = capacity, window
        self._costs_at, self._name_at = costs_at, name_at
        self._ends: list[int] = np.cumsum(np.asarray(counts, np.int64)).tolist()
        """Number of packs in all windows up to and including each."""
        self._planned: OrderedDict[int, list[list[int]]] = OrderedDict()

    def pack(self, number: int) -> list[int]:
        """Positions of a pack, ascending.

        Raises:
            DataError: an example of its window is larger than a pack; names it, with both numbers.
        """
        if number < 0:
            raise DataError(f"pack {number} does not exist; packs are numbered from 0")
        while not self._ends or self._ends[-1] <= number:
            packs = self.packs_of(len(self._ends))
            self._ends.append((self._ends[-1] if self._ends else 0) + len(packs))
        window = bisect.bisect_right(self._ends, number)
        first = self._ends[window - 1] if window else 0
        packs = self.packs_of(window)
        if len(packs) != self._ends[window] - first:
            raise DataError(
                f"window {window} has {len(packs)} packs, the plan says {self._ends[window] - first}: it was made "
                "from other costs or by other code; run the mixture stage again"
            )
        return packs[number - first]

    def packs_of(self, window: int) -> list[list[int]]:
        """All packs of a window, as positions. Their order is shuffled: best fit makes the fullest first."""
        if (known := self._planned.get(window)) is not None:
            self._planned.move_to_end(window)
            return known
        start = window * self.window
        try:
            packed = pack_window(*self._costs_at(start, self.window), self.capacity)
        except TooLarge as error:
            message = (
                f"{self._name_at(start + error.number)} {error}; raise train.sequence_length or train.crops_per_pack"
            )
            raise DataError(
                f"{message}, or draw fewer conversations of it with the mixture's max_conversations"
            ) from error
        keys = mix(np.arange(len(packed), dtype=np.uint64) + mix(np.array([window], np.uint64)))
        packs = [[start + item for item in packed[i]] for i in np.argsort(keys, kind="stable")]
        self._planned[window] = packs
        while len(self._planned) > _KEPT_WINDOWS:
            self._planned.popitem(last=False)
        return packs

    def counts(self, packs: int) -> list[int]:
        """Packs of each of the first windows, as many as hold the first `packs` packs."""
        if packs > 0:
            self.pack(packs - 1)
        ends = self._ends[: bisect.bisect_left(self._ends, packs) + 1] if packs > 0 else []
        return [end - start for start, end in itertools.pairwise([0, *ends])]

    def packs(self, start: int, stop: int) -> Iterator[list[int]]:
        """Packs `start` to `stop` (exclusive)."""
        return (self.pack(number) for number in range(start, stop))
