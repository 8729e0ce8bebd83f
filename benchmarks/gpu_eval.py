"""Evaluation on a GPU: answers per second of the engine `slots` and of transformers' `generate`.

    python -m benchmarks.gpu_eval [--quick]
    python -m benchmarks.gpu_eval --device cpu --tiny      # the same code at toy sizes, to see that it runs

CLIP ViT-L/14-336 (23 blocks) and a language model of Qwen2-1.5B's shapes, random weights in bf16. The questions
are like ChartQA's: a JPEG of up to eight crops and the whole, a question, an answer of 3 to 64 tokens (20 in the mean,
few are long). Random weights do not end their answers, so every question has a limit of its own, for all sides alike; a
padded batch goes on until its longest answer ends.

Three sides answer questions of one list:
- ours: `eval.slot_inference.SlotPredictor` as `pipelines.predict` drives it, reading, decoding and cropping of pictures
  included;
- `generate` one by one, and in padded batches of 32 questions of similar length: transformers' `generate` with its
  dynamic cache, as `molmo_model.nn.generation` calls it. Their pictures are decoded and cropped beforehand, and that
  time is not counted.

A second list has five questions on each picture: the engine, which reads the picture once, and the engine that is told
of five pictures, without its cache of image tokens.

Checked: in fp32 with a small model the answers of all sides are equal at several numbers of slots, or differ at a
near-tie; in bf16 the answers that differ are counted.
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image as PILImage
from PIL import ImageDraw

from benchmarks.gpu_decode import on_device
from benchmarks.gpu_train_step import molmo
from benchmarks.he_molmo import preprocessor
from molmo_model.config import EvalPrecision
from molmo_model.data.example import Conversation, Example, Image, Message
from molmo_model.eval.answering import Asking, Question
from molmo_model.eval.inference import batches
from molmo_model.eval.loading import cost_of
from molmo_model.eval.slot_inference import SlotPredictor
from molmo_model.model_config import ModelConfig
from molmo_model.nn.build import build_config
from molmo_model.nn.generation import Said, differences, generate, greedy
from molmo_model.nn.image_token_cache import ImageTokenCache
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.slots import More, Prompts, SlotDecoder
from molmo_model.preprocessing.collator import collate_prompts
from molmo_model.preprocessing.preprocessor import Encoded, Preprocessor

SHORTEST, LONGEST = 3, 64
"""New tokens of an answer."""
NEVER = 10**9
"""An end token that no model says."""
PADDED = 32
"""Questions of a padded batch."""
GOALS = {"one_by_one": 10.0, "padded": 2.5, "several_per_picture": 2.0}


def pictures(count: int, width: int, height: int) -> list[Image]:
    """Bars on a grid, one JPEG each."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        canvas = PILImage.fromarray(rng.integers(225, 255, (height, width, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(canvas)
        for bar, top in enumerate(rng.integers(0, height, 12)):
            left = width * bar // 12
            draw.rectangle([left, int(top), left + width // 15, height], fill=tuple(rng.integers(0, 255, 3).tolist()))
        buffer = io.BytesIO()
        canvas.save(buffer, "JPEG", quality=88)
        found.append(Image(buffer.getvalue(), width, height, "JPEG"))
    return found


def questions(images: Sequence[Image], each: int) -> list[Question]:
    """So many questions about every picture, each an example of its own conversations."""
    found = []
    for number, image in enumerate(images):
        talks = tuple(
            Conversation(
                "chart_qa", (Message("user", f"What is the value of bar {turn + 1}?"), Message("assistant", "0"))
            )
            for turn in range(each)
        )
        example = Example(f"chart-{number:05d}", (image,), talks)
        found += [Question(example, turn) for turn in range(each)]
    return found


def limits(count: int) -> list[int]:
    """New tokens of every answer: evenly spread over the logarithm, in an order that has nothing to do with it."""
    steps = np.exp(np.linspace(np.log(SHORTEST), np.log(LONGEST), count)).round().astype(int)
    return np.random.default_rng(1).permutation(steps).tolist()  # type: ignore[no-any-return]


class Limited(SlotPredictor):
    """The engine, each of whose questions has a limit of its own."""

    limits: Sequence[int]

    def _decoder_for(self, longest: int, slots: int, margins: bool) -> SlotDecoder:
        decoder = super()._decoder_for(longest, slots, margins)
        decoder.ends, decoder.image_cache = frozenset([NEVER]), self.cache

        def run(more: More) -> Iterator[tuple[int, Said]]:
            def limited(wait: bool) -> Prompts | None:
                prompts = more(wait)
                if prompts is None:
                    return None
                return replace(prompts, max_new_tokens=[self.limits[number] for number in prompts.numbers])

            return SlotDecoder.run(decoder, limited)

        decoder.run = run  # type: ignore[method-assign]
        return decoder


class Sides:
    """One model, and the ways to answer with it."""

    def __init__(self, params: ModelConfig, device: str, dtype: torch.dtype) -> None:
        self.preprocessor: Preprocessor = preprocessor(params, params.language.vocab_size or 512)
        self.device, self.dtype = device, dtype
        config = build_config(params, self.preprocessor.config.im_patch_id)
        self.model: MolmoForConditionalGeneration = on_device(config, device, dtype)
        precision = EvalPrecision.fp32 if dtype == torch.float32 else EvalPrecision.bf16_weights
        self.slots = Limited(self.model, self.preprocessor, precision)

    def ours(
        self, asked: Sequence[Question], limit: Sequence[int], margins: bool = False, cached: bool = True
    ) -> dict[int, Said]:
        """All answers by number; nothing is known of the pictures when it begins."""
        self.slots.limits, self.slots.cache = limit, ImageTokenCache(**({} if cached else {"max_bytes": 0}))
        found = self.slots.said(asked, lambda index: asked[index], Asking(LONGEST), margins)
        return {index: said for index, said, _ in found}

    def encoded(self, asked: Sequence[Question]) -> list[Encoded]:
        return [self.preprocessor.encode_prompt(one.example, one.conversation) for one in asked]

    def padded(
        self, asked: Sequence[Question], prompts: Sequence[Encoded], limit: Sequence[int], size: int
    ) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for rows in batches([cost_of(self.preprocessor, one) for one in asked], size):
            batch = collate_prompts([prompts[row] for row in rows], self.preprocessor.config, self.preprocessor.pad_id)
            answers = generate(self.model, batch, max(limit[row] for row in rows), [NEVER])
            found |= {row: answer[: limit[row]] for row, answer in zip(rows, answers, strict=True)}
        return found


def seconds(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    found = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


def check(device: str) -> dict[str, Any]:
    """Both engines in fp32 on a small model: answers that differ between one by one and slots, all near-ties.

    Raises:
        SystemExit: a difference is no near-tie.
    """
    sides = Sides(small(), device, torch.float32)
    asked = questions(pictures(6, 90, 70), 2)
    limit, config, pad = limits(len(asked)), sides.preprocessor.config, sides.preprocessor.pad_id
    alone = [
        greedy(sides.model, collate_prompts([one], config, pad), most, [NEVER])[0]
        for one, most in zip(sides.encoded(asked), limit, strict=True)
    ]
    found: dict[str, Any] = {"answers": len(asked), "tokens": sum(len(said.tokens) for said in alone)}
    for slots in (1, 2, 8, 32):
        sides.slots.batch_size, sides.slots._decoder = slots, None
        mine = sides.ours(asked, limit, margins=True)
        parted = differences(alone, [mine[index] for index in range(len(asked))])
        found[f"slots_{slots}"] = {"differ": len(parted), "near_ties": sum(one.near_tie for one in parted)}
        if wrong := [one for one in parted if not one.near_tie]:
            raise SystemExit(f"{slots} slots in fp32: {wrong[0]} is no near-tie")
    return found


def small() -> ModelConfig:
    params = molmo(tiny=True)
    return replace(params, language=replace(params.language, max_position_embeddings=2048))


def rounds(sides: dict[str, tuple[int, Callable[[], Any]]], count: int, device: str) -> dict[str, list[float]]:
    """Answers per second of every side in every round; in turn."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(count):
        for name, (answers, side) in sides.items():
            rates[name].append(answers / seconds(side, device)[0])
    return rates


def lengths(counts: Sequence[int]) -> dict[str, float]:
    """Mean and percentiles."""
    parts = {f"p{part}": sorted(counts)[len(counts) * part // 100] for part in (10, 50, 90)}
    return {"mean": round(statistics.fmean(counts), 1), **parts}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer questions and rounds")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--slots", type=int, default=64)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --device cpu --tiny shows that it runs")
    sizes = {"tiny": (24, 8, 3, 8, 1), "quick": (256, 64, 8, 40, 2), "full": (768, 128, 16, 100, 3)}
    kind = "tiny" if args.tiny else "quick" if args.quick else "full"
    args.ours, args.padded, args.alone, args.shared, args.rounds = sizes[kind]
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    checks = check(args.device)
    print("fp32:", json.dumps(checks), flush=True)
    params = (
        small() if args.tiny else replace(full := molmo(False), preprocessing=replace(full.preprocessing, max_crops=8))
    )
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    sides = Sides(params, args.device, dtype)
    sides.slots.batch_size = args.slots
    size = (90, 70) if args.tiny else (1100, 560)
    asked = questions(pictures(args.ours, *size), 1)
    prompts, limit = sides.encoded(asked[: args.padded]), limits(len(asked))
    first, mine = seconds(lambda: sides.ours(asked, limit), args.device)  # compiles and captures
    print("ours, first:", round(first, 1), "s", json.dumps(lengths(limit)), flush=True)
    padded_asked, alone_asked = asked[: args.padded], asked[: args.alone]
    padded_limit, alone_limit = limits(args.padded), limits(args.alone)
    theirs = sides.padded(padded_asked, prompts, padded_limit, PADDED)
    found = rounds(
        {
            "ours": (len(asked), lambda: sides.ours(asked, limit)),
            "padded": (len(padded_asked), lambda: sides.padded(padded_asked, prompts, padded_limit, PADDED)),
            "one_by_one": (len(alone_asked), lambda: sides.padded(alone_asked, prompts[: args.alone], alone_limit, 1)),
        },
        args.rounds,
        args.device,
    )
    print(json.dumps(found), flush=True)
    shared = questions(pictures(args.shared, *size), 5)
    apart = [
        replace(one, example=replace(one.example, id=f"{one.example.id}-{one.conversation}")) for one in shared
    ]  # nothing says that five of them show one picture
    again = limits(len(shared))
    sides.ours(shared, again)
    reuse = rounds(
        {
            "cached": (len(shared), lambda: sides.ours(shared, again)),
            "not_cached": (len(shared), lambda: sides.ours(apart, again, cached=False)),
        },
        args.rounds,
        args.device,
    )
    rates = {**found, **reuse}
    median = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    ratios = {
        "one_by_one": round(median["ours"] / median["one_by_one"], 2),
        "padded": round(median["ours"] / median["padded"], 2),
        "several_per_picture": round(median["cached"] / median["not_cached"], 2),
    }
    flips = sum(any(a != b for a, b in zip(mine[row].tokens, said, strict=False)) for row, said in theirs.items())
    print(
        json.dumps(
            {
                "name": "gpu_eval",
                "unit": "answers/s",
                "ours": median["ours"],
                "peer": {name: median[name] for name in ("one_by_one", "padded")},
                "peer_name": f"transformers' generate, dynamic cache: one by one, and in padded batches of {PADDED}",
                "ratio": ratios,
                "spread": {
                    name: [round(min(rates), 2), round(max(rates), 2)] for name, rates in {**found, **reuse}.items()
                },
                "goal": GOALS,
                "versions": {name: version(name) for name in ("torch", "transformers")},
                "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                "precision": str(dtype).removeprefix("torch."),
                "tiny": args.tiny,
                "quick": args.quick,
                "slots": args.slots,
                "questions": {
                    "ours": args.ours,
                    "padded": args.padded,
                    "one_by_one": args.alone,
                    "shared": len(shared),
                },
                "prompt_tokens": cost_of(sides.preprocessor, asked[0])[0],
                "crops": cost_of(sides.preprocessor, asked[0])[1],
                "answer_tokens": lengths(limit),
                "five_per_picture": {name: median[name] for name in ("cached", "not_cached")},
                "flips": {"differ": flips, "of": len(theirs)},
                "first_s": round(first, 1),
                "fp32": checks,
            }
        )
    )
    return 0


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    sys.exit(main())
