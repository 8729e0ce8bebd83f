"""Encoded examples to the tensors of a batch: packed rows for training, left-padded rows for generation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from molmo_model.errors import DataError
from molmo_model.preprocessing.preprocessor import IGNORE, Encoded
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.selection import Placed, no_images, selector_arrays
from molmo_model.preprocessing.video import fill_windows

if TYPE_CHECKING:
    import torch

Arrays = dict[str, npt.NDArray[Any]]

PASS_MULTIPLE = 128
"""Where rows have a fixed length, that of the low-resolution pass is a multiple of this: few shapes, whole blocks."""
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
        pooling: int64 [T, W] flat patch numbers into C * patches, holes stay -1; one row per window,
        in the order of the image tokens that it becomes.
        patch_masks: float32 [C, patches] share of each patch that is picture; only with `config.patch_masks`.
        crop_frames, crop_videos: int64 [C] number of a film's frame within its clip, and of the clip in the batch; -1
        for the crop of a still image. Only if there is a clip.
        selector_*: see `selection.selector_arrays`; only with `config.selector_tokens`.

    Raises:
        DataError: a pack is longer than `sequence_length`.
    """
    lengths = [sum(map(len, pack)) for pack in packs]
    multiple = 1 if sequence_length is None else PASS_MULTIPLE
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
    placed = []
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
            placed.append(Placed(row, start, encoded.slots, float(encoded.loss_weights.sum())))
            images += len(encoded.image_token_counts)
            start += len(encoded)
    if config.selector_tokens:
        some = any(one.slots for one in placed)
        batch |= selector_arrays(placed, shape, multiple) if some else no_images(*shape)
    return _tensors(batch, [encoded for pack in packs for encoded in pack], config)


def collate_prompts(
    prompts: Sequence[Encoded], config: PreprocessorConfig, pad_id: int = 0
) -> "dict[str, torch.Tensor]":
    """A batch for generation: prompts of different lengths end together, filled up on the left.

    Returns:
        input_ids, attention_mask (1 on prompts), image_ids: int64 [B, S]; position_ids: int64 [B, S], 0 on pads.
        pixel_values, pooling, patch_masks, crop_frames, crop_videos: as in `collate`; selector_* too, if there are
            images.
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
    if config.selector_tokens and any(encoded.slots for encoded in prompts):
        starts = [shape[1] - len(encoded) for encoded in prompts]
        placed = [Placed(row, starts[row], encoded.slots, 0.0) for row, encoded in enumerate(prompts)]
        batch |= selector_arrays(placed, shape, 1)
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
        pooling.append(np.zeros((0, config.tiling.window_columns), dtype=np.int64))
    width = max(windows.shape[1] for windows in pooling)  # films may have windows of another size than images
    pooling = [fill_windows(windows, width) for windows in pooling]
    arrays = {**batch, "pixel_values": np.concatenate(crops), "pooling": np.concatenate(pooling)}
    if any(encoded.crop_frames is not None for encoded in examples):
        arrays |= _film_arrays(examples)
    if config.patch_masks:
        masks = [encoded.patch_masks for encoded in examples if encoded.patch_masks is not None]
        arrays["patch_masks"] = np.concatenate(masks if start else [np.ones((1, patches), dtype=np.float32)])
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _film_arrays(examples: Sequence[Encoded]) -> Arrays:
    """Which frame of which clip of the batch every crop is."""
    frames, videos, clips = [], [], 0
    for encoded in examples:
        still = np.full(len(encoded.pixels), -1, dtype=np.int64)
        frames.append(still if encoded.crop_frames is None else encoded.crop_frames)
        videos.append(still if encoded.crop_videos is None else encoded.crop_videos + clips)
        clips += 0 if encoded.crop_videos is None else int(encoded.crop_videos.max()) + 1
    return {"crop_frames": np.concatenate(frames), "crop_videos": np.concatenate(videos)}
