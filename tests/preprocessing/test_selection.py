"""Layout of slots: positions, the map from low to high resolution, costs, and what a batch tells the selector."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from molmo_model.data.example import Conversation
from molmo_model.errors import ConfigError
from molmo_model.model_config import PreprocessingConfig, SelectorConfig
from molmo_model.preprocessing.collator import collate, collate_prompts
from molmo_model.preprocessing.preprocessor import PREFIX_SEGMENT, Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.selection import image_slots, longest_view, low_to_high, slot_tokens, view_size
from molmo_model.preprocessing.tiling import IM_COL, IM_END, IM_PATCH, IM_START, layout
from tests.preprocessing.examples import asked, example

SIZES = ((64, 64), (90, 150), (150, 90), (40, 300), (500, 480), (7, 9))


@pytest.fixture
def selecting(tokenizer):
    """`selecting(tokens=..., image_size=..., resize=..., ...)`: a preprocessor with a selector."""

    def make(image_size=64, pooling=2, resize="siglip", max_crops=6, **selector):
        config = PreprocessorConfig.build(
            PreprocessingConfig(max_crops=max_crops, overlap_margins=[1, 1]),
            image_size=image_size,
            patch_size=16,
            pooling_size=pooling,
            resize=resize,
            vocab_size=520,
            selector=SelectorConfig(**selector) if selector else None,
        )
        return Preprocessor(config, tokenizer)

    return make


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("image_size", [64, 80])
@pytest.mark.parametrize("keep", [1, 5, 1000])
def test_tokens_keep_the_positions_of_the_whole_view(selecting, size, image_size, keep):
    """Every token kept, column tokens and ends have the position that the same token has in a plain layout."""
    spec = selecting(image_size=image_size, tokens=keep).config.tiling
    one = layout(*size, spec)
    tokens, positions = slot_tokens(one, spec, keep)
    slots = image_slots(one, spec, keep, size, 0, 0)
    plain = one.tokens
    split = int(np.flatnonzero(plain == IM_END)[0]) + 1
    assert np.array_equal(tokens[:split], plain[:split]) and np.array_equal(positions[:split], np.arange(split))
    assert np.array_equal(slots.positions, split + np.flatnonzero(plain[split:] == IM_PATCH))
    after = tokens[split:]
    for kind in (IM_START, IM_COL, IM_END):
        assert np.array_equal(positions[split:][after == kind], split + np.flatnonzero(plain[split:] == kind))
    rows, cols = view_size(one, spec)
    assert len(slots.slots) == min(keep, rows * cols) and (tokens[slots.slots] == IM_PATCH).all()
    assert (tokens[slots.low] == IM_PATCH).all() and len(slots.low) + rows * cols == len(one.pooling)
    assert slots.end == len(tokens) and tokens[slots.low_view - 1] == IM_END
    assert positions[-1] == len(plain) - 1


@pytest.mark.parametrize(
    ("image_size", "pooling", "size"),
    [*((64, pooling, size) for pooling in (1, 2) for size in SIZES), (96, 3, (64, 64)), (64, 4, (64, 64))],
)
def test_low_to_high_is_bilinear_interpolation(selecting, image_size, pooling, size):
    """Where windows fill crop and canvas, against torch's own resizing of a grid of scores."""
    spec = selecting(image_size=image_size, pooling=pooling, tokens=4).config.tiling
    one = layout(*size, spec)
    assert all(side // 16 % pooling == 0 for side in one.canvas)
    side = spec.crop_patches
    grid = torch.rand(1, 1, side, side, dtype=torch.float64)
    expected = F.interpolate(grid, view_size(one, spec), mode="bilinear", align_corners=False)
    count = side // pooling
    scores = grid.view(count, pooling, count, pooling).transpose(1, 2).reshape(-1).numpy()  # token by token
    sources, weights = low_to_high(one, spec, size)
    np.testing.assert_allclose((scores[sources] * weights).sum(1), expected.flatten().numpy(), atol=1e-6)


@pytest.mark.parametrize("resize", ["siglip", "clip"])
@pytest.mark.parametrize("image_size", [64, 80])
@pytest.mark.parametrize("size", SIZES)
def test_low_to_high_shows_the_same_place_of_the_picture(selecting, resize, image_size, size):
    """Scores that are coordinates of the picture come out as the coordinates of each candidate's window."""
    spec = selecting(image_size=image_size, resize=resize, tokens=4).config.tiling
    one = layout(*size, spec)
    sources, weights = low_to_high(one, spec, size)
    assert np.allclose(weights.sum(1), 1) and weights.min() >= 0
    rows, cols = view_size(one, spec)
    low = -(-spec.crop_patches // 2)
    for axis in (0, 1):
        frames = (spec.crop_size, one.canvas[axis])
        scale = (
            min(spec.crop_size / size[0], spec.crop_size / size[1]),
            min(one.canvas[0] / size[0], one.canvas[1] / size[1]),
        )
        inner = [int(size[axis] * s) for s in scale] if resize == "clip" else list(frames)
        bars = [(frame - i) // 2 for frame, i in zip(frames, inner, strict=True)]
        centres = ((np.arange(low * 2) + 0.5) * 16 - bars[0]) / inner[0]  # of low-resolution patches, in the picture
        line = np.arange(low * low * 4)
        token, patch = line // 4, line % 4
        place = (token // low * 2 + patch // 2) if axis == 0 else (token % low * 2 + patch % 2)
        found = (centres[place][sources] * weights).sum(1).reshape(rows, cols)
        wanted = ((np.arange((rows, cols)[axis]) * 2 + 1) * 16 - bars[1]) / inner[1]
        wanted = wanted.clip(centres[0], centres[-1])
        wanted = np.broadcast_to(wanted[:, None] if axis == 0 else wanted, (rows, cols))
        np.testing.assert_allclose(found, wanted, atol=0.04)  # letterboxing cuts whole pixels


@pytest.mark.parametrize("selector", [{}, {"question_first": True}, {"indicate_tokens": True, "min_tokens": 2}])
def test_cost_is_that_of_the_sequence(selecting, selector):
    encode = selecting(tokens=9, **selector)
    for size in SIZES:
        item = example([asked("how many?", "three")], (size,))
        sizes = [(image.width, image.height) for image in item.images]
        bound = encode.cost_parts(sizes, item.conversations)
        for seed in range(6):
            made = encode.encode(item, rng=np.random.default_rng(seed))
            cost = encode.cost(sizes, item.conversations, np.random.default_rng(seed))
            assert cost == (len(made), len(made.pixels))
            assert len(made) <= bound.tokens and len(made.pixels) == bound.crops
        fixed = encode.encode(item)
        assert len(fixed) <= bound.tokens if selector.get("min_tokens") else len(fixed) == bound.tokens


def test_number_of_tokens_is_drawn_by_the_example(selecting, tokenizer):
    encode = selecting(tokens=9, min_tokens=3, indicate_tokens=True)
    item = example([asked("how many?", "three")], ((150, 150),))
    counts = [len(encode.encode(item, rng=np.random.default_rng(seed)).slots[0].slots) for seed in range(60)]
    assert set(counts) == set(range(3, 10))
    made = encode.encode(item, rng=np.random.default_rng(5))
    text = tokenizer.decode([i for i in made.input_ids if i < 520])
    assert f"K={len(made.slots[0].slots)}" in text
    assert "K=9" in tokenizer.decode([i for i in encode.encode_prompt(item).input_ids if i < 520])
    small = example([asked("how many?", "three")], ((20, 20),))  # 4 candidates; the announcement is what was asked for
    assert len(encode.encode(small).slots[0].slots) == 4


def test_question_first(selecting):
    """The same tokens as otherwise, the question in front; answered tokens and their weights stay."""
    item = example([asked("how many dots are there?", "about three")], ((90, 150),))
    usual, first = (selecting(tokens=5, question_first=value).encode(item) for value in (False, True))
    question = int((usual.labels != -100).argmax()) + 1 - (int((usual.image_ids > 0).nonzero()[0][-1]) + 1)
    assert sorted(usual.input_ids) == sorted(first.input_ids)
    behind = int((usual.image_ids > 0).nonzero()[0][-1]) + 1
    assert first.input_ids[1 : 1 + question].tolist() == usual.input_ids[behind : behind + question].tolist()
    assert usual.labels[usual.labels != -100].tolist() == first.labels[first.labels != -100].tolist()
    assert usual.loss_weights.sum() == first.loss_weights.sum()
    begin = int((first.image_ids > 0).argmax())
    assert begin == 1 + question and (first.segment_ids[: begin + 5] == PREFIX_SEGMENT).all()
    assert first.position_ids[-1] == usual.position_ids[-1]
    prompt = selecting(tokens=5, question_first=True).encode_prompt(item)
    answered = int((first.labels != -100).argmax())
    assert np.array_equal(prompt.input_ids, first.input_ids[: answered + 1])
    assert np.array_equal(prompt.position_ids, first.position_ids[: answered + 1])


def test_turns_after_the_first_stay_behind_the_image(selecting):
    from molmo_model.data.example import Message

    turns = (Message("user", "one?"), Message("assistant", "1"), Message("user", "two?"), Message("assistant", "2"))
    item = example([Conversation("qa", turns)], ((90, 90),))
    encode = selecting(tokens=5, question_first=True)
    made, prompt = encode.encode(item), encode.encode_prompt(item)
    assert np.array_equal(prompt.input_ids, made.input_ids[: len(prompt)])
    last = int((made.image_ids > 0).nonzero()[0][-1])
    assert made.labels[last] == made.input_ids[last + 1]  # the image's end predicts the answer


def test_batch_names_what_the_arrays_say(selecting):
    """Every index of the batch, followed by hand: passes, places, candidates and slots of three packed examples."""
    encode = selecting(tokens=5)
    text = example([asked("no picture", "none")], ())
    items = [example([asked("a?", "b")], ((90, 150), (64, 64))), text, example([asked("c?", "d")], ((150, 90),))]
    made = [encode.encode(item) for item in items]
    batch = {name: value.numpy() for name, value in collate([made[:2], made[2:]], None, encode.config).items()}
    patch, ids, shape = encode.config.im_patch_id, batch["input_ids"], batch["input_ids"].shape
    token = image = 0
    passes = [row[row >= 0] for row in batch["selector_pass"]]
    for row, start, one in ((0, 0, made[0]), (1, 0, made[2])):
        high = np.concatenate([np.arange(slot.start + slot.low_view, slot.end) for slot in one.slots])
        end = one.slots[-1].start + one.slots[-1].low_view
        assert passes[row].tolist() == [start + place for place in range(end) if place not in set(high)]
        for slot in one.slots:
            flat = batch["selector_slots"][image]
            places = np.unravel_index(flat[flat >= 0], shape)
            assert (places[0] == row).all() and (ids[places] == patch).all()
            assert batch["selector_rows"][places].tolist() == [0] * len(slot.slots)
            assert batch["selector_rows"][row, slot.low].tolist() == list(range(token + 1, token + 1 + len(slot.low)))
            token += len(slot.low)
            candidates = batch["selector_candidates"][image]
            assert candidates[candidates >= 0].tolist() == list(range(token, token + len(slot.positions)))
            token += len(slot.positions)
            end = np.unravel_index(batch["selector_ends"][image], batch["selector_pass"].shape)
            assert ids[row, batch["selector_pass"][end]] == encode.config.im_end_id
            image += 1
    assert token == len(batch["pooling"]) and image == 3
    low = np.unravel_index(batch["selector_low"], batch["selector_pass"].shape)
    assert (ids[low[0], batch["selector_pass"][low]] == patch).all()
    assert (batch["selector_sources"] < 4 * len(batch["selector_low"])).all()
    weights = [made[0].loss_weights.sum() / 2] * 2 + [made[2].loss_weights.sum()]
    np.testing.assert_allclose(batch["selector_shares"], weights, rtol=1e-6)
    prompts = collate_prompts([encode.encode_prompt(item) for item in items], encode.config)
    assert (prompts["selector_rows"] > 0).sum() == len(batch["selector_low"])
    fixed = collate([made[:2], made[2:]], 200, encode.config)
    assert fixed["selector_pass"].shape == (2, 128)


def test_config_round_trip_and_limits(selecting, tmp_path):
    encode = selecting(tokens=9, min_tokens=4, indicate_tokens=True, question_first=True)
    encode.save_pretrained(tmp_path)
    assert Preprocessor.from_pretrained(tmp_path).config == encode.config
    with pytest.raises(ConfigError, match=r"min_tokens 5 is more than selector\.tokens 4"):
        selecting(tokens=4, min_tokens=5)
    spec = encode.config.tiling
    assert longest_view(spec) == max(
        len(layout(height, width, spec).tokens) for height in range(20, 400, 30) for width in range(20, 400, 30)
    )
