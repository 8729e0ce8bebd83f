"""Adapters: PEFT's own computation on a plain model, merged checkpoints, exact resume, two ranks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from molmo_model.config import LoraConfig, load_params
from molmo_model.errors import ConfigError
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.source_digest import ROOT
from molmo_model.train import lora
from molmo_model.train.metrics_log import read_metrics
from molmo_model.train.preflight import Machine, estimate

START = Path("artifacts/checkpoints/tiny/step-000000")
LORA = "runs.go.train.lora={rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}"
UNCLIPPED = [f"runs.go.train.optim.{name}.max_grad_norm=1e9" for name in ("vision", "connector", "language")]
SHORT = ("runs.go.train.steps=4", "runs.go.train.save_every=2")


def full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread(trainer: Any) -> None:
    """Adapters that do something: B is zero at first."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".lora_B." in name:
                parameter.to_local().copy_(torch.linspace(-0.2, 0.2, parameter.numel()).reshape(parameter.shape))


def test_only_adapters_and_connector_are_trained(make_trainer: Any) -> None:
    trainer = make_trainer(LORA, *SHORT)
    before = {name: full(p).clone() for name, p in trainer.model.named_parameters()}
    assert sum(lora.is_adapter(name) for name in before) == 2 * 3 * 2  # layers, targets, A and B
    trainer.fit(0)
    for name, parameter in trainer.model.named_parameters():
        moved = lora.is_adapter(name) or ".connector." in name or "extra_embedding" in name
        assert torch.equal(full(parameter), before[name]) is not moved, name
    assert set(read_metrics(Path("a/work/metrics.jsonl"))[0]["grad_norm"]) == {"connector", "language"}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_step_is_that_of_peft_on_a_plain_model(make_trainer: Any, checkpointing: str) -> None:
    trainer = make_trainer(LORA, *UNCLIPPED, f"runs.go.train.activation_checkpointing={checkpointing}")
    spread(trainer)
    batches = trainer.batches.step(1)
    seen: dict[str, torch.Tensor] = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: full(p.grad) for n, p in trainer.model.named_parameters() if p.requires_grad})
    )
    adapters = {n: full(p).detach().clone() for n, p in trainer.model.named_parameters() if lora.is_adapter(n)}
    trainer._optimize(1, batches, trainer._count(batches))

    (whole,) = make_trainer("runs.go.train.packs_per_microbatch=3", name="b").batches.step(1)
    config = lora._peft_config(trainer.train.lora, whole=("connector", "extra_embedding"))
    plain = get_peft_model(MolmoForConditionalGeneration.from_pretrained(START), config).train()
    found = dict(plain.named_parameters())
    with torch.no_grad():
        for name, tensor in adapters.items():
            found[f"base_model.model.{name}"].copy_(tensor)
    output = plain(**whole, use_cache=False)
    (output.loss_sum / output.weight_sum).backward()
    compared = 0
    for name, parameter in found.items():
        if parameter.grad is None:
            continue
        ours = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        torch.testing.assert_close(seen[ours], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        compared += 1
    assert compared == len(seen) > 12


def test_checkpoints_are_merged_and_training_is_not(make_trainer: Any) -> None:
    trainer = make_trainer(LORA, *SHORT)
    spread(trainer)
    trainer.fit(0)
    folder = Path("a/out/step-000004")
    merged = MolmoForConditionalGeneration.from_pretrained(folder).eval()
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, START.name)
    on_base = PeftModel.from_pretrained(MolmoForConditionalGeneration.from_pretrained(START), folder / "adapter").eval()
    batch = trainer.batches.step(1)[0]
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "loss_weights")}
    with torch.no_grad():
        unmerged = trainer.model.eval()(**inputs).logits
        found, peft, base = (m(**inputs).logits for m in (merged, on_base, on_base.get_base_model()))
    # measured: 3.5e-6 merged to unmerged and 0 to PEFT on the base, of logits up to 4.5
    torch.testing.assert_close(found, unmerged, atol=2e-5, rtol=0)
    torch.testing.assert_close(peft, unmerged, atol=2e-5, rtol=0)
    with torch.no_grad(), on_base.disable_adapter():
        assert (on_base(**inputs).logits - unmerged).abs().max() > 0.05
    assert torch.equal(base, peft)
    start, weights = load_file(START / "model.safetensors"), load_file(folder / "model.safetensors")
    assert start.keys() == weights.keys()
    changed = {name for name in start if not torch.equal(start[name], weights[name])}
    assert {name for name in changed if "language_model" in name} == {
        f"model.language_model.layers.{i}.{part}.weight"
        for i in range(2)
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    for name, tensor in load_file(START / "model.safetensors").items():  # below the adapters nothing was merged in
        inside = dict(trainer.model.named_parameters()).get(name.replace("q_proj.w", "q_proj.base_layer.w"))
        if inside is not None and "q_proj" in name and "language_model" in name:
            assert torch.equal(full(inside), tensor)


@pytest.mark.slow
def test_a_run_goes_on_bitwise_from_a_merged_checkpoint(make_trainer: Any) -> None:
    whole = make_trainer(LORA, *SHORT)
    whole.fit(0)
    whole.logs.metrics.close()
    shutil.copytree("a/work", "b/work")
    part = make_trainer(LORA, *SHORT, name="b", resume=Path("a/out/step-000002"))
    part.fit(2)
    last = Path("a/out/step-000004")
    files = [path for path in sorted(last.rglob("*")) if path.is_file()]
    assert any(path.parent.name == "adapter" for path in files)
    for path in files:
        assert path.read_bytes() == (Path("b") / path.relative_to("a")).read_bytes(), path


def test_preflight_counts_what_is_trained(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(LORA)
    machine = Machine(cores=2, memory=10**12, gpus=0, gpu_memory=0, disk=10**12)
    need = estimate(trainer.train, START, done=0, saved=0, timings=tmp_path / "none", machine=machine)
    assert need.trained == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(trainer.parameters.values()) == need.total  # as in the merged checkpoint


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("runs.go.train.optim.language.freeze=true", "leave it out with train.lora"),
        ("runs.go.train.optim.connector.freeze=true", "lora.train_connector trains it; set train_connector: false"),
        ("runs.go.train.lora.rank=0", "lora.rank is 0"),
    ],
)
def test_contradictions_are_refused(workspace: Path, override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_params("params.yaml", (LORA, override))


def test_an_unknown_target_is_named(workspace: Path) -> None:
    model = MolmoForConditionalGeneration.from_pretrained(START)
    with pytest.raises(ConfigError, match=r"unknown linear layer.*'qproj'; did you mean 'q_proj'"):
        lora.inject(model, LoraConfig(targets=["qproj"]))


RANK = """
import sys
from pathlib import Path
from molmo_model.train import distributed, parallelize, worker
from molmo_model.train.job import Job
parallelize.SMALL_BLOCK = parallelize.LARGE_MODEL = 0
job = Job.read(Path("a/work/job.json"))
params = job.load_params()
distributed.set_determinism(params.runs["go"].train)
class Never:
    wanted = False
with distributed.process_group(Path(sys.argv[1])) as ranks:
    worker.build_trainer(job, params, ranks, Never())[0].fit(0)
"""


@pytest.mark.slow
def test_two_ranks_train_and_save_the_same(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer(LORA, *SHORT, name="b").fit(0)
    make_trainer(LORA, *SHORT).logs.metrics.close()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "meeting of two")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    one, two = read_metrics(Path("b/work/metrics.jsonl")), read_metrics(Path("a/work/metrics.jsonl"))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-4)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-5)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        left, right = (load_file(Path(side) / "out/step-000002" / name) for side in "ab")
        assert left.keys() == right.keys()
        for key, tensor in left.items():
            torch.testing.assert_close(tensor, right[key], atol=1e-3, rtol=0)
