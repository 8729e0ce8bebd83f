"""What every stage shares: its identity, its state that survives a kill, and its command line.

A stage module says what it reads, which params count and how to build its artefact (`Stage`). `run()` compares that
with what lies there: equal means nothing to do. Otherwise it builds in `.state/<stage>/<identity>/out`, which DVC never
deletes, writes the manifest last and links the result to `artifacts/`. A killed build goes on from its state; another
identity starts afresh, though an incremental stage may take what did not change from the last finished artefact.

`run` trusts what the state folder remembers of files that did not change (`molmo_model.remembered`); `differences`, and
every other verification that a person asks for, reads every file.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo_model.artifacts import (
    MANIFEST,
    Manifest,
    Sha256,
    clear_staging,
    digest_of,
    discard,
    file_sha256,
    link_tree,
    path_digest,
    read_manifest,
    verify,
    write_manifest,
    write_text_atomic,
)
from molmo_model.errors import ArtifactError, ConfigError, MolmoError
from molmo_model.remembered import Remembered, remembering
from molmo_model.source_digest import source_digest

Key = Mapping[str, str]

OVERWRITE = "overwrite"
"""File in the state of a build that is to be made anew; goes when that is done, so an interrupted one goes on."""


@dataclass(frozen=True)
class Build:
    """What a stage's `build` gets: where to read, where to write, and which params it asked for."""

    params: Any
    """All `molmo_model.config.Params`; use only what the stage declares."""
    key: dict[str, str]
    inputs: dict[str, Path]
    """Declared inputs by name."""
    out: Path
    """Directory to fill; becomes the artefact."""
    work: Path
    """Directory for journals and caches of this identity; survives a kill and is not part of the artefact."""
    target: Path
    """Where the artefact will be published."""
    stamp: dict[str, Any]
    """`params`, `inputs` and `code` of the manifest, for parts that are artefacts of their own."""
    overwrite: bool = False
    """A person asked for everything anew: nothing that an earlier build computed is to be reused, except what this very
    request has computed before it was interrupted, which lies in `work`."""
    previous: Path | None = None
    """Of an incremental stage: the last finished artefact of this key, whatever it was made from. Its manifest has been
    read, its files have not. They are shared by hard links: never open one for writing."""

    def publish(self, part: str) -> None:
        """Makes one finished part of `out` (a checkpoint) visible before the whole is done."""
        link_tree(self.out / part, self.target / part)


@dataclass(frozen=True)
class Stage:
    """One stage of the flow, as data: the only description that DVC, Dagster and the house tests compare."""

    name: str
    schema: str
    version: int
    keys: tuple[str, ...]
    """Names of its partition keys, such as `("run",)`."""
    out: str
    """Artefact directory with `{key}` places."""
    params: tuple[str, ...]
    """Dotted params that the artefact depends on, with `{key}` places."""
    build: Callable[[Build], dict[str, Any]]
    """Fills `Build.out` and returns the manifest's summary. Imports what is heavy inside."""
    partitions: Callable[[Any], list[dict[str, str]]]
    """All keys that the params name."""
    inputs: Callable[[Any, Key], dict[str, str]] = field(default=lambda params, key: {})
    """Paths of the artefacts and files that it reads, by name."""
    more_params: Callable[[Any, Key], tuple[str, ...]] = field(default=lambda params, key: ())
    """Further dotted params that depend on the key, such as the model of a run."""
    fingerprints: Callable[[Any, Key], dict[str, str]] = field(default=lambda params, key: {})
    """Digests of inputs that are no single path, such as the images of a user's file."""
    resumable: bool = False
    """True: `out` of a killed build is kept and the build goes on in it."""
    incremental: bool = False
    """True: `build` gets the last finished artefact and takes from it what did not change. The result must be the same
    bytes as without it."""

    @property
    def module(self) -> str:
        return f"pipelines.{self.name}"

    def target(self, key: Key) -> Path:
        return Path(self.out.format(**key))


def stamp(stage: Stage, params: Any, key: Key, sha256: Sha256 = file_sha256) -> dict[str, Any]:
    """What an artefact made now would be made from: `params`, `inputs` (digests) and `code`."""
    from molmo_model.config import pick

    paths = (*(path.format(**key) for path in stage.params), *stage.more_params(params, key))
    inputs = {name: path_digest(path, sha256) for name, path in stage.inputs(params, key).items()}
    return {
        "params": pick(params, paths),
        "inputs": {**inputs, **stage.fingerprints(params, key)},
        "code": source_digest(stage.module),
    }


def differences(stage: Stage, params: Any, key: Key) -> list[str]:
    """How the artefact that lies there differs from what the workspace would make; empty means up to date."""
    try:
        manifest = verify(stage.target(key), stage.schema)
        return _compare(manifest, stamp(stage, params, key), stage)
    except ArtifactError as error:
        return [str(error)]


def run(stage: Stage, params: Any, **key: str) -> Manifest:
    """Brings one artefact up to date and returns its manifest; rewrites nothing when it already is.

    Raises:
        MolmoError: of the kind that the stage's work raises; the state of the build is kept.
    """
    key = check_key(stage, params, key)
    target = stage.target(key)
    with _lock(stage, key), remembering(state_root()) as memory:
        clear_staging(target)
        made_from = stamp(stage, params, key, memory.sha256)
        memory.flush()
        state = state_dir(stage, key, made_from)
        anew = (state / OVERWRITE).exists()
        if not anew and (manifest := _finished(target, made_from, stage, memory)) is not None:
            return manifest
        out, work = state / "out", state / "work"
        manifest = None if anew else _finished(out, made_from, stage, memory)
        if manifest is None:
            previous = _previous(stage, key, out) if stage.incremental and not anew else None
            if out.exists() and not stage.resumable:
                shutil.rmtree(out)
            discard(target)
            out.mkdir(parents=True, exist_ok=True)
            (out / MANIFEST).unlink(missing_ok=True)  # of a finished build that is no longer what it says
            work.mkdir(parents=True, exist_ok=True)
            inputs = {name: Path(path) for name, path in stage.inputs(params, key).items()}
            started = time.time()
            summary = stage.build(Build(params, dict(key), inputs, out, work, target, made_from, anew, previous))
            facts = {"schema": stage.schema, "version": stage.version, "summary": summary, **made_from}
            manifest = write_manifest(out, sha256=memory.sha256, **facts)
            _log_run(stage, key, manifest, started)
            (state / OVERWRITE).unlink(missing_ok=True)
        if stage.incremental:
            write_text_atomic(_pointer(stage, key), state.name)
        link_tree(out, target)
        return manifest


def run_all(stage: Stage, params: Any, key: Key, overwrite: bool = False) -> list[tuple[dict[str, str], Manifest]]:
    """Runs every partition of the params that agrees with the given part of the key.

    Args:
        overwrite: make them anew though they are up to date. Where an earlier such request was interrupted, only what
            it had left to do.
    """
    chosen = [full for full in stage.partitions(params) if all(full[name] == value for name, value in key.items())]
    if not chosen:
        raise _no_such(stage, params, key)
    if overwrite:
        _mark(stage, params, chosen)
    return [(full, run(stage, params, **full)) for full in chosen]


def _mark(stage: Stage, params: Any, keys: Sequence[Key]) -> None:
    """Has the next `run` of each key make it anew; an interrupted request of this kind is left as it stands."""
    states = [state_dir(stage, key, stamp(stage, params, key)) for key in keys]
    if begun := [state for state in states if (state / OVERWRITE).exists()]:
        print(
            f"{stage.name}: {len(begun)} of {len(keys)} are left of an overwrite that was interrupted; going on with it"
        )
        return
    for key, state in zip(keys, states, strict=True):
        with _lock(stage, key):
            shutil.rmtree(state, ignore_errors=True)
            write_text_atomic(state / OVERWRITE, "")


def check_key(stage: Stage, params: Any, key: Key) -> dict[str, str]:
    """The key, or a `ConfigError` that lists the right ones."""
    key = dict(key)
    if set(key) != set(stage.keys):
        raise ConfigError(f"{stage.name} is keyed by {', '.join(stage.keys) or 'nothing'}; got {key}")
    if key not in stage.partitions(params):
        raise _no_such(stage, params, key)
    return key


def _no_such(stage: Stage, params: Any, key: Key) -> ConfigError:
    """What is wrong with a key that the params do not name: the first part of it that nothing has."""
    from molmo_model.lookup import suggest

    partitions = stage.partitions(params)
    for name, value in key.items():
        names = dict.fromkeys(one[name] for one in partitions)
        if value not in names:
            return ConfigError(f"{stage.name}: the params name no {name} {value!r}; {suggest(value, names)}")
    return ConfigError(f"{stage.name}: the params name each part of {dict(key)}, but not together")


def state_root() -> Path:
    """Where unfinished work lives: `$MOLMO_STATE_DIR` or `.state`."""
    return Path(os.environ.get("MOLMO_STATE_DIR", ".state"))


def state_dir(stage: Stage, key: Key, made_from: Mapping[str, Any]) -> Path:
    """Where one identity of an artefact is built: another input, param or line of code has another directory."""
    identity = digest_of({"key": dict(key), "version": stage.version, **made_from})
    return state_root() / stage.name / identity[:20]


def main(
    stage: Stage,
    argv: Sequence[str] | None = None,
    remarks: Callable[[Any, Key], Sequence[str]] = lambda params, key: (),
) -> None:
    """`python -m pipelines.<stage> [key=value ...]`: partition keys, `params=FILE`, `overwrite=true`, and overrides of
    the params.

    A key that is left out means all of its values. Exit codes: 0 done, 2 refused with a message, 75 stopped on request
    with its state saved.

    Args:
        remarks: what else there is to say of a finished artefact, that is no part of it.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "-h" in argv or "--help" in argv:
        print(usage(stage))
        return
    from molmo_model.config import load_params

    with exit_on_error(stage.name):
        argv = ["overwrite=true" if arg == "--overwrite" else arg for arg in argv]
        own = (*stage.keys, "params", "overwrite")
        named = [option(arg) for arg in argv if option(arg)[0] in own]
        options = dict(named)
        if len(options) < len(named):
            raise ConfigError(f"{' '.join(f'{name}={value}' for name, value in named)}: each may be given once")
        overrides = [arg for arg in argv if option(arg)[0] not in own]
        if (overwrite := options.pop("overwrite", "false")) not in ("true", "false"):
            raise ConfigError(f"overwrite={overwrite} is neither true nor false")
        params = load_params(options.pop("params", "params.yaml"), overrides)
        for key, manifest in run_all(stage, params, options, overwrite == "true"):
            print(f"{stage.name} {' '.join(key.values())}: {manifest.digest[:16]} in {stage.target(key)}")
            for name, value in manifest.summary.items():
                if name == "examples" and isinstance(value, dict):  # the first thing that one wants to know of shards
                    print(f"  examples: {', '.join(f'{split} {count}' for split, count in value.items())}")
                elif not isinstance(value, dict | list) and value != "":
                    print(f"  {name}: {value}")
            for line in remarks(params, key):
                print(f"  {line}")


def usage(stage: Stage) -> str:
    """The help text of a stage."""
    doc = (sys.modules["__main__"].__doc__ or "").strip()
    keys = " ".join(f"[{key}=...]" for key in stage.keys)
    return (
        f"usage: python -m {stage.module} {keys} [params=params.yaml] [overwrite=true] [section.key=value ...]\n\n"
        f"{doc}\n\n"
        f"writes:  {stage.out}\nparams:  {', '.join(stage.params)}\n"
        "A partition key that is left out means all of them. Nothing is rewritten when nothing changed, unless\n"
        "overwrite=true (or --overwrite) asks for it."
    )


def arguments(argv: Sequence[str] | None, doc: str | None) -> list[str]:
    """The words of a command that is no stage; none, after its help was printed, where they ask for it or are none."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or "-h" in words or "--help" in words:
        print((doc or "").strip())
        return []
    return words


@contextlib.contextmanager
def exit_on_error(name: str) -> Iterator[None]:
    """Turns the project's own errors into one line on stderr and exit code 2; others keep their traceback."""
    try:
        yield
    except MolmoError as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def option(argument: str) -> tuple[str, str]:
    """`name=value` as a pair; without `=` the value is empty."""
    name, _, value = argument.partition("=")
    return name, value


def checkpoint_folder(name: str) -> Path:
    """A checkpoint's folder, or the one that its name stands for: `<run>/step-<six digits>`, as in the report."""
    named = Path("artifacts/checkpoints") / name
    return named if not Path(name).exists() and named.exists() else Path(name)


def _finished(directory: Path, made_from: Mapping[str, Any], stage: Stage, memory: Remembered) -> Manifest | None:
    try:
        manifest = verify(directory, stage.schema, memory.sha256)
    except ArtifactError:
        return None
    return None if _compare(manifest, made_from, stage) else manifest


def _compare(manifest: Manifest, made_from: Mapping[str, Any], stage: Stage) -> list[str]:
    found = []
    if manifest.version != stage.version:
        found.append(f"version: made with {manifest.version}, now {stage.version}")
    for part in ("params", "inputs"):
        old, new = getattr(manifest, part), made_from[part]
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                found.append(f"{part} {name}: made with {old.get(name)}, now {new.get(name)}")
    if manifest.code != made_from["code"]:
        found.append(f"code: made with {manifest.code[:16]}, now {made_from['code'][:16]}")
    return found


def _previous(stage: Stage, key: Key, out: Path) -> Path | None:
    """The last finished artefact of a key, other than the one that is to be built in `out`: in the state, or adopted
    from where it is published, as after `dvc pull`. None where there is none whose manifest can be read."""
    with contextlib.suppress(OSError, ArtifactError):
        last = state_root() / stage.name / _pointer(stage, key).read_text(encoding="utf-8") / "out"
        read_manifest(last, stage.schema)
        return last if last != out else None
    try:
        manifest = read_manifest(stage.target(key), stage.schema)
    except ArtifactError:
        return None
    made_from = {"params": manifest.params, "inputs": manifest.inputs, "code": manifest.code}
    last = state_dir(stage, key, made_from) / "out"
    if not (last / MANIFEST).exists():
        link_tree(stage.target(key), last)
    return last if last != out else None


def _pointer(stage: Stage, key: Key) -> Path:
    """Where the name of the last finished state of a key stands."""
    return state_root() / "last" / _name(stage, key)


def _name(stage: Stage, key: Key) -> str:
    return "-".join([stage.name, *key.values()]).replace("/", "_")


@contextlib.contextmanager
def _lock(stage: Stage, key: Key) -> Iterator[None]:
    """One build of one artefact at a time; a second caller waits and then finds it done. A kill frees it."""
    path = state_root() / "locks" / _name(stage, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _log_run(stage: Stage, key: Key, manifest: Manifest, started: float) -> None:
    """When and how long: beside the artefacts, never inside them."""
    line = {"stage": stage.name, "key": dict(key), "digest": manifest.digest, "started": started}
    path = Path("logs") / "stages.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "seconds": round(time.time() - started, 3)}) + "\n")
