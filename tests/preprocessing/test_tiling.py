"""Geometry against transformers' own `molmo2` functions, and against brute force."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from transformers.models.molmo2.image_processing_molmo2 import (
    Molmo2ImageProcessor,
    arange_for_pooling,
    compute_crop_geometry,
)
from transformers.models.molmo2.image_processing_molmo2 import select_tiling as reference_tiling
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

from molmo_model.errors import ConfigError
from molmo_model.model_config import CropMode
from molmo_model.preprocessing.crops import cut_crops
from molmo_model.preprocessing.image import resize
from molmo_model.preprocessing.tiling import (
    HOLE,
    IM_COL,
    IM_PATCH,
    IMAGE_TOKENS,
    TilingSpec,
    layout,
    pool_windows,
    select_tiling,
    stitched_grid,
    tiling_for,
    tiling_layout,
)

C2 = CropMode.overlap_and_resize_c2


def spec(crop: int, patch: int, margins=(4, 4), max_crops=12, pooling=(2, 2), mode=C2) -> TilingSpec:
    return TilingSpec(crop, patch, pooling, margins, max_crops, mode)


SIGLIP, CLIP, SMALL = spec(378, 14), spec(336, 14), spec(64, 16, (1, 1))


def with_crops(one: TilingSpec, max_crops: int) -> TilingSpec:
    return spec(one.crop_size, one.patch_size, one.margins, max_crops, one.pooling)


def sizes(count: int) -> list[tuple[int, int]]:
    """(height, width) of all kinds: ordinary, tiny, huge, thin, and those on both sides of a boundary."""
    rng = np.random.default_rng(0)
    ordinary = np.exp(rng.uniform(np.log(8), np.log(4000), (count, 2))).astype(int)
    edges = [112 + k * window + d for window in (224, 266) for k in (1, 2, 3) for d in (-1, 0, 1)]
    return [
        *map(tuple, ordinary.tolist()),
        *itertools.product(edges[:9], edges[9:]),
        (336, 336),
        (480, 640),
        (1080, 1920),
    ]


class Backend:
    """Stands in for torchvision under the reference's methods: bilinear on float, no normalisation."""

    def __init__(self, blank: bool):
        self.blank = blank

    def resize(self, image, size, resample, antialias):
        if self.blank:
            return torch.zeros(1).expand(*image.shape[:2], size.height, size.width)
        return interpolate(image, (size.height, size.width), mode="bilinear", antialias=antialias)

    def rescale_and_normalize(self, image, *_):
        return image

    def __getattr__(self, name):
        method = type.__getattribute__(Molmo2ImageProcessor, name)  # the class itself demands torchvision
        return lambda *args, **kwargs: method(self, *args, **kwargs)


def reference(images: torch.Tensor, one: TilingSpec, blank: bool):
    """(grids, patches, pooling) of the reference for images [1, C, H, W]."""
    grids, patches, pooling = Backend(blank)._image_batch_to_patches_and_grids(
        images,
        max_crops=one.max_crops,
        overlap_margins=list(one.margins),
        crop_size=one.crop_size,
        resample=2,
        do_rescale=False,
        rescale_factor=1,
        do_normalize=False,
        image_mean=[],
        image_std=[],
        image_patch_size=one.patch_size,
        image_pooling_h=one.pooling[0],
        image_pooling_w=one.pooling[1],
    )
    return grids[0].tolist(), patches[0], pooling[0].numpy()


@pytest.mark.parametrize("base", [SIGLIP, CLIP, SMALL], ids=["siglip", "clip", "small"])
def test_tiling_and_canvas_equal_the_reference(base):
    margin = sum(base.margins) * base.patch_size
    compared = 0
    for (height, width), max_crops in itertools.product(sizes(200), (1, 2, 4, 8, 12, 36)):
        one = with_crops(base, max_crops)
        window = base.window_patches * base.patch_size
        if height > margin and width > margin:
            *tiling, canvas_height, canvas_width = compute_crop_geometry(
                height, width, max_crops, list(base.margins), base.crop_size, base.patch_size
            )
            ours = layout(height, width, one)
            assert ours.tiling == tuple(tiling) and ours.canvas == (canvas_height, canvas_width), (
                height,
                width,
                max_crops,
            )
            compared += 1
        clamped = max(height - margin, 1), max(width - margin, 1)
        assert tiling_for(height, width, one) == reference_tiling(*clamped, window, max_crops)
    assert compared > 600


@pytest.mark.parametrize("base", [SIGLIP, CLIP, SMALL, spec(56, 14, (0, 1), pooling=(3, 2))], ids=str)
def test_pooling_and_crops_equal_the_reference(base):
    """Every tiling up to 12 crops, reached through an image whose canvas it is."""
    for rows, cols in itertools.product(range(1, 13), repeat=2):
        if rows * cols > 12:
            continue
        ours = tiling_layout(rows, cols, base)
        assert layout(*ours.canvas, base).tiling == (rows, cols)
        grids, patches, pooling = reference(torch.zeros(1).expand(1, 1, *ours.canvas), base, blank=True)
        np.testing.assert_array_equal(ours.pooling, pooling)
        assert ours.crops == len(patches)
        low_rows, low_cols, high_rows, high_cols = grids
        assert len(ours.pooling) == low_rows * low_cols + high_rows * high_cols


@pytest.mark.parametrize("size", [(50, 70), (96, 96), (131, 300), (61, 410)])
def test_pixels_of_every_patch_equal_the_reference(size):
    """Crops cut by us hold the reference's pixels, within the one level by which uint8 resizing differs."""
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = layout(*size, SMALL)
    crops = np.empty((ours.crops, 64, 64, 3), dtype=np.uint8)
    crops[0] = resize(image, 64, 64, "siglip")
    cut_crops(resize(image, *ours.canvas, "siglip"), ours.tiling, SMALL, crops[1:])
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    _, patches, _ = reference(planes, SMALL, blank=False)
    flat = crops.reshape(-1, 4, 16, 4, 16, 3).swapaxes(2, 3).reshape(-1, 16, 16 * 16 * 3)
    assert np.abs(flat.astype(int) - patches.numpy().astype(int)).max() <= 1


@pytest.mark.parametrize(
    "one",
    [SMALL, spec(64, 16, (0, 0)), spec(64, 16, (2, 1)), spec(64, 16, (0, 3)), spec(48, 16, (1, 1)), SIGLIP],
    ids=str,
)
@pytest.mark.parametrize("tiling", [(1, 1), (1, 3), (2, 2), (3, 2)])
def test_stitched_grid_shows_the_canvas(one, tiling):
    """Cut a canvas whose patches all differ: the grid must find each of them, once, in the crop that it names."""
    rows, cols = tiling
    grid = stitched_grid(rows, cols, one)
    height, width = grid.shape
    assert (height, width) == tuple(tiles * one.window_patches + sum(one.margins) for tiles in tiling)
    marks = (np.arange(height * width) * 40503 % 2**24).reshape(height, width)  # all different: 40503 is odd
    colours = np.stack([marks >> 16, marks >> 8 & 255, marks & 255], axis=-1).astype(np.uint8)
    canvas = colours.repeat(one.patch_size, axis=0).repeat(one.patch_size, axis=1)
    crops = np.empty((rows * cols, one.crop_size, one.crop_size, 3), dtype=np.uint8)
    cut_crops(canvas, tiling, one, crops)
    corners = crops[:, :: one.patch_size, :: one.patch_size].reshape(-1, 3)  # one pixel of every patch
    np.testing.assert_array_equal(corners[grid], colours)
    assert len(np.unique(grid)) == grid.size


@pytest.mark.parametrize(
    ("shape", "pooling"), [((27, 27), (2, 2)), ((5, 7), (3, 4)), ((4, 4), (3, 3)), ((1, 2), (5, 1))]
)
def test_windows_equal_the_reference_and_cover_everything_once(shape, pooling):
    grid = np.arange(shape[0] * shape[1]).reshape(shape)
    windows = pool_windows(grid, pooling)
    expected, rows, cols = arange_for_pooling(torch.from_numpy(grid), *pooling)
    assert windows.shape[:2] == (rows, cols)
    np.testing.assert_array_equal(windows.reshape(rows * cols, -1), expected.numpy())
    assert sorted(windows[windows != HOLE].tolist()) == grid.ravel().tolist()
    assert (windows != HOLE).any(axis=-1).all()


def test_odd_grids_are_filled_up_at_the_bottom_and_the_right():
    windows = pool_windows(np.arange(27 * 27).reshape(27, 27), (2, 2))
    assert windows.shape[:2] == (14, 14)
    assert (windows[:-1, :-1] != HOLE).all()
    assert windows[-1, -1].tolist() == [27 * 27 - 1, HOLE, HOLE, HOLE]


def test_token_counts_of_the_published_models():
    assert len(tiling_layout(0, 0, spec(336, 14, mode=CropMode.resize)).tokens) == 12 * 12 + 12 + 2 == 158
    for size, max_crops, tiling, tokens in (
        ((336, 336), 12, (1, 1), 316),
        ((480, 640), 12, (2, 3), 740),
        ((1080, 1920), 12, (3, 4), 1196),
    ):
        one = layout(*size, with_crops(CLIP, max_crops))
        assert (one.tiling, len(one.tokens)) == (tiling, tokens)


@pytest.mark.parametrize("size", [(336, 336), (100, 900), (700, 500)])
@pytest.mark.parametrize("base", [SIGLIP, CLIP, SMALL], ids=["siglip", "clip", "small"])
def test_token_layout_equals_the_reference(size, base):
    grids, _, _ = reference(torch.zeros(1).expand(1, 1, *size), base, blank=True)

    class Flags:
        image_use_col_tokens = True
        use_single_crop_col_tokens = True
        use_single_crop_start_token = False

    write = type.__getattribute__(Molmo2Processor, "replace_image_token")
    expected = write(Flags(), {"image_grids": torch.tensor([grids])}, 0)
    ours = layout(*size, base)
    if tiling_for(*size, base) != ours.tiling:
        pytest.fail("layout and tiling_for disagree")
    if min(size) > sum(base.margins) * base.patch_size:
        assert "".join(IMAGE_TOKENS[place] for place in ours.tokens) == expected


def test_modes():
    whole, low, high = (
        layout(480, 640, spec(336, 14, mode=mode)) for mode in (C2, CropMode.resize, CropMode.overlap_and_resize)
    )
    assert (low.crops, high.crops, whole.crops) == (1, 6, 7)
    np.testing.assert_array_equal(whole.tokens, np.concatenate([low.tokens, high.tokens]))
    shifted = np.where(high.pooling >= 0, high.pooling + 24 * 24, HOLE)
    np.testing.assert_array_equal(whole.pooling, np.concatenate([low.pooling, shifted]))


@pytest.mark.parametrize("base", [SIGLIP, SMALL, spec(64, 16, (1, 1), pooling=(3, 3))], ids=str)
def test_holes_never_move_and_every_patch_token_has_its_window(base):
    for size in sizes(40):
        one = layout(*size, base)
        assert (one.tokens == IM_PATCH).sum() == len(one.pooling)
        assert one.pooling.min() >= HOLE
        assert one.pooling.max() < one.crops * base.crop_patches**2
        assert (one.pooling >= 0).any(axis=1).all()
        used = one.pooling[one.pooling >= 0]
        assert len(np.unique(used)) == len(used)


def test_thin_strips_and_tiny_images():
    assert tiling_for(60, 60, CLIP) == (1, 1)
    assert tiling_for(1, 1, CLIP) == (1, 1)
    assert tiling_for(1, 4000, CLIP) == (1, 12)  # not squashed into one crop
    assert tiling_for(4000, 20, CLIP) == (12, 1)


def test_ties_go_to_fewer_crops_then_to_fewer_rows():
    assert select_tiling(100, 100, 100, 9) == (1, 1)
    assert select_tiling(1, 1, 100, 4) == (1, 1)
    assert select_tiling(300, 300, 100, 2) == (1, 1)  # one row of two and two rows of one shrink as much as one does
    assert select_tiling(100, 150, 100, 2) == (1, 2)


def test_layouts_are_shared_and_read_only():
    one, other = layout(480, 640, CLIP), layout(481, 641, CLIP)
    assert one is other
    with pytest.raises(ValueError, match="read-only"):
        one.pooling[0, 0] = 5
    assert IM_COL in one.tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 100}, "100 must be a positive multiple of patch_size 14"),
        ({"margins": (12, 12)}, "leave 0 of 24 patches"),
        ({"margins": (-1, 2)}, "at least 0"),
        ({"pooling": (0, 2)}, "pooling size"),
        ({"max_crops": 0}, "max_crops is 0"),
    ],
)
def test_impossible_geometry_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        spec(**{"crop": 336, "patch": 14, **change})
