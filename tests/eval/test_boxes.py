"""Boxes against pycocotools' intersection over union and the published rule."""

import numpy as np
import pytest
from pycocotools import mask as coco

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import METRICS
from molmo_model.eval.metrics.boxes import iou
from molmo_model.model_config import PointFormat
from molmo_model.preprocessing.structured import boxes_to_text

TARGET = (10.0, 20.0, 60.0, 80.0)
REFERENCES = {"answer": "", "metadata": {"boxes": [list(TARGET)]}}
score = METRICS["box_iou"].score


def test_iou_equals_pycocotools():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 100, (60, 2, 2)), axis=1).reshape(60, 4)
    corners[:5] = [[0, 0, 10, 10], [10, 0, 20, 10], [5, 5, 15, 15], [0, 0, 10, 10], [2, 2, 8, 8]]
    ours = [[iou(tuple(a), tuple(b)) for b in corners] for a in corners]
    sizes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    assert np.allclose(ours, coco.iou(sizes, sizes, [0] * len(sizes)))


def test_iou_without_area_is_zero():
    assert iou((1, 1, 1, 5), (1, 1, 1, 5)) == 0.0
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0


@pytest.mark.parametrize("style", list(PointFormat))
def test_a_box_in_any_format_of_points(style):
    text = "It is here: " + boxes_to_text([TARGET], "cat", style)
    assert score(text, REFERENCES).values == {"accuracy": 1.0, "iou": 1.0, "valid": 1.0}


def test_a_half_is_not_enough_and_the_first_box_counts():
    half = boxes_to_text([(10.0, 20.0, 60.0, 50.0)], "cat")
    assert score(half, REFERENCES).values == {"accuracy": 0.0, "iou": 0.5, "valid": 1.0}
    more = boxes_to_text([(10.0, 20.0, 60.0, 50.1)], "cat")
    assert score(more, REFERENCES).values["accuracy"] == 1.0
    assert score(half + boxes_to_text([TARGET], "cat"), REFERENCES).values["iou"] == 0.5


@pytest.mark.parametrize(
    "text",
    ["", "left", "[10, 20, 60, 80]", '<point x="1.0" y="2.0" alt="a">a</point>', "(60.0, 80.0) (10.0, 20.0)"],
)
def test_answers_without_a_box_score_zero_and_are_counted(text):
    found = score(text, REFERENCES)
    assert not found.parsed
    assert set(found.values.values()) == {0.0}


def test_the_reference_is_one_box_of_the_metadata_or_the_answer():
    assert score(boxes_to_text([TARGET], "a"), {"answer": boxes_to_text([TARGET], "cat")}).values["iou"] == 1.0
    for references in ({"answer": "a cat"}, {"answer": "", "metadata": {"boxes": [list(TARGET)] * 2}}):
        with pytest.raises(EvaluationError, match="needs one"):
            score("x", references)


def test_the_constant_box_is_the_median():
    training = [{"answer": "", "metadata": {"boxes": [[n, n, n + 20.0, n + 30.0]]}} for n in (0.0, 10.0, 50.0)]
    constant = METRICS["box_iou"].constant(training)
    assert score(constant, training[1]).values["iou"] == 1.0
