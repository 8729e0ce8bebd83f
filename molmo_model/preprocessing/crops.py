"""From the pixels of an image to its crops: the pixels' part of a layout, and which share of every patch is picture."""

import numpy as np
import numpy.typing as npt

from molmo_model.preprocessing.image import Pixels, resize
from molmo_model.preprocessing.tiling import Layout, TilingSpec, letterbox_box

FloatArray = npt.NDArray[np.float32]


def fill_crops(
    picture: Pixels, one: Layout, spec: TilingSpec, method: str, out: Pixels, *, exact: bool = False
) -> None:
    """Writes the crops of `picture` [H, W, 3] to `out` [C, S, S, 3]: the global one first, then the others row by row.

    Args:
        one: the layout of an image of this size.
        method, exact: as for `image.resize`.
    """
    size = spec.crop_size
    if spec.low:
        resize(picture, size, size, method, exact=exact, out=out[0])
    if spec.high:
        cut_crops(resize(picture, *one.canvas, method, exact=exact), one.tiling, spec, out[int(spec.low) :])


def cut_crops(canvas: Pixels, tiling: tuple[int, int], spec: TilingSpec, out: Pixels) -> None:
    """Writes the overlapping crops of a canvas [H, W, 3] of the layout's size to `out` [rows * cols, S, S, 3]."""
    rows, cols = tiling
    size, stride = spec.crop_size, spec.window_patches * spec.patch_size
    for row in range(rows):
        for col in range(cols):
            top, left = row * stride, col * stride
            out[row * cols + col] = canvas[top : top + size, left : left + size]


IN_PART = np.float32(0.5)
"""A share of a patch that is part picture, part bar, whatever the parts."""


def patch_masks(height: int, width: int, one: Layout, spec: TilingSpec, *, shifted: bool = False) -> FloatArray:
    """[C, N] share of each patch that is picture, the rest being bars: the mean of a mask of its pixels.

    Args:
        height, width: of the image.
        one: its layout.
        shifted: as the models released in 2024 were trained, by a slip: with a global crop and others, each crop has
            the shares of the one after it, and the last is `IN_PART` everywhere.
    """
    masks = _patch_masks(height, width, one, spec)
    if shifted and spec.low and spec.high:
        masks = np.concatenate([masks[1:], np.full_like(masks[:1], IN_PART)])
    return masks


def _patch_masks(height: int, width: int, one: Layout, spec: TilingSpec) -> FloatArray:
    patches = spec.crop_patches
    masks = np.ones((one.crops, patches, patches), dtype=np.float32)
    if not spec.letterbox:
        return masks.reshape(one.crops, -1)
    if spec.low:
        masks[0] = _share_of_picture(height, width, spec.crop_size, spec.crop_size, spec.patch_size)
    if spec.high:
        canvas = _share_of_picture(height, width, *one.canvas, spec.patch_size)
        rows, cols = one.tiling
        for row in range(rows):
            for col in range(cols):
                top, left = row * spec.window_patches, col * spec.window_patches
                crop = int(spec.low) + row * cols + col
                masks[crop] = canvas[top : top + patches, left : left + patches]
    return masks.reshape(one.crops, -1)


def _share_of_picture(height: int, width: int, to_height: int, to_width: int, patch: int) -> FloatArray:
    """[rows, cols] of patches of a frame that a letterboxed picture lies in. The picture is a rectangle, so a patch's
    pixels of it are rows times columns."""
    box = letterbox_box(height, width, to_height, to_width)
    rows = _covered(box.top, box.height, to_height // patch, patch)
    cols = _covered(box.left, box.width, to_width // patch, patch)
    return (np.outer(rows, cols) / patch**2).astype(np.float32)


def _covered(start: int, length: int, count: int, patch: int) -> npt.NDArray[np.int64]:
    """[count] pixels of each line of patches that lie in [start, start + length)."""
    edges = np.arange(count + 1) * patch
    return np.diff(edges.clip(start, start + length))
