"""Masks of pictures as COCO keeps them, asked point by point: whether a pixel is inside, without decoding the mask.

A mask is `{"size": [height, width], "counts": ...}`: lengths of runs along the columns, of pixels outside first. The
counts are a list, or COCO's compressed text of it (https://github.com/cocodataset/cocoapi, `common/maskApi.c`). No
numpy: a score starts in a fraction of a second, and one pixel is a binary search in the sums of the runs.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from molmo_model.errors import EvaluationError


def contains(mask: Mapping[str, Any], x: int, y: int) -> bool:
    """Whether pixel (x, y) lies in a mask; what lies outside the picture does not.

    Raises:
        EvaluationError: the runs do not add up to the mask's size.
    """
    height, width = mask["size"]
    ends = list(accumulate(runs(mask["counts"])))
    if (ends[-1] if ends else 0) != height * width:
        raise EvaluationError(
            f"the runs of a mask of {height} x {width} pixels add up to {ends[-1] if ends else 0}, not to "
            f"{height * width}; see COCO's run-length encoding"
        )
    return 0 <= x < width and 0 <= y < height and bisect_right(ends, x * height + y) % 2 == 1


def runs(counts: Sequence[int] | str) -> Sequence[int]:
    """Lengths of runs, from their list or from COCO's text.

    The text has numbers in groups of 5 bits, the lowest first, as characters from `0` on; bit 5 says that more follow,
    bit 4 of the last is the sign; from the fourth number on each is the difference to the last but one.
    """
    if not isinstance(counts, str):
        return counts
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        group = ord(character) - 48
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    return lengths
