"""Several processes that answer the questions of one task, one GPU each, without talking to each other.

Each gets its share beforehand (`shares`), writes its own file of the journal and says that it is done; the one that
started them waits and then reads all files. They live on for the next task with their model loaded, and end with
the process that started them, however that one ends.
"""

import atexit
import contextlib
import heapq
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from molmo_model import errors
from molmo_model.artifacts import write_text_atomic
from molmo_model.config import Engine, Params, params_from_dict, to_dict
from molmo_model.data.example import Example
from molmo_model.errors import EvaluationError, MolmoError
from molmo_model.eval.journal import Identity
from molmo_model.train.supervisor import signal_when_parent_dies

MOST_TOGETHER = 64
"""Questions about one picture that one rank answers; more of them are worth encoding it again."""
POLL_SECONDS = 0.2
SECONDS_TO_END = 5.0
"""What ranks without work get to end by themselves."""
LOG_TAIL = 4_000
"""Characters of a rank's output that an error quotes."""
PIXELS_PER_TOKEN, MOST_PIXELS = 800, 2_000_000
"""Of the rough cost: a crop of 336 x 336 is 144 tokens, and about a dozen of them is the most."""
FRAMES, TOKENS_PER_FRAME = 128, 81
CHARACTERS_PER_TOKEN = 4


def rough_cost(example: Example, characters: int) -> float:
    """About how many tokens a question has, from sizes alone: no tokenizer is loaded for it.

    Args:
        characters: of the prompt.
    """
    pictures = sum(min(image.width * image.height, MOST_PIXELS) / PIXELS_PER_TOKEN for image in example.images)
    films = sum(min(film.frames, FRAMES) * TOKENS_PER_FRAME for film in example.videos)
    return 1.0 + pictures + films + characters / CHARACTERS_PER_TOKEN


def shares(costs: Sequence[tuple[str, float]], count: int) -> list[list[int]]:
    """The questions of each of `count` ranks or machines, in order: a function of the questions alone, so that machines
    agree without asking each other.

    Questions about the same pictures stay together, so that these are encoded once, though no more than
    `MOST_TOGETHER`. Groups go, the largest first, to
    who has least (longest processing time first, Graham 1969: at most 4/3 of the best split).

    Args:
        costs: per question, what it is about and what it costs.
    """
    about: dict[str, list[int]] = {}
    for index, (pictures, _) in enumerate(costs):
        about.setdefault(pictures, []).append(index)
    groups = [
        all[start : start + MOST_TOGETHER] for all in about.values() for start in range(0, len(all), MOST_TOGETHER)
    ]
    sized = sorted((-sum(costs[index][1] for index in group), group) for group in groups)
    loads = [(0.0, number) for number in range(count)]
    found: list[list[int]] = [[] for _ in range(count)]
    for size, group in sized:
        load, number = heapq.heappop(loads)
        found[number] += group
        heapq.heappush(loads, (load - size, number))
    return [sorted(share) for share in found]


@dataclass(frozen=True)
class Wanted:
    """One question to ask: where it lies, and under which key and turn its answer is kept."""

    row: int
    """Of the dataset's index."""
    conversation: int
    key: str
    turn: int


@dataclass(frozen=True)
class Job:
    """Questions of one cell, as a rank gets them."""

    params: Params
    cell: dict[str, str]
    checkpoint: Path
    digest: str
    """Of the checkpoint: tells it from another in its place."""
    shards: str
    engine: Engine
    identity: Identity
    ranks: int
    wanted: list[Wanted]
    journal: Path = Path()
    """Folder of the journal's files."""
    writer: str = ""

    def of(self, wanted: list[Wanted], journal: Path, writer: str) -> "Job":
        """A share of it, with a journal's file of its own."""
        return replace(self, wanted=wanted, journal=journal, writer=writer)

    def write(self, path: Path) -> None:
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain |= {"params": to_dict(self.params), "checkpoint": str(self.checkpoint), "journal": str(self.journal)}
        plain |= {"identity": asdict(self.identity), "wanted": [asdict(one) for one in self.wanted]}
        write_text_atomic(path, json.dumps(plain))

    @classmethod
    def read(cls, path: Path) -> "Job":
        plain = json.loads(path.read_text(encoding="utf-8"))
        plain |= {"params": params_from_dict(plain["params"], str(path)), "engine": Engine(plain["engine"])}
        plain |= {"checkpoint": Path(plain["checkpoint"]), "journal": Path(plain["journal"])}
        plain |= {"identity": Identity(**plain["identity"]), "wanted": [Wanted(**one) for one in plain["wanted"]]}
        return cls(**plain)


class Ranks:
    """The processes. Each reads paths of jobs from its standard input and says by a file beside one how it ended."""

    def __init__(self, command: Sequence[str], count: int, gpus: int, folder: Path) -> None:
        """Starts nothing yet.

        Args:
            gpus: of this machine; rank r uses number r modulo that one.
            folder: for jobs and for what the ranks print.
        """
        self._command, self._count, self._gpus = list(command), count, gpus
        self._folder = folder / str(os.getpid())
        self._processes: list[subprocess.Popen[bytes]] = []
        self._jobs = 0
        self._failed = False
        atexit.register(self.close)

    def run(self, jobs: Sequence[Job], poll: Callable[[], None]) -> None:
        """Gives each rank its job and returns when all are done.

        Args:
            poll: called all the while.

        Raises:
            MolmoError: a rank failed, of its own type; all others have ended too.
        """
        try:
            self._start()
            paths = []
            for process, job in zip(self._processes, jobs, strict=False):
                self._jobs += 1
                paths.append(path := self._folder / f"job-{self._jobs}.json")
                job.write(path)
                self._send(process, path)
            while sum(self._ended(number, path) for number, path in enumerate(paths)) < len(paths):
                poll()
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._failed = True
            self.close(now=True)
            raise

    def close(self, now: bool = False) -> None:
        """Ends the processes: those without work end by themselves when their input does."""
        for process in self._processes:
            if now:
                process.kill()
            with contextlib.suppress(OSError):
                _input(process).close()
        deadline = time.monotonic() + SECONDS_TO_END
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []
        if not self._failed:  # else somebody may want to read what they printed
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        if self._processes and all(process.poll() is None for process in self._processes):
            return
        self.close(now=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        for number in range(self._count):
            with open(self._log(number), "wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        self._command,
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        env=self._environment(number),
                        start_new_session=True,  # a terminal's Ctrl-C reaches them through us alone
                        preexec_fn=signal_when_parent_dies(9, os.getpid()),  # noqa: PLW1509 a C call and a kill only
                    )
                )

    def _environment(self, number: int) -> dict[str, str]:
        found = dict(os.environ)
        found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._count)))
        if self._gpus:
            visible = [name for name in found.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            names = visible or [str(one) for one in range(self._gpus)]
            found["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]
        return found

    def _log(self, number: int) -> Path:
        return self._folder / f"rank-{number}.log"

    def _send(self, process: "subprocess.Popen[bytes]", path: Path) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died, which `_ended` will say better
            pipe = _input(process)
            pipe.write(f"{path.resolve()}\n".encode())
            pipe.flush()

    def _ended(self, number: int, path: Path) -> bool:
        """Whether a rank has done its job; raises its error."""
        if path.with_suffix(".done").exists():
            return True
        failed = path.with_suffix(".failed")
        code = self._processes[number].poll()
        if failed.exists():
            raise _error(number, json.loads(failed.read_text(encoding="utf-8")))
        if code is not None:
            said = self._log(number).read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].strip()
            raise EvaluationError(
                f"rank {number} of {self._count} ended with code {code} and no traceback; what was answered is kept, "
                f"run it again. Its output, {self._log(number)}:\n{said}"
            )
        return False


def _input(process: "subprocess.Popen[bytes]") -> Any:
    """The pipe to a process that was started with one."""
    if process.stdin is None:
        raise EvaluationError(f"process {process.pid} was started without a pipe")
    return process.stdin


def serve(stdin: Any, work: Callable[[Job], None]) -> None:
    """What a rank does: the jobs whose paths it reads, until its input ends."""
    import traceback

    for line in stdin:
        path = Path(line.strip())
        try:
            work(Job.read(path))
        except Exception as error:
            report = {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
            write_text_atomic(path.with_suffix(".failed"), json.dumps(report))
            return
        write_text_atomic(path.with_suffix(".done"), "")


def _error(number: int, report: dict[str, str]) -> MolmoError:
    """The error of a rank: one that was raised on purpose says all in its message."""
    kind = getattr(errors, report["type"], None)
    if isinstance(kind, type) and issubclass(kind, MolmoError):
        return kind(report["message"])
    return EvaluationError(f"rank {number} failed: {report['type']}: {report['message']}\n{report['traceback']}")
