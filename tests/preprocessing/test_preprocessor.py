"""Message trees against the separate conversations they stand for, and what else a sequence must be."""

import dataclasses
import io
import json
from math import sqrt

import numpy as np
import pytest
from PIL import Image as PILImage

from molmo_model.data.example import Conversation, Example, Image, Message
from molmo_model.errors import CheckpointError, ConfigError, DataError
from molmo_model.model_config import CropMode, LossWeighting, MessageFormat, PreprocessingConfig
from molmo_model.preprocessing.image import decode_image, resize
from molmo_model.preprocessing.preprocessor import IGNORE, PREFIX_SEGMENT, Encoded, Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from tests.preprocessing.examples import asked, example, picture, png

BASE = 520
"""Embedding rows of the language model, more than the tokenizer's 512 ids."""
START, END, PATCH, COL = range(BASE, BASE + 4)


def talk(*texts: str, style: str = "chat", weight: float = 1.0) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(style, tuple(Message(roles[i % 2], text) for i, text in enumerate(texts)), weight)


TREE = [
    talk("Which digit is in row 1?", "7"),
    talk("How many?", "Three of them.", "Really?", "Yes.", weight=2.5),
    talk("Describe it.", "A long caption, with 12 words.", style="caption"),
]


def branch(encoded: Encoded, number: int) -> dict[str, np.ndarray]:
    here = encoded.segment_ids == number
    names = ("input_ids", "labels", "position_ids", "image_ids", "loss_weights")
    return {name: getattr(encoded, name)[here] for name in names}


def test_one_conversation_by_hand(build):
    """Every token of a small sequence, written out from its definition."""
    pre = build()
    encoded = pre.encode(example([TREE[1]], ((40, 40),)))
    text = pre.vocabulary.encode
    end = pre.eos_id
    low = [START, *[PATCH, PATCH, COL] * 2, END]  # 64 / 16 = 4 patches per side, pooled to 2
    turns = [text("How many?"), text(" Three of them."), text(" Really?"), text(" Yes.")]
    full = [end, *low, *low, *turns[0], *turns[1], end, *turns[2], *turns[3], end]
    assert encoded.input_ids.tolist() == full[:-1]
    is_answer = (
        [0] * 17 + [0] * len(turns[0]) + [1] * (len(turns[1]) + 1) + [0] * len(turns[2]) + [1] * (len(turns[3]) + 1)
    )
    assert encoded.labels.tolist() == [
        token if bit else IGNORE for token, bit in zip(full[1:], is_answer[1:], strict=True)
    ]
    assert encoded.image_ids.tolist() == [0] + [1] * 16 + [0] * (len(full) - 18)
    assert encoded.position_ids.tolist() == list(range(len(full) - 1))
    np.testing.assert_array_equal(encoded.loss_weights, np.where(encoded.labels == IGNORE, 0, np.float32(2.5)))
    assert encoded.pixels.shape == (2, 64, 64, 3) and encoded.pooling.shape == (8, 4)
    assert encoded.image_token_counts.tolist() == [8]
    dtypes = {field.name: getattr(getattr(encoded, field.name), "dtype", None) for field in dataclasses.fields(encoded)}
    assert dtypes.pop("pixels") == np.uint8 and dtypes.pop("loss_weights") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int64), None}


@pytest.mark.parametrize("sizes", [(), ((96, 96),), ((96, 96), (40, 200))], ids=["text", "one image", "two images"])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_tree_is_its_conversations(build, sizes, seed):
    """Each branch holds what the conversation alone would, except for its weight, and the prefix stands once."""
    pre = build()
    tree = example(TREE, sizes)
    rng = None if seed is None else np.random.default_rng(seed)
    whole = pre.encode(tree, None, rng)
    alone = [pre.encode(tree, [number]) for number in range(3)]
    prefix = int((whole.segment_ids == PREFIX_SEGMENT).sum())
    assert (whole.segment_ids[:prefix] == PREFIX_SEGMENT).all() and (whole.labels[:prefix] == IGNORE).all()
    assert (np.diff(whole.segment_ids[prefix:]) >= 0).all() and set(whole.segment_ids[prefix:]) == {0, 1, 2}
    assert whole.position_ids[:prefix].tolist() == list(range(prefix))
    unmatched = [0, 1, 2]
    for number in range(3):
        found = branch(whole, number)
        (match,) = [k for k in unmatched if found["input_ids"].tolist() == branch(alone[k], 0)["input_ids"].tolist()]
        unmatched.remove(match)
        if seed is None:
            assert match == number
        expected = branch(alone[match], 0)
        expected["loss_weights"] = expected["loss_weights"] / np.float32(sqrt(3))
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)
        assert found["labels"][-1] == pre.eos_id and found["loss_weights"][-1] > 0
        assert found["position_ids"][0] == prefix
    for one in alone:
        np.testing.assert_array_equal(one.input_ids[:prefix], whole.input_ids[:prefix])
        np.testing.assert_array_equal(one.pooling, whole.pooling)
        np.testing.assert_array_equal(one.pixels, whole.pixels)


def test_branches_are_shuffled_by_the_generator(build):
    pre = build()
    tree = example(TREE)
    orders = set()
    for seed in range(30):
        first = pre.encode(tree, None, np.random.default_rng(seed))
        again = pre.encode(tree, None, np.random.default_rng(seed))
        np.testing.assert_array_equal(first.input_ids, again.input_ids)
        orders.add(tuple(len(branch(first, number)["labels"]) for number in range(3)))
    assert len(orders) == 6


def test_weights_without_sharing_out(build):
    pre = build()
    pre = Preprocessor(dataclasses.replace(pre.config, loss_weighting=LossWeighting.none), pre.tokenizer)
    encoded = pre.encode(example(TREE))
    assert {w for n in range(3) for w in branch(encoded, n)["loss_weights"]} == {0.0, 1.0, 2.5}


@pytest.mark.parametrize("shape", [(40, 40), (96, 96), (61, 203), (128, 96), (7, 500)])
@pytest.mark.parametrize("mode", CropMode)
def test_pixels_and_windows_of_an_image(build, shape, mode):
    """The first crop is the whole picture, and the windows of the others find the patches of the resized canvas."""
    pre = build(crop_mode=mode)
    one = example([TREE[0]], (shape,))
    encoded = pre.encode(one)
    image = decode_image(one.images[0].data)
    assert (encoded.input_ids == PATCH).sum() == len(encoded.pooling) == encoded.image_token_counts.sum()
    fused = mode is CropMode.hierarchical
    patches = encoded.pixels.reshape(-1, 4, 16, 4, 16, 3).swapaxes(2, 3).reshape(-1, 16, 16, 3)
    views = []
    if fused:
        np.testing.assert_array_equal(encoded.pixels[0], resize(image, 64, 64, "siglip"))
    elif mode is not CropMode.overlap_and_resize:
        views.append(resize(image, 64, 64, "siglip"))
    if mode is not CropMode.resize:
        rows = np.flatnonzero(encoded.input_ids == START)
        tokens = encoded.input_ids[rows[-1] :]
        height = int((tokens == COL).sum())
        width = int((tokens == PATCH).sum()) // height
        views.append(resize(image, height * 32, width * 32, "siglip"))  # every tiling's grid is even here
    windows = np.split(
        encoded.pooling[:, :4], np.cumsum([view.shape[0] * view.shape[1] // 32**2 for view in views])[:-1]
    )
    for view, found in zip(views, windows, strict=True):
        blocks = view.reshape(view.shape[0] // 32, 2, 16, -1, 2, 16, 3).transpose(0, 3, 1, 4, 2, 5, 6)
        np.testing.assert_array_equal(patches[found], blocks.reshape(-1, 4, 16, 16, 3))


def test_several_images(build):
    pre = build()
    both = example([TREE[0]], ((96, 96), (40, 300)))
    encoded = pre.encode(both)
    first, second = (pre.encode(Example("x", (image,), (TREE[0],))) for image in both.images)
    np.testing.assert_array_equal(encoded.pixels, np.concatenate([first.pixels, second.pixels]))
    shifted = np.where(second.pooling >= 0, second.pooling + len(first.pixels) * 16, -1)
    np.testing.assert_array_equal(encoded.pooling, np.concatenate([first.pooling, shifted]))
    assert encoded.image_token_counts.tolist() == [len(first.pooling), len(second.pooling)]
    blocks = [encoded.input_ids[encoded.image_ids == k] for k in (1, 2)]
    for block, alone in zip(blocks, (first, second), strict=True):
        np.testing.assert_array_equal(block, alone.input_ids[alone.image_ids == 1])
    text = encoded.input_ids[(encoded.image_ids == 0) & (encoded.segment_ids == PREFIX_SEGMENT)]
    assert pre.vocabulary.decode(text.tolist()) == "Image 1Image 2"
    with pytest.raises(DataError, match=r"example-7: has 3 images.* max_images 2; raise .*preprocessing.max_images"):
        build(max_images=2).encode(example([TREE[0]], ((20, 20),) * 3))


def test_text_alone(build):
    encoded = build().encode(example([TREE[0]], ()))
    assert encoded.pixels.shape == (0, 64, 64, 3) and encoded.pooling.shape == (0, 4)
    assert encoded.segment_ids[0] == PREFIX_SEGMENT and not encoded.image_ids.any()


LABELLED = Conversation(
    "point", (Message("user", label="Cars"), Message("assistant", points=((1.0, 2.0), (50.0, 3.0)), label="Cars"))
)


@pytest.mark.parametrize("conversation", [*TREE, LABELLED], ids=["one", "two turns", "caption", "points"])
@pytest.mark.parametrize("system_prompt", ["none", "style"])
@pytest.mark.parametrize("message_format", MessageFormat)
@pytest.mark.parametrize("sizes", [((96, 96),), ((30, 30), (96, 70)), ()])
def test_the_prompt_is_what_training_feeds(build, chat_tokenizer, conversation, system_prompt, message_format, sizes):
    if conversation is LABELLED and not sizes:
        return
    pre = build(system_prompt=system_prompt)
    tokenizer = chat_tokenizer if message_format is MessageFormat.chatml else pre.tokenizer
    pre = Preprocessor(dataclasses.replace(pre.config, message_format=message_format), tokenizer)
    one = example([TREE[2], conversation], sizes)
    prompt, trained = pre.encode_prompt(one, 1), pre.encode(one, [1])
    length = len(prompt)
    for name in ("input_ids", "position_ids", "segment_ids", "image_ids"):
        np.testing.assert_array_equal(getattr(prompt, name), getattr(trained, name)[:length], err_msg=name)
    for name in ("pixels", "pooling", "image_token_counts"):
        np.testing.assert_array_equal(getattr(prompt, name), getattr(trained, name), err_msg=name)
    assert (prompt.labels == IGNORE).all() and not prompt.loss_weights.any()
    # the answer is all that follows: its tokens are the labels from the prompt's last token on
    expected = trained.labels[length - 1 :]
    assert (expected != IGNORE).all() and expected[-1] == pre.eos_id
    wanted = '<points x1="1.0" y1="2.0" x2="50.0" y2="3.0" alt="cars">cars</points>'
    answer = conversation.messages[-1].text or wanted
    assert pre.decode(expected.tolist()) == answer
    plain = prompt.prompt_text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert plain and pre.decode(prompt.input_ids.tolist()).endswith(plain.rstrip("\n"))
    assert not prompt.prompt_text.endswith(" ")


def test_a_drawn_prompt_differs_only_in_the_question(build):
    pre = build()
    one = example([LABELLED])
    drawn = {tuple(pre.encode(one, None, np.random.default_rng(seed)).input_ids) for seed in range(40)}
    assert len(drawn) == 4 and tuple(pre.encode(one).input_ids) in drawn


@pytest.mark.parametrize("sizes", [(), ((96, 96),), ((30, 400), (50, 50))])
@pytest.mark.parametrize("seed", range(6))
def test_cost_is_that_of_the_encoding(build, sizes, seed):
    pre = build(crop_mode=list(CropMode)[seed % 3])
    tree = example([*TREE, *([LABELLED] * bool(sizes))], sizes)
    shapes = [(image.width, image.height) for image in tree.images]
    parts = pre.cost_parts(shapes, tree.conversations)
    prefix = parts.prefix
    for chosen in ([0], [2, 1], list(range(len(tree.conversations)))):
        for max_tokens in (None, prefix + 25, prefix + 45):
            args = ([tree.conversations[k] for k in chosen], np.random.default_rng(seed), max_tokens)
            encoded = pre.encode(tree, chosen, np.random.default_rng(seed), max_tokens)
            assert pre.cost(shapes, *args) == (len(encoded), len(encoded.pixels))
            assert len(encoded) <= prefix + sum(parts.branches[k] for k in chosen)
    whole = pre.encode(tree)
    assert parts.crops == len(whole.pixels) and (whole.segment_ids == PREFIX_SEGMENT).sum() == prefix
    for number in range(3):  # nothing to draw: exact
        assert parts.branches[number] == (whole.segment_ids == number).sum()
    assert parts.tokens == prefix + sum(parts.branches)


def test_longest_prompt_is_the_bound(build):
    pre = build()
    one = example([LABELLED])
    (bound,) = pre.cost_parts([(96, 96)], one.conversations).branches
    lengths = [(pre.encode(one, None, np.random.default_rng(seed)).segment_ids == 0).sum() for seed in range(40)]
    assert max(lengths) == bound > min(lengths)


def test_what_does_not_fit(build):
    pre = build()
    tree = example(TREE)
    whole = pre.encode(tree)
    prefix = int((whole.segment_ids == PREFIX_SEGMENT).sum())
    lengths = [int((whole.segment_ids == number).sum()) for number in range(3)]
    # the second no longer fits, the third still does; the weights follow from the two that are kept
    middle = pre.encode(example([TREE[0], TREE[2], TREE[1]]), None, None, prefix + lengths[0] + lengths[1])
    assert lengths[2] > lengths[1] and set(middle.segment_ids[prefix:]) == {0, 1}
    np.testing.assert_array_equal(branch(middle, 1)["input_ids"], branch(whole, 1)["input_ids"])
    assert branch(middle, 0)["loss_weights"].max() == np.float32(1 / sqrt(2))
    short = pre.encode(example([TREE[2], TREE[0]]), None, None, prefix + lengths[0])
    assert set(short.segment_ids[prefix:]) == {0}
    np.testing.assert_array_equal(branch(short, 0)["input_ids"], branch(whole, 0)["input_ids"])
    assert branch(short, 0)["loss_weights"].max() == 1.0
    assert len(pre.encode(tree, None, None, len(whole))) == len(whole)
    with pytest.raises(DataError, match=rf"example-7: its images take {prefix} tokens, more than {prefix - 1}"):
        pre.encode(tree, None, None, prefix - 1)
    with pytest.raises(
        DataError, match=rf"example-7: .* {prefix} tokens and its shortest conversation {min(lengths)}, tog"
    ):
        pre.encode(tree, None, None, prefix + min(lengths) - 1)
    prompt = pre.encode_prompt(tree, 0)
    with pytest.raises(DataError, match=rf"example-7#0: the prompt has {len(prompt)} tokens, more than 5"):
        pre.encode_prompt(tree, 0, 5)


def test_errors_name_the_example(build):
    pre = build()
    with pytest.raises(DataError, match="example-7: a user message of style 'qa' has no text"):
        pre.encode(example([asked(None, "yes")]))
    with pytest.raises(DataError, match=r"example-7: has 1 conversations, asked for \[1\]"):
        pre.encode_prompt(example([TREE[0]]), 1)
    good = picture(20, 30)
    for image, message in (
        (Image(good.data[:100], 30, 20, "PNG"), "example x, image 2: cannot be decoded"),
        (Image(good.data, 20, 30, "PNG"), "image 2: has 30 x 20 pixels, but is recorded as 20 x 30"),
        (Image(good.data, 3, 2, "PNG"), "image 2: 30 x 20 pixels are more than 6"),
    ):
        with pytest.raises(DataError, match=message):
            pre.encode(Example("x", (good, image), (TREE[0],)))


def test_nobody_changes_the_shared_geometry(build):
    """Two encodings of one geometry do not share memory that a caller could write."""
    pre = build()
    first = pre.encode(example([TREE[0]]))
    kept = first.pooling.copy()
    first.pooling[:] = 0
    first.input_ids[:] = 0
    np.testing.assert_array_equal(pre.encode(example([TREE[0]])).pooling, kept)


def test_saved_and_loaded(build, tmp_path, caplog):
    pre = build(system_prompt="style", max_crops=3)
    for folder in (tmp_path / "a", tmp_path / "b"):
        pre.save_pretrained(folder)
        (folder / "config.json").write_text('{"model_type": "some_model_that_is_not_registered"}')
        pre = Preprocessor.from_pretrained(folder)
    assert pre.config == build(system_prompt="style", max_crops=3).config
    one = example(TREE)
    expected = build(system_prompt="style", max_crops=3).encode(one)
    np.testing.assert_array_equal(pre.encode(one).input_ids, expected.input_ids)
    assert "not registered" not in caplog.text and "instantiate a model" not in caplog.text
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version is 99"),
        ({"resize": "siglib"}, "siglip"),
        ({"crop_mode": "tiles"}, "tiles"),
        ({"pooling_size": [2]}, "molmo_preprocessor.json"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_wrong_file_is_refused_by_name(build, tmp_path, change, message):
    build().save_pretrained(tmp_path)
    path = tmp_path / "molmo_preprocessor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        Preprocessor.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"molmo_preprocessor\.json cannot be read"):
        Preprocessor.from_pretrained(tmp_path)


def test_wrong_params_are_refused(build):
    with pytest.raises(ConfigError, match=r"up to 511, the language model 511 embedding rows"):
        build(vocab_size=511)
    with pytest.raises(ConfigError, match="system_prompt 'loud'"):
        build(system_prompt="loud")
    with pytest.raises(ConfigError, match=r"overlap_margins \[1\]"):
        build(overlap_margins=[1])
    with pytest.raises(ConfigError, match="resize method 'big'"):
        PreprocessorConfig.build(
            PreprocessingConfig(), image_size=378, patch_size=14, pooling_size=(2, 2), resize="big", vocab_size=9
        )


def test_special_ids_begin_at_the_embedding_size(build):
    config = build(vocab_size=1000).config
    assert config.special_ids["<im_start>"] == config.im_start_id == 1000
    assert [config.im_end_id, config.im_patch_id, config.im_col_id] == [1001, 1002, 1003]
    assert sorted(config.special_ids.values()) == list(range(1000, 1006))


def test_decode_drops_what_is_not_text(build):
    pre = build()
    ids = [pre.eos_id, START, PATCH, *pre.vocabulary.encode(" 12 cats").tolist(), IGNORE, pre.pad_id, pre.eos_id]
    assert pre.decode(ids) == "12 cats"


def test_a_turned_photo_is_seen_upright(build):
    """Bytes that say 'turn me' give the tokens and pixels of the turned picture."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    exif = PILImage.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG", exif=exif)
    turned = Example("x", (Image(buffer.getvalue(), 40, 90, "PNG"),), (TREE[0],))
    plain = Example("x", (Image(png(np.ascontiguousarray(np.rot90(pixels, -1))), 40, 90, "PNG"),), (TREE[0],))
    pre = build()
    np.testing.assert_array_equal(pre.encode(turned).pixels, pre.encode(plain).pixels)
    np.testing.assert_array_equal(pre.encode(turned).input_ids, pre.encode(plain).input_ids)
