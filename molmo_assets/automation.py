"""What Dagster does by itself: reporting what others made, filling missing evaluations at night, following changes.

Only the sensor that reports is on by default: it computes nothing. What starts computations is switched on by a person,
on the Automation page.
"""

import hashlib
from collections.abc import Iterator

import dagster as dg

from molmo_assets import sync
from molmo_assets.assets import checkpoint, metrics, predictions, report, scorecard
from molmo_assets.jobs import evaluate, gather_scores, make_report
from molmo_assets.partitions import CELLS, params_file
from molmo_model.config import load_params
from molmo_model.source_digest import forget_sources

SYNC_SECONDS = 45.0
"""Shorter than Dagster's limit for one evaluation of a sensor, 60 s; what is left is done in the next one."""


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Reports what dvc repro or the command line made. Computes nothing.",
)
def dvc_outputs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Reports to Dagster what `dvc repro` or the command line made. Looks into artefacts only when a manifest, the
    params or the code has changed since it was last done."""
    params = load_params(params_file())
    signature = hashlib.sha256(sync.signature(params).encode()).hexdigest()
    if signature == context.cursor:
        return dg.SkipReason("no manifest, parameter or source file has changed")
    forget_sources()
    found = sync.sync(context.instance, params, seconds=SYNC_SECONDS)
    if found.finished:
        context.update_cursor(signature)
    names = ", ".join(found.reported[:10]) + (" ..." if len(found.reported) > 10 else "")
    late = "; ".join(f"{name}: {reason}" for name, reason in list(found.out_of_date.items())[:5])
    return dg.SkipReason(
        f"reported {len(found.reported)} artefacts ({names or 'nothing new'}); out of date: {late or 'none'}"
    )


@dg.schedule(
    job=evaluate,
    cron_schedule="0 2 * * *",
    execution_timezone="UTC",
    description="Fills missing cells: asks and scores every saved checkpoint on every task that has no metrics yet.",
)
def nightly_evaluation(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
    """Asks and scores every cell that has no metrics and whose checkpoint is there. A cell that failed is tried again
    the next night: the key of a request holds the date."""
    scored = context.instance.get_materialized_partitions(metrics.key)
    saved = context.instance.get_materialized_partitions(checkpoint.key)
    night = context.scheduled_execution_time.date().isoformat()
    for cell in CELLS.get_partition_keys():
        if cell not in scored and cell.split("|")[0] in saved:
            yield dg.RunRequest(run_key=f"{night} {cell}", partition_key=cell, tags={"molmo/trigger": "nightly"})


@dg.schedule(
    job=gather_scores,
    cron_schedule="0 5 * * *",
    execution_timezone="UTC",
    description="The scorecard of every checkpoint that has just been scored on all tasks.",
)
def morning_scorecards(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
    """Gathers the scores of every checkpoint all of whose cells are scored and that has no scorecard."""
    scored = context.instance.get_materialized_partitions(metrics.key)
    gathered = context.instance.get_materialized_partitions(scorecard.key)
    morning = context.scheduled_execution_time.date().isoformat()
    cells: dict[str, list[str]] = {}
    for cell in CELLS.get_partition_keys():
        cells.setdefault(cell.split("|")[0], []).append(cell)
    for name, wanted in cells.items():
        if name not in gathered and scored.issuperset(wanted):
            yield dg.RunRequest(run_key=f"{morning} {name}", partition_key=name, tags={"molmo/trigger": "nightly"})


@dg.schedule(
    job=make_report,
    cron_schedule="0 6 * * *",
    execution_timezone="UTC",
    description="The report over eval.checkpoints; rewrites nothing when nothing changed.",
)
def morning_report(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    """The report over what the night has filled; rewrites nothing when nothing changed."""
    return dg.RunRequest(run_key=context.scheduled_execution_time.date().isoformat())


follow_changes = dg.AutomationConditionSensorDefinition(
    "follow_changes",
    target=dg.AssetSelection.assets(predictions, metrics, scorecard, report),
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="Evaluates each new checkpoint and keeps scorecards and report current.",
)

SCHEDULES = [nightly_evaluation, morning_scorecards, morning_report]
SENSORS = [dvc_outputs, follow_changes]
