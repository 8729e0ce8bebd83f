"""The configuration of a composed Molmo: everything that decides its shape and what it computes.

Importing this module registers it with transformers' `AutoConfig`.
"""

from dataclasses import field
from math import isqrt
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from molmo_model.errors import ConfigError
from molmo_model.lookup import lookup
from molmo_model.model_config import TokenScore, VisionPositions
from molmo_model.nn.attention import IMPLEMENTATION
from molmo_model.nn.connector import PADDING_VECTORS, SCALE_FUSIONS
from molmo_model.nn.pooling import MANY_TOKENS, POOLINGS, WITH_HEADS
from molmo_model.nn.projector import PROJECTORS
from molmo_model.nn.token_selector import selector_config
from molmo_model.nn.vision_encoder import VISION_ENCODERS, encoder_name, resolve_layers

try:
    from transformers.configuration_utils import SubConfigSpec
except ImportError:  # transformers 5.17 names the classes alone, and leaves dicts to the configuration
    SubConfigSpec = None


class MolmoConfig(PreTrainedConfig):
    """Everything that decides the model's shape and what it computes; `config.json` of a checkpoint.

    The vision config describes the encoder as it is built: cut off after the last feature layer.
    """

    model_type = "molmo_composed"
    if SubConfigSpec is None:
        sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    else:
        sub_configs_defaults = {
            "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
            "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        }
    vision_config: Any = None
    text_config: Any = None
    vision_encoder: str = "siglip"
    """A name of `VISION_ENCODERS`."""
    vision_positions: str = "native"
    """`native`, `learned_2d` or `rope_2d`, see `model_config.VisionPositions`."""
    vision_feature_layers: list[int] = field(default_factory=list)
    """Blocks from 0 whose outputs are concatenated, in this order; empty is the last one."""
    image_mean: list[float] = field(default_factory=list)
    """Per channel of pixels in [0, 1]; empty is the encoder's own."""
    image_std: list[float] = field(default_factory=list)
    pooling: str = "attention_meanq"
    pooling_size: list[int] = field(default_factory=lambda: [2, 2])
    """Height and width of a pooling window in patches; [0, 0] is the whole crop."""
    num_queries: int = 1
    """Image tokens of one window, with the poolings `MANY_TOKENS`."""
    pooling_num_heads: int = 4
    pooling_attention_mask: bool = True
    window_position_embedding: bool = False
    padding_embedding: str = "none"
    """`none`, or a name of `PADDING_VECTORS`: the model then needs `patch_masks`."""
    feature_dropout: float = 0.0
    """Dropout on patch features before pooling."""
    hierarchical: bool = False
    """The last column of `pooling` is a patch of the global crop, fused with the pooled window by `scale_fusion`."""
    scale_fusion: str = "sum"
    projector: str = "mlp"
    projector_hidden_size: Any = None
    """None is the language model's MLP width, as in the released models."""
    extra_vocab_size: int = 16
    """Rows of the extra embedding; its ids begin exactly at the language model's vocabulary size."""
    image_token_id: Any = None
    """`<im_patch>`, the token that an image token is added to; None is the third extra id."""
    bidirectional_images: bool = True
    """Tokens of one image see each other in both directions."""
    one_image_block: bool = False
    """All images of an example count as one image there: the rule that transformers' Molmo2 has."""
    residual_dropout: float = 0.0
    """Dropout on what attention and MLP of the language model add to the residual stream."""
    response_residual_dropout: Any = None
    """The same on answered tokens; None is `residual_dropout`."""
    embedding_dropout: float = 0.0
    load_balancing_weight: float = 0.01
    """Factors of the experts' losses; see `molmo_model.nn.experts`."""
    router_z_weight: float = 0.001
    temporal_position_embedding: bool = False
    """A vector per frame of a clip, added to its features; see `molmo_model.nn.video`."""
    temporal_attention_layers: int = 0
    """Layers of attention over the same patch of all frames of a clip."""
    max_frames: int = 8
    """Rows of the temporal position embedding."""
    frames_per_batch: int = 0
    """Crops that the vision encoder sees at once in inference; 0 is all."""
    selector: Any = None
    """The fields of `SelectorConfig` make the model a HeMolmo; None has no token selector."""
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if SubConfigSpec is None:
            self.vision_config, self.text_config = map(_from_dict, (self.vision_config, self.text_config))
        super().__post_init__(**kwargs)
        vision, text = self.vision_config, self.text_config
        if not isinstance(vision, PreTrainedConfig) or not isinstance(text, PreTrainedConfig):
            return  # transformers builds an empty config to find the defaults
        self.vision_encoder = encoder_name(self.vision_encoder)
        spec = VISION_ENCODERS[self.vision_encoder]
        lookup(dict.fromkeys(VisionPositions), self.vision_positions, "vision positions")
        lookup(POOLINGS, self.pooling, "pooling")
        lookup(PROJECTORS, self.projector, "projector")
        lookup({"none": 0, **PADDING_VECTORS}, self.padding_embedding, "padding embedding")
        lookup(SCALE_FUSIONS, self.scale_fusion, "scale fusion")
        if list(self.pooling_size) == [0, 0]:
            self.pooling_size = [vision.image_size // vision.patch_size] * 2
        self.vision_feature_layers = resolve_layers(
            self.vision_feature_layers or [-1], vision.num_hidden_layers, "vision_feature_layers"
        )
        self.image_mean = self.image_mean or list(spec.mean)
        self.image_std = self.image_std or list(spec.std)
        self.projector_hidden_size = self.projector_hidden_size or text.intermediate_size
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
        if self.pooling in WITH_HEADS and vision.hidden_size % self.pooling_num_heads:
            raise ConfigError(
                f"pooling_num_heads (connector.num_heads in the params) {self.pooling_num_heads} does not divide the "
                f"encoder's width {vision.hidden_size}"
            )
        self._check_window()
        if self.selector is not None:
            self._check_selector()
        first, last = text.vocab_size, text.vocab_size + self.extra_vocab_size - 1
        if not first <= self.image_token_id <= last:
            raise ConfigError(
                f"image_token_id {self.image_token_id} is no extra id; those are {first} to {last}, for "
                f"extra_vocab_size is {self.extra_vocab_size}; raise it"
            )
        if self.one_image_block and not self.bidirectional_images:
            raise ConfigError(
                "one_image_block is true, but bidirectional_images is false, so that images are no blocks at all; "
                "set one_image_block: false, or bidirectional_images: true"
            )

    def _check_selector(self) -> None:
        text, selector = self.text_config, selector_config(self.selector)
        layers = selector.low_res_layers or text.num_hidden_layers
        if layers > text.num_hidden_layers:
            raise ConfigError(f"selector.low_res_layers is {layers}; the language model has {text.num_hidden_layers}")
        if found := list(selector.gradient_layers):
            first, end = found if len(found) == 2 else (0, 0)
            if not 0 <= first < end <= layers or (end < layers and not selector.all_layers):
                raise ConfigError(
                    f"selector.gradient_layers is {found}; write [first, end) within the {layers} layers of the "
                    "low-resolution pass, the last one among them unless all_layers is true"
                )
        if selector.gradient_embedding and (not found or found[0] != 0):
            raise ConfigError("selector.gradient_embedding needs gradient_layers from 0 on, or no gradient gets there")
        if selector.score is TokenScore.prior_only and not selector.prior:
            raise ConfigError("selector.score is prior_only, but selector.prior is false; nothing would score")
        if self.num_queries != 1 or self.hierarchical:
            raise ConfigError("a token selector chooses windows of one token each; use one query and no hierarchy")
        sliding = "sliding_attention" in (getattr(text, "layer_types", None) or [])
        if sliding and text.max_position_embeddings > text.sliding_window:
            raise ConfigError(
                f"the language model's window of {text.sliding_window} is counted in positions in training but in "
                f"tokens in generation, which differ behind left-out tokens; with a token selector "
                f"max_position_embeddings ({text.max_position_embeddings}) must not exceed the window"
            )

    def _check_window(self) -> None:
        size, queries = list(self.pooling_size), self.num_queries
        if len(size) != 2 or min(size) < 1:
            raise ConfigError(f"pooling_size is {size}; write height and width of a window in patches, or [0, 0]")
        if self.pooling == "none" and size != [1, 1]:
            raise ConfigError(f"pooling none keeps every patch, but pooling_size is {size}; write [1, 1]")
        if queries != 1 and self.pooling not in MANY_TOKENS:
            raise ConfigError(
                f"num_queries is {queries}, but pooling {self.pooling} makes 1 token of a window; "
                f"use {' or '.join(MANY_TOKENS)}"
            )
        if self.pooling == "c_abstractor" and isqrt(queries) ** 2 != queries:
            raise ConfigError(f"num_queries is {queries}; c_abstractor needs a square number, such as 1, 4, 9 or 16")
        if self.pooling == "c_abstractor" and isqrt(queries) > min(size):
            raise ConfigError(
                f"num_queries {queries} is {isqrt(queries)} rows of tokens from a window of {size} patches; "
                "enlarge pooling_size or lower num_queries"
            )

    @property
    def pooling_columns(self) -> int:
        """Columns of `pooling`: the patches of a window, and the one of the global crop if hierarchical."""
        height, width = self.pooling_size
        return int(height * width) + self.hierarchical


def _from_dict(part: Any) -> Any:
    return AutoConfig.for_model(**part) if isinstance(part, dict) else part


AutoConfig.register(MolmoConfig.model_type, MolmoConfig)
