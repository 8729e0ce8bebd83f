"""`python -m pipelines.train` with two ranks: killed, stopped and failing, against a run that nobody disturbed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from molmo_model.artifacts import verify
from molmo_model.train.metrics_log import read_metrics

pytestmark = pytest.mark.slow
TARGET = Path("artifacts/checkpoints/go")
Start = Callable[..., "subprocess.Popen[str]"]
Training = Callable[[Path], contextlib.AbstractContextManager["subprocess.Popen[str]"]]


@pytest.fixture(scope="module")
def unbroken(prepared: Path, tmp_path_factory: pytest.TempPathFactory, start_training: Start) -> Path:
    """The workspace after an undisturbed run; the run's output is beside it."""
    folder = tmp_path_factory.mktemp("unbroken") / "w"
    shutil.copytree(prepared, folder)
    process = start_training(folder)
    output, _ = process.communicate(timeout=300)
    (folder.parent / "output.txt").write_text(output)
    assert process.returncode == 0, output
    return folder


def work_folder(workspace: Path) -> Path:
    (folder,) = (workspace / ".state" / "train").glob("*/work")
    return folder


def events(workspace: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(ValueError, OSError):
        lines = (work_folder(workspace) / "events.jsonl").read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]
    return []


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str]", seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def step_reached(workspace: Path, step: int) -> bool:
    return any(event["kind"] == "progress" and event["step"] >= step for event in events(workspace))


def processes_of(folder: Path) -> list[psutil.Process]:
    """Everything that works in a folder: agents, ranks and their children."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder.resolve():
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def wait_until_gone(folder: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := processes_of(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.fixture
def training(start_training: Start) -> Training:
    """A training in a folder; whatever is left of it is killed at the end."""

    @contextlib.contextmanager
    def start(folder: Path) -> Iterator["subprocess.Popen[str]"]:
        process = start_training(folder)
        try:
            yield process
        finally:
            for left in processes_of(folder):
                left.kill()
            process.wait()

    return start


def assert_same_artefact(found: Path, expected: Path) -> None:
    assert verify(found).digest == verify(expected).digest
    for path in sorted(expected.rglob("*")):
        if path.is_file():
            assert (found / path.relative_to(expected)).read_bytes() == path.read_bytes(), path


def test_an_undisturbed_run(unbroken: Path) -> None:
    output = (unbroken.parent / "output.txt").read_text()
    assert "preflight of run go: 2 ranks of 1 threads" in output and "step 24/24" in output
    manifest = verify(unbroken / TARGET, "molmo/checkpoints")
    assert manifest.summary["checkpoints"] == [10, 20, 24]
    for step in (10, 20, 24):
        assert verify(unbroken / TARGET / f"step-{step:06d}", "molmo/checkpoint").summary["step"] == step
    metrics = read_metrics(unbroken / TARGET / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 25))
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    header, *rows = (unbroken / TARGET / "loss.csv").read_text().splitlines()
    assert header.startswith("step,loss,learning_rate.vision") and len(rows) == 24
    times = [json.loads(line) for line in (unbroken / "logs/train/go.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "step" for line in times) == 24


def test_running_again_does_nothing(unbroken: Path, start_training: Start) -> None:
    before = {path: path.stat().st_mtime_ns for path in (unbroken / TARGET).rglob("*")}
    process = start_training(unbroken)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "preflight" not in output
    assert before == {path: path.stat().st_mtime_ns for path in (unbroken / TARGET).rglob("*")}


def test_a_killed_and_then_stopped_run_goes_on_bitwise(unbroken: Path, workspace: Path, training: Training) -> None:
    with training(workspace) as process:
        wait_for(lambda: step_reached(workspace, 12), process)
        process.kill()  # nobody is left to look after the ranks
        wait_until_gone(workspace, 60)
    done = [event["step"] for event in events(workspace) if event["kind"] == "progress"]
    assert 12 <= done[-1] < 24
    assert not (workspace / TARGET / "manifest.json").exists()
    assert verify(workspace / TARGET / "step-000010").summary["step"] == 10  # visible while the run goes on
    shutil.rmtree(work_folder(workspace) / "stopped", ignore_errors=True)  # so that it has to go back to step 10 or 20
    before = len(events(workspace))
    with training(workspace) as process:
        wait_for(lambda: any(event["kind"] == "progress" for event in events(workspace)[before:]), process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert not processes_of(workspace)
    assert process.returncode == 75 and "going on after step" in output, output
    (stopped,) = (event["step"] for event in events(workspace)[before:] if event["kind"] == "stopped")
    assert stopped not in (10, 20) and f"go on after step {stopped}" in output
    assert verify(work_folder(workspace) / "stopped" / f"step-{stopped:06d}").summary["step"] == stopped
    assert f"step-{stopped:06d}" not in {path.name for path in (workspace / TARGET).iterdir()}
    with training(workspace) as process:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    assert f"going on after step {stopped}" in output
    assert_same_artefact(workspace / TARGET, unbroken / TARGET)
    assert not (work_folder(workspace) / "stopped").exists()


def test_a_dead_rank_ends_all_and_a_corrupt_checkpoint_is_passed_over(
    unbroken: Path, workspace: Path, training: Training
) -> None:
    with training(workspace) as process:
        wait_for(lambda: step_reached(workspace, 21), process)
        ranks = [p for p in processes_of(workspace) if "molmo_model.train.worker" in " ".join(p.cmdline())]
        victim = next(p for p in ranks if p.environ().get("LOCAL_RANK") == "1")
        victim.kill()
        output, _ = process.communicate(timeout=60)
        wait_until_gone(workspace, 10)
    assert process.returncode == 2 and "TrainingError" in output
    weights = next((workspace / ".state/train").glob("*/out/step-000020/model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()  # the published checkpoint shares its bytes
    weights.write_bytes(data)
    with training(workspace) as process:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    assert "step-000020/model.safetensors has SHA-256" in output and "going on after step 10" in output
    assert_same_artefact(workspace / TARGET, unbroken / TARGET)


def test_the_error_of_a_rank_reaches_the_person(workspace: Path, training: Training) -> None:
    (shard,) = (workspace / "artifacts/shards/digit_scenes").glob("shards-train-*.tar")
    data = shard.read_bytes()
    shard.write_bytes(bytes(len(data)))
    with training(workspace) as process:
        output, _ = process.communicate(timeout=120)
        wait_until_gone(workspace, 10)
    assert process.returncode == 2
    assert "DataError: " in output and "shards-train" in output and "SHA-256" in output


def test_one_rank_computes_what_two_compute(unbroken: Path, make_trainer: Any) -> None:
    """Same batches, and the same numbers up to the order of sums. Adam turns a gradient of nothing but rounding into a
    full step, so weights drift apart after a few steps while the loss does not."""
    make_trainer("runs.go.train.processes=1").fit(0)
    one, two = read_metrics(Path("a/work/metrics.jsonl")), read_metrics(unbroken / TARGET / "metrics.jsonl")
    for name in ("step", "tokens", "examples", "learning_rate"):
        assert [line[name] for line in one] == [line[name] for line in two]
    assert [line["weight"] for line in one] == pytest.approx([line["weight"] for line in two])
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-6)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-5)
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-3)
