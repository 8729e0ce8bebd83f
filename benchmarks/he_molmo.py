"""HeMolmo against a plain Molmo: speed, memory and quality at several numbers K of high-resolution tokens.

Quality, on the demo's scenes of handwritten digits: 9 high-resolution tokens and 4 low-resolution ones, on which a
digit is a smudge. Every contestant starts from the demo's trained weights and trains the same further steps on the same
scenes: the plain model with all tokens, HeMolmos with a learned selection at several K, and at one K a selection by the
features alone (`prior_only`) and by chance. The score is the share of held-out questions ("Which digit is in row 2,
column 3?") that are answered exactly; its error is one standard error.

Costs, where tokens are many: 169 high-resolution tokens and 16 low-resolution ones of 17 crops, a model of 5 million
parameters with random weights. CPU time of one thread, contestants in turn, decoding and cropping left out: per picture
of a training step, forward and backward, and per answer of 8 tokens. Memory is what a training step keeps for its
backward pass, per picture, parameters left out. The vision encoder sees all crops whatever K is.

    python -m benchmarks.he_molmo [--quick] [--checkpoint FOLDER]

`gpu_model` and `gpu_batch` are the same at a real size, CLIP-L and Qwen2-1.5B with K = 512, for a step on a GPU.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.side_by_side import result
from molmo_model.config import DatasetConfig
from molmo_model.data.datasets import digit_scenes
from molmo_model.data.example import Conversation, Example, Image, Message
from molmo_model.model_config import (
    ConnectorConfig,
    CropMode,
    LanguageConfig,
    ModelConfig,
    PreprocessingConfig,
    SelectorConfig,
    TokenScore,
    VisionConfig,
)
from molmo_model.nn.build import build_model
from molmo_model.nn.generation import generate
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.nn.vision_encoder import VISION_ENCODERS
from molmo_model.preprocessing.collator import collate, collate_prompts
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.tokenizer import load_tokenizer

TOKENIZER = "molmo_model/preprocessing/tokenizers/bytes512"
STYLES = ("scene_caption", "scene_qa")
RATE, WARMUP = 1e-3, 20
ALL = 9


@dataclass(frozen=True)
class Sizes:
    """How much is trained and asked."""

    steps: int
    scenes: int
    """Per step."""
    asked: int
    """Held-out scenes, each with up to five questions."""
    kept: tuple[int, ...]


FULL, QUICK = Sizes(400, 16, 60, (2, 4, 6)), Sizes(3, 8, 8, (4,))
COMPARED = 4
"""K at which ways of selecting are compared."""
BATCH, LONGEST = 32, 8
"""Questions asked at a time, and tokens of an answer."""
PICTURES = 4
"""Of a batch, where costs are measured."""
NEVER = 10**6
"""An end token that no model says."""
Times = dict[int, tuple[list[float], list[float]]]
"""By K: CPU seconds per picture trained on and per answer, of every round."""


def build(folder: Path, selector: SelectorConfig | None) -> tuple[MolmoForConditionalGeneration, Preprocessor]:
    """The checkpoint's model with a new token selector."""
    plain, encode = MolmoForConditionalGeneration.from_pretrained(folder), Preprocessor.from_pretrained(folder)
    encode = Preprocessor(replace(encode.config, selector_tokens=selector.tokens if selector else 0), encode.tokenizer)
    if selector is None:
        return plain, encode
    config = MolmoConfig(**{**plain.config.to_dict(), "selector": {**asdict(selector), "score": selector.score.value}})
    torch.manual_seed(0)
    model = MolmoForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    if unexpected or any("token_selector" not in name for name in missing):
        raise SystemExit(f"{folder} lacks {missing} or has {unexpected} beside a plain model's weights")
    return model, encode


def preprocessor(model: ModelConfig, vocab_size: int) -> Preprocessor:
    spec = VISION_ENCODERS[model.vision.encoder]
    config = PreprocessorConfig.build(
        model.preprocessing,
        image_size=model.vision.image_size or spec.image_size,
        patch_size=model.vision.patch_size or spec.patch_size,
        pooling_size=model.connector.pooling_size,
        resize=spec.resize,
        vocab_size=vocab_size,
        selector=model.selector,
    )
    return Preprocessor(config, load_tokenizer(model.tokenizer))


def scenes(split: str, count: int) -> Iterator[Example]:
    """Scenes with the conversations of the styles alone."""
    config = DatasetConfig(
        family="digit_scenes",
        train_examples=count if split == "train" else 0,
        eval_examples=count if split == "eval" else 0,
    )
    for _, example in digit_scenes.make(config, seed=0):
        if isinstance(example, Example):
            kept = tuple(one for one in example.conversations if one.style in STYLES)
            yield replace(example, conversations=kept)


class SavedBytes:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.total = 0

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.hooks.__exit__(*raised)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def train(model: MolmoForConditionalGeneration, encode: Preprocessor, sizes: Sizes) -> float:
    """Trains in place; mean loss of the last tenth of the steps."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.02, betas=(0.9, 0.95))
    source, rng = scenes("train", sizes.scenes * sizes.steps), np.random.default_rng(0)
    losses = []
    for step in range(sizes.steps):
        encoded = [encode.encode(next(source), rng=rng) for _ in range(sizes.scenes)]
        batch = collate([[one] for one in encoded], None, encode.config)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, max(0.1, 1 - step / sizes.steps))
        output = model.train()(**batch, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.cross_entropy_sum / output.weight_sum))
        if step % 25 == 0:
            print(f"  step {step}: {losses[-1]:.3f}", file=sys.stderr)
    return round(statistics.fmean(losses[-max(1, sizes.steps // 10) :]), 4)


def ask(model: MolmoForConditionalGeneration, encode: Preprocessor, sizes: Sizes) -> dict[str, float]:
    """Share of questions answered exactly, its standard error, and prompt tokens."""
    right, lengths, asked = [], [], questions(sizes.asked)
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        prompts = [encode.encode_prompt(one, place) for one, place in part]
        lengths += [len(prompt) for prompt in prompts]
        answers = generate(model, collate_prompts(prompts, encode.config, encode.pad_id), LONGEST, [encode.eos_id])
        for ids, (one, place) in zip(answers, part, strict=True):
            right.append(encode.decode(ids) == one.conversations[place].messages[-1].text)
    score = statistics.fmean(right)
    return {
        "score": round(score, 4),
        "error": round((score * (1 - score) / len(right)) ** 0.5, 4),
        "questions": len(right),
        "prompt_tokens": round(statistics.fmean(lengths), 1),
    }


def questions(count: int) -> list[tuple[Example, int]]:
    """Held-out scenes and the places of their questions."""
    return [
        (one, place)
        for one in scenes("eval", count)
        for place, conversation in enumerate(one.conversations)
        if conversation.style == "scene_qa"
    ]


def costs(rounds: int, kept: Sequence[int]) -> tuple[list[dict[str, Any]], Times]:
    """Rows of costs by K, 0 for a plain model, and the times of the rounds."""
    prepared, rows, times = {}, [], {}
    for tokens in (0, *kept):
        params = many_tokens(tokens)
        model = build_model(params, seed=0)
        encode = preprocessor(params, model.config.text_config.vocab_size)
        shown = [noise(f"noise-{number}", 208, 208, "a short answer", number) for number in range(PICTURES)]
        batch = collate([[encode.encode(one)] for one in shown], None, encode.config)
        prompts = [encode.encode_prompt(one) for one in shown]
        prepared[tokens] = model, batch, collate_prompts(prompts, encode.config, encode.pad_id)
        with SavedBytes(model) as saved:
            _ = model.train()(**batch, use_cache=False).loss
        rows.append({"tokens": tokens or "all", "prompt_tokens": len(prompts[0])})
        rows[-1]["saved_mib"] = round(saved.total / PICTURES / 2**20, 3)
        times[tokens] = [], []
    for number in range(rounds + 1):
        for tokens, (model, batch, prompts) in prepared.items():
            began = time.process_time()
            model.train()(**batch, use_cache=False).loss.backward()
            trained = time.process_time()
            generate(model, prompts, LONGEST, [NEVER])
            if number:  # the first one warms up
                times[tokens][0].append((trained - began) / PICTURES)
                times[tokens][1].append((time.process_time() - trained) / PICTURES)
    for row, (training, answering) in zip(rows, times.values(), strict=True):
        row["train_ms"] = round(statistics.median(training) * 1000, 2)
        row["answer_ms"] = round(statistics.median(answering) * 1000, 2)
        print(row, file=sys.stderr)
    return rows, times


def many_tokens(tokens: int) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            encoder="siglip", image_size=64, patch_size=8, hidden_size=64, intermediate_size=192, num_layers=2,
            num_heads=4, feature_layers=[-1],
        ),
        connector=ConnectorConfig(projector_hidden_size=128),
        language=LanguageConfig(
            family="qwen2", hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=8, num_key_value_heads=8
        ),
        preprocessing=PreprocessingConfig(max_crops=16, overlap_margins=[1, 1]),
        selector=SelectorConfig(tokens=tokens, hidden_size=256) if tokens else None,
        tokenizer=TOKENIZER,
    )  # fmt: skip


def noise(name: str, height: int, width: int, said: str, seed: int) -> Example:
    """A picture of noise that is asked about."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    turns = (Message("user", "What is this?"), Message("assistant", said))
    return Example(name, (Image(_png(pixels), width, height, "PNG"),), (Conversation("qa", turns),))


def contestants(sizes: Sizes) -> Iterator[tuple[str, SelectorConfig | None]]:
    """Names and selectors; None is the plain model."""
    yield "all tokens", None
    for tokens in sizes.kept:
        yield f"learned, K={tokens}", SelectorConfig(tokens=tokens, hidden_size=64)
    for score in (TokenScore.prior_only, TokenScore.random):
        yield f"{score.value}, K={COMPARED}", SelectorConfig(tokens=COMPARED, hidden_size=64, score=score)


def compete(folder: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """The row of every contestant, that of the checkpoint itself first."""
    rows = [{"name": "before training", "tokens": ALL, **ask(*build(folder, None), sizes)}]
    print(rows[-1], file=sys.stderr)
    for name, selector in contestants(sizes):
        model, encode = build(folder, selector)
        tokens = selector.tokens if selector else ALL
        rows.append({"name": name, "tokens": tokens, "loss": train(model, encode, sizes), **ask(model, encode, sizes)})
        print(rows[-1], file=sys.stderr)
    return rows


def gpu_model(tiny: bool = False, tokens: int = 512) -> ModelConfig:
    """CLIP ViT-L/14-336 and Qwen2-1.5B's shapes with a token selector, or both very small."""
    preprocessing = PreprocessingConfig(crop_mode=CropMode.overlap_and_resize_c2, max_crops=12)
    if tiny:
        vision = VisionConfig(
            encoder="clip", image_size=32, patch_size=4, hidden_size=64, intermediate_size=96, num_layers=3,
            num_heads=4, feature_layers=[2, 1],
        )  # fmt: skip
        language = LanguageConfig(
            family="qwen2", hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        return ModelConfig(
            vision=vision,
            language=language,
            preprocessing=replace(preprocessing, overlap_margins=[1, 1]),
            selector=SelectorConfig(tokens=min(tokens, 8), hidden_size=64) if tokens else None,
            tokenizer=TOKENIZER,
        )
    vision = VisionConfig(
        encoder="clip", image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096, num_layers=23,
        num_heads=16, feature_layers=[22, 15],
    )  # fmt: skip
    language = LanguageConfig(
        family="qwen2", hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12, num_key_value_heads=2,
        vocab_size=151936, extra_vocab_size=128, max_position_embeddings=4096,
    )  # fmt: skip
    return ModelConfig(
        vision=vision,
        connector=ConnectorConfig(num_heads=16, projector_hidden_size=4480),
        language=language,
        preprocessing=preprocessing,
        selector=SelectorConfig(tokens=tokens) if tokens else None,
        tokenizer=TOKENIZER,
    )


def gpu_batch(model: ModelConfig, sequences: int, sequence_length: int | None = None, answer: int = 512) -> Any:
    """A packed row of sequences, each a noise picture of the most crops, a question and an answer of random bytes.

    Args:
        model: of `gpu_model`; without its selector the same sequences with all tokens.
        sequence_length: of the row; None makes it as long as its sequences, in whole blocks of 128.
        answer: letters of each answer, about as many tokens.
    """
    encode = preprocessor(model, model.language.vocab_size or 512)
    tiling, rng = encode.config.tiling, np.random.default_rng(0)
    rows = max(n for n in range(1, model.preprocessing.max_crops + 1) if n * n <= model.preprocessing.max_crops)
    cols = model.preprocessing.max_crops // rows
    margin, window = sum(tiling.margins) * tiling.patch_size, tiling.window_patches * tiling.patch_size
    height, width = rows * window + margin, cols * window + margin
    letters = list("abcdefghijklmnopqrstuvwxyz ")
    encoded = []
    for number in range(sequences):
        said = "".join(rng.choice(letters) for _ in range(answer))
        encoded.append(encode.encode(noise(f"noise-{number}", height, width, said, number)))
    length = sequence_length or -(-sum(map(len, encoded)) // 128) * 128
    return collate([encoded], length, encode.config, encode.pad_id)


def _png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image as PILImage

    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs; scores mean nothing")
    parser.add_argument("--checkpoint", type=Path, help="default: the last of artifacts/checkpoints/sft")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    folders = sorted(Path("artifacts/checkpoints/sft").glob("step-*"))
    if options.checkpoint is None and not folders:
        sys.exit("there is no artifacts/checkpoints/sft; `dvc repro train@sft` makes it, or name a --checkpoint")
    folder = options.checkpoint or folders[-1]
    spent, times = costs(5, (16, 64))
    rows = compete(folder, QUICK if options.quick else FULL)
    ratios = [slow / fast for slow, fast in zip(times[0][1], times[16][1], strict=True)]
    plain, selecting = spent[0], spent[1]
    result(
        "he_molmo",
        unit="ms of CPU time per answer, K=16 of 169 high-resolution tokens",
        ours=selecting["answer_ms"],
        peer=plain["answer_ms"],
        peer_name="the same model with all tokens",
        ratio=plain["answer_ms"] / selecting["answer_ms"],
        spread=[round(min(ratios), 2), round(max(ratios), 2)],
        goal=1.0,
        quick=options.quick,
        checkpoint=str(folder),
        costs=spent,
        quality=rows,
    )


if __name__ == "__main__":
    main()
