"""PixMo, what people pointed at: points with labels, counts, points inside explanations, and the evaluation set with
masks. Pictures come by URL, see `pixmo.py`.

Columns as the dataset cards describe them and as Molmo2's reference readers use them (`olmo/data/pixmo_datasets.py`):

| set of `allenai` | columns |
|---|---|
| `pixmo-points` | image_url, image_sha256, points [{x, y}] in percent, count, label, collection_method |
| `pixmo-count` | image_url, image_sha256, points {x [], y []} in pixels, in training only, count, label |
| `pixmo-point-explanations` | image_url, image_sha256, question, parsed_response, alt_text, inline_text, points |
| `pixmo-points-eval` | image_url, label, points [{x, y}] in percent, masks [[[boolean]]], one for each point |

In pixmo-point-explanations, each mark `<|POINT|>` of parsed_response has an entry of alt_text, of inline_text and of
points [[[x, y]]], in percent; rows without parsed_response could not be parsed by their makers and are passed over.
The card of pixmo-points calls its points pixels; they are percent, as the reference reads them. Those of pixmo-count
are pixels. Both kinds of points may lie a little outside of the picture: `row_fields.EDGE`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo_model.data.datasets.pixmo import LICENCE, SPLITS, picture_of, picture_urls, same_picture
from molmo_model.data.datasets.published import Files, Published, RowError, each, family
from molmo_model.data.datasets.row_fields import check_choice, percent_points, records, text, whole
from molmo_model.data.example import (
    POINT_MARK,
    Conversation,
    Example,
    InlinePoints,
    Message,
    Point,
    is_number,
)

STYLES = {"pointing": ("pointing",), "point_count": ("point_count",), "both": ("pointing", "point_count")}
"""Option `mode` to styles. In both, each label has a conversation of each style; mixtures and tasks select by style."""
KINDS = {"pointing": "basic", "counting": "high_frequency"}
"""`collection_method` of pixmo-points to the reference's name: pictures chosen for pointing, or because they show many
of a kind."""


def point_talk(style: str, label: str, points: tuple[Point, ...], metadata: dict[str, Any]) -> Conversation:
    """A question for points, drawn from the style's templates; without points the answer is that there are none."""
    messages = (Message("user", label=label), Message("assistant", points=points, label=label))
    return Conversation(style, messages, metadata={"count": len(points)} | metadata)


# --- points


@dataclass
class PointOptions:
    """Which rows, and how they are asked for."""

    mode: str = "both"
    """`pointing`, `point_count` (points that are counted) or `both`."""
    kind: str = "both"
    """`basic`, `high_frequency` (pictures chosen for many objects of a kind) or `both`."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, list(STYLES))
        check_choice("kind", self.kind, [*KINDS.values(), "both"])


def convert_points(rows: Sequence[dict[str, Any]], files: Files, options: PointOptions) -> list[Example]:
    """One picture with all labels that were pointed at, of one kind; none where the kind is not wanted."""
    labelled = each(rows, _labelled)
    kind = KINDS[rows[0]["collection_method"]]
    if options.kind not in (kind, "both"):
        return []
    talks = [
        point_talk(style, label, points, {"kind": kind}) for label, points in labelled for style in STYLES[options.mode]
    ]
    picture, name, metadata = picture_of(rows, files)
    return [Example(f"{kind}-{name}", (picture,), tuple(talks), metadata | {"kind": kind})]


def picture_and_kind(fields: dict[str, Any]) -> tuple[str, str]:
    """The key of rows about one picture that was chosen for one purpose."""
    method = text(fields, "collection_method")
    if method not in KINDS:
        raise RowError("collection_method", f"is {method!r}; known: {', '.join(KINDS)}")
    return same_picture(fields), method


def _labelled(fields: dict[str, Any]) -> tuple[str, tuple[Point, ...]]:
    points = percent_points(records(fields, "points", ("x", "y")), "points")
    if "count" in fields and (count := whole(fields, "count")) != len(points):
        raise RowError("count", f"is {count}, but there are {len(points)} points")
    return text(fields, "label"), points


PIXMO_POINTS = family(
    Published(
        hub="allenai/pixmo-points",
        revision="2b5c6931e790e00ae00d4a2857e5f95d88f09a66",
        licence=LICENCE,
        card="https://huggingface.co/datasets/allenai/pixmo-points",
        splits=SPLITS,
        urls=picture_urls,
    ),
    convert_points,
    options=PointOptions,
    group=picture_and_kind,
)


# --- counts


@dataclass
class CountOptions:
    """How counts are asked for."""

    mode: str = "both"
    """`pointing`, `point_count` or `both`; rows without points are always counted."""
    eval_split: str = "validation"
    """Published split to evaluate on: `validation` or `test`."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, list(STYLES))
        check_choice("eval_split", self.eval_split, ("validation", "test"))


def convert_counts(rows: Sequence[dict[str, Any]], files: Files, options: CountOptions) -> Example:
    """One picture with the objects that were counted in it. Points where the set has them, which is in training; else
    the number is the answer."""
    picture, name, metadata = picture_of(rows, files)
    size = (float(picture.width), float(picture.height))
    talks = each(rows, lambda fields: _count_talks(fields, size, STYLES[options.mode]))
    return Example(name, (picture,), tuple(talk for made in talks for talk in made), metadata)


def _count_talks(fields: dict[str, Any], size: tuple[float, float], styles: Sequence[str]) -> list[Conversation]:
    label, count = text(fields, "label"), whole(fields, "count")
    found = records(fields, "points", ("x", "y")) if fields.get("points") else []
    if not found and count:
        messages = (Message("user", label=label), Message("assistant", str(count), label=label))
        return [Conversation("point_count", messages, metadata={"count": count})]
    points = percent_points(found, "points", size)
    if count != len(points):
        raise RowError("count", f"is {count}, but there are {len(points)} points")
    return [point_talk(style, label, points, {}) for style in styles]


PIXMO_COUNT = family(
    Published(
        hub="allenai/pixmo-count",
        revision="59b23017c64213374d54e55ae853f702cb320fd7",
        licence=LICENCE,
        card="https://huggingface.co/datasets/allenai/pixmo-count",
        splits={"train": "train", "eval": "validation"},
        urls=picture_urls,
    ),
    convert_counts,
    options=CountOptions,
    group=same_picture,
)


# --- points inside explanations


def convert_explanations(rows: Sequence[dict[str, Any]], files: Files, options: Any) -> list[Example]:
    """One picture with questions whose answers point at what they speak of."""
    made = each(rows, lambda fields: _explanation(fields) if "parsed_response" in fields else None)
    talks = tuple(talk for talk in made if talk is not None)
    if not talks:
        return []
    picture, name, metadata = picture_of(rows, files)
    return [Example(name, (picture,), talks, metadata)]


def _explanation(fields: dict[str, Any]) -> Conversation:
    answer = text(fields, "parsed_response")
    shown, labels, points = (_as_list(fields, name) for name in ("inline_text", "alt_text", "points"))
    if not (marks := answer.count(POINT_MARK)) == len(points) == len(shown) == len(labels):
        counts = f"{len(points)} points, {len(shown)} inline_text and {len(labels)} alt_text"
        raise RowError("parsed_response", f"has {marks} {POINT_MARK}, but there are {counts}")
    inline = tuple(
        InlinePoints(_pairs(pairs, f"points[{i}]"), words, label)
        for i, (pairs, words, label) in enumerate(zip(points, shown, labels, strict=True))
    )
    messages = (Message("user", text(fields, "question")), Message("assistant", answer, inline=inline))
    return Conversation("point_qa", messages)


def _as_list(fields: dict[str, Any], name: str) -> list[Any]:
    """A list; an answer without marks may have none."""
    value = fields.get(name, [])
    if not isinstance(value, list):
        raise RowError(name, f"is a {type(value).__name__}; it must be a list")
    return value


def _pairs(pairs: Any, name: str) -> tuple[Point, ...]:
    """Points that come as [x, y]."""
    if not isinstance(pairs, list) or not pairs:
        raise RowError(name, f"is {pairs!r}; it must be a list of points that is not empty")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(is_number(value) for value in pair):
            raise RowError(f"{name}[{i}]", f"is {pair!r}; it must be [x, y], two finite numbers")
    return percent_points([{"x": x, "y": y} for x, y in pairs], name)


PIXMO_POINT_EXPLANATIONS = family(
    Published(
        hub="allenai/pixmo-point-explanations",
        revision="92c2393a59d643bf437282a3fd3766a58765267f",
        licence=LICENCE,
        card="https://huggingface.co/datasets/allenai/pixmo-point-explanations",
        splits=SPLITS,
        urls=picture_urls,
    ),
    convert_explanations,
    group=same_picture,
)


# --- the evaluation of pointing


def convert_pointing_eval(rows: Sequence[dict[str, Any]], files: Files, options: Any) -> Example:
    """One picture with labels, points and, for each point, the mask of what it lies on."""
    labelled = each(rows, lambda fields: (*_labelled(fields), _masks(fields)))
    talks = [point_talk("pointing", label, points, {"masks": masks}) for label, points, masks in labelled]
    picture, name, metadata = picture_of(rows, files)
    return Example(name, (picture,), tuple(talks), metadata)


def _masks(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Masks as COCO writes them in plain JSON: `size` is [height, width], `counts` are lengths of runs along the
    columns, of zeros first."""
    masks = fields.get("masks")
    try:
        planes = np.array(masks, dtype=bool)
    except (TypeError, ValueError) as error:
        raise RowError("masks", "must be a list of rectangles of booleans") from error
    if planes.size == 0:
        return []
    if planes.ndim != 3:
        raise RowError("masks", f"has {planes.ndim} dimensions; it must have 3: masks, rows, columns")
    return [{"size": list(plane.shape), "counts": _runs(plane.T.reshape(-1))} for plane in planes]


def _runs(values: np.ndarray) -> list[int]:
    """Lengths of runs of equal booleans, the first of them of zeros and perhaps empty."""
    edges = np.flatnonzero(np.diff(values.astype(np.int8))) + 1
    lengths = np.diff(np.concatenate(([0], edges, [len(values)]))).tolist()
    return [0, *lengths] if values[0] else lengths


PIXMO_POINTS_EVAL = family(
    Published(
        hub="allenai/pixmo-points-eval",
        revision="main",
        licence=LICENCE,
        card="https://huggingface.co/datasets/allenai/pixmo-points-eval",
        splits={"eval": "test"},
        urls=picture_urls,
    ),
    convert_pointing_eval,
    group=same_picture,
)
