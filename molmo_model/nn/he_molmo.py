"""HeMolmo's two passes: the language model first reads the image at low resolution, then with the details it wants.

The first pass runs layers of the language model over the sequence up to the low-resolution view, without
high-resolution tokens (`preprocessing.selection` lays it out). Its states score the candidates, `TokenSelector` keeps
the best K, and the ordinary forward follows with those K in the slots: their features, their raster positions, their
values weighted.

The first pass has a graph only in the layers that the params name, and none at all by default; the scorer learns
through the weighted values in any case. It calls the layers one by one, outside of the language model's own forward.
FSDP2 does not mind: each layer is a unit of its own or part of the root, which is gathered by then.

Shape suffixes: B rows, S tokens of a row, L tokens of the first pass, M images, K slots, T image tokens, E text width.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from molmo_model.errors import DataError
from molmo_model.nn.attention import LayerMasks, masks_for
from molmo_model.nn.token_selector import Choice

if TYPE_CHECKING:
    from molmo_model.nn.molmo import MolmoForConditionalGeneration, MolmoModel

PREFIX = "selector_"
"""What the selector's batch keys begin with; see `preprocessing.selection.selector_arrays`."""


@dataclass(frozen=True)
class Selection:
    """What the second pass is given."""

    rows: Tensor
    """int64 [B, S] image token to add at every place, counted from 1; 0 for none."""
    position_ids: Tensor
    """int64 [B, S]"""
    value_gate: Tensor | None
    """float32 [B, S], 1 everywhere but on slots; None where nothing is weighted."""
    choice: Choice


@dataclass(frozen=True)
class Reading:
    """Which token of a batch [B, S] is where and may see whom; see `attention.allowed`."""

    example_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor | None
    image_ids: Tensor | None


def select(
    model: "MolmoModel", embeddings: Tensor, tokens: Tensor, reading: Reading, where: Mapping[str, Tensor]
) -> Selection:
    """Chooses the high-resolution tokens of a batch.

    Args:
        embeddings: [B, S, E] of the tokens, without images.
        tokens: image tokens [T, E]: of each image the low-resolution ones, then all candidates.
        where: the batch's `selector_*`.
    """
    selector = model.token_selector
    assert selector is not None
    states = _low_resolution_states(model, embeddings, tokens, reading, where) if selector.reads_states else []
    choice: Choice = selector(states, tokens, where)
    shape, slots = reading.position_ids.shape, where[PREFIX + "slots"]
    chosen, nowhere = choice.chosen.clamp(min=0), reading.position_ids.numel()
    slots = torch.where(slots < 0, nowhere, slots).flatten()

    def filled(values: Tensor, of_slots: Tensor) -> Tensor:
        """Values [B, S] with those of the slots put in."""
        return F.pad(values.flatten(), (0, 1)).scatter(0, slots, of_slots.flatten())[:-1].view(shape)

    gate = filled(torch.ones(shape, device=tokens.device), choice.gate) if selector.weighs else None
    rows = filled(where[PREFIX + "rows"], where[PREFIX + "candidates"].gather(1, chosen) + 1)
    positions = filled(reading.position_ids, where[PREFIX + "positions"].gather(1, chosen))
    return Selection(rows, positions, gate, choice)


def insert(embeddings: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """Adds to the embeddings [B, S, E] the image tokens [T, E] whose numbers [B, S] count from 1; 0 adds nothing."""
    table = torch.cat([tokens.new_zeros(1, tokens.shape[-1]), tokens])
    return embeddings + F.embedding(rows, table).to(embeddings.dtype)


def selector_inputs(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Takes the selector's arrays out of a forward's keywords."""
    return {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}


def reading_of(
    input_ids: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    example_ids: Tensor | None,
    segment_ids: Tensor | None,
    image_ids: Tensor | None,
) -> Reading:
    """The reading of a forward's arguments.

    Raises:
        DataError: positions are missing, or the mask is one that was made for the whole sequence.
    """
    if position_ids is None:
        raise DataError("a token selector places tokens by position; give the preprocessor's position_ids")
    if example_ids is None and attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            raise DataError("a token selector reads a part of the sequence by itself; give attention_mask as [B, S]")
        example_ids = attention_mask.long() - 1
    example_ids = torch.zeros_like(input_ids) if example_ids is None else example_ids
    return Reading(example_ids, position_ids, segment_ids, image_ids)


def _low_resolution_states(
    model: "MolmoModel", embeddings: Tensor, tokens: Tensor, reading: Reading, where: Mapping[str, Tensor]
) -> list[Tensor]:
    """States [B, L, E] after each layer that the scorer looks at: all of the first pass, or its last one."""
    selector, text = model.token_selector, model.config.text_config
    assert selector is not None
    config = selector.config
    places = where[PREFIX + "pass"]
    some, at = places >= 0, places.clamp(min=0)

    def taken(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.gather(1, at)

    x = insert(embeddings, tokens, where[PREFIX + "rows"])
    x = x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
    if not config.gradient_embedding:
        x = x.detach()
    position_ids = reading.position_ids.gather(1, at)
    masks = masks_for(
        text,
        example_ids=torch.where(some, reading.example_ids.gather(1, at), -1),
        segment_ids=taken(reading.segment_ids),
        image_ids=taken(reading.image_ids),
        position_ids=position_ids,
    )
    first, end = config.gradient_layers or (0, 0)
    layers = config.low_res_layers or text.num_hidden_layers
    states = run_layers(model.language_model, x, masks, position_ids, layers, range(first, end))
    return states if config.all_layers else states[-1:]


def run_layers(
    language_model: nn.Module, x: Tensor, masks: LayerMasks, position_ids: Tensor, layers: int, with_gradient: range
) -> list[Tensor]:
    """The states [B, L, E] after each of the first layers of any language model of transformers, before its last norm.

    Args:
        with_gradient: numbers of the layers that keep a graph; the others run without.
    """
    types: Any = getattr(language_model.config, "layer_types", None)
    rotary: Any = language_model.rotary_emb
    blocks: Any = language_model.layers
    typed = types and "layer_type" in inspect.signature(rotary.forward).parameters
    rotations = {name: rotary(x, position_ids, name) for name in set(types)} if typed else rotary(x, position_ids)
    states = []
    for number in range(layers):
        with torch.set_grad_enabled(torch.is_grad_enabled() and number in with_gradient):
            x = blocks[number](
                x,
                attention_mask=masks[types[number]] if isinstance(masks, dict) else masks,
                position_embeddings=rotations[types[number]] if typed else rotations,
                position_ids=position_ids,
                past_key_values=None,
                use_cache=False,
            )
        states.append(x)
    return states


@torch.no_grad()
def generation_inputs(
    model: "MolmoForConditionalGeneration", batch: Mapping[str, Any]
) -> tuple[dict[str, Any], Selection | None]:
    """What `generate` is given instead of crops: the kept image tokens, their positions, and weights if they count.

    Chosen here and not in the prefill: once for all beams, and later steps must know the weights too.

    Args:
        batch: of `collate_prompts`, on the model's device.

    Raises:
        DataError: the batch has images but no `selector_*`.
    """
    if not len(batch.get("pooling", ())):
        return {}, None
    if not (where := {name: value for name, value in batch.items() if name.startswith(PREFIX)}):
        raise DataError("a model with a token selector needs batches of a preprocessor with selector_tokens")
    body, input_ids = model.model, batch["input_ids"]
    encoded = body.get_image_features(batch["pixel_values"], batch["pooling"], patch_masks=batch.get("patch_masks"))
    tokens = encoded.pooler_output
    image_ids = body.attended_images(batch["image_ids"])
    reading = Reading(batch["attention_mask"].long() - 1, batch["position_ids"], None, image_ids)
    selection = select(body, body.embed(input_ids), tokens, reading, where)
    places = torch.eq(input_ids, model.config.image_token_id)
    kept = tokens[selection.rows[places] - 1].split([count for count in places.sum(1).tolist() if count])
    inputs = {
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tuple(kept))},
        "position_ids": selection.position_ids,
    }
    if selection.value_gate is not None:
        inputs["value_gate"] = selection.value_gate
    return inputs, selection
