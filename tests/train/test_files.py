"""Checkpoints as directories, metrics, and the preflight: what works without torch."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from molmo_model.artifacts import read_manifest, write_manifest
from molmo_model.config import ComponentOptim, LoraConfig, OptimConfig, TrainConfig, load_params
from molmo_model.errors import CheckpointError, DataError, PreflightError
from molmo_model.source_digest import ROOT, source_closure
from molmo_model.train import preflight
from molmo_model.train.history import SCHEMA, step_of, steps_in, surplus, valid_checkpoints, verified, wanted_steps
from molmo_model.train.metrics_log import MetricsLog, StepMetrics, read_metrics, write_loss_curve
from molmo_model.train.weights import read_shapes

TRAIN = TrainConfig(steps=10, packs_per_step=2, sequence_length=64, crops_per_pack=8, save_every=5)
MACHINE = preflight.Machine(cores=2, memory=8_000_000_000, gpus=0, gpu_memory=0, disk=10_000_000_000)
START = Path("artifacts/checkpoints/tiny/step-000000")


def checkpoint(folder: Path, step: int, state: bool = True) -> Path:
    path = folder / f"step-{step:06d}"
    (path / "train_state").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    if state:
        (path / "train_state" / "position.json").write_text("{}")
    write_manifest(path, schema=SCHEMA, version=1, params={}, inputs={}, code="c", summary={"step": step})
    return path


def test_valid_checkpoints_pass_over_what_is_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, stopped = tmp_path / "out", tmp_path / "stopped"
    for step in (10, 20, 30):
        checkpoint(out, step)
    (out / "step-000040").mkdir()  # no manifest: unfinished
    (out / "step-000030" / "model.safetensors").write_bytes(b"weighty")
    (out / "step-000020" / "train_state" / "position.json").unlink()
    (out / "metrics.jsonl").touch()
    checkpoint(stopped, 13)
    with caplog.at_level(logging.WARNING):
        valid = valid_checkpoints([out, stopped, tmp_path / "nowhere"])
    assert valid == [(10, out / "step-000010"), (13, stopped / "step-000013")]
    assert [step for step, _ in steps_in(out)] == [10]
    assert "step-000030/model.safetensors has SHA-256" in caplog.text
    assert "step-000020/train_state/position.json is missing" in caplog.text
    assert "step-000040/manifest.json does not exist" in caplog.text


def test_names_of_checkpoints() -> None:
    assert step_of(Path("x/step-000150")) == 150 and step_of(Path("step-1000000")) == 1_000_000
    assert [step_of(Path(name)) for name in ("step-150", "step-", "step-00015x", "old-step-000150", ".saving")] == [
        None
    ] * 5
    assert wanted_steps(["a/step-000004", "b/step-000006", "ab/step-000008"], "a") == {4}
    with pytest.raises(CheckpointError):
        verified(Path("nowhere"))


@pytest.mark.parametrize(
    ("keep", "wanted", "deleted"),
    [(None, {2}, []), (1, set(), [2, 4, 6]), (1, {4}, [2, 6]), (2, {2, 4}, []), (0, set(), [2, 4, 6]), (9, set(), [])],
)
def test_retention_never_deletes_the_newest_or_the_evaluated(
    keep: int | None, wanted: set[int], deleted: list[int]
) -> None:
    assert surplus([8, 2, 4, 6], replace(TRAIN, keep_checkpoints=keep), wanted) == deleted


def step_metrics(step: int, loss: float = 1.5) -> StepMetrics:
    return StepMetrics(step, loss, 3.0, 7, 2, {"vision": 0.1, "language": 0.2}, {"vision": 1.0, "language": 2.0})


def test_metrics_go_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "work" / "metrics.jsonl"
    path.parent.mkdir()
    log = MetricsLog(path, 0)
    for step in range(1, 6):
        log.append(step_metrics(step))
    log.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while writing
    log = MetricsLog(path, 3)
    log.append(step_metrics(4, 0.1 + 0.2))
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    assert read_metrics(path)[-1]["loss"] == 0.1 + 0.2  # to the last bit
    with pytest.raises(DataError, match="lacks steps before 9"):
        MetricsLog(path, 9)
    write_loss_curve(read_metrics(path), tmp_path / "loss.csv")
    rows = (tmp_path / "loss.csv").read_text().splitlines()
    assert rows[0] == "step,loss,learning_rate.vision,learning_rate.language,grad_norm.vision,grad_norm.language"
    assert rows[1] == "1,1.5,0.1,0.2,1.0,2.0" and len(rows) == 5


def estimate(
    train: TrainConfig,
    timings: Path = Path("none"),
    machine: preflight.Machine = MACHINE,
    longest_example: int | None = None,
) -> preflight.Need:
    return preflight.estimate(
        train, START, done=0, saved=0, timings=timings, machine=machine, longest_example=longest_example
    )


def test_preflight_counts_what_is_there(workspace: Path) -> None:
    from safetensors.numpy import load_file

    count = sum(array.size for array in load_file(START / "model.safetensors").values())
    need = estimate(TRAIN)
    assert need.total == need.trained == count and set(need.parameters) == {"vision", "connector", "language"}
    assert need.checkpoint_bytes == 12 * count and need.disk == 2 * 2 * 12 * count
    assert need.tokens == 10 * 2 * 64
    frozen = replace(TRAIN, optim=OptimConfig(vision=ComponentOptim(freeze=True)))
    assert estimate(frozen).trained == count - need.parameters["vision"]
    assert estimate(frozen).checkpoint_bytes == 4 * count + 8 * estimate(frozen).trained
    text = "\n".join(preflight.lines("go", TRAIN, need, MACHINE))
    assert f"parameters: {count:,}" in text and "steps: 10 of 10" in text and "10 GB free" in text
    preflight.check(TRAIN, need, MACHINE)


def test_preflight_refuses_what_cannot_fit(workspace: Path) -> None:
    small = replace(MACHINE, memory=500_000_000)
    with pytest.raises(PreflightError, match=r"each of 2 ranks needs about \d+ MB .* 250 MB can be had; lower"):
        preflight.check(TRAIN, estimate(TRAIN), small)
    with pytest.raises(PreflightError, match=r"1 MB are free; raise train.save_every"):
        preflight.check(TRAIN, estimate(TRAIN), replace(MACHINE, disk=1_000_000))
    long = replace(TRAIN, sequence_length=4096)
    with pytest.raises(PreflightError, match=r"sequence_length is 4096 and an example may .*language model has 1024"):
        preflight.check(long, estimate(long), MACHINE)
    gpus = replace(MACHINE, gpus=1, gpu_memory=80_000_000_000)
    with pytest.raises(PreflightError, match="processes is 2, this machine has 1 GPUs"):
        preflight.check(TRAIN, estimate(TRAIN), gpus)


def test_packs_may_be_longer_than_the_positions_but_no_example(workspace: Path) -> None:
    """Positions begin anew with every example of a pack."""
    train = load_params().runs["go"].train
    long = replace(train, sequence_length=4096)
    preflight.check(long, estimate(long, longest_example=1024), MACHINE)
    with pytest.raises(PreflightError, match="an example may take 1025 of it, the language model has 1024"):
        preflight.check(long, estimate(long, longest_example=1025), MACHINE)
    summary = read_manifest(Path("artifacts/mixture/go")).summary
    assert 0 < summary["longest_example"] <= train.sequence_length
    config = json.loads((START / "config.json").read_text())
    (START / "config.json").write_text(json.dumps({**config, "selector": {"tokens": 4}}))
    with pytest.raises(PreflightError, match="may take 4096 of it"):  # its positions are more than its tokens
        preflight.check(long, estimate(long, longest_example=1024), MACHINE)


def test_logits_on_a_gpu_are_those_of_one_chunk(workspace: Path) -> None:
    from molmo_model.model_config import GPU_CHUNK

    gpus = replace(MACHINE, gpus=2, gpu_memory=80_000_000_000)
    vocabulary = json.loads((START / "config.json").read_text())["text_config"]["vocab_size"]
    for length, chunk in ((64, 64), (4 * GPU_CHUNK, GPU_CHUNK)):
        train = replace(TRAIN, sequence_length=length)
        on_gpu, on_cpu = (estimate(train, machine=machine).activations_per_rank for machine in (gpus, MACHINE))
        assert on_gpu - on_cpu == (chunk - length // 2) * vocabulary * 12


def test_warm_ups_of_what_adapters_freeze_are_not_noted() -> None:
    def noted(train: TrainConfig) -> list[str]:
        need = preflight.Need({}, 0, 0, 0, 0, 10, 0, 0, 0, None, "", None, 64)
        found = preflight.lines("go", train, need, MACHINE)
        return [line.split()[1] for line in found if "warms up" in line]

    assert noted(TRAIN) == ["vision", "connector", "language"]
    assert noted(replace(TRAIN, lora=LoraConfig())) == ["connector", "language"]
    assert noted(replace(TRAIN, lora=LoraConfig(train_connector=False))) == ["language"]
    frozen = replace(TRAIN, optim=OptimConfig(vision=ComponentOptim(freeze=True)))
    assert noted(frozen) == ["connector", "language"]


def test_what_changes_the_time_of_a_step_changes_its_key() -> None:
    frozen = [
        OptimConfig(vision=ComponentOptim(freeze=True, unfreeze_step=step), connector=connector)
        for step in (None, 5)
        for connector in (ComponentOptim(), ComponentOptim(freeze=True))
    ]
    adapters = [LoraConfig(), LoraConfig(train_connector=False)]
    changed = [
        TRAIN,
        replace(TRAIN, compile=True),
        *(replace(TRAIN, optim=optim) for optim in frozen),
        *(replace(TRAIN, lora=lora) for lora in adapters),
    ]
    assert len({preflight.pace_key(train, 100) for train in changed}) == len(changed)
    faster = replace(TRAIN, optim=OptimConfig(vision=ComponentOptim(learning_rate=1.0)))
    assert preflight.pace_key(faster, 100) == preflight.pace_key(TRAIN, 100)


def test_the_expected_time_is_that_of_the_last_equal_run(workspace: Path, tmp_path: Path) -> None:
    timings = tmp_path / "go.jsonl"
    total = estimate(TRAIN).total
    other = replace(TRAIN, packs_per_step=9)

    def run(train: TrainConfig, *seconds: float) -> list[str]:
        steps = [{"kind": "step", "seconds": value} for value in seconds]
        return [json.dumps(line) for line in ({"kind": "start", "pace": preflight.pace_key(train, total)}, *steps)]

    timings.write_text("\n".join([*run(TRAIN, 9, 9), *run(TRAIN, 5, 0.5, 0.5), *run(other, 7, 7), '{"kind": "st']))
    need = estimate(TRAIN, timings)
    assert need.seconds == pytest.approx(5.0) and "0.50 s per step" in need.seconds_from
    unknown = estimate(replace(TRAIN, threads=2), timings)
    assert unknown.seconds is not None and "a guess" in unknown.seconds_from


def test_shapes_come_from_the_headers(workspace: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    arrays = load_file(START / "model.safetensors")
    assert read_shapes(START) == {name: array.shape for name, array in arrays.items()}
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        read_shapes(tmp_path)


def test_sizes_and_durations_for_people() -> None:
    assert [preflight.size(n) for n in (12, 1_500_000, 2.5e15)] == ["12 B", "1.5 MB", "2.5e+03 TB"]
    assert [preflight.duration(n) for n in (4, 200, 7300)] == ["4 s", "3 min 20 s", "2 h 1 min"]


def test_the_workers_sources_are_part_of_the_stage() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in source_closure("pipelines.train")}
    assert {f"molmo_model/{name}.py" for name in ("train/worker", "train/trainer", "nn/molmo", "data/loader")} <= names
    assert not {name for name in names if name.startswith("molmo_model/eval")}


def test_the_supervising_process_needs_no_torch(prepared: Path) -> None:
    program = """
import sys
from molmo_model.config import load_params
from molmo_model.train import history, job, metrics_log, preflight, supervisor
from pipelines import stage, train
params = load_params()
stage.stamp(train.STAGE, params, {"run": "go"})
preflight.survey(train.Path("."))
assert not {"torch", "transformers", "pyarrow", "dagster"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=prepared, env={"PYTHONPATH": str(ROOT)})


def test_a_run_starts_from_a_model_or_from_the_last_step_of_a_run() -> None:
    from pipelines.train import STAGE

    params = load_params(ROOT / "params.yaml")
    pretrain, sft = (STAGE.inputs(params, {"run": run}) for run in ("pretrain", "sft"))
    assert pretrain["init"] == "artifacts/checkpoints/base/step-000000"
    assert sft["init"] == f"artifacts/checkpoints/pretrain/step-{params.runs['pretrain'].train.steps:06d}"
    assert STAGE.more_params(params, {"run": "sft"}) == ("models.base",)
    params.runs["sft"].train.keep_checkpoints = 1
    assert STAGE.more_params(params, {"run": "sft"}) == ("models.base", "eval.checkpoints")


def test_an_orchestrator_hears_of_progress_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dagster_pipes

    from pipelines.train import _orchestrator

    context, messages = tmp_path / "context.json", tmp_path / "messages.jsonl"
    context.write_text(
        json.dumps({"extras": {}, "asset_keys": None, "run_id": "r", "job_name": "j", "retry_number": 0})
    )
    messages.touch()
    for name, path in (("CONTEXT", context), ("MESSAGES", messages)):
        monkeypatch.setenv(f"DAGSTER_PIPES_{name}", dagster_pipes.encode_param({"path": str(path)}))
    sent = [
        {"kind": "progress", "step": 1, "total": 4, "loss": 2.0},
        {"kind": "stopped", "step": 1},
        {"kind": "checkpoint", "run": "go", "step": 2, "path": "artifacts/checkpoints/go/step-000002", "digest": "d"},
    ]
    with _orchestrator() as report:
        for event in sent:
            report(event)
    lines = [json.loads(line) for line in messages.read_text().splitlines()]
    heard = [line["params"]["payload"] for line in lines if line["method"] == "report_custom_message"]
    assert heard == [sent[0], sent[2]]
