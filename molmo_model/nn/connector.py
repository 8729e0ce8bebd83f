"""The connector: patch features become image tokens of the language model's width.

Pooling gathers each token's window of patches and makes one vector of it; the projector brings that to the language
model's width. `POOLINGS` and `PROJECTORS` name what there is.

Shape suffixes: C crops, N patches of a crop, T image tokens, W patches of a window, F pooled width, E text width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


class MeanQueryPooling(nn.Module):
    """Multi-head attention over a window, asked by one query: the mean of the window.

    Args:
        in_features: width of a patch feature (all chosen layers).
        out_features: width of the result, that of the vision encoder.
        use_mask: True: holes take no part in the mean and the attention. False: a hole is a zero vector like any other
            patch, so the mean divides by the whole window.
    """

    def __init__(self, in_features: int, out_features: int, num_heads: int, use_mask: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.use_mask = use_mask
        self.q_proj = nn.Linear(in_features, out_features)
        self.k_proj = nn.Linear(in_features, out_features)
        self.v_proj = nn.Linear(in_features, out_features)
        self.o_proj = nn.Linear(out_features, out_features)

    def forward(self, window: Tensor, valid: Tensor) -> Tensor:
        """Windows [T, W, in] with zeroed holes, and which patches are none [T, W], to [T, out]."""
        mask = None
        if self.use_mask:
            count = valid.sum(-1, keepdim=True).clamp(min=1).to(window.dtype)
            query = window.sum(1) / count
            # a window of nothing but holes attends to its zero vectors: an empty softmax would be NaN
            mask = (valid | ~valid.any(-1, keepdim=True))[:, None, None, :]
        else:
            query = window.mean(1)
        q = self._heads(self.q_proj(query)[:, None])
        k, v = self._heads(self.k_proj(window)), self._heads(self.v_proj(window))
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(pooled.transpose(1, 2).flatten(1))

    def first_weights(self) -> None:
        """Keeps the scale of what goes in (variance 1 / fan-in), whatever the width."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init.normal_(linear.weight, std=linear.in_features**-0.5)
            init.zeros_(linear.bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SwiGLUProjector(nn.Module):
    """`down(silu(gate(x)) * up(x))`, without biases."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.up_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.down_proj = nn.Linear(hidden_features, out_features, bias=False)

    def first_weights(self) -> None:
        """Keeps the scale but for the last matrix: encoder features have no norm behind them, word embeddings are
        small, and image tokens of many times the size of words delayed learning."""
        for linear in (self.gate_proj, self.up_proj):
            init.normal_(linear.weight, std=linear.in_features**-0.5)
        init.normal_(self.down_proj.weight, std=0.1 * self.down_proj.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


POOLINGS = {"attention_meanq": MeanQueryPooling}
PROJECTORS = {"mlp": SwiGLUProjector}


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


class Connector(nn.Module):
    """Pools windows of patches and projects them.

    Args:
        vision_width: width of the vision encoder, which pooling keeps.
        num_layers: encoder blocks whose outputs are concatenated.
        window: patches of one window (height times width).
    """

    def __init__(
        self,
        *,
        vision_width: int,
        num_layers: int,
        text_width: int,
        window: int,
        pooling: str,
        num_heads: int,
        pooling_attention_mask: bool,
        window_position_embedding: bool,
        projector: str,
        projector_hidden_size: int,
    ) -> None:
        super().__init__()
        features = vision_width * num_layers
        self.window_position = WindowPositionEmbedding(window, features) if window_position_embedding else None
        self.pooling = POOLINGS[pooling](features, vision_width, num_heads, pooling_attention_mask)
        self.projector = PROJECTORS[projector](vision_width, projector_hidden_size, text_width)

    def forward(self, features: Tensor, pooling: Tensor) -> Tensor:
        """Image tokens [T, E].

        Args:
            features: [C, N, F] of all crops.
            pooling: [T, W] indices into the C * N patches, -1 for a hole.
        """
        valid = pooling >= 0
        # an embedding look-up is a gather whose backward is fast and, on a GPU, deterministic
        window = F.embedding(pooling.clamp(min=0), features.flatten(0, 1))
        if self.window_position is not None:
            window = self.window_position(window)
        window = window * valid[..., None].to(window.dtype)
        return self.projector(self.pooling(window, valid))
