"""The identity of code: which source files a module runs, and one digest over what they do.

The digest is taken from the syntax trees without comments and docstrings, so an edited comment costs nobody a
retraining, and an edited expression is never missed. The same file list stands in `dvc.yaml` as the stage's deps.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from molmo_model import remembered

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("molmo_model", "pipelines")
"""Packages whose sources count; libraries are pinned by the constraints file instead."""


@cache
def source_closure(module: str, parents: bool = True) -> tuple[Path, ...]:
    """The project's source files that `module` imports, directly or not, at top level or inside functions; sorted.

    Args:
        parents: also the packages that modules lie in, as Python imports them. Without them a table of its neighbours
            in the package's `__init__` does not count.
    """
    todo, seen = [module], set[str]()
    while todo:
        name = todo.pop()
        path = _module_path(name)
        if name in seen or path is None:
            continue
        seen.add(name)
        todo += [name.rpartition(".")[0]] if "." in name and parents else []
        todo += _imports(path, name)
    paths = {path for name in seen if (path := _module_path(name)) is not None}
    return tuple(sorted(paths))


@cache
def source_digest(module: str, parents: bool = True) -> str:
    """SHA-256 over the closure of `module`, comments and docstrings left out."""
    digest = hashlib.sha256()
    for path in source_closure(module, parents):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(_canonical_digest(path).encode() + b"\0")
    return digest.hexdigest()


def forget_sources() -> None:
    """Reads every file again from now on: for processes that outlive an edit, such as Dagster's code server."""
    for cached in (source_closure, source_digest, _imports, _canonical_digest):
        cached.cache_clear()


@cache
def _canonical_digest(path: Path) -> str:
    """Stages share most of their files, and parsing is what costs."""
    return _fact("canonical", path, lambda text: hashlib.sha256(canonical_source(text).encode()).hexdigest())


def _fact(kind: str, path: Path, make: Callable[[str], str]) -> str:
    """What `make` says of a source file, remembered by the file's content and by this module's own."""
    text = path.read_bytes()
    of = [kind, sys.version, hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), hashlib.sha256(text).hexdigest()]
    return remembered.fact(" ".join(of), lambda: make(text.decode("utf-8")))


def _module_path(name: str) -> Path | None:
    if name.split(".")[0] not in PACKAGES:
        return None
    base = ROOT.joinpath(*name.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


@cache
def _imports(path: Path, module: str) -> tuple[str, ...]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: list[str] = []
    for level, base, imported in json.loads(_fact("imports", path, _import_statements)):
        parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
        whole = ".".join([*parents, *([base] if base else [])])
        names += [whole, *(f"{whole}.{name}" for name in imported)]
    return tuple(names)


def _import_statements(text: str) -> str:
    """All imports of a source text as JSON: dots before the name, the name, and what is taken from it."""
    found: list[tuple[int, str | None, list[str]]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module, [alias.name for alias in node.names]))
    return json.dumps(found)


def canonical_source(text: str) -> str:
    """What a source file does, as text: its syntax tree without comments, docstrings, positions and layout.

    Empty fields are left out, because newer Python versions add some: the text is the same for all of them.
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # a string that stands alone is documentation, of the module, a function or the field above it
            node.body = [item for item in node.body if not _is_string(item)] or [ast.Pass()]
    return _canonical(tree)


def _canonical(node: object) -> str:
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
    return f"{type(node).__name__}({','.join(f'{name}={_canonical(value)}' for name, value in sorted(fields))})"


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
