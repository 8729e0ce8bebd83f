"""Names the git commit whose source files a code digest stands for.

usage: python -m pipelines.commits code=DIGEST [most=200]

code    the `code` of a manifest or of the report's lineage, or its first characters, 8 at least
most    commits to look at, newest first; only those that changed source files count

Artefacts say nothing of commits: a comment, or the commit of `dvc.lock` itself, would make them stale, and two equal
runs would differ. Their code digest is over what the sources do, so any commit can be asked for its own digests, by its
own rule: each is unpacked aside and computes those of all its stages, about a second per commit.
Exit codes: 0 found, 2 refused with a message, or not found.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from molmo_model.artifacts import write_text_atomic
from molmo_model.errors import ConfigError
from molmo_model.source_digest import PACKAGES, ROOT, source_digest
from pipelines.stage import arguments, exit_on_error, option, state_root

MOST = 200
"""Commits that are looked at."""
SHORTEST = 8
"""Characters of a digest that tell it from others."""
_DIGESTS = """
import sys
from pathlib import Path
from molmo_model.source_digest import source_digest
for path in sorted(Path("pipelines").glob("*.py")):
    print(source_digest(f"pipelines.{path.stem}"))
"""


@dataclass(frozen=True)
class Commit:
    """Where the sources of a digest are."""

    commit: str
    changed: bool = False
    """True: the sources are the workspace's, with changes that are not committed on top of the commit."""


def find(codes: Iterable[str], most: int = MOST, root: Path = ROOT) -> dict[str, Commit]:
    """The newest commit of each code digest, or of its beginning; what is not found is left out.

    Raises:
        ConfigError: there is no git repository.
    """
    from tqdm import tqdm

    wanted, found = set(codes), dict[str, Commit]()
    own = {source_digest(f"pipelines.{path.stem}") for path in (root / "pipelines").glob("*.py")}
    commits = tqdm(list(_commits(most, root)), desc="looking for the code in past commits", unit="commit", leave=False)
    for number, commit in enumerate(commits):
        if not (missing := wanted - found.keys()):
            break
        found |= {code: Commit(commit) for code in _among(missing, _digests(commit, root))}
        if number == 0:  # what the workspace has and its last commit has not is not committed
            found |= {code: Commit(commit, True) for code in _among(wanted - found.keys(), own)}
    return found


def _among(codes: Iterable[str], digests: Iterable[str]) -> list[str]:
    known = list(digests)
    return [code for code in codes if any(digest.startswith(code) for digest in known)]


def _commits(most: int, root: Path) -> Iterator[str]:
    """Those that changed source files, newest first."""
    yield from _git(["log", f"--max-count={most}", "--format=%H", "--", *PACKAGES], root).decode().split()


def _digests(commit: str, root: Path) -> set[str]:
    """The code digests of every stage and command, as a commit computes them itself; none if it cannot. Remembered."""
    memory = state_root() / "commits" / commit
    if not memory.exists():
        with tempfile.TemporaryDirectory(prefix="molmo-commit-") as folder:
            archive = _git(["archive", "--format=tar", commit, "--", *PACKAGES], root)
            subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
            command = [sys.executable, "-c", _DIGESTS]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
        write_text_atomic(memory, done.stdout)
    return set(memory.read_text(encoding="utf-8").split())


def _git(words: Sequence[str], root: Path) -> bytes:
    try:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
        raise ConfigError(f"{root} cannot be asked for its commits: {said}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    if not (argv := arguments(argv, __doc__)):
        return
    with exit_on_error("commits"):
        values = dict(map(option, argv))
        code, most = values.get("code", ""), values.get("most", str(MOST))
        if set(values) - {"code", "most"} or len(code) < SHORTEST or not most.isdecimal():
            raise ConfigError(f"write code=DIGEST, {SHORTEST} characters of it or more, and perhaps most={MOST}")
        if code not in (found := find([code], int(most))):
            raise ConfigError(f"none of the newest {most} commits has code {code}; its branch may not be here")
        note = " with changes that are not committed" if found[code].changed else ""
        print(f"{found[code].commit}{note}")


if __name__ == "__main__":
    main()
