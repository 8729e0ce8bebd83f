"""Named jobs: one for everything that a person does, built from selection objects (never from strings).

Jobs of partitioned assets run one partition: `dagster job launch -j train --tags '{"dagster/partition": "pretrain"}'`,
or many as a backfill from the UI. `everything` takes no partition: it brings all that the params name up to date, in
order, like `dvc repro`.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from molmo_assets import sync
from molmo_assets.assets import (
    checkpoint,
    metrics,
    mixture,
    models,
    predictions,
    report,
    scorecard,
    shards,
    training_run,
    validation,
)
from molmo_assets.flow import STAGES
from molmo_assets.partitions import params_file
from molmo_assets.production import produce_all
from molmo_assets.resources import StageProcess
from molmo_model.config import load_params


def job_of(name: str, description: str, *assets: dg.AssetsDefinition, tags: Mapping[str, str] | None = None) -> Any:
    """A job that materialises assets and runs their checks, in this order, in one process."""
    return dg.define_asset_job(
        name,
        selection=dg.AssetSelection.assets(*assets),
        description=description,
        executor_def=dg.in_process_executor,
        tags=tags,
    )


prepare_model = job_of("prepare_model", "Assemble a model's starting weights (partition: model).", models)
prepare_data = job_of(
    "prepare_data", "Make and validate the shards of a dataset (partition: dataset).", shards, validation
)
train = job_of("train", "Resolve the mixture of a run and train it (partition: run).", mixture, training_run)
register_checkpoint = job_of(
    "register_checkpoint", "Verify a checkpoint that lies there, and register it (partition: checkpoint).", checkpoint
)
evaluate = job_of(
    "evaluate",
    "Ask a checkpoint the questions of a task, and score (partition: checkpoint|task).",
    predictions,
    metrics,
)
gather_scores = job_of("gather_scores", "One checkpoint's scorecard (partition: checkpoint).", scorecard)
make_report = job_of("make_report", "The report over eval.checkpoints.", report)


class DownloadRequest(dg.Config):
    """What `python -m pipelines.download` is asked for; its limits stay as they are."""

    dataset: str
    """Its name in the params."""
    from_list: bool = False
    """Only the files that the list names."""
    retry: str = "none"
    """`none`, `failed` or `all`: which settled URLs are asked for again."""
    update: bool = False
    """The list may lose files."""


@dg.op
def fetch_urls(context: dg.OpExecutionContext, config: DownloadRequest, stage_process: StageProcess) -> None:
    """The command, live and cancellable: a cancelled one goes on with the next launch."""
    given = {"dataset": config.dataset, "retry": config.retry, "params": params_file()}
    given |= {"from_list": str(config.from_list).lower(), "update": str(config.update).lower()}
    arguments = [f"{name}={value}" for name, value in given.items()]
    stage_process.run(context, "pipelines.download", arguments, None)


@dg.job(
    description="Fetch what a dataset names by URL and write the list of what could be had.",
    executor_def=dg.in_process_executor,
)
def download() -> None:
    """Not an asset: what the web answers is no function of the params; the list is a file under version control."""
    fetch_urls()


def step_of(asset: str) -> dg.OpDefinition:
    """One step of `everything`: all partitions of one asset."""

    @dg.op(name=f"all_{asset}", ins={"after": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing))
    def step(context: dg.OpExecutionContext, stage_process: StageProcess) -> None:
        produce_all(context, asset, load_params(params_file()), stage_process)

    return step


STEPS = [step_of(asset) for asset in STAGES]


@dg.job(description="Everything that the params name, in order, like dvc repro.", executor_def=dg.in_process_executor)
def everything() -> None:
    """Reports each artefact as a materialisation as soon as its kind is done."""
    done: list[Any] = []
    for step in STEPS:
        done = [step(done)]


@dg.op
def report_what_lies_there(context: dg.OpExecutionContext) -> None:
    """Reports what was made outside of Dagster."""
    sync.sync_and_say(context.instance, context.log.info)


@dg.job(
    description="Tell Dagster of what dvc repro or the command line made; the sensor does this by itself.",
    executor_def=dg.in_process_executor,
)
def sync_from_dvc() -> None:
    """The sensor's work, by hand."""
    report_what_lies_there()


JOBS = [
    prepare_model,
    prepare_data,
    train,
    register_checkpoint,
    evaluate,
    gather_scores,
    make_report,
    everything,
    sync_from_dvc,
    download,
]
