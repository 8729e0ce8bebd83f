"""Batched greedy answers through transformers' `generate`.

Images are encoded once, in front of the prefill; rows are padded on the left; an image's tokens see each other in both
directions there, as in training.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from molmo_model.nn.molmo import MolmoForConditionalGeneration


def generate(
    model: MolmoForConditionalGeneration,
    batch: Mapping[str, Tensor],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
) -> list[list[int]]:
    """The greedy answer of every row, without the end token: shorter than `max_new_tokens` exactly if it was said.

    Args:
        batch: `input_ids` and `attention_mask` [B, S], padded on the left; `image_ids` [B, S]; `pixel_values`,
            `pooling` and `image_token_counts` (tokens of each image, in the order of the rows). The last three may be
            empty or left out where no row has an image.
        eos_token_ids: tokens that end an answer.
    """
    device = model.device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    inputs["mm_token_type_ids"] = batch["image_ids"].to(device)
    if len(batch.get("pooling", ())):
        inputs |= {name: batch[name].to(device) for name in ("pixel_values", "pooling", "image_token_counts")}
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids),
        pad_token_id=eos_token_ids[0],
        use_cache=True,
    )
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            sequences = model.generate(**inputs, generation_config=config)
    finally:
        model.train(was_training)
    return [_until(row, set(eos_token_ids)) for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]


def finish_reason(tokens: Sequence[int], max_new_tokens: int) -> str:
    """`stop` if the model ended its answer, `length` if it was cut off."""
    return "stop" if len(tokens) < max_new_tokens else "length"


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[:index]
    return tokens
