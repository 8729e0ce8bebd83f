"""Supervision with small programs in the place of torchrun."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from molmo_model.errors import CheckpointError, DataError, TrainingError
from molmo_model.train.supervisor import exclusive, failure, follow, supervise, write_error_report

AGENT = """
import signal, subprocess, sys, time
mode, folder = sys.argv[1:]
rank = f'''
import os, signal, sys, time
open("{folder}/rank", "w").write(str(os.getpid()))
if "{mode}" == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: (open("{folder}/saved", "w").close(), sys.exit(0)))
open("{folder}/ready", "w").close()
time.sleep(100)
'''
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", rank], start_new_session=True)
if mode != "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
sys.exit(child.wait())
"""


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def command(mode: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", AGENT, mode, str(folder)]


def run(argv: list[str], folder: Path, poll: Callable[[], None], grace: float = 20.0) -> tuple[int, bool]:
    with exclusive(folder / "lock") as lock:
        return supervise(
            argv,
            environment=dict(os.environ),
            lock=lock,
            output=folder / "output.txt",
            poll=poll,
            grace_seconds=grace,
        )


def signal_once(folder: Path, number: int) -> Callable[[], None]:
    sent: list[int] = []

    def poll() -> None:
        if not sent and (folder / "ready").exists():
            sent.append(number)
            os.kill(os.getpid(), number)

    return poll


def test_an_ordinary_end(tmp_path: Path) -> None:
    code, asked = run([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], tmp_path, lambda: None)
    assert (code, asked) == (3, False)
    assert (tmp_path / "output.txt").read_text() == "hello\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_are_asked_and_their_end_awaited(tmp_path: Path, number: int) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    code, asked = run(command("polite", tmp_path), tmp_path, signal_once(tmp_path, number))
    assert asked and code == 0 and (tmp_path / "saved").exists()
    assert not alive(int((tmp_path / "rank").read_text()))
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_stubborn_ranks_in_other_sessions_are_killed(tmp_path: Path) -> None:
    _, asked = run(command("stubborn", tmp_path), tmp_path, signal_once(tmp_path, signal.SIGTERM), grace=0.5)
    assert asked and not alive(int((tmp_path / "rank").read_text()))


def test_an_exception_of_the_caller_ends_the_ranks_too(tmp_path: Path) -> None:
    def poll() -> None:
        if (tmp_path / "ready").exists():
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(command("polite", tmp_path), tmp_path, poll)
    assert (tmp_path / "saved").exists() and not alive(int((tmp_path / "rank").read_text()))


def test_a_rank_that_outlives_its_agent_is_killed(tmp_path: Path) -> None:
    def poll() -> None:
        if (tmp_path / "ready").exists():
            psutil.Process(int((tmp_path / "rank").read_text())).parent().kill()

    code, asked = run(command("stubborn", tmp_path), tmp_path, poll)
    assert code == -signal.SIGKILL and not asked
    assert not alive(int((tmp_path / "rank").read_text()))


def test_a_killed_supervisor_takes_the_ranks_along_and_the_next_one_waits(tmp_path: Path) -> None:
    me = f"""
import os, sys
from pathlib import Path
from molmo_model.train.supervisor import exclusive, supervise
folder = Path({str(tmp_path)!r})
with exclusive(folder / "lock") as lock:
    supervise({command("polite", tmp_path)!r}, environment=dict(os.environ), lock=lock, output=folder / "o",
              poll=lambda: None, grace_seconds=20)
"""
    process = subprocess.Popen([sys.executable, "-c", me], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    with exclusive(tmp_path / "lock"):
        assert not alive(int((tmp_path / "rank").read_text()))
    assert (tmp_path / "saved").exists()


def test_it_works_outside_the_main_thread(tmp_path: Path) -> None:
    results: list[tuple[int, bool]] = []
    argv = [sys.executable, "-c", "pass"]
    thread = threading.Thread(target=lambda: results.append(run(argv, tmp_path, lambda: None)))
    thread.start()
    thread.join()
    assert results == [(0, False)]


def test_the_first_failure_is_reported_with_its_own_type(tmp_path: Path) -> None:
    write_error_report(tmp_path, 1, DataError("example 'x' is broken"), "Traceback ...")
    time.sleep(0.01)
    write_error_report(tmp_path, 0, RuntimeError("connection closed by peer"), "Traceback of gloo")
    error = failure(tmp_path, tmp_path / "none", 1)
    assert type(error) is DataError and str(error) == "example 'x' is broken"


def test_an_unexpected_failure_brings_its_traceback(tmp_path: Path) -> None:
    write_error_report(tmp_path, 3, ZeroDivisionError("division by zero"), "Traceback:\n  line 7")
    error = failure(tmp_path, tmp_path / "none", 1)
    assert type(error) is TrainingError
    assert "rank 3 failed: ZeroDivisionError: division by zero" in str(error) and "line 7" in str(error)
    assert not isinstance(error, CheckpointError)


def test_a_silent_death_quotes_torchrun(tmp_path: Path) -> None:
    output = tmp_path / "torchrun.log"
    output.write_text("noise\n" * 9000 + "Root Cause (first observed failure):\n rank 1 Signal 9 (SIGKILL)\n")
    message = str(failure(tmp_path / "errors", output, 1))
    assert "Signal 9" in message and "noise" not in message and str(output) in message


def test_following_a_file_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"old": 1}\n')
    news = follow(path)
    assert news() == []
    with open(path, "a") as file:
        file.write('{"a": 1}\n{"b"')
        file.flush()
        assert news() == [{"a": 1}]
        file.write(": 2}\n")
    assert news() == [{"b": 2}]
    later = follow(tmp_path / "not yet")
    assert later() == []
    (tmp_path / "not yet").write_text(json.dumps({"c": 3}) + "\n")
    assert later() == [{"c": 3}]
