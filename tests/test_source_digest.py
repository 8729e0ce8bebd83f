"""The identity of code: what it covers, and what it leaves out."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from molmo_model import source_digest as module
from molmo_model.source_digest import canonical_source

SOURCE = '''"""Docs."""
import os
LIMIT = 3
"""Unit: seconds."""
class A:
    """Docs."""
    x: int = 1
    """Meaning."""
def f(a, b=2):
    """Docs."""
    # comment
    return a + b
'''


@pytest.mark.parametrize(
    "edited",
    [
        SOURCE.replace("Docs.", "Other words."),
        SOURCE.replace("# comment", "# other"),
        SOURCE.replace("seconds", "hours"),
        SOURCE.replace("Meaning", "Sense"),
        SOURCE.replace("a + b", "(a  +\n        b)"),
        SOURCE.replace('    """Docs."""\n    # comment\n', ""),
    ],
)
def test_words_cost_nothing(edited: str) -> None:
    assert edited != SOURCE
    assert canonical_source(edited) == canonical_source(SOURCE)


@pytest.mark.parametrize(
    "edited",
    [
        SOURCE.replace("a + b", "a - b"),
        SOURCE.replace("a + b", "b + a"),
        SOURCE.replace("b=2", "b=3"),
        SOURCE.replace("LIMIT = 3", "LIMIT = 3.0"),
        SOURCE.replace("LIMIT = 3", "LIMIT = '3'"),
        SOURCE.replace("x: int = 1", "x: int = True"),
        SOURCE.replace("x: int", "y: int"),
        SOURCE.replace("return a + b", "return None"),
        SOURCE.replace("import os", "import os as o"),
        SOURCE + "f(1)\n",
    ],
)
def test_every_change_of_behaviour_counts(edited: str) -> None:
    assert edited != SOURCE
    assert canonical_source(edited) != canonical_source(SOURCE)


def test_return_and_return_none_are_told_apart() -> None:
    assert canonical_source("def f():\n    return") != canonical_source("def f():\n    return None")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project of the same two packages."""
    files = {
        "molmo_model/__init__.py": "",
        "molmo_model/a.py": "from molmo_model import b\n",
        "molmo_model/b.py": "x = 1\n",
        "molmo_model/sub/__init__.py": "from .deep import y\n",
        "molmo_model/sub/deep.py": "from ..late import z\ny = 1\n",
        "molmo_model/late.py": "z = 1\n",
        "molmo_model/unused.py": "",
        "pipelines/__init__.py": "",
        "pipelines/one.py": "import os, numpy\ndef f():\n    from molmo_model import sub\n    import molmo_model.a\n",
        "pipelines/two.py": "if False:\n    import pipelines.one\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    module.forget_sources()
    yield tmp_path
    module.forget_sources()


def closure(project: Path, name: str) -> list[str]:
    return [path.relative_to(project).as_posix() for path in module.source_closure(name)]


def test_closure_follows_imports_in_functions_and_relative_ones(project: Path) -> None:
    wanted = ["molmo_model/__init__.py", "molmo_model/a.py", "molmo_model/b.py", "molmo_model/late.py"]
    wanted += ["molmo_model/sub/__init__.py", "molmo_model/sub/deep.py", "pipelines/__init__.py", "pipelines/one.py"]
    assert closure(project, "pipelines.one") == wanted
    assert closure(project, "pipelines.two") == [*wanted, "pipelines/two.py"]


def test_digest_changes_with_any_file_of_the_closure_only(project: Path) -> None:
    before = module.source_digest("pipelines.one")
    for name, changes in [("late.py", True), ("unused.py", False), ("b.py", True), ("sub/__init__.py", True)]:
        path = project / "molmo_model" / name
        text = path.read_text()
        path.write_text(text + "new = 1\n")
        module.forget_sources()
        assert (module.source_digest("pipelines.one") != before) == changes, name
        path.write_text(text)


def test_renaming_a_module_changes_the_digest(project: Path) -> None:
    before = module.source_digest("pipelines.one")
    (project / "molmo_model" / "b.py").rename(project / "molmo_model" / "c.py")
    (project / "molmo_model" / "a.py").write_text("from molmo_model import c\n")
    module.forget_sources()
    assert module.source_digest("pipelines.one") != before


@pytest.mark.parametrize("other", ["python3.12", "python3.13"])
def test_other_pythons_agree(other: str) -> None:
    """Two people with two Python versions must not retrain each other's runs."""
    path = shutil.which(other)
    if path is None or subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip(f"{other} is not here")
    code = (
        "import hashlib, pathlib; from molmo_model.source_digest import canonical_source as c; "
        "print(hashlib.sha256(''.join(c(p.read_text('utf-8')) for p in sorted(pathlib.Path().glob('*/**/*.py')) "
        "if p.parts[0] in ('molmo_model', 'pipelines')).encode()).hexdigest())"
    )
    root = Path(__file__).parent.parent
    mine, theirs = (
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
        for python in (sys.executable, path)
    )
    assert mine == theirs
