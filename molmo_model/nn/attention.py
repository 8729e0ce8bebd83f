"""The one attention rule of Molmo, and the function that every language model attends with.

`allowed()` says which token may see which; every kind of mask is built from it: dense, block-sparse for FlexAttention
(GPU), or one small mask per packed example (CPU). `masks_for()` hands a language model what it takes: one mask, or one
per layer type. Importing this module registers the attention under the name `molmo` with transformers, for the
attention itself and for its masks: with the first alone, two-dimensional padding masks would arrive as `None` and
left-padded batches would be silently wrong.

Shape suffixes: B rows (packs), S tokens of a row, H heads, D width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "molmo"
"""Name of this attention in transformers' `attn_implementation`."""

GPU_KERNEL: Any = {"BACKEND": "TRITON"}
"""The block-sparse kernel for every length. For queries of fewer than 128 tokens torch picks one for decoding by
itself, and torch 2.11 finds no configuration of it and fails."""

MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`rule(b, h, q, k)`: may query q of row b see key k; index tensors in, booleans of their broadcast shape out."""


@dataclass(frozen=True)
class PackedMask:
    """Masks of packed examples, one after the other: what lies between examples is not even computed."""

    lengths: tuple[int, ...]
    """Tokens of each example, over all rows; they sum to B * S."""
    masks: tuple[Tensor, ...]
    """[1, 1, L, L] of each example, True where attention is allowed."""


Mask = Tensor | BlockMask | PackedMask
LayerMasks = Mask | dict[str, Mask]


def allowed(
    example_ids: Tensor,
    segment_ids: Tensor | None = None,
    image_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    window: int | None = None,
) -> MaskRule:
    """The attention rule of a pack, as a FlexAttention mask function.

    A token sees another one of the same example if that one is not later, its segment is not lower, and it lies within
    the window; or if both belong to one image.

    Args:
        example_ids: [B, S] packed example of each token; padding shares one id, so padding sees padding and no row of
            the softmax is empty.
        segment_ids: [B, S] branches of a message tree; a token sees segments not lower than its own, so that all see
            the shared prefix (high id) and no branch sees another.
        image_ids: [B, S] 0 for text, else an image of the row, whose tokens see each other in both directions.
        position_ids: [B, S] needed with `window`.
        window: sliding layers: a key is visible while fewer than this many positions back. Measured in positions, not
            indices, so that a packed or branched conversation attends exactly as it would alone.
    """
    if window is not None and position_ids is None:
        raise ValueError(f"a window of {window} is measured in positions; give position_ids")

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = k <= q
        if segment_ids is not None:
            visible = visible & (segment_ids[b, q] <= segment_ids[b, k])
        if window is not None and position_ids is not None:
            visible = visible & (position_ids[b, q] - position_ids[b, k] < window)
        if image_ids is not None:
            visible = visible | ((image_ids[b, q] == image_ids[b, k]) & (image_ids[b, q] > 0))
        return visible & (example_ids[b, q] == example_ids[b, k])

    return rule


def dense_mask(rule: MaskRule, rows: int, length: int, device: torch.device | str) -> Tensor:
    """The rule as booleans [B, 1, S, S], True where attention is allowed."""
    b = torch.arange(rows, device=device)[:, None, None, None]
    h = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    index = torch.arange(length, device=device)
    return rule(b, h, index[None, None, :, None], index[None, None, None, :]).expand(rows, 1, length, length)


def block_mask(rule: MaskRule, rows: int, length: int, device: torch.device | str) -> BlockMask:
    """The rule as a block-sparse mask for FlexAttention; empty blocks cost nothing."""
    return _compiled_create_block_mask()(rule, rows, None, length, length, device=device)


def packed_mask(
    rule: MaskRule, lengths: tuple[int, ...], rows: int, length: int, device: torch.device | str
) -> PackedMask:
    """The rule within each of the runs that the rows consist of; see `run_lengths`."""
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    masks, start = [], 0
    for count in lengths:
        index = torch.arange(start % length, start % length + count, device=device)
        row = torch.full((1, 1, 1, 1), start // length, device=device)
        masks.append(rule(row, head, index[None, None, :, None], index[None, None, None, :]))
        start += count
    return PackedMask(lengths, tuple(masks))


def run_lengths(example_ids: Tensor) -> tuple[int, ...] | None:
    """Lengths of the runs of equal ids in [B, S], row after row; None if an id comes back after another one, so that
    runs are no examples. Reads values: not for a GPU."""
    rows, length = example_ids.shape
    starts = torch.ones_like(example_ids, dtype=torch.bool)
    starts[:, 1:] = example_ids[:, 1:] != example_ids[:, :-1]
    at = starts.flatten().nonzero().squeeze(1)
    counts = torch.diff(at, append=at.new_tensor([rows * length])).tolist()
    runs = list(zip((at // length).tolist(), example_ids.flatten()[at].tolist(), strict=True))
    return tuple(counts) if len(set(runs)) == len(runs) else None


def masks_for(
    text_config: PreTrainedConfig,
    *,
    example_ids: Tensor,
    segment_ids: Tensor | None = None,
    image_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    kind: str | None = None,
) -> LayerMasks:
    """What to hand to a language model as `attention_mask`.

    Args:
        text_config: a model with `layer_types` takes a dict by layer type, any other one mask.
        kind: `dense`, `packed` or `block`; None takes block-sparse masks on a GPU. FlexAttention has no backward on a
            CPU; there packed masks are taken where the model hands them through (a dict) and examples are in one piece.
    """
    rows, length = example_ids.shape
    device = example_ids.device
    layer_types = getattr(text_config, "layer_types", None)
    lengths = run_lengths(example_ids) if layer_types and (kind or device.type) in {"cpu", "packed"} else None
    if kind is None:
        kind = "block" if device.type == "cuda" else "packed" if lengths else "dense"

    def mask(window: int | None) -> Mask:
        rule = allowed(example_ids, segment_ids, image_ids, position_ids, window)
        if kind == "packed":
            if lengths is None:
                raise ValueError("packed masks need a model with layer_types and every example in one piece")
            return packed_mask(rule, lengths, rows, length, device)
        return (block_mask if kind == "block" else dense_mask)(rule, rows, length, device)

    if not layer_types:
        return mask(None)
    windows = {"full_attention": None, "sliding_attention": getattr(text_config, "sliding_window", None)}
    if unknown := sorted(set(layer_types) - set(windows)):
        raise ValueError(f"layer types {unknown} of {text_config.model_type} have no mask; known: {sorted(windows)}")
    return {name: mask(windows[name]) for name in dict.fromkeys(layer_types)}


def molmo_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    value_gate: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of every layer of the language model.

    Args:
        query: [B, H, S, D]; keys and values may have fewer heads.
        attention_mask: BlockMask, PackedMask, or booleans [B, 1, S, S], or None for plain causal attention.
        value_gate: [B, S] multiplies the values; how a token selector passes gradients through the language model. Of
            the prompt alone where values of later tokens are in a cache; those count in full.

    Returns:
        [B, S, H, D], and None for the attention weights, which are never formed.
    """
    if value_gate is not None:
        value_gate = F.pad(value_gate, (0, value.shape[2] - value_gate.shape[1]), value=1.0)
        value = value * value_gate[:, None, :, None].to(value.dtype)
    if isinstance(attention_mask, BlockMask):
        eager = torch.compiler.is_compiling() or query.device.type == "cpu"  # compiled with its layer, or not at all
        attend: Any = flex_attention if eager else _compiled_flex()
        grouped = query.shape[1] != key.shape[1]
        out = attend(
            query,
            key,
            value,
            block_mask=attention_mask,
            scale=scaling,
            enable_gqa=grouped,
            kernel_options=GPU_KERNEL if query.device.type == "cuda" else None,
        )
        return out.transpose(1, 2).contiguous(), None
    kwargs.pop("sliding_window", None)  # the window is part of the mask
    if isinstance(attention_mask, PackedMask):
        return _attend_packed(query, key, value, attention_mask, scaling, dropout), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scaling: float | None, dropout: float
) -> Tensor:
    """Attention example by example. Rows are laid end to end and split once, whose backward is one concatenation."""
    rows, grouped = query.shape[0], query.shape[1] != key.shape[1]
    pieces = [x.transpose(1, 2).flatten(0, 1).split(mask.lengths) for x in (query, key, value)]
    out = []
    for q, k, v, visible in zip(*pieces, mask.masks, strict=True):
        q, k, v = (piece.transpose(0, 1)[None] for piece in (q, k, v))  # noqa: PLW2901 - [1, H, L, D]
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out).unflatten(0, (rows, -1))


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    """Uncompiled, `create_block_mask` forms the whole S x S mask; compiled, only its blocks. For any length at once."""
    return torch.compile(create_block_mask, dynamic=True) if torch.cuda.is_available() else create_block_mask


AttentionInterface.register(IMPLEMENTATION, molmo_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
