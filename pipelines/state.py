"""Lists and prunes the state of stages: what `.state/` holds, what it is for and how large it is.

    python -m pipelines.state                        list
    python -m pipelines.state prune [days=7]         delete what the params of today do not ask for, unused for `days`
    python -m pipelines.state prune journals=true    also the answers of checkpoints that are gone (`pipelines.journal`
                                                     looks into them, and prunes single answers)
    python -m pipelines.state adopt                  after `dvc pull`: artefacts become state again, because DVC deletes
                                                     an out before it asks the stage, which would then start over

A finished state shares its files with the artefact by hard links, so pruning it frees only what no artefact holds.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_model.artifacts import MANIFEST, link_tree, read_manifest, verify
from molmo_model.errors import ArtifactError, ConfigError
from pipelines import assemble, mixture, predict, report, score, scorecard, shards, train, validate
from pipelines.stage import Stage, exit_on_error, option, stamp, state_dir, state_root

STAGES: tuple[Stage, ...] = tuple(
    module.STAGE for module in (assemble, shards, validate, mixture, train, predict, score, scorecard, report)
)


NO_STATE = ("locks", "downloads")
"""Below the state root, but of no stage: locks, and the files of `pipelines.download`, which are never pruned."""


@dataclass(frozen=True)
class State:
    """One directory of the state root."""

    path: Path
    finished: bool
    wanted: bool
    """The params of today ask for exactly this; a journal: some artefact still has these weights."""
    bytes: int
    used: float
    """Seconds since the epoch of the newest file."""

    @property
    def is_journal(self) -> bool:
        return self.path.is_relative_to(predict.journals())


def states(params: Any) -> list[State]:
    """Everything below the state root, by stage and name."""
    wanted = set(_wanted(params))
    kept = _journals_of_artefacts()
    found = []
    for path in sorted(state_root().glob("*/*")):
        if path == predict.journals():
            found += [_state(journal, journal in kept) for journal in sorted(path.iterdir()) if journal.is_dir()]
        elif path.is_dir() and path.parent.name not in NO_STATE:
            found.append(_state(path, path in wanted))
    return found


def prune(params: Any, days: float, journals: bool) -> list[State]:
    """Deletes what the params of today do not ask for and nobody touched for `days`; returns what is gone."""
    limit = time.time() - days * 86400
    gone = [
        state
        for state in states(params)
        if not state.wanted and state.used < limit and (journals or not state.is_journal)
    ]
    for state in gone:
        shutil.rmtree(state.path)
    return gone


def adopt(params: Any) -> list[Path]:
    """Links every valid artefact into the state that its own manifest names; returns the new state directories."""
    adopted = []
    for stage in STAGES:
        for key in stage.partitions(params):
            try:
                manifest = verify(stage.target(key), stage.schema)
            except ArtifactError:
                continue
            made_from = {"params": manifest.params, "inputs": manifest.inputs, "code": manifest.code}
            out = state_dir(stage, key, made_from) / "out"
            if manifest.version == stage.version and not (out / MANIFEST).exists():
                link_tree(stage.target(key), out)
                adopted.append(out.parent)
    return adopted


def main() -> None:
    """The command line; see the module."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        known = "[days=7] [journals=false] [params=params.yaml]"
        print(f"usage: python -m pipelines.state [prune|adopt] {known}\n\n{__doc__}")
        return
    from molmo_model.config import load_params

    with exit_on_error("state"):
        action = arguments.pop(0) if arguments and "=" not in arguments[0] else "list"
        options = {"days": "7", "journals": "false", "params": "params.yaml"}
        for name, value in map(option, arguments):
            if name not in options:
                raise ConfigError(f"unknown option {name!r}; known: {', '.join(options)}")
            options[name] = value
        params = load_params(options["params"])
        if action == "list":
            _print(states(params))
        elif action == "adopt":
            adopted = adopt(params)
            print(f"adopted {len(adopted)} artefacts: {', '.join(map(str, adopted)) or 'none was missing'}")
        elif action == "prune":
            gone = prune(params, *_prune_options(options))
            _print(gone)
            print(f"pruned {len(gone)} of them, {sum(state.bytes for state in gone) / 1e6:.1f} MB")
        else:
            raise ConfigError(f"unknown action {action!r}; known: list, prune, adopt")


def _prune_options(options: dict[str, str]) -> tuple[float, bool]:
    try:
        days = float(options["days"])
    except ValueError as error:
        raise ConfigError(f"days={options['days']} is no number of days") from error
    if options["journals"] not in ("true", "false"):
        raise ConfigError(f"journals={options['journals']} is neither true nor false")
    return days, options["journals"] == "true"


def _wanted(params: Any) -> Iterator[Path]:
    """State directories that a run of any stage would use now; stages whose inputs are not there yet have none."""
    for stage in STAGES:
        for key in stage.partitions(params):
            try:
                yield state_dir(stage, key, stamp(stage, params, key))
            except (ArtifactError, ConfigError):
                continue


def _journals_of_artefacts() -> set[Path]:
    """Journals of the checkpoints that lie among the artefacts."""
    kept = set()
    for manifest in Path("artifacts/checkpoints").glob(f"*/*/{MANIFEST}"):
        try:
            kept.add(predict.journal_folder(read_manifest(manifest.parent)))
        except ArtifactError:
            continue
    return kept


def _state(path: Path, wanted: bool) -> State:
    files = [file.stat() for file in path.rglob("*") if file.is_file()]
    finished = (path / "out" / MANIFEST).exists()
    return State(
        path, finished, wanted, sum(file.st_size for file in files), max((f.st_mtime for f in files), default=0.0)
    )


def _print(found: list[State]) -> None:
    for state in found:
        kind = "journal" if state.is_journal else "finished" if state.finished else "unfinished"
        age = (time.time() - state.used) / 86400
        wanted = "wanted" if state.wanted else "not wanted"
        print(f"{state.path}  {kind}, {wanted}, {state.bytes / 1e6:.1f} MB, used {age:.1f} days ago")


if __name__ == "__main__":
    main()
