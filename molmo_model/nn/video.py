"""What of the model looks across the frames of a clip: temporal positions and temporal attention (VideoOlmo).

    features [C, N, F] -> + a vector per frame number -> attention over the same patch of all frames, layer by layer

It stands between encoder and connector, which see every frame by itself. All of it is zero at first, so a model that
gets it begins as the one that it was. Crops of still images pass through unchanged, and clips of one batch do not see
each other. Frames attend in both directions; without the positions they are a set, so the two options go together.

Attention is dense over the crops of a batch, masked by clip: C * C * N scores per head.

Shape suffixes: C crops of the batch, N patches of a crop, F width of a patch feature (all chosen layers).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


class Norm(nn.LayerNorm):
    """A layer norm that knows its first weights, for models that get it after they were saved."""

    def first_weights(self) -> None:
        init.ones_(self.weight)
        init.zeros_(self.bias)


class InLinear(nn.Linear):
    """A projection that keeps the scale of what goes in. transformers asks only modules that own parameters for their
    first weights, so these stand here and not in the layer."""

    def first_weights(self) -> None:
        init.normal_(self.weight, std=self.in_features**-0.5)
        init.zeros_(self.bias)


class OutLinear(nn.Linear):
    """A projection that adds nothing at first."""

    def first_weights(self) -> None:
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class TemporalAttention(nn.Module):
    """One layer of attention over the same patch of all frames, with a residual connection around it."""

    def __init__(self, features: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = Norm(features)
        self.q_proj = InLinear(features, features)
        self.k_proj = InLinear(features, features)
        self.v_proj = InLinear(features, features)
        self.o_proj = OutLinear(features, features)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """[N, C, F] to the same; `visible` bool [C, C]: which crop (row) sees which."""
        normed = self.norm(x)
        q, k, v = (self._heads(linear(normed)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return x + self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class TemporalPositions(nn.Module):
    """A learned vector per frame number of a clip; numbers beyond the last share its vector."""

    def __init__(self, max_frames: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(max_frames, features))

    def first_weights(self) -> None:
        init.zeros_(self.weight)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        """[N, C, F] with the vectors of `frames` [C] added."""
        return x + F.embedding(frames.clamp(min=0, max=len(self.weight) - 1), self.weight).to(x.dtype)


class TemporalMixer(nn.Module):
    """Temporal positions and attention, as many as there are."""

    def __init__(self, features: int, num_heads: int, max_frames: int, positions: bool, layers: int) -> None:
        super().__init__()
        self.positions = TemporalPositions(max_frames, features) if positions else None
        self.layers = nn.ModuleList(TemporalAttention(features, num_heads) for _ in range(layers))

    def forward(self, features: Tensor, crop_frames: Tensor | None, crop_videos: Tensor | None) -> Tensor:
        """Features [C, N, F] of all crops, those of frames mixed over their clips.

        Args:
            crop_frames: [C] number of the frame within its clip, -1 for a crop of a still image; None: there are no
                frames. In training every parameter then still takes part, by nothing: sharded ranks stay in step.
            crop_videos: [C] number of the clip in the batch, -1 for none.
        """
        if crop_frames is None or crop_videos is None:
            if not self.training:
                return features
            first = torch.zeros(1, dtype=torch.long, device=features.device)
            return features + 0 * self._mix(features[:1, :1].detach(), first, first).mean()
        moving = (crop_videos >= 0)[:, None, None]
        return torch.where(moving, self._mix(features, crop_frames, crop_videos), features)

    def _mix(self, features: Tensor, frames: Tensor, videos: Tensor) -> Tensor:
        x = features.transpose(0, 1)
        if self.positions is not None:
            x = self.positions(x, frames)
        itself = torch.eye(len(videos), dtype=torch.bool, device=videos.device)
        visible = ((videos[:, None] == videos) & (videos >= 0)) | itself
        for layer in self.layers:
            x = layer(x, visible)
        return x.transpose(0, 1)


def equal_windows(pooling: str, masked: bool, window_position_embedding: bool) -> str:
    """What in a connector needs pooling windows of one size, in the params' words; empty if nothing does.

    Windows of fewer patches are filled up with holes. Means and attention that leave holes out do not see them; all
    else would take them for patches, or has weights for so many places.
    """
    if window_position_embedding:
        return "connector.window_position_embedding"
    if pooling in ("none", "stack", "c_abstractor"):
        return f"connector.pooling {pooling}"
    return "" if masked else f"connector.pooling {pooling} with pooling_attention_mask: false"
