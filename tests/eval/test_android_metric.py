"""AndroidControl: the published rules of step accuracy, action by action."""

import pytest

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import METRICS

BOX = [10.0, 20.0, 30.0, 40.0]


def accuracy(prediction, target, box=None):
    metadata = {"target_action": target, "target_box": box}
    return METRICS["android_control"].score(prediction, {"answer": target, "metadata": metadata}).values["accuracy"]


@pytest.mark.parametrize(
    ("prediction", "target", "box", "right"),
    [
        ("Click(10.0, 20.0)", "Click(15.0, 30.0)", BOX, True),
        ("Click(30.0, 40.0)", "Click(15.0, 30.0)", BOX, True),
        ("Click(30.1, 40.0)", "Click(15.0, 30.0)", BOX, False),
        ("click 15.0 30.0", "Click(15.0, 30.0)", BOX, True),
        ("Click", "Click(15.0, 30.0)", BOX, False),
        ("Long press(15.0, 30.0)", "Click(15.0, 30.0)", BOX, False),
        ("Long press(15.0, 30.0)", "Long press(16.0, 30.0)", BOX, True),
        ("Click(15.0, 30.0)", "Click(15.0, 30.0)", None, True),
        ("Click(15.0, 30.1)", "Click(15.0, 30.0)", None, False),
        ("Open app Clock", "Open app clock", None, True),
        ("Open app Chess", "Open app Clock", BOX, False),
        ("Click(15.0, 30.0)", "Open app Clock", BOX, True),
        ("Click(50.0, 30.0)", "Open app Clock", BOX, False),
        ("Click(15.0, 30.0)", "Open app Clock", None, False),
        ("Open app Clock", "Click(15.0, 30.0)", BOX, False),
        ("Type hello World", "Type Hello world", None, True),
        ("Type hello", "Type hello world", None, False),
        ("Scroll up", "scroll up", None, True),
        ("Scroll down", "Scroll up", None, False),
        ("Navigate back", "Navigate back", None, True),
        ("Navigate home", "Navigate back", None, False),
        ("Wait", "Wait", None, True),
        ("Plan: open it. Action: Wait", "Wait", None, True),
        ("Plan: wait", "Wait", None, False),
        ("", "Wait", None, False),
    ],
)
def test_step_accuracy(prediction, target, box, right):
    assert accuracy(prediction, target, box) == float(right)


def test_kinds_are_scored_apart_and_what_is_no_action_is_counted():
    score = METRICS["android_control"].score("Scroll", {"answer": "", "metadata": {"target_action": "Scroll up"}})
    assert score.values == {"accuracy": 0.0, "kind_correct": 1.0, "accuracy_scroll": 0.0}
    assert score.parsed
    assert METRICS["android_control"].output("accuracy_long_press").upper == 1.0
    assert not METRICS["android_control"].score("dance", {"answer": "Wait"}).parsed


def test_a_target_that_is_no_action_is_refused():
    with pytest.raises(EvaluationError, match="dance"):
        accuracy("Wait", "dance")
