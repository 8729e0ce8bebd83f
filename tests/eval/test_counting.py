"""Counting against the published rules, Molmo's and Molmo2's, and what each got wrong."""

import random
import re
from statistics import fmean

import pytest

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import METRICS
from molmo_model.preprocessing.points import count_to_text, points_to_text

THREE = [(10.0, 10.0), (20.0, 20.0), (30.0, 30.0)]


def correct(metric, prediction, answer="3"):
    return METRICS[metric].score(prediction, {"answer": answer}).values["correct"]


@pytest.mark.parametrize("metric", ["count", "point_count"])
@pytest.mark.parametrize(
    "prediction",
    [
        "3",
        "three",
        "There are three.",
        points_to_text(THREE, "cats"),
        count_to_text(THREE, "cats"),
        count_to_text(THREE, "cats", first=True),
        '<points coords="1 1 100 100 2 200 200 3 300 300">cats</points>',
    ],
)
def test_numbers_and_points_both_count(metric, prediction):
    assert correct(metric, prediction) == 1.0


def test_where_points_and_number_disagree_each_metric_keeps_its_rule():
    text = count_to_text(THREE, "cats").replace("total of 3", "total of 4")
    assert (correct("count", text, "4"), correct("count", text, "3")) == (1.0, 0.0)
    assert (correct("point_count", text, "4"), correct("point_count", text, "3")) == (0.0, 1.0)


@pytest.mark.parametrize("metric", ["count", "point_count"])
def test_none_is_zero_and_words_inside_words_are_not_numbers(metric):
    assert correct(metric, "There are none.", "0") == 1.0
    assert correct(metric, "There are none of them here", "0") == 1.0
    for text in ("nonesuch here", "someone", "", "many"):
        score = METRICS[metric].score(text, {"answer": "0"})
        assert not score.parsed
        assert set(score.values.values()) == {0.0}


def published(prediction):
    """The order of allenai/molmo's `PointCountEval`, with the pattern as it was meant."""
    words = {"three": 3, "ten": 10}
    text = prediction.lower().rstrip(".").strip()
    last = text.split()[-1] if text.split() else ""
    if last.isdigit():
        return int(last)
    if last in words:
        return words[last]
    if total := re.match(r".*a total of ([0-9]+).*", text):
        return int(total[1])
    return 0 if re.match(r".*\bnone\b.*", text) else None


def test_count_reads_texts_without_points_as_the_published_order_does():
    rng = random.Random(0)
    words = ["there", "is", "three", "7", "none", "a total of 4", "cats", "ten", "12", "nonesuch", "."]
    for _ in range(300):
        text = " ".join(rng.choices(words, k=rng.randint(0, 5)))
        said = published(text)
        if text.endswith((" .", "none")):
            continue  # the published code cuts the full stop but not the space before it; `none` is no last word there
        values = METRICS["count"].score(text, {"answer": str(said or 0)}).values
        assert values["correct"] == float(said is not None), text


def test_every_count_has_its_number_and_their_macro_average_is_declared():
    metric = METRICS["count"]
    items = [("1", "1"), ("1", "1"), ("1", "1"), ("5", "4"), ("9", "9"), ("2", "9")]
    scores = [metric.score(said, {"answer": answer}).values for said, answer in items]
    names = {name for values in scores for name in values if name.startswith("correct_")}
    assert names == {"correct_1", "correct_4", "correct_9"}
    means = [fmean(values[name] for values in scores if name in values) for name in sorted(names)]
    assert means == [1.0, 0.0, 0.5]
    assert metric.macro == {"per_category_average": "correct_*"}
    assert metric.output("correct_9").upper == metric.output("per_category_average").upper == 1.0
    assert scores[3]["within_one"] == 1.0


def test_references_as_points_are_counted_and_texts_refused():
    assert METRICS["count"].score("2", {"answer": "", "points": [[1, 1], [2, 2]]}).values["correct_2"] == 1.0
    assert METRICS["count"].score("There are none.", {"answer": "", "points": []}).values["correct_0"] == 1.0
    with pytest.raises(EvaluationError, match="not a count"):
        METRICS["point_count"].score("3", {"answer": "a dog"})


def test_thousands_of_digits_are_no_count():
    score = METRICS["count"].score("9" * 5000, {"answer": "7"})
    assert (score.values["correct"], score.parsed) == (0.0, False)
