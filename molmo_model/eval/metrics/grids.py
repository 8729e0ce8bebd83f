"""Captions that write a grid of digits row by row, such as `3 . 5 / . 7 1`."""

from collections import Counter
from collections.abc import Sequence

from molmo_model.eval.metrics.answers import answers_of
from molmo_model.eval.metrics.metric import Metric, Output, References, Score


def caption_digits(prediction: str, references: References) -> Score:
    """Cell by cell through a caption such as `3 . 5 / . 7 1`: digits right, all cells right, the whole caption right.

    `digits` is the fraction of the cells that hold a digit where the caption has that digit at that place. An answer
    whose rows and columns are not those of the reference counts as unparsed; the cells it does have are still compared.
    """
    target, said = _reference_grid(references), _grid(prediction)
    shape = [len(row) for row in target]
    right = [
        (wanted, row < len(said) and column < len(said[row]) and said[row][column] == wanted)
        for row, cells in enumerate(target)
        for column, wanted in enumerate(cells)
    ]
    digits = [hit for wanted, hit in right if wanted.isdigit()]
    values = {
        "digits": sum(digits) / len(digits) if digits else float(said == target),
        "cells": sum(hit for _, hit in right) / len(right),
        "exact": float(said == target),
    }
    return Score(values, parsed=[len(row) for row in said] == shape)


def _grid(text: str) -> list[list[str]]:
    return [row.split() for row in text.strip().split("/")]


def _reference_grid(references: References) -> list[list[str]]:
    cells = references.get("metadata", {}).get("cells")
    if cells:
        return [["." if value is None else str(value) for value in row] for row in cells]
    return _grid(answers_of(references)[0])


def _most_frequent_grid(references: Sequence[References]) -> str:
    grids = [_reference_grid(item) for item in references]
    shape = Counter(tuple(len(row) for row in grid) for grid in grids).most_common(1)[0][0]
    same = [grid for grid in grids if tuple(len(row) for row in grid) == shape]

    def commonest(row: int, column: int) -> str:
        counts = Counter(grid[row][column] for grid in same if grid[row][column].isdigit())
        return min(counts, key=lambda digit: (-counts[digit], digit)) if counts else "."

    return " / ".join(" ".join(commonest(row, column) for column in range(size)) for row, size in enumerate(shape))


METRICS: dict[str, Metric] = {
    "caption_digits": Metric(
        caption_digits,
        "digits",
        _most_frequent_grid,
        "the most frequent digit of each cell in training",
        "This project: fraction of the digits of a grid that a caption reads at their place.",
        outputs={
            "digits": Output("fraction of the cells that hold a digit where the caption has that digit at that place"),
            "cells": Output("fraction of all cells that the caption has right"),
            "exact": Output("1 if the whole caption is right"),
        },
        unparsed="Other rows and columns than the reference: the cells that are there are compared all the same.",
    ),
}
