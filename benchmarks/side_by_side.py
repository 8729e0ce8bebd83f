"""What the benchmarks have in common: rounds in turn, and the one JSON object at the end."""

import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Seconds = tuple[float, float]
"""Wall time, and CPU time of the process: what neighbours on a shared machine take is in the first only."""
Round = Callable[[], Sequence[Seconds]]
"""One round over all inputs."""


def timed(function: Callable[[Any], Any], inputs: Sequence[Any]) -> list[Seconds]:
    """Seconds for each input."""
    seconds = []
    for one in inputs:
        wall, cpu = time.perf_counter(), time.process_time()
        function(one)
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def in_turn(contestants: dict[str, Round], rounds: int) -> dict[str, list[Seconds]]:
    """Mean seconds per input of every round of every contestant; they take turns, after one round that does not count.

    Args:
        rounds: at least five.
    """
    for one in contestants.values():
        one()
    times: dict[str, list[Seconds]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, one in contestants.items():
            walls, cpus = zip(*one(), strict=True)
            times[name].append((statistics.fmean(walls), statistics.fmean(cpus)))
    return times


def milliseconds(times: Sequence[Seconds], clock: int = 0) -> float:
    """The median of the rounds by wall clock (0) or CPU time (1)."""
    return round(statistics.median(one[clock] for one in times) * 1000, 3)


class Sizes(dict[str, dict[str, list[Seconds]]]):
    """The times of every contestant (`ours` and `peer` among them) for every size of input."""

    def mean(self, name: str, clock: int = 0) -> float:
        """Milliseconds, geometric mean over the sizes."""
        return round(statistics.geometric_mean(milliseconds(times[name], clock) for times in self.values()), 3)

    def ratio(self, slow: str = "peer", fast: str = "ours", clock: int = 0) -> float:
        """How many times faster, geometric mean over the sizes."""
        return round(self.mean(slow, clock) / self.mean(fast, clock), 2)

    def spread(self) -> list[float]:
        """Smallest and largest ratio of one round by wall clock, of the rounds that all sizes had."""
        by_size = [
            [peer[0] / ours[0] for peer, ours in zip(times["peer"], times["ours"], strict=True)]
            for times in self.values()
        ]
        rounds = [statistics.geometric_mean(one) for one in zip(*by_size, strict=False)]
        return [round(min(rounds), 2), round(max(rounds), 2)]

    def table(self) -> dict[str, dict[str, float]]:
        """Milliseconds by size and contestant, and the ratio of each size."""
        return {
            size: {f"{name}_ms": milliseconds(seconds) for name, seconds in times.items()}
            | {"ratio": round(milliseconds(times["peer"]) / milliseconds(times["ours"]), 2)}
            for size, times in self.items()
        }


def result(
    name: str,
    *,
    unit: str,
    ours: float,
    peer: float,
    peer_name: str,
    ratio: float,
    spread: Any,
    goal: float,
    **more: Any,
) -> None:
    """Prints the result as the last line.

    Args:
        ratio: how many times better ours is, above 1 is better.
        spread: smallest and largest ratio of a round.
        more: what else the benchmark knows; `versions` are added to the project's own.
    """
    versions = {package: importlib.metadata.version(package) for package in ("torch", "numpy", "pillow")}
    versions |= {"python": platform.python_version()} | more.pop("versions", {})
    print(
        json.dumps(
            {"name": name, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": round(ratio, 2)}
            | {"spread": spread, "goal": goal, "versions": versions}
            | more
        )
    )
