"""The whole model against transformers' own Molmo2, an independent implementation, with copied weights.

Native Molmo2 knows SigLIP-type encoders and, of ours, Qwen3; it puts all images of a row into one bidirectional block.
"""

import pytest
import torch
from transformers.models.molmo2.configuration_molmo2 import Molmo2Config
from transformers.models.molmo2.modeling_molmo2 import Molmo2ForConditionalGeneration

from molmo_model.nn.build import build_model
from molmo_model.nn.generation import generate
from tests.nn.conftest import IM_PATCH, Conversation, crops_and_pooling, lay_out, random_weights, tensors


def native_config(config):
    vision, text = config.vision_config, config.text_config
    heads = {"num_attention_heads": vision.num_attention_heads, "num_key_value_heads": vision.num_attention_heads}
    return Molmo2Config(
        vision_config={
            **heads,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "head_dim": vision.hidden_size // vision.num_attention_heads,
            "hidden_act": vision.hidden_act,
            "layer_norm_eps": vision.layer_norm_eps,
            "image_size": [vision.image_size] * 2,
            "patch_size": vision.patch_size,
        },
        adapter_config={
            "vision_feature_layer": list(config.vision_feature_layers),
            "hidden_size": vision.hidden_size,
            "num_attention_heads": config.pooling_num_heads,
            "num_key_value_heads": config.pooling_num_heads,
            "head_dim": vision.hidden_size // config.pooling_num_heads,
            "intermediate_size": config.projector_hidden_size,
            "text_hidden_size": text.hidden_size,
            "hidden_act": "silu",
        },
        text_config={
            "hidden_size": text.hidden_size,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "vocab_size": text.vocab_size,
            "additional_vocab_size": config.extra_vocab_size,
            "attention_bias": False,
            "qk_norm_type": "qwen3",
            "norm_after": False,
            "num_hidden_layers": text.num_hidden_layers,
            "intermediate_size": text.intermediate_size,
            "hidden_act": text.hidden_act,
            "max_position_embeddings": text.max_position_embeddings,
            "rope_parameters": dict(text.rope_parameters),
            "rms_norm_eps": text.rms_norm_eps,
        },
        image_patch_id=config.image_token_id,
        tie_word_embeddings=False,
    )


def native_state(model):
    """Our tensors under Molmo2's names: one embedding table, a linear patch embedding in (row, column, channel)."""
    out = {}
    renames = (
        ("model.vision_backbone.connector.pooling.", "model.multi_modal_projector.image_pooling_2d."),
        ("model.vision_backbone.connector.projector.", "model.multi_modal_projector.image_projector."),
        ("model.vision_backbone.encoder.vit.encoder.", "model.vision_tower."),
        ("model.vision_backbone.encoder.vit.embeddings.patch_embedding.", "model.vision_tower.patch_embedding."),
    )
    for name, value in model.state_dict().items():
        renamed = name
        for ours, native in renames:
            renamed = renamed.replace(ours, native)
        if "vision_tower" in renamed:
            renamed = renamed.replace("out_proj", "o_proj")
        if name.endswith("position_embedding.weight"):
            renamed = "model.vision_tower.positional_embedding"
        linear = name.endswith("patch_embedding.weight")
        out[renamed] = value.permute(0, 2, 3, 1).flatten(1) if linear else value
    extra = out.pop("model.extra_embedding.weight")
    table = "model.language_model.embed_tokens.weight"
    out[table] = torch.cat([out[table], extra])
    return out


def patches(pixels, size):
    """Normalised [C, 3, H, W] to [C, patches, row * column * channel]."""
    crops, channels, height, width = pixels.shape
    grid = pixels.reshape(crops, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(crops, -1, size * size * channels)


@pytest.fixture
def pair(make_params):
    params = make_params(family="qwen3", connector={"window_position_embedding": False, "pooling_attention_mask": True})
    ours = random_weights(build_model(params, seed=1)).eval()
    native = Molmo2ForConditionalGeneration(native_config(ours.config)).eval()
    native.load_state_dict(native_state(ours), strict=True)
    return ours, native


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
