"""Encoded examples to the tensors of a batch: packed rows for training, left-padded rows for generation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from molmo_model.errors import DataError
from molmo_model.preprocessing.preprocessor import IGNORE, Encoded
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig

if TYPE_CHECKING:
    import torch

Arrays = dict[str, npt.NDArray[Any]]

PAD_EXAMPLE = -1
"""Example number of padding: pads see each other and nothing else."""


def collate(
    packs: Sequence[Sequence[Encoded]], sequence_length: int | None, config: PreprocessorConfig, pad_id: int = 0
) -> "dict[str, torch.Tensor]":
    """A training batch: row b holds the examples of pack b one after the other.

    Args:
        packs: the examples of each row; a row may be empty.
        sequence_length: S, the length of every row; None takes that of the longest (at least 1).
        config: gives the shapes of crops and windows of a batch without images.
        pad_id: the token that fills rows up.

    Returns:
        input_ids, labels, position_ids, example_ids, segment_ids, image_ids: int64 [B, S]; loss_weights: float32
        [B, S].
        example_ids number a row's examples from 0, pads are `PAD_EXAMPLE`; image_ids number a row's images from 1.
        pixel_values: uint8 [C, H, W, 3], all crops of the batch, one black one if there are none.
        pooling: int64 [T, W] flat patch numbers into C * patches, holes stay -1; rows in the order of the image tokens.

    Raises:
        DataError: a pack is longer than `sequence_length`.
    """
    lengths = [sum(map(len, pack)) for pack in packs]
    if sequence_length is None:
        sequence_length = max([1, *lengths])
    shape = (len(packs), sequence_length)
    batch: Arrays = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "labels": np.full(shape, IGNORE, dtype=np.int64),
        "loss_weights": np.zeros(shape, dtype=np.float32),
        "position_ids": np.zeros(shape, dtype=np.int64),
        "example_ids": np.full(shape, PAD_EXAMPLE, dtype=np.int64),
        "segment_ids": np.zeros(shape, dtype=np.int64),
        "image_ids": np.zeros(shape, dtype=np.int64),
    }
    for row, (pack, length) in enumerate(zip(packs, lengths, strict=True)):
        if length > sequence_length:
            names = ", ".join(encoded.id for encoded in pack)
            raise DataError(f"a pack has {length} tokens, more than {sequence_length}; its examples: {names}")
        start = images = 0
        for number, encoded in enumerate(pack):
            place = (row, slice(start, start + len(encoded)))
            for name in ("input_ids", "labels", "loss_weights", "position_ids", "segment_ids"):
                batch[name][place] = getattr(encoded, name)
            batch["example_ids"][place] = number
            batch["image_ids"][place] = np.where(encoded.image_ids > 0, encoded.image_ids + images, 0)
            images += len(encoded.image_token_counts)
            start += len(encoded)
    return _tensors(batch, [encoded for pack in packs for encoded in pack], config)


def collate_prompts(
    prompts: Sequence[Encoded], config: PreprocessorConfig, pad_id: int = 0
) -> "dict[str, torch.Tensor]":
    """A batch for generation: prompts of different lengths end together, filled up on the left.

    Returns:
        input_ids, attention_mask (1 on prompts), image_ids: int64 [B, S]; position_ids: int64 [B, S], 0 on pads.
        pixel_values, pooling: as in `collate`.
        image_token_counts: int64 [images] image tokens of every image of the batch, in order.
        image_counts: int64 [B] images of every row.

    Raises:
        DataError: no prompts.
    """
    if not prompts:
        raise DataError("a batch for generation needs at least one prompt")
    shape = (len(prompts), max(map(len, prompts)))
    batch: Arrays = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "attention_mask": np.zeros(shape, dtype=np.int64),
        "position_ids": np.zeros(shape, dtype=np.int64),
        "image_ids": np.zeros(shape, dtype=np.int64),
    }
    for row, encoded in enumerate(prompts):
        place = (row, slice(shape[1] - len(encoded), None))
        batch["input_ids"][place] = encoded.input_ids
        batch["attention_mask"][place] = 1
        batch["position_ids"][place] = encoded.position_ids
        batch["image_ids"][place] = encoded.image_ids
    batch["image_token_counts"] = np.concatenate([encoded.image_token_counts for encoded in prompts])
    batch["image_counts"] = np.array([len(encoded.image_token_counts) for encoded in prompts], dtype=np.int64)
    return _tensors(batch, prompts, config)


def _tensors(batch: Arrays, examples: Sequence[Encoded], config: PreprocessorConfig) -> "dict[str, torch.Tensor]":
    """The arrays as tensors, with all crops and pooling windows of the examples, in order."""
    import torch

    patches = config.tiling.crop_patches**2
    crops, pooling, start = [], [], 0
    for encoded in examples:
        crops.append(encoded.pixels)
        pooling.append(np.where(encoded.pooling >= 0, encoded.pooling + start * patches, encoded.pooling))
        start += len(encoded.pixels)
    if start == 0:  # the vision encoder always runs, so that ranks with and without images stay in step
        crops.append(np.zeros((1, config.image_size, config.image_size, 3), dtype=np.uint8))
    if not pooling:
        pooling.append(np.zeros((0, config.pooling_size[0] * config.pooling_size[1]), dtype=np.int64))
    arrays = {**batch, "pixel_values": np.concatenate(crops), "pooling": np.concatenate(pooling)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
