"""Recording in `dvc.lock` what was made outside of `dvc repro`: `python -m molmo_assets.dvc_commit [stage ...]`.

`dvc commit -f` blesses whatever lies in the workspace: change a seed, run nothing, and DVC says "up to date". This
command commits a stage only when its artefact was made from the params, inputs and code of the workspace, and otherwise
refuses, naming the difference. Without names it commits every stage that is up to date and lists the others. Dagster
calls it after each materialisation.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo_assets.flow import Artefact, all_artefacts
from molmo_model.config import Params, load_params, lookup
from molmo_model.errors import ArtifactError
from pipelines.stage import exit_on_error

DVC_PARAMS = "params.yaml"
"""The params that `dvc.yaml` names; an artefact made from another file is not what DVC would make."""


def commit(items: Sequence[Artefact]) -> str:
    """Records artefacts in `dvc.lock`; returns one line that says what was done, or why nothing.

    Stages that read a folder which the artefacts lie in (`artifacts/shards`) are recorded anew when they are up to
    date: DVC sees the folder, not the part of it that they read.

    Raises:
        ArtifactError: an artefact is not what the workspace would make; names the difference. Nothing is recorded then.
    """
    if not Path(".dvc").is_dir() or not Path("dvc.yaml").is_file():
        return "not recorded in DVC: there is no .dvc or no dvc.yaml here"
    params = load_params(DVC_PARAMS)
    with _repo() as repo:
        stages = {stage.addressing: stage for stage in repo.index.stages}
        own = [item for item in items if item.dvc_name in stages]
        for item in own:
            refuse_unless_up_to_date(item, params)
        readers = _readers_of_folders(stages.values(), [item.path.absolute() for item in items])
        others = [item for item in all_artefacts(params) if item.dvc_name in readers and item not in own]
        names = [item.dvc_name for item in own if item.dvc_name]
        names += [item.dvc_name for item in others if item.dvc_name and not item.differences(params)]
        recorded = _record(repo, stages, names)
    if not own:
        return f"not recorded in DVC: dvc.yaml has no stage for {', '.join(item.name for item in items)}"
    return f"recorded in dvc.lock: {', '.join(recorded) or 'already as they are'}"


def commit_all(params: Params, names: list[str], say: Callable[[str], object] = print) -> None:
    """Records the named stages, or all that are up to date.

    Raises:
        ArtifactError: a named stage is not up to date; nothing is recorded then.
    """
    known = {item.dvc_name: item for item in all_artefacts(params) if item.dvc_name is not None}
    with _repo() as repo:
        stages = {stage.addressing: stage for stage in repo.index.stages}
        chosen = [lookup(known, name, "stage") for name in names] or [known[name] for name in known if name in stages]
        ready = []
        for item in chosen:
            if names:
                refuse_unless_up_to_date(item, params)
            elif found := item.differences(params):
                say(f"{item.dvc_name}: left out, {found[0]}")
                continue
            ready.append(str(item.dvc_name))
        recorded = _record(repo, stages, ready)
    for name in ready:
        say(f"{name}: {'recorded' if name in recorded else 'already recorded'}")


def refuse_unless_up_to_date(item: Artefact, params: Params) -> None:
    """Raises `ArtifactError` when the artefact is not what the workspace would make."""
    if found := item.differences(params):
        listed = "; ".join(found)
        command = f"python -m {item.stage.module} {' '.join(f'{name}={value}' for name, value in item.key.items())}"
        raise ArtifactError(f"dvc commit of {item.dvc_name} refused: {listed}. Run `{command.strip()}` first")


def _repo() -> Any:
    """DVC's repository of the working directory; waits for its lock, which another command may hold for long."""
    from dvc.repo import Repo

    return Repo(_wait_for_lock=True)


def _record(repo: Any, stages: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Commits those of the named stages that DVC finds changed; returns their names.

    A `foreach` or `matrix` whose other members are unchanged is committed as one: DVC writes its lock file anew for
    each commit.
    """
    from dvc.exceptions import DvcException

    changed = [name for name in names if any(stages[name].changed_entries())]
    groups: dict[str, list[str]] = {}
    for name in changed:
        groups.setdefault(name.partition("@")[0], []).append(name)
    for group, members in groups.items():
        rest = [name for name in stages if name.partition("@")[0] == group and name not in members]
        whole = len(members) > 1 and not any(any(stages[name].changed_entries()) for name in rest)
        try:
            for target in [group] if whole else members:
                repo.commit(target, force=True)
        except DvcException as error:
            message = f"{', '.join(members)}: made, but DVC cannot record it: {error}. See its deps in dvc.yaml"
            raise ArtifactError(message) from error
    return changed


def _readers_of_folders(stages: Any, paths: Sequence[Path]) -> set[str]:
    """Names of the recorded stages that depend on a folder which one of the paths lies in."""
    folders = {folder for path in paths for folder in path.parents}
    return {
        stage.addressing
        for stage in stages
        if any(dep.hash_info and Path(str(dep.fs_path)) in folders for dep in stage.deps)
    }


def main() -> None:
    """The command line; see the module."""
    names = sys.argv[1:]
    if {"-h", "--help"} & set(names):
        print(f"usage: python -m molmo_assets.dvc_commit [stage ...]\n\n{__doc__}")
        return
    with exit_on_error("dvc_commit"):
        if not Path(".dvc").is_dir():
            raise ArtifactError("there is no .dvc here; run `dvc init` or go to the project's folder")
        commit_all(load_params(DVC_PARAMS), names)


if __name__ == "__main__":
    main()
