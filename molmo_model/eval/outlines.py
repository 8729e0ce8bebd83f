"""The outline of a mask as an SVG path, coarse enough for a page: sampled on a grid, traced along the cells' edges."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from molmo_model.eval.metrics.masks import runs

CELLS = 96
"""Cells of the grid along the longer side, at most."""

_Corner = tuple[int, int]


def outline(mask: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Closed paths around a mask, holes too, in pixels of a picture of `size` (width, height); empty where the mask is,
    or where its runs do not add up.

    Args:
        mask: runs as in `metrics.masks`; it may be coarser than the picture.
    """
    height, width = mask["size"]
    ends = list(accumulate(runs(mask["counts"])))
    if not ends or ends[-1] != height * width or not ends[-1]:
        return ""
    factor = max(1.0, max(height, width) / CELLS)
    columns, rows = max(1, round(width / factor)), max(1, round(height / factor))

    def inside(column: int, row: int) -> bool:
        x, y = int((column + 0.5) * width / columns), int((row + 0.5) * height / rows)
        return bisect_right(ends, x * height + y) % 2 == 1

    grid = [[inside(column, row) for column in range(columns)] for row in range(rows)]
    scale = size[0] / columns, size[1] / rows
    return "".join(_path(loop, scale) for loop in _loops(grid))


def _loops(grid: Sequence[Sequence[bool]]) -> list[list[_Corner]]:
    """Corners around every connected area, clockwise, and around holes the other way."""
    rows, columns = len(grid), len(grid[0])

    def at(column: int, row: int) -> bool:
        return 0 <= row < rows and 0 <= column < columns and grid[row][column]

    edges: dict[_Corner, list[_Corner]] = {}
    for row in range(rows):
        for column in range(columns):
            if not grid[row][column]:
                continue
            sides = (
                ((column, row), (column + 1, row), (column, row - 1)),
                ((column + 1, row), (column + 1, row + 1), (column + 1, row)),
                ((column + 1, row + 1), (column, row + 1), (column, row + 1)),
                ((column, row + 1), (column, row), (column - 1, row)),
            )
            for start, end, beyond in sides:
                if not at(*beyond):
                    edges.setdefault(start, []).append(end)
    loops = []
    while edges:
        start = next(iter(edges))
        loop, corner = [start], start
        while True:
            nexts = edges[corner]
            corner = nexts.pop()
            if not nexts:
                del edges[loop[-1]]
            if corner == start:
                break
            loop.append(corner)
        loops.append(loop)
    return loops


def _path(loop: Sequence[_Corner], scale: tuple[float, float]) -> str:
    """One closed path; corners on a straight line are left out."""
    bends = [
        corner
        for before, corner, after in zip((loop[-1], *loop[:-1]), loop, (*loop[1:], loop[0]), strict=True)
        if (corner[0] - before[0], corner[1] - before[1]) != (after[0] - corner[0], after[1] - corner[1])
    ]
    return "M" + "L".join(f"{x * scale[0]:.4g} {y * scale[1]:.4g}" for x, y in bends) + "Z"
