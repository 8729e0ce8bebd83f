"""Crops, shares of picture and fused scales, each against the picture itself or a count pixel by pixel."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from molmo_model.data.example import Example
from molmo_model.errors import ConfigError
from molmo_model.model_config import CropMode, PreprocessingConfig
from molmo_model.preprocessing.collator import collate, collate_prompts
from molmo_model.preprocessing.crops import cut_crops, fill_crops, patch_masks
from molmo_model.preprocessing.image import decode_image, resize
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.tiling import (
    HOLE,
    IM_PATCH,
    TilingSpec,
    layout,
    letterbox_box,
    tiling_layout,
)
from tests.preprocessing.examples import asked, example, picture

C2, FUSED = CropMode.overlap_and_resize_c2, CropMode.hierarchical
SMALL = TilingSpec(64, 16, (2, 2), (1, 1), 4, C2)
SIGLIP = TilingSpec(378, 14, (2, 2), (4, 4), 12, C2)
SHAPES = [(40, 40), (96, 96), (61, 203), (128, 96), (7, 500), (203, 61), (1, 1)]
MODES = list(CropMode)


def crops_of(image: np.ndarray, spec: TilingSpec, method: str, exact: bool = False) -> np.ndarray:
    one = layout(*image.shape[:2], spec)
    out = np.full((one.crops, spec.crop_size, spec.crop_size, 3), 99, dtype=np.uint8)
    fill_crops(image, one, spec, method, out, exact=exact)
    return out


# -- shares of picture ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (300, 451), (1000, 333)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", [SMALL, TilingSpec(56, 14, (2, 2), (0, 1), 6, C2)], ids=["small", "one margin"])
def test_shares_are_the_means_of_a_mask_of_pixels(shape, mode, base):
    """A white picture between black bars, cropped as any picture is."""
    spec = dataclasses.replace(base, mode=mode, letterbox=True)
    mask = crops_of(np.full((*shape, 3), 255, dtype=np.uint8), spec, "default")[..., 0] == 255
    size, patch = spec.crop_patches, spec.patch_size
    expected = mask.reshape(-1, size, patch, size, patch).mean(axis=(2, 4)).reshape(-1, size**2)
    ours = patch_masks(*shape, layout(*shape, spec), spec)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected.astype(np.float32))


def test_a_squashed_picture_fills_its_crops():
    assert (patch_masks(61, 203, layout(61, 203, SMALL), SMALL) == 1).all()


def test_shares_of_the_models_released_in_2024_are_those_of_the_next_crop(build):
    """Their processor put the mark of the global crop behind the others' shares instead of before them; -1 there, which
    the padding embedding took for "padded in part"."""
    spec = dataclasses.replace(SMALL, letterbox=True)
    one = layout(61, 203, spec)
    right, shifted = (patch_masks(61, 203, one, spec, shifted=shifted) for shifted in (False, True))
    np.testing.assert_array_equal(shifted[:-1], right[1:])
    assert (shifted[-1] == 0.5).all() and shifted.shape == right.shape
    alone = dataclasses.replace(spec, mode=CropMode.resize)
    low = layout(61, 203, alone)
    np.testing.assert_array_equal(patch_masks(61, 203, low, alone, shifted=True), right[:1])
    pre = build(resize="default")
    config = dataclasses.replace(pre.config, patch_masks=True, shifted_patch_masks=True)
    encoded = Preprocessor(config, pre.tokenizer).encode(example([asked("a?", "b")], ((61, 203), (96, 96))))
    np.testing.assert_array_equal(encoded.patch_masks[: one.crops], shifted)
    assert (encoded.patch_masks[-1] == 0.5).all()


def test_batches_carry_shares_where_asked(build):
    pre = build(resize="default")
    masked = Preprocessor(dataclasses.replace(pre.config, patch_masks=True), pre.tokenizer)
    examples = [example([asked("a?", "b")], ((61, 203), (50, 40))), example([asked("a?", "b")], ())]
    encoded = [masked.encode(one) for one in examples]
    batch = collate([encoded], None, masked.config)
    sizes = [(image.height, image.width) for image in examples[0].images]
    expected = np.concatenate(
        [patch_masks(*size, layout(*size, masked.config.tiling), masked.config.tiling) for size in sizes]
    )
    np.testing.assert_array_equal(batch["patch_masks"], expected)
    assert len(batch["patch_masks"]) == len(batch["pixel_values"])
    assert (batch["patch_masks"] < 1).any() and (batch["patch_masks"] == 1).any()
    prompts = collate_prompts([masked.encode_prompt(one) for one in examples], masked.config)
    np.testing.assert_array_equal(prompts["patch_masks"], expected)
    text = collate([[masked.encode(examples[1])]], None, masked.config)
    assert text["patch_masks"].shape == (1, 16) and text["pixel_values"].shape[0] == 1
    assert "patch_masks" not in collate([[pre.encode(examples[0])]], None, pre.config)


# -- fused scales ---------------------------------------------------------------------------------------------------


def centre(line: int, pool: int, lines: int) -> Fraction:
    """Where the middle of a window of lines of patches lies, as a share of the canvas; missing lines come half before
    and half after."""
    before = (-lines % pool) // 2
    first, last = max(line * pool - before, 0), min((line + 1) * pool - before, lines)
    return Fraction(first + last, 2 * lines)


@pytest.mark.parametrize("pooling", [(2, 2), (3, 3), (1, 4), (5, 2)])
@pytest.mark.parametrize("base", [SMALL, SIGLIP, TilingSpec(336, 14, (2, 2), (4, 4), 12, C2)], ids=["64", "378", "336"])
def test_a_fused_window_ends_with_the_global_patch_at_its_centre(base, pooling):
    for tiling in [(1, 1), (1, 3), (2, 2), (3, 1), (2, 4)]:
        spec = dataclasses.replace(base, pooling=pooling, mode=FUSED)
        ours, plain = tiling_layout(*tiling, spec), tiling_layout(*tiling, dataclasses.replace(spec, mode=C2))
        alone = tiling_layout(*tiling, dataclasses.replace(spec, mode=CropMode.overlap_and_resize))
        size = spec.crop_patches
        assert (ours.crops, ours.canvas) == (plain.crops, plain.canvas)
        np.testing.assert_array_equal(ours.tokens, alone.tokens)
        high = np.where(alone.pooling == HOLE, HOLE, alone.pooling + size**2)
        np.testing.assert_array_equal(ours.pooling[:, :-1], high)
        assert ours.pooling.shape[1] == spec.window_columns == pooling[0] * pooling[1] + 1
        rows, cols = (side // spec.patch_size for side in ours.canvas)
        expected = [
            int(centre(row, pooling[0], rows) * size) * size + int(centre(col, pooling[1], cols) * size)
            for row in range(-(-rows // pooling[0]))
            for col in range(-(-cols // pooling[1]))
        ]
        assert ours.pooling[:, -1].tolist() == expected


@pytest.mark.parametrize("method", ["siglip", "default"])
@pytest.mark.parametrize("shape", [(700, 700), (600, 900), (900, 350), (300, 1500)])
def test_both_scales_of_a_window_show_the_same_place(shape, method):
    """In a picture whose colour tells the place, the colours of a window's middle lie between those of the global
    patch's borders."""
    spec = dataclasses.replace(SIGLIP, mode=FUSED, letterbox=method == "default")
    height, width = shape
    image = np.zeros((*shape, 3), dtype=np.uint8)
    image[..., 0] = np.linspace(20, 250, height)[:, None]
    image[..., 1] = np.linspace(20, 250, width)
    one = layout(*shape, spec)
    crops = crops_of(image, spec, method).astype(float)
    patches = crops.reshape(-1, 27, 14, 27, 14, 3).swapaxes(2, 3).reshape(-1, 14, 14, 3)
    masks = patch_masks(*shape, one, spec).ravel()
    whole = [row for row in one.pooling if (masks[row[row != HOLE]] == 1).all()]
    assert len(whole) > 0.5 * masks[27**2 :].mean() * len(one.pooling)
    for row in whole:
        window = patches[row[:-1][row[:-1] != HOLE]].mean(axis=(0, 1, 2))
        low = patches[row[-1]]
        for axis in (0, 1):  # 3 levels: rounding and the resizing's half pixel at the border
            assert low[..., axis].min() - 3 <= window[axis] <= low[..., axis].max() + 3


def test_letterboxed_centres_by_whole_pixels():
    """The same by a search for the patch that holds the point, in exact fractions."""
    spec = dataclasses.replace(SMALL, mode=FUSED, letterbox=True)
    for height, width in [(61, 203), (500, 90), (333, 334), (1000, 100)]:
        one = layout(height, width, spec)
        canvas, low = letterbox_box(height, width, *one.canvas), letterbox_box(height, width, 64, 64)
        rows, cols = (side // 16 for side in one.canvas)
        for number, patch in enumerate(one.pooling[:, -1].tolist()):
            row, col = divmod(number, -(-cols // 2))
            down = centre(row, 2, rows) * one.canvas[0]
            right = centre(col, 2, cols) * one.canvas[1]
            y = low.top + (down - canvas.top) * low.height / canvas.height
            x = low.left + (right - canvas.left) * low.width / canvas.width
            assert patch == min(max(int(y // 16), 0), 3) * 4 + min(max(int(x // 16), 0), 3)


def test_fused_scales_have_no_text_shape_of_their_own(build):
    pre = build(crop_mode=FUSED)
    text = collate([[pre.encode(example([asked("a?", "b")], ()))]], None, pre.config)
    assert text["pooling"].shape == (0, 5)
    both = collate([[pre.encode(example([asked("a?", "b")], ((96, 96), (40, 300))))]], None, pre.config)
    assert both["pooling"].shape[1] == 5 and (both["pooling"][:, -1] >= 0).all()
    first = layout(96, 96, pre.config.tiling)
    second = both["pooling"][len(first.pooling) :, -1]
    assert (second // 16 == first.crops).all()  # the second image's global crop comes after the first image's crops


# -- several tokens of a window, windows of a whole crop --------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_several_tokens_of_each_window(build, mode):
    plain = build(crop_mode=mode)
    pre = Preprocessor(dataclasses.replace(plain.config, tokens_per_window=3), plain.tokenizer)
    one = example([asked("a?", "b")], ((61, 203), (96, 96)))
    encoded, single = pre.encode(one), plain.encode(one)
    np.testing.assert_array_equal(encoded.pooling, single.pooling)
    assert encoded.image_token_counts.tolist() == [3 * count for count in single.image_token_counts]
    patch = pre.config.im_patch_id
    assert (encoded.input_ids == patch).sum() == encoded.image_token_counts.sum()
    tripled = np.repeat(single.input_ids, np.where(single.input_ids == patch, 3, 1))
    np.testing.assert_array_equal(encoded.input_ids, tripled)
    sizes = [(image.width, image.height) for image in one.images]
    assert pre.cost(sizes, one.conversations) == (len(encoded), len(encoded.pixels))
    assert pre.cost_parts(sizes, one.conversations).tokens == len(encoded)
    counts = collate_prompts([pre.encode_prompt(one)], pre.config)["image_token_counts"]
    assert counts.tolist() == encoded.image_token_counts.tolist()


def built(**changes) -> PreprocessorConfig:
    section = {name: changes.pop(name) for name in ("resize", "exact_resize", "crop_mode") if name in changes}
    sizes = {"image_size": 64, "patch_size": 16, "pooling_size": 2, "vocab_size": 520} | changes
    margins = {"max_crops": 4, "overlap_margins": [1, 1]}
    return PreprocessorConfig.build(PreprocessingConfig(**margins, **section), resize="siglip", **sizes)


@pytest.mark.parametrize("size", [(64, 64), (61, 203), (300, 300)])
def test_windows_of_a_whole_crop(size):
    config = built(pooling_size=[0, 0])
    assert config.pooling_size == (4, 4)
    one = layout(*size, config.tiling)
    assert one.pooling[0].tolist() == list(range(16))  # the global crop is one window
    stitched = (one.canvas[0] // 16) * (one.canvas[1] // 16)
    assert (one.pooling != HOLE).sum() == 16 + stitched
    assert (one.tokens == IM_PATCH).sum() == len(one.pooling)
    with pytest.raises(ConfigError, match="pooling size"):
        built(pooling_size=[0, 2])


def test_windows_as_large_as_a_crop_cover_the_stitched_grid():
    one = tiling_layout(1, 2, dataclasses.replace(SMALL, pooling=(4, 4)))
    assert one.pooling.shape == (1 + 2, 16)  # 4 x 6 patches: a column of holes before and after
    assert (one.pooling[1:] == HOLE).sum() == 8


# -- the config's part -----------------------------------------------------------------------------------------------


def test_the_params_override_the_encoders_resizing(tokenizer):
    one = example([asked("a?", "b")], ((61, 203),))
    image = decode_image(one.images[0].data)
    for name, exact in (("default", False), ("metaclip", False), ("siglip", True), ("dino", True), ("clip", True)):
        config = built(resize=name, exact_resize=exact)
        assert (config.resize, config.exact_resize) == (name, exact)
        assert config.tiling.letterbox == (name in ("default", "clip"))
        encoded = Preprocessor(config, tokenizer).encode(one)
        np.testing.assert_array_equal(encoded.pixels, crops_of(image, config.tiling, name, exact))
    assert built().resize == "siglip" and not built().exact_resize
    with pytest.raises(ConfigError, match="siglip"):
        built(resize="siglib")


def test_new_facts_survive_saving_and_old_files_still_load():
    config = built(resize="clip", exact_resize=True, tokens_per_window=4, patch_masks=True, crop_mode=FUSED)
    saved = config.to_json()
    assert PreprocessorConfig.from_json(saved) == config
    old = dict(built().to_json())
    for name in ("exact_resize", "tokens_per_window", "patch_masks"):
        del old[name]
    assert PreprocessorConfig.from_json(old) == built()
    with pytest.raises(ConfigError, match="tokens_per_window is 0"):
        built(tokens_per_window=0)


# -- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["siglip", "default", "dino"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_crops_are_cut_from_two_resized_pictures(method, exact, mode):
    image = np.random.default_rng(0).integers(0, 256, (131, 203, 3), dtype=np.uint8)
    spec = dataclasses.replace(SMALL, mode=mode, letterbox=method == "default")
    one, found = layout(131, 203, spec), crops_of(image, spec, method, exact)
    expected = []
    if mode is not CropMode.overlap_and_resize:
        expected.append(resize(image, 64, 64, method, exact=exact)[None])
    if mode is not CropMode.resize:
        high = np.empty((one.tiling[0] * one.tiling[1], 64, 64, 3), dtype=np.uint8)
        cut_crops(resize(image, *one.canvas, method, exact=exact), one.tiling, spec, high)
        expected.append(high)
    np.testing.assert_array_equal(found, np.concatenate(expected))


def test_pictures_of_one_example_do_not_touch(build):
    """Several images of different shapes: each as it is alone, windows shifted by the crops before it."""
    pre = build(max_crops=6)
    images = tuple(picture(*shape, seed) for seed, shape in enumerate(SHAPES))
    together = pre.encode(Example("all", images, (asked("a?", "b"),)))
    start = tokens = 0
    for image in images:
        alone = pre.encode(Example("one", (image,), (asked("a?", "b"),)))
        np.testing.assert_array_equal(together.pixels[start : start + len(alone.pixels)], alone.pixels)
        found = together.pooling[tokens : tokens + len(alone.pooling)]
        np.testing.assert_array_equal(found, np.where(alone.pooling == HOLE, HOLE, alone.pooling + start * 16))
        start, tokens = start + len(alone.pixels), tokens + len(alone.pooling)
    assert (start, tokens) == (len(together.pixels), len(together.pooling))
