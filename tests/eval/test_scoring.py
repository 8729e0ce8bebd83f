"""Errors and intervals against plain formulas, resampling and simulated coverage."""

import math
import random
import statistics

import pytest

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import METRICS
from molmo_model.eval.scoring import as_json, clustered_stderr, estimate, paired, score_task, wilson


def test_stderr_of_single_questions_is_the_usual_one():
    rng = random.Random(0)
    values = [rng.random() for _ in range(50)]
    expected = statistics.stdev(values) / math.sqrt(50)
    assert clustered_stderr(values, range(50)) == pytest.approx(expected)


def test_copies_of_a_question_about_one_image_add_no_certainty():
    values = [0.0, 1.0, 1.0, 0.5, 1.0]
    once = clustered_stderr(values, range(5))
    fourfold = clustered_stderr(values * 4, list(range(5)) * 4)
    assert fourfold == pytest.approx(once)
    assert clustered_stderr(values * 4, range(20)) < once / 1.8


def test_clustered_stderr_equals_the_bootstrap_over_images():
    rng = random.Random(1)
    rates = [rng.random() for _ in range(60)]
    values, clusters = [], []
    for cluster, rate in enumerate(rates):
        for _ in range(rng.randint(1, 6)):
            values.append(float(rng.random() < rate))
            clusters.append(cluster)
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == cluster] for cluster in range(60)]
    means = []
    for _ in range(3000):
        drawn = [value for group in rng.choices(groups, k=60) for value in group]
        means.append(sum(drawn) / len(drawn))
    assert clustered_stderr(values, clusters) == pytest.approx(statistics.stdev(means), rel=0.08)


def test_wilson_equals_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263 and 0 of 20, at 95%
    assert wilson(81 / 263, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20, 0.95) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_intervals_stay_in_range_and_are_never_empty():
    for values in ([0.0] * 30, [1.0] * 30, [0.5] * 30, [1.0] * 29 + [0.0], [0.99] * 3, [1.0]):
        result = estimate(values, range(len(values)), 0.95)
        assert 0.0 <= result.low <= result.mean <= result.high <= 1.0
        assert result.high > result.low


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = random.Random(2)
    covered, trials = 0, 600
    truth = 0.85
    for _ in range(trials):
        values, clusters = [], []
        for cluster in range(80):
            # a hard image and an easy one, each with three questions: mean difficulty is `truth`
            rate = 1.0 if rng.random() < 0.5 else 2 * truth - 1.0
            values += [float(rng.random() < rate) for _ in range(3)]
            clusters += [cluster] * 3
        result = estimate(values, clusters, 0.9)
        covered += result.low <= truth <= result.high
    assert covered / trials == pytest.approx(0.9, abs=0.04)


def test_paired_comparison_sees_what_two_intervals_hide():
    rng = random.Random(3)
    a = [float(rng.random() < 0.5) for _ in range(400)]
    b = [1.0 if first == 0.0 and rng.random() < 0.1 else first for first in a]
    result = paired(a, b, range(400), 0.95)
    assert result.difference == pytest.approx(sum(b) / 400 - sum(a) / 400)
    assert (result.wins, result.losses) == (sum(y > x for x, y in zip(a, b, strict=True)), 0)
    assert result.p_value < 0.001
    assert estimate(a, range(400), 0.95).high > estimate(b, range(400), 0.95).low
    back = paired(b, a, range(400), 0.95)
    assert back.difference == -result.difference
    assert back.p_value == result.p_value
    assert paired(a, a, range(400), 0.95).p_value == 1.0


def test_wrong_inputs_are_refused():
    with pytest.raises(EvaluationError, match="no scores"):
        estimate([], [], 0.95)
    with pytest.raises(EvaluationError, match=r"2 scores but 1"):
        estimate([0.0, 1.0], [1], 0.95)
    with pytest.raises(EvaluationError, match=r"1\.5"):
        estimate([1.5], [1], 0.95)
    with pytest.raises(EvaluationError, match="between 0 and 1"):
        estimate([1.0], [1], 95)
    with pytest.raises(EvaluationError, match="2 with 1"):
        paired([0.0, 1.0], [1.0], [1, 2], 0.95)


def row(number, prediction, answer):
    return {
        "id": str(number),
        "prediction": prediction,
        "references": {"answer": answer},
        "image": {"sha256": [str(number // 2)]},
    }


def test_score_task_has_the_majority_beside_it_and_counts_what_it_cannot_parse():
    rows = [row(0, "1", "1"), row(1, "lots", "2"), row(2, "2", "2"), row(3, "3", "2")]
    scored = score_task(METRICS["count"], rows, [{"answer": "2"}, {"answer": "2"}, {"answer": "1"}], 0.95)
    assert scored.metrics["correct"].mean == 0.5
    assert scored.constant == "2"
    assert scored.baseline["correct"].mean == 0.75
    assert scored.unparsed == 1
    assert [score.values["correct"] for score in scored.scores] == [1.0, 0.0, 1.0, 0.0]
    assert as_json(scored.metrics)["correct"].keys() == {"mean", "stderr", "low", "high", "n"}


def test_score_task_without_training_examples_takes_the_majority_of_the_evaluation():
    rows = [row(0, "x", "b"), row(1, "x", "b"), row(2, "x", "a")]
    assert score_task(METRICS["exact_match"], rows, [], 0.95).constant == "b"
