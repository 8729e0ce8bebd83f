"""What is asked for at night, and what follows a change: cells by name."""

import datetime
from collections.abc import Iterator

import dagster as dg
import pytest

from tests.assets.project import Project

# isort: split
from molmo_assets.automation import morning_scorecards, nightly_evaluation
from molmo_assets.definitions import defs


@pytest.fixture(autouse=True)
def persistent(project: Project) -> Iterator[None]:
    """Schedules want an instance that another process could open."""
    with dg.instance_for_test() as instance:
        project.instance = instance
        yield


def requested(schedule: dg.ScheduleDefinition, project: Project, day: int = 1) -> dict[str, str]:
    """Run key by partition of what a schedule asks for on a day of March."""
    when = datetime.datetime(2026, 3, day, 2, tzinfo=datetime.UTC)
    context = dg.build_schedule_context(
        project.instance, scheduled_execution_time=when, repository_def=defs.get_repository_def()
    )
    result = schedule(context)
    requests = [result] if isinstance(result, dg.RunRequest) else list(result)
    return {str(request.partition_key): str(request.run_key) for request in requests}


def test_the_night_fills_the_missing_cells_of_saved_checkpoints_only(project: Project) -> None:
    assert requested(nightly_evaluation, project) == {}
    project.produce("models", "shards", "mixture")
    project.produce("training_run", run="pretrain")
    project.produce("predictions", "metrics", checkpoint=project.saved("pretrain")[-1], task="scene_qa")
    project.sync()
    tasks, last = list(project.params.tasks), project.saved("pretrain")[-1]
    cells = {f"{name}|{task}" for name in project.saved("pretrain") for task in tasks}
    assert requested(nightly_evaluation, project).keys() == cells - {f"{last}|scene_qa"}


def test_a_failed_cell_is_asked_for_again_the_next_night(project: Project) -> None:
    project.produce("models", "shards", "mixture", "training_run")
    project.sync()
    first, second = requested(nightly_evaluation, project, 1), requested(nightly_evaluation, project, 2)
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())
    assert first == requested(nightly_evaluation, project, 1)


def test_a_scorecard_is_gathered_once_all_tasks_are_scored(project: Project) -> None:
    project.produce("models", "shards", "mixture", "training_run", "predictions", "metrics")
    project.sync()
    asked = list(project.params.eval.checkpoints)
    assert list(requested(morning_scorecards, project)) == [
        name for run in ("pretrain", "sft") for name in project.saved(run) if name in asked
    ]
    project.produce("scorecard", checkpoint=asked[0])
    project.sync()
    assert asked[0] not in requested(morning_scorecards, project)


def test_a_new_checkpoint_is_evaluated_when_changes_are_followed(project: Project) -> None:
    """Asked for: what has become possible since the first look, once, and nothing else."""
    result = dg.evaluate_automation_conditions(defs, project.instance)
    assert result.total_requested == 0
    project.produce("models", "shards", "mixture")
    project.produce("training_run", run="pretrain")
    project.sync()
    result = dg.evaluate_automation_conditions(defs, project.instance, cursor=result.cursor)
    saved = set(project.saved("pretrain"))
    cells = {f"{name}|{task}" for name in saved for task in project.params.tasks}
    assert result.get_requested_partitions(dg.AssetKey("predictions")) == cells
    assert result.get_requested_partitions(dg.AssetKey("metrics")) == cells
    result = dg.evaluate_automation_conditions(defs, project.instance, cursor=result.cursor)
    assert result.total_requested == 0
    last = project.saved("pretrain")[-1]
    project.produce("predictions", "metrics", checkpoint=last)
    project.sync()
    result = dg.evaluate_automation_conditions(defs, project.instance, cursor=result.cursor)
    assert result.get_requested_partitions(dg.AssetKey("scorecard")) == {last}
    assert result.get_requested_partitions(dg.AssetKey("metrics")) == set()
