"""The identity of code: which source files a module runs, and one digest over what they do.

The digest is taken from the syntax trees without comments and docstrings, so an edited comment costs nobody a
retraining, and an edited expression is never missed. The same file list stands in `dvc.yaml` as the stage's deps.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("molmo_model", "pipelines")
"""Packages whose sources count; libraries are pinned by the constraints file instead."""


@cache
def source_closure(module: str) -> tuple[Path, ...]:
    """The project's source files that `module` imports, directly or not, at top level or inside functions; sorted."""
    todo, seen = [module], set[str]()
    while todo:
        name = todo.pop()
        path = _module_path(name)
        if name in seen or path is None:
            continue
        seen.add(name)
        todo += [name.rpartition(".")[0]] if "." in name else []
        todo += _imports(path, name)
    paths = {path for name in seen if (path := _module_path(name)) is not None}
    return tuple(sorted(paths))


@cache
def source_digest(module: str) -> str:
    """SHA-256 over the closure of `module`, comments and docstrings left out."""
    digest = hashlib.sha256()
    for path in source_closure(module):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(_canonical_file(path) + b"\0")
    return digest.hexdigest()


def forget_sources() -> None:
    """Reads every file again from now on: for processes that outlive an edit, such as Dagster's code server."""
    for cached in (source_closure, source_digest, _imports, _canonical_file):
        cached.cache_clear()


@cache
def _canonical_file(path: Path) -> bytes:
    """Stages share most of their files, and parsing is what costs."""
    return canonical_source(path.read_text(encoding="utf-8")).encode()


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
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(names)


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
