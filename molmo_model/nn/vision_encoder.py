"""Vision encoders: which transformers model, and the few facts that Molmo needs to know about each.

One row of `VISION_ENCODERS` is one encoder. `ViTFeatures` runs its embeddings and blocks directly, keeps the outputs of
the chosen blocks and concatenates them; blocks after the last chosen one are not built, and no norm follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from molmo_model.errors import ConfigError
from molmo_model.lookup import lookup
from molmo_model.nn.positions import (
    ROTARY,
    LearnedPositions2D,
    Rotary2D,
    drop_position_embedding,
    drop_position_parameter,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's pixels."""


@dataclass(frozen=True)
class VisionEncoder:
    """What is known about one encoder. Sizes are those of a model that is built; a pretrained one has its own."""

    hub_id: str
    """The published weights that the row stands for."""
    model_type: str
    """`model_type` of its transformers vision config."""
    prefix_tokens: int
    """Tokens before the patches (class token, registers), dropped after the concatenation."""
    mean: tuple[float, float, float]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, float, float]
    resize: str
    """How an image becomes a crop; a name of the resize methods of `preprocessing.image`."""
    feature_layers: tuple[int, ...]
    """Blocks that Molmo takes features from; negative ones count from `num_layers`."""
    image_size: int
    """Pixels per side of a crop in Molmo."""
    stored_size: int
    """Pixels per side that the published weights' positions are stored for, or that their configuration says."""
    patch_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the MLP; of a SwiGLU, 3/2 times its width."""
    num_layers: int
    """Blocks that negative feature layers count from. CLIP counts from 23 of its 24."""
    num_heads: int
    activation: str
    eps: float
    """Added to the variance in layer norms."""
    positions: str
    """Name of the learned positions in the state dict."""
    embed: Callable[[Any, Tensor], Tensor]
    """`embed(model, pixels)`: [C, 3, H, W] to the first block's input [C, prefix + patches, width]."""
    blocks: Callable[[Any], nn.ModuleList]
    attention: Callable[[Any], nn.Module]
    """The attention of one block."""
    drop_positions: Callable[[Any], None]
    """Takes the learned positions from the model's embeddings, for rotary ones."""
    unused: tuple[str, ...]
    """Modules behind the blocks, which would be parameters without gradients."""
    uncounted_layers: int = 0
    """Last blocks of the published weights that Molmo's numbering leaves out."""
    mlp_ratio: bool = False
    """The config says the MLP's width as a whole multiple of `hidden_size`."""
    swiglu: bool = False
    extra_config: tuple[tuple[str, Any], ...] = ()
    """Further fields of the transformers config, also of a pretrained one."""

    @property
    def stored_layers(self) -> int:
        """Blocks of the published weights."""
        return self.num_layers + self.uncounted_layers


def _embed(model: Any, pixels: Tensor) -> Tensor:
    return model.embeddings(pixels)


def _clip_embed(model: Any, pixels: Tensor) -> Tensor:
    return model.pre_layrnorm(model.embeddings(pixels))


# so400m-14-384: 378 / 14 = 27, 27 * 27 = 729 patches, no class token; 384 is no multiple of 14, the last 6 pixels of
# its training crops were never seen
_SIGLIP = VisionEncoder(
    hub_id="google/siglip-so400m-patch14-384",
    model_type="siglip_vision_model",
    prefix_tokens=0,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resize="siglip",
    feature_layers=(-3, -9),
    image_size=378,
    stored_size=384,
    patch_size=14,
    hidden_size=1152,
    intermediate_size=4304,
    num_layers=27,
    num_heads=16,
    activation="gelu_pytorch_tanh",
    eps=1e-6,
    positions="embeddings.position_embedding.weight",
    embed=_embed,
    blocks=lambda model: model.encoder.layers,
    attention=lambda block: block.self_attn,
    drop_positions=lambda model: drop_position_embedding(model.embeddings),
    unused=("post_layernorm",),
    extra_config=(("vision_use_head", False),),
)
# ViT-L/14-336: 336 / 14 = 24, 24 * 24 + 1 class token = 577 positions
_CLIP = VisionEncoder(
    hub_id="openai/clip-vit-large-patch14-336",
    model_type="clip_vision_model",
    prefix_tokens=1,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    resize="default",
    feature_layers=(-2, -9),
    image_size=336,
    stored_size=336,
    patch_size=14,
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=23,
    uncounted_layers=1,
    num_heads=16,
    activation="quick_gelu",
    eps=1e-5,
    positions="embeddings.position_embedding.weight",
    embed=_clip_embed,
    blocks=lambda model: model.encoder.layers,
    attention=lambda block: block.self_attn,
    drop_positions=lambda model: drop_position_embedding(model.embeddings),
    unused=("post_layernorm",),
)
# the positions of the weights are those of 37 * 37 patches
_DINOV2 = VisionEncoder(
    hub_id="facebook/dinov2-large",
    model_type="dinov2",
    prefix_tokens=1,
    mean=IMAGENET[0],
    std=IMAGENET[1],
    resize="dino",
    feature_layers=(-3, -9),
    image_size=336,
    stored_size=518,
    patch_size=14,
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=24,
    num_heads=16,
    activation="gelu",
    eps=1e-6,
    positions="embeddings.position_embeddings",
    embed=_embed,
    blocks=lambda model: model.encoder.layer,
    attention=lambda block: block.attention,
    drop_positions=lambda model: drop_position_parameter(model.embeddings),
    unused=("layernorm",),
    mlp_ratio=True,
    extra_config=(("use_mask_token", False),),
)
_METACLIP = replace(
    _CLIP,
    hub_id="facebook/metaclip-l14-fullcc2.5b",
    resize="metaclip",
    feature_layers=(-3, -9),
    stored_size=224,
    num_layers=24,
    uncounted_layers=0,
)
# OpenCLIP's, trained with the exact gelu, unlike OpenAI's and MetaCLIP's
_CLIP_H14 = replace(
    _CLIP,
    hub_id="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    feature_layers=(-3, -9),
    image_size=224,
    stored_size=224,
    hidden_size=1280,
    intermediate_size=5120,
    num_layers=32,
    uncounted_layers=0,
    num_heads=16,
    activation="gelu",
)

VISION_ENCODERS: dict[str, VisionEncoder] = {
    "clip": _CLIP,
    "clip_h14": _CLIP_H14,
    "siglip": _SIGLIP,
    "siglip2": replace(_SIGLIP, hub_id="google/siglip2-so400m-patch14-384"),
    "dinov2_small": replace(
        _DINOV2,
        hub_id="facebook/dinov2-small",
        hidden_size=384,
        intermediate_size=1536,
        num_layers=12,
        num_heads=6,
    ),
    "dinov2_base": replace(
        _DINOV2,
        hub_id="facebook/dinov2-base",
        hidden_size=768,
        intermediate_size=3072,
        num_layers=12,
        num_heads=12,
    ),
    "dinov2_large": _DINOV2,
    "dinov2_giant": replace(
        _DINOV2,
        hub_id="facebook/dinov2-giant",
        hidden_size=1536,
        intermediate_size=6144,
        num_layers=40,
        num_heads=24,
        swiglu=True,
    ),
    # four register tokens take the outliers that the plain one has among its patches; positions count no registers
    "dinov2_registers": replace(
        _DINOV2,
        hub_id="facebook/dinov2-with-registers-large",
        model_type="dinov2_with_registers",
        prefix_tokens=5,
        extra_config=(),
    ),
    "metaclip_b16": replace(
        _METACLIP,
        hub_id="facebook/metaclip-b16-fullcc2.5b",
        image_size=224,
        patch_size=16,
        hidden_size=768,
        intermediate_size=3072,
        num_layers=12,
        num_heads=12,
    ),
    "metaclip_l14": _METACLIP,
    "metaclip_h14": replace(
        _CLIP_H14, hub_id="facebook/metaclip-h14-fullcc2.5b", resize="metaclip", activation="quick_gelu"
    ),
}

ENCODER_ALIASES = {
    "openai": "clip",
    "dino": "dinov2_large",
    "dinov2": "dinov2_large",
    "metaclip": "metaclip_l14",
}
"""Other names: those of the original documentation and code."""


def encoder_name(name: str) -> str:
    """The name in `VISION_ENCODERS` of an encoder that may be called by another one.

    Raises:
        ConfigError: there is none of that name.
    """
    name = ENCODER_ALIASES.get(name, name)
    lookup(VISION_ENCODERS, name, "vision encoder")
    return name


def resolve_layers(layers: Sequence[int], num_layers: int, where: str) -> list[int]:
    """Block numbers from 0, in the given order.

    Raises:
        ConfigError: a layer lies outside the encoder, or is named twice.
    """
    resolved = [layer + num_layers if layer < 0 else layer for layer in layers]
    for layer, block in zip(layers, resolved, strict=True):
        if not 0 <= block < num_layers:
            raise ConfigError(
                f"{where}: layer {layer} of an encoder with {num_layers} layers; name -{num_layers} to {num_layers - 1}"
            )
    if not resolved or len(set(resolved)) != len(resolved):
        raise ConfigError(f"{where}: {list(layers)} of {num_layers} layers; name at least one, and each once")
    return resolved


class ViTFeatures(nn.Module):
    """The encoder, cut off after its last used block.

    Its embeddings and blocks are called one by one: the model's own forward would also run the norms behind them, and
    hidden states recorded by hooks get lost when the model is sharded.

    Args:
        config: of the vision model, already cut off.
        encoder: a name of `VISION_ENCODERS`.
        feature_layers: blocks from 0.
        positions: `native`, `learned_2d` or `rope_2d`, see `model_config.VisionPositions`.
    """

    def __init__(
        self, config: PreTrainedConfig, encoder: str, feature_layers: Sequence[int], positions: str = "native"
    ) -> None:
        super().__init__()
        self.spec: VisionEncoder = VISION_ENCODERS[encoder_name(encoder)]
        self.feature_layers = list(feature_layers)
        self.vit: PreTrainedModel = AutoModel.from_config(config)
        drop_unused(self.vit, self.spec)
        grid = config.image_size // config.patch_size
        self.learned_positions: LearnedPositions2D | None = None
        if positions == "learned_2d":
            self.learned_positions = LearnedPositions2D(grid, len(self.feature_layers) * config.hidden_size)
        self.rotary: Rotary2D | None = None
        if positions == "rope_2d":
            self.rotary = Rotary2D(grid, self.spec.prefix_tokens, config.hidden_size // config.num_attention_heads)
            self._attend_with(self.rotary)

    def _attend_with(self, rotary: Rotary2D) -> None:
        """Rotary positions instead of the encoder's own. Each attention holds the one shared module in a tuple: it is
        no submodule there, or it would be saved, sharded and counted once per block."""
        self.spec.drop_positions(self.vit)
        self.vit.set_attn_implementation(ROTARY)
        for block in self.blocks:
            self.spec.attention(block).rotary = (rotary,)  # type: ignore[assignment]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.spec.blocks(self.vit)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [C, 3, H, W] to features [C, patches, len(feature_layers) * width], row by row.

        Raises:
            ConfigError: the attention was changed to one that knows no rotary positions.
        """
        if self.rotary is not None and self.vit.config._attn_implementation != ROTARY:
            raise ConfigError(
                f"the vision encoder attends with {self.vit.config._attn_implementation!r}, which drops its rotary "
                f'positions silently; set attn_implementation={{"vision_config": "{ROTARY}"}}'
            )
        hidden = self.spec.embed(self.vit, pixels)
        chosen: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, None)
            if number in self.feature_layers:
                chosen[number] = hidden
        features = torch.cat([chosen[number] for number in self.feature_layers], dim=-1)[:, self.spec.prefix_tokens :]
        return features if self.learned_positions is None else self.learned_positions(features)


def drop_unused(vit: Any, spec: VisionEncoder) -> None:
    """Replaces the modules behind the blocks, in place, and the token that stands for masked patches in training
    without labels: a buffer then, because transformers' first weights look for it."""
    for name in spec.unused:
        if hasattr(vit, name):
            setattr(vit, name, nn.Identity())
    if isinstance(mask := getattr(vit.embeddings, "mask_token", None), nn.Parameter):
        del vit.embeddings.mask_token
        vit.embeddings.register_buffer("mask_token", torch.zeros_like(mask), persistent=False)
