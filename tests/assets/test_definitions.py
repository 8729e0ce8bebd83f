"""The graph as a person sees it: a snapshot of keys, dependencies, partitions, jobs, schedules and sensors."""

import ast
import subprocess
import sys

import dagster as dg
import pytest
import yaml

from tests.assets.project import ROOT, flow

# isort: split
from molmo_assets.definitions import defs
from molmo_assets.partitions import PARAMS, reads

RAW = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
DATASETS, RUNS, TASKS = list(RAW["datasets"]), ["pretrain", "sft"], list(RAW["tasks"])


def saved(run: str) -> list[str]:
    """A run's checkpoints, as params.yaml says it."""
    train = RAW["runs"][run]["train"]
    steps = [step for step in range(1, train["steps"] + 1) if step % train["save_every"] == 0 or step == train["steps"]]
    return [f"{run}/step-{step:06d}" for step in steps]


CHECKPOINTS = saved("pretrain") + saved("sft")
CELLS = [f"{checkpoint}|{task}" for checkpoint in CHECKPOINTS for task in TASKS]

GRAPH = {
    "models": ([], ["base"]),
    "shards": ([], DATASETS),
    "validation": (["shards"], DATASETS),
    "mixture": (["models", "shards"], RUNS),
    "training_run": (["mixture", "models", "shards"], RUNS),
    "checkpoint": (["models", "training_run"], CHECKPOINTS),
    "predictions": (["checkpoint", "shards"], CELLS),
    "metrics": (["predictions"], CELLS),
    "scorecard": (["metrics"], CHECKPOINTS),
    "report": (["predictions", "scorecard", "shards", "training_run"], None),
}
CHECKS = {
    "metrics:coverage",
    "metrics:gate",
    "metrics:schema",
    "mixture:schema",
    "predictions:coverage",
    "predictions:schema",
    "shards:coverage",
    "shards:schema",
    "training_run:finite_loss",
    "validation:files",
}


def test_graph() -> None:
    graph = defs.resolve_asset_graph()
    found = {}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        partitions = node.partitions_def.get_partition_keys() if node.partitions_def else None
        found[key.to_user_string()] = (sorted(parent.to_user_string() for parent in node.parent_keys), partitions)
    assert found == GRAPH


def test_every_asset_is_shown_to_people() -> None:
    graph = defs.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.group_name in {"data", "model", "evaluation"}
        assert node.description and node.kinds and node.code_version


def test_checks() -> None:
    graph = defs.resolve_asset_graph()
    checks = {f"{key.asset_key.to_user_string()}:{key.name}": graph.get(key) for key in graph.asset_check_keys}
    assert {name for name, node in checks.items() if node.blocking} == CHECKS
    assert set(checks) - CHECKS == {
        "metrics:gate_warning",
        "mixture:near_duplicates",
        "validation:expectations",
        "validation:near_duplicates",
    }


def test_jobs_schedules_sensors() -> None:
    repository = defs.get_repository_def()
    jobs = {name for name in repository.job_names if not name.startswith("__")}
    assert jobs == {
        "prepare_model",
        "prepare_data",
        "train",
        "register_checkpoint",
        "evaluate",
        "gather_scores",
        "make_report",
        "everything",
        "sync_from_dvc",
        "download",
    }
    assert {schedule.name: schedule.cron_schedule for schedule in repository.schedule_defs} == {
        "nightly_evaluation": "0 2 * * *",
        "morning_scorecards": "0 5 * * *",
        "morning_report": "0 6 * * *",
    }
    sensors = {sensor.name: sensor.default_status for sensor in repository.sensor_defs}
    assert sensors == {
        "dvc_outputs": dg.DefaultSensorStatus.RUNNING,
        "follow_changes": dg.DefaultSensorStatus.STOPPED,
    }


@pytest.mark.parametrize("downstream", flow.UPSTREAM)
def test_dependencies_are_the_inputs_of_the_stages(downstream: str) -> None:
    """Every declared input that lies under artifacts/ is an artefact of a declared upstream asset, and every declared
    upstream asset is read by some partition. A run's start from another run is the one input that no asset graph can
    say, because an asset cannot depend on itself."""
    read, unknown = set(), []
    owners = {item.path: item.asset for item in flow.all_artefacts(PARAMS) if item.asset != downstream}
    for partition in flow.partition_keys(downstream, PARAMS):
        for path in flow.input_paths(flow.artefact(downstream, partition, PARAMS), PARAMS):
            above = {asset for folder, asset in owners.items() if path.is_relative_to(folder)}
            if found := above & set(flow.UPSTREAM[downstream]):
                read |= found
            elif path.parts[0] == "artifacts":
                unknown.append((partition, path.as_posix()))
    unread = {"checkpoint": {"models"}}  # only where eval.checkpoints names an untrained model
    assert set(flow.UPSTREAM[downstream]) - read == unread.get(downstream, set())
    starts = [("sft", f"artifacts/checkpoints/{saved('pretrain')[-1]}")]
    assert unknown == (starts if downstream == "training_run" else [])


def test_partition_mappings() -> None:
    mappings = {dep.asset_key.to_user_string(): dep.partition_mapping for dep in reads("training_run")}
    assert mappings["mixture"] is None
    assert mappings["models"] == dg.StaticPartitionMapping({"base": ["pretrain"]})
    mappings = {dep.asset_key.to_user_string(): dep.partition_mapping for dep in reads("checkpoint")}
    assert mappings["training_run"] == dg.StaticPartitionMapping({"pretrain": saved("pretrain"), "sft": saved("sft")})


def test_no_string_selections_and_no_postponed_annotations() -> None:
    """Dagster's parser of selection strings breaks beside some versions of ANTLR; postponed annotations hide the type
    of `context` from its decorators."""
    for path in sorted((ROOT / "molmo_assets").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                raise AssertionError(f"{path}: from __future__ import")
            if isinstance(node, ast.Attribute) and node.attr == "from_string":
                raise AssertionError(f"{path}:{node.lineno}: AssetSelection.from_string")
            if isinstance(node, ast.keyword) and node.arg in ("selection", "target"):
                assert not isinstance(node.value, ast.Constant | ast.List), f"{path}:{node.value.lineno}"


def test_definitions_import_nothing_heavy() -> None:
    heavy = "torch transformers pandera great_expectations pandas dvc PIL matplotlib"
    code = f"import sys, molmo_assets.definitions; print([m for m in {heavy.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_stage_has_an_asset() -> None:
    """A new stage of `pipelines/` must be in the table (`generate` and helpers are no stages)."""
    stages = {
        path.stem
        for path in (ROOT / "pipelines").glob("*.py")
        if any(line.startswith("STAGE = Stage(") for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert {stage.name for stage in flow.STAGES.values()} == stages
