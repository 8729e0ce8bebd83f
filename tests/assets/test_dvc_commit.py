"""Recording in `dvc.lock`: what is up to date is recorded, what is not is refused by name, and DVC then agrees."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from molmo_model.config import load_params
from molmo_model.errors import ArtifactError, ConfigError
from pipelines.stage import run
from tests.assets.project import Project, flow

# isort: split
from molmo_assets import dvc_commit

DVC_YAML = """
vars: [params.yaml]
stages:
  shards:
    foreach: ${datasets}
    do:
      cmd: "true"
      params: [seed, "datasets.${key}"]
      outs: ["artifacts/shards/${key}"]
  mixture:
    foreach: ${runs}
    do:
      cmd: "true"
      params: [seed, "runs.${key}"]
      deps: [artifacts/shards]
      outs: ["artifacts/mixture/${key}"]
"""


@pytest.fixture
def repository(project: Project) -> Project:
    """The workspace as a DVC repository."""
    from dvc.repo import Repo

    (project.path / "dvc.yaml").write_text(DVC_YAML, encoding="utf-8")
    Repo.init(no_scm=True).close()
    return project


def status() -> dict[str, object]:
    """What `dvc status` prints, by stage; empty when everything is up to date."""
    from dvc.repo import Repo

    with Repo() as repo:
        return dict(repo.status())


def item(project: Project, asset: str, partition: str) -> flow.Artefact:
    return flow.artefact(asset, partition, project.params)


def test_what_is_up_to_date_is_recorded_and_dvc_agrees(repository: Project) -> None:
    repository.produce("models", "shards", "mixture")
    for dataset in repository.params.datasets:
        assert "recorded in dvc.lock" in dvc_commit.commit([item(repository, "shards", dataset)])
    both = [item(repository, "mixture", run) for run in repository.params.runs]
    assert "mixture@pretrain, mixture@sft" in dvc_commit.commit(both)
    assert status() == {}
    assert dvc_commit.commit(both) == "recorded in dvc.lock: already as they are"


def test_a_changed_seed_with_nothing_run_is_refused(repository: Project, capsys: pytest.CaptureFixture[str]) -> None:
    repository.produce("models", "shards")
    dvc_commit.commit_all(repository.params, [])
    repository.edit(lambda raw: raw.update(seed=raw["seed"] + 1))
    seed = repository.params.seed
    before = Path("dvc.lock").read_text(encoding="utf-8")
    with pytest.raises(
        ArtifactError, match=rf"shards@charts refused: params seed: made with {seed - 1}, now {seed}.*dataset=charts"
    ):
        dvc_commit.commit([item(repository, "shards", "charts")])
    with pytest.raises(ArtifactError, match=f"params seed: made with {seed - 1}, now {seed}"):
        dvc_commit.commit_all(repository.params, ["shards@charts"])
    capsys.readouterr()
    dvc_commit.commit_all(repository.params, [])
    assert f"shards@charts: left out, params seed: made with {seed - 1}, now {seed}" in capsys.readouterr().out
    assert Path("dvc.lock").read_text(encoding="utf-8") == before
    assert set(status()) >= {"shards@charts", "shards@digit_scenes"}


def test_params_of_another_file_do_not_count(repository: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC reads params.yaml, whatever Dagster was told to read."""
    shutil.copyfile("params.yaml", "other.yaml")
    seed = repository.params.seed
    monkeypatch.setenv("MOLMO_PARAMS", "other.yaml")
    run(flow.STAGES["shards"], load_params("other.yaml", [f"seed={seed + 1}"]), dataset="charts")
    with pytest.raises(ArtifactError, match=f"params seed: made with {seed + 1}, now {seed}"):
        dvc_commit.commit([item(repository, "shards", "charts")])


def test_a_damaged_artefact_is_refused(repository: Project) -> None:
    repository.produce("shards")
    chosen = item(repository, "shards", "charts")
    (chosen.path / "content.txt").unlink()
    with pytest.raises(ArtifactError, match=r"content\.txt"):
        dvc_commit.commit([chosen])


def test_readers_of_a_folder_are_recorded_anew_when_another_part_of_it_changed(repository: Project) -> None:
    """mixture@pretrain reads artifacts/shards; a data set that it does not use must not make it look changed."""

    def without_charts(raw: dict[str, Any]) -> None:
        raw["runs"]["pretrain"]["mixture"].pop("charts")
        raw["tasks"] = {name: task for name, task in raw["tasks"].items() if task["dataset"] != "charts"}

    repository.edit(without_charts)
    repository.produce("models")
    repository.produce("shards", dataset="digit_scenes")
    repository.produce("mixture", run="pretrain")
    dvc_commit.commit([item(repository, "shards", "digit_scenes")])
    dvc_commit.commit([item(repository, "mixture", "pretrain")])
    repository.produce("shards", dataset="charts")
    said = dvc_commit.commit([item(repository, "shards", "charts")])
    assert "shards@charts" in said and "mixture@pretrain" in said
    assert "mixture@pretrain" not in status()


def test_a_stage_that_dvc_does_not_know_is_left_alone(repository: Project) -> None:
    repository.produce("models")
    said = dvc_commit.commit([item(repository, "models", "base")])
    assert said == "not recorded in DVC: dvc.yaml has no stage for models[base]"


def test_without_a_repository_nothing_is_recorded(project: Project) -> None:
    project.produce("shards")
    assert "there is no .dvc" in dvc_commit.commit([item(project, "shards", "charts")])


def test_an_unknown_stage_lists_the_right_ones(repository: Project) -> None:
    with pytest.raises(ConfigError, match="did you mean 'shards@charts'"):
        dvc_commit.commit_all(repository.params, ["shards@chart"])


def test_a_missing_dependency_is_named(repository: Project) -> None:
    repository.produce("models", "shards", "mixture")
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("[artifacts/shards]", "[artifacts/shards, gone]"))
    with pytest.raises(ArtifactError, match=r"DVC cannot record it: .*gone"):
        dvc_commit.commit([item(repository, "mixture", "sft")])


def test_names_are_those_of_foreach_and_matrix(project: Project) -> None:
    names = [item.dvc_name for item in flow.all_artefacts(project.params)]
    last = project.saved("sft")[-1]
    assert {"assemble@base", "shards@charts", "train@sft", f"scorecard@{last}", "report"} <= set(names)
    assert f"predict@{last}-scene_qa" in names and f"score@{last}-charts_qa" in names
