"""The checkpoints of a run as directories: names, which one to go on from, which ones to keep. Needs no torch.

`<name>/step-NNNNNN/` each, complete once its manifest stands there; see `molmo_model.artifacts`.
"""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from molmo_model.artifacts import Manifest, verify
from molmo_model.config import TrainConfig, checkpoint_name
from molmo_model.errors import ArtifactError, CheckpointError

SCHEMA = "molmo/checkpoint"
VERSION = 1
TRAIN_STATE = "train_state"
"""Folder inside a checkpoint with optimizer moments and position; a checkpoint without it only starts runs."""

log = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """`step-000150`."""
    return checkpoint_name("", step).lstrip("/")


def step_of(directory: Path) -> int | None:
    """The step of a checkpoint's directory name; None for other names."""
    prefix, _, digits = directory.name.partition("step-")
    return int(digits) if not prefix and digits.isdigit() and step_name(int(digits)) == directory.name else None


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """All checkpoint directories of a folder, finished or not, oldest first."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if path.is_dir() and (step := step_of(path)) is not None]
    return sorted(found)


def verified(directory: Path) -> Manifest:
    """Checks every file of one checkpoint against its manifest.

    Raises:
        CheckpointError: naming the file that is missing, changed or cut short.
    """
    try:
        return verify(directory, SCHEMA)
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error


def valid_checkpoints(folders: Iterable[Path]) -> list[tuple[int, Path]]:
    """The checkpoints that a run can go on from, oldest first; what is broken is named in a warning and deleted.

    A kill while saving leaves no broken checkpoint behind (they are renamed into place), a failing disk may.
    """
    valid = []
    for step, directory in sorted(entry for folder in folders for entry in steps_in(folder)):
        try:
            verified(directory)
            if not (directory / TRAIN_STATE).is_dir():
                raise CheckpointError(f"{directory / TRAIN_STATE} is missing")
            valid.append((step, directory))
        except CheckpointError as error:
            log.warning("skipping and removing checkpoint %s: %s", directory, error)
            shutil.rmtree(directory)
    return valid


def surplus(saved: Iterable[int], train: TrainConfig, wanted: Iterable[int]) -> list[int]:
    """Steps that retention deletes after a save: all but the newest `keep_checkpoints` and the `wanted` ones.

    The newest checkpoint always stays, whatever the setting.
    """
    if train.keep_checkpoints is None:
        return []
    ordered = sorted(set(saved))
    keep = {*ordered[-max(1, train.keep_checkpoints) :], *wanted}
    return [step for step in ordered if step not in keep]


def wanted_steps(checkpoints: Iterable[str], run: str) -> set[int]:
    """The steps of one run among the names of `eval.checkpoints`."""
    return {int(name.partition("step-")[2]) for name in checkpoints if name.startswith(f"{run}/step-")}
