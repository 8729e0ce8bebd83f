"""Which asset is which artefact: the table that assets, checks, jobs, sensors and DVC's names are all derived from.

An asset's partition key and a stage's key are two spellings of one thing; this module translates between them, says
which artefacts of one asset another asset reads (from the stages' own declared inputs), and whether what lies in the
workspace is up to date.
"""

import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from molmo_model.artifacts import Manifest, read_manifest
from molmo_model.config import Params, checkpoint_name, lookup, saved_steps
from molmo_model.errors import ArtifactError
from pipelines import assemble, mixture, predict, report, score, scorecard, shards, train, validate
from pipelines.stage import Stage, differences

STAGES: dict[str, Stage] = {
    "models": assemble.STAGE,
    "shards": shards.STAGE,
    "validation": validate.STAGE,
    "mixture": mixture.STAGE,
    "training_run": train.STAGE,
    "predictions": predict.STAGE,
    "metrics": score.STAGE,
    "scorecard": scorecard.STAGE,
    "report": report.STAGE,
}
"""The stage that makes each asset. `checkpoint` is the one asset without a stage of its own: it is a part of a
training run, published while the run goes on."""

CHECKPOINT = "checkpoint"
UPSTREAM: dict[str, tuple[str, ...]] = {
    "models": (),
    "shards": (),
    "validation": ("shards",),
    "mixture": ("models", "shards"),
    "training_run": ("models", "shards", "mixture"),
    CHECKPOINT: ("models", "training_run"),
    "predictions": ("shards", CHECKPOINT),
    "metrics": ("predictions",),
    "scorecard": ("metrics",),
    "report": ("shards", "training_run", "predictions", "scorecard"),
}
"""Every asset and what it reads, in topological order. A test compares this with the stages' own inputs."""

CHILD_STAGES = {"train": True, "predict": False}
"""Stages that compute for long: they run as a supervised child process instead of in the step's own. True: the stage
reports its progress and its checkpoints over Dagster Pipes."""


@dataclass(frozen=True)
class Artefact:
    """One partition of one asset: where it lies and which stage and key make it."""

    asset: str
    partition: str | None
    stage: Stage
    key: dict[str, str]

    @property
    def path(self) -> Path:
        return self.stage.target(self.key)

    @property
    def name(self) -> str:
        return self.asset if self.partition is None else f"{self.asset}[{self.partition}]"

    @property
    def dvc_name(self) -> str | None:
        """The stage's name in `dvc.yaml` after `foreach` and `matrix`; None for a checkpoint, which is part of one."""
        if self.asset == CHECKPOINT:
            return None
        return f"{self.stage.name}@{'-'.join(self.key.values())}" if self.key else self.stage.name

    def manifest(self) -> Manifest:
        """Its manifest; raises `ArtifactError` where there is none."""
        return read_manifest(self.path, self.stage.schema)

    def differences(self, params: Params) -> list[str]:
        """How it differs from what the workspace would make now; empty means up to date. Checks every file's hash."""
        stage = self.stage
        if self.asset == CHECKPOINT:
            try:  # a part of a training run: the run's schema version says nothing about it
                stage = dataclasses.replace(stage, version=self.manifest().version)
            except ArtifactError as error:
                return [str(error)]
        return differences(stage, params, self.key)


def artefact(asset: str, partition: str | None, params: Params) -> Artefact:
    """The artefact of one partition of an asset.

    Raises:
        ConfigError: there is no such asset.
        ArtifactError: a checkpoint of a run and model that the params do not have.
    """
    lookup(UPSTREAM, asset, "asset")
    if asset == CHECKPOINT:
        return _checkpoint(partition or "", params)
    stage = STAGES[asset]
    key = split_key(asset, partition) if partition is not None else {}
    return Artefact(asset, partition, stage, {name: key[name] for name in stage.keys})


def dimensions(asset: str) -> tuple[str, ...]:
    """What an asset is partitioned by, in the order of Dagster's keys: sorted by name."""
    return (CHECKPOINT,) if asset == CHECKPOINT else tuple(sorted(STAGES[asset].keys))


def split_key(asset: str, partition: str) -> dict[str, str]:
    """A partition key by dimension: `pretrain/step-000300|scene_qa` is of a checkpoint and a task."""
    return dict(zip(dimensions(asset), partition.split("|"), strict=True))


def depends_on_all(upstream: str, downstream: str) -> bool:
    """A cell depends on the shards of all datasets: Dagster has no mapping from one dimension of a cell to a key that
    is no dimension of it. `molmo_assets.sync` knows better: it reports a cell anew when another dataset changed."""
    above, below = dimensions(upstream), dimensions(downstream)
    return len(below) > 1 and not set(above) & set(below)


def code_module(asset: str) -> str:
    """The module whose source digest is the asset's code version."""
    return train.STAGE.module if asset == CHECKPOINT else STAGES[asset].module


def partition_keys(asset: str, params: Params) -> list[str | None]:
    """Every partition key of an asset that the params name; `[None]` for an unpartitioned one."""
    names = dimensions(asset)
    if not names:
        return [None]
    return ["|".join(values) for values in itertools.product(*(dimension(name, params) for name in names))]


def dimension(name: str, params: Params) -> list[str]:
    """The values of one kind of key: `model`, `dataset`, `run`, `checkpoint` or `task`."""
    values = {
        "model": list(params.models),
        "dataset": list(params.datasets),
        "run": sorted(params.runs, key=lambda run: _depth(run, params)),
        "checkpoint": checkpoints(params),
        "task": list(params.tasks),
    }
    return list(lookup(values, name, "partition dimension"))


def checkpoints(params: Params) -> list[str]:
    """Every checkpoint that the params name: all that the runs save, then what else `eval.checkpoints` lists."""
    runs = sorted(params.runs, key=lambda run: _depth(run, params))
    saved = [checkpoint_name(run, step) for run in runs for step in saved_steps(params.runs[run].train)]
    return list(dict.fromkeys([*saved, *params.eval.checkpoints]))


def all_artefacts(params: Params) -> Iterator[Artefact]:
    """Every artefact that the params name, in topological order."""
    for asset in UPSTREAM:
        for partition in partition_keys(asset, params):
            yield artefact(asset, partition, params)


def partition_map(upstream: str, downstream: str, params: Params) -> dict[str, list[str]]:
    """For every partition of `upstream`, the partitions of `downstream` that read it, from the stages' inputs.

    Example: `partition_map("shards", "mixture", params)` is `{"charts": ["pretrain", "sft"], ...}`.
    """
    readers = {
        str(key): input_paths(artefact(downstream, key, params), params) for key in partition_keys(downstream, params)
    }
    mapping = {}
    for owner in partition_keys(upstream, params):
        folder = artefact(upstream, owner, params).path
        mapping[str(owner)] = [
            key for key, paths in readers.items() if any(path.is_relative_to(folder) for path in paths)
        ]
    return mapping


def input_paths(item: Artefact, params: Params) -> list[Path]:
    """Paths of what an artefact is made from. A checkpoint is a part of its training run, or of its model."""
    if item.asset == CHECKPOINT:
        return [item.path]
    return [Path(path) for path in item.stage.inputs(params, item.key).values()]


def params_for(item: Artefact, params: Params) -> Params:
    """The params to make an artefact with: cells of saved checkpoints outside `eval.checkpoints` may be made too."""
    checkpoint = item.key.get("checkpoint")
    if checkpoint is None or checkpoint in params.eval.checkpoints:
        return params
    params = copy.deepcopy(params)
    params.eval.checkpoints = [checkpoint]
    return params


def combined_version(versions: Mapping[str, str]) -> str:
    """The version that Dagster gives to several upstream partitions together: a hash of theirs, in order of key."""
    return hashlib.sha256("".join(versions[key] for key in sorted(versions)).encode()).hexdigest()


def _checkpoint(partition: str, params: Params) -> Artefact:
    name, _, step = partition.partition("/")
    if name in params.runs:
        made_by, kind = train.STAGE, "run"
    elif name in params.models:
        made_by, kind = assemble.STAGE, "model"
    else:
        raise ArtifactError(f"checkpoint {partition!r}: the params have neither a run nor a model {name!r}")
    out = f"artifacts/checkpoints/{{{kind}}}/{{step}}"
    stage = dataclasses.replace(made_by, schema="molmo/checkpoint", out=out)
    return Artefact(CHECKPOINT, partition, stage, {kind: name, "step": step})


def _depth(run: str, params: Params) -> int:
    """How many runs come before this one: a run stands after the one it starts from."""
    depth = 0
    while (start := params.runs[run].init) in params.runs:
        run, depth = start, depth + 1
    return depth
