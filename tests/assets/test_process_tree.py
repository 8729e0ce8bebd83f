"""Cancelling ends everything that a stage has started, however stubborn, and in time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from molmo_assets import process_tree

STUBBORN = """
import os, signal, subprocess, sys, time
depth, folder = int(sys.argv[1]), sys.argv[2]
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if depth:
    for child in range(2):  # like torchrun's workers: each in a session of its own
        subprocess.Popen([sys.executable, __file__, str(depth - 1), folder], start_new_session=True)
open(f"{folder}/{os.getpid()}", "w").close()
if sys.argv[3:] == ["orphan"]:
    sys.exit(0)
time.sleep(600)
"""
PROCESSES = 1 + 2 + 4


def start(tmp_path: Path, *arguments: str) -> process_tree.Tree:
    """A tree of seven processes that ignore every request to end."""
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN, encoding="utf-8")
    folder = tmp_path / "pids"
    folder.mkdir()
    tree = process_tree.start([sys.executable, str(script), "2", str(folder), *arguments], {})
    while len(list(folder.iterdir())) < PROCESSES:
        time.sleep(0.05)
    return tree


def running(tmp_path: Path) -> list[int]:
    """Those of the processes that wrote their id and still run; by the kernel's word, not by our marker."""
    found = []
    for path in (tmp_path / "pids").iterdir():
        ps = subprocess.run(["ps", "-o", "stat=", "-p", path.name], capture_output=True, text=True, check=False)
        state = ps.stdout.strip()
        found += [int(path.name)] if state and not state.startswith("Z") else []
    return found


def test_a_stubborn_tree_is_gone_soon_after_the_grace(tmp_path: Path) -> None:
    tree = start(tmp_path)
    assert len(running(tmp_path)) == PROCESSES
    said: list[str] = []
    process_tree.end(tree, 1.0, said.append)
    assert running(tmp_path) == []
    assert "SIGTERM" in said[0] and "SIGKILL" in said[1]


def test_orphans_are_found_though_their_parent_has_gone(tmp_path: Path) -> None:
    tree = start(tmp_path, "orphan")
    tree.process.wait()
    assert len(running(tmp_path)) == PROCESSES - 1
    process_tree.end(tree, 0.5, lambda line: None)
    assert running(tmp_path) == []


def test_a_child_that_ends_by_itself_is_not_killed(tmp_path: Path) -> None:
    script = tmp_path / "polite.py"
    script.write_text(
        "import signal, sys, time, pathlib\n"
        "def stop(*_):\n    time.sleep(0.3); pathlib.Path(sys.argv[1]).write_text('saved'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('ready', file=sys.stderr, flush=True)\ntime.sleep(600)\n",
        encoding="utf-8",
    )
    tree = process_tree.start([sys.executable, str(script), str(tmp_path / "state")], {})
    assert tree.process.stderr is not None and tree.process.stderr.readline() == "ready\n"
    said: list[str] = []
    process_tree.end(tree, 20.0, said.append)
    assert tree.process.returncode == 75
    assert (tmp_path / "state").read_text() == "saved"
    assert len(said) == 1


def test_other_processes_are_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tree = start(tmp_path)
    process_tree.end(tree, 0.1, lambda line: None)
    assert other.poll() is None
    other.kill()
    other.wait()


@pytest.mark.slow
def test_a_stage_is_told_to_stop_when_its_step_is_killed(tmp_path: Path) -> None:
    """SIGKILL to the step's process, or the kernel's out-of-memory killer: the child gets SIGTERM all the same."""
    marker = tmp_path / "stopped"
    child = (
        "import signal, sys, time, pathlib\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(marker)!r}).touch(), sys.exit(0)))\n"
        "print('ready', file=sys.stderr, flush=True)\ntime.sleep(600)\n"
    )
    parent = (
        "import sys, time\nfrom molmo_assets import process_tree\n"
        f"tree = process_tree.start([sys.executable, '-c', {child!r}], {{}})\n"
        "tree.process.stderr.readline()\nprint('started', flush=True)\ntime.sleep(600)\n"
    )
    step = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert step.stdout is not None and step.stdout.readline() == "started\n"
    os.kill(step.pid, signal.SIGKILL)
    step.wait()
    for _ in range(200):
        if marker.exists():
            break
        time.sleep(0.05)
    assert marker.exists()
