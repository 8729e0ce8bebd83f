"""Language models: which transformers family, and what of it depends on the sizes in `params.yaml`.

One row of `LANGUAGE_MODELS` is one family. The model itself is transformers' own, built headless: the head belongs to
`MolmoForConditionalGeneration`.
"""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from molmo_model.errors import ConfigError
from molmo_model.model_config import LanguageConfig


@dataclass(frozen=True)
class LanguageModel:
    """What is known about one family of language models."""

    model_type: str
    """`model_type` of its transformers config."""
    extra_config: tuple[tuple[str, Any], ...] = ()
    """Further fields of the transformers config."""
    head_dim: bool = False
    """The config has its own `head_dim`, which by default is not the width divided by the heads."""


LANGUAGE_MODELS: dict[str, LanguageModel] = {
    "qwen2": LanguageModel(model_type="qwen2"),
    "qwen3": LanguageModel(model_type="qwen3", head_dim=True),
}

SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads")


def text_config(spec: LanguageModel, config: LanguageConfig, vocab_size: int, where: str) -> PreTrainedConfig:
    """The transformers config of a model that is built, not loaded.

    Weights start at a standard deviation of `hidden_size ** -0.5`, which is the usual 0.02 at 2,500 wide and keeps
    signals alive in narrow models.

    Raises:
        ConfigError: a size is missing, or the sizes do not fit each other.
    """
    missing = [name for name in SIZES if getattr(config, name) is None]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given, or `pretrained`")
    hidden, heads = config.hidden_size, config.num_heads
    key_value_heads = config.num_key_value_heads or heads
    assert hidden is not None and heads is not None and key_value_heads is not None
    if hidden % (2 * heads) or heads % key_value_heads:
        raise ConfigError(
            f"{where}: hidden_size {hidden} must be an even multiple of num_heads {heads}, "
            f"and num_heads a multiple of num_key_value_heads {key_value_heads}"
        )
    fields: dict[str, Any] = dict(spec.extra_config)
    if spec.head_dim:
        fields["head_dim"] = hidden // heads
    return AutoConfig.for_model(
        spec.model_type,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=hidden**-0.5,
        **fields,
    )
