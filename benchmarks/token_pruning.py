"""What pruning image tokens before the language model costs and gains, on the demo's checkpoint.

Answers two of its tasks with shares of every image's tokens: accuracy, tokens of a prompt, and CPU time per answer on
one thread, image encoding and the choice of tokens included. Beside the choice (DivPrune's), with position ids that
keep the places of the image, stand two others: tokens drawn at random, and the same choice with position ids that close
the gaps. The demo has twelve tokens per image, too few to save time; so the ratio is that of a language model of random
weights that reads a picture of 1,196 tokens, already encoded, and says 16. `peer` is the same model with all tokens.

    python -m benchmarks.token_pruning [--quick] [--checkpoint FOLDER] [--shards FOLDER]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.side_by_side import result
from molmo_model.config import load_params
from molmo_model.data.example import Example
from molmo_model.data.shard_reader import ShardReader
from molmo_model.eval import tasks
from molmo_model.eval.inference import Predictor
from molmo_model.eval.metrics import METRICS
from molmo_model.model_config import LanguageConfig, ModelConfig, VisionConfig
from molmo_model.nn.build import build_model
from molmo_model.nn.generation import generate
from molmo_model.nn.token_pruning import diverse, prune_image_tokens
from molmo_model.preprocessing.collator import collate_prompts

SHARES = (1.0, 0.75, 0.5, 0.25)
TASKS = {"scene_qa": "exact_match", "scene_count": "correct"}
"""Tasks of `params.yaml` and the value of their metric that counts."""
BATCH = 32
LONG = 1196
"""Image tokens of a 1,920 x 1,080 picture in 12 crops of CLIP's."""


@dataclass(frozen=True)
class Asked:
    """One question, with what its answer is compared with."""

    example: Example
    conversation: int
    references: dict[str, Any]


def at_random(tokens: Tensor, count: int) -> npt.NDArray[np.int64]:
    """The baseline: any tokens, the same ones for images of the same size."""
    return np.sort(np.random.default_rng(len(tokens)).permutation(len(tokens))[:count])


def answer(predictor: Predictor, asked: Sequence[Asked], most: int, keep: float, way: str) -> tuple[list[str], float]:
    """Answers, and tokens per prompt."""
    preprocessor = predictor.preprocessor
    texts, lengths = [], []
    for start in range(0, len(asked), BATCH):
        prompts = [preprocessor.encode_prompt(one.example, one.conversation) for one in asked[start : start + BATCH]]
        batch = collate_prompts(prompts, preprocessor.config, preprocessor.pad_id)
        batch = prune_image_tokens(
            predictor.model, batch, keep, pad_id=preprocessor.pad_id, choose=at_random if way == "random" else diverse
        )
        if way == "gaps closed":
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        lengths += batch["attention_mask"].sum(-1).tolist()
        texts += map(preprocessor.decode, generate(predictor.model, batch, most, [preprocessor.eos_id]))
    return texts, statistics.fmean(lengths)


def measure(predictor: Predictor, asked: Sequence[Asked], name: str, metric: str, most: int, rounds: int) -> Any:
    """Accuracy, prompt tokens and milliseconds of CPU time per answer, by way and share."""
    rows = []
    for way in ("diverse", "random", "gaps closed"):
        for keep in SHARES if way == "diverse" else SHARES[1:]:
            times = []
            for _ in range(rounds if way == "diverse" else 1):
                start = time.process_time()
                texts, tokens = answer(predictor, asked, most, keep, way)
                times.append((time.process_time() - start) * 1000 / len(asked))
            scores = [METRICS[metric].score(text, one.references) for text, one in zip(texts, asked, strict=True)]
            values = [score.values[TASKS[name]] for score in scores]
            row = {"task": name, "way": way, "keep": keep, "score": round(statistics.fmean(values), 4)}
            row |= {"error": round(statistics.stdev(values) / len(values) ** 0.5, 4), "n": len(values)}
            row |= {"tokens": round(tokens, 1), "ms": round(statistics.median(times), 2)}
            rows.append(row | {"spread": [round(min(times), 2), round(max(times), 2)]})
            print(row, file=sys.stderr)
    return rows


def long_prompts(rounds: int) -> dict[float, list[float]]:
    """Milliseconds of CPU time per answer about 1,196 image tokens by share, the choice of tokens included."""
    tokenizer = "molmo_model/preprocessing/tokenizers/bytes512"
    vision = VisionConfig("siglip", None, 64, 16, 64, 96, 1, 4, [-1])
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_layers": 6, "num_heads": 6, "num_key_value_heads": 6}
    params = ModelConfig(vision=vision, language=LanguageConfig(family="qwen2", **sizes), tokenizer=tokenizer)
    model = build_model(params, seed=1).eval()
    rng = torch.Generator().manual_seed(1)
    images = torch.tensor([[0] * 2 + [1] * LONG + [0] * 30])
    text = torch.randint(0, 256, images.shape, generator=rng)
    batch = {
        "input_ids": text.where(images == 0, model.config.image_token_id),
        "attention_mask": torch.ones_like(images),
        "position_ids": torch.arange(images.shape[1])[None],
        "image_ids": images,
        "pooling": torch.zeros(LONG, 4, dtype=torch.long),
        "image_token_counts": torch.tensor([LONG]),
    }
    tokens = [torch.randn(LONG, sizes["hidden_size"], generator=rng) * 0.1]
    whole = {name: value for name, value in batch.items() if name != "pooling"}
    whole["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tuple(tokens))}
    times: dict[float, list[float]] = {keep: [] for keep in SHARES}
    for number in range(rounds + 1):
        for keep in SHARES:
            start = time.process_time()
            pruned = whole if keep == 1 else prune_image_tokens(model, batch, keep, tokens=tokens)
            generate(model, pruned, 16, [model.config.text_config.vocab_size])  # an end that is never said
            if number:  # the first round does not count
                times[keep].append((time.process_time() - start) * 1000)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 questions of each task, not 300")
    parser.add_argument("--checkpoint", type=Path, help="default: the last of artifacts/checkpoints/sft")
    parser.add_argument("--shards", type=Path, default=Path("artifacts/shards/digit_scenes"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folders = sorted(Path("artifacts/checkpoints/sft").glob("step-*"))
    if options.checkpoint is None and not folders:
        sys.exit("there is no artifacts/checkpoints/sft; `dvc repro train@sft` makes it, or name a --checkpoint")
    folder = options.checkpoint or folders[-1]
    predictor, reader = Predictor.load(folder, device="cpu"), ShardReader(options.shards)
    rows = []
    for name in TASKS:
        task = load_params().tasks[name]
        chosen = tasks.items(task, name, reader)[: 64 if options.quick else 300]
        asked = [Asked(reader.read(item.row), item.conversation, tasks.references(item)) for item in chosen]
        rows += measure(predictor, asked, name, task.metric, task.max_new_tokens, 2 if options.quick else 5)
    times = long_prompts(rounds=5)
    median = {keep: round(statistics.median(found), 1) for keep, found in times.items()}
    ratios = [whole / half for whole, half in zip(times[1.0], times[0.5], strict=True)]
    result(
        "token_pruning",
        unit="ms of CPU time per answer with half of 1,196 image tokens",
        ours=median[0.5],
        peer=median[1.0],
        peer_name="all image tokens",
        ratio=median[1.0] / median[0.5],
        spread=[round(min(ratios), 2), round(max(ratios), 2)],
        goal=1.0,
        long_prompt_ms=median,
        checkpoint=str(folder),
        rows=rows,
    )


if __name__ == "__main__":
    main()
