"""The geometry of an image: how many crops, where they lie, which patches make one image token. No pixels, no torch.

An image is seen twice: once whole at low resolution, and once as overlapping high-resolution crops. The crops of a
tiling of `rows x cols` overlap by `margins` patches; where they overlap, each patch is kept from one crop only, so
that the kept patches of all crops form one *stitched grid* without duplicates. Pooling windows are laid on that grid.

Everything depends on the image's size through the tiling alone (but for the scales of a letterboxed hierarchical
image), so `layout()` is computed once per tiling and shared: its arrays are read-only.

Names in shapes: T pooling windows of the image, C crops, P patches per side of a crop, N = P * P patches of a crop, W
patches of a pooling window. A window becomes `tokens_per_window` tokens of the text, one with most poolings.
"""

from dataclasses import dataclass, replace
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
    tokens_per_window: int = 1
    """`<im_patch>` tokens that one pooling window becomes."""
    letterbox: bool = False
    """Whether images keep their aspect ratio between bars instead of being squashed."""

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
        if self.tokens_per_window < 1:
            raise ConfigError(f"tokens_per_window is {self.tokens_per_window}; it must be at least 1")

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

    @property
    def fused(self) -> bool:
        """Whether a pooling window holds both scales: its patches of the stitched grid, then one of the global crop."""
        return self.mode is CropMode.hierarchical

    @property
    def window_columns(self) -> int:
        """W, places of a pooling window: its patches, and with fused scales one more."""
        return self.pooling[0] * self.pooling[1] + int(self.fused)


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
    """[T, W] flat patch numbers into C * N of every window, in the order of its tokens; `HOLE` outside the image."""


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
    tiling = tiling_for(height, width, spec)
    if spec.fused and spec.letterbox:
        return _letterboxed_layout(height, width, *tiling, spec)
    return tiling_layout(*tiling, spec)


@cache
def tiling_layout(rows: int, cols: int, spec: TilingSpec) -> Layout:
    """The layout of every image of one tiling that fills its crops; (0, 0) is the global crop alone."""
    tokens, windows = [], []
    size = spec.crop_patches
    if spec.low and not spec.fused:
        low = pool_windows(np.arange(size * size).reshape(size, size), spec.pooling)
        tokens.append(view_tokens(low.shape[0], low.shape[1], spec.tokens_per_window))
        windows.append(low.reshape(-1, low.shape[-1]))
    canvas = (0, 0)
    if spec.high:
        grid = stitched_grid(rows, cols, spec)
        canvas = (grid.shape[0] * spec.patch_size, grid.shape[1] * spec.patch_size)
        high = pool_windows(grid + (size * size if spec.low else 0), spec.pooling)  # holes come after the shift
        if spec.fused:
            centres = global_patches(Box(0, 0, *canvas), Box(0, 0, spec.crop_size, spec.crop_size), canvas, spec)
            high = np.concatenate([high, centres[:, :, None]], axis=2)
        tokens.append(view_tokens(high.shape[0], high.shape[1], spec.tokens_per_window))
        windows.append(high.reshape(-1, high.shape[-1]))
    return _frozen(
        Layout((rows, cols), canvas, int(spec.low) + rows * cols, np.concatenate(tokens), np.concatenate(windows))
    )


@lru_cache(maxsize=256)
def _letterboxed_layout(height: int, width: int, rows: int, cols: int, spec: TilingSpec) -> Layout:
    """The layout of one size of image: where bars lie differently in the two scales, so do the windows' centres."""
    common = tiling_layout(rows, cols, spec)
    low = letterbox_box(height, width, spec.crop_size, spec.crop_size)
    pooling = common.pooling.copy()
    pooling[:, -1] = global_patches(letterbox_box(height, width, *common.canvas), low, common.canvas, spec).ravel()
    return _frozen(replace(common, pooling=pooling))


def _frozen(one: Layout) -> Layout:
    one.tokens.flags.writeable = one.pooling.flags.writeable = False
    return one


@dataclass(frozen=True)
class Box:
    """The rectangle of a frame that shows picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def letterbox_size(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    """Height and width of a letterboxed picture inside the frame `to_height x to_width`.

    The scale is a float32 and the product is cut off, as the published models were trained; at least one pixel.
    """
    scale = min(np.float32(to_height) / np.float32(height), np.float32(to_width) / np.float32(width))
    inner_height, inner_width = int(np.float32(height) * scale), int(np.float32(width) * scale)
    return max(1, min(inner_height, to_height)), max(1, min(inner_width, to_width))


def letterbox_box(height: int, width: int, to_height: int, to_width: int) -> Box:
    """Where a letterboxed picture lies: in the middle, the odd line of the bars at the bottom or the right."""
    inner_height, inner_width = letterbox_size(height, width, to_height, to_width)
    return Box((to_height - inner_height) // 2, (to_width - inner_width) // 2, inner_height, inner_width)


def global_patches(high: Box, low: Box, canvas: tuple[int, int], spec: TilingSpec) -> IntArray:
    """[rows, cols] the patch of the global crop that shows the centre of each pooling window of the stitched grid.

    Args:
        high, low: where the picture lies on the canvas and on the global crop.
        canvas: height and width of the canvas in pixels.
    """
    rows = _global_lines((high.top, high.height), (low.top, low.height), canvas[0], spec.pooling[0], spec)
    cols = _global_lines((high.left, high.width), (low.left, low.width), canvas[1], spec.pooling[1], spec)
    return rows[:, None] * spec.crop_patches + cols


def _global_lines(high: tuple[int, int], low: tuple[int, int], canvas: int, pool: int, spec: TilingSpec) -> IntArray:
    """The row (or column) of patches of the global crop for each row of windows. Centres that lie in a bar are carried
    on in proportion; at the border of two patches the later one shows the centre. Whole numbers throughout."""
    patch = spec.patch_size
    lines = pool_windows(np.arange(canvas // patch)[None], (1, pool))[0]  # [windows, pool]
    first, last = np.where(lines == HOLE, canvas, lines).min(axis=1), lines.max(axis=1)
    twice = (first + last + 1) * patch  # twice the centre, in pixels of the canvas
    (start, length), (low_start, low_length) = high, low
    places = (2 * low_start * length + (twice - 2 * start) * low_length) // (2 * length * patch)
    return places.clip(0, spec.crop_patches - 1)


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


def view_tokens(rows: int, cols: int, tokens_per_window: int = 1) -> IntArray:
    """[rows * (cols * tokens_per_window + 1) + 2] the tokens of one view of `rows x cols` windows: start, rows of patch
    tokens with a column token after each, end."""
    body = np.full((rows, cols * tokens_per_window + 1), IM_PATCH, dtype=np.int64)
    body[:, -1] = IM_COL
    return np.concatenate([[IM_START], body.ravel(), [IM_END]])
