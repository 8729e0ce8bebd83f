"""The geometry of an image: how many crops, where they lie, which patches make one image token. No pixels, no torch.

An image is seen twice: once whole at low resolution, and once as overlapping high-resolution crops. The crops of a
tiling of `rows x cols` overlap by `margins` patches; where they overlap, each patch is kept from one crop only, so
that the kept patches of all crops form one *stitched grid* without duplicates. Pooling windows are laid on that grid.

Everything depends on the image's size through the tiling alone, so `layout()` is computed once per tiling and shared:
its arrays are read-only.

Names in shapes: T image tokens of the image, C crops, P patches per side of a crop, W patches of a pooling window.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt

from molmo_model.errors import ConfigError
from molmo_model.model_config import CropMode

IntArray = npt.NDArray[np.int64]

IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_low>")
"""The extra vocabulary, in id order: the id of entry i is the language model's number of embedding rows plus i."""
IM_START, IM_END, IM_PATCH, IM_COL = range(4)
"""Places in `IMAGE_TOKENS` of the tokens that a layout consists of."""

HOLE = -1
"""A place of a pooling window that lies outside the image."""


@dataclass(frozen=True)
class TilingSpec:
    """What decides the geometry, besides the size of the image."""

    crop_size: int
    """Pixels per side of a crop, a multiple of `patch_size`: 336 for CLIP, 378 (27 x 14) for SigLIP."""
    patch_size: int
    """Pixels per side of a patch."""
    pooling: tuple[int, int]
    """Height and width of a pooling window in patches."""
    margins: tuple[int, int]
    """Patches by which a crop reaches into its neighbour before (left, top) and after (right, bottom)."""
    max_crops: int
    """Most high-resolution crops."""
    mode: CropMode

    def __post_init__(self) -> None:
        if self.crop_size < 1 or self.patch_size < 1 or self.crop_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.crop_size} must be a positive multiple of patch_size {self.patch_size}"
            )
        if min(self.margins) < 0 or self.window_patches < 1:
            raise ConfigError(
                f"overlap_margins {list(self.margins)} leave {self.window_patches} of {self.crop_patches} patches of a "
                "crop; they must be at least 0 and leave at least 1"
            )
        if min(self.pooling) < 1:
            raise ConfigError(f"pooling size {list(self.pooling)} must be at least 1 in both directions")
        if self.max_crops < 1:
            raise ConfigError(f"max_crops is {self.max_crops}; it must be at least 1")

    @property
    def crop_patches(self) -> int:
        """P, patches per side of a crop: 336 / 14 = 24, 378 / 14 = 27."""
        return self.crop_size // self.patch_size

    @property
    def window_patches(self) -> int:
        """Patches per side by which the next crop is shifted: 24 - 8 = 16, 27 - 8 = 19."""
        return self.crop_patches - sum(self.margins)

    @property
    def low(self) -> bool:
        """Whether there is a global low-resolution crop; it always comes first."""
        return self.mode is not CropMode.overlap_and_resize

    @property
    def high(self) -> bool:
        """Whether there are high-resolution crops."""
        return self.mode is not CropMode.resize


@dataclass(frozen=True)
class Layout:
    """The geometry of one image."""

    tiling: tuple[int, int]
    """Rows and columns of high-resolution crops; (0, 0) without any."""
    canvas: tuple[int, int]
    """Height and width in pixels that the image is resized to before the high-resolution crops are cut."""
    crops: int
    """C, all crops including the global one."""
    tokens: IntArray
    """[N] places in `IMAGE_TOKENS`, in the order in which the tokens stand in the text."""
    pooling: IntArray
    """[T, W] flat patch numbers into C * P * P of every `<im_patch>`, in order; `HOLE` outside the image."""


def select_tiling(height: float, width: float, window: int, max_crops: int) -> tuple[int, int]:
    """Rows and columns of the tiling that shows an image of `height x width` pixels best.

    The smallest upscaling that fits, or, if even the largest tilings shrink the image, the one that shrinks it least.
    Ties go to fewer crops, then to fewer rows. Computed in float32, as the published models were trained.

    Args:
        height, width: size of the image less the margins of one crop; at least 1.
        window: pixels that one crop adds to the canvas in each direction.
        max_crops: bound on rows * cols.
    """
    tilings = _tilings(max_crops)
    sizes = tilings.astype(np.float32) * np.float32(window)
    scale = (sizes / np.array([height, width], dtype=np.float32)).min(axis=1)
    fits = scale >= 1
    best = np.where(fits, scale, np.float32(np.inf)).argmin() if fits.any() else scale.argmax()
    rows, cols = tilings[best].tolist()
    return rows, cols


@cache
def _tilings(max_crops: int) -> IntArray:
    """[K, 2] every (rows, cols) of at most `max_crops` crops, by number of crops, then rows."""
    pairs = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    return np.array(sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0])), dtype=np.int64)


@lru_cache(maxsize=65536)
def tiling_for(height: int, width: int, spec: TilingSpec) -> tuple[int, int]:
    """The tiling of an image of `height x width` pixels; (0, 0) where the mode has no high-resolution crops.

    The margins of one crop are taken off the size first. Where nothing is left of a side it counts as one pixel, as
    in the second generation of Molmo; transformers' `molmo2` lets it become negative there, which squashes a long thin
    strip into a single crop.
    """
    if not spec.high:
        return (0, 0)
    margin = sum(spec.margins) * spec.patch_size
    return select_tiling(
        max(height - margin, 1), max(width - margin, 1), spec.window_patches * spec.patch_size, spec.max_crops
    )


def layout(height: int, width: int, spec: TilingSpec) -> Layout:
    """The crops, tokens and pooling windows of an image of `height x width` pixels."""
    return tiling_layout(*tiling_for(height, width, spec), spec)


@cache
def tiling_layout(rows: int, cols: int, spec: TilingSpec) -> Layout:
    """The layout of every image of one tiling; (0, 0) is the global crop alone."""
    tokens, windows = [], []
    size = spec.crop_patches
    if spec.low:
        low = pool_windows(np.arange(size * size).reshape(size, size), spec.pooling)
        tokens.append(view_tokens(*low.shape[:2]))
        windows.append(low.reshape(-1, low.shape[-1]))
    canvas = (0, 0)
    if spec.high:
        grid = stitched_grid(rows, cols, spec)
        high = pool_windows(grid + (size * size if spec.low else 0), spec.pooling)  # holes come after the shift
        tokens.append(view_tokens(*high.shape[:2]))
        windows.append(high.reshape(-1, high.shape[-1]))
        canvas = (grid.shape[0] * spec.patch_size, grid.shape[1] * spec.patch_size)
    result = Layout((rows, cols), canvas, int(spec.low) + rows * cols, np.concatenate(tokens), np.concatenate(windows))
    result.tokens.flags.writeable = result.pooling.flags.writeable = False
    return result


def stitched_grid(rows: int, cols: int, spec: TilingSpec) -> IntArray:
    """[rows * window + margins, cols * window + margins] which patch of which crop shows each patch of the canvas.

    Patches are numbered crop by crop, row by row. Of the patches that two neighbours both see, a crop keeps neither
    its first `margins[0]` nor its last `margins[1]`, except at the edge of the canvas.
    """
    source_rows, source_cols = _kept(rows, spec), _kept(cols, spec)
    size = spec.crop_patches
    crop = source_rows[:, None, 0] * cols + source_cols[None, :, 0]
    return crop * size * size + source_rows[:, None, 1] * size + source_cols[None, :, 1]


def _kept(tiles: int, spec: TilingSpec) -> IntArray:
    """[tiles * window + margins, 2] the tile and the place in it that each line of patches is taken from."""
    before, after = spec.margins
    size = spec.crop_patches
    kept = [
        (tile, place)
        for tile in range(tiles)
        for place in range(before if tile > 0 else 0, size - after if tile < tiles - 1 else size)
    ]
    return np.array(kept, dtype=np.int64)


def pool_windows(grid: IntArray, pooling: tuple[int, int]) -> IntArray:
    """[rows, cols, W] the patches of each pooling window over `grid` [h, w], filled up with `HOLE`.

    Of the missing lines half, rounded down, come before and the rest after: with 2 x 2 windows an odd grid is filled
    up at the bottom and the right only.
    """
    pads = []
    for size, pool in zip(grid.shape, pooling, strict=True):
        missing = -size % pool
        pads.append((missing // 2, missing - missing // 2))
    padded = np.pad(grid, pads, constant_values=HOLE)
    pool_h, pool_w = pooling
    rows, cols = padded.shape[0] // pool_h, padded.shape[1] // pool_w
    return padded.reshape(rows, pool_h, cols, pool_w).swapaxes(1, 2).reshape(rows, cols, pool_h * pool_w)


def view_tokens(rows: int, cols: int) -> IntArray:
    """[rows * (cols + 1) + 2] the tokens of one view: start, rows of patches with a column token after each, end."""
    body = np.full((rows, cols + 1), IM_PATCH, dtype=np.int64)
    body[:, -1] = IM_COL
    return np.concatenate([[IM_START], body.ravel(), [IM_END]])


def cut_crops(
    canvas: npt.NDArray[np.uint8], tiling: tuple[int, int], spec: TilingSpec, out: npt.NDArray[np.uint8]
) -> None:
    """Writes the overlapping crops of a canvas [H, W, 3] of the layout's size to `out` [rows * cols, S, S, 3]."""
    rows, cols = tiling
    size, stride = spec.crop_size, spec.window_patches * spec.patch_size
    for row in range(rows):
        for col in range(cols):
            top, left = row * stride, col * stride
            out[row * cols + col] = canvas[top : top + size, left : left + size]
