"""A HeMolmo through the project's own trainer: micro-batches add up, it saves, loads again and answers."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from molmo_model.config import load_params
from molmo_model.eval.answering import Question
from molmo_model.eval.inference import Predictor
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from pipelines import assemble, mixture, shards
from pipelines.stage import run
from tests.preprocessing.examples import asked, example
from tests.train.conftest import PARAMS

START = Path("artifacts/checkpoints/tiny/step-000000")
SELECTOR = {"tokens": 6, "min_tokens": 2, "hidden_size": 16, "dropout": 0.0, "gate_dropout": 0.0, "query": True}
UNCLIPPED = [f"runs.go.train.optim.{name}.max_grad_norm=1e9" for name in ("vision", "connector", "language")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of this room with a token selector."""
    params = copy.deepcopy(PARAMS)
    params["models"]["tiny"]["selector"] = SELECTOR
    params["models"]["tiny"]["preprocessing"]["max_crops"] = 4
    folder = tmp_path_factory.mktemp("selecting")
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    with contextlib.chdir(folder):
        loaded = load_params()
        run(assemble.STAGE, loaded, model="tiny")
        run(shards.STAGE, loaded, dataset="digit_scenes")
        run(mixture.STAGE, loaded, run="go")
    return folder


@pytest.mark.slow
def test_a_training(make_trainer: Any) -> None:
    trainer = make_trainer(*UNCLIPPED, "runs.go.train.steps=6", "runs.go.train.save_every=6")
    batches = trainer.batches.step(1)
    assert len(batches) == 3 and all("selector_pass" in batch for batch in batches)
    assert len({int((batch["selector_slots"] >= 0).sum(1).max()) for batch in batches}) >= 1
    seen: dict[str, torch.Tensor] = {}
    handle = trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.full_tensor().clone() for n, p in trainer.model.named_parameters()})
    )
    trainer.fit(0)
    handle.remove()
    again = make_trainer(*UNCLIPPED, "runs.go.train.packs_per_microbatch=3", name="b")
    first: dict[str, torch.Tensor] = {}
    again.optimizer.register_step_pre_hook(
        lambda *_: first.update({n: p.grad.full_tensor().clone() for n, p in again.model.named_parameters()})
    )
    (whole,) = again.batches.step(1)
    again._optimize(1, [whole], again._count([whole]))
    plain = MolmoForConditionalGeneration.from_pretrained(START).train()
    parts = [plain(**batch, use_cache=False) for batch in batches]
    (sum(part.loss_sum for part in parts) / sum(part.weight_sum for part in parts)).backward()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(first[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")

    saved = Path("a/out/step-000006")
    loaded = MolmoForConditionalGeneration.from_pretrained(saved)
    changed = [
        name
        for (name, a), b in zip(loaded.named_parameters(), plain.parameters(), strict=True)
        if "token_selector" in name and not torch.equal(a, b)
    ]
    assert changed and loaded.config.selector["tokens"] == 6
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter.full_tensor(), dict(loaded.named_parameters())[name]), name
    predictor = Predictor.load(saved)
    questions = [Question(example([asked("how many?", "x")], (size,))) for size in ((90, 150), (64, 64), (150, 60))]
    together = [answer.text for answer in predictor.answer(questions, 5)]
    assert together == [predictor.answer([question], 5)[0].text for question in questions]
