"""One training step of a model of 1.9 billion parameters: milliseconds, tokens/s, MFU, memory.

    python -m benchmarks.gpu_train_step [--quick] [--checkpointing full] [--no-compile] [--sequences 8] [--profile FILE]
    python -m benchmarks.gpu_train_step --model he_molmo --tokens 512     # 0: the same sequences with all tokens
    python -m benchmarks.gpu_train_step --device cpu --tiny      # the same code at toy sizes, to see that it runs

CLIP ViT-L/14-336 (23 blocks) and a language model of Qwen2-1.5B's shapes, random weights, everything trained: bf16
compute over fp32 masters through the project's own FSDP2 on one rank, fused AdamW, gradients clipped per component.
One sequence is 2,536 tokens with 13 crops, 1,872 image tokens and 512 answered ones; sequences are packed into one row.
The peer is transformers' own Molmo2 of the same sizes in the same process: fp32 weights under bf16 autocast, sdpa,
fused AdamW, one gradient norm; every sequence is a row. MFU counts useful FLOPs only (causal attention within a
sequence, logits of answered tokens, no recomputation), against 989 TF/s of one H100. The sides run one after the other,
because both do not fit into 80 GB.

A HeMolmo has sequences of its own (`benchmarks.he_molmo`), no peer and no MFU: compare numbers of its tokens.

Before anything is timed, block-sparse masks are compared with dense ones: attention alone at several head widths and
lengths, and a small model's loss and gradients; a difference beyond the tolerance ends the benchmark with an error.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.he_molmo import gpu_batch, gpu_model
from molmo_model.config import ComponentOptim, OptimConfig, Precision
from molmo_model.model_config import ModelConfig
from molmo_model.nn.attention import allowed, block_mask, dense_mask, masks_for, molmo_attention
from molmo_model.nn.build import build_config, component_of, parameter_counts, restore_buffers
from molmo_model.nn.loss import answered_places
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.train.optim import build_optimizer, clip_gradients, set_learning_rates
from molmo_model.train.parallelize import compile_blocks, shard

PEAK = 989e12
"""Dense bf16 FLOP/s of an H100 SXM, by its data sheet."""
GOAL = 0.411
"""MFU of the composed prototype that this must at least equal."""
TOKENIZER = "molmo_model/preprocessing/tokenizers/bytes512"
BLOCK = 128
"""Rows are filled up to whole blocks of FlexAttention."""
OPTIM = OptimConfig(
    vision=ComponentOptim(learning_rate=6e-6, warmup_steps=200),
    connector=ComponentOptim(learning_rate=2e-4, warmup_steps=200),
    language=ComponentOptim(learning_rate=2e-5, warmup_steps=200),
)


@dataclass(frozen=True)
class Shape:
    """One sequence: begin, image tokens of all crops, the question, the answer."""

    tokens: int
    crops: int
    answered: int
    window: int = 2
    """Patches per side of a pooling window."""


FULL, TINY = Shape(tokens=2536, crops=13, answered=512), Shape(tokens=75, crops=3, answered=20)


def molmo(tiny: bool) -> ModelConfig:
    """The HeMolmo's model without its selector; the small one with the vocabulary that its sequences draw from."""
    model = gpu_model(tiny, tokens=0)
    if not tiny:
        return model
    return replace(model, language=replace(model.language, vocab_size=600, max_position_embeddings=256))


MODELS: dict[str, Callable[[bool, int], ModelConfig]] = {"molmo": lambda tiny, _: molmo(tiny), "he_molmo": gpu_model}
"""What `--model` chooses from: whether tiny, and the high-resolution tokens that a HeMolmo keeps, to the params."""


def sequence(config: MolmoConfig, shape: Shape, rng: torch.Generator) -> dict[str, Tensor]:
    """One sequence [S] and its crops, the same for both sides but for how they want it laid out."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    per_crop = (side // shape.window) ** 2
    images = shape.crops * per_crop
    text = shape.tokens - 1 - images
    words = torch.randint(0, config.text_config.vocab_size, (1 + text,), generator=rng)
    ids = torch.cat([words[:1], torch.full((images,), config.image_token_id), words[1:]])
    labels = torch.full_like(ids, -100)
    labels[-shape.answered - 1 : -1] = ids[-shape.answered :]
    grid = torch.arange(side * side).view(side // shape.window, shape.window, side // shape.window, shape.window)
    windows = grid.permute(0, 2, 1, 3).reshape(per_crop, -1)
    pooling = torch.cat([windows + crop * side * side for crop in range(shape.crops)])
    size = config.vision_config.image_size
    pixels = torch.randint(0, 256, (shape.crops, size, size, 3), dtype=torch.uint8, generator=rng)
    return {"ids": ids, "labels": labels, "pooling": pooling, "pixels": pixels, "images": torch.eq(ids, ids[1]).long()}


def packed(config: MolmoConfig, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sequences in one row, filled up to whole blocks, as the collator and the trainer hand it to the model."""
    length = sum(len(part["ids"]) for part in parts)
    row = -(-length // BLOCK) * BLOCK
    batch = {name: torch.zeros(1, row, dtype=torch.long) for name in ("input_ids", "position_ids", "segment_ids")}
    batch |= {"image_ids": torch.zeros(1, row, dtype=torch.long), "labels": torch.full((1, row), -100)}
    batch |= {"example_ids": torch.full((1, row), -1)}
    patches, start, windows = config.vision_config.image_size // config.vision_config.patch_size, 0, []
    for number, part in enumerate(parts):
        place = (0, slice(start, start + len(part["ids"])))
        batch["input_ids"][place], batch["labels"][place] = part["ids"], part["labels"]
        batch["position_ids"][place], batch["example_ids"][place] = torch.arange(len(part["ids"])), number
        batch["image_ids"][place] = part["images"] * (number + 1)
        windows.append(part["pooling"] + sum(len(one["pixels"]) for one in parts[:number]) * patches**2)
        start += len(part["ids"])
    batch |= {"pixel_values": torch.cat([part["pixels"] for part in parts]), "pooling": torch.cat(windows)}
    weights = (batch["labels"] >= 0).float()
    return {**batch, "loss_weights": weights, "answered": answered_places(batch["labels"])}


def useful_flops(config: MolmoConfig, shape: Shape) -> float:
    """Of one sequence, forward and backward (three times forward): multiplications and additions of matrices."""
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    width, seen = vision.hidden_size, shape.crops * (patches + 1)
    block = 4 * width**2 + 2 * width * vision.intermediate_size
    vit = vision.num_hidden_layers * (2 * seen * block + 4 * seen * (patches + 1) * width)
    windows = shape.crops * patches // shape.window**2
    features = width * len(config.vision_feature_layers)
    pool = 2 * windows * (features * width + width**2) + 2 * windows * shape.window**2 * 2 * features * width
    hidden, inner = text.hidden_size, config.projector_hidden_size
    project = 2 * windows * (2 * width * inner + inner * hidden)
    head_dim = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * text.intermediate_size
    attention = 4 * queries * shape.tokens**2 / 2
    language = text.num_hidden_layers * (2 * shape.tokens * layer + attention)
    head = 2 * shape.answered * hidden * text.vocab_size
    return 3.0 * (vit + pool + project + language + head)


def random_part(model: nn.Module) -> None:
    """Weights for a model whose memory was just taken: ones in norms, zeros in biases, little noise elsewhere."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))


def our_step(config: MolmoConfig, args: argparse.Namespace, batch: dict[str, Tensor]) -> Callable[[], float]:
    """A step as the trainer does it; the returned function runs one and gives its loss."""
    device = torch.device(args.device)
    with torch.device("meta"):
        model = MolmoForConditionalGeneration(config).float()
    model.train()
    if args.checkpointing == "full":
        model.gradient_checkpointing_enable()
    precision = Precision.bf16 if device.type == "cuda" else Precision.fp32
    shard(model, precision, init_device_mesh(device.type, (1,)))
    model.to_empty(device=device)
    restore_buffers(model)
    random_part(model)
    if args.compile:
        compile_blocks(model)
    optimizer = build_optimizer(model, OPTIM, component_of)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    weight, count = float(batch["loss_weights"].sum()), 0

    def step() -> float:
        nonlocal count
        count += 1
        output = model(**batch, z_loss=1e-4, use_cache=False)
        (output.loss_sum / weight).backward()
        set_learning_rates(optimizer, OPTIM, count, 1000)
        clip_gradients(optimizer, OPTIM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(output.cross_entropy_sum) / weight

    return step


def peer_step(config: MolmoConfig, args: argparse.Namespace, parts: list[dict[str, Tensor]]) -> Callable[[], float]:
    """A step of transformers' Molmo2 at the same sizes, its sequences side by side."""
    from transformers.models.molmo2 import modeling_molmo2

    device = torch.device(args.device)
    native = peer_config(config)
    native._attn_implementation = "sdpa"
    model: Any = modeling_molmo2.Molmo2ForConditionalGeneration(native).to(device=device, dtype=torch.float32).train()
    if args.peer_checkpointing == "full":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = {name: tensor.to(device) for name, tensor in side_by_side(config, parts).items()}

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def peer_config(config: MolmoConfig) -> Any:
    """Molmo2's configuration of our sizes; its own kind of encoder (no class token) and of norms (on queries, keys)."""
    from transformers.models.molmo2.configuration_molmo2 import Molmo2Config

    vision, text = config.vision_config, config.text_config
    heads = {"num_attention_heads": vision.num_attention_heads, "num_key_value_heads": vision.num_attention_heads}
    heads |= {"head_dim": vision.hidden_size // vision.num_attention_heads, "hidden_size": vision.hidden_size}
    return Molmo2Config(
        vision_config={
            **heads,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "image_size": [vision.image_size] * 2,
            "patch_size": vision.patch_size,
        },
        adapter_config={
            **heads,
            "vision_feature_layer": list(config.vision_feature_layers),
            "intermediate_size": config.projector_hidden_size,
            "text_hidden_size": text.hidden_size,
        },
        text_config={
            "hidden_size": text.hidden_size,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.hidden_size // text.num_attention_heads,
            "vocab_size": text.vocab_size,
            "additional_vocab_size": config.extra_vocab_size,
            "attention_bias": True,
            "num_hidden_layers": text.num_hidden_layers,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
        },
        image_patch_id=config.image_token_id,
        tie_word_embeddings=False,
    )


def side_by_side(config: MolmoConfig, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sequences as rows of a batch for transformers' Molmo2: floats, patchified on the host."""
    vision = config.vision_config
    size, side = vision.patch_size, vision.image_size // vision.patch_size
    pixels = torch.cat([part["pixels"] for part in parts]).float() / 127.5 - 1
    pixels = pixels.unflatten(2, (side, size)).unflatten(1, (side, size)).transpose(2, 3).flatten(3).flatten(1, 2)
    ids, labels = torch.stack([part["ids"] for part in parts]), torch.stack([part["labels"] for part in parts])
    shifted = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, :-1]], 1)  # it shifts labels by itself
    crops = len(parts[0]["pixels"])
    windows = [part["pooling"] + number * crops * side * side for number, part in enumerate(parts)]
    per_crop = len(parts[0]["pooling"]) // crops
    rows = int(per_crop**0.5)
    grid = torch.tensor([rows, rows, rows * (crops - 1), rows])  # the first crop alone, the others in one column
    return {
        "input_ids": ids,
        "labels": shifted,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.stack([part["images"] for part in parts]),
        "pixel_values": pixels,
        "image_token_pooling": torch.cat(windows),
        "image_grids": grid.repeat(len(parts), 1),
        "image_num_crops": torch.full((len(parts),), crops),
    }


def measure(step: Callable[[], float], args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step (median, and smallest and largest), memory, and the first and last loss."""
    cuda = args.device == "cuda"
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    started = time.perf_counter()
    losses = [step() for _ in range(args.warmup)]
    synchronize()
    warmup = time.perf_counter() - started
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.steps):
        synchronize()
        started = time.perf_counter()
        losses.append(step())
        synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "ms": round(statistics.median(seconds) * 1000, 2),
        "ms_range": [round(min(seconds) * 1000, 2), round(max(seconds) * 1000, 2)],
        "warmup_s": round(warmup, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else None,
        "losses": [round(losses[0], 4), round(losses[-1], 4)],
    }


def profiled(step: Callable[[], float], file: str) -> None:
    """Writes a trace of two steps' kernels for chrome://tracing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        step()
    profiler.export_chrome_trace(file)


def rates(found: dict[str, Any], sequences: int, tokens: int, flops: float) -> dict[str, Any]:
    """Adds tokens/s, images/s and, where the FLOPs of a sequence are known, MFU."""
    seconds = found["ms"] / 1000
    return {
        **found,
        "sequences": sequences,
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds),
        "images_per_second": round(sequences / seconds, 2),
        "mfu": round(sequences * flops / seconds / PEAK, 4) if flops else None,
    }


def check_attention(device: torch.device) -> dict[str, float]:
    """Largest difference between block-sparse and dense attention, forward and (on a GPU) gradients of q, k and v.

    Random packs of messages and images; head widths of the family's models and of toy ones, lengths that are and are
    not whole blocks, fewer heads of keys than of queries.
    """
    worst = {"forward": 0.0, "gradients": 0.0}
    for number, (width, length) in enumerate([(64, 384), (72, 300), (128, 517), (24, 130), (16, 77), (128, 1024)]):
        rng = torch.Generator().manual_seed(number)
        rule = _random_rule(length, rng, device)
        q = torch.randn(2, 4, length, width, generator=rng).to(device).requires_grad_()
        k, v = (torch.randn(2, 2, length, width, generator=rng).to(device).requires_grad_() for _ in range(2))
        weight = torch.randn(2, length, 4, width, generator=rng).to(device)
        module = nn.Module()
        module.num_key_value_groups = 2  # type: ignore[assignment]
        found = []
        for mask in (dense_mask(rule, 2, length, device), block_mask(rule, 2, length, device)):
            forward_only = device.type == "cpu" and len(found) == 1  # FlexAttention has no backward there
            inputs = (q.detach(), k.detach(), v.detach()) if forward_only else (q, k, v)
            out = molmo_attention(module, *inputs, mask, scaling=width**-0.5)[0]
            grads = () if forward_only else torch.autograd.grad((out * weight).sum(), (q, k, v))
            found.append((out.detach(), grads))
        (dense, dense_grads), (block, block_grads) = found
        worst["forward"] = max(worst["forward"], float((dense - block).abs().max()))
        for one, other in zip(dense_grads, block_grads, strict=False):
            worst["gradients"] = max(worst["gradients"], float((one - other).abs().max()))
    return worst


def _random_rule(length: int, rng: torch.Generator, device: torch.device) -> Any:
    """Two rows of a few examples, each a prefix with an image and two branches."""
    ids = {name: torch.zeros(2, length, dtype=torch.long) for name in ("example", "segment", "image")}
    for row in range(2):
        cuts = sorted(torch.randint(1, length, (6,), generator=rng).tolist())
        for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, length], strict=True)):
            third = (end - start) // 3
            ids["example"][row, start:end] = number if number < 6 else -1
            ids["segment"][row, start : start + third] = 10_000
            ids["segment"][row, start + 2 * third : end] = 1
            ids["image"][row, start : start + third] = number + 1
    on_device = {name: tensor.to(device) for name, tensor in ids.items()}
    return allowed(on_device["example"], on_device["segment"], on_device["image"])


def check_model(device: torch.device) -> dict[str, float]:
    """Loss and largest gradient difference of a small model in fp32, block-sparse against dense masks."""
    if device.type == "cpu":
        return {}
    torch.manual_seed(0)
    config = build_config(molmo(tiny=True))
    model = MolmoForConditionalGeneration(config).float().to(device).train()
    parts = [sequence(config, TINY, torch.Generator().manual_seed(seed)) for seed in range(3)]
    batch = {name: tensor.to(device) for name, tensor in packed(config, parts).items()}
    ids = {name: batch[name] for name in ("example_ids", "segment_ids", "image_ids", "position_ids")}
    found = []
    for kind in ("dense", "block"):
        output = model(**batch, attention_mask=masks_for(config.text_config, **ids, kind=kind), use_cache=False)
        output.loss.backward()
        found.append((float(output.loss), {name: p.grad.clone() for name, p in model.named_parameters()}))
        model.zero_grad()
    (dense, dense_grads), (block, block_grads) = found
    largest = max(float((grad - block_grads[name]).abs().max()) for name, grad in dense_grads.items())
    return {"loss": abs(dense - block), "gradients": largest}


@contextmanager
def one_rank(device: str) -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{Path(folder)}/meet", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--model", choices=sorted(MODELS), default="molmo")
    parser.add_argument("--tokens", type=int, default=512, help="that a HeMolmo keeps of each image, 0: all")
    parser.add_argument("--sequences", type=int, default=4, help="of one step")
    parser.add_argument("--checkpointing", choices=("none", "full"), default="none")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer-sequences", type=int, default=2, help="4 need more than 80 GB without checkpointing")
    parser.add_argument("--peer-checkpointing", choices=("none", "full"), default="none")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--checks", action=argparse.BooleanOptionalAction, default=True, help="of masks, a minute or two"
    )
    parser.add_argument("--profile", metavar="FILE", help="trace of two of our steps, .json.gz")
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args(argv)
    args.peer = args.peer and args.model == "molmo"
    args.warmup = args.warmup or (3 if args.quick or args.tiny else 10)
    args.steps = args.steps or (5 if args.quick or args.tiny else 30)
    return args


def main(argv: list[str] | None = None) -> int:
    """Checks, then times ours and the peer; the last line is one JSON object."""
    args = arguments(argv)
    if args.peer and find_spec("transformers.models.molmo2") is None:
        print(f"transformers {version('transformers')} has no Molmo2 to compare with; 5.23 has", file=sys.stderr)
        return 1
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    checks: dict[str, dict[str, float]] = {}
    if args.checks:
        device = torch.device(args.device)
        checks = {"attention": check_attention(device), "model": check_model(device)}
    print("block-sparse against dense:", json.dumps(checks), flush=True)
    if (largest := max((value for check in checks.values() for value in check.values()), default=0.0)) > 5e-3:
        print(f"block-sparse and dense attention differ by {largest}, more than 5e-3", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.allow_tf32 = True
    params, shape = MODELS[args.model](args.tiny, args.tokens), TINY if args.tiny else FULL
    config, rng = build_config(params), torch.Generator().manual_seed(0)
    parts = [sequence(config, shape, rng) for _ in range(max(args.sequences, args.peer_sequences))]
    batch, flops = packed(config, parts[: args.sequences]), useful_flops(config, shape)
    if args.model == "he_molmo":
        batch, flops = gpu_batch(params, args.sequences, answer=shape.answered), 0.0
        batch["answered"] = answered_places(batch["labels"])
    tokens = int((batch["example_ids"] >= 0).sum())
    print(f"useful TFLOP of one sequence: {flops / 1e12:.2f}; {tokens} tokens in the row", flush=True)
    with torch.device("meta"):
        counts = parameter_counts(MolmoForConditionalGeneration(config))
    torch.manual_seed(0)
    with one_rank(args.device):
        step = our_step(config, args, batch)
        ours = rates(measure(step, args), args.sequences, tokens, flops)
        if args.profile:
            profiled(step, args.profile)
    del step
    print("ours:", json.dumps(ours), flush=True)
    peer: dict[str, Any] = {}
    if args.peer:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        step = peer_step(config, args, parts[: args.peer_sequences])
        peer = rates(measure(step, args), args.peer_sequences, args.peer_sequences * shape.tokens, flops)
        print("peer:", json.dumps(peer), flush=True)
    print(
        json.dumps(
            {
                "name": "gpu_train_step",
                "unit": "tokens/s",
                "ours": ours["tokens_per_second"],
                "peer": peer.get("tokens_per_second"),
                "peer_name": "transformers Molmo2ForConditionalGeneration, sdpa, autocast" if peer else None,
                "ratio": round(ours["tokens_per_second"] / peer["tokens_per_second"], 2) if peer else None,
                "spread": ours["ms_range"],
                "goal": {"mfu": GOAL},
                "versions": {name: version(name) for name in ("torch", "transformers")},
                "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                "model": args.model,
                "kept_tokens": args.tokens if args.model == "he_molmo" else None,
                "tiny": args.tiny,
                "compile": args.compile,
                "checkpointing": args.checkpointing,
                "parameters": counts,
                "useful_tflop_per_sequence": round(flops / 1e12, 3),
                "details": {"ours": ours, "peer": peer},
                "block_against_dense": checks,
            }
        )
    )
    return 0


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    sys.exit(main())
