"""Where a patch is: learned positions brought to another grid, learned rows and columns, and rotary rows and columns.

Shape suffixes: C crops, S tokens of a crop (prefix tokens, then patches row by row), G patches per side, H heads,
D width of a head, F width of the features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import initialization as init
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROTARY = "molmo_rotary_2d"
"""Name of the attention with rotary rows and columns in transformers' `attn_implementation`."""
ROTARY_BASE = 100.0
"""Slowest wavelength over 2 pi, in patches. As small as the grids are: Heo et al., "Rotary Position Embedding for
Vision Transformer" (2024), axial variant."""


def resize_positions(table: Tensor, grid: int, prefix: int) -> Tensor:
    """A learned position table for another number of patches.

    Bicubic, antialiased, corners not aligned, in fp32, as Molmo's reference does it. transformers' own CLIP, SigLIP and
    DINOv2 leave out the antialiasing when they interpolate; its DINOv2 with registers does not.

    Args:
        table: [prefix + old * old, F].
        grid: patches per side of the result.
        prefix: positions before the patches (the class token's), which stay as they are.

    Returns:
        [prefix + grid * grid, F]; `table` itself where it fits already.
    """
    old = round((len(table) - prefix) ** 0.5)
    if old == grid:
        return table
    patches = table[prefix:].float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    resized = F.interpolate(patches, (grid, grid), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([table[:prefix], resized[0].flatten(1).T.to(table.dtype)])


class LearnedPositions2D(nn.Module):
    """A learned vector per row and one per column of a crop, added to the features. Zero at first: a pretrained encoder
    starts with the features that it has."""

    def __init__(self, grid: int, features: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(grid, features))
        self.columns = nn.Parameter(torch.zeros(grid, features))

    def first_weights(self) -> None:
        init.zeros_(self.rows)
        init.zeros_(self.columns)

    def forward(self, features: Tensor) -> Tensor:
        """Features [C, G * G, F] with the vectors of their places."""
        return features + (self.rows[:, None] + self.columns).flatten(0, 1)


class Rotary2D(nn.Module):
    """Turns queries and keys by their row (first half of a head) and column (second half), so that their product
    depends on how far apart two patches lie and not on where. Prefix tokens have no place and are not turned.

    In each half, channels i and i + D / 4 form a pair, turned by `place * base ** (-4 i / D)` radians.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: int, prefix: int, head_width: int) -> None:
        super().__init__()
        self.sizes = (grid, prefix, head_width)
        cos, sin = self._tables()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines [S, 2, D / 4]; the second dimension is row, column."""
        grid, prefix, head_width = self.sizes
        quarter = head_width // 4
        frequencies = ROTARY_BASE ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
        places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))
        angles = F.pad(places[..., None] * frequencies, (0, 0, 0, 0, prefix, 0))
        return angles.cos(), angles.sin()

    def first_weights(self) -> None:
        """Refills the buffers, which no checkpoint holds."""
        for buffer, values in zip((self.cos, self.sin), self._tables(), strict=True):
            init.copy_(buffer, values)

    def forward(self, heads: Tensor) -> Tensor:
        """Queries or keys [C, H, S, D], turned in fp32."""
        first, second = heads.float().unflatten(-1, (2, 2, -1)).unbind(-2)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.stack(turned, dim=-2).flatten(-3).to(heads.dtype)


def rotary_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of an encoder's block, whose module carries the `Rotary2D` that all blocks share."""
    (rotary,) = module.rotary
    return sdpa_attention_forward(module, rotary(query), rotary(key), value, attention_mask, **kwargs)


AttentionInterface.register(ROTARY, rotary_attention)
AttentionMaskInterface.register(ROTARY, sdpa_mask)


class NoPositions(nn.Module):
    """Stands where an encoder has its embedding of positions, and adds nothing."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(0), persistent=False)  # transformers' first weights look for it

    def forward(self, position_ids: Tensor) -> float:
        return 0.0


def drop_position_embedding(embeddings: Any) -> None:
    """Takes the learned positions from transformers' CLIP or SigLIP embeddings, in place."""
    embeddings.position_embedding = NoPositions()


def drop_position_parameter(embeddings: Any) -> None:
    """Takes the learned positions from transformers' DINOv2 embeddings, in place. What stays is an empty buffer, which
    transformers' first weights look for."""
    del embeddings.position_embeddings
    embeddings.register_buffer("position_embeddings", torch.zeros(0), persistent=False)
    embeddings.interpolate_pos_encoding = _no_positions


def _no_positions(embeddings: Tensor, height: int, width: int) -> float:
    return 0.0
