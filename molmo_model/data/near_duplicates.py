"""Pictures that look like one another, above all a picture of evaluation that training has already seen: recompressed,
resized, brightened or slightly cropped. Equal files are found by their SHA-256, in `mixture.image_leaks`.

Three steps, each cheap next to the one before it:

1. `image_hashes` keeps a 64-bit perceptual hash and a grey copy of 32 x 32 cells of every picture.
2. Hashes that differ in at most `DISTANCE` bits are found through multi-index hashing (Norouzi, Punjani and Fleet,
   arXiv 1307.2982): 14 bits spread over four bands of 16 leave at most 3 in one of the first three or 2 in the last,
   so each hash of evaluation is looked up in four tables under 697 or 137 keys, instead of being compared with all.
3. A second look at the grey copies: one is moved, scaled and brightened onto the other (Gauss-Newton, as Lucas and
   Kanade register images), and what then still differs most, over any 2 x 2 cells, must be at most `DIFFERENCE`.
   Charts and scenes of one program share a layout, so their hashes are near and their averages too; what differs
   are single numbers and bars, which the largest local difference sees.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from molmo_model.data.image_hashes import FILE, HASHES, SIDE
from molmo_model.data.shard_reader import numbers, read_columns

DISTANCE = 14
"""Bits in which the hashes of a near duplicate may differ."""
DIFFERENCE = 18.0
"""Grey levels, of 255, by which any 2 x 2 cells of a near duplicate may differ once it is aligned."""
CANDIDATES = 64
"""Pictures with the nearest hashes that get a second look, for each picture of evaluation."""
FLAT = 3.0
"""Standard deviation, in grey levels, up to which a picture shows nothing: a black frame is nobody's duplicate."""
Files = tuple[str, str, Sequence[str]]
"""Dataset, example id, and the SHA-256 of its pictures and films."""
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]


@dataclass(frozen=True)
class NearDuplicate:
    """A training and an evaluation example with pictures that look alike."""

    train: tuple[str, str]
    """Dataset and example id."""
    eval: tuple[str, str]
    distance: int
    """Bits in which the hashes differ."""
    difference: int
    """Largest local difference, in grey levels, once aligned."""

    def __str__(self) -> str:
        how = f"{self.distance} of 64 bits and {self.difference} of 255 grey levels apart"
        return f"train {self.train} looks like eval {self.eval}, {how}"


def find_near_duplicates(train: Iterable[Files], held_out: Iterable[Files], hashes: pa.Table) -> list[NearDuplicate]:
    """Training examples whose pictures look like one of evaluation's without being the same file, nearest first.

    Args:
        train: (dataset, example id, SHA-256 of its files) of the rows that are trained on.
        held_out: the same of the evaluation rows.
        hashes: `HASHES` of all of them; files without a row (broken ones) are passed over.
    """
    trained, asked = _owners(train), _owners(held_out)
    names = hashes["image_sha256"].to_pylist()
    words = numbers(hashes["phash"])
    small = np.frombuffer(b"".join(hashes["small"].to_pylist()), np.uint8).reshape(-1, SIDE, SIDE)
    rows = {name: i for i, name in enumerate(names)}  # once each, though several datasets may have a file
    shown = {name: i for name, i in rows.items() if small[i].std() > FLAT}
    sides = [np.array([i for name, i in shown.items() if name in side], np.int64) for side in (trained, asked)]
    best: dict[tuple[tuple[str, str], tuple[str, str]], tuple[int, int]] = {}
    for here, there, bits, difference in _matches(words, small, *sides):
        if names[here] == names[there]:
            continue
        found = (bits, difference)
        for pair in ((a, b) for a in trained[names[here]] for b in asked[names[there]]):
            best[pair] = min(best.get(pair, found), found)
    pairs = [NearDuplicate(a, b, bits, difference) for (a, b), (bits, difference) in best.items()]
    return sorted(pairs, key=lambda pair: (pair.distance, pair.difference, pair.eval, pair.train))


def find_in_artefacts(
    train: Sequence[Files], held_out: Sequence[Files], validation: Path
) -> tuple[list[NearDuplicate], list[str]]:
    """`find_near_duplicates` with the hashes that the validate stage wrote.

    Args:
        train: dataset, example id and files of what is trained on.
        held_out: the same of evaluation.
        validation: folder of the artefacts, one per dataset.

    Returns:
        The pairs, and the datasets with files that have no hash there.
    """
    used: dict[str, set[str]] = {}
    for dataset, _, files in (*train, *held_out):
        used.setdefault(dataset, set()).update(files)
    tables = {name: _read(validation / name / FILE) for name in sorted(used)}
    unknown = [name for name, table in tables.items() if used[name] - set(table["image_sha256"].to_pylist())]
    together = pa.concat_tables([HASHES.empty_table(), *tables.values()])
    return find_near_duplicates(train, held_out, together), unknown


def _read(path: Path) -> pa.Table:
    """A table of hashes; an empty one where there is none."""
    return read_columns(path) if path.exists() else HASHES.empty_table()


def _owners(rows: Iterable[Files]) -> dict[str, list[tuple[str, str]]]:
    owners: dict[str, list[tuple[str, str]]] = {}
    for dataset, name, files in rows:
        for value in dict.fromkeys(files):
            owners.setdefault(value, []).append((dataset, name))
    return owners


# 2. Hashes that are near one another

BANDS = 4
BAND_BITS = 16
BLOCK = 64
"""Hashes of evaluation that are looked up at once: bounds the memory where all hashes are alike."""


def near_hashes(train: Words, held_out: Words, distance: int = DISTANCE) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Pairs of hashes that differ in at most `distance` bits: places in `train`, places in `held_out` and bits, once
    each, for `BLOCK` hashes of `held_out` after the other."""
    tables = [_table(train, band, distance) for band in range(BANDS)]
    for start in range(0, len(held_out), BLOCK):
        part = held_out[start : start + BLOCK]
        found = [_looked_up(part, band, *tables[band], distance) for band in range(BANDS)]
        here, there, bits = (np.concatenate(columns) for columns in zip(*found, strict=True))
        _, first = np.unique(there * len(train) + here, return_index=True)
        yield here[first], there[first] + start, bits[first]


def _table(train: Words, band: int, distance: int) -> tuple[Words, Ints, Ints, Ints]:
    """The hashes in the order of a band, their places, where each value of the band begins, and what a value is looked
    up under: itself, XOR all numbers with as many bits as the band may differ in."""
    keys = _band(train, band)
    order = np.argsort(keys, kind="stable")
    starts = np.searchsorted(keys[order], np.arange((1 << BAND_BITS) + 1))
    every = np.arange(1 << BAND_BITS)
    least, more = divmod(distance, BANDS)  # all bands differing in more would be more than `distance` in sum
    return train[order], order, starts, every[np.bitwise_count(every) <= least - (band > more)]


def _band(words: Words, band: int) -> Ints:
    return ((words >> np.uint64(BAND_BITS * band)) & np.uint64((1 << BAND_BITS) - 1)).astype(np.int64)


def _looked_up(
    part: Words, band: int, words: Words, order: Ints, starts: Ints, masks: Ints, distance: int
) -> tuple[Ints, Ints, Ints]:
    """Places in the table's hashes and in `part`, and bits, of those near one another that agree in this band."""
    probes = (_band(part, band)[:, None] ^ masks).ravel()
    first = starts[probes]
    counts = starts[probes + 1] - first
    there = np.repeat(np.arange(len(part)), counts.reshape(len(part), -1).sum(1))
    ends = np.cumsum(counts)
    at = np.arange(len(there)) + np.repeat(first - (ends - counts), counts)
    bits = np.bitwise_count(words[at] ^ part[there])
    near = np.flatnonzero(bits <= distance)
    return order[at[near]], there[near], bits[near].astype(np.int64)


# 3. The second look


def _matches(
    words: Words, small: NDArray[np.uint8], train: Ints, held_out: Ints
) -> Iterator[tuple[int, int, int, int]]:
    """(training picture, evaluation picture, bits, difference) of all that stand the second look."""
    if not len(train) or not len(held_out):
        return
    for block in near_hashes(words[train], words[held_out]):
        order = np.lexsort((block[0], block[2], block[1]))  # by picture of evaluation, the nearest first
        asked = block[1][order]
        kept = order[np.arange(len(asked)) - np.searchsorted(asked, asked) < CANDIDATES]
        here, there, bits = train[block[0][kept]], held_out[block[1][kept]], block[2][kept]
        for start in range(0, len(here), 1024):
            part = slice(start, start + 1024)
            first, second = small[here[part]], small[there[part]]
            # halved first, which is ten times quicker and drops most; twice the bound, as alignment is coarser there
            rough = np.flatnonzero(differences(_halved(first), _halved(second)) <= 2 * DIFFERENCE)
            exact = differences(first[rough].astype(np.float32), second[rough].astype(np.float32))
            for i in np.flatnonzero(exact <= DIFFERENCE):
                at = start + rough[i]
                yield int(here[at]), int(there[at]), int(bits[at]), round(float(exact[i]))


def _halved(pictures: NDArray[np.uint8]) -> Floats:
    count, side, _ = pictures.shape
    return pictures.reshape(count, side // 2, 2, side // 2, 2).mean((2, 4), dtype=np.float32)


def differences(first: Floats, second: Floats, steps: int = 6) -> Floats:
    """[N] largest difference over any 2 x 2 cells between pictures [N, S, S], once the second was aligned.

    Aligned means: scaled and moved along both axes by up to a tenth of the side, brightened by a factor of 0.7 to 1.4
    and a constant, so that the sum of squares is least; cells that then lie outside do not count.
    """
    if not len(first):
        return np.zeros(0, np.float32)
    count, side, _ = first.shape
    reach = side / 10
    moves = np.zeros((count, 4), np.float32)  # growth and shift of rows, growth and shift of columns, in cells
    along = np.linspace(-1, 1, side, dtype=np.float32)
    for step in range(steps + 1):
        warped, inside = _warp(second, moves)
        cells = inside.sum((1, 2))
        target = first - ((first * inside).sum((1, 2)) / cells)[:, None, None]
        moved = warped - ((warped * inside).sum((1, 2)) / cells)[:, None, None]
        gain = ((target * moved * inside).sum((1, 2)) / ((moved * moved * inside).sum((1, 2)) + 1e-6)).clip(0.7, 1.4)
        rest = (target - gain[:, None, None] * moved) * inside
        if step == steps:
            break
        down = np.gradient(warped, axis=1) * gain[:, None, None] * inside
        right = np.gradient(warped, axis=2) * gain[:, None, None] * inside
        slopes = np.stack([down * along[:, None], down, right * along, right], 1).reshape(count, 4, -1)
        normal = slopes @ slopes.transpose(0, 2, 1) + 1e-3 * side * side * np.eye(4, dtype=np.float32)
        moves += np.linalg.solve(normal, slopes @ rest.reshape(count, -1, 1))[..., 0].astype(np.float32)
        moves = moves.clip(-reach, reach)
    pairs = rest[:, :-1] + rest[:, 1:]
    return np.asarray(np.abs(pairs[:, :, :-1] + pairs[:, :, 1:]).max((1, 2)) / 4)


def _warp(pictures: Floats, moves: Floats) -> tuple[Floats, Floats]:
    """The pictures, moved, and which of their cells came from inside."""
    rows, rows_inside = _interpolation(moves[:, 0], moves[:, 1], pictures.shape[1])
    columns, columns_inside = _interpolation(moves[:, 2], moves[:, 3], pictures.shape[1])
    warped: Floats = np.asarray(rows @ pictures @ columns.transpose(0, 2, 1), np.float32)
    inside: Floats = np.asarray(rows_inside[:, :, None] * columns_inside[:, None, :], np.float32)
    return warped, inside


def _interpolation(growth: Floats, shift: Floats, side: int) -> tuple[Floats, Floats]:
    """[N, S, S] linear interpolation along one axis, and [N, S] whether a cell's source lies inside."""
    cells = np.arange(side, dtype=np.float32)
    along = np.linspace(-1, 1, side, dtype=np.float32)
    source = cells + growth[:, None] * along + shift[:, None]
    weights: Floats = np.maximum(0, 1 - np.abs(source[:, :, None] - cells)).astype(np.float32)
    inside: Floats = ((source >= 0) & (source <= side - 1)).astype(np.float32)
    return weights, inside
