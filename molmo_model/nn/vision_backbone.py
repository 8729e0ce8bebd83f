"""From crops to image tokens: normalise on the device, encode, pool by index, project."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from molmo_model.errors import DataError
from molmo_model.nn.connector import Connector
from molmo_model.nn.video import TemporalMixer
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
        self.image_size, self.patch_size = vision.image_size, vision.patch_size
        self.window = (config.pooling_size[0], config.pooling_size[1])
        self.hierarchical = config.hierarchical
        self.normalize = PixelNormalize(config.image_mean, config.image_std)
        self.encoder = ViTFeatures(vision, config.vision_encoder, config.vision_feature_layers, config.vision_positions)
        self.frames_per_batch = config.frames_per_batch
        self.temporal = _temporal(config)
        self.connector = Connector(
            vision_width=vision.hidden_size,
            num_layers=len(config.vision_feature_layers),
            text_width=text.hidden_size,
            window=self.window,
            pooling=config.pooling,
            num_heads=config.pooling_num_heads,
            pooling_attention_mask=config.pooling_attention_mask,
            window_position_embedding=config.window_position_embedding,
            projector=config.projector,
            projector_hidden_size=config.projector_hidden_size,
            num_queries=config.num_queries,
            padding_embedding=config.padding_embedding,
            feature_dropout=config.feature_dropout,
            scale_fusion=config.scale_fusion if config.hierarchical else None,
        )

    def forward(
        self,
        pixel_values: Tensor,
        pooling: Tensor,
        patch_masks: Tensor | None = None,
        crop_frames: Tensor | None = None,
        crop_videos: Tensor | None = None,
    ) -> Tensor:
        """Image tokens [T * num_queries, E].

        Args:
            pixel_values: uint8 crops [C, H, W, 3].
            pooling: [T, W] indices into the patches of all crops, -1 a hole.
            patch_masks: [C, N] share of each patch that is picture; for the padding embedding alone.
            crop_frames, crop_videos: [C] which frame of which clip a crop is, -1 for none; see `TemporalMixer`.
        """
        features = self._features(pixel_values)
        if self.temporal is not None:
            features = self.temporal(features, crop_frames, crop_videos)
        return self.connector(features, pooling, patch_masks)

    def _features(self, pixel_values: Tensor) -> Tensor:
        """Patch features of all crops; in inference of `frames_per_batch` at a time, which bounds the memory."""
        if self.training or not 0 < self.frames_per_batch < len(pixel_values):
            return self.encoder(self.normalize(pixel_values))
        return torch.cat([self.encoder(self.normalize(part)) for part in pixel_values.split(self.frames_per_batch)])

    def encode_images(self, images: Tensor, image_masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whole images of the encoder's size to tokens, without tiling: the interface of the original documentation.

        Args:
            images: [B, I, 3, H, W] normalised floats, or uint8 [B, I, H, W, 3].
            image_masks: which images [B, I], or what share of each patch [B, I, N], are picture and not filling; None:
                all. Per patch they also feed the padding embedding.

        Returns:
            Image tokens [B, I, T, E] of a plain grid of pooling windows over each image, row by row, and bool [B, I, T]
            whether there is any picture in a token's window.

        Raises:
            DataError: images of another size than the encoder's, or masks of another shape.
        """
        side, columns = self.image_size // self.patch_size, self.connector.columns
        spatial = images.shape[2:4] if images.dtype == torch.uint8 else images.shape[3:]
        if images.dim() != 5 or tuple(spatial) != (self.image_size, self.image_size):
            raise DataError(
                f"images are {list(images.shape)} of {images.dtype}; give [B, I, 3, {self.image_size}, "
                f"{self.image_size}] floats, or uint8 with the channels last"
            )
        rows, count = images.shape[:2]
        shares = self._shares(image_masks, (rows, count, side * side), images.device)
        flat = images.flatten(0, 1)
        features = self.encoder(self.normalize(flat) if flat.dtype == torch.uint8 else flat)
        windows = grid_windows(side, self.window, self.hierarchical).to(images.device)
        holes = windows < 0
        starts = torch.arange(rows * count, device=images.device)[:, None, None] * side * side
        pooling = torch.where(holes, -1, windows + starts).view(-1, columns)
        tokens = self.connector(features, pooling, shares.flatten(0, 1)).unflatten(0, (rows, count, -1))
        shown = ((shares[:, :, windows.clamp(min=0)] > 0) & ~holes).any(-1)
        return tokens, shown.repeat_interleave(tokens.shape[2] // len(windows), dim=-1)

    @staticmethod
    def _shares(image_masks: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        """float [B, I, N] the share of each patch that is picture."""
        if image_masks is None:
            return torch.ones(shape, device=device)
        if tuple(image_masks.shape) not in (shape, shape[:2]):
            raise DataError(f"image_masks are {list(image_masks.shape)}; give {list(shape[:2])} or {list(shape)}")
        shares = image_masks.to(device=device, dtype=torch.float32)
        return (shares if shares.dim() == 3 else shares[..., None]).expand(shape)


def _temporal(config: "MolmoConfig") -> TemporalMixer | None:
    """What looks across frames, if the config has any of it."""
    if not config.temporal_position_embedding and not config.temporal_attention_layers:
        return None
    layers, vision = len(config.vision_feature_layers), config.vision_config
    return TemporalMixer(
        vision.hidden_size * layers,
        vision.num_attention_heads * layers,
        config.max_frames,
        config.temporal_position_embedding,
        config.temporal_attention_layers,
    )


def grid_windows(side: int, window: tuple[int, int], hierarchical: bool) -> Tensor:
    """[T, W] pooling windows over one image of `side` x `side` patches, -1 for holes; of missing lines half, rounded
    down, come first. Hierarchical: one more column, the patch at the window's centre."""
    missing = [-side % size for size in window]
    pads = (missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2)
    grid = F.pad(torch.arange(side * side).view(side, side), pads, value=-1)
    blocks = grid.unfold(0, window[0], window[0]).unfold(1, window[1], window[1])
    windows = blocks.flatten(2).flatten(0, 1)
    if not hierarchical:
        return windows
    first = torch.where(windows < 0, side * side, windows).amin(1)  # its top left patch
    last = windows.amax(1)
    centre_row, centre_column = (first // side + last // side + 1) // 2, (first % side + last % side + 1) // 2
    centre = centre_row.clamp(max=side - 1) * side + centre_column.clamp(max=side - 1)
    return torch.cat([windows, centre[:, None]], dim=1)
