"""Vision encoders: which transformers model, and the few facts that Molmo needs to know about each.

One row of `VISION_ENCODERS` is one encoder. `ViTFeatures` runs its embeddings and blocks directly, keeps the outputs of
the chosen blocks and concatenates them; blocks after the last chosen one are not built, and no norm follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from molmo_model.config import lookup
from molmo_model.errors import ConfigError


@dataclass(frozen=True)
class VisionEncoder:
    """What is known about one family of encoders."""

    model_type: str
    """`model_type` of its transformers vision config."""
    prefix_tokens: int
    """Tokens before the patches (the class token), dropped after the concatenation."""
    mean: tuple[float, float, float]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, float, float]
    resize: str
    """How an image becomes a crop; a name of the resize methods of `preprocessing.image`."""
    feature_layers: tuple[int, ...]
    """Blocks that Molmo takes features from; negative ones count from `num_layers`."""
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    """Blocks that negative feature layers count from. CLIP counts from 23 of its 24."""
    num_heads: int
    embed: Callable[[Any, Tensor], Tensor]
    """`embed(model, pixels)`: [C, 3, H, W] to the first block's input [C, prefix + patches, width]."""
    blocks: Callable[[Any], nn.ModuleList]
    unused: tuple[str, ...]
    """Modules behind the blocks, which would be parameters without gradients."""
    extra_config: tuple[tuple[str, Any], ...] = ()
    """Further fields of the transformers config."""


def _clip_embed(model: Any, pixels: Tensor) -> Tensor:
    return model.pre_layrnorm(model.embeddings(pixels))


VISION_ENCODERS: dict[str, VisionEncoder] = {
    # so400m-14-384: 378 / 14 = 27, 27 * 27 = 729 patches, no class token
    "siglip": VisionEncoder(
        model_type="siglip_vision_model",
        prefix_tokens=0,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        resize="siglip",
        feature_layers=(-3, -9),
        image_size=378,
        patch_size=14,
        hidden_size=1152,
        intermediate_size=4304,
        num_layers=27,
        num_heads=16,
        embed=lambda model, pixels: model.embeddings(pixels),
        blocks=lambda model: model.encoder.layers,
        unused=("post_layernorm",),
        extra_config=(("vision_use_head", False),),
    ),
    # ViT-L/14-336: 336 / 14 = 24, 24 * 24 + 1 class token = 577 positions
    "clip": VisionEncoder(
        model_type="clip_vision_model",
        prefix_tokens=1,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        resize="default",
        feature_layers=(-2, -9),
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=23,
        num_heads=16,
        embed=_clip_embed,
        blocks=lambda model: model.encoder.layers,
        unused=("post_layernorm",),
    ),
}


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
    """

    def __init__(self, config: PreTrainedConfig, encoder: str, feature_layers: Sequence[int]) -> None:
        super().__init__()
        self.spec: VisionEncoder = lookup(VISION_ENCODERS, encoder, "vision encoder")
        self.feature_layers = list(feature_layers)
        self.vit: PreTrainedModel = AutoModel.from_config(config)
        drop_unused(self.vit, self.spec)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.spec.blocks(self.vit)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [C, 3, H, W] to features [C, patches, len(feature_layers) * width], row by row."""
        hidden = self.spec.embed(self.vit, pixels)
        chosen: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, None)
            if number in self.feature_layers:
                chosen[number] = hidden
        return torch.cat([chosen[number] for number in self.feature_layers], dim=-1)[:, self.spec.prefix_tokens :]


def drop_unused(vit: nn.Module, spec: VisionEncoder) -> None:
    """Replaces the modules behind the blocks, in place."""
    for name in spec.unused:
        if hasattr(vit, name):
            setattr(vit, name, nn.Identity())
