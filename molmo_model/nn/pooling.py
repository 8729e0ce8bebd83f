"""Poolings: the patches of a window become one vector, or `num_queries` of them. `POOLINGS` names what there is.

Every pooling takes windows [T, W, F] whose holes are zero vectors and which patches are none [T, W], and gives
[T, Q, out_features]. Masked (`use_mask`): holes take no part in means and attention. Unmasked, as the models of 2024
were trained: a hole is a zero vector like any other patch, so a mean divides by the whole window.

Shape suffixes: T windows, W patches of a window (h * w, row by row), F width of a patch, Q tokens of a window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


@dataclass(frozen=True)
class PoolingSpec:
    """What a pooling is built from."""

    features: int
    """Width of a patch feature: all chosen layers side by side."""
    width: int
    """Width of the vision encoder, which the poolings with parameters bring a window to."""
    window: tuple[int, int]
    """Height and width of a window in patches."""
    num_heads: int
    use_mask: bool
    num_queries: int


class FanInLinear(nn.Linear):
    """A matrix that at first keeps the scale of what goes in (variance 1 / fan-in), whatever the width."""

    def first_weights(self) -> None:
        init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            init.zeros_(self.bias)


class NoPooling(nn.Module):
    """A window of one patch, as it is."""

    def __init__(self, spec: PoolingSpec) -> None:
        super().__init__()
        self.out_features = spec.features

    def forward(self, window: Tensor, valid: Tensor) -> Tensor:
        return window


class MeanPooling(nn.Module):
    """The average of a window."""

    def __init__(self, spec: PoolingSpec) -> None:
        super().__init__()
        self.use_mask = spec.use_mask
        self.out_features = spec.features

    def forward(self, window: Tensor, valid: Tensor) -> Tensor:
        return window_mean(window, valid, self.use_mask)[:, None]


class StackPooling(nn.Module):
    """The patches of a window side by side on the channel; a hole is a zero vector, masked or not."""

    def __init__(self, spec: PoolingSpec) -> None:
        super().__init__()
        self.out_features = spec.window[0] * spec.window[1] * spec.features

    def forward(self, window: Tensor, valid: Tensor) -> Tensor:
        return window.flatten(1)[:, None]


def window_mean(window: Tensor, valid: Tensor, use_mask: bool) -> Tensor:
    """[T, F] the mean of the patches that are no holes, zero where there is none; or over the whole window."""
    if not use_mask:
        return window.mean(1)
    return window.sum(1) / valid.sum(-1, keepdim=True).clamp(min=1).to(window.dtype)


class WindowAttention(nn.Module):
    """Multi-head attention of queries to the patches of their window; children say what the queries are.

    Its matrices begin as those of the language model do (`initializer_range`), its biases as torch's: the model asks
    only modules that own a parameter for their first weights.

    Args:
        factor: how many times wider than the encoder the embedding, each head and the result are.
        query_features: width of a query; None is that of a patch.
    """

    def __init__(self, spec: PoolingSpec, factor: int = 1, query_features: int | None = None) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.use_mask = spec.use_mask
        self.out_features = factor * spec.width
        self.q_proj = nn.Linear(query_features or spec.features, self.out_features)
        self.k_proj = nn.Linear(spec.features, self.out_features)
        self.v_proj = nn.Linear(spec.features, self.out_features)
        self.o_proj = nn.Linear(self.out_features, self.out_features)

    def query(self, window: Tensor, valid: Tensor) -> Tensor:
        """[T, Q, query_features] what asks."""
        raise NotImplementedError

    def forward(self, window: Tensor, valid: Tensor) -> Tensor:
        # a window of nothing but holes attends to its zero vectors: an empty softmax would be NaN
        mask = (valid | ~valid.any(-1, keepdim=True))[:, None, None, :] if self.use_mask else None
        q = self._heads(self.q_proj(self.query(window, valid)))
        k, v = self._heads(self.k_proj(window)), self._heads(self.v_proj(window))
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(pooled.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MeanQueryPooling(WindowAttention):
    """Multi-head attention, asked by one query: the mean of the window."""

    def query(self, window: Tensor, valid: Tensor) -> Tensor:
        return window_mean(window, valid, self.use_mask)[:, None]


class FirstPatchPooling(WindowAttention):
    """Multi-head attention, asked by the first (top left) patch of the window; masked, by the first that is no hole."""

    def query(self, window: Tensor, valid: Tensor) -> Tensor:
        if not self.use_mask:
            return window[:, :1]
        first = valid.to(torch.uint8).argmax(-1)
        return window.gather(1, first[:, None, None].expand(-1, 1, window.shape[-1]))


class LearnedQueryPooling(WindowAttention):
    """Multi-head attention, asked by `num_queries` learned vectors, each of which becomes a token."""

    def __init__(self, spec: PoolingSpec) -> None:
        super().__init__(spec, query_features=spec.width)
        self.queries = nn.Parameter(torch.zeros(spec.num_queries, spec.width))

    def query(self, window: Tensor, valid: Tensor) -> Tensor:
        return self.queries.expand(len(window), -1, -1)

    def first_weights(self) -> None:
        """Queries of variance 1, so that they differ from the first step, and matrices that keep that scale."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init.normal_(linear.weight, std=linear.in_features**-0.5)
            init.zeros_(linear.bias)
        init.normal_(self.queries, std=1.0)


class ConvBlock(nn.Module):
    """A residual block of RegNet-Y (arXiv 2003.13678) with layer norms, depthwise: a place, its neighbours, a gate
    from the whole window, a place again.

    Places that `shown` [T, h, w, 1] marks 0 stay zero and add nothing to their neighbours or the gate.
    """

    def __init__(self, in_features: int, features: int) -> None:
        super().__init__()
        self.expand = FanInLinear(in_features, features, bias=False)
        self.expand_norm = nn.LayerNorm(features)
        self.spread = nn.Conv2d(features, features, 3, padding=1, groups=features, bias=False)
        self.spread_norm = nn.LayerNorm(features)
        self.squeeze = FanInLinear(features, max(in_features // 4, 1))
        self.gate = FanInLinear(max(in_features // 4, 1), features)
        self.project = FanInLinear(features, features, bias=False)
        self.project_norm = nn.LayerNorm(features)
        self.shortcut = FanInLinear(in_features, features, bias=False) if in_features != features else None

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        """[T, h, w, in_features] to [T, h, w, features]."""
        inner = F.silu(self.expand_norm(self.expand(x))) * shown
        spread = self.spread(inner.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        inner = F.silu(self.spread_norm(spread)) * shown
        summary = inner.sum((1, 2), keepdim=True) / shown.sum((1, 2), keepdim=True).clamp(min=1)
        inner = inner * self.gate(F.silu(self.squeeze(summary))).sigmoid()
        residual = x if self.shortcut is None else self.shortcut(x)
        return F.silu(residual + self.project_norm(self.project(inner))) * shown


class CAbstractorPooling(nn.Module):
    """Honeybee's C-Abstractor (arXiv 2312.06742): convolutions over the window as a grid, an adaptive average to
    `num_queries` places (a square number), convolutions over those; each place becomes a token, row by row.

    Masked, holes stay zero before the average and have no weight in it.
    """

    BLOCKS = 3
    """Before and behind the average, each; as published."""

    def __init__(self, spec: PoolingSpec) -> None:
        super().__init__()
        self.window = spec.window
        self.use_mask = spec.use_mask
        self.side = isqrt(spec.num_queries)
        self.out_features = spec.width
        widths = [spec.features, *[spec.width] * (self.BLOCKS - 1)]
        self.before = nn.ModuleList(ConvBlock(width, spec.width) for width in widths)
        self.behind = nn.ModuleList(ConvBlock(spec.width, spec.width) for _ in range(self.BLOCKS))

    def forward(self, window: Tensor, valid: Tensor) -> Tensor:
        shown = valid if self.use_mask else torch.ones_like(valid)
        x = window.unflatten(1, self.window)
        grid = shown.unflatten(1, self.window)[..., None].to(window.dtype)
        for block in self.before:
            x = block(x, grid)
        x = adaptive_mean(x, grid, self.side)
        everywhere = torch.ones_like(x[..., :1])
        for block in self.behind:
            x = block(x, everywhere)
        return x.flatten(1, 2)


def adaptive_mean(x: Tensor, weight: Tensor, side: int) -> Tensor:
    """Weighted averages of a grid [T, h, w, F] over `side` x `side` bins, zero where no weight [T, h, w, 1] is.

    Bin i reaches from `floor(i * size / side)` to `ceil((i + 1) * size / side)`, as torch's adaptive pooling, whose
    backward pass is not deterministic on a GPU; matrices are.
    """
    rows, columns = (_bins(size, side, x) for size in x.shape[1:3])
    total = torch.einsum("qh,thwf,pw->tqpf", rows, x * weight, columns)
    count = torch.einsum("qh,thwf,pw->tqpf", rows.float(), weight.float(), columns.float())
    return total / count.clamp(min=1).to(total.dtype)


def _bins(size: int, count: int, like: Tensor) -> Tensor:
    """[count, size] 1 where a bin holds a place."""
    place, number = torch.arange(size, device=like.device), torch.arange(count, device=like.device)[:, None]
    starts, ends = number * size // count, -(-(number + 1) * size // count)
    return ((place >= starts) & (place < ends)).to(like.dtype)


AnyPooling = NoPooling | MeanPooling | StackPooling | WindowAttention | CAbstractorPooling
POOLINGS: dict[str, Callable[[PoolingSpec], AnyPooling]] = {
    "none": NoPooling,
    "mean": MeanPooling,
    "attention_meanq": MeanQueryPooling,
    "attention_meanq_2x": partial(MeanQueryPooling, factor=2),
    "attention_meanq_4x": partial(MeanQueryPooling, factor=4),
    "attention": FirstPatchPooling,
    "attention_2wide": partial(FirstPatchPooling, factor=2),
    "learned_queries": LearnedQueryPooling,
    "c_abstractor": CAbstractorPooling,
    "stack": StackPooling,
}
MANY_TOKENS = ("learned_queries", "c_abstractor")
"""Poolings that make `num_queries` tokens of a window; the others make one."""
WITH_HEADS = (
    "attention_meanq",
    "attention_meanq_2x",
    "attention_meanq_4x",
    "attention",
    "attention_2wide",
    "learned_queries",
)
"""Poolings by attention, whose heads must divide the encoder's width."""
