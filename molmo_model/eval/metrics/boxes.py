"""Boxes: how much of the box that was said and the box that is meant is common to both."""

from collections.abc import Sequence
from statistics import median

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.answers import answers_of
from molmo_model.eval.metrics.metric import Metric, Output, References, Score
from molmo_model.preprocessing.structured import Box, boxes_to_text, read_boxes


def box_iou(prediction: str, references: References) -> Score:
    """Intersection over union of the first box that the answer writes with the one that is meant."""
    wanted, said = _reference_box(references), read_boxes(prediction).boxes
    overlap = iou(said[0], wanted) if said else 0.0
    values = {"accuracy": float(overlap > 0.5), "iou": overlap, "valid": float(bool(said))}
    return Score(values, parsed=bool(said))


def iou(a: Box, b: Box) -> float:
    """Area common to two boxes / area that either covers; 0 for boxes without area. The unit does not matter."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(height, 0.0)
    both = _area(a) + _area(b) - common
    return common / both if both > 0.0 else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _reference_box(references: References) -> Box:
    """The one box of the metadata (percent), else of the reference answer.

    Raises:
        EvaluationError: there is not exactly one.
    """
    boxes = references.get("metadata", {}).get("boxes") or read_boxes(answers_of(references)[0]).boxes
    if len(boxes) != 1:
        raise EvaluationError(
            f"references have {len(boxes)} boxes, in `metadata.boxes` or as corners in the answer "
            f"{references.get('answer')!r}; this metric needs one"
        )
    left, top, right, bottom = boxes[0]
    return (left, top, right, bottom)


def _typical_box(references: Sequence[References]) -> str:
    """The median of each edge; the whole picture where that is too small to be written."""
    edges = list(zip(*(_reference_box(item) for item in references), strict=True))
    left, top, right, bottom = (round(median(edge), 1) for edge in edges)
    if not (0 <= left < right <= 100 and 0 <= top < bottom <= 100):
        left, top, right, bottom = 0.0, 0.0, 100.0, 100.0
    return boxes_to_text([(left, top, right, bottom)], "it")


METRICS: dict[str, Metric] = {
    "box_iou": Metric(
        box_iou,
        "accuracy",
        _typical_box,
        "the box of the median edges in training",
        "Referring expressions as in allenai/molmo `RefExpEval`: the first two points of the answer are the corners of"
        " a box, which is right from an intersection over union of more than 0.5. Different here: no small constant in"
        " the denominator, and a pair that is no box (its corners in the wrong order) is passed over. A bare list of"
        " numbers is not read, because every model means another unit by it.",
        outputs={
            "accuracy": Output("1 if intersection over union is more than 0.5"),
            "iou": Output("area common to both boxes / area that either covers"),
            "valid": Output("1 if the answer has a box"),
        },
        unparsed="No box: 0.",
    ),
}
