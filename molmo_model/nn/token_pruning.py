"""Fewer image tokens in the language model, without training: the most different ones of each image stay.

The criterion is DivPrune's (arXiv 2503.02175): choose the tokens whose smallest distance to each other is largest, a
max-min diversity problem, by its greedy solution over cosine distances. It sees image tokens alone, neither the
question nor any layer of the language model, so it costs one matrix of similarities per image, and every row of a batch
is pruned as it would be alone.

What stays keeps its order and its position ids: a token still stands where its place in the image was, and the text
behind it as far away as it was. Start, end and column tokens of the image all stay.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from molmo_model.errors import ConfigError
from molmo_model.nn.molmo import MolmoForConditionalGeneration

ENCODED = ("pixel_values", "pooling", "patch_masks", "crop_frames", "crop_videos")
"""Keys of a batch that the vision backbone reads; a pruned batch has its tokens instead."""
Choice = Callable[[Tensor, int], npt.NDArray[np.int64]]
"""From the tokens [t, E] of one image, and how many stay, to their places in order."""


def prune_image_tokens(
    model: MolmoForConditionalGeneration,
    batch: Mapping[str, Any],
    keep: float,
    *,
    pad_id: int = 0,
    tokens: Sequence[Tensor] | None = None,
    choose: Choice | None = None,
) -> dict[str, Any]:
    """A batch for `generate` with a share of the image tokens of every image.

    Args:
        batch: as `collate_prompts` makes it, padded on the left.
        keep: share of each image's tokens that stays, above 0; rounded up. 1 returns the batch as it is.
        pad_id: the token that fills rows up.
        tokens: the tokens [t, E] of every image, if they are known already; None encodes the images, once.
        choose: which tokens of an image stay; None is `diverse`.

    Returns:
        The batch with shorter rows, without crops and windows: `mm_encoder_outputs` holds the tokens that are left.
        `position_ids` are those of the whole prompt, with gaps where tokens are missing.

    Raises:
        ConfigError: a share that is none, or a model that selects tokens itself.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep_image_tokens is {keep}; it must be above 0 and at most 1")
    if chosen := sorted(name for name in batch if name.startswith("selector_")):
        raise ConfigError(f"this model selects its image tokens itself ({chosen[0]}); set keep_image_tokens to 1")
    if keep == 1 or not len(batch.get("pooling", ())):
        return dict(batch)
    tokens = _encode(model, batch) if tokens is None else tokens
    kept = [(choose or diverse)(one, ceil(keep * len(one) - 1e-9)) for one in tokens]
    stays = torch.cat([_marked(len(one), places) for one, places in zip(tokens, kept, strict=True)])
    left = tuple(one[torch.from_numpy(places).to(one.device)] for one, places in zip(tokens, kept, strict=True))
    pruned = {name: value for name, value in batch.items() if name not in ENCODED}
    pruned |= _shortened(pruned, model.config.image_token_id, stays, pad_id)
    pruned["image_token_counts"] = torch.tensor([len(places) for places in kept])
    return pruned | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=left)}}


def diverse(tokens: Tensor, count: int) -> npt.NDArray[np.int64]:
    """Places, in order, of the `count` tokens of [t, E] that differ most: first the one whose nearest neighbour is
    farthest, then always the one farthest from all that are chosen; of equals the first."""
    unit = F.normalize(tokens.detach().float(), dim=-1)
    distance = (1 - unit @ unit.T).cpu().numpy()
    np.fill_diagonal(distance, np.inf)
    nearest = distance.min(axis=1)
    chosen: list[int] = []
    for _ in range(count):
        place = int(nearest.argmax())
        nearest = distance[place].copy() if not chosen else np.minimum(nearest, distance[place])
        chosen.append(place)
        nearest[chosen] = -np.inf
    return np.sort(np.array(chosen, dtype=np.int64))


def _encode(model: MolmoForConditionalGeneration, batch: Mapping[str, Any]) -> Sequence[Tensor]:
    """The tokens of every image."""
    names = (*ENCODED, "image_token_counts")
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            inputs = {name: batch[name].to(model.device) for name in names if batch.get(name) is not None}
            encoded: Sequence[Tensor] = model.get_image_features(**inputs).pooler_output
            return encoded
    finally:
        model.train(was_training)


def _marked(count: int, places: npt.NDArray[np.int64]) -> Tensor:
    marks = torch.zeros(count, dtype=torch.bool)
    marks[torch.from_numpy(places)] = True
    return marks


def _shortened(batch: Mapping[str, Tensor], image_token_id: int, stays: Tensor, pad_id: int) -> dict[str, Tensor]:
    """The rows without the `<im_patch>` tokens that `stays` [tokens of the batch] marks False, padded on the left."""
    present = batch["attention_mask"].bool()
    patches = (batch["input_ids"] == image_token_id) & present
    positions = batch.get("position_ids")
    if positions is None:
        positions = (present.long().cumsum(-1) - 1).clamp(min=0)
    present = present.masked_scatter(patches, stays.to(present.device))
    length = int(present.sum(-1).max())
    order = present.long().argsort(dim=-1, stable=True)[:, -length:]  # what stays, in order, at the right end
    shown = present.gather(1, order)
    return {
        "input_ids": batch["input_ids"].gather(1, order).where(shown, pad_id),
        "attention_mask": shown.long(),
        "position_ids": positions.gather(1, order).where(shown, 0),
        "image_ids": batch["image_ids"].gather(1, order).where(shown, 0),
    }
