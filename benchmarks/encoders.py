"""The vision encoders side by side: parameters, images per second at their published sizes, and a score on the demo.

Speed: `ViTFeatures`, which stops after the last block that Molmo takes features from, beside transformers' own forward
with all hidden states recorded, from which the same ones are picked; same weights, equal features asserted, fp32 on a
CPU and bf16 on a GPU. On a CPU one thread works and its CPU time counts, so that neighbours on a shared machine do not.
Weights are random: speed does not depend on them.

Score: one tiny model per architecture, from scratch, with the same sizes, steps, scenes and seed, then the answers to
"Which digit is in row 2, column 3?" about scans that were never shown in training. From scratch the rows of one
architecture are one model, and MetaCLIP is CLIP's architecture. A published encoder's pretraining has no part in it.

    python -m benchmarks.encoders [--quick]
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel
from transformers.utils import logging

from benchmarks.side_by_side import Sizes, in_turn, milliseconds, result, timed
from molmo_model.config import DatasetConfig
from molmo_model.data.datasets import digit_scenes
from molmo_model.data.example import Example
from molmo_model.eval.answering import Question
from molmo_model.eval.inference import Predictor
from molmo_model.model_config import (
    ConnectorConfig,
    CropMode,
    LanguageConfig,
    ModelConfig,
    PreprocessingConfig,
    VisionConfig,
)
from molmo_model.nn.build import build_model, restore_buffers
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.tables import encoder_parameters, markdown
from molmo_model.nn.vision_config import vision_config
from molmo_model.nn.vision_encoder import VISION_ENCODERS, ViTFeatures
from molmo_model.preprocessing.collator import collate
from molmo_model.preprocessing.preprocessor import Encoded, Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.tokenizer import load_tokenizer

TOKENIZER = "molmo_model/preprocessing/tokenizers/bytes512"
SEED = 17
ARCHITECTURES = {
    "siglip": ("siglip", "siglip2"),
    "clip": ("clip", "metaclip_b16", "metaclip_l14", "metaclip_h14"),
    "dinov2_large": ("dinov2_small", "dinov2_base", "dinov2_large"),
}
"""Trained row to the rows that are the same model at the same size, from scratch. Rows that differ from all of these in
an activation, the MLP or registers are not trained."""
TWINS = {"siglip2": "siglip", "metaclip_l14": "clip", "metaclip_h14": "clip_h14"}
"""Row to the one of the same sizes and blocks, whose speed it has."""
QUICK = ("dinov2_small", "metaclip_b16")
WIDTH = 96


def speed(name: str, rounds: int, images: int, device: str) -> tuple[dict[str, Any], float]:
    """Seconds of every round, by contestant, and the largest difference of their features."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    spec = VISION_ENCODERS[name]
    config, layers = vision_config(VisionConfig(encoder=name))
    full, _ = vision_config(VisionConfig(encoder=name, num_layers=spec.stored_layers, feature_layers=[-1]))
    ours = _filled(lambda: ViTFeatures(config, name, layers), device, dtype)
    peer = _filled(lambda: AutoModel.from_config(full), device, dtype, ours.vit.state_dict())
    pixels = torch.randn(images, 3, spec.image_size, spec.image_size, device=device, dtype=dtype)

    def features(_: Any) -> Tensor:
        return _done(ours(pixels))

    def hidden_states(_: Any) -> Tensor:
        states = peer(pixels, output_hidden_states=True).hidden_states
        return _done(torch.cat([states[layer + 1] for layer in layers], -1)[:, spec.prefix_tokens :])

    with torch.inference_mode():
        difference = float((features(None) - hidden_states(None)).abs().max())
        runs = {"ours": lambda: timed(features, [None]), "peer": lambda: timed(hidden_states, [None])}
        return in_turn(runs, rounds), difference


def _done(features: Tensor) -> Tensor:
    if features.is_cuda:
        torch.cuda.synchronize()
    return features


def _filled(
    make: Callable[[], Any], device: str, dtype: torch.dtype, shared: Mapping[str, Tensor] | None = None
) -> Any:
    """A module with the `shared` weights, and else small random ones: transformers' own first weights take minutes for
    a billion of them."""
    with torch.device("meta"):
        module = make().eval()
    state = dict(shared or {})
    for name, parameter in module.named_parameters():
        if name not in state:
            state[name] = torch.empty(parameter.shape, device=device, dtype=dtype).uniform_(-0.02, 0.02)
    module.load_state_dict(state, strict=False, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
    restore_buffers(module)
    return module


def params(encoder: str) -> ModelConfig:
    """A model of 0.6 million parameters for scenes of 96 x 96 pixels in one crop."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 4}
    return ModelConfig(
        tokenizer=TOKENIZER,
        vision=VisionConfig(
            encoder=encoder, image_size=96, patch_size=16, num_layers=2, feature_layers=[-1, -2], **sizes
        ),
        connector=ConnectorConfig(window_position_embedding=True, projector_hidden_size=2 * WIDTH),
        language=LanguageConfig(family="qwen2", num_layers=3, num_key_value_heads=4, **sizes),
        preprocessing=PreprocessingConfig(crop_mode=CropMode.resize, overlap_margins=[1, 1]),
    )


def preprocessor_of(model: ModelConfig, built: MolmoForConditionalGeneration) -> Preprocessor:
    config = PreprocessorConfig.build(
        model.preprocessing,
        image_size=built.config.vision_config.image_size,
        patch_size=built.config.vision_config.patch_size,
        pooling_size=model.connector.pooling_size,
        resize=VISION_ENCODERS[built.config.vision_encoder].resize,
        vocab_size=built.config.text_config.vocab_size,
    )
    return Preprocessor(config, load_tokenizer(model.tokenizer))


def scenes(train: int, held_out: int) -> tuple[list[Example], list[Example]]:
    config = DatasetConfig(family="digit_scenes", train_examples=train, eval_examples=held_out)
    splits: dict[str, list[Example]] = {"train": [], "eval": []}
    for split, example in digit_scenes.make(config, SEED):
        if isinstance(example, Example):
            splits[split].append(example)
    return splits["train"], splits["eval"]


def chosen(example: Example) -> list[int]:
    """The caption and the questions: what is learned in minutes."""
    return [n for n, one in enumerate(example.conversations) if one.style in ("scene_caption", "scene_qa")]


def score(encoder: str, steps: int, batch: int, train: list[Example], held_out: list[Example]) -> dict[str, Any]:
    """Trains one model and asks it; accuracy with its standard error, the last loss, and what it took."""
    model = params(encoder)
    built = build_model(model, SEED).train()
    preprocessor = preprocessor_of(model, built)
    encoded = [preprocessor.encode(example, chosen(example)) for example in train]
    optimizer = torch.optim.AdamW(built.parameters(), lr=2e-3, weight_decay=0.02)
    warmup = 40
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.55 + 0.45 * float(np.cos(np.pi * step / steps))),
    )
    losses: list[float] = []
    started = time.perf_counter()
    for rows in _batches(encoded, steps, batch):
        loss = built(**collate([rows[i::4] for i in range(4)], None, preprocessor.config, preprocessor.pad_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(built.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - started
    right = answers(Predictor(built, preprocessor), held_out)
    accuracy = statistics.fmean(right)
    error = (accuracy * (1 - accuracy) / len(right)) ** 0.5
    return {
        "accuracy": round(accuracy, 4),
        "standard_error": round(error, 4),
        "questions": len(right),
        "last_loss": round(statistics.fmean(losses[-20:]), 4),
        "vision_parameters": sum(p.numel() for p in built.model.vision_backbone.encoder.parameters()),
        "training_images_per_second": round(steps * batch / seconds, 1),
    }


def _batches(encoded: list[Encoded], steps: int, batch: int) -> Iterator[list[Encoded]]:
    """`steps` batches of distinct scenes, every epoch in another order."""
    rng = np.random.default_rng(SEED)
    orders = (rng.permutation(len(encoded)) for _ in itertools.count())
    endless = itertools.chain.from_iterable(orders)
    for _ in range(steps):
        yield [encoded[next(endless)] for _ in range(batch)]


def answers(predictor: Predictor, held_out: list[Example]) -> list[bool]:
    """Whether each `scene_qa` question is answered with exactly the right word."""
    questions = [
        Question(example, number)
        for example in held_out
        for number, conversation in enumerate(example.conversations)
        if conversation.style == "scene_qa"
    ]
    right = []
    for start in range(0, len(questions), 64):
        asked = questions[start : start + 64]
        for question, answer in zip(asked, predictor.answer(asked, 8), strict=True):
            expected = question.example.conversations[question.conversation].metadata["answer"]
            right.append(answer.text.strip() == expected)
    return right


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small encoders, three architectures, few steps")
    parser.add_argument("--only", choices=("speed", "score"), help="one half of it")
    options = parser.parse_args()
    quick, only = options.quick, options.only
    logging.set_verbosity_error()
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    images, clock = (32, 0) if device == "cuda" else (1, 1)
    times, worst = Sizes(), 0.0
    for name in [] if only == "score" else QUICK if quick else [name for name in VISION_ENCODERS if name not in TWINS]:
        # a GPU and small encoders are fast; of the large ones on a CPU a round takes a minute
        rounds = 5 if device == "cuda" or encoder_parameters(name)[0] < 1e8 else 2
        times[name], difference = speed(name, rounds, images, device)
        worst = max(worst, difference)
        say(f"{name}: {milliseconds(times[name]['ours'], clock)} ms, {milliseconds(times[name]['peer'], clock)} ms")
    steps, batch = (60, 16) if quick else (300, 32)
    scores = {}
    if only != "speed":
        train, held_out = scenes(*((600, 40) if quick else (4000, 160)))
        for name in ARCHITECTURES:
            scores[name] = score(name, steps, batch, train, held_out)
            say(f"{name}: {scores[name]}")
    rows = {name: row(name, times, images, clock, scores) for name in VISION_ENCODERS}
    say(table(rows, scores))
    result(
        "encoders",
        unit="images/s" if device == "cuda" else "images per second of one CPU core",
        ours=round(1000 * images / times.mean("ours", clock), 3) if times else 0.0,
        peer=round(1000 * images / times.mean("peer", clock), 3) if times else 0.0,
        peer_name="transformers' own forward with output_hidden_states",
        ratio=times.ratio(clock=clock) if times else 0.0,
        spread=times.spread() if times else [],
        goal=1.0,
        device=torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread",
        max_feature_difference=worst,
        encoders=rows,
        trained={"steps": steps, "batch": batch, "seed": SEED, **scores},
    )


def row(name: str, times: Sizes, images: int, clock: int, scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is known of one encoder."""
    built, published = encoder_parameters(name)
    found: dict[str, Any] = {"parameters_built": built, "parameters_published": published}
    timed_as = TWINS.get(name, name)
    if timed_as in times:
        for who, seconds in times[timed_as].items():
            found[who] = round(1000 * images / milliseconds(seconds, clock), 3)
    trained_as = next((key for key, same in ARCHITECTURES.items() if name in same and key in scores), None)
    if trained_as is not None:
        found |= {"accuracy": scores[trained_as]["accuracy"], "trained_as": trained_as}
    return found


def table(rows: dict[str, dict[str, Any]], scores: dict[str, dict[str, Any]]) -> str:
    """The measured figures as markdown."""
    head = ("`encoder`", "parameters built / published", "images/s", "transformers' forward", "scene_qa from scratch")
    lines = []
    for name, row in rows.items():
        one = scores.get(row.get("trained_as", ""))
        lines.append(
            (
                f"`{name}`",
                f"{row['parameters_built'] / 1e6:.0f}M / {row['parameters_published'] / 1e6:.0f}M",
                str(row.get("ours", "")),
                str(row.get("peer", "")),
                f"{one['accuracy']:.3f} ± {one['standard_error']:.3f}" if one else "",
            )
        )
    return markdown(head, lines)


if __name__ == "__main__":
    main()
