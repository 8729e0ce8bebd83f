"""The connector: patch features become image tokens of the language model's width.

    features [C, N, F] -> padding embedding -> dropout -> windows by index -> pooling -> fusion of scales -> projector

Poolings and projectors stand in `molmo_model.nn.pooling` and `molmo_model.nn.projector`.

Windows are gathered: [T, W, F], which for windows that do not overlap is the size of the features once more (and the
holes), whatever the size of a window.

Shape suffixes: C crops, N patches of a crop, T windows, W patches of a window, Q tokens of a window, F width of a patch
feature (all chosen layers), E text width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from molmo_model.errors import DataError
from molmo_model.nn.pooling import POOLINGS, FanInLinear, PoolingSpec
from molmo_model.nn.projector import PROJECTORS
from molmo_model.nn.video import equal_windows


class WindowPositionEmbedding(nn.Module):
    """A learned vector per place in the window, so that pooling can tell its patches apart from the first step."""

    def __init__(self, window: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(window, features))

    def first_weights(self) -> None:
        """As large as the features: smaller ones delayed learning from scratch."""
        init.normal_(self.weight, std=1.0)

    def forward(self, window: Tensor) -> Tensor:
        return window + self.weight


PADDING_VECTORS = {"pad_embed": 1, "regress": 1, "pad_and_partial_pad": 2}
"""Learned vectors of every padding embedding."""


class PaddingEmbedding(nn.Module):
    """Tells padded patches of letterboxed crops apart; see `model_config.PaddingEmbedding`.

    The vectors enter by multiplication, so that they have a gradient, if a zero one, in a batch without padding too:
    sharded ranks stay in step.
    """

    def __init__(self, kind: str, features: int) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.zeros(PADDING_VECTORS[kind], features))

    def first_weights(self) -> None:
        """Zero: a pretrained encoder's features at first stay as they are."""
        init.zeros_(self.weight)

    def forward(self, features: Tensor, patch_masks: Tensor) -> Tensor:
        """Features [C, N, F] with the vectors added; `patch_masks` [C, N] is the share of a patch that is picture."""
        if self.kind == "regress":
            shares = patch_masks.clamp(min=0)[..., None]
        elif self.kind == "pad_embed":
            shares = (patch_masks == 0)[..., None]
        else:
            shares = torch.stack([patch_masks == 0, (patch_masks > 0) & (patch_masks < 1)], dim=-1)
        return features + shares.to(features.dtype) @ self.weight


class SumFusion(nn.Module):
    """The pooled window plus the global patch through a matrix."""

    def __init__(self, features: int, pooled: int, width: int) -> None:
        super().__init__()
        self.out_features = pooled
        self.coarse_proj = FanInLinear(features, pooled, bias=False)

    def forward(self, pooled: Tensor, coarse: Tensor) -> Tensor:
        return pooled + self.coarse_proj(coarse)[:, None]


class ConcatFusion(nn.Module):
    """The pooled window and the global patch side by side, brought to the encoder's width by a matrix."""

    def __init__(self, features: int, pooled: int, width: int) -> None:
        super().__init__()
        self.out_features = width
        self.merge_proj = FanInLinear(pooled + features, width, bias=False)

    def forward(self, pooled: Tensor, coarse: Tensor) -> Tensor:
        return self.merge_proj(torch.cat([pooled, coarse[:, None].expand(-1, pooled.shape[1], -1)], dim=-1))


SCALE_FUSIONS: dict[str, type[SumFusion] | type[ConcatFusion]] = {"sum": SumFusion, "concat": ConcatFusion}


class Connector(nn.Module):
    """Pools windows of patches and projects them.

    Args:
        vision_width: width of the vision encoder.
        num_layers: encoder blocks whose outputs are concatenated.
        window: height and width of one window in patches.
        num_queries: tokens of one window, with the poolings that make several.
        padding_embedding: a name of `PADDING_VECTORS`, or `none`.
        feature_dropout: probability that an element of a patch feature is dropped in training.
        scale_fusion: a name of `SCALE_FUSIONS`; None: a window has one scale. Else the last column of `pooling` is the
            patch of the global crop that shows the window's place.
    """

    def __init__(
        self,
        *,
        vision_width: int,
        num_layers: int,
        text_width: int,
        window: tuple[int, int],
        pooling: str,
        num_heads: int,
        pooling_attention_mask: bool,
        window_position_embedding: bool,
        projector: str,
        projector_hidden_size: int,
        num_queries: int = 1,
        padding_embedding: str = "none",
        feature_dropout: float = 0.0,
        scale_fusion: str | None = None,
    ) -> None:
        super().__init__()
        features, patches = vision_width * num_layers, window[0] * window[1]
        self.feature_dropout = feature_dropout
        self.padding = None if padding_embedding == "none" else PaddingEmbedding(padding_embedding, features)
        self.window_position = WindowPositionEmbedding(patches, features) if window_position_embedding else None
        spec = PoolingSpec(features, vision_width, window, num_heads, pooling_attention_mask, num_queries)
        self.pooling = POOLINGS[pooling](spec)
        width = self.pooling.out_features
        self.fusion = None if scale_fusion is None else SCALE_FUSIONS[scale_fusion](features, width, vision_width)
        width = width if self.fusion is None else self.fusion.out_features
        self.columns = patches if self.fusion is None else patches + 1
        fixed = equal_windows(pooling, pooling_attention_mask, window_position_embedding)
        self.equal_windows = fixed or ("scale fusion" if self.fusion is not None else "")
        self.projector = PROJECTORS[projector](width, projector_hidden_size, text_width)

    def forward(self, features: Tensor, pooling: Tensor, patch_masks: Tensor | None = None) -> Tensor:
        """Image tokens [T * Q, E], the tokens of a window one after the other.

        Args:
            features: [C, N, F] of all crops.
            pooling: [T, W] indices into the C * N patches, -1 for a hole; [T, W + 1] with several scales. Windows of
                films may be of another size, smaller ones filled up with holes, where `nn.video.equal_windows` allows.
            patch_masks: [C, N] share of each patch that is picture, for the padding embedding.

        Raises:
            DataError: windows of another size than the connector's, or no masks for its padding embedding.
        """
        if pooling.shape[1] != self.columns and self.equal_windows:
            raise DataError(
                f"windows have {pooling.shape[1]} patches, the connector's {self.columns}, and {self.equal_windows} "
                "needs that many; preprocess with the model's own preprocessor"
            )
        features = self._embed_padding(features, patch_masks)
        if self.feature_dropout:
            features = F.dropout(features, self.feature_dropout, self.training)
        valid = pooling >= 0
        # an embedding look-up is a gather whose backward is fast and, on a GPU, deterministic
        window = F.embedding(pooling.clamp(min=0), features.flatten(0, 1))
        if self.fusion is None:
            pooled = self._pool(window, valid)
        else:
            coarse = window[:, -1] * valid[:, -1:].to(window.dtype)
            pooled = self.fusion(self._pool(window[:, :-1], valid[:, :-1]), coarse)
        return self.projector(pooled.flatten(0, 1))

    def _pool(self, window: Tensor, valid: Tensor) -> Tensor:
        """[T, Q, out] of gathered windows, whose holes show the first patch until they are zeroed here."""
        if self.window_position is not None:
            window = self.window_position(window)
        return self.pooling(window * valid[..., None].to(window.dtype), valid)

    def _embed_padding(self, features: Tensor, patch_masks: Tensor | None) -> Tensor:
        if self.padding is None:
            return features
        if patch_masks is None or patch_masks.shape != features.shape[:2]:
            given = "none" if patch_masks is None else list(patch_masks.shape)
            raise DataError(
                f"the padding embedding needs patch_masks {list(features.shape[:2])}, given: {given}; set "
                "`patch_masks: true` in molmo_preprocessor.json"
            )
        return self.padding(features, patch_masks)
