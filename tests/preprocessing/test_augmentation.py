"""What training changes about pixels: by the example's own generator, points moving along, evaluation untouched."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_model.config import params_from_dict
from molmo_model.data.example import Conversation, Example, Image, InlinePoints, Message
from molmo_model.data.loader import Loader, generator
from molmo_model.errors import ConfigError
from molmo_model.model_config import AugmentationConfig, CropMode, PreprocessingConfig, SelectorConfig
from molmo_model.preprocessing.augmentation import (
    AugmentationSpec,
    Change,
    apply,
    moved,
    pixel_generator,
    plan_changes,
    widest,
)
from molmo_model.preprocessing.points import extract_points
from molmo_model.preprocessing.preprocessor import IGNORE
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.train.batches import Encoder
from tests.data.builders import make_plan
from tests.preprocessing.examples import asked, example, png

ALL = {"crop": 1.0, "brightness": 0.3, "contrast": 0.3, "saturation": 0.5, "hue": 0.1, "resize_noise": 0.5}


def pointing(points, style="pointing") -> Conversation:
    return Conversation(style, (Message("user", label="dot"), Message("assistant", points=points, label="dot")))


def dotted(points, height=120, width=200) -> Example:
    """A grey picture with a red square of 7 pixels around each point, and what points at them."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    for x, y in points:
        column, row = int(x / 100 * width), int(y / 100 * height)
        pixels[max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4] = (255, 0, 0)
    return Example("dots", (Image(png(pixels), width, height, "PNG"),), (pointing(tuple(points)),))


def answered(pre, encoded) -> str:
    return pre.decode(encoded.labels[encoded.labels != IGNORE].tolist())


def test_same_key_same_pixels_other_key_other_pixels(build):
    pre = build(augmentation=AugmentationConfig(**ALL))
    one = dotted([(30.0, 60.0)])
    first, again, other = (pre.encode(one, None, generator(key)) for key in (5, 5, 6))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    np.testing.assert_array_equal(first.input_ids, again.input_ids)
    assert (first.pixels != other.pixels).mean() > 0.5
    assert first.pixels.dtype == np.uint8 and first.pixels.shape == other.pixels.shape


def test_evaluation_and_prompts_see_the_picture_as_it_is(build):
    plain, changed = build(), build(augmentation=AugmentationConfig(**ALL, p_high_res=1.0, high_res_max_crops=9))
    one = dotted([(30.0, 60.0), (80.0, 10.0)])
    for name in ("pixels", "input_ids", "labels", "pooling"):
        np.testing.assert_array_equal(getattr(plain.encode(one), name), getattr(changed.encode(one), name))
        np.testing.assert_array_equal(
            getattr(plain.encode_prompt(one), name), getattr(changed.encode_prompt(one), name)
        )


@pytest.mark.parametrize("setting", ["brightness", "contrast", "saturation", "hue", "resize_noise"])
def test_colours_change_no_token(build, setting):
    """What touches pixels alone leaves all texts as they are: the two are drawn apart."""
    plain, changed = (
        build(),
        build(augmentation=AugmentationConfig(**{setting: 0.4 if setting != "resize_noise" else 1})),
    )
    one = example([pointing(((20.0, 30.0),)), asked("What?", "a dot")])
    different = 0
    for key in range(5):
        first, second = (pre.encode(one, None, generator(key)) for pre in (plain, changed))
        for name in ("input_ids", "labels", "pooling", "loss_weights"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        different += (first.pixels != second.pixels).any()
    assert different == 5


def test_points_follow_the_pixels(build):
    """A dot is where the answer points, in the very pixels that the model sees."""
    pre = build(crop_mode=CropMode.resize, image_size=256, augmentation=AugmentationConfig(crop=1.0, crop_stretch=0.3))
    points = [(12.0, 70.0), (60.0, 33.0), (47.0, 81.0)]
    one, windows = dotted(points), set()
    for key in range(25):
        encoded = pre.encode(one, None, generator(key))
        told = extract_points(answered(pre, encoded))
        windows.add(tuple(told))
        assert len(told) == 3
        (pixels,) = encoded.pixels.astype(int)
        red = pixels[:, :, 0] - pixels[:, :, 1]
        for x, y in told:
            row, column = min(int(y / 100 * 256), 255), min(int(x / 100 * 256), 255)
            assert red[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].max() > 100, (key, x, y)
    assert len(windows) > 15


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=0, max_size=6),
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.integers(0, 2**63),
)
def test_no_point_is_lost(points, size, key):
    """The window grows until it holds them all; what was in the window's corner is in the picture's corner."""
    spec = AugmentationSpec(crop=1.0, crop_scale=(0.1, 0.9), crop_stretch=0.5)
    talk = pointing(tuple(points))
    (change,) = plan_changes(spec, [size], [talk], generator(key))
    if change.window is None:
        return
    left, top, right, bottom = change.window
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    after = moved(talk, size, change.window).messages[1].points
    assert len(after) == len(points)
    for (x, y), (u, v) in zip(points, after, strict=True):
        assert 0 <= u <= 100 and 0 <= v <= 100
        assert left + u / 100 * (right - left) == pytest.approx(x / 100 * size[0], abs=1e-6)
        assert top + v / 100 * (bottom - top) == pytest.approx(y / 100 * size[1], abs=1e-6)


def test_inline_points_move_too():
    message = Message("assistant", "at <|POINT|>", inline=(InlinePoints(((50.0, 50.0),), "x", "x"),))
    talk = Conversation("point_qa", (Message("user", "?"), message))
    after = moved(talk, (200, 100), (50, 0, 150, 100)).messages[1].inline[0].points
    assert after == ((50.0, 50.0),)
    assert moved(talk, (200, 100), (0, 0, 100, 50)).messages[1].inline[0].points == ((100.0, 100.0),)


def window_of(talks, spec=None, sizes=((200, 120),)):
    spec = spec or AugmentationSpec(crop=1.0, crop_scale=(0.3, 0.5))
    return [change.window for change in plan_changes(spec, sizes, talks, generator(1))]


def test_only_what_stays_true_is_cut():
    point, caption = pointing(((5.0, 5.0),)), asked("Describe.", "A dot on the right.", "long_caption")
    assert window_of([point]) != [None]
    assert window_of([pointing(())]) != [None]  # "There are none." of a part, too
    assert window_of([caption]) == window_of([point, caption]) == [None]
    listed = AugmentationSpec(crop=1.0, crop_scale=(0.3, 0.5), crop_styles=("long_caption",))
    assert window_of([point, caption], listed) != [None]
    assert window_of([point], sizes=((200, 120), (50, 50))) == [None, None]  # which picture is meant is not said


def test_the_cost_bounds_every_draw(build):
    """Moved points are longer than 9.9 at times, and some images get more crops."""
    section = {"crop": 1.0, "crop_scale": [0.2, 0.9], "p_high_res": 0.5, "high_res_max_crops": 9}
    pre = build(augmentation=AugmentationConfig(**section))
    plain = build()
    lengths, crops, cut = set(), set(), 0
    for points in ([(1.0, 2.0), (9.0, 4.5)], [(100.0, 100.0), (0.0, 7.0)], [(55.0, 44.0)]):
        one = dotted(points, 90, 150)
        sizes = [(150, 90)]
        cost = pre.cost_parts(sizes, one.conversations)
        for key in range(20):
            encoded = pre.encode(one, None, generator(key))
            assert len(encoded) <= cost.tokens and len(encoded.pixels) <= cost.crops
            assert pre.cost(sizes, one.conversations, generator(key)) == (len(encoded), len(encoded.pixels))
            lengths.add(len(encoded) - (encoded.image_ids > 0).sum())
            crops.add(len(encoded.pixels))
            cut += answered(pre, encoded) != answered(plain, plain.encode(one, None, generator(key)))
    assert len(crops) == 2 and len(lengths) > 3 and cut > 30
    assert plain.cost_parts([(150, 90)], [asked("a", "b")]).crops == min(crops)


def test_more_crops_for_some_styles_alone(build):
    pre = build(augmentation=AugmentationConfig(p_high_res=1.0, high_res_max_crops=9, high_res_styles=["pointing"]))
    sizes = [(150, 90)]
    counts = {}
    for talk in (pointing(((1.0, 2.0),)), asked("a", "b", "vqa2")):
        one = example([talk], ((90, 150),))
        crops = len(pre.encode(one, None, generator(1)).pixels)
        assert crops == pre.cost_parts(sizes, [talk]).crops
        counts[talk.style] = crops
    assert counts["pointing"] > counts["vqa2"] == len(build().encode(one).pixels)


def fingerprints(plan, encode, world, workers):
    """What every example of the first steps becomes, by its place in the stream."""

    def note(example, draw, key):
        encoded = encode(example, draw, key)
        arrays = (encoded.input_ids, encoded.labels, encoded.loss_weights, encoded.pixels)
        return (draw.position, tuple(array.tobytes() for array in arrays))

    found = {}
    for rank in range(world):
        settings_ = {"rank": rank, "world": world, "packs_per_step": 4, "workers": workers}
        with Loader(plan, note, lambda packs: {"all": [one for pack in packs for one in pack]}, **settings_) as loader:
            for step in (1, 2, 3):
                for batch in loader.step(step):
                    found |= dict(batch["all"])
    return found


def test_ranks_and_workers_draw_the_same(build, tmp_path):
    plan = make_plan(tmp_path)
    section = {"system_prompt": "style_and_length", "prompt_templates": "uber_model_v2"}
    encode = Encoder(build(augmentation=AugmentationConfig(**{**ALL, "crop_styles": ["qa"]}), **section))
    alone = fingerprints(plan, encode, 1, 0)
    assert len(alone) > 20
    assert fingerprints(plan, encode, 2, 2) == alone


def test_every_epoch_looks_different(build, tmp_path):
    plan = make_plan(tmp_path)
    encode = Encoder(build(augmentation=AugmentationConfig(brightness=0.5)))
    seen: dict[tuple[str, int], dict[int, bytes]] = {}
    for draw in plan.mixture.draws(range(300)):
        pixels = encode(plan.read(draw), draw, draw.key).pixels.tobytes()
        seen.setdefault((draw.entry, draw.row), {})[draw.epoch] = pixels
    again = [epochs for epochs in seen.values() if len(epochs) > 1]
    assert len(again) > 20  # the pictures have one colour each, some of them nearly black
    assert sum(len(set(epochs.values())) for epochs in again) > 0.9 * sum(map(len, again))


def test_points_whose_text_would_be_too_long_are_left_alone(build):
    """`widest` has two digits everywhere; where a window would make it three, nothing is cut."""
    talk = pointing(((0.0, 0.0), (50.0, 99.0)))
    wide = widest(talk).messages[1].points
    assert wide == ((22.2, 22.2), (50.0, 99.0))
    pre = build(augmentation=AugmentationConfig(crop=1.0, crop_scale=[0.05, 0.05]))
    one = dotted([(50.0, 50.0)])
    (bound,) = pre.cost_parts([(200, 120)], one.conversations).branches
    for key in range(60):
        encoded = pre.encode(one, None, generator(key))
        assert (encoded.segment_ids == 0).sum() <= bound


def test_each_change_by_itself():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    np.testing.assert_array_equal(apply(pixels, Change()), pixels)
    np.testing.assert_array_equal(apply(pixels, Change(brightness=0.5)), (np.arange(256) * 0.5).round()[pixels])
    flat = apply(pixels, Change(contrast=0.0))
    assert len(np.unique(flat)) == 1 and abs(int(flat[0, 0, 0]) - pixels.mean()) < 3
    grey = apply(pixels, Change(saturation=0.0))
    np.testing.assert_array_equal(grey[:, :, 0], grey[:, :, 1])
    red = np.full((4, 4, 3), (200, 10, 10), np.uint8)
    assert apply(red, Change(hue=1 / 3))[0, 0].argmax() == 1 and apply(red, Change(hue=-1 / 3))[0, 0].argmax() == 2
    half = apply(pixels, Change(window=(0, 0, 30, 20)))
    np.testing.assert_array_equal(half[1:-1:2, 1:-1:2][:5, :5].shape, (5, 5, 3))
    assert half.shape == pixels.shape
    blurred = apply(pixels, Change(shrink=0.5, interpolations=("INTER_AREA", "INTER_LINEAR")))
    assert blurred.shape == pixels.shape and blurred.std() < pixels.std()


def test_one_setting_does_not_change_what_another_draws():
    talk, spec = pointing(((5.0, 5.0),)), AugmentationSpec(**ALL)
    whole = plan_changes(spec, [(200, 120)], [talk], generator(3))[0]
    for name in ("brightness", "contrast", "saturation", "hue"):
        (alone,) = plan_changes(AugmentationSpec(**{name: ALL[name]}), [(200, 120)], [talk], generator(3))
        assert getattr(alone, name) == getattr(whole, name) and alone.window is None
    rng = generator(3)
    ahead = pixel_generator(rng)
    assert ahead.random() != rng.random() and generator(3).random() == generator(3).random()


def test_it_travels_with_the_checkpoint(build):
    config = build(augmentation=AugmentationConfig(crop=0.5, crop_styles=["long_caption"])).config
    assert PreprocessorConfig.from_json(config.to_json()) == config
    assert "augmentation" not in build().config.to_json()


def test_settings_that_cannot_be(build):
    for scale in ([0.9, 0.5], [0.5], [0.0, 1.0]):
        with pytest.raises(ConfigError, match=r"crop_scale is .*least and the most share"):
            build(augmentation=AugmentationConfig(crop_scale=scale))
    raw = {"version": 2, "models": {"x": {"preset": "demo", "preprocessing": {"augmentation": {"hue": 0.7}}}}}
    with pytest.raises(
        ConfigError, match=r"models\.x\.preprocessing\.augmentation\.hue is 0\.7; .* between 0 and 0\.5"
    ):
        params_from_dict(raw, "test")
    with pytest.raises(ConfigError, match=r"selector chooses from one number of crops.*p_high_res to 0"):
        PreprocessorConfig.build(
            dataclasses.replace(PreprocessingConfig(), augmentation=AugmentationConfig(p_high_res=0.3)),
            image_size=336,
            patch_size=14,
            pooling_size=2,
            resize="siglip",
            vocab_size=520,
            selector=SelectorConfig(tokens=4),
        )
