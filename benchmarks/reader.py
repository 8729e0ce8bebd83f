"""P3: samples per second of one process, ours in a true random order of the whole against WebDataset, LitData and MDS.

A sample is its JSON and the bytes of one picture of 67 kB; nobody decodes anything. WebDataset reads our own shards in
the order of the files (its quickest), LitData shuffles as it does in training, MDS is asked by index in a random order.
Ours is measured with and without comparing each range with its xxh3. `hot`: everything lies in the page cache; `cold`:
it was thrown out (`posix_fadvise`) before each pass, and ours says which rows come next, as the loader does; there the
disk decides, and who reads a file from end to end is ahead of who reads it in a random order. LitData maps its files,
and pages that are mapped stay: its cold passes may be warmer than they look. All readers must bring the same bytes.

    python -m benchmarks.reader [--quick]
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import Peer
from benchmarks.side_by_side import result
from molmo_model.data.example import Conversation, Example, Image, Message
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards

PICTURE_BYTES = 67_000
SHARD_BYTES = 64_000_000
AHEAD = 64
"""Rows announced before they are read, in the cold passes: a micro-batch or two."""
GOALS = {"webdataset": 7.0, "webdataset_shuffle": 7.0, "litdata": 1.2, "mds_index": 2.0}
VERIFIED_GOAL = 0.8
"""Rate with the xxh3 compared, as a share of the rate without."""


def examples(count: int) -> Iterator[tuple[str, Example]]:
    """Pictures of noise, which no reader can compress, with a short question each."""
    rng = np.random.default_rng(3)
    for number in range(count):
        talk = (Message("user", "What is shown?"), Message("assistant", f"Noise, number {number}, and nothing else."))
        picture = Image(rng.bytes(PICTURE_BYTES), 640, 480, "JPEG")
        yield "train", Example(f"sample-{number:05d}", (picture,), (Conversation("qa", talk),))


def ours(reader: ShardReader, seed: int, take: Callable[[int], Any], ahead: int = 0) -> dict[str, Any]:
    """One pass in a random order of all rows, and what it took."""
    order = np.random.default_rng(seed).permutation(len(reader)).tolist()
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(order), ahead or len(order)):
        rows = order[start : start + (ahead or len(order))]
        if ahead:
            reader.ahead(order[start + ahead : start + 2 * ahead])
        for row in rows:
            take(row)
    return {"seconds": [time.perf_counter() - wall, time.process_time() - cpu], "samples": len(order)}


def evict(folder: Path) -> None:
    """Throws the files below a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(reader: ShardReader, peer: Peer, count: int) -> None:
    """All readers bring the same bytes for each id."""
    found = {}
    for row in range(len(reader)):
        text, files = reader.members(row)
        found[json.loads(bytes(text))["id"]] = hashlib.sha256(bytes(text) + bytes(files[0])).hexdigest()
    if len(found) != count:
        raise SystemExit(f"ours brought {len(found)} samples of {count}")
    for name in GOALS:
        if peer.ask(command="digests", peer=name, seed=0) != found:
            raise SystemExit(f"{name} and ours brought different samples")


Rates = dict[str, list[tuple[float, float]]]
"""Samples per second of each contestant and round, by wall clock and by CPU time."""
WALL, CPU = 0, 1


def measure(folder: Path, reader: ShardReader, peer: Peer, rounds: int, cold: bool) -> Rates:
    """The contestants take turns, after one round that does not count."""

    def unverified(row: int) -> Any:
        return reader.members(row, verify=False)

    contestants: dict[str, Callable[[int], dict[str, Any]]] = {
        "ours": lambda seed: ours(reader, seed, unverified, AHEAD if cold else 0),
        "ours_verified": lambda seed: ours(reader, seed, reader.members, AHEAD if cold else 0),
        "ours_examples": lambda seed: ours(reader, seed, reader.read, AHEAD if cold else 0),
        **{name: (lambda seed, name=name: peer.ask(command="time", peer=name, seed=seed)) for name in GOALS},
    }
    rates: Rates = {name: [] for name in contestants}
    for seed in range(rounds + 1):
        for name, go in contestants.items():
            if cold:
                peer.ask(command="close")
                evict(folder)
            answer = go(seed)
            if answer["samples"] != len(reader):
                raise SystemExit(f"{name} brought {answer['samples']} samples of {len(reader)}")
            if seed:
                wall, cpu = (len(reader) / seconds for seconds in answer["seconds"])
                rates[name].append((wall, cpu))
    return rates


def medians(rates: Rates) -> dict[str, int]:
    return {name: round(statistics.median(wall for wall, _ in one)) for name, one in rates.items()}


def ratios(rates: Rates, clock: int = WALL) -> dict[str, float]:
    """How many times quicker ours is, and what the comparison with the xxh3 leaves: medians of the rounds' ratios."""

    def ratio(better: str, worse: str) -> float:
        pairs = zip(rates[better], rates[worse], strict=True)
        return round(statistics.median(a[clock] / b[clock] for a, b in pairs), 2)

    found = {name: ratio("ours", name) for name in GOALS}
    found |= {f"{name}_by_verified": ratio("ours_verified", name) for name in GOALS}
    return found | {"verified_of_unverified": ratio("ours_verified", "ours")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 samples and 5 rounds, not 8,000 and 9")
    count, rounds = (1000, 5) if parser.parse_args().quick else (8000, 9)
    with tempfile.TemporaryDirectory() as name, Peer("reader_peers.py") as peer:
        folder = Path(name)
        started = time.perf_counter()
        write_shards(examples(count), folder / "ours", SHARD_BYTES)
        seconds = {"ours": round(time.perf_counter() - started, 2)}
        reader = ShardReader(folder / "ours")
        shards = sorted(map(str, (folder / "ours").glob("*.tar")))
        seconds |= peer.ask(command="write", shards=shards, folder=str(folder / "peers"))["write_seconds"]
        os.sync()  # what is not on the disk yet cannot be thrown out of the cache
        check(reader, peer, count)
        hot = measure(folder, reader, peer, rounds, cold=False)
        cold = measure(folder, reader, peer, rounds, cold=True)
        versions = peer.ask(command="versions")
    spread = [a[WALL] / b[WALL] for a, b in zip(hot["ours"], hot["webdataset"], strict=True)]
    rates = medians(hot)
    result(
        "reader",
        unit="samples/s of one process, page cache hot, true random order",
        ours=rates["ours"],
        peer=rates["webdataset"],
        peer_name="WebDataset, in the order of the files",
        ratio=ratios(hot)["webdataset"],
        spread=[round(min(spread), 2), round(max(spread), 2)],
        goal=GOALS["webdataset"],
        goals=GOALS | {"verified_of_unverified": VERIFIED_GOAL},
        hot=rates,
        hot_ratios=ratios(hot),
        hot_cpu_ratios=ratios(hot, CPU),
        cold=medians(cold),
        cold_ratios=ratios(cold),
        samples=count,
        sample_bytes=round(statistics.fmean(reader.index["size"].to_pylist())),
        write_seconds=seconds,
        versions=versions,
    )


if __name__ == "__main__":
    main()
