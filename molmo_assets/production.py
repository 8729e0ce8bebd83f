"""Making one artefact inside a Dagster step: the stage, in process or as a child, then the record in DVC."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import dagster as dg

from molmo_assets import dvc_commit, sync
from molmo_assets.checks import closed_gates, failures
from molmo_assets.flow import (
    CHECKPOINT,
    CHILD_STAGES,
    STAGES,
    UPSTREAM,
    Artefact,
    all_artefacts,
    artefact,
    params_for,
)
from molmo_assets.metadata import describe
from molmo_assets.partitions import params_file
from molmo_assets.resources import StageProcess
from molmo_model.artifacts import Manifest
from molmo_model.config import Params, load_params
from molmo_model.errors import ArtifactError, MolmoError
from pipelines.stage import run

Context = dg.AssetExecutionContext | dg.OpExecutionContext
SECONDS_BETWEEN_OBSERVATIONS = 20.0
"""Progress goes to the log at once, and to the asset's plots this often."""


def materialize(
    context: dg.AssetExecutionContext, asset: str, process: StageProcess | None = None
) -> dg.MaterializeResult[Any]:
    """Brings the step's own partition of an asset up to date."""
    params = load_params(params_file())
    item = artefact(asset, context.partition_key if context.has_partition_key else None, params)
    manifest = produce(context, item, params, process)
    return dg.MaterializeResult(metadata=describe(item, manifest), data_version=dg.DataVersion(manifest.digest))


def produce(context: Context, item: Artefact, params: Params, process: StageProcess | None) -> Manifest:
    """Runs the stage of an artefact, unless it is up to date, and records it in DVC.

    Raises:
        Failure: the stage refused or failed; its message says why. Not retried when it refused.
    """
    with refusals_as_failures():
        if item.asset == CHECKPOINT:
            return _saved_checkpoint(item, params)
        if closed := closed_gates(item, params):
            raise ArtifactError(f"held back by a gate: {'; '.join(closed)}")
        if item.stage.name in CHILD_STAGES and process is not None and item.differences(params):
            arguments = [f"{name}={value}" for name, value in item.key.items()]
            if params_for(item, params) is not params:
                arguments.append(f"eval.checkpoints=[{item.key['checkpoint']}]")
            on_message = listener(context, item) if CHILD_STAGES[item.stage.name] else None
            process.run(context, item.stage.module, [*arguments, f"params={params_file()}"], on_message)
            manifest = item.manifest()
        else:
            manifest = run(item.stage, params_for(item, params), **item.key)
        context.log.info(f"{item.name}: {manifest.digest[:16]} in {item.path}")
        context.log.info(dvc_commit.commit([item]))
        return manifest


def produce_all(context: Context, asset: str, params: Params, process: StageProcess) -> None:
    """Brings every partition of an asset that `dvc.yaml` would make up to date, records and reports them together."""
    with refusals_as_failures():
        stage = STAGES[asset]
        wanted = stage.partitions(params)
        items = [item for item in all_artefacts(params) if item.asset == asset and item.key in wanted]
        late = [item for item in items if item.differences(params)]
        if stage.name == "predict" and late:  # one process loads torch once for all cells
            process.run(context, stage.module, [f"params={params_file()}"], None)
        for item in late:
            if stage.name == "train":
                arguments = [f"run={item.key['run']}", f"params={params_file()}"]
                process.run(context, stage.module, arguments, listener(context, item))
            elif stage.name != "predict":
                run(stage, params, **item.key)
        context.log.info(f"{asset}: {len(late)} of {len(items)} made anew")
        context.log.info(dvc_commit.commit(items))
        parts = [item for item in all_artefacts(params) if item.asset == CHECKPOINT and asset in UPSTREAM[CHECKPOINT]]
        found = sync.sync(context.instance, params, chosen=[*items, *parts], emit=context.log_event)
        for name in found.reported:
            context.log.info(f"reported {name}")
        if failed := [failure for item in items for failure in failures(item, params)]:
            raise ArtifactError(f"blocking checks failed: {'; '.join(failed)}")


@contextlib.contextmanager
def refusals_as_failures() -> Iterator[None]:
    """Turns the project's own errors into failed steps with a readable message, which are not retried."""
    try:
        yield
    except MolmoError as error:
        raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from error


def report_checkpoints(context: Context, run_name: str) -> None:
    """Tells Dagster of a finished run's checkpoints, with the run that they came from as their provenance."""
    params = load_params(params_file())
    chosen = [item for item in all_artefacts(params) if item.asset == CHECKPOINT and item.key.get("run") == run_name]
    report = sync.sync(context.instance, params, chosen=chosen, emit=context.log_event)
    for name in report.reported:
        context.log.info(f"registered {name}")


def _saved_checkpoint(item: Artefact, params: Params) -> Manifest:
    """The manifest of a checkpoint that lies there, every file verified."""
    if found := item.differences(params):
        name = item.partition.partition("/")[0] if item.partition else ""
        made_by = f"training_run[{name}]" if name in params.runs else f"models[{name}]"
        raise ArtifactError(f"{item.name}: {found[0]}. Materialize {made_by}, which saves it")
    return item.manifest()


def listener(context: Context, item: Artefact) -> Callable[[Mapping[str, Any]], None]:
    """What to do with a stage's messages: log progress, and register a checkpoint as soon as it is saved."""
    last_observation = 0.0

    def listen(message: Mapping[str, Any]) -> None:
        nonlocal last_observation
        numbers = {name: value for name, value in message.items() if isinstance(value, int | float)}
        if message.get("kind") == "checkpoint":
            params = load_params(params_file())
            saved = artefact(CHECKPOINT, f"{message['run']}/step-{int(message['step']):06d}", params)
            report = sync.sync(context.instance, params, chosen=[saved], emit=context.log_event)
            for name in report.reported:
                context.log.info(f"registered {name}: {str(message.get('digest'))[:16]} in {message.get('path')}")
        elif message.get("kind") == "progress":
            context.log.info(f"{item.name}: " + ", ".join(f"{name} {value:.6g}" for name, value in numbers.items()))
            if time.monotonic() - last_observation > SECONDS_BETWEEN_OBSERVATIONS:
                last_observation = time.monotonic()
                observed = dg.AssetObservation(item.asset, partition=item.partition, metadata=numbers)
                context.log_event(observed)

    return listen
