"""Where the selected tokens of a HeMolmo stand, and which low-resolution scores decide about each. No pixels, no torch.

Of an image's high-resolution view only K tokens enter the language model. They stand in *slots*, in front of the view's
column tokens:

    tokens    <im_start> low-resolution rows <im_end>  <im_start> K x <im_patch> h x <im_col> <im_end>
    position  0 ...                                    L          those of the selected       that of the whole view

Positions are those of the whole view, as if nothing had been left out: a selected token keeps the position of its
place in the raster, column tokens those of the row ends, and what follows the image goes on behind the full view. So
the order of tokens is not that of positions, and with all tokens selected the language model computes what a plain
Molmo does (tokens of one image see each other in both directions, and attention knows positions, not places).

Scores are made for every patch of the low-resolution windows; `low_to_high` says how a high-resolution token reads its
own score off that grid: bilinearly, at the place of the picture that it shows.

Names in shapes: L low-resolution tokens of the image, H high-resolution ones (the candidates), K slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo_model.preprocessing.tiling import (
    IM_COL,
    IM_END,
    IM_PATCH,
    IM_START,
    Layout,
    TilingSpec,
    letterbox_size,
    tiling_layout,
    view_tokens,
)

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImageSlots:
    """One image of a sequence, as the selector must know it."""

    start: int
    """Place in the sequence of the image's first token."""
    low_view: int
    """Tokens of the low-resolution view, its start, column and end tokens included."""
    end: int
    """The place behind its last token."""
    low: IntArray
    """[L] places of its `<im_patch>` in the sequence."""
    slots: IntArray
    """[K] places of the slots in the sequence."""
    positions: IntArray
    """[H] position id of every candidate."""
    sources: IntArray
    """[H, 4] scores that a candidate's is read off: token * patches of a window + patch, of this image."""
    weights: FloatArray
    """[H, 4] their shares, which sum to 1."""
    patches: int
    """Scores of one low-resolution token: the patches of its window."""


def slot_tokens(one: Layout, spec: TilingSpec, keep: int) -> tuple[IntArray, IntArray]:
    """Tokens (places in `IMAGE_TOKENS`) and positions, both [N], of an image with at most `keep` slots.

    The position of a slot stands for itself until a token is selected for it.
    """
    (rows, cols), low = view_size(one, spec), low_tokens(one, spec)
    kept = min(keep, rows * cols)
    high = np.concatenate([[IM_START], np.full(kept, IM_PATCH), np.full(rows, IM_COL), [IM_END]])
    ends = 1 + np.arange(1, rows + 1) * (cols + 1) - 1
    places = np.concatenate([[0], raster(rows, cols)[:kept] + 1, ends, [1 + rows * (cols + 1)]])
    return np.concatenate([low, high]), np.concatenate([np.arange(len(low)), len(low) + places])


def image_slots(
    one: Layout, spec: TilingSpec, keep: int, size: tuple[int, int], start: int, position: int
) -> ImageSlots:
    """The slots of an image whose first token stands at place `start` and has the given position id.

    Args:
        size: height and width of the picture in pixels.
    """
    (rows, cols), low = view_size(one, spec), low_tokens(one, spec)
    kept = min(keep, rows * cols)
    sources, weights = low_to_high(one, spec, size)
    return ImageSlots(
        start=start,
        low_view=len(low),
        end=start + len(low) + kept + rows + 2,
        low=start + np.flatnonzero(low == IM_PATCH),
        slots=start + len(low) + 1 + np.arange(kept),
        positions=position + len(low) + 1 + raster(rows, cols),
        sources=sources,
        weights=weights,
        patches=spec.pooling[0] * spec.pooling[1],
    )


def raster(rows: int, cols: int) -> IntArray:
    """[rows * cols] places of the tokens of a view among its tokens and the column tokens at the row ends."""
    return (np.arange(rows)[:, None] * (cols + 1) + np.arange(cols)).ravel()


def view_size(one: Layout, spec: TilingSpec) -> tuple[int, int]:
    """Rows and columns of the high-resolution tokens."""
    height, width = (side // spec.patch_size for side in one.canvas)
    return -(-height // spec.pooling[0]), -(-width // spec.pooling[1])


def low_tokens(one: Layout, spec: TilingSpec) -> IntArray:
    """The tokens of the low-resolution view."""
    size = spec.crop_patches
    return view_tokens(-(-size // spec.pooling[0]), -(-size // spec.pooling[1]))


def low_to_high(one: Layout, spec: TilingSpec, size: tuple[int, int]) -> tuple[IntArray, FloatArray]:
    """For every candidate the four scores around the place that it shows, and their shares.

    Scores are numbered token by token of the low-resolution view, patch by patch of its window. Where crop and canvas
    are filled by whole windows this is bilinear interpolation of the grid of scores to the grid of candidates (without
    antialiasing, corners not aligned), as in the reference. Windows that reach over the edge, and the bars of
    letterboxed pictures, are measured exactly here: both views show the same picture at different places.

    Args:
        size: height and width of the picture in pixels; only its shape matters, and only if letterboxed.
    """
    axes = []
    for axis in (0, 1):
        inner_low = _inner(size, (spec.crop_size, spec.crop_size), spec)[axis]
        inner_high = _inner(size, one.canvas, spec)[axis]
        axes.append(_axis(one.canvas[axis], inner_high, inner_low, spec, axis))
    (row, row_share), (col, col_share) = axes
    pool_h, pool_w = spec.pooling
    low_cols = -(-spec.crop_patches // pool_w)
    rows, cols = row[:, None, :, None], col[None, :, None, :]  # [h, w, 2, 2]
    token = rows // pool_h * low_cols + cols // pool_w
    sources = token * (pool_h * pool_w) + rows % pool_h * pool_w + cols % pool_w
    shares = row_share[:, None, :, None] * col_share[None, :, None, :]
    return sources.reshape(-1, 4), shares.reshape(-1, 4).astype(np.float32)


def window_edges(one: Layout, spec: TilingSpec, size: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """Where the windows of the candidates lie in the picture: edges of their rows [h + 1] and columns [w + 1] as shares
    of its height and width. Windows over the edge, or in a bar, end at 0 or 1."""
    edges = []
    for axis, count in enumerate(view_size(one, spec)):
        pool, canvas, inner = spec.pooling[axis], one.canvas[axis], _inner(size, one.canvas, spec)[axis]
        before = (-(canvas // spec.patch_size) % pool) // 2
        lines = (np.arange(count + 1) * pool - before) * spec.patch_size - (canvas - inner) // 2
        edges.append((lines / inner).clip(0, 1).astype(np.float32))
    return edges[0], edges[1]


def _inner(size: tuple[int, int], frame: tuple[int, int], spec: TilingSpec) -> tuple[int, int]:
    """Height and width in pixels of the picture inside a frame."""
    return letterbox_size(*size, *frame) if spec.letterbox else frame


def _axis(
    canvas: int, inner_high: int, inner_low: int, spec: TilingSpec, axis: int
) -> tuple[IntArray, npt.NDArray[np.float64]]:
    """Along one axis: for every line of windows of the canvas two lines [n, 2] of low-resolution scores, and shares."""
    pool, patch = spec.pooling[axis], spec.patch_size
    centres = (
        _lines(canvas // patch, pool) * patch - (canvas - inner_high) // 2
    ) / inner_high  # in the picture, 0 to 1
    low_patches = spec.crop_patches
    before = (-low_patches % pool) // 2
    lines = (centres * inner_low + (spec.crop_size - inner_low) // 2) / patch + before - 0.5
    last = -(-low_patches // pool) * pool - 1
    lines = lines.clip(0, last)
    first = np.floor(lines).astype(np.int64).clip(0, max(last - 1, 0))
    share = lines - first
    return np.stack([first, np.minimum(first + 1, last)], 1), np.stack([1 - share, share], 1)


def _lines(patches: int, pool: int) -> npt.NDArray[np.float64]:
    """Where the centre of every window lies, in patches from the edge of the grid that the windows are laid on."""
    missing = -patches % pool
    count = (patches + missing) // pool
    return (np.arange(count) * pool + pool / 2 - missing // 2).astype(np.float64)


def longest_view(spec: TilingSpec) -> int:
    """The most positions that one image takes, over all tilings."""
    pairs = [(rows, cols) for rows in range(1, spec.max_crops + 1) for cols in range(1, spec.max_crops // rows + 1)]
    return max(len(tiling_layout(rows, cols, spec).tokens) for rows, cols in pairs)


@dataclass(frozen=True)
class Placed:
    """An example of a batch."""

    row: int
    start: int
    """Place of its first token in the row."""
    slots: tuple[ImageSlots, ...]
    weight: float
    """Of its answered tokens."""


def selector_arrays(examples: Sequence[Placed], shape: tuple[int, int], multiple: int) -> dict[str, npt.NDArray[Any]]:
    """What the token selector must know of a batch of B rows of S tokens, beside the usual.

    The low-resolution pass reads, row by row, every example up to the end of its last image's low-resolution view,
    without the high-resolution views of images before it: L tokens, filled up. N are the low-resolution tokens of the
    batch, M its images with at most H candidates and K slots each.

    Args:
        examples: in the order of their image tokens.
        multiple: L is a multiple of it.

    Returns:
        selector_pass: [B, L] places in the row, -1 for none.
        selector_rows: [B, S] image token (a row of `pooling`) to add there, counted from 1; 0 for none, and on slots.
        selector_low: [N] flat places in the pass of the low-resolution tokens, and selector_ends: [M] of the ends of
            the low-resolution views.
        selector_candidates: [M, H] image tokens to choose from, -1 for none; selector_positions: [M, H] of theirs.
        selector_sources, selector_weights: [M, H, 4] scores of the N tokens' patches that a candidate's is read off.
        selector_slots: [M, K] flat places in the batch, -1 for none.
        selector_shares: float32 [M] weight of the auxiliary losses: that of the example's answers, shared out among
            its images, so that they average over examples as the cross-entropy does.
    """
    passes, where = _passes(examples, shape, multiple)
    images = [(one, image) for one in examples for image in one.slots]
    counts = [(len(image.positions), len(image.slots)) for _, image in images]
    size, most = max((h for h, _ in counts), default=1), max((k for _, k in counts), default=1)
    found: dict[str, npt.NDArray[Any]] = {
        "selector_candidates": np.full((len(images), size), -1, dtype=np.int64),
        "selector_positions": np.zeros((len(images), size), dtype=np.int64),
        "selector_sources": np.zeros((len(images), size, 4), dtype=np.int64),
        "selector_weights": np.zeros((len(images), size, 4), dtype=np.float32),
        "selector_slots": np.full((len(images), most), -1, dtype=np.int64),
        "selector_shares": np.zeros(len(images), dtype=np.float32),
        "selector_ends": np.zeros(len(images), dtype=np.int64),
    }
    rows, low = np.zeros(shape, dtype=np.int64), [np.zeros(0, dtype=np.int64)]
    tokens = scores = 0
    for number, (one, image) in enumerate(images):
        candidates, slots = counts[number]
        rows[one.row, one.start + image.low] = tokens + 1 + np.arange(len(image.low))
        tokens += len(image.low)
        found["selector_candidates"][number, :candidates] = tokens + np.arange(candidates)
        tokens += candidates
        found["selector_positions"][number, :candidates] = image.positions
        found["selector_sources"][number, :candidates] = scores + image.sources
        found["selector_weights"][number, :candidates] = image.weights
        scores += len(image.low) * image.patches
        found["selector_slots"][number, :slots] = one.row * shape[1] + one.start + image.slots
        found["selector_shares"][number] = one.weight / len(one.slots)
        found["selector_ends"][number] = where[one.row, one.start + image.start + image.low_view - 1]
        low.append(where[one.row, one.start + image.low])
    return {"selector_pass": passes, "selector_rows": rows, "selector_low": np.concatenate(low), **found}


def no_images(rows: int, length: int) -> dict[str, npt.NDArray[Any]]:
    """The same for a training batch without images, whose one image token is a dummy that is chosen for no slot: every
    parameter takes part, and ranks with and without images stay in step."""
    one = np.zeros((1, 1), dtype=np.int64)
    return {
        "selector_pass": np.zeros((rows, 1), dtype=np.int64),
        "selector_rows": np.zeros((rows, length), dtype=np.int64),
        "selector_low": one[0],
        "selector_candidates": one,
        "selector_positions": one,
        "selector_sources": np.zeros((1, 1, 4), dtype=np.int64),
        "selector_weights": np.full((1, 1, 4), 0.25, dtype=np.float32),
        "selector_slots": one - 1,
        "selector_shares": np.zeros(1, dtype=np.float32),
        "selector_ends": one[0],
    }


def _passes(examples: Sequence[Placed], shape: tuple[int, int], multiple: int) -> tuple[IntArray, IntArray]:
    """The low-resolution pass [B, L], and the flat place in it of every place [B, S] of the batch, -1 for none."""
    taken: list[list[IntArray]] = [[] for _ in range(shape[0])]
    for one in examples:
        begin = 0
        for image in one.slots:
            taken[one.row].append(one.start + np.arange(begin, image.start + image.low_view))
            begin = image.end
    lengths = [sum(map(len, row)) for row in taken]
    length = -(-max([1, *lengths]) // multiple) * multiple
    passes, where = np.full((shape[0], length), -1, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    for number, row in enumerate(taken):
        if row:
            places = np.concatenate(row)
            passes[number, : len(places)] = places
            where[number, places] = number * length + np.arange(len(places))
    return passes, where
