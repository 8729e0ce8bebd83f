"""The peers' environment: packages of `peers.txt` on top of the project's own, which never sees them.

`peer_python()` makes it where it is missing (a few seconds, needs the package registry). `Peer` runs one script in it
and talks to it in lines of JSON, so that ours and the peer can take turns in one run.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = Path(__file__).with_name("peers.txt")


def peer_python() -> Path:
    """The interpreter of the peers' environment, made first if `peers.txt`, Python or the project's environment is new.

    Raises:
        RuntimeError: a package cannot be had; with pip's own words.
    """
    project = sysconfig.get_path("purelib")
    facts = [REQUIREMENTS.read_text(encoding="utf-8"), sys.version, project]
    home = ROOT / ".peers" / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    home.parent.mkdir(exist_ok=True)
    with (home.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not (home / "complete").exists():
            _make(home, project)
    return home / "bin" / "python"


def _make(home: Path, project: str) -> None:
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = next(home.glob("lib/python*/site-packages"))
    (site / "project.pth").write_text(project + "\n", encoding="utf-8")
    install = ["--python", str(home / "bin" / "python"), "install", "--quiet", "--no-deps", "-r", str(REQUIREMENTS)]
    done = subprocess.run([sys.executable, "-m", "pip", *install], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the peers of {REQUIREMENTS} cannot be installed:\n{done.stdout}{done.stderr}")
    (home / "complete").touch()


class Peer:
    """A script of this folder that runs in the peers' environment and answers requests, one at a time."""

    def __init__(self, script: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [str(peer_python()), "-P", str(Path(__file__).with_name(script))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **request: Any) -> Any:
        """The answer to a request.

        Raises:
            RuntimeError: the peer ended; its traceback stands on the error stream.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with code {self._process.wait()} at {request}")
        return json.loads(line)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    print(peer_python())
