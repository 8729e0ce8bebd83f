"""Batches against the examples they are made of."""

import numpy as np
import pytest
import torch

from molmo_model.errors import DataError
from molmo_model.preprocessing.collator import PAD_EXAMPLE, collate, collate_prompts
from molmo_model.preprocessing.preprocessor import IGNORE
from tests.preprocessing.examples import asked, example

TALK = [asked("How many cats?", "Two."), asked("Which is larger?", "The left one.")]


@pytest.fixture(scope="module", params=[64, 48], ids=["even grid", "odd grid"])
def pre(request, build):
    return build(image_size=request.param)


@pytest.fixture(scope="module")
def encoded(pre):
    """Examples with one image, none, two, and one."""
    shapes = [((96, 96),), (), ((61, 203), (30, 30)), ((7, 300),)]
    return [pre.encode(example(TALK, sizes)) for sizes in shapes]


def crops_of_tokens(pixels: np.ndarray, pooling: np.ndarray) -> np.ndarray:
    """[T, W, 16, 16, 3] the pixels that every place of every window means; black in holes."""
    side = pixels.shape[1] // 16
    patches = pixels.reshape(-1, side, 16, side, 16, 3).swapaxes(2, 3).reshape(-1, 16, 16, 3)
    return np.where((pooling >= 0)[..., None, None, None], patches[pooling], 0)


def test_rows_hold_their_examples(pre, encoded):
    config = pre.config
    packs = [[encoded[0], encoded[1], encoded[2]], [], [encoded[3], encoded[0]]]
    length = max(sum(map(len, pack)) for pack in packs) + 5
    batch = {name: tensor.numpy() for name, tensor in collate(packs, length, config, pad_id=1).items()}
    tokens = 0
    for row, pack in enumerate(packs):
        start = images = 0
        for number, one in enumerate(pack):
            here = (row, slice(start, start + len(one)))
            for name in ("input_ids", "labels", "loss_weights", "position_ids", "segment_ids"):
                np.testing.assert_array_equal(batch[name][here], getattr(one, name), err_msg=name)
            assert (batch["example_ids"][here] == number).all()
            found = batch["image_ids"][here]
            np.testing.assert_array_equal(found > 0, one.image_ids > 0)
            np.testing.assert_array_equal(found[found > 0], one.image_ids[one.image_ids > 0] + images)
            count = len(one.pooling)
            np.testing.assert_array_equal(
                crops_of_tokens(batch["pixel_values"], batch["pooling"][tokens : tokens + count]),
                crops_of_tokens(one.pixels, one.pooling) if count else np.zeros((0, 4, 16, 16, 3)),
            )
            np.testing.assert_array_equal(batch["pooling"][tokens : tokens + count] < 0, one.pooling < 0)
            tokens += count
            images += len(one.image_token_counts)
            start += len(one)
        pads = (row, slice(start, None))
        assert (batch["example_ids"][pads] == PAD_EXAMPLE).all() and (batch["input_ids"][pads] == 1).all()
        assert (batch["labels"][pads] == IGNORE).all() and not batch["loss_weights"][pads].any()
        assert not batch["image_ids"][pads].any()
    assert tokens == len(batch["pooling"]) == (batch["input_ids"] == config.im_patch_id).sum()
    assert (batch["pooling"] < 0).any() == (config.image_size == 48)  # the case that a shifted hole would spoil


def test_types_and_shapes(pre, encoded):
    batch = collate([[encoded[0]], [encoded[2]]], 256, pre.config)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()}
    for name in ("input_ids", "labels", "position_ids", "example_ids", "segment_ids", "image_ids"):
        assert found.pop(name) == (torch.int64, (2, 256))
    size = pre.config.image_size
    assert found == {
        "loss_weights": (torch.float32, (2, 256)),
        "pixel_values": (torch.uint8, (len(encoded[0].pixels) + len(encoded[2].pixels), size, size, 3)),
        "pooling": (torch.int64, (len(encoded[0].pooling) + len(encoded[2].pooling), 4)),
    }


@pytest.mark.parametrize("packs", [[], [[]], [[], []], "text"])
def test_without_images_there_is_one_black_crop(pre, encoded, packs):
    packs = [[encoded[1]]] if packs == "text" else packs
    batch = collate(packs, None, pre.config)
    assert batch["pixel_values"].shape == (1, *[pre.config.image_size] * 2, 3) and not batch["pixel_values"].any()
    assert batch["pooling"].shape == (0, 4)
    assert batch["input_ids"].shape == (len(packs), len(encoded[1]) if packs and packs[0] else 1)


def test_a_pack_that_is_too_long(pre, encoded):
    config = pre.config
    need = len(encoded[0]) + len(encoded[3])
    assert collate([[encoded[0], encoded[3]]], need, config)["input_ids"].shape == (1, need)
    with pytest.raises(DataError, match=rf"{need} tokens, more than {need - 1}; its examples: example-7, example-7"):
        collate([[encoded[0], encoded[3]]], need - 1, config)


def test_prompts_end_together(pre):
    asked_for = ((0, ((96, 96),)), (1, ()), (1, ((30, 30), (61, 203))))
    prompts = [pre.encode_prompt(example(TALK, sizes), number) for number, sizes in asked_for]
    batch = {name: tensor.numpy() for name, tensor in collate_prompts(prompts, pre.config, pad_id=1).items()}
    longest = max(map(len, prompts))
    for row, prompt in enumerate(prompts):
        pads = longest - len(prompt)
        assert batch["attention_mask"][row].tolist() == [0] * pads + [1] * len(prompt)
        assert batch["input_ids"][row].tolist() == [1] * pads + prompt.input_ids.tolist()
        assert batch["image_ids"][row].tolist() == [0] * pads + prompt.image_ids.tolist()
        assert batch["position_ids"][row].tolist() == [0] * pads + list(range(len(prompt)))
    assert batch["image_counts"].tolist() == [1, 0, 2]
    assert (
        batch["image_token_counts"].sum()
        == len(batch["pooling"])
        == (batch["input_ids"] == pre.config.im_patch_id).sum()
    )
    parts = np.split(batch["pooling"], [len(prompts[0].pooling)])
    for part, prompt in zip(parts, (prompts[0], prompts[2]), strict=True):
        np.testing.assert_array_equal(
            crops_of_tokens(batch["pixel_values"], part), crops_of_tokens(prompt.pixels, prompt.pooling)
        )
    with pytest.raises(DataError, match="at least one prompt"):
        collate_prompts([], pre.config)
