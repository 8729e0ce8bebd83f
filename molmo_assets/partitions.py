"""Partition definitions, from `params.yaml` alone: Dagster holds no hyperparameters and no list of its own.

All are static. A training names its checkpoints in advance (`save_every`, `steps`), so every cell of the evaluation has
its place in the lineage before the first step is trained, one backfill over everything goes through in order, and
Dagster's own partition mappings, which the web server understands, say what reads what. After an edit of the params,
"Reload definitions" shows the new ones.
"""

import os

import dagster as dg

from molmo_assets.flow import UPSTREAM, depends_on_all, dimension, dimensions, partition_map
from molmo_model.config import Params, load_params


def params_file() -> str:
    """The params that Dagster works with: `$MOLMO_PARAMS`, or `params.yaml` of the working directory."""
    return os.environ.get("MOLMO_PARAMS", "params.yaml")


PARAMS: Params = load_params(params_file())
"""The params as they were when the definitions were loaded; they decide the partitions. Stages read the file anew."""

MODELS = dg.StaticPartitionsDefinition(dimension("model", PARAMS))
DATASETS = dg.StaticPartitionsDefinition(dimension("dataset", PARAMS))
RUNS = dg.StaticPartitionsDefinition(dimension("run", PARAMS))
CHECKPOINTS = dg.StaticPartitionsDefinition(dimension("checkpoint", PARAMS))
TASKS = dg.StaticPartitionsDefinition(dimension("task", PARAMS))
CELLS = dg.MultiPartitionsDefinition({"checkpoint": CHECKPOINTS, "task": TASKS})
"""Checkpoint x task: one cell is asked, answered and scored by itself. Keys are `<run>/step-<six digits>|<task>`."""

OF_DIMENSIONS: dict[tuple[str, ...], dg.PartitionsDefinition | None] = {
    (): None,
    ("model",): MODELS,
    ("dataset",): DATASETS,
    ("run",): RUNS,
    ("checkpoint",): CHECKPOINTS,
    ("checkpoint", "task"): CELLS,
}


def partitions_of(asset: str) -> dg.PartitionsDefinition | None:
    """The partitions of an asset: one definition for each set of dimensions."""
    return OF_DIMENSIONS[dimensions(asset)]


def reads(asset: str) -> list[dg.AssetDep]:
    """The dependencies of an asset with the mapping of their partitions."""
    return [dg.AssetDep(upstream, partition_mapping=_mapping(upstream, asset)) for upstream in UPSTREAM[asset]]


def _mapping(upstream: str, downstream: str) -> dg.PartitionMapping | None:
    """None where Dagster's own inference is right: equal partitions, or one a dimension of the other."""
    above, below = dimensions(upstream), dimensions(downstream)
    if not below:
        read = partition_map(upstream, downstream, PARAMS)
        return dg.SpecificPartitionsPartitionMapping([key for key, readers in read.items() if readers])
    if set(above) & set(below):
        return None
    if depends_on_all(upstream, downstream):
        return dg.AllPartitionMapping()
    return dg.StaticPartitionMapping(partition_map(upstream, downstream, PARAMS))
