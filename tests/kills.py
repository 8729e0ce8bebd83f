"""Kills that are exhaustive, not by chance: a process sees every change that it makes to the file system and dies by
SIGKILL at the n-th one."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def in_child(work: Callable[[], Any], kill_at: int | None = None) -> int:
    """Runs `work` in a forked process, killed at its n-th change of the file system; the signal, or the exit code."""
    pid = os.fork()
    if pid == 0:  # the child never returns into pytest
        code = 1
        try:
            if kill_at is not None:
                sys.addaudithook(killer(kill_at))
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def killer(kill_at: int) -> Callable[[str, tuple], None]:
    """An audit hook that kills its process at the n-th change of the file system."""
    changes = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in changes or writes:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook
