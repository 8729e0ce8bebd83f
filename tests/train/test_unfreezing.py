"""Freezing until a step: what is computed before, from where the schedule counts, and that going on changes no bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from molmo_model.config import ComponentOptim, OptimConfig, load_params
from molmo_model.errors import ConfigError
from molmo_model.nn.build import component_of
from molmo_model.source_digest import ROOT
from molmo_model.train.metrics_log import read_metrics
from molmo_model.train.optim import (
    build_optimizer,
    clip_gradients,
    freeze,
    learning_rate,
    optimizer_tensors,
    set_learning_rates,
    set_optimizer_step,
    thaw,
)
from tests.train.test_optim import Toy
from tests.train.test_optim import component_of as toy_component_of

TRAIN = "runs.go.train"


def scheduled(step: int | None = 3) -> OptimConfig:
    return OptimConfig(
        vision=ComponentOptim(1e-3, warmup_steps=2, freeze=True, unfreeze_step=step),
        connector=ComponentOptim(1e-2, warmup_steps=2),
        language=ComponentOptim(1e-4, warmup_steps=2),
    )


def options(component: str, steps: int, at: int) -> list[str]:
    key = f"{TRAIN}.optim.{component}"
    return [f"{key}.freeze=true", f"{key}.unfreeze_step={at}", f"{TRAIN}.steps={steps}", f"{TRAIN}.save_every=1"]


# --- the optimizer


def test_the_schedule_is_that_of_a_run_that_begins_there() -> None:
    late = ComponentOptim(learning_rate=2.0, warmup_steps=4, freeze=True, unfreeze_step=11)
    plain = ComponentOptim(learning_rate=2.0, warmup_steps=4)
    rates = [learning_rate(step, late, 22, 0.1) for step in range(1, 23)]
    assert rates[:10] == [0.0] * 10
    assert rates[10:14] == [0.5, 1.0, 1.5, 2.0]
    assert rates[10:] == [learning_rate(step, plain, 12, 0.1) for step in range(1, 13)]
    assert rates[17] == pytest.approx((2.0 + 0.2) / 2) and rates[-1] == pytest.approx(0.2)
    first = ComponentOptim(learning_rate=2.0, warmup_steps=4, freeze=True, unfreeze_step=1)
    assert [learning_rate(step, first, 12, 0.1) for step in range(1, 13)] == rates[10:]


def one_step(model: Toy, optimizer: torch.optim.Optimizer, config: OptimConfig, step: int) -> dict[str, float]:
    """A step with gradients that depend on its number alone, where gradients are taken."""
    generator = torch.Generator().manual_seed(step)
    thaw(optimizer, step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient if parameter.requires_grad else None
    set_learning_rates(optimizer, config, step, 10)
    norms = clip_gradients(optimizer, config)
    optimizer.step()
    optimizer.zero_grad()
    return norms


def frozen_toy(config: OptimConfig) -> tuple[Toy, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Toy()
    freeze(model, config, toy_component_of)
    return model, build_optimizer(model, config, toy_component_of)


def test_moments_and_bias_correction_begin_with_the_unfreezing() -> None:
    config = scheduled(3)
    model, optimizer = frozen_toy(config)
    before = {name: p.detach().clone() for name, p in model.vision.named_parameters()}
    for step in (1, 2):
        assert set(one_step(model, optimizer, config, step)) == {"connector", "language"}
    assert not any(".vision." in name for name in optimizer_tensors(optimizer))
    assert all(torch.equal(p, before[name]) for name, p in model.vision.named_parameters())
    assert set(one_step(model, optimizer, config, 3)) == {"vision", "connector", "language"}
    steps = {group["component"]: float(optimizer.state[group["params"][0]]["step"]) for group in optimizer.param_groups}
    assert steps == {"vision": 1.0, "connector": 3.0, "language": 3.0}
    for name, parameter in model.vision.named_parameters():
        # the first step of Adam is the rate (half of the peak: warm-up) times the sign of the gradient
        change = (parameter - before[name]).abs()
        torch.testing.assert_close(change, torch.full_like(change, 0.5e-3), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_an_optimizer_that_is_loaded_goes_on_with_the_same_bits(done: int) -> None:
    config = scheduled(3)
    whole, optimizer = frozen_toy(config)
    for step in range(1, done + 1):
        one_step(whole, optimizer, config, step)
    model, fresh = frozen_toy(config)
    model.load_state_dict(whole.state_dict())
    loaded, saved = optimizer_tensors(fresh, create=True, step=done), optimizer_tensors(optimizer)
    assert set(loaded) == set(saved)
    for name, tensor in saved.items():
        loaded[name].copy_(tensor)
    set_optimizer_step(fresh, done)
    for step in range(done + 1, 7):
        one_step(whole, optimizer, config, step)
        one_step(model, fresh, config, step)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_what_is_frozen_for_good_has_no_group() -> None:
    _, optimizer = frozen_toy(scheduled(None))
    assert {group["component"] for group in optimizer.param_groups} == {"connector", "language"}
    assert not thaw(optimizer, 10**6)


# --- the run


def vision_inputs(trainer: Any) -> list[bool]:
    """Whether the image tokens of each forward pass had to be differentiated further than the connector."""
    seen: list[bool] = []
    encoder = trainer.model.model.vision_backbone.encoder
    encoder.register_forward_hook(lambda _, __, features: seen.append(features.requires_grad))
    return seen


def test_nothing_is_computed_backwards_for_a_frozen_tower(make_trainer: Any) -> None:
    trainer = make_trainer(*options("vision", 4, 3))
    seen = vision_inputs(trainer)
    start = {name: p.full_tensor().clone() for name, p in trainer.model.named_parameters()}
    per_step = len(trainer.batches.step(1))
    for step in (1, 2):
        trainer._optimize(step, trainer.batches.step(step), trainer._count(trainer.batches.step(step)))
    assert seen == [False] * 2 * per_step
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter.full_tensor(), start[name]) is (component_of(name) == "vision"), name
    metrics = trainer._optimize(3, trainer.batches.step(3), trainer._count(trainer.batches.step(3)))
    assert seen[2 * per_step :] == [True] * per_step
    assert metrics.learning_rate["vision"] == pytest.approx(3e-3 / 4) and metrics.grad_norm["vision"] > 0
    assert all(not torch.equal(p.full_tensor(), start[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("component", ["vision", "language"])
def test_going_on_before_at_and_after_the_unfreezing_gives_the_same_bits(make_trainer: Any, component: str) -> None:
    settings = options(component, 5, 3)
    make_trainer(*settings).fit(0)
    lines = read_metrics(Path("a/work/metrics.jsonl"))
    assert [component in line["grad_norm"] for line in lines] == [False, False, True, True, True]
    assert [component in line["learning_rate"] for line in lines] == [False, False, True, True, True]
    for done in (1, 2, 3):
        name = f"from{done}"
        shutil.copytree("a/work", f"{name}/work")  # the log of the steps before
        make_trainer(*settings, name=name, resume=Path(f"a/out/step-{done:06d}")).fit(done)
        for path in sorted(Path("a/out/step-000005").rglob("*")):
            if path.is_file():
                assert path.read_bytes() == (Path(name) / path.relative_to("a")).read_bytes(), (done, path)


RANK = """
import sys
from pathlib import Path
from molmo_model.train import distributed, parallelize, worker
from molmo_model.train.job import Job
parallelize.SMALL_BLOCK = 0
if sys.argv[2] == "large":
    parallelize.LARGE_MODEL = 0
job = Job.read(Path("a/work/job.json"))
params = job.load_params()
distributed.set_determinism(params.runs["go"].train)
class Never:
    wanted = False
with distributed.process_group(Path(sys.argv[1])) as ranks:
    trainer, done = worker.build_trainer(job, params, ranks, Never())
    def gradients(optimizer, *_):
        found = {str(p.grad.dtype) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        assert found == {"torch.float32"}, found
    trainer.optimizer.register_step_pre_hook(gradients)
    trainer.fit(done)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "precision"), [("small", "fp32"), ("large", "bf16")])
def test_two_ranks_with_a_unit_per_block_unfreeze_alike(
    make_trainer: Any, tmp_path: Path, size: str, precision: str
) -> None:
    """Units that were wholly frozen at first: with bf16 their gradients must still be summed and kept in fp32."""
    settings = [*options("vision", 4, 3), f"{TRAIN}.precision={precision}"]
    make_trainer(*settings, name="b").fit(0)
    make_trainer(*settings).logs.metrics.close()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "meeting of two"), size],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    one, two = read_metrics(Path("b/work/metrics.jsonl")), read_metrics(Path("a/work/metrics.jsonl"))
    close = {"rel": 1e-4 if precision == "fp32" else 2e-2}
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], **close)
    assert ["vision" in line["grad_norm"] for line in two] == [False, False, True, True]
    assert one[2]["grad_norm"] == pytest.approx(two[2]["grad_norm"], rel=1e-3 if precision == "fp32" else 5e-2)


# --- the params


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["unfreeze_step=3"], "vision is not frozen; set freeze: true"),
        (["freeze=true", "unfreeze_step=601"], "the run has 600 steps"),
        (["freeze=true", "unfreeze_step=0"], "between 1 and"),
    ],
)
def test_params_that_contradict_each_other_are_refused(override: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_params(ROOT / "params.yaml", [f"runs.pretrain.train.optim.vision.{one}" for one in override])
