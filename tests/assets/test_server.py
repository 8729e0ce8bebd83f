"""The real servers on the real definitions: they answer on loopback, launch, cancel, and stop.

A small training runs for real, in a workspace of its own.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from molmo_model.artifacts import read_manifest
from tests.assets.project import ROOT

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
SERVER_SECONDS = 180
CANCEL_SECONDS = 10


def small_params() -> dict[str, Any]:
    """The shipped params with little of everything, and a run that lasts until it is cancelled."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for dataset in raw["datasets"].values():
        dataset.update(train_examples=60, eval_examples=4)
    model = raw["models"]["base"]
    model["tokenizer"] = str(ROOT / model["tokenizer"])
    raw["runs"] = {"pretrain": raw["runs"]["pretrain"]}
    raw["runs"]["pretrain"]["train"].update(steps=2000, save_every=10, packs_per_step=2, packs_per_microbatch=1)
    raw["eval"]["checkpoints"] = ["pretrain/step-000010"]
    raw["tasks"] = {"scene_qa": raw["tasks"]["scene_qa"]}
    return dict(raw)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "params.yaml").write_text(yaml.safe_dump(small_params(), sort_keys=False), encoding="utf-8")
    for name in ("workspace.yaml", "dagster.yaml"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / ".dagster").mkdir()
    shutil.copyfile(ROOT / "dagster.yaml", folder / ".dagster" / "dagster.yaml")
    return folder


def environment(workspace: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOLMO_", "DAGSTER_"))}
    home = {"DAGSTER_HOME": str(workspace / ".dagster"), "PYTHONPATH": str(ROOT)}
    return {**kept, **home, "PATH": f"{BIN}:{os.environ['PATH']}"}


def _default_signals() -> None:
    """A server started by a shell in the background inherits ignored signals, and could then only be killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def serving(command: list[str], cwd: Path, env: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """A server on a free port of loopback; gives a function that asks its GraphQL. Stopped by SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with (Path(env["DAGSTER_HOME"]) / "server.log").open("w") as log:
        server = subprocess.Popen(
            arguments,
            cwd=cwd,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_default_signals,  # noqa: PLW1509 - needs no lock
        )

    def ask(query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            document = json.load(answer)
        assert "errors" not in document, document
        return document["data"]

    try:
        assert _until(lambda: _answers(ask) or server.poll() is not None, SERVER_SECONDS)
        assert server.poll() is None, Path(log.name).read_text()[-3000:]
        yield ask
        server.terminate()
        assert server.wait(60) is not None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(ask: Callable[..., Any]) -> bool:
    with contextlib.suppress(OSError):
        loaded = ask("{repositoriesOrError{... on RepositoryConnection{nodes{location{name}}}}}")
        return [node["location"]["name"] for node in loaded["repositoriesOrError"].get("nodes", [])] == ["molmo"]
    return False


def _until(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def ask(workspace: Path) -> Iterator[Callable[..., Any]]:
    with serving([str(BIN / "dagster"), "dev", "-w", "workspace.yaml"], workspace, environment(workspace)) as ask:
        yield ask


SENSORS = """query($selector: RepositorySelector!) { sensorsOrError(repositorySelector: $selector) {
  ... on Sensors { results { name sensorState { status } } } } }"""
LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
FAILURES = """query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
  ... on ExecutionStepFailureEvent { error { message cause { message } } } } } } }"""
RUN = """query($id: ID!) { runOrError(runId: $id) { ... on Run { status
  assetMaterializations { assetKey { path } partition tags { key value } } } } }"""


def launch(ask: Callable[..., Any], job: str, partition: str) -> str:
    """What the UI's "Launch run" does; returns the run's id."""
    selector = {"repositoryLocationName": "molmo", "repositoryName": "__repository__", "jobName": job}
    tags = [{"key": "dagster/partition", "value": partition}]
    params = {"selector": selector, "runConfigData": {}, "mode": "default", "executionMetadata": {"tags": tags}}
    answer = ask(LAUNCH, params=params)["launchRun"]
    assert answer["__typename"] == "LaunchRunSuccess", answer
    return str(answer["run"]["runId"])


def run_of(ask: Callable[..., Any], run_id: str) -> dict[str, Any]:
    return dict(ask(RUN, id=run_id)["runOrError"])


def finished(ask: Callable[..., Any], run_id: str, seconds: float = 240) -> str:
    states = ("SUCCESS", "FAILURE", "CANCELED")
    _until(lambda: run_of(ask, run_id)["status"] in states, seconds)
    return str(run_of(ask, run_id)["status"])


def trainers(workspace: Path) -> list[int]:
    """Processes of a training of this workspace, by the kernel's word."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            arguments = (entry / "cmdline").read_bytes()
            here = (entry / "cwd").resolve() == workspace.resolve()
            if here and any(name in arguments for name in (b"pipelines.train", b"torch.distributed", b"train.worker")):
                found.append(int(entry.name))
    return found


def test_the_ui_shows_all_assets_and_sends_no_telemetry(ask: Callable[..., Any]) -> None:
    nodes = ask("{assetNodes{assetKey{path} groupName}}")["assetNodes"]
    assert len(nodes) == 10
    settings = yaml.safe_load(ask("{instance{info}}")["instance"]["info"])
    assert settings["telemetry"] == {"enabled": False}
    sensors = ask(SENSORS, selector={"repositoryLocationName": "molmo", "repositoryName": "__repository__"})
    running = {sensor["name"]: sensor["sensorState"]["status"] for sensor in sensors["sensorsOrError"]["results"]}
    assert running == {"dvc_outputs": "RUNNING", "follow_changes": "STOPPED"}


def test_a_run_launched_in_the_ui_gives_the_digests_of_the_command_line(
    ask: Callable[..., Any], workspace: Path, tmp_path: Path
) -> None:
    run_id = launch(ask, "prepare_data", "charts")
    assert finished(ask, run_id) == "SUCCESS"
    made = {node["assetKey"]["path"][0]: node for node in run_of(ask, run_id)["assetMaterializations"]}
    tags = {tag["key"]: tag["value"] for tag in made["shards"]["tags"]}
    digest = read_manifest(workspace / "artifacts/shards/charts").digest
    assert tags["dagster/data_version"] == digest
    shutil.copyfile(workspace / "params.yaml", tmp_path / "params.yaml")
    command = [sys.executable, "-m", "pipelines.shards", "dataset=charts"]
    subprocess.run(command, cwd=tmp_path, env=environment(workspace), check=True, capture_output=True)
    assert read_manifest(tmp_path / "artifacts/shards/charts").digest == digest


def test_cancelling_a_training_ends_every_process_and_keeps_its_checkpoint(
    ask: Callable[..., Any], workspace: Path
) -> None:
    for job, partition in (("prepare_model", "base"), ("prepare_data", "charts"), ("prepare_data", "digit_scenes")):
        assert finished(ask, launch(ask, job, partition)) == "SUCCESS"
    run_id = launch(ask, "train", "pretrain")

    def registered() -> bool:
        made = run_of(ask, run_id)
        assert made["status"] not in ("FAILURE", "SUCCESS"), ask(FAILURES, id=run_id)
        return any(node["assetKey"]["path"] == ["checkpoint"] for node in made["assetMaterializations"])

    assert _until(registered, 300)
    assert len(trainers(workspace)) >= 4  # the stage, torchrun, two ranks
    started = time.monotonic()
    ask(
        "mutation($id: String!) { terminateRun(runId: $id, terminatePolicy: SAFE_TERMINATE) { __typename } }", id=run_id
    )
    assert _until(lambda: not trainers(workspace), CANCEL_SECONDS), trainers(workspace)
    assert time.monotonic() - started < CANCEL_SECONDS
    assert finished(ask, run_id, 60) == "CANCELED"
    kept = sorted((workspace / "artifacts/checkpoints/pretrain").glob("step-*"))
    assert kept
    read_manifest(kept[-1], "molmo/checkpoint")


def test_dg_dev_serves_the_same_definitions(tmp_path: Path) -> None:
    """It reads [tool.dg] of pyproject.toml instead of workspace.yaml."""
    (tmp_path / ".dagster").mkdir()
    shutil.copyfile(ROOT / "dagster.yaml", tmp_path / ".dagster" / "dagster.yaml")
    with serving([str(BIN / "dg"), "dev"], ROOT, environment(tmp_path)) as ask:
        assert len(ask("{assetNodes{assetKey{path}}}")["assetNodes"]) == 10


def test_the_commands_of_the_readme_load_the_definitions(workspace: Path) -> None:
    environ = environment(workspace)
    for command in (
        ["dagster", "definitions", "validate", "-w", "workspace.yaml"],
        ["dagster", "job", "list", "-w", "workspace.yaml"],
        ["dagster", "asset", "list", "-m", "molmo_assets.definitions", "--select", "shards+"],
    ):
        done = subprocess.run(command, cwd=workspace, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "predictions" in done.stdout and "models" not in done.stdout
    select = [
        "dagster",
        "asset",
        "materialize",
        "-m",
        "molmo_assets.definitions",
        "--select",
        "shards",
        "--partition",
        "charts",
    ]
    done = subprocess.run(select, cwd=workspace, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
