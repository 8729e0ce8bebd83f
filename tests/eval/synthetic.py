"""A small evaluated project without any model: real shards, invented answers of a known quality.

`workspace` fills a folder with params, shards, checkpoints' manifests and loss curves, and predictions; scoring,
scorecards and report then run as they would after real inference.
"""

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molmo_model.artifacts import digest_of, write_manifest
from molmo_model.config import Engine, Params, params_from_dict
from molmo_model.data.datasets import FAMILIES
from molmo_model.data.example import Example
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.eval import predictions, tasks
from molmo_model.preprocessing import prompts

QUALITY = {"pretrain/step-000300": 0.55, "sft/step-000150": 0.75, "sft/step-000300": 0.93}
"""Share of right answers of each checkpoint."""

TASKS = {
    "scene_qa": {"dataset": "digit_scenes", "styles": ["scene_qa"], "metric": "exact_match", "max_new_tokens": 8},
    "scene_caption": {"dataset": "digit_scenes", "styles": ["scene_caption"], "metric": "caption_digits"},
    "scene_count": {"dataset": "digit_scenes", "styles": ["scene_count"], "metric": "count"},
    "scene_point": {"dataset": "digit_scenes", "styles": ["scene_point"], "metric": "pointing"},
    "chart_qa": {"dataset": "charts", "styles": ["chart_qa"], "metric": "relaxed_accuracy"},
}

TINY_MODEL = {
    "tokenizer": "molmo_model/preprocessing/tokenizers/bytes512",
    "vision": {
        "encoder": "siglip",
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "feature_layers": [-1],
    },
    "connector": {"num_heads": 2, "projector_hidden_size": 32},
    "language": {
        "family": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 1,
        "num_heads": 2,
        "num_key_value_heads": 2,
    },
    "preprocessing": {"max_crops": 4, "overlap_margins": [1, 1]},
}


def params(examples: int = 8) -> Params:
    """Params of two runs, three checkpoints and five tasks."""
    run = {"model": "base", "train": {"steps": 300, "packs_per_step": 1, "sequence_length": 64, "crops_per_pack": 8}}
    run["train"]["save_every"] = 150
    mixture = {"scenes": {"dataset": "digit_scenes"}}
    raw: dict[str, Any] = {
        "version": 2,
        "datasets": {
            name: {"family": name, "train_examples": 2 * examples, "eval_examples": examples}
            for name in ("digit_scenes", "charts")
        },
        "models": {
            "base": TINY_MODEL,
        },
        "runs": {
            "pretrain": {**run, "init": "base", "mixture": mixture},
            "sft": {**run, "init": "pretrain", "mixture": mixture},
        },
        "tasks": TASKS,
        "eval": {"checkpoints": list(QUALITY), "report_examples": 6},
    }
    return params_from_dict(raw, "synthetic")


def tiny_params() -> Params:
    """Params whose only checkpoint is the tiny model's first weights, with short answers and small batches."""
    settings = params(4)
    settings.eval.checkpoints = ["base/step-000000"]
    settings.runtime.eval_batch_size = 3
    settings.eval.engine = Engine.generate  # whose batches these tests count; the slots have tests of their own
    for task in settings.tasks.values():
        task.max_new_tokens = 5
    return settings


def workspace(folder: Path, settings: Params) -> None:
    """Everything that stage 2 reads, below `folder`/artifacts."""
    made_from = {"params": {}, "inputs": {}, "code": digest_of("synthetic")}
    for name, dataset in settings.datasets.items():
        shards = folder / "artifacts" / "shards" / name
        examples = FAMILIES[dataset.family].make(dataset, settings.seed)
        write_shards(((split, item) for split, item in examples if isinstance(item, Example)), shards, 10**7)
        write_manifest(shards, schema="molmo/shards", version=1, summary={}, **made_from)
    for run in settings.runs:
        _checkpoints(folder / "artifacts" / "checkpoints" / run, made_from)
    for checkpoint in settings.eval.checkpoints:
        for task in settings.tasks:
            _predict(folder / "artifacts", settings, checkpoint, task)


def corrupted(answer: str, rng: random.Random) -> str:
    """An answer with one number replaced, or cut in half."""
    numbers = list(re.finditer(r"\d+(?:\.\d+)?", answer))
    if not numbers:
        return answer[: len(answer) // 2]
    spot = rng.choice(numbers)
    return answer[: spot.start()] + str(rng.randint(0, 9)) + answer[spot.end() :]


def prediction_rows(settings: Params, task: str, reader: ShardReader, quality: float) -> list[dict[str, Any]]:
    """Rows of `predictions.jsonl` with about a share `quality` of right answers."""
    rows = []
    for item in tasks.items(settings.tasks[task], task, reader):
        # one die per item: a better checkpoint is right wherever a worse one is
        rng = random.Random(f"{task} {item.id}")
        right = rng.random() < quality
        references = tasks.references(item)
        rows.append(
            {
                "id": item.id,
                "example_id": item.example.id,
                "conversation": item.conversation,
                "style": item.asked.style,
                "prompt": "".join(prompts.asked(item.asked, prompts.PromptFormat())),
                "prediction": references["answer"] if right else corrupted(references["answer"], rng),
                "references": references,
                "finish_reason": "stop",
                "tokens": 5,
                "prompt_tokens": 30,
                "image": {
                    "dataset": settings.tasks[task].dataset,
                    "row": item.row,
                    "sha256": list(item.images),
                },
            }
        )
    return rows


def _checkpoints(folder: Path, made_from: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": 3.0 / (1 + step / 40) + 0.05 * (step % 7)} for step in range(1, 301)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_manifest(folder, schema="molmo/checkpoints", version=1, summary={}, **made_from)


def _predict(artifacts: Path, settings: Params, checkpoint: str, task: str) -> None:
    out = artifacts / "predictions" / checkpoint / task
    out.mkdir(parents=True)
    reader = ShardReader(artifacts / "shards" / settings.tasks[task].dataset)
    rows = prediction_rows(settings, task, reader, QUALITY[checkpoint])
    predictions.write_jsonl(out / predictions.FILE, rows)
    training = tasks.training_references(settings.tasks[task], reader)
    predictions.write_jsonl(out / predictions.TRAINING_FILE, training)
    inputs = {"checkpoint": digest_of(checkpoint), "shards": reader.digest}
    write_manifest(
        out,
        schema=predictions.SCHEMA,
        version=1,
        params={f"tasks.{task}": TASKS[task]},
        inputs=inputs,
        code=digest_of("synthetic"),
        summary={},
    )
