"""Pointing against brute force and scipy's assignment."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from molmo_model.eval.metrics import METRICS, matching
from molmo_model.preprocessing.points import NO_POINTS, count_to_text, points_to_text


@pytest.mark.parametrize("ties", [False, True])
def test_assignment_has_the_least_sum(ties):
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows, columns = rng.integers(1, 6, 2)
        costs = rng.integers(0, 3, (rows, columns)).astype(float) if ties else rng.random((rows, columns))
        pairs = matching.assignment(costs.tolist())
        assert (
            len({row for row, _ in pairs}) == len({column for _, column in pairs}) == min(rows, columns) == len(pairs)
        )
        total = sum(costs[row, column] for row, column in pairs)
        long, short = (costs, columns) if rows >= columns else (costs.T, rows)
        brute = min(
            sum(long[row, column] for column, row in enumerate(chosen))
            for chosen in itertools.permutations(range(max(rows, columns)), int(short))
        )
        assert total == pytest.approx(brute) == pytest.approx(costs[linear_sum_assignment(costs)].sum())


def test_assignment_of_a_large_matrix_equals_scipys():
    costs = np.random.default_rng(1).random((60, 80))
    rows, columns = linear_sum_assignment(costs)
    assert matching.assignment(costs.tolist()) == list(zip(rows.tolist(), columns.tolist(), strict=True))


def test_assignment_of_nothing():
    assert matching.assignment([]) == matching.assignment([[], []]) == []


REFERENCES = {"points": [[10.0, 10.0], [50.0, 50.0]], "width": 200, "height": 100, "metadata": {"radius": 5.0}}


def scores(prediction, references=REFERENCES):
    return METRICS["pointing"].score(prediction, references)


def test_identity_scores_one_in_both_formats_of_the_answer():
    points = [tuple(point) for point in REFERENCES["points"]]
    for text in (points_to_text(points, "cats & <dogs>"), count_to_text(points, "cats")):
        assert scores(text).values == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "valid": 1.0}


def test_precision_recall_and_f1_of_one_hit_among_three_predictions_and_two_targets():
    text = points_to_text([(10.0, 11.0), (90.0, 90.0), (95.0, 5.0)], "cat")
    values = scores(text).values
    assert values["precision"] == pytest.approx(1 / 3)
    assert values["recall"] == pytest.approx(1 / 2)
    assert values["f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))


def test_two_predictions_on_one_target_count_once():
    values = scores(points_to_text([(10.0, 10.0), (10.1, 10.1)], "cat")).values
    assert (values["precision"], values["recall"]) == (0.5, 0.5)


def test_distances_are_pixels_not_percent():
    # 4 percent of the width are 8 pixels; the radius is 5 percent of the longer side, 10 pixels
    references = {"points": [[50.0, 50.0]], "width": 200, "height": 100, "metadata": {"radius": 5.0}}
    assert scores(points_to_text([(54.0, 50.0)], "a"), references).values["f1"] == 1.0
    assert scores(points_to_text([(50.0, 59.0)], "a"), references).values["f1"] == 1.0  # 9 pixels
    assert scores(points_to_text([(50.0, 61.0)], "a"), references).values["f1"] == 0.0  # 11 pixels


def test_the_assignment_is_made_in_pixels():
    # a picture 10 times as wide as high: what is near in percent is far in pixels, and the pairing must know
    targets = [[50.0, 10.0], [54.0, 90.0]]
    references = {"points": targets, "width": 1000, "height": 100, "metadata": {"radius": 9.0}}
    predicted = [(50.0, 90.0), (54.0, 10.0)]
    goals = [(x * 10, y) for x, y in targets]
    best = min(
        itertools.permutations(range(2)),
        key=lambda order: sum(
            math.dist((predicted[i][0] * 10, predicted[i][1]), goals[j]) for i, j in enumerate(order)
        ),
    )
    hits = sum(math.dist((predicted[i][0] * 10, predicted[i][1]), goals[j]) <= 90 for i, j in enumerate(best))
    assert scores(points_to_text(predicted, "a"), references).values["recall"] == hits / 2


def test_boxes_are_the_regions_where_they_are_given():
    metadata = {"boxes": [[0.0, 0.0, 20.0, 40.0], [45.0, 45.0, 55.0, 55.0]], "radius": 1.0}
    references = {**REFERENCES, "metadata": metadata}
    assert scores(points_to_text([(19.0, 39.0), (54.0, 46.0)], "a"), references).values["f1"] == 1.0
    assert scores(points_to_text([(21.0, 39.0), (54.0, 46.0)], "a"), references).values["recall"] == 0.5


def test_without_targets_only_no_points_are_right():
    nothing = {**REFERENCES, "points": []}
    assert scores(NO_POINTS, nothing).values["f1"] == 1.0
    assert scores(points_to_text([(1.0, 1.0)], "a"), nothing).values["f1"] == 0.0
    assert scores(NO_POINTS).values == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "valid": 1.0}


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I see it",
        '<point x="10.0" y="10.0" alt="a">a',
        'here: <point x="10.0" y="10.0" alt="a">a</point>',
        '<point x="10.0" y="10.0" alt="a">a</point><point x="10.0" y="10.0" alt="a">a</point>',
        '<points x1="10.0" y1="10.0" x2="110.0" y2="50.0" alt="a">a</points>',
        '<point x="-10.0" y="10.0" alt="a">a</point>',
    ],
)
def test_malformed_answers_score_zero_and_are_counted(answer):
    score = scores(answer)
    assert not score.parsed
    assert set(score.values.values()) == {0.0}
