"""Keys and values of a fixed number of slots at fixed places, and the language model's layers run over them.

transformers' own decoder layers are called one by one with what they take for a cache: an object with `update`. Prompts
are read packed, one behind the other in a single row without padding, under Molmo's attention rule, and every token's
keys and values are written straight to the place they keep. After that all slots advance by one token at a time, each
at a position of its own: shapes never change, nothing is read back, so that a step can be compiled and captured.

Importing this module registers the attention of such a step with transformers, under the name `molmo_slots`.

Shape suffixes: N slots, C places of a slot, T tokens of a packed row, H heads, G heads of keys and values, D width of a
head, E width of the model.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import sdpa_mask

from molmo_model.nn.attention import Mask, allowed, block_mask, packed_mask

STEP = "molmo_slots"
"""Name of the attention of a decoding step in transformers' `attn_implementation`."""
FULL, SLIDING = "full_attention", "sliding_attention"
LayerCall = Callable[..., Tensor]


class StaticCache:
    """Keys and values of every layer, [N, G, C, D] each.

    What lies behind a slot's position is never seen, so slots are reused without being cleared.

    Attributes:
        keys, values: one tensor per layer.
    """

    def __init__(
        self, config: PreTrainedConfig, slots: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots, self.context = slots, context
        shape = _shape(config, slots, context)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]


def cache_bytes(config: PreTrainedConfig, slots: int, context: int, dtype: torch.dtype) -> int:
    """Memory of a `StaticCache`."""
    one = torch.Size(_shape(config, slots, context)).numel()
    return 2 * int(config.num_hidden_layers) * one * dtype.itemsize


def _shape(config: PreTrainedConfig, slots: int, context: int) -> tuple[int, int, int, int]:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return slots, getattr(config, "num_key_value_heads", None) or heads, context, width


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """How many positions every layer sees back, itself included; None for all."""
    types = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    windows = {FULL: None, SLIDING: getattr(config, "sliding_window", None)}
    if unknown := sorted(set(types) - set(windows)):
        raise ValueError(f"layer types {unknown} of {config.model_type} have no mask; known: {sorted(windows)}")
    return [windows[name] for name in types]


# --- reading prompts


@dataclass(frozen=True)
class Packed:
    """Prompts in one row without padding. Prompts that begin alike may share that beginning: a tree whose branches see
    it and not each other, as in training. Filling at the end is an example of its own."""

    example_ids: Tensor
    """[T] tree of each token; -1 for filling."""
    segment_ids: Tensor | None
    """[T] what is shared has a higher number than every branch; None where nothing is shared."""
    image_ids: Tensor | None
    """[T] images whose tokens see each other, 0 for text; None where all see what is before them."""
    places: Tensor
    """[T] position in the prompt."""
    lengths: tuple[int, ...]
    """Tokens of each tree, and of the filling."""
    sources: Tensor
    """[W] which token is written; one that is shared comes once for every slot."""
    rows: Tensor
    """[W] into which slot."""

    def masks(self, config: PreTrainedConfig) -> dict[int | None, Mask]:
        """The attention rule by window: one mask per tree on a CPU, else block-sparse."""
        length, device = len(self.places), self.places.device
        segments = None if self.segment_ids is None else self.segment_ids[None]
        images = None if self.image_ids is None else self.image_ids[None]
        found: dict[int | None, Mask] = {}
        for window in set(layer_windows(config)):
            rule = allowed(self.example_ids[None], segments, images, self.places[None], window)
            if device.type == "cpu":
                found[window] = packed_mask(rule, self.lengths, 1, length, device)
            else:
                found[window] = block_mask(rule, 1, length, device)
        return found


class _Keep:
    """The cache of one layer while prompts are read: writes keys and values to their places, hands them back as they
    are."""

    def __init__(self, keys: Tensor, values: Tensor, packed: Packed, places: Tensor) -> None:
        self.keys, self.values, self.packed, self.places = keys, values, packed, places

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for own, new in ((self.keys, keys), (self.values, values)):
            written = new[0].transpose(0, 1).index_select(0, self.packed.sources)
            own[self.packed.rows, :, self.places] = written.to(own.dtype)
        return keys, values


def read_prompts(language_model: nn.Module, embeddings: Tensor, cache: StaticCache, packed: Packed) -> Tensor:
    """States [1, T, E] behind the last layer, before the norm; keys and values go into the cache.

    Args:
        embeddings: [1, T, E] of the packed prompts, image tokens included.
    """
    masks, position_ids = packed.masks(language_model.config), packed.places[None]
    places = packed.places[packed.sources]
    rotations = _rotations(language_model, embeddings, position_ids)
    layers: Any = language_model.layers
    x = embeddings
    for number, window in enumerate(layer_windows(language_model.config)):
        own = _Keep(cache.keys[number], cache.values[number], packed, places)
        x = _hidden(
            layers[number](
                x,
                attention_mask=masks[window],
                position_embeddings=rotations[number],
                position_ids=position_ids,
                past_key_values=own,
                use_cache=True,
            )
        )
    return x


# --- one more token for every slot


class _Extend:
    """The cache of one layer in a step: writes one token per slot, hands out all that is there."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, extent: int) -> None:
        self.keys, self.values, self.positions, self.extent = keys, values, positions, extent

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(self.positions), device=keys.device)
        self.keys[rows, :, self.positions] = keys[:, :, 0].to(self.keys.dtype)
        self.values[rows, :, self.positions] = values[:, :, 0].to(self.values.dtype)
        return self.keys[:, :, : self.extent], self.values[:, :, : self.extent]


def advance(
    language_model: nn.Module,
    embeddings: Tensor,
    positions: Tensor,
    cache: StaticCache,
    extent: int,
    layer_call: LayerCall | None = None,
) -> Tensor:
    """States [N, 1, E] of one more token per slot behind the last layer, before the norm.

    No value is read on the host and no shape depends on one.

    Args:
        embeddings: [N, 1, E] of the tokens.
        positions: [N] where they stand; their keys and values go there.
        extent: places that are looked at, from the first; above every position that matters.
        layer_call: a compiled `step_layer`.
    """
    call = layer_call or step_layer
    rotations = _rotations(language_model, embeddings, positions[:, None])
    windows = layer_windows(language_model.config)
    visible = {window: visible_places(positions, extent, window) for window in set(windows)}
    layers: Any = language_model.layers
    x = embeddings
    with _attending(language_model.config, STEP):
        for number, window in enumerate(windows):
            keys, values = cache.keys[number], cache.values[number]
            x = call(layers[number], x, visible[window], *rotations[number], positions, keys, values, extent)
    return x


def visible_places(positions: Tensor, extent: int, window: int | None) -> Tensor:
    """[N, 1, 1, extent] what a token at each position sees: itself and what is before, within the window."""
    place = torch.arange(extent, device=positions.device)
    seen = place <= positions[:, None]
    if window is not None:
        seen = seen & (positions[:, None] - place < window)
    return seen[:, None, None]


def step_layer(
    layer: nn.Module,
    x: Tensor,
    visible: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    extent: int,
) -> Tensor:
    """One layer of one step; compiled once for all layers, since nothing in it depends on the layer's number."""
    return _hidden(
        layer(
            x,
            attention_mask=visible,
            position_embeddings=(cos, sin),
            position_ids=positions[:, None],
            past_key_values=_Extend(keys, values, positions, extent),
            use_cache=True,
        )
    )


def step_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one token per slot.

    Args:
        query: [N, H, 1, D]
        key, value: [N, G, C, D]
        attention_mask: [N, 1, 1, C] True where a place is seen.

    Returns:
        [N, 1, H, D], and None for the attention weights.
    """
    slots, heads, _, width = query.shape
    if query.device.type == "cuda":
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=heads != key.shape[1]
        )
    else:  # heads that share keys are queries of one head: nothing is copied
        grouped = query.reshape(slots, key.shape[1], -1, width)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(slots, 1, heads, value.shape[-1]), None


# --- what both have in common


def _rotations(language_model: nn.Module, x: Tensor, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cosines and sines of every layer; OLMo 3 has one kind per type of layer."""
    config: Any = language_model.config
    rotary: Any = language_model.rotary_emb
    types: Any = getattr(config, "layer_types", None)
    if types and "layer_type" in _parameters(type(rotary)):
        found = {name: rotary(x, position_ids, name) for name in dict.fromkeys(types)}
        return [found[name] for name in types]
    return [rotary(x, position_ids)] * config.num_hidden_layers


def _parameters(kind: type) -> tuple[str, ...]:
    if kind not in _SIGNATURES:
        _SIGNATURES[kind] = tuple(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]
    return _SIGNATURES[kind]


_SIGNATURES: dict[type, tuple[str, ...]] = {}


def _hidden(output: Any) -> Tensor:
    """The states, where a layer returns more."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@contextmanager
def _attending(config: Any, implementation: str) -> Iterator[None]:
    """The layers of a model attend by another function, for a while."""
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(STEP, step_attention)
AttentionMaskInterface.register(STEP, sdpa_mask)
