"""Every shipped recipe goes the whole way, cut short: first weights, shards, mixture, two steps, an answer a task."""

from pathlib import Path
from typing import Any

import pytest

from molmo_model.config import load_params, to_dict
from molmo_model.data.mixture import Mixture
from molmo_model.data.shard_reader import ShardReader
from molmo_model.eval.answering import Question
from molmo_model.eval.inference import Predictor
from molmo_model.eval.tasks import items
from molmo_model.source_digest import ROOT
from molmo_model.train.job import Job
from molmo_model.train.worker import build_trainer
from pipelines import assemble, mixture, recipe, shards
from pipelines.stage import run, stamp
from pipelines.train import STAGE
from tests.train.conftest import Never

CUT = [
    "runs.sft.init=base",
    *(f"runs.sft.train.{name}" for name in ("steps=2", "save_every=2", "packs_per_step=2", "packs_per_microbatch=1")),
    "runs.sft.train.processes=1",
    "eval.checkpoints=[sft/step-000002]",
]
FACTS = {
    "captioning": ("siglip_vision_model", 36, 1),
    "question_answering": ("siglip_vision_model", None, 1),
    "dense_prediction": ("dinov2", 144, 1),
    "efficiency": ("siglip_vision_model", 16, 4),
    "video": ("siglip_vision_model", None, 4),
    "long": ("siglip_vision_model", None, 4),
}
"""Encoder, image tokens of a digit scene where there is one crop, patches of a token."""


def prepare(name: str) -> Any:
    """The params with the recipe in them, few examples and steps, and everything that the run `sft` reads."""
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    recipe.apply(ROOT / "recipes" / f"{name}.yaml", Path("params.yaml"))
    named = load_params().datasets
    few = [f"datasets.{dataset}.{split}_examples={n}" for dataset in named for split, n in (("train", 10), ("eval", 3))]
    clips = ["runs.sft.mixture.clips.rate=50"] if name == "video" else []  # four packs must hold one
    params = load_params(overrides=[*few, *CUT, *clips])
    run(assemble.STAGE, params, model="base")
    for dataset in named:
        run(shards.STAGE, params, dataset=dataset)
    run(mixture.STAGE, params, run="sft")
    return params


def trained(params: Any, ranks: Any) -> Any:
    job = Job(
        run="sft",
        params=to_dict(params),
        inputs=STAGE.inputs(params, {"run": "sft"}),
        out="a/out",
        work="a/work",
        stamp=stamp(STAGE, params, {"run": "sft"}),
        resume=None,
        timings="a/timings.jsonl",
    )
    job.write()
    trainer = build_trainer(job, params, ranks, Never())[0]
    assert trainer.fit(0) == 2
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_a_recipe_goes_the_whole_way(name, tmp_path, one_rank, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = prepare(name)
    planned = Mixture.load("artifacts/mixture/sft")
    length = params.runs["sft"].train.sequence_length
    assert all((entry.tokens < length).all() for entry in planned.entries)
    trainer = trained(params, one_rank)
    encoder, tokens, patches = FACTS[name]
    backbone = trainer.model.model.vision_backbone
    assert trainer.model.config.vision_config.model_type == encoder
    frozen = name == "efficiency"
    assert all(parameter.requires_grad is not frozen for parameter in backbone.encoder.parameters())
    assert ("crop_frames" in {key for step in (1, 2) for pack in trainer.batches.step(step) for key in pack}) is (
        name == "video"
    )
    predictor = Predictor.load(next(Path("a/out").glob("step-000002")), device="cpu")
    for task_name, task in params.tasks.items():
        reader = ShardReader(f"artifacts/shards/{task.dataset}")
        item = items(task, task_name, reader)[0]
        (answer,) = predictor.answer([Question(reader.read(item.row), item.conversation)], task.max_new_tokens)
        assert answer.tokens <= task.max_new_tokens
    scene = ShardReader("artifacts/shards/digit_scenes").read(0)
    encoded = predictor.preprocessor.encode(scene)
    assert encoded.pooling.shape[1] == patches
    assert tokens is None or len(encoded.pooling) == tokens
