"""Weights of the Molmo models released in 2024 (Molmo-7B-D, Molmo-7B-O, Molmo-72B, MolmoE-1B), in their own layout.

Those folders hold code of their own, which newer transformers do not run. Here their tensors become ours: fused
projections are split (queries, keys, values; of the SwiGLU the second half is the gate), the patch matrix becomes a
convolution, experts are stacked, and the language model becomes the family of transformers that computes the same:

    biases on queries, keys and values -> Qwen2        norms behind the blocks, query and key norms -> OLMo 2
    experts, query and key norms       -> OLMoE        none of these                                -> Llama

Attention is causal on image tokens too, pooling counts no holes (there are none), and the padding embedding of
letterboxed crops is kept. Facts are from the published `config.json` files and tensor names.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from molmo_model.errors import CheckpointError, ConfigError
from molmo_model.nn.convert_molmo2 import load_strictly, restore_our_buffers
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.molmo_config import MolmoConfig

MODEL_TYPE = "molmo"
"""`model_type` of the released configurations."""
CLIP_L14_336: dict[str, Any] = {
    "image_default_input_size": [336, 336],
    "image_patch_size": 14,
    "image_emb_dim": 1024,
    "image_num_heads": 16,
    "image_num_layers": 23,
    "image_mlp_dim": 4096,
    "image_mlp_activations": "quick_gelu",
    "image_norm_eps": 1e-5,
}
"""The encoder that a configuration without `vision_backbone` means; the 7B and 72B models have it in their code."""
OLDER_NAMES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "mlp_hidden_size",
    "tie_word_embeddings": "weight_tying",
}
"""MolmoE's configuration has the names of the training code."""
PLAIN: dict[str, tuple[Any, ...]] = {
    "layer_norm_type": ("rms",),
    "activation_type": ("swiglu",),
    "clip_qkv": (None,),
    "rope_impl": ("llama",),
    "rope_scaling": (None,),
    "include_bias": (False,),
    "use_cls_feature": (False,),
    "normalize_input_embeds": (False,),
    "scale_logits": (False,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "image_pooling_2d": ("attention-meanq", "attention_meanq"),
    "image_projector": ("mlp",),
    "head_dim": (None,),
}
"""What the conversion takes for granted; a field that is absent has the first value."""
EMBEDDING, NEW_EMBEDDING = "model.transformer.wte.embedding", "model.transformer.wte.new_embedding"
VIT, OUR_VIT = "model.vision_backbone.image_vit.", "model.vision_backbone.encoder.vit."
POOLING, OUR_POOLING = "model.vision_backbone.image_pooling_2d.", "model.vision_backbone.connector.pooling."
PROJECTOR, OUR_PROJECTOR = "model.vision_backbone.image_projector.", "model.vision_backbone.connector.projector."
BLOCK = re.compile(r"model\.transformer\.blocks\.(\d+)\.(?:attn\.|self_attn\.|mlp\.(?=ff_))?(.+)")
RESBLOCK = re.compile(re.escape(VIT) + r"transformer\.resblocks\.(\d+)\.(.+)")
ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj"}
VIT_NAMES = {
    **{f"attention.{theirs}": f"self_attn.{ours}" for theirs, ours in ATTENTION.items()},
    "attention.wo": "self_attn.out_proj",
    "feed_forward.w1": "mlp.fc1",
    "feed_forward.w2": "mlp.fc2",
    "attention_norm": "layer_norm1",
    "ffn_norm": "layer_norm2",
}
WHOLE = {
    "model.transformer.ln_f.weight": "model.language_model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
    "lm_head.weight": "lm_head.weight",
    f"{VIT}class_embedding": f"{OUR_VIT}embeddings.class_embedding",
    f"{VIT}positional_embedding": f"{OUR_VIT}embeddings.position_embedding.weight",
    f"{VIT}pre_ln.weight": f"{OUR_VIT}pre_layrnorm.weight",
    f"{VIT}pre_ln.bias": f"{OUR_VIT}pre_layrnorm.bias",
    **{f"{PROJECTOR}{a}.weight": f"{OUR_PROJECTOR}{b}.weight" for a, b in (("w1", "gate_proj"), ("w3", "up_proj"))},
    f"{PROJECTOR}w2.weight": f"{OUR_PROJECTOR}down_proj.weight",
    **{
        f"{POOLING}{theirs}.{kind}": f"{OUR_POOLING}{ours}.{kind}"
        for theirs, ours in (*ATTENTION.items(), ("wo", "o_proj"))
        for kind in ("weight", "bias")
    },
}


def released_config(raw: Mapping[str, Any], source: str = "config.json") -> MolmoConfig:
    """Our configuration of a released one.

    Raises:
        ConfigError: it is none of these models, or has what the conversion does not know.
    """
    if raw.get("model_type") != MODEL_TYPE:
        raise ConfigError(f"{source}: model_type is {raw.get('model_type')!r}; the models of 2024 have {MODEL_TYPE!r}")
    for name, known in PLAIN.items():
        if raw.get(name, known[0]) not in known:
            raise ConfigError(f"{source}: {name} is {raw[name]!r}; the conversion knows {known}")
    vision = {**CLIP_L14_336, **(raw.get("vision_backbone") or {})}
    text, depth = _text_config(raw, source), vision["image_num_layers"]
    layers = [layer % depth for layer in raw.get("vit_layers", [-2, -9])]
    encoder = AutoConfig.for_model(
        "clip_vision_model",
        hidden_size=vision["image_emb_dim"],
        intermediate_size=vision["image_mlp_dim"],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=vision["image_num_heads"],
        image_size=vision["image_default_input_size"][0],
        patch_size=vision["image_patch_size"],
        hidden_act=vision["image_mlp_activations"],
        layer_norm_eps=vision["image_norm_eps"],
    )
    return MolmoConfig(
        dtype=torch.float32,
        vision_config=encoder,
        text_config=text,
        vision_encoder="clip",
        vision_feature_layers=layers,
        pooling="attention_meanq",
        pooling_size=[raw.get("image_pooling_h", 2), raw.get("image_pooling_w", 2)],
        pooling_num_heads=vision["image_num_heads"],
        pooling_attention_mask=False,
        padding_embedding=raw.get("image_padding_embed", "pad_and_partial_pad") or "none",
        projector="mlp",
        projector_hidden_size=_fused_width(raw) // 2,
        extra_vocab_size=raw.get("additional_vocab_size") or 128,
        bidirectional_images=False,
    )


def released_state(
    tensors: Mapping[str, Tensor], config: MolmoConfig, token_ids: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The released tensors under our names, in fp32.

    Args:
        tensors: by published name; vision blocks that no feature layer needs may be there and are left out.
        token_ids: ids in the released vocabulary of our extra tokens, in our order. Some releases have them among the
            rows of the base embedding; their vectors are copied to the extra embedding, where ours are. None: they
            begin where the base embedding ends.

    Raises:
        CheckpointError: a tensor has a name that the layout does not have.
    """
    out: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, stored in tensors.items():
        value = stored.float() if stored.is_floating_point() else stored
        if name in WHOLE:
            out[WHOLE[name]] = value
        elif match := BLOCK.fullmatch(name):
            _text_block(int(match[1]), match[2], value, config, out, experts)
        elif match := RESBLOCK.fullmatch(name):
            if int(match[1]) < config.vision_config.num_hidden_layers:
                part, kind = match[2].rsplit(".", 1)
                out[f"{OUR_VIT}encoder.layers.{match[1]}.{_known(VIT_NAMES, part, name)}.{kind}"] = value
        elif name == f"{VIT}patch_embedding.weight":  # columns are (row, column, channel)
            side = config.vision_config.patch_size
            out[f"{OUR_VIT}embeddings.patch_embedding.weight"] = value.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
        elif name == "model.vision_backbone.pad_embed":
            out["model.vision_backbone.connector.padding.weight"] = value.reshape(-1, value.shape[-1])
        elif name not in (EMBEDDING, NEW_EMBEDDING):
            raise CheckpointError(f"tensor {name} is not of the layout of the models released in 2024")
    _embeddings(tensors, config, token_ids, out)
    for prefix, by_number in experts.items():
        out[prefix] = torch.stack([by_number[number] for number in sorted(by_number)])
    _join_gates(out)
    return {name: value.contiguous() for name, value in out.items()}


def load_released(folder: str | Path, token_ids: Sequence[int] | None = None) -> MolmoForConditionalGeneration:
    """The model of a folder as released: `config.json` and safetensors. All weights are held in memory in fp32.

    Raises:
        ConfigError, CheckpointError: see `released_config` and `released_state`; or files are missing.
    """
    folder = Path(folder)
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    config = released_config(raw, str(folder / "config.json"))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors")
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    with torch.device("meta"):
        model = MolmoForConditionalGeneration(config)
    load_strictly(model, released_state(tensors, config, token_ids), str(folder))
    restore_our_buffers(model)
    return model.eval()


def _text_config(raw: Mapping[str, Any], source: str) -> PreTrainedConfig:
    bias, norms, after = (bool(raw.get(name)) for name in ("qkv_bias", "attention_layer_norm", "norm_after"))
    experts = raw.get("moe_num_experts") or 0
    families = {
        (True, False, False, False): "qwen2",
        (False, True, True, False): "olmo2",
        (False, True, False, True): "olmoe",
        (False, False, False, False): "llama",
    }
    family = families.get((bias, norms, after, experts > 0))
    if family is None:
        raise ConfigError(
            f"{source}: qkv_bias {bias}, attention_layer_norm {norms}, norm_after {after} and {experts} experts "
            "together are no language model that transformers has"
        )
    heads = _value(raw, "num_attention_heads")
    fields: dict[str, Any] = {}
    if experts:
        fields = {"num_experts": experts, "num_experts_per_tok": raw["moe_top_k"], "norm_topk_prob": False}
    return AutoConfig.for_model(
        family,
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=_value(raw, "hidden_size"),
        intermediate_size=_fused_width(raw) // 2,
        num_hidden_layers=_value(raw, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_value(raw, "num_key_value_heads") or heads,
        max_position_embeddings=raw.get("max_position_embeddings") or raw["max_sequence_length"],
        rms_norm_eps=raw.get("layer_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": float(raw.get("rope_theta", 10000.0))},
        tie_word_embeddings=bool(_value(raw, "tie_word_embeddings")),
        initializer_range=raw.get("initializer_range", 0.02),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **fields,
    )


def _value(raw: Mapping[str, Any], name: str) -> Any:
    return raw[name] if name in raw else raw.get(OLDER_NAMES[name])


def _fused_width(raw: Mapping[str, Any]) -> int:
    """Width of gate and up projection together, which the released configurations call the MLP's."""
    return int(_value(raw, "intermediate_size") or raw.get("mlp_ratio", 4) * _value(raw, "hidden_size"))


def _text_block(
    number: int,
    part: str,
    value: Tensor,
    config: MolmoConfig,
    out: dict[str, Tensor],
    experts: dict[str, dict[int, Tensor]],
) -> None:
    """One tensor of one block of the language model."""
    text, block = config.text_config, f"model.language_model.layers.{number}."
    after = text.model_type == "olmo2"
    names = {
        "attn_out.weight": "self_attn.o_proj.weight",
        "q_norm.weight": "self_attn.q_norm.weight",
        "k_norm.weight": "self_attn.k_norm.weight",
        "attn_norm.weight": "post_attention_layernorm.weight" if after else "input_layernorm.weight",
        "ff_norm.weight": "post_feedforward_layernorm.weight" if after else "post_attention_layernorm.weight",
        "ff_out.weight": "mlp.down_proj.weight",
        "mlp.gate.weight": "mlp.gate.weight",
        "ffn.router.layer.weight": "mlp.gate.weight",
    }
    if part in ("att_proj.weight", "att_proj.bias"):
        width = text.hidden_size // text.num_attention_heads
        sizes = [heads * width for heads in (text.num_attention_heads, *[text.num_key_value_heads] * 2)]
        for name, piece in zip(ATTENTION.values(), value.split(sizes), strict=True):
            out[f"{block}self_attn.{name}.{part.split('.')[1]}"] = piece
    elif part == "ff_proj.weight":  # silu(second half) * first half
        for name, piece in zip(("up_proj", "gate_proj"), value.chunk(2), strict=True):
            out[f"{block}mlp.{name}.weight"] = piece
    elif match := re.fullmatch(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight", part):
        experts.setdefault(f"{block}mlp.experts.{match[2]}", {})[int(match[1])] = value
    elif match := re.fullmatch(r"ffn\.experts\.mlp\.(w1|v1|w2)", part):  # one matrix over all experts, rows first
        stacked = value.unflatten(0, (text.num_experts, -1))
        name = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}[match[1]]
        out[f"{block}mlp.experts.{name}"] = stacked.transpose(1, 2) if match[1] == "w2" else stacked
    else:
        out[block + _known(names, part, f"block {number}: {part}")] = value


def _join_gates(out: dict[str, Tensor]) -> None:
    """transformers keeps gate and up of all experts in one tensor [experts, 2 * width, hidden]."""
    for name in [name for name in out if name.endswith("mlp.experts.gate_proj")]:
        prefix = name.removesuffix("gate_proj")
        if f"{prefix}up_proj" not in out:
            raise CheckpointError(f"{prefix}: experts have gate_proj but no up_proj")
        out[f"{prefix}gate_up_proj"] = torch.cat([out.pop(name), out.pop(f"{prefix}up_proj")], dim=1)


def _embeddings(
    tensors: Mapping[str, Tensor], config: MolmoConfig, token_ids: Sequence[int] | None, out: dict[str, Tensor]
) -> None:
    for name in (EMBEDDING, NEW_EMBEDDING):
        if name not in tensors:
            raise CheckpointError(f"the weights lack {name}")
    base, extra = tensors[EMBEDDING].float(), tensors[NEW_EMBEDDING].float().clone()
    if token_ids is not None:
        table = torch.cat([base, extra])
        if max(token_ids) >= len(table) or len(token_ids) > len(extra):
            raise CheckpointError(f"image tokens {list(token_ids)} do not fit {len(base)} + {len(extra)} embeddings")
        extra[: len(token_ids)] = table[list(token_ids)]
    out["model.language_model.embed_tokens.weight"] = base
    out["model.extra_embedding.weight"] = extra
    if config.tie_word_embeddings:
        out["lm_head.weight"] = base


def _known(table: Mapping[str, str], part: str, name: str) -> str:
    if part not in table:
        raise CheckpointError(f"tensor {name} is not of the layout of the models released in 2024")
    return table[part]
