"""Ending a child process with everything that it has started.

`torchrun` gives each worker a session of its own, so a signal to one process group does not reach them, and workers
whose parent has died hang on the init process. The child is therefore started with a marker in its environment, which
all of its descendants inherit; `/proc` tells who carries it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MARKER = "MOLMO_SUPERVISED_BY"
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Tree:
    """A child process and the marker that its descendants carry."""

    process: subprocess.Popen[str]
    marker: str

    def alive(self) -> list[int]:
        """Ids of the processes that carry the marker and are not zombies; the child itself included."""
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and _carries(int(name), self.marker)]


def start(command: Sequence[str], env: Mapping[str, str]) -> Tree:
    """Starts a child in a session of its own, with its stderr piped.

    The kernel sends it SIGTERM when this process dies, however it dies, so that nothing goes on training unseen.
    """
    marker = uuid.uuid4().hex
    process = subprocess.Popen(
        list(command),
        env={**os.environ, **env, MARKER: marker},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call; imports and allocates nothing
    )
    return Tree(process, marker)


def end(tree: Tree, grace: float, say: Callable[[str], object]) -> None:
    """SIGTERM to the child, and SIGKILL to every process group that is left of it after `grace` seconds.

    The child alone gets SIGTERM: it saves a checkpoint and ends its workers itself. Returns when all are gone.
    """
    groups = {group for pid in tree.alive() if (group := _group(pid)) is not None}
    say(f"SIGTERM to process {tree.process.pid}; {grace:g} s to save and exit")
    with contextlib.suppress(ProcessLookupError):
        tree.process.terminate()
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline:
        tree.process.poll()  # reaps the child, so that it does not count as alive
        if not tree.alive():
            break
        time.sleep(0.05)
    while left := tree.alive():
        groups |= {group for pid in left if (group := _group(pid)) is not None}
        say(f"SIGKILL to {len(left)} processes that did not end: {left}")
        for group in groups - {os.getpgrp()}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        time.sleep(0.05)
        tree.process.poll()
    tree.process.wait()


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _carries(pid: int, marker: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            if f"{MARKER}={marker}".encode() not in file.read().split(b"\0"):
                return False
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):  # gone, or another user's
        return False
