"""Runs torchrun as a child that is always brought to an end: asked first, then killed, and never left behind.

torchrun starts each rank in a session of its own, so killing its process group reaches none of them; they are found
through /proc instead. A stop is asked of the ranks directly (they save their state and end), torchrun then sees an
ordinary end. Needs no torch: the supervising process stays small.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from molmo_model import errors
from molmo_model.errors import MolmoError, TrainingError

POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1
"""Linux `prctl` option: the signal that the kernel sends to this process when its parent dies, however it dies."""
LOG_TAIL = 4_000
"""Characters of torchrun's output that an error message quotes when no rank left a traceback."""


def torchrun_command(module: str, argument: str, processes: int, meeting: Path) -> list[str]:
    """One agent with `processes` ranks on this machine.

    Args:
        meeting: a file that does not exist yet, where agent and ranks agree. torchrun's usual server would listen on
            every address of the machine; a file needs no port, so any number of trainings run side by side.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}"]
    where = ["--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}", "--rdzv-conf=store_type=file", "--rdzv-id=train"]
    return [*launcher, *where, "--local-addr=127.0.0.1", "--max-restarts=0", "-m", module, argument]


def child_environment(threads: int) -> dict[str, str]:
    """The environment of torchrun and its ranks: nothing but loopback, a fixed number of threads."""
    network = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**os.environ, **network, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


class Interrupt:
    """Remembers SIGTERM and SIGINT while the child runs; a second one means at once."""

    def __init__(self) -> None:
        self.count = 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    @contextlib.contextmanager
    def listening(self) -> Iterator["Interrupt"]:
        """Handlers can only be set in the main thread; elsewhere the caller's exceptions end the child."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self._remember) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[int]:
    """One training at a time in a state folder: holds a lock on a file and gives its descriptor.

    The ranks of a supervisor that was killed may still be saving; whoever comes next waits here until they are gone.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for the ranks of an earlier process to end", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


@dataclass
class Supervised:
    """A running torchrun and everything it started."""

    process: subprocess.Popen[bytes]
    seen: dict[int, str] = field(default_factory=dict)
    """Start times of all descendants seen so far, by pid: a pid with another start time is somebody else's."""

    def look(self) -> list[int]:
        """The ranks (the agent's children), after noting all descendants."""
        ranks = _children(self.process.pid)
        todo = [self.process.pid, *ranks]
        while todo:
            pid = todo.pop()
            if (started := _start_time(pid)) is not None and pid not in self.seen:
                self.seen[pid] = started
                todo += _children(pid)
        return ranks

    def ask_to_stop(self) -> None:
        """SIGTERM to the ranks, or to the agent while it has none yet."""
        for pid in self.look() or [self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends whatever is left, the agent first so that it starts nothing more. Returns when all of it is gone."""
        self.look()
        for pid in (self.process.pid, *self.seen):
            if pid in self.seen and _start_time(pid) == self.seen[pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while any(_start_time(pid) == started for pid, started in self.seen.items()):
            time.sleep(0.01)


def supervise(
    command: Sequence[str],
    *,
    environment: dict[str, str],
    lock: int,
    output: Path,
    poll: Callable[[], None],
    grace_seconds: float,
) -> tuple[int, bool]:
    """Runs a command to its end, calling `poll` all the while.

    Args:
        lock: file descriptor from `exclusive`; the command holds it as well, until it is gone.
        output: file for the output of the command and all it starts.
        poll: looks for news; an exception from it stops the command and is raised again.
        grace_seconds: time between asking and killing.

    Returns:
        The exit code, and whether the end was asked for by SIGTERM or SIGINT.
    """
    interrupt = Interrupt()
    with interrupt.listening(), open(output, "wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,  # a terminal's Ctrl-C must reach the ranks through us alone, once
            # torchrun passes the signal on to the ranks, which save and end
            preexec_fn=signal_when_parent_dies(signal.SIGTERM, os.getpid()),  # noqa: PLW1509 a C call and a kill only
        )
        child = Supervised(process)
        try:
            while process.poll() is None:
                child.look()
                poll()
                if interrupt.count:
                    _stop(child, interrupt, poll, grace_seconds)
                time.sleep(POLL_SECONDS)
            poll()
        except BaseException:
            _stop(child, interrupt, lambda: None, grace_seconds)
            raise
        finally:
            child.kill()
    return process.returncode, interrupt.count > 0


def signal_when_parent_dies(number: int, parent: int | None = None) -> Callable[[], None]:
    """A function that binds the process which calls it to its parent's life (Linux; does nothing elsewhere).

    Args:
        parent: pid; a process whose parent is another one by then has lost it already.
    """
    libc = ctypes.CDLL(None)  # loaded here, because the function may run between fork and exec

    def bind() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(PR_SET_PDEATHSIG, number)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), number)

    return bind


def failure(errors_folder: Path, output: Path, code: int) -> MolmoError:
    """The error of the rank that failed first, of its own type, with its traceback; else what torchrun said."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(errors_folder.glob("rank-*.json"))]
    if not reports:
        text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
        cause = text[text.rfind("Root Cause") :] if "Root Cause" in text else text
        return TrainingError(
            f"training ended with code {code} and no traceback; see {output}\n{cause[-LOG_TAIL:].strip()}"
        )
    first = min(reports, key=lambda report: report["time"])
    kind = getattr(errors, first["type"], TrainingError)
    kind = kind if isinstance(kind, type) and issubclass(kind, MolmoError) else TrainingError
    if kind is not TrainingError or first["type"] == "TrainingError":
        return kind(first["message"])  # raised on purpose: its message says all
    return TrainingError(f"rank {first['rank']} failed: {first['type']}: {first['message']}\n{first['traceback']}")


def write_error_report(folder: Path, rank: int, error: BaseException, traceback: str) -> None:
    """Called by a rank that fails; read by `failure`."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {"rank": rank, "time": time.time(), "type": type(error).__name__, "message": str(error)}
    (folder / f"rank-{rank:05d}.json").write_text(json.dumps({**report, "traceback": traceback}), encoding="utf-8")


def follow(path: Path) -> Callable[[], list[dict[str, Any]]]:
    """A function that returns the JSON lines which were added to a file since it was last called."""
    position = path.stat().st_size if path.exists() else 0

    def news() -> list[dict[str, Any]]:
        nonlocal position
        if not path.exists():
            return []
        with open(path, "rb") as file:
            file.seek(position)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        position += len(complete)
        return [json.loads(line) for line in complete.splitlines()]

    return news


def _stop(child: Supervised, interrupt: Interrupt, poll: Callable[[], None], grace_seconds: float) -> None:
    """Asks, waits, kills."""
    asked, deadline = interrupt.count, time.monotonic() + grace_seconds
    child.ask_to_stop()
    while child.process.poll() is None and time.monotonic() < deadline and interrupt.count <= max(asked, 1):
        poll()
        time.sleep(POLL_SECONDS)
    child.kill()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # the process ended meanwhile, or there is no /proc
        for thread in os.listdir(f"/proc/{pid}/task"):
            text = Path(f"/proc/{pid}/task/{thread}/children").read_text()
            found += [int(word) for word in text.split()]
    return found


def _start_time(pid: int) -> str | None:
    """Clock ticks since boot at which a process started; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
