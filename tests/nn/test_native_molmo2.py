"""The whole model against transformers' own Molmo2, an independent implementation, with copied weights.

Native Molmo2 knows SigLIP-type encoders and, of ours, Qwen3; it puts all images of a row into one bidirectional block.
"""

import pytest
import torch

from molmo_model.nn.build import build_model
from molmo_model.nn.convert_molmo2 import to_native
from molmo_model.nn.generation import generate
from tests.nn.conftest import IM_PATCH, Conversation, crops_and_pooling, lay_out, random_weights, tensors


def patches(pixels, size):
    """Normalised [C, 3, H, W] to [C, patches, row * column * channel]."""
    crops, channels, height, width = pixels.shape
    grid = pixels.reshape(crops, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(crops, -1, size * size * channels)


@pytest.fixture
def pair(make_params):
    params = make_params(family="qwen3", connector={"window_position_embedding": False, "pooling_attention_mask": True})
    ours = random_weights(build_model(params, seed=1)).eval()
    return ours, to_native(ours, max_images=1)


@torch.no_grad()
def test_logits_and_answers_equal_native_molmo2(pair):
    ours, native = pair
    rng = torch.Generator().manual_seed(7)
    row = lay_out(Conversation([9], 6, []), rng)
    pixels, pooling = crops_and_pooling([9], rng)
    pixels = torch.cat([pixels, 255 - pixels])  # a second crop, that the last tokens look at
    pooling[5:] = torch.where(pooling[5:] < 0, -1, pooling[5:] + 16)
    batch = tensors([row])
    normalized = ours.model.vision_backbone.normalize(pixels)
    is_image = batch["image_ids"] > 0
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": torch.ones_like(batch["input_ids"]),
        "mm_token_type_ids": is_image.long(),
        "pixel_values": patches(normalized, 8),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[1, 3, 2, 3]]),  # 3 tokens of the global crop, 6 of the others
    }
    expected = native(**inputs).logits
    images = {"pixel_values": pixels, "pooling": pooling}
    found = ours(**images, **{k: v for k, v in batch.items() if k not in ("labels", "loss_weights")}).logits
    assert int((batch["input_ids"] == IM_PATCH).sum()) == 9
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)  # measured on a CPU: 0.0, of logits up to 3.3
    answer = native.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1)[0, len(row.ids) :].tolist()
    prompt = {
        "input_ids": batch["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "image_ids": batch["image_ids"],
        "image_token_counts": torch.tensor([9]),
        **images,
    }
    assert generate(ours, prompt, 8, [10**6]) == [answer]
