"""Language models: which transformers family, and what of it depends on the sizes in `params.yaml`.

One row of `LANGUAGE_MODELS` is one family. The model itself is transformers' own, built headless: the head belongs to
`MolmoForConditionalGeneration`. Extra ids (image tokens) begin exactly at the embedding's rows, which may be more than
the tokenizer has tokens.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from molmo_model.errors import ConfigError
from molmo_model.lookup import lookup
from molmo_model.model_config import LanguageConfig, MessageFormat
from molmo_model.nn.pretrained import load_config, load_model, require_none_missing, same_sizes


class QueryKeyNorm(StrEnum):
    """What is normalised of queries and keys before attention."""

    none = "none"
    width = "width"
    """The whole projected vector, all heads together."""
    head = "head"
    """Each head by itself."""


@dataclass(frozen=True)
class LanguageModel:
    """What is known about one family of language models."""

    model_type: str
    """`model_type` of its transformers config."""
    title: str
    """The releases that this row covers."""
    released: tuple[tuple[str, int], ...]
    """Rows of the embedding of released models; where extra ids begin."""
    released_rope_theta: tuple[float, ...]
    """Rotary base of the releases; a model built from scratch has `from_scratch_rope_theta`."""
    from_scratch_rope_theta: float
    """transformers' default, fit for short contexts."""
    begins_with: str
    """The token that begins a text with the family's own tokenizers; a tokenizer without one begins with its end."""
    chat_format: MessageFormat
    """The format of `preprocessing.prompts` that comes nearest to how the instruction-tuned releases were trained."""
    head_dim: bool = False
    """The config has its own `head_dim`, which by default is not the width divided by the heads."""
    qk_norm: QueryKeyNorm = QueryKeyNorm.none
    norm_after: bool = False
    """Norms stand behind attention and MLP instead of before them."""
    released_tied: str = "no"
    """Which releases use the embedding as their head."""
    sliding: bool = False
    """Three of four layers see a window (`sliding_window`), every fourth one everything."""
    experts: bool = False
    """The MLP of each layer is a mixture of experts."""


LANGUAGE_MODELS: dict[str, LanguageModel] = {
    "qwen2": LanguageModel(
        model_type="qwen2",
        title="Qwen2, Qwen2.5",
        released=(("0.5B, 1.5B, 3B", 151936), ("7B, 14B, 32B, 72B", 152064)),
        released_rope_theta=(1e6,),
        from_scratch_rope_theta=1e4,
        begins_with="end of text",
        chat_format=MessageFormat.chatml,
        released_tied="up to 3B",
    ),
    "qwen3": LanguageModel(
        model_type="qwen3",
        title="Qwen3",
        released=(("all", 151936),),
        released_rope_theta=(1e6,),
        from_scratch_rope_theta=1e4,
        begins_with="end of text",
        chat_format=MessageFormat.chatml,
        head_dim=True,
        qk_norm=QueryKeyNorm.head,
        released_tied="up to 4B",
    ),
    "llama": LanguageModel(
        model_type="llama",
        title="Llama 3, 3.1, 3.2",
        released=(("all", 128256),),
        released_rope_theta=(5e5,),
        from_scratch_rope_theta=1e4,
        begins_with="<|begin_of_text|>",
        chat_format=MessageFormat.role,
        released_tied="3.2 1B, 3B",
    ),
    "olmo": LanguageModel(
        model_type="olmo",
        title="OLMo",
        released=(("1B, 7B", 50304),),
        released_rope_theta=(1e4,),
        from_scratch_rope_theta=1e4,
        begins_with="end of text",
        chat_format=MessageFormat.role,
        released_tied="the first 1B",
    ),
    "olmo2": LanguageModel(
        model_type="olmo2",
        title="OLMo 2",
        released=(("all", 100352),),
        released_rope_theta=(5e5,),
        from_scratch_rope_theta=1e4,
        begins_with="<|endoftext|>",
        chat_format=MessageFormat.role,
        qk_norm=QueryKeyNorm.width,
        norm_after=True,
    ),
    "olmo3": LanguageModel(
        model_type="olmo3",
        title="OLMo 3",
        released=(("all", 100278),),
        released_rope_theta=(5e5,),
        from_scratch_rope_theta=5e5,
        begins_with="<|endoftext|>",
        chat_format=MessageFormat.chatml,
        qk_norm=QueryKeyNorm.width,
        norm_after=True,
        sliding=True,
    ),
    "olmoe": LanguageModel(
        model_type="olmoe",
        title="OLMoE",
        released=(("1B-7B", 50304),),
        released_rope_theta=(1e4,),
        from_scratch_rope_theta=1e4,
        begins_with="end of text",
        chat_format=MessageFormat.role,
        qk_norm=QueryKeyNorm.width,
        experts=True,
    ),
}

ALIASES = {
    "qwen2.5": "qwen2",
    "qwen2_5": "qwen2",
    "llama3": "llama",
    "llama3.1": "llama",
    "llama3.2": "llama",
    "olmo1": "olmo",
    "olmo-1": "olmo",
    "olmo-2": "olmo2",
    "olmo-3": "olmo3",
    "olmo-e": "olmoe",
}
"""Other names of the families."""

SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
DEFAULT_WINDOW, DEFAULT_EXPERTS, DEFAULT_EXPERTS_PER_TOKEN = 4096, 64, 8
"""transformers' defaults, which are those of OLMo 3 7B and OLMoE."""


def language_model(family: str) -> LanguageModel:
    """The row of a family, by its name or an alias, in upper or lower case.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    name = family.lower()
    spec: LanguageModel = lookup(LANGUAGE_MODELS, ALIASES.get(name, name), "language model")
    return spec


def text_config(language: LanguageConfig, tokenizer_size: int) -> PreTrainedConfig:
    """The transformers config of the language model, built from the params or read from `pretrained`.

    Args:
        tokenizer_size: ids that the tokenizer uses, its largest plus one.

    Raises:
        ConfigError: a size is missing, belongs to another family, or contradicts another or the pretrained model.
    """
    spec = language_model(language.family)
    where = f"language model {language.family}"
    _refuse_foreign(spec, language, where)
    if language.pretrained is None:
        config = _fresh(spec, language, tokenizer_size, where)
        remedy = "give vocab_size at least as many, or leave it out"
    else:
        config = _pretrained(spec, language, language.pretrained, where)
        remedy = "use the tokenizer that belongs to the model"
    if config.vocab_size < tokenizer_size:
        raise ConfigError(
            f"{where}: {language.pretrained or 'the model'} has {config.vocab_size} embeddings, the tokenizer "
            f"{tokenizer_size} tokens; {remedy}"
        )
    return config


def load_language(body: nn.Module, head: nn.Linear, source: str) -> None:
    """Puts the weights of a pretrained causal language model into a headless one and its head, in fp32.

    The weights go through transformers' own loading, which fuses OLMoE's experts, one tensor each in its files.

    Raises:
        CheckpointError: they cannot be read, or tensors are missing or of another shape.
    """
    loaded, info = load_model(AutoModelForCausalLM, source)
    require_none_missing(source, info["missing_keys"], info)
    body.load_state_dict(loaded.base_model.state_dict(), strict=True, assign=True)
    head.load_state_dict(loaded.get_output_embeddings().state_dict(), strict=True, assign=True)


def _refuse_foreign(spec: LanguageModel, language: LanguageConfig, where: str) -> None:
    """Refuses what other families have and this one has not."""
    foreign = [] if spec.sliding else ["sliding_window"]
    foreign += [] if spec.experts else ["num_experts", "num_experts_per_token"]
    foreign += [] if spec.head_dim else ["head_dim"]
    if given := [name for name in foreign if getattr(language, name) is not None]:
        raise ConfigError(f"{where}: {', '.join(given)} must be left out; {spec.title} has no such layers")


def _pretrained(spec: LanguageModel, language: LanguageConfig, source: str, where: str) -> PreTrainedConfig:
    config: PreTrainedConfig = load_config(source, where)
    if config.model_type != spec.model_type:
        raise ConfigError(f"{where}: {source} is a {config.model_type}, not a {spec.model_type}")
    names = [*SIZES, "num_key_value_heads", "vocab_size"]
    names += ["head_dim"] if spec.head_dim else []
    names += ["sliding_window"] if spec.sliding else []
    names += ["num_experts"] if spec.experts else []
    same_sizes(language, config, where, tuple(names))
    asked = {"rope_theta": language.rope_theta, "num_experts_per_token": language.num_experts_per_token}
    found = {
        "rope_theta": _rope_parameters(config)[-1].get("rope_theta"),
        "num_experts_per_token": getattr(config, "num_experts_per_tok", None),
    }
    for name, value in asked.items():
        if value is not None and value != found[name]:
            raise ConfigError(f"{where}: {name} is {value}, but {source} has {found[name]}; leave it out")
    if language.tie_word_embeddings and not config.tie_word_embeddings:
        raise ConfigError(f"{where}: tie_word_embeddings is true, but {source} has a head of its own; leave it out")
    return config


def _fresh(spec: LanguageModel, language: LanguageConfig, tokenizer_size: int, where: str) -> PreTrainedConfig:
    """The config of a model that is built, not loaded.

    Weights start at a standard deviation of `hidden_size ** -0.5`, which is the usual 0.02 at 2,500 wide and keeps
    signals alive in narrow models. No id is transformers' padding, whose embedding would never learn.
    """
    hidden, heads, key_value_heads = _checked_sizes(language, where)
    fields: dict[str, Any] = {}
    if spec.head_dim:
        fields["head_dim"] = language.head_dim or hidden // heads
        if fields["head_dim"] % 2:
            raise ConfigError(f"{where}: head_dim {fields['head_dim']} is odd; rotary positions turn pairs of channels")
    if spec.sliding:
        fields["sliding_window"] = language.sliding_window or DEFAULT_WINDOW
    if spec.experts:
        fields |= _experts(language, where)
    config = AutoConfig.for_model(
        spec.model_type,
        vocab_size=language.vocab_size or tokenizer_size,
        hidden_size=hidden,
        intermediate_size=language.intermediate_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=language.max_position_embeddings,
        tie_word_embeddings=language.tie_word_embeddings,
        initializer_range=hidden**-0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **fields,
    )
    for rope in _rope_parameters(config):
        rope["rope_theta"] = language.rope_theta or spec.from_scratch_rope_theta
    return config


def _checked_sizes(language: LanguageConfig, where: str) -> tuple[int, int, int]:
    """Width, heads, and heads of keys and values."""
    missing = [name for name in SIZES if getattr(language, name) is None]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given, or `pretrained`")
    hidden, heads = language.hidden_size, language.num_heads
    key_value_heads = language.num_key_value_heads or heads
    if hidden is None or heads is None or key_value_heads is None:  # what was checked above, for the type checker
        raise ConfigError(f"{where}: sizes are missing")
    if hidden % (2 * heads) or heads % key_value_heads:
        raise ConfigError(
            f"{where}: hidden_size {hidden} must be an even multiple of num_heads {heads}, "
            f"and num_heads a multiple of num_key_value_heads {key_value_heads}"
        )
    return hidden, heads, key_value_heads


def _experts(language: LanguageConfig, where: str) -> dict[str, int]:
    count = language.num_experts or DEFAULT_EXPERTS
    per_token = language.num_experts_per_token or min(DEFAULT_EXPERTS_PER_TOKEN, count)
    if per_token > count:
        raise ConfigError(f"{where}: num_experts_per_token {per_token} is more than num_experts {count}")
    return {"num_experts": count, "num_experts_per_tok": per_token}


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The dicts that hold `rope_theta`: one, or one per layer type (the one of full attention last)."""
    rope = config.rope_parameters
    nested = [rope[name] for name in sorted(rope, reverse=True) if isinstance(rope[name], dict)]
    return nested or [rope]
