"""Which URL is asked next, so that no host is asked too much at once and none holds up the others."""

import heapq
import itertools
from collections import Counter, deque
from dataclasses import dataclass


@dataclass
class Job:
    """One URL and what the source says of its content."""

    url: str
    host: str
    expected: str | None
    attempts: int = 0
    moved: bool = False
    """The last attempt was led to another place; what went wrong there is no fault of `host`."""


class HostTurns:
    """Which URL is asked next: hosts take turns, none has more than `per_host` in flight, and what must wait comes back
    when it is due."""

    def __init__(self, per_host: int) -> None:
        self.per_host = per_host
        self._queues: dict[str, deque[Job]] = {}
        self._active: Counter[str] = Counter()
        self._ready: deque[str] = deque()
        self._offered: set[str] = set()
        self._paused: dict[str, float] = {}
        self._due: list[tuple[float, int, Job]] = []
        self._number = itertools.count()

    def add(self, job: Job, first: bool = False) -> None:
        queue = self._queues.setdefault(job.host, deque())
        if first:
            queue.appendleft(job)
        else:
            queue.append(job)
        self._offer(job.host)

    def take(self, now: float) -> Job | None:
        """The next URL to ask for, if there is one now."""
        self._wake(now)
        while self._ready:
            host = self._ready.popleft()
            self._offered.discard(host)
            if host in self._paused:  # since it was offered; what waits for its end offers it again
                continue
            job = self._queues[host].popleft()
            if not self._queues[host]:
                del self._queues[host]
            self._active[host] += 1
            self._offer(host)
            return job
        return None

    def finish(self, job: Job) -> None:
        """A URL that was taken is no longer in flight."""
        self._active[job.host] -= 1
        if not self._active[job.host]:
            del self._active[job.host]
        self._offer(job.host)

    def postpone(self, job: Job, until: float, whole_host: bool) -> None:
        """A URL that was finished is asked again at that time; with `whole_host` nothing else of its host is before."""
        heapq.heappush(self._due, (until, next(self._number), job))
        if whole_host:
            self._paused[job.host] = max(until, self._paused.get(job.host, 0.0))

    def drop(self, host: str) -> list[Job]:
        """Takes all URLs of a host that are not in flight out of the turns."""
        jobs = list(self._queues.pop(host, ()))
        jobs += [job for _, _, job in self._due if job.host == host]
        self._due = [entry for entry in self._due if entry[2].host != host]
        heapq.heapify(self._due)
        self._paused.pop(host, None)
        if host in self._offered:
            self._offered.discard(host)
            self._ready.remove(host)
        return jobs

    def seconds_to_next(self, now: float) -> float | None:
        """Until something that waits is due; None: nothing waits."""
        return max(0.0, self._due[0][0] - now) if self._due else None

    def _wake(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            _, _, job = heapq.heappop(self._due)
            if (until := self._paused.get(job.host)) is not None:
                if until > now:  # asked later still by another answer
                    heapq.heappush(self._due, (until, next(self._number), job))
                    continue
                del self._paused[job.host]
            self.add(job, first=True)

    def _offer(self, host: str) -> None:
        free = self._active[host] < self.per_host and host not in self._paused
        if free and host in self._queues and host not in self._offered:
            self._offered.add(host)
            self._ready.append(host)
