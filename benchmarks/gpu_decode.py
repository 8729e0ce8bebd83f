"""Greedy decoding on a GPU: new tokens per second of the decoder of slots and of transformers' `generate`.

    python -m benchmarks.gpu_decode [--quick] [--rows 1 16 64]
    python -m benchmarks.gpu_decode --device cpu --tiny      # the same code at toy sizes, to see that it runs

CLIP ViT-L/14-336 (23 blocks) and a language model of Qwen2-1.5B's shapes, random weights in bf16. Every row is a prompt
of 1,200 tokens, of which 1,008 are image tokens of seven crops, and is answered with 256 tokens that no end token cuts
short. Both sides answer the same prompts with the same weights, in turn. Tokens per second are those after the first:
256 tokens' time less that of one, which reads the prompts; the time of the whole is among the details.

The peer is transformers' `generate` with its dynamic cache, as `molmo_model.nn.generation` calls it. Before anything is
timed both sides answer with small models in fp32, one of each kind of layer, and every difference must be a near-tie
(the two best tokens within 1e-3); in bf16 the first differing places are counted, not refused.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.gpu_train_step import Shape, molmo, random_part, sequence
from molmo_model.nn.build import build_config, restore_buffers
from molmo_model.nn.generation import differences, generate, greedy
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.nn.slots import Prompts, SlotDecoder

FULL, TINY = Shape(tokens=1200, crops=7, answered=1), Shape(tokens=64, crops=2, answered=1)
NEVER = 10**9
"""An end token that no model says."""
GOALS = {1: 600, 64: 10_000}
"""New tokens per second by rows."""
READ_TOGETHER = 8
"""Prompts that ours reads at a time."""
FAMILIES = ("qwen2", "qwen3", "llama", "olmo2")


def on_device(config: MolmoConfig, device: str, dtype: torch.dtype) -> MolmoForConditionalGeneration:
    """A model with random weights, made where it stays."""
    with torch.device("meta"):
        model = MolmoForConditionalGeneration(config).to(dtype)
    model.to_empty(device=device)
    restore_buffers(model)
    torch.manual_seed(0)
    random_part(model)
    model.tie_weights()
    return model.eval()


def batch_of(parts: Sequence[dict[str, Tensor]], config: MolmoConfig) -> dict[str, Tensor]:
    """Prompts of one length as the collator lays them out for generation."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    crops = len(parts[0]["pixels"])
    ids = torch.stack([part["ids"] for part in parts])
    windows = [part["pooling"] + number * crops * side * side for number, part in enumerate(parts)]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous(),
        "image_ids": torch.stack([part["images"] for part in parts]),
        "pixel_values": torch.cat([part["pixels"] for part in parts]),
        "pooling": torch.cat(windows),
        "image_token_counts": torch.tensor([len(part["pooling"]) for part in parts]),
    }


def ours(decoder: SlotDecoder, parts: Sequence[dict[str, Tensor]], config: MolmoConfig, tokens: int) -> list[Any]:
    """The answers of all prompts, in order."""
    starts = iter(range(0, len(parts), min(READ_TOGETHER, decoder.slots)))

    def more(wait: bool) -> Prompts | None:
        start = next(starts, None)
        if start is None:
            return None
        some = parts[start : start + min(READ_TOGETHER, decoder.slots)]
        return Prompts(range(start, start + len(some)), batch_of(some, config), [tokens] * len(some))

    return [said for _, said in sorted(decoder.run(more))]


def peers(model: MolmoForConditionalGeneration, batch: dict[str, Tensor], tokens: int) -> list[list[int]]:
    """The answers of transformers' `generate`."""
    return generate(model, batch, tokens, [NEVER])


def check(device: str) -> dict[str, dict[str, int]]:
    """Both sides in fp32 on small models of several families: differing answers and, of them, near-ties.

    Raises:
        SystemExit: a difference is no near-tie.
    """
    found = {}
    for family in FAMILIES:
        params = molmo(tiny=True)
        params = replace(params, language=replace(params.language, family=family, max_position_embeddings=256))
        config = build_config(params)
        model = on_device(config, device, torch.float32)
        parts = [sequence(config, TINY, torch.Generator().manual_seed(seed)) for seed in range(5)]
        for slots in (1, 3):
            decoder = SlotDecoder(model, slots, 192, [NEVER], margins=True)
            mine = ours(decoder, parts, config, 64)
            theirs = [greedy(model, batch_of([part], config), 64, [NEVER])[0] for part in parts]
            parted = differences(mine, theirs)
            found[f"{family}, {slots} slots"] = {
                "answers": len(parts), "differ": len(parted), "near_ties": sum(one.near_tie for one in parted),
            }  # fmt: skip
            if wrong := [one for one in parted if not one.near_tie]:
                raise SystemExit(f"{family} with {slots} slots: {wrong[0]} is no near-tie")
    return found


def seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(model: MolmoForConditionalGeneration, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides with so many rows, in turn."""
    config, shape, new = model.config, TINY if args.tiny else FULL, args.tokens
    parts = [sequence(config, shape, torch.Generator().manual_seed(seed)) for seed in range(rows)]
    batch = batch_of(parts, config)
    context = -(-(shape.tokens + new) // 128) * 128
    started = time.perf_counter()
    decoder = SlotDecoder(model, rows, context, [NEVER])
    said = [one.tokens for one in ours(decoder, parts, config, new)]
    setup = time.perf_counter() - started
    sides: dict[str, Callable[[int], Any]] = {"ours": lambda tokens: ours(decoder, parts, config, tokens)}
    failed = None
    try:
        reference = peers(model, batch, new)
        sides["peer"] = lambda tokens: peers(model, batch, tokens)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        failed, reference = f"{type(error).__name__}: {str(error).splitlines()[0]}", []
    for side in sides.values():  # the shapes of what reads the prompts only
        side(1)
    whole: dict[str, list[float]] = {name: [] for name in sides}
    first: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, side in sides.items():
            if name == "peer" and number >= args.peer_rounds:
                continue
            first[name].append(seconds(lambda side=side: side(1), args.device))
            whole[name].append(seconds(lambda side=side: side(new), args.device))
    found: dict[str, Any] = {"rows": rows, "setup_s": round(setup, 1), "peer_failed": failed}
    for name in sides:
        long, short = statistics.median(whole[name]), statistics.median(first[name])
        found[name] = {
            "tokens_per_second": round(rows * (new - 1) / (long - short), 1),
            "with_prompts": round(rows * new / long, 1),
            "prompts_s": round(short, 4),
            "whole_s": [round(min(whole[name]), 3), round(max(whole[name]), 3)],
        }
    if "peer" in found:
        found["ratio"] = round(found["ours"]["tokens_per_second"] / found["peer"]["tokens_per_second"], 2)
        found["with_prompts_ratio"] = round(found["ours"]["with_prompts"] / found["peer"]["with_prompts"], 2)
        places = [_first_difference(a, b) for a, b in zip(said, reference, strict=True)]
        found["differ_in_low_precision"] = sum(place is not None for place in places)
        found["first_differences"] = sorted(place for place in places if place is not None)[:10]
    return found


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=3)
    args = parser.parse_args(argv)
    if args.quick or args.tiny:
        args.tokens, args.rounds, args.peer_rounds = 32, 2, 2
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --device cpu --tiny shows that it runs")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    checks = check(args.device)
    print("fp32:", json.dumps(checks), flush=True)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    params = molmo(args.tiny)
    model = on_device(build_config(params), args.device, dtype)
    found = []
    for rows in args.rows:
        found.append(compare(model, rows, args))
        print(f"{rows} rows:", json.dumps(found[-1]), flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    last = found[-1]
    print(
        json.dumps(
            {
                "name": "gpu_decode",
                "unit": "new tokens/s",
                "ours": {one["rows"]: one["ours"]["tokens_per_second"] for one in found},
                "peer": {one["rows"]: one.get("peer", {}).get("tokens_per_second") for one in found},
                "peer_name": "transformers' generate, dynamic cache, sdpa",
                "ratio": {one["rows"]: one.get("ratio") for one in found},
                "spread": last["ours"]["whole_s"],
                "goal": GOALS,
                "versions": {name: version(name) for name in ("torch", "transformers")},
                "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                "precision": str(dtype).removeprefix("torch."),
                "tiny": args.tiny,
                "new_tokens": args.tokens,
                "details": found,
                "fp32": checks,
            }
        )
    )
    return 0


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    sys.exit(main())
