"""Named sizes of the model family: what `models.<name>.preset` stands for.

A preset is a plain mapping of the keys that a model of `params.yaml` has; what the model itself gives stands over it,
key by key (`merge`). Presets give sizes, not weights: `vision.pretrained` and `language.pretrained` beside a preset
load the parts that the published models began from, and the sizes are checked against them.

Sources: the configurations of the published models and of their parts (OpenAI CLIP ViT-L/14-336, SigLIP2 so400m, Qwen2,
Qwen3, OLMo-7B-1024-preview, OLMo 3, OLMoE-1B-7B). The projector is as wide inside as the language model's MLP.
"""

from collections.abc import Mapping
from typing import Any

Preset = Mapping[str, Any]

_CLIP_L14_336 = {  # 577 positions; 23 of its 24 blocks are counted, of which 22 are built
    "vision": {
        "encoder": "clip",
        "image_size": 336,
        "patch_size": 14,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_layers": 23,
        "num_heads": 16,
        "feature_layers": [-2, -9],
    },
    "connector": {
        "pooling": "attention_meanq",
        "num_heads": 16,
        "pooling_attention_mask": False,
        "padding_embedding": "pad_and_partial_pad",
        "projector": "mlp",
    },
    "preprocessing": {"max_crops": 12, "message_format": "role"},
}
"""What the four models of 2024 share. Their attention was causal on image tokens too."""
_SIGLIP2_SO400M = {  # 378 / 14 = 27, 729 positions; 25 of 27 blocks are built
    "vision": {
        "encoder": "siglip2",
        "image_size": 378,
        "patch_size": 14,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_layers": 27,
        "num_heads": 16,
        "feature_layers": [-3, -9],
    },
    "connector": {
        "pooling": "attention_meanq",
        "num_heads": 16,
        "pooling_attention_mask": True,
        "projector": "mlp",
    },
    "preprocessing": {"max_crops": 8, "message_format": "chatml"},
}
"""What the Molmo2 models share; with `one_image_block` they can be exported to transformers' class."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` put in, mapping by mapping; a list or a plain value replaces the whole."""
    merged = dict(base)
    for name, value in over.items():
        below = merged.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[name] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _sized(shared: Preset, tokenizer: str, **language: Any) -> Preset:
    width = language["intermediate_size"]
    own = {"language": {"extra_vocab_size": 128, **language}, "connector": {"projector_hidden_size": width}}
    return merge(merge(shared, own), {"tokenizer": tokenizer})


PRESETS: dict[str, Preset] = {
    "molmoe-1b": _sized(
        _CLIP_L14_336,
        "allenai/OLMoE-1B-7B-0924",
        family="olmoe",
        hidden_size=2048,
        intermediate_size=1024,
        num_layers=16,
        num_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_token=8,
        vocab_size=50304,
        rope_theta=10000.0,
        bidirectional_images=False,
    ),
    "molmo-7b-d": _sized(
        _CLIP_L14_336,
        "Qwen/Qwen2-7B",
        family="qwen2",
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        rope_theta=1000000.0,
        bidirectional_images=False,
    ),
    "molmo-7b-o": _sized(
        _CLIP_L14_336,
        "allenai/dolma2-tokenizer",
        family="olmo2",
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_key_value_heads=32,
        vocab_size=100352,
        rope_theta=500000.0,
        bidirectional_images=False,
    ),
    "molmo-72b": _sized(
        _CLIP_L14_336,
        "Qwen/Qwen2-72B",
        family="qwen2",
        hidden_size=8192,
        intermediate_size=29568,
        num_layers=80,
        num_heads=64,
        num_key_value_heads=8,
        vocab_size=152064,
        rope_theta=1000000.0,
        bidirectional_images=False,
    ),
    "molmo2-4b": _sized(
        _SIGLIP2_SO400M,
        "Qwen/Qwen3-4B-Instruct-2507",
        family="qwen3",
        hidden_size=2560,
        intermediate_size=9728,
        num_layers=36,
        num_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        rope_theta=5000000.0,
        max_position_embeddings=16384,
        one_image_block=True,
    ),
    "molmo2-8b": _sized(
        _SIGLIP2_SO400M,
        "Qwen/Qwen3-8B",
        family="qwen3",
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        rope_theta=1000000.0,
        max_position_embeddings=36864,
        one_image_block=True,
    ),
    "molmo2-o-7b": _sized(
        _SIGLIP2_SO400M,
        "allenai/Olmo-3-1025-7B",
        family="olmo3",
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_key_value_heads=32,
        vocab_size=100278,
        rope_theta=500000.0,
        sliding_window=4096,
        max_position_embeddings=8192,
        one_image_block=True,
    ),
    # for two CPU cores: the model of the shipped params.yaml
    "demo": {
        "tokenizer": "molmo_model/preprocessing/tokenizers/bytes512",
        "vision": {
            "encoder": "siglip",
            "image_size": 64,
            "patch_size": 16,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_layers": 2,
            "num_heads": 4,
            "feature_layers": [-1, -2],
        },
        "connector": {
            "pooling": "attention_meanq",
            "num_heads": 4,
            "window_position_embedding": True,
            "projector_hidden_size": 128,
        },
        "language": {
            "family": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_layers": 2,
            "num_heads": 4,
            "num_key_value_heads": 4,
        },
        "preprocessing": {"crop_mode": "overlap_and_resize_c2", "max_crops": 6, "overlap_margins": [1, 1]},
    },
}
PRESETS["demo-native"] = merge(
    PRESETS["demo"],
    {
        "connector": {"window_position_embedding": False},
        "language": {"family": "qwen3", "one_image_block": True},
    },
)
"""As small, and of a form that can be exported to transformers' Molmo2."""
PRESETS["demo-moe"] = merge(
    PRESETS["demo"],
    {"language": {"family": "olmoe", "intermediate_size": 64, "num_experts": 8, "num_experts_per_token": 2}},
)
"""As small, with eight experts of which each token uses two."""
