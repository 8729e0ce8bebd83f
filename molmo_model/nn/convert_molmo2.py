"""Weights to and from transformers' native Molmo2 (`Molmo2ForConditionalGeneration`), tensor by tensor.

The native class is served by programs that know nothing of this project. It expresses part of what a model can be here:
language models with query and key norms (Qwen3, OLMo2, OLMo3 within its window), a SigLIP-type encoder, masked
mean-query pooling, a SwiGLU projector, and one block of bidirectional attention over all images of a row. What it
cannot express is refused by name; what it can has equal logits.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.molmo2.configuration_molmo2 import Molmo2Config
from transformers.models.molmo2.modeling_molmo2 import Molmo2ForConditionalGeneration

from molmo_model.errors import CheckpointError, ConfigError
from molmo_model.nn.build import restore_buffers
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.nn.pretrained import load_model, require_none_missing

NORM_AFTER = ("olmo2", "olmo3")
"""Language models whose norms follow attention and MLP; their query and key norms span all heads."""
TEXT_TYPES = ("qwen3", *NORM_AFTER)
EXPRESSIBLE: dict[str, tuple[Any, ...]] = {
    "pooling": ("attention_meanq",),
    "pooling_attention_mask": (True,),
    "projector": ("mlp",),
    "window_position_embedding": (False,),
    "padding_embedding": (None, "none"),
    "num_queries": (1,),
    "hierarchical": (False,),
    "vision_positions": (None, "native"),
    "selector": (None,),
    "temporal_position_embedding": (False,),
    "temporal_attention_layers": (0,),
}
"""Values that each field of `MolmoConfig` must have; a field that the configuration lacks is not in use."""
LAYER_NORMS = (
    ("post_attention_layernorm", "input_layernorm"),
    ("post_feedforward_layernorm", "post_attention_layernorm"),
)
"""OLMo2's names of the norms behind attention and MLP, and Molmo2's."""
RENAMES = (
    ("model.vision_backbone.connector.pooling.", "model.multi_modal_projector.image_pooling_2d."),
    ("model.vision_backbone.connector.projector.", "model.multi_modal_projector.image_projector."),
    ("model.vision_backbone.encoder.vit.encoder.layers.", "model.vision_tower.layers."),
    ("model.vision_backbone.encoder.vit.embeddings.patch_embedding.", "model.vision_tower.patch_embedding."),
    (
        "model.vision_backbone.encoder.vit.embeddings.position_embedding.weight",
        "model.vision_tower.positional_embedding",
    ),
)
TABLE, EXTRA = "model.language_model.embed_tokens.weight", "model.extra_embedding.weight"
PATCHES = "model.vision_tower.patch_embedding.weight"


def longest(config: MolmoConfig) -> int:
    """Positions up to which the native class computes the same: sliding layers have no window there."""
    text = config.text_config
    window = text.sliding_window if "sliding_attention" in (getattr(text, "layer_types", None) or ()) else None
    return text.max_position_embeddings if window is None else min(window, text.max_position_embeddings)


def require_expressible(config: MolmoConfig, max_images: int | None = None, max_positions: int | None = None) -> None:
    """Refuses what native Molmo2 cannot compute.

    Args:
        max_images: images of one example; with one, attention within one image is attention within all.
        max_positions: sequence length that the export is meant for.

    Raises:
        ConfigError: names every field that stands in the way.
    """
    text, vision = config.text_config, config.vision_config
    wrong = []
    if text.model_type not in TEXT_TYPES:
        reason = "Molmo2 has query and key norms and no bias" if text.model_type in ("qwen2", "llama", "olmo") else ""
        wrong.append(
            f"language model {text.model_type} (only {', '.join(TEXT_TYPES)}{'; ' + reason if reason else ''})"
        )
    elif getattr(text, "attention_bias", False):
        wrong.append("attention_bias: true of the language model, whose output matrix has none there")
    if vision.model_type != "siglip_vision_model":
        wrong.append(
            f"vision encoder {config.vision_encoder} (only SigLIP-type: no class token, no norm before blocks)"
        )
    for name, allowed in EXPRESSIBLE.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            wrong.append(f"{name}: {value}")
    if not config.bidirectional_images:
        wrong.append("bidirectional_images: false (there, image tokens always see each other)")
    elif not config.one_image_block and max_images != 1:
        wrong.append(
            "attention within each image (there, all images of a row are one block): train with "
            "language.one_image_block, or with preprocessing.max_images: 1"
        )
    if max_positions is not None and max_positions > longest(config):
        wrong.append(f"{max_positions} positions: it is equal up to {longest(config)} only")
    if wrong:
        raise ConfigError(f"transformers' Molmo2 cannot express {'; '.join(wrong)}")


def native_config(config: MolmoConfig, max_positions: int | None = None) -> Molmo2Config:
    """The configuration of the native class. Check with `require_expressible` first."""
    vision, text = config.vision_config, config.text_config
    rope, scaled = _native_rope(text)
    first = text.vocab_size
    return Molmo2Config(
        vision_config={
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "num_key_value_heads": vision.num_attention_heads,
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
            "head_dim": _head_dim(text),
            "vocab_size": text.vocab_size,
            "additional_vocab_size": config.extra_vocab_size,
            "attention_bias": False,
            "qk_norm_type": "olmo" if text.model_type in NORM_AFTER else "qwen3",
            "norm_after": text.model_type in NORM_AFTER,
            "num_hidden_layers": text.num_hidden_layers,
            "intermediate_size": text.intermediate_size,
            "hidden_act": text.hidden_act,
            "max_position_embeddings": max_positions or longest(config),
            "rope_parameters": rope,
            "rope_scaling_layers": scaled,
            "rms_norm_eps": text.rms_norm_eps,
        },
        image_start_token_id=first,
        image_end_token_id=first + 1,
        image_patch_id=config.image_token_id,
        low_res_image_start_token_id=first,
        frame_start_token_id=first,
        frame_end_token_id=first + 1,
        tie_word_embeddings=False,
        dtype="float32",
    )


def native_state(state: dict[str, Tensor], config: MolmoConfig) -> dict[str, Tensor]:
    """Our tensors under the native class's names: one embedding table, patches as a matrix over (row, column, channel).
    A tied head becomes a copy, since the native head has no rows for the extra ids."""
    after = config.text_config.model_type in NORM_AFTER
    out = {}
    for name, value in state.items():
        renamed = _rename(name, RENAMES)
        if after and renamed.startswith("model.language_model."):
            renamed = _rename(renamed, LAYER_NORMS)
        if renamed.startswith("model.vision_tower."):
            renamed = renamed.replace("out_proj", "o_proj")
        out[renamed] = value.permute(0, 2, 3, 1).flatten(1).contiguous() if renamed == PATCHES else value
    out["lm_head.weight"] = out.get("lm_head.weight", out[TABLE]).clone()
    out[TABLE] = torch.cat([out[TABLE], out.pop(EXTRA)])
    return out


def to_native(
    model: MolmoForConditionalGeneration, max_images: int | None = None, max_positions: int | None = None
) -> Molmo2ForConditionalGeneration:
    """The native model with the same weights and equal logits.

    Raises:
        ConfigError: see `require_expressible`.
        CheckpointError: the weights do not fit what the configuration says.
    """
    require_expressible(model.config, max_images, max_positions)
    with torch.device("meta"):
        native = Molmo2ForConditionalGeneration(native_config(model.config, max_positions))
    load_strictly(native, native_state(model.state_dict(), model.config), "Molmo2")
    restore_native_buffers(native)
    native.generation_config = model.generation_config
    return native.eval()


def our_config(native: Molmo2Config) -> MolmoConfig:
    """The configuration of a native Molmo2 here.

    Raises:
        ConfigError: it uses something that models here do not have.
    """
    vision, adapter, text = native.vision_config, native.adapter_config, native.text_config
    _require_plain(vision, adapter, text)
    side = vision.image_size[0]
    encoder = AutoConfig.for_model(
        "siglip_vision_model",
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        image_size=side,
        patch_size=vision.patch_size,
        vision_use_head=False,
    )
    layers = [layer % vision.num_hidden_layers for layer in adapter.vision_feature_layer]
    return MolmoConfig(
        dtype=torch.float32,
        vision_config=encoder,
        text_config=_our_text_config(text),
        vision_encoder="siglip",
        vision_feature_layers=layers,
        pooling="attention_meanq",
        pooling_num_heads=adapter.num_attention_heads,
        pooling_attention_mask=True,
        projector="mlp",
        projector_hidden_size=adapter.intermediate_size,
        extra_vocab_size=text.additional_vocab_size,
        image_token_id=native.image_patch_id,
        bidirectional_images=True,
        one_image_block=True,
    )


def our_state(native: dict[str, Tensor], config: MolmoConfig) -> dict[str, Tensor]:
    """The native class's tensors under our names; the way back of `native_state`."""
    after = config.text_config.model_type in NORM_AFTER
    vision, back = config.vision_config, tuple((theirs, ours) for ours, theirs in RENAMES)
    out = {}
    for name, value in native.items():
        renamed = name.replace("o_proj", "out_proj") if name.startswith("model.vision_tower.") else name
        if after and renamed.startswith("model.language_model."):
            renamed = _rename(renamed, tuple((theirs, ours) for ours, theirs in LAYER_NORMS))
        if name == PATCHES:
            value = value.unflatten(1, (vision.patch_size, vision.patch_size, -1)).permute(0, 3, 1, 2).contiguous()  # noqa: PLW2901
        out[_rename(renamed, back)] = value
    rows = config.text_config.vocab_size
    out[EXTRA] = out[TABLE][rows:].clone()
    out[TABLE] = out[TABLE][:rows].clone()
    return out


def load_native(folder: str | Path) -> MolmoForConditionalGeneration:
    """The model of a folder or hub id of native Molmo2, whichever names its tensors were saved under.

    Raises:
        ConfigError: it is no Molmo2, or uses what models here do not have.
        CheckpointError: tensors are missing.
    """
    native, info = load_model(Molmo2ForConditionalGeneration, str(folder))
    require_none_missing(str(folder), info["missing_keys"], info)
    config = our_config(native.config)
    with torch.device("meta"):
        model = MolmoForConditionalGeneration(config)
    load_strictly(model, our_state(native.state_dict(), config), "this project's")
    restore_our_buffers(model)
    model.generation_config = native.generation_config
    return model.eval()


def restore_our_buffers(model: MolmoForConditionalGeneration) -> None:
    """Makes the buffers that no checkpoint holds after a model was built on the meta device."""
    _buffers_from_meta(model)
    restore_buffers(model)


def restore_native_buffers(native: Molmo2ForConditionalGeneration) -> None:
    """The same for the native class: its rotary tables."""
    _buffers_from_meta(native)
    text = native.model.language_model
    for rotary, scaled in ((text.rotary_emb, True), (text.rotary_emb_unscaled, False)):
        fresh = type(rotary)(text.config, scaled=scaled)
        rotary.inv_freq.copy_(fresh.inv_freq)
        rotary.original_inv_freq.copy_(fresh.original_inv_freq)


def _buffers_from_meta(model: torch.nn.Module) -> None:
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device.type == "meta":
                setattr(module, name, torch.empty_like(buffer, device="cpu"))


def load_strictly(model: torch.nn.Module, state: dict[str, Tensor], whose: str) -> None:
    """Puts converted tensors into a model on the meta device.

    Raises:
        CheckpointError: names or shapes differ.
    """
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit {whose} layout: {str(error)[:800]}") from error
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """The first match of the table is replaced, so that a swap of two names does not undo itself."""
    for old, new in table:
        if old in name:
            return name.replace(old, new)
    return name


def _head_dim(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _native_rope(text: PreTrainedConfig) -> tuple[dict[str, Any], list[int] | None]:
    """One set of rotary parameters, and the layers that scale them: OLMo3's sliding layers do not."""
    rope = text.rope_parameters
    if "full_attention" not in rope:
        return dict(rope), None
    full, sliding = dict(rope["full_attention"]), dict(rope.get("sliding_attention", rope["full_attention"]))
    if full == sliding:
        return full, None
    if sliding.get("rope_type", "default") != "default" or full["rope_theta"] != sliding["rope_theta"]:
        raise ConfigError(f"transformers' Molmo2 cannot express rotary parameters {rope}: one base, scaled or not")
    return full, [number for number, kind in enumerate(text.layer_types) if kind == "full_attention"]


def _require_plain(vision: Any, adapter: Any, text: Any) -> None:
    wrong = []
    if vision.image_size[0] != vision.image_size[1]:
        wrong.append(f"crops of {vision.image_size} pixels, which are not square")
    if vision.head_dim * vision.num_attention_heads != vision.hidden_size or not vision.attention_bias:
        wrong.append(f"vision heads of {vision.head_dim}, or without bias")
    if (
        vision.num_key_value_heads != vision.num_attention_heads
        or adapter.num_key_value_heads != adapter.num_attention_heads
    ):
        wrong.append("fewer key-value than query heads in the encoder or the pooling")
    if adapter.head_dim * adapter.num_attention_heads != vision.hidden_size:
        wrong.append(f"pooling heads of {adapter.head_dim} x {adapter.num_attention_heads}")
    if not adapter.attention_bias or adapter.mlp_bias or adapter.hidden_act != "silu":
        wrong.append("an adapter with other biases or another activation")
    if text.attention_bias:
        wrong.append("biases on queries, keys and values beside their norms")
    if (text.qk_norm_type == "olmo") != text.norm_after:
        wrong.append(f"qk_norm_type {text.qk_norm_type} with norm_after {text.norm_after}")
    if wrong:
        raise ConfigError(f"this Molmo2 has {'; '.join(wrong)}, which models here do not have")


def _our_text_config(text: Any) -> PreTrainedConfig:
    """Qwen3, OLMo2, or OLMo3 with nothing but full layers where only some of them scale their rotary tables."""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "num_hidden_layers")
    more = ("intermediate_size", "hidden_act", "max_position_embeddings", "rms_norm_eps")
    fields = {name: getattr(text, name) for name in (*names, *more)}
    fields |= {"attention_bias": False, "tie_word_embeddings": False, "initializer_range": text.initializer_range}
    rope, scaled = dict(text.rope_parameters), text.rope_scaling_layers
    family = "olmo2" if text.norm_after else "qwen3"
    if scaled is not None and len(scaled) < text.num_hidden_layers and rope.get("rope_type", "default") != "default":
        if family != "olmo2":
            raise ConfigError("this Molmo2 scales the rotary tables of some layers only, which Qwen3 does not here")
        family = "olmo3"
        fields["layer_types"] = [
            "full_attention" if number in scaled else "sliding_attention" for number in range(text.num_hidden_layers)
        ]
        fields["sliding_window"] = text.max_position_embeddings  # never reached: there is no window there
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": rope["rope_theta"]}}
    if family == "qwen3":
        fields["head_dim"] = text.head_dim
    elif text.head_dim * text.num_attention_heads != text.hidden_size:
        raise ConfigError(f"this Molmo2 has heads of {text.head_dim} x {text.num_attention_heads}, OLMo has no such")
    return AutoConfig.for_model(
        family, rope_parameters=rope, bos_token_id=None, eos_token_id=None, pad_token_id=None, **fields
    )
