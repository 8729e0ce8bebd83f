"""The configuration of a composed Molmo: everything that decides its shape and what it computes.

Importing this module registers it with transformers' `AutoConfig`.
"""

from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from molmo_model.config import lookup
from molmo_model.errors import ConfigError
from molmo_model.nn.attention import IMPLEMENTATION
from molmo_model.nn.connector import POOLINGS, PROJECTORS
from molmo_model.nn.vision_encoder import VISION_ENCODERS, resolve_layers


class MolmoConfig(PreTrainedConfig):
    """Everything that decides the model's shape and what it computes; `config.json` of a checkpoint.

    The vision config describes the encoder as it is built: cut off after the last feature layer.
    """

    model_type = "molmo_composed"
    sub_configs_defaults = {  # noqa: RUF012 - read by transformers from the class
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }
    vision_config: Any = None
    text_config: Any = None
    vision_encoder: str = "siglip"
    """A name of `VISION_ENCODERS`."""
    vision_feature_layers: list[int] = field(default_factory=list)
    """Blocks from 0 whose outputs are concatenated, in this order; empty is the last one."""
    image_mean: list[float] = field(default_factory=list)
    """Per channel of pixels in [0, 1]; empty is the encoder's own."""
    image_std: list[float] = field(default_factory=list)
    pooling: str = "attention_meanq"
    pooling_size: list[int] = field(default_factory=lambda: [2, 2])
    """Height and width of a pooling window in patches."""
    pooling_num_heads: int = 4
    pooling_attention_mask: bool = True
    window_position_embedding: bool = False
    projector: str = "mlp"
    projector_hidden_size: Any = None
    """None is half of the language model's MLP width."""
    extra_vocab_size: int = 16
    """Rows of the extra embedding; its ids begin exactly at the language model's vocabulary size."""
    image_token_id: Any = None
    """`<im_patch>`, the token that an image token is added to; None is the third extra id."""
    bidirectional_images: bool = True
    """Tokens of one image see each other in both directions."""
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        vision, text = self.vision_config, self.text_config
        if not isinstance(vision, PreTrainedConfig) or not isinstance(text, PreTrainedConfig):
            return  # transformers builds an empty config to find the defaults
        spec = lookup(VISION_ENCODERS, self.vision_encoder, "vision encoder")
        lookup(POOLINGS, self.pooling, "pooling")
        lookup(PROJECTORS, self.projector, "projector")
        self.vision_feature_layers = resolve_layers(
            self.vision_feature_layers or [-1], vision.num_hidden_layers, "vision_feature_layers"
        )
        self.image_mean = self.image_mean or list(spec.mean)
        self.image_std = self.image_std or list(spec.std)
        self.projector_hidden_size = self.projector_hidden_size or text.intermediate_size // 2
        self.tie_word_embeddings = bool(text.tie_word_embeddings)
        self.image_token_id = text.vocab_size + 2 if self.image_token_id is None else self.image_token_id
        self._check(spec.model_type)
        if text._attn_implementation is None:  # so that a loaded model attends as a trained one, unasked
            text._attn_implementation = IMPLEMENTATION

    def _check(self, model_type: str) -> None:
        vision, text = self.vision_config, self.text_config
        if vision.model_type != model_type:
            raise ConfigError(
                f"encoder {self.vision_encoder} is a {model_type}, vision_config is a {vision.model_type}"
            )
        if vision.hidden_size % self.pooling_num_heads:
            raise ConfigError(
                f"pooling_num_heads {self.pooling_num_heads} does not divide the encoder's width {vision.hidden_size}"
            )
        first, last = text.vocab_size, text.vocab_size + self.extra_vocab_size - 1
        if not first <= self.image_token_id <= last:
            raise ConfigError(f"image_token_id {self.image_token_id} is no extra id; those are {first} to {last}")


AutoConfig.register(MolmoConfig.model_type, MolmoConfig)
