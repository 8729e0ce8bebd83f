"""The loop against a plain transformers model: one large batch, no sharding, no accumulation."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from molmo_model.errors import DataError, TrainingError
from molmo_model.nn.build import component_of
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.source_digest import ROOT
from molmo_model.train.metrics_log import read_metrics

START = Path("artifacts/checkpoints/tiny/step-000000")
UNCLIPPED = [f"runs.go.train.optim.{name}.max_grad_norm=1e9" for name in ("vision", "connector", "language")]


def captured_gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Runs step 1 and returns the gradients that the optimizer saw."""
    seen: dict[str, torch.Tensor] = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.full_tensor().clone() for n, p in trainer.model.named_parameters()})
    )
    batches = trainer.batches.step(1)
    trainer._optimize(1, batches, trainer._count(batches))
    return seen


def test_accumulated_gradients_are_those_of_one_large_batch(make_trainer: Any) -> None:
    trainer = make_trainer(*UNCLIPPED)
    batches = trainer.batches.step(1)
    assert len(batches) == 3 and len({batch["input_ids"].shape[1] for batch in batches}) > 1
    weights = [float(batch["loss_weights"][batch["labels"] >= 0].sum()) for batch in batches]
    assert max(weights) > 1.05 * min(weights)  # so averaging micro-batches would be another loss
    found = captured_gradients(trainer)

    whole = make_trainer("runs.go.train.packs_per_microbatch=3", name="b").batches.step(1)
    assert len(whole) == 1
    plain = MolmoForConditionalGeneration.from_pretrained(START).train()
    output = plain(**whole[0], use_cache=False)
    (output.loss_sum / output.weight_sum).backward()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_metrics_of_a_step(make_trainer: Any) -> None:
    trainer = make_trainer("runs.go.train.steps=2", "runs.go.train.save_every=2")
    batches = trainer.batches.step(1)
    plain = MolmoForConditionalGeneration.from_pretrained(START).train()
    loss_sum = weight = 0.0
    for batch in batches:
        output = plain(**batch, use_cache=False)
        output.loss_sum.backward()
        loss_sum, weight = loss_sum + float(output.loss_sum.detach()), weight + float(output.weight_sum)
    squares = dict.fromkeys(("vision", "connector", "language"), 0.0)
    for name, parameter in plain.named_parameters():
        squares[component_of(name)] += float((parameter.grad.double() / weight).square().sum())

    assert trainer.fit(0) == 2
    first, second = read_metrics(Path("a/work/metrics.jsonl"))
    assert first["loss"] == pytest.approx(loss_sum / weight, rel=1e-5)
    assert first["weight"] == pytest.approx(weight, rel=1e-6)
    assert first["tokens"] == sum(int((batch["example_ids"] >= 0).sum()) for batch in batches)
    examples = [len(set(row.tolist()) - {-1}) for batch in batches for row in batch["example_ids"]]
    assert first["examples"] == sum(examples)
    assert first["grad_norm"] == pytest.approx({name: math.sqrt(s) for name, s in squares.items()}, rel=1e-4)
    assert first["learning_rate"]["connector"] == pytest.approx(6e-3 / 4)
    assert second["step"] == 2 and second["loss"] != first["loss"]
    events = [json.loads(line) for line in Path("a/work/events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["progress", "progress", "checkpoint"]
    assert "seconds" not in first and "time" not in first


def test_a_broken_number_stops_the_run_and_keeps_the_checkpoint(make_trainer: Any) -> None:
    trainer = make_trainer("runs.go.train.steps=4", "runs.go.train.save_every=1")
    save = trainer._save_regular

    def save_then_break(step: int, metrics: Any) -> None:
        save(step, metrics)
        if step == 2:
            with torch.no_grad():
                trainer.model.lm_head.weight.fill_(float("nan"))

    trainer._save_regular = save_then_break
    with pytest.raises(TrainingError, match=r"at step 3 loss is nan"):
        trainer.fit(0)
    assert sorted(path.name for path in Path("a/out").iterdir()) == ["step-000001", "step-000002"]
    assert [line["step"] for line in read_metrics(Path("a/work/metrics.jsonl"))] == [1, 2]


def test_a_batch_without_answers_is_refused(make_trainer: Any) -> None:
    trainer = make_trainer()
    batches = trainer.batches.step(1)
    for batch in batches:
        batch["loss_weights"].zero_()
    with pytest.raises(DataError, match="no token of step 1 is answered"):
        trainer._optimize(1, batches, trainer._count(batches))


@pytest.mark.parametrize("frozen", ["vision", "language"])
def test_frozen_components_do_not_move_and_resume(make_trainer: Any, frozen: str) -> None:
    options = (f"runs.go.train.optim.{frozen}.freeze=true", "runs.go.train.steps=3", "runs.go.train.save_every=2")
    trainer = make_trainer(*options)
    before = {name: p.full_tensor().clone() for name, p in trainer.model.named_parameters()}
    trainer.fit(0)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter.full_tensor(), before[name]) is (component_of(name) == frozen), name
    assert frozen not in read_metrics(Path("a/work/metrics.jsonl"))[0]["grad_norm"]


def test_going_on_gives_the_same_bits_even_after_a_stop_between_saved_steps(make_trainer: Any) -> None:
    options = ("runs.go.train.steps=6", "runs.go.train.save_every=4")
    whole = make_trainer(*options)
    whole.fit(0)
    part = make_trainer(*options, name="b")

    class After:
        """Asks for a stop before step 3."""

        asked = 0

        @property
        def wanted(self) -> bool:
            self.asked += 1
            return self.asked == 3

    part.stop = After()
    assert part.fit(0) == 2
    part.logs.metrics.close()
    stopped = Path("b/work/stopped/step-000002")
    assert not Path("b/out").exists() or not list(Path("b/out").iterdir())
    rest = make_trainer(*options, name="b", resume=stopped)
    rest.fit(2)
    for name in ("step-000004", "step-000006"):
        for path in sorted((Path("a/out") / name).rglob("*")):
            if path.is_file():
                assert path.read_bytes() == (Path("b") / path.relative_to("a")).read_bytes(), path
    assert Path("a/work/metrics.jsonl").read_bytes() == Path("b/work/metrics.jsonl").read_bytes()
    assert not Path("b/work/stopped").exists()


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
    trainer, _ = worker.build_trainer(job, params, ranks, Never())
    units = [m for m in trainer.model.modules() if isinstance(m, parallelize.FSDPModule)]
    assert len(units) == 1 + 2 + 2, len(units)
    trainer.fit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "large"])
def test_two_ranks_with_a_unit_per_block_compute_the_same(make_trainer: Any, tmp_path: Path, size: str) -> None:
    """Also as large models do it: weights gathered again in the backward pass, gradients sent every micro-batch."""
    options = ("runs.go.train.steps=3", "runs.go.train.save_every=3")
    make_trainer(*options, name="b").fit(0)
    make_trainer(*options).logs.metrics.close()
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
    assert len(two) == 3
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-4)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-5)
    assert sorted(path.name for path in Path("a/out/step-000003/train_state").glob("*.distcp")) == [
        "__0_0.distcp",
        "__1_0.distcp",
    ]
