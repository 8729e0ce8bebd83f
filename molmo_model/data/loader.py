"""The loader: the micro-batches of one rank for optimizer step n, with or without worker processes.

Step n (from 1) consists of the packs [(n - 1) * packs_per_step, n * packs_per_step) of the plan. `assign` deals them to
the ranks, equally many to each and level in cost, and each makes them `packs_per_microbatch` at a time; where the packs
do not come out even, ranks get empty packs, so that all make the same number of equally shaped micro-batches. What a
pack holds depends on its number alone: ranks, workers and restarts do not change the global batch, and the step number
is all there is to resume from.

Examples that cannot be read or decoded end a training, or with `skip_bad` are left out of their pack and reported with
the step that they belong to. Which ones depends on the data alone, so it too is the same for any number of ranks.

Workers prefetch micro-batches, and tell the plan which examples come next, so that it fetches them from a bucket in the
background. Because a batch is a pure function of its step, whatever they hold in flight at a
checkpoint need not be saved. Each notes what it is working on in shared memory: when one dies without a word (memory,
a broken codec), the error names the example. They are processes of our own rather than torch's `DataLoader`, which
draws a seed from the global generator (so that resuming would change the run) and tells a dead worker by its number.
"""

import contextlib
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from molmo_model.data.example import Example
from molmo_model.data.mixture import Draw
from molmo_model.data.packing import assign
from molmo_model.errors import ConfigError, DataError, MolmoError, StorageError

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]
_AHEAD = 2
"""Micro-batches that each worker prepares in advance."""
_KEPT_STEPS = 4
_PARENT_CHECK = 1.0
"""Seconds after which an idle worker looks whether its parent still lives."""
_NOT_THE_DATA = (StorageError, ConfigError, MemoryError, ImportError)
"""Failures that another attempt, another machine or another setting would not have: no reason to skip an example."""


@dataclass(frozen=True)
class Skipped:
    """An example that was left out of its pack."""

    step: int
    pack: int
    dataset: str
    id: str
    row: int
    """In the dataset's index."""
    reason: str


class PackSource(Protocol):
    """What the loader needs of `molmo_model.data.plan.Plan`."""

    def pack(self, number: int) -> list[Draw]: ...

    def cost(self, number: int) -> float: ...

    def ahead(self, draws: Iterable[Draw]) -> None: ...

    def read(self, draw: Draw) -> Example: ...

    def id(self, draw: Draw) -> str: ...

    def name(self, draw: Draw) -> str: ...

    def close(self) -> None: ...


Encode = Callable[[Example, Draw, int], Any]
"""(example, draw, key) to an encoded example. `draw.conversations` are the conversations to take, in this order;
`key` seeds the example's own generator, `generator(key)`."""
Collate = Callable[[list[list[Any]]], Batch]
"""Packs to tensors; a pack may be empty."""


def generator(key: int) -> np.random.Generator:
    """The generator of one draw. It is counter-based, so keys that lie close give streams that do not."""
    return np.random.Generator(np.random.Philox(key=key))


class Loader:
    """Micro-batches by step.

    Args:
        plan: packs by number.
        encode: turns one draw into arrays; runs in the workers.
        collate: turns packs into tensors; runs in the workers.
        rank: of this process, below `world`.
        world: number of ranks that share a step.
        packs_per_step: packs of one global batch.
        packs_per_microbatch: rows of one micro-batch.
        workers: processes that prepare batches in advance; 0 prepares them here, when they are asked for.
        pin_memory: page-locked batches, for asynchronous copies to a GPU.
        start_method: how workers start: `fork`, `forkserver` or `spawn` (these two pickle plan, encode and collate).
        skip_bad: leave out examples whose data are at fault, and list them in `skipped`.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        plan: PackSource,
        encode: Encode,
        collate: Collate,
        rank: int,
        world: int,
        packs_per_step: int,
        packs_per_microbatch: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        start_method: str = "fork",
        skip_bad: bool = False,
    ) -> None:
        if not 0 <= rank < world or packs_per_step < 1 or packs_per_microbatch < 1 or workers < 0:
            raise ConfigError(
                f"loader: rank {rank} of {world}, {packs_per_step} packs per step, {packs_per_microbatch} per "
                f"micro-batch, {workers} workers; rank must be below world, packs at least 1, workers at least 0"
            )
        self._plan = plan
        self._batches = _MicroBatches(
            plan, encode, collate, rank, world, packs_per_step, packs_per_microbatch, max(workers, 1), skip_bad
        )
        self.microbatches = self._batches.per_step
        """Micro-batches of every rank in every step."""
        self.skipped: list[Skipped] = []
        """What was left out of this rank's micro-batches of the step that `step` gave last."""
        self._workers, self._pin_memory, self._start_method = workers, pin_memory, start_method
        self._prefetch: _Prefetch | None = None

    def step(self, number: int) -> list[Batch]:
        """This rank's micro-batches of a step, from 1. Any may be asked for; those that follow it are prefetched.
        `skipped` then says what was left out of them.

        Raises:
            DataError: an example cannot be read or encoded, or a worker died at it; names the example.
        """
        if number < 1:
            raise ConfigError(f"loader: step {number} does not exist; steps are numbered from 1")
        if self._workers:
            made = self._prefetched(number)
        else:
            made = [self._batches.make(number, place) for place in range(self.microbatches)]
        batches = [batch for batch, _ in made]
        self.skipped = [one for _, skipped in made for one in skipped]
        if self._pin_memory:
            return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return batches

    def _prefetched(self, number: int) -> list["_Made"]:
        if self._prefetch is None or self._prefetch.next_step != number:
            self.close()
            self._prefetch = _Prefetch(self._batches, number, self._workers, self._start_method)
        try:
            return self._prefetch.take()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers, and what the plan fetches in advance."""
        self._plan.close()
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_Made = tuple[Batch, list[Skipped]]


class _MicroBatches:
    """Micro-batches of one rank by (step, place in the step); what a worker process holds.

    `stride` is the number of processes that share them: each makes every `stride`-th, which tells it what comes next.
    """

    def __init__(
        self,
        plan: PackSource,
        encode: Encode,
        collate: Collate,
        rank: int,
        world: int,
        packs_per_step: int,
        packs_per_microbatch: int,
        stride: int,
        skip_bad: bool,
    ) -> None:
        self._plan, self._encode, self._collate = plan, encode, collate
        self._stride, self._skip_bad = stride, skip_bad
        self._announced: dict[int, list[Draw]] = {}
        """Draws of packs that the plan was told about."""
        self._rank, self._world, self._packs_per_step = rank, world, packs_per_step
        self._dealt: dict[int, list[int]] = {}
        """This rank's packs of the steps asked for last."""
        most = -(-packs_per_step // world)
        self._rows = min(packs_per_microbatch, most)
        self.per_step = -(-most // self._rows)

    def packs(self, step: int, place: int) -> list[int | None]:
        """Pack numbers of a micro-batch; None for an empty one."""
        chosen: list[int | None] = list(self._mine(step)[place * self._rows : (place + 1) * self._rows])
        return chosen + [None] * (self._rows - len(chosen))

    def _mine(self, step: int) -> list[int]:
        """This rank's packs of a step."""
        if step not in self._dealt:
            numbers = range((step - 1) * self._packs_per_step, step * self._packs_per_step)
            dealt = assign([self._plan.cost(number) for number in numbers], self._world)
            self._dealt[step] = [numbers[place] for place in dealt[self._rank]]
            while len(self._dealt) > _KEPT_STEPS:
                del self._dealt[next(iter(self._dealt))]
        return self._dealt[step]

    def make(self, step: int, place: int, note: Callable[[int, int], None] = lambda pack, place: None) -> _Made:
        """One micro-batch, and what was left out of it; `note` is told which example of which pack is next."""
        packs = self.packs(step, place)
        draws = self._announce(step, place)
        skipped: list[Skipped] = []
        loaded = [[] if pack is None else self._load(step, pack, draws[pack], note, skipped) for pack in packs]
        return self._collate(loaded), skipped

    def _announce(self, step: int, place: int) -> dict[int, list[Draw]]:
        """The draws of a micro-batch; tells the plan about them and about those of this process's next one."""
        following = divmod((step - 1) * self.per_step + place + self._stride, self.per_step)
        now, soon = self.packs(step, place), self.packs(following[0] + 1, following[1])
        known = self._announced
        self._announced = {
            pack: known[pack] if pack in known else self._plan.pack(pack) for pack in (*now, *soon) if pack is not None
        }
        self._plan.ahead(draw for pack, draws in self._announced.items() if pack not in known for draw in draws)
        return self._announced

    def name(self, pack: int, place: int) -> str:
        """What to call an example in an error."""
        return f"{self._plan.name(self._plan.pack(pack)[place])}, pack {pack}"

    def _load(
        self, step: int, number: int, draws: list[Draw], note: Callable[[int, int], None], skipped: list[Skipped]
    ) -> list[Any]:
        """The encoded examples of a pack; those whose data are at fault are added to `skipped` or raised."""
        encoded = []
        for place, draw in enumerate(draws):
            note(number, place)
            try:
                encoded.append(self._encode(self._plan.read(draw), draw, draw.key))
            except Exception as error:
                kind = "" if isinstance(error, MolmoError) else f"{type(error).__name__}: "
                if not self._skip_bad or isinstance(error, _NOT_THE_DATA):
                    raise DataError(f"{self._plan.name(draw)}, pack {number}: {kind}{error}") from error
                reason = re.sub(r" at 0x[0-9a-f]+", "", f"{kind}{error}")  # some decoders print where in memory
                skipped.append(Skipped(step, number, draw.dataset, self._plan.id(draw), draw.row, reason))
        return encoded


class _Prefetch:
    """Worker processes that prepare the micro-batches of consecutive steps: the i-th is worker i % W's."""

    def __init__(self, batches: _MicroBatches, first: int, workers: int, start_method: str) -> None:
        self.next_step = first
        self._batches = batches
        self._asked = self._taken = (first - 1) * batches.per_step
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(_Worker(batches, start_method))
            for _ in range(_AHEAD * workers):
                self._ask()
        except BaseException:
            self.close()
            raise

    def take(self) -> list[_Made]:
        """The micro-batches of the next step."""
        taken = []
        for _ in range(self._batches.per_step):
            taken.append(self._workers[self._taken % len(self._workers)].receive())
            self._taken += 1
            self._ask()
        self.next_step += 1
        return taken

    def close(self) -> None:
        """Ends the workers, at once and whatever they are doing."""
        for worker in self._workers:
            worker.close()

    def _ask(self) -> None:
        step, place = divmod(self._asked, self._batches.per_step)
        self._workers[self._asked % len(self._workers)].ask(step + 1, place)
        self._asked += 1


class _Worker:
    """One process that makes the micro-batches it is asked for, in order."""

    def __init__(self, batches: _MicroBatches, start_method: str) -> None:
        from torch import multiprocessing  # it teaches pipes to pass tensors through shared memory

        context: Any = multiprocessing.get_context(start_method)
        self._batches = batches
        self._connection, theirs = context.Pipe()
        self._at = context.Array("q", 2, lock=False)
        """Pack number plus one, and place in it, of the example that the worker is at; pack 0 is none."""
        args = (batches, theirs, self._at, os.getpid())
        self._process = context.Process(target=_serve, args=args, daemon=True, name="molmo-loader")
        self._process.start()
        theirs.close()

    def ask(self, step: int, place: int) -> None:
        """Asks for a micro-batch; does not wait."""
        with contextlib.suppress(OSError):  # a dead one: `receive` says so, and at what it died
            self._connection.send((step, place))

    def receive(self) -> _Made:
        """The next micro-batch of those asked for."""
        wait([self._connection, self._process.sentinel])
        try:
            if not self._connection.poll():
                raise EOFError
            made, error = self._connection.recv()
        except (EOFError, OSError) as lost:
            raise DataError(self._obituary()) from lost
        if error is not None:
            raise DataError(error)
        return made

    def close(self) -> None:
        self._process.terminate()
        self._process.join(timeout=2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def _obituary(self) -> str:
        self._process.join(timeout=2)
        code, (pack, place) = self._process.exitcode, list(self._at)
        reason = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        at = self._batches.name(pack - 1, place) if pack else "no example"
        hint = "; signal 9 mostly means that memory ran out" if code == -signal.SIGKILL else ""
        return f"loader: a worker died ({reason}) at {at}{hint}"


def _serve(batches: _MicroBatches, connection: Any, at: Any, parent: int) -> None:
    """What a worker does: takes questions until its parent is gone."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler, which would save a checkpoint
    torch.set_num_threads(1)

    def note(pack: int, place: int) -> None:
        at[0], at[1] = pack + 1, place

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            while not connection.poll(_PARENT_CHECK):
                if os.getppid() != parent:
                    return
            try:
                step, place = connection.recv()
                answer: tuple[_Made | None, str | None] = (batches.make(step, place, note), None)
            except DataError as error:
                answer = (None, str(error))
            except Exception:
                answer = (None, f"loader: a worker failed outside any example:\n{traceback.format_exc()}")
            at[0] = 0
            connection.send(answer)
