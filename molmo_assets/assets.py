"""The assets: one for each kind of artefact, in the order of the flow.

Every body is one line, because a stage is implemented once, in `pipelines/`. A data version is the digest of the
artefact's manifest and the code version the digest of the stage's sources, so "stale" means the same here as in
`dvc status`.
"""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from molmo_assets.flow import code_module
from molmo_assets.partitions import CELLS, CHECKPOINTS, DATASETS, MODELS, RUNS, reads
from molmo_assets.production import materialize, report_checkpoints
from molmo_assets.resources import StageProcess
from molmo_model.source_digest import source_digest

ACCELERATOR = "accelerator"
"""Pool of the steps that want the whole machine; limit it where several runs may be in progress at once."""
BLOCKED = dg.AutomationCondition.any_deps_match(
    dg.AutomationCondition.any_checks_match(dg.AutomationCondition.check_failed(), blocking_only=True)
)
NEW_INPUT = (
    dg.AutomationCondition.any_deps_updated().since_last_handled()
    & ~dg.AutomationCondition.any_deps_in_progress()
    & ~dg.AutomationCondition.in_progress()
    & ~BLOCKED
).with_label("something that it reads has changed, and no blocking check of it has failed")
"""For what is cheap and gathers: made again whenever an input is new, though others may still be missing."""
NEW_CELL = (dg.AutomationCondition.missing() & ~dg.AutomationCondition.any_deps_missing() & NEW_INPUT).with_label(
    "missing, and everything that it reads is there"
)
"""For what is expensive: computed once when everything that it reads is there, not again with every new version."""


def code(asset: str) -> str:
    """The code version of an asset."""
    return source_digest(code_module(asset))


@dg.asset(
    partitions_def=MODELS, group_name="model", kinds={"pytorch"}, code_version=code("models"), deps=reads("models")
)
def models(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    """Weights, tokenizer and preprocessor that runs start from: random or pretrained parts, put together."""
    return materialize(context, "models")


@dg.asset(partitions_def=DATASETS, group_name="data", kinds={"webdataset"}, code_version=code("shards"))
def shards(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    """The examples of one dataset as tar shards with an index; facts only, no choice of prompt or mixture."""
    return materialize(context, "shards")


@dg.asset(
    partitions_def=DATASETS,
    group_name="data",
    kinds={"greatexpectations"},
    code_version=code("validation"),
    deps=reads("validation"),
)
def validation(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    """Statistics of one dataset against its expectations."""
    return materialize(context, "validation")


@dg.asset(partitions_def=RUNS, group_name="data", kinds={"json"}, code_version=code("mixture"), deps=reads("mixture"))
def mixture(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    """What one run is trained on: rates of the datasets and the cost of every example, shards named by digest."""
    return materialize(context, "mixture")


@dg.asset(
    partitions_def=RUNS,
    group_name="model",
    kinds={"pytorch"},
    code_version=code("training_run"),
    deps=reads("training_run"),
    pool=ACCELERATOR,
)
def training_run(context: dg.AssetExecutionContext, stage_process: StageProcess) -> Iterator[dg.MaterializeResult[Any]]:
    """One training, with torchrun. A run that starts from another run needs that one first; cancelling saves."""
    yield materialize(context, "training_run", stage_process)
    report_checkpoints(context, context.partition_key)


@dg.asset(
    partitions_def=CHECKPOINTS,
    group_name="model",
    kinds={"safetensors"},
    code_version=code("checkpoint"),
    deps=reads("checkpoint"),
)
def checkpoint(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    """One saved step of a run: a folder that `from_pretrained` loads. Registered by the run as soon as it is saved;
    materialising it verifies every file and registers it again."""
    return materialize(context, "checkpoint")


@dg.asset(
    partitions_def=CELLS,
    group_name="evaluation",
    kinds={"jsonlines"},
    code_version=code("predictions"),
    deps=reads("predictions"),
    automation_condition=NEW_CELL,
    pool=ACCELERATOR,
)
def predictions(context: dg.AssetExecutionContext, stage_process: StageProcess) -> dg.MaterializeResult[Any]:
    """Stage 1 of evaluation: a checkpoint's answers to the questions of a task."""
    return materialize(context, "predictions", stage_process)


@dg.asset(
    partitions_def=CELLS,
    group_name="evaluation",
    kinds={"json"},
    code_version=code("metrics"),
    deps=reads("metrics"),
    automation_condition=NEW_CELL,
)
def metrics(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    """Stage 2 of evaluation: scores of the answers, with intervals, beside the majority answer's."""
    return materialize(context, "metrics")


@dg.asset(
    partitions_def=CHECKPOINTS,
    group_name="evaluation",
    kinds={"json"},
    code_version=code("scorecard"),
    deps=reads("scorecard"),
    automation_condition=NEW_CELL,
)
def scorecard(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    """All tasks of one checkpoint; what reports and gates stand on."""
    return materialize(context, "scorecard")


@dg.asset(
    group_name="evaluation",
    kinds={"html"},
    code_version=code("report"),
    deps=reads("report"),
    automation_condition=NEW_INPUT,
)
def report(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    """One offline page that compares the checkpoints of `eval.checkpoints`, with examples, curves and a CSV."""
    return materialize(context, "report")


ASSETS = [models, shards, validation, mixture, training_run, checkpoint, predictions, metrics, scorecard, report]
