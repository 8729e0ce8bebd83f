"""From crops to image tokens: normalise on the device, encode, pool by index, project."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from molmo_model.nn.connector import Connector
from molmo_model.nn.vision_encoder import ViTFeatures

if TYPE_CHECKING:
    from molmo_model.nn.molmo_config import MolmoConfig


class PixelNormalize(nn.Module):
    """`(x / 255 - mean) / std` in fp32, where the model is: a quarter of the bytes travel there."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.values = (list(mean), list(std))
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def first_weights(self) -> None:
        """Refills the buffers, which no checkpoint holds."""
        for buffer, values in zip((self.mean, self.std), self.values, strict=True):
            init.copy_(buffer, torch.tensor(values))

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [C, H, W, 3] to float [C, 3, H, W] (a view of channels-last memory)."""
        scaled = pixels.to(torch.float32) / 255
        return ((scaled - self.mean) / self.std).permute(0, 3, 1, 2)


class VisionBackbone(nn.Module):
    """Vision encoder and connector."""

    def __init__(self, config: "MolmoConfig") -> None:
        super().__init__()
        vision, text = config.vision_config, config.text_config
        self.normalize = PixelNormalize(config.image_mean, config.image_std)
        self.encoder = ViTFeatures(vision, config.vision_encoder, config.vision_feature_layers)
        self.connector = Connector(
            vision_width=vision.hidden_size,
            num_layers=len(config.vision_feature_layers),
            text_width=text.hidden_size,
            window=config.pooling_size[0] * config.pooling_size[1],
            pooling=config.pooling,
            num_heads=config.pooling_num_heads,
            pooling_attention_mask=config.pooling_attention_mask,
            window_position_embedding=config.window_position_embedding,
            projector=config.projector,
            projector_hidden_size=config.projector_hidden_size,
        )

    def forward(self, pixel_values: Tensor, pooling: Tensor) -> Tensor:
        """Image tokens [T, E] of uint8 crops [C, H, W, 3] and pooling indices [T, W] into their patches, -1 a hole."""
        return self.connector(self.encoder(self.normalize(pixel_values)), pooling)
