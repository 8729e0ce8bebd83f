"""After the command line (or `dvc repro`) has made something and it was reported, nothing is stale that is not.

The statuses come from Dagster's own resolver over the asset graph, as its web server computes them.
"""

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

from tests.assets.project import Project, flow

# isort: split
from molmo_assets import provenance
from molmo_assets.automation import dvc_outputs
from molmo_assets.definitions import defs


def statuses(project: Project) -> dict[str, str]:
    """Name of every artefact that Dagster knows to its status, with the causes of staleness."""
    resolver = CachingStaleStatusResolver(
        instance=project.instance,
        asset_graph=defs.resolve_asset_graph(),
        loading_context=LoadingContextForTest(project.instance),
    )
    found = {}
    for item in flow.all_artefacts(project.params):
        key = dg.AssetKey(item.asset)
        causes = resolver.get_stale_causes(key, item.partition)
        reasons = [
            f"{cause.dependency.asset_key.to_user_string()}: {cause.reason}" for cause in causes if cause.dependency
        ]
        reasons += [cause.reason for cause in causes if not cause.dependency]
        found[item.name] = "; ".join([resolver.get_status(key, item.partition).value, *reasons])
    return found


def stale(project: Project) -> dict[str, str]:
    return {name: status for name, status in statuses(project).items() if status not in ("FRESH", "MISSING")}


def missing(project: Project) -> set[str]:
    return {name for name, status in statuses(project).items() if status == "MISSING"}


def materialize(project: Project, asset: str, partition: str | None = None) -> None:
    """One asset's step, as the UI would run it; without checks, which fakes cannot pass."""
    repository = defs.get_repository_def()
    job = repository.get_implicit_job_def_for_assets([dg.AssetKey(asset)])
    assert job is not None
    done = job.get_subset(asset_selection={dg.AssetKey(asset)}, asset_check_selection=set()).execute_in_process(
        instance=project.instance, partition_key=partition, raise_on_error=True
    )
    assert done.success


@pytest.mark.slow
def test_everything_the_command_line_made_is_fresh_and_a_second_call_reports_nothing(project: Project) -> None:
    project.produce()
    first = project.sync()
    assert stale(project) == {}
    # saved checkpoints that eval.checkpoints does not name have no evaluation
    cells = {f"{name}|{task}" for name in project.unasked for task in project.params.tasks}
    assert missing(project) == {
        *(f"scorecard[{name}]" for name in project.unasked),
        *(f"{asset}[{cell}]" for asset in ("predictions", "metrics") for cell in cells),
    }
    assert set(first.reported) == {item.name for item in flow.all_artefacts(project.params)} - missing(project)
    assert first.reported == [item.name for item in flow.all_artefacts(project.params) if item.name in first.reported]
    second = project.sync()
    assert (second.reported, second.out_of_date) == ([], {})


def test_a_data_version_is_the_digest_and_carries_its_provenance(project: Project) -> None:
    project.produce("models", "shards")
    project.sync()
    item = flow.artefact("shards", "charts", project.params)
    tags = provenance.recorded_tags(project.instance, item)
    assert tags is not None
    assert tags["dagster/data_version"] == item.manifest().digest
    assert tags["dagster/code_version"] == item.manifest().code
    assert tags["dagster/data_version_is_user_provided"] == "true"


def test_what_is_out_of_date_is_not_reported_but_named(project: Project) -> None:
    project.produce("models", "shards")
    project.edit(lambda raw: raw.update(seed=4711))
    report = project.sync()
    assert report.reported == []
    assert report.out_of_date["shards[charts]"].startswith("params seed: made with ")
    assert report.out_of_date["shards[charts]"].endswith(", now 4711")


def test_an_unfinished_artefact_is_not_reported(project: Project) -> None:
    project.produce("models", "shards")
    (flow.artefact("shards", "charts", project.params).path / "manifest.json").unlink()
    assert project.sync().reported == ["models[base]", "shards[digit_scenes]"]


def test_a_damaged_artefact_is_not_reported(project: Project) -> None:
    project.produce("shards")
    (flow.artefact("shards", "charts", project.params).path / "content.txt").write_text("other")
    report = project.sync()
    assert report.reported == ["shards[digit_scenes]"]
    assert "content.txt" in report.out_of_date["shards[charts]"]


@pytest.mark.slow
def test_new_content_of_a_checkpoint_makes_its_predictions_stale_and_no_others(project: Project) -> None:
    """The matrix of what must go stale, and what must not."""
    project.produce()
    project.sync()
    project.content["sft"] = "another result from the same inputs"
    project.forget("training_run", "sft")
    project.produce("training_run", run="sft")
    project.sync()
    wrong = {name for name in stale(project) if name.startswith("predictions")}
    asked = [name for name in project.saved("sft") if name in project.params.eval.checkpoints]
    assert wrong == {f"predictions[{name}|{task}]" for name in asked for task in project.params.tasks}
    assert {stale(project)[name] for name in wrong} == {"STALE; checkpoint: has a new dependency data version"}
    assert stale(project).keys() - wrong == {"report"}
    project.produce()
    project.sync()
    assert stale(project) == {}


@pytest.mark.slow
def test_same_content_again_makes_nothing_stale(project: Project) -> None:
    project.produce()
    project.sync()
    project.forget("training_run", "pretrain")
    project.produce("training_run", run="pretrain")
    project.sync()
    assert stale(project) == {}


def test_steps_run_by_dagster_are_fresh_and_are_not_reported_again(project: Project) -> None:
    materialize(project, "models", "base")
    for dataset in project.params.datasets:
        materialize(project, "shards", dataset)
    for run in ("pretrain", "sft"):
        materialize(project, "mixture", run)
    assert stale(project) == {}
    assert project.sync().reported == []


def test_dagster_and_the_command_line_give_the_same_digests(project: Project) -> None:
    materialize(project, "shards", "charts")
    item = flow.artefact("shards", "charts", project.params)
    tags = provenance.recorded_tags(project.instance, item)
    project.forget("shards", "charts")
    project.produce("shards", dataset="charts")
    assert tags is not None
    assert item.manifest().digest == tags["dagster/data_version"]


def test_a_materialised_checkpoint_is_registered_with_the_version_that_lies_there(project: Project) -> None:
    project.produce("models", "shards", "mixture", "training_run")
    project.sync()
    materialize(project, "checkpoint", project.saved("sft")[0])
    assert stale(project) == {}
    assert project.sync().reported == []


def test_a_missing_checkpoint_says_what_saves_it(project: Project) -> None:
    with pytest.raises(dg.Failure, match=r"Materialize training_run\[sft\], which saves it"):
        materialize(project, "checkpoint", project.saved("sft")[0])


def test_cells_outside_of_the_grid_of_dvc_can_be_made(project: Project) -> None:
    """`eval.checkpoints` does not name every checkpoint; Dagster evaluates the others all the same."""
    project.produce("models", "shards", "mixture", "training_run")
    project.sync()
    outside = f"{project.unasked[0]}|charts_qa"
    materialize(project, "predictions", outside)
    materialize(project, "metrics", outside)
    assert stale(project) == {}
    assert project.sync().reported == []


def test_the_sensor_reports_once_and_then_looks_at_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.produce("models", "shards")
    context = dg.build_sensor_context(instance=project.instance, definitions=defs)
    first = dvc_outputs(context)
    assert isinstance(first, dg.SkipReason) and "reported 3 artefacts" in str(first.skip_message)
    assert stale(project) == {}
    second = dvc_outputs(dg.build_sensor_context(instance=project.instance, cursor=context.cursor, definitions=defs))
    assert isinstance(second, dg.SkipReason) and "has changed" in str(second.skip_message)
    project.produce("mixture")
    third = dvc_outputs(dg.build_sensor_context(instance=project.instance, cursor=context.cursor, definitions=defs))
    assert isinstance(third, dg.SkipReason) and "mixture[pretrain]" in str(third.skip_message)


def test_the_sensor_goes_on_where_its_time_was_up(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.produce("models", "shards")
    monkeypatch.setattr("molmo_assets.automation.SYNC_SECONDS", -1.0)
    context = dg.build_sensor_context(instance=project.instance, definitions=defs)
    dvc_outputs(context)
    assert context.cursor is None
