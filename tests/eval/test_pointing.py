"""Pointing against brute force and scipy's assignment."""

import itertools
import math

import numpy as np
import pytest
from pycocotools import mask as coco
from scipy.optimize import linear_sum_assignment

from molmo_model.data.datasets.pixmo_points import _runs
from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import METRICS, masks, matching
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


# --- masks


def mask_of(plane):
    """COCO's uncompressed runs, as `data.datasets.pixmo_points` writes them."""
    return {"size": list(plane.shape), "counts": _runs(plane.T.reshape(-1))}


def test_a_pixel_is_in_a_mask_where_pycocotools_decodes_a_one():
    rng = np.random.default_rng(0)
    for trial in range(20):
        height, width = (int(size) for size in rng.integers(1, 30, 2))
        plane = rng.random((height, width)) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        packed = coco.encode(np.asfortranarray(plane.astype(np.uint8)))
        text = {"size": [height, width], "counts": packed["counts"].decode()}
        assert list(masks.runs(text["counts"])) == mask_of(plane)["counts"]
        decoded = coco.decode(packed).astype(bool)
        for mask in (mask_of(plane), text):
            inside = [[masks.contains(mask, x, y) for x in range(-1, width + 1)] for y in range(-1, height + 1)]
            assert np.array_equal(np.array(inside)[1:-1, 1:-1], decoded), trial
            assert not np.array(inside)[[0, -1]].any()
            assert not np.array(inside)[:, [0, -1]].any()


def test_runs_that_do_not_fill_the_picture_are_refused():
    with pytest.raises(EvaluationError, match="add up to 5, not to 6"):
        masks.contains({"size": [2, 3], "counts": [1, 4]}, 0, 0)


def published(predicted, targets, planes):
    """allenai/molmo2 `PointingEval`: scipy's matching of pixels, points rounded into the decoded masks."""
    height, width = planes[0].shape
    points = np.array(predicted) / 100 * [width, height]
    goals = np.array(targets) * [width, height] / 100
    rows, columns = linear_sum_assignment(np.linalg.norm(points[:, None] - goals[None], axis=-1))
    hits = 0
    for i, j in zip(rows, columns, strict=True):
        x, y = (round(float(value)) for value in points[i])
        hits += bool(0 <= x < width and 0 <= y < height and planes[j][y, x])
    return hits / len(points), hits / len(goals)


def test_masks_score_as_molmo2s_evaluator_does():
    rng = np.random.default_rng(2)
    for _ in range(60):
        height, width = (int(size) for size in rng.integers(20, 200, 2))
        grid_y, grid_x = np.mgrid[:height, :width]
        targets = rng.uniform(5, 95, (int(rng.integers(1, 6)), 2)).round(1)
        centres = targets / 100 * [width, height]
        planes = [(grid_x - x) ** 2 + (grid_y - y) ** 2 <= rng.integers(4, 400) for x, y in centres]
        predicted = [tuple(point) for point in rng.uniform(0, 100, (int(rng.integers(1, 6)), 2)).round(1)]
        predicted += [tuple(point) for point in targets[: int(rng.integers(0, 3))]]
        metadata = {"masks": [mask_of(plane) for plane in planes], "radius": 0.0}
        references = {"points": targets.tolist(), "width": width, "height": height, "metadata": metadata}
        values = scores(points_to_text(predicted, "a"), references).values
        precision, recall = published(predicted, targets, planes)
        assert (values["precision"], values["recall"]) == pytest.approx((precision, recall))
        both = 2 * precision * recall / (precision + recall) if precision else 0.0
        assert values["f1"] == pytest.approx(both)


def test_masks_without_a_point_each_are_refused():
    references = {**REFERENCES, "metadata": {"masks": [{"size": [1, 1], "counts": [0, 1]}]}}
    with pytest.raises(EvaluationError, match=r"metadata\.masks has 1 for 2 points"):
        scores(points_to_text([(10.0, 10.0)], "a"), references)


def test_where_there_is_nothing_any_answer_without_points_is_right_but_counted():
    nothing = {**REFERENCES, "points": []}
    score = scores("I see no cat.", nothing)
    assert (score.values["f1"], score.values["valid"], score.parsed) == (1.0, 0.0, False)
    for text in ('see <point x="1.0" y="1.0" alt="a">a</point>', '<point x="101.0" y="1.0" alt="a">a</point>'):
        assert scores(text, nothing).values["f1"] == 0.0


def test_a_reference_in_words_is_not_nothing_to_point_at():
    words = {**REFERENCES, "points": None, "answer": "42"}
    with pytest.raises(EvaluationError, match="'42' is no points"):
        scores("42", words)
    tagged = {**words, "answer": points_to_text([(10.0, 10.0)], "cat")}
    assert scores(points_to_text([(10.0, 11.0)], "cat"), tagged).values["f1"] == 1.0
    assert scores("no cat", tagged).values["f1"] == 0.0
    assert scores("no cat", {**words, "answer": NO_POINTS}).values["f1"] == 1.0


def test_points_in_region_wants_every_point_inside():
    score = METRICS["points_in_region"].score
    plane = np.zeros((10, 20), dtype=bool)
    plane[2:5, 4:8] = True
    references = {"points": [], "width": 20, "height": 10, "metadata": {"masks": [mask_of(plane)]}}
    inside, edge, outside = (20.0, 20.0), (39.9, 49.9), (40.0, 20.0)  # pixels (4, 2), (7.98, 4.99), (8, 2)
    all_in = score("here: " + points_to_text([inside, edge], "a"), references)
    assert all_in.values == {"all_inside": 1.0, "first_inside": 1.0, "share_inside": 1.0}
    mixed = score(points_to_text([inside, outside], "a"), references)
    assert mixed.values == {"all_inside": 0.0, "first_inside": 1.0, "share_inside": 0.5}
    assert score('<point x="120.0" y="20.0" alt="a">a</point>', references).values["all_inside"] == 0.0
    nothing = score("none", references)
    assert not nothing.parsed
    assert set(nothing.values.values()) == {0.0}
    boxed = {**references, "metadata": {"boxes": [[0.0, 0.0, 5.0, 5.0], [50.0, 50.0, 60.0, 60.0]]}}
    assert score(points_to_text([(55.0, 60.0)], "a"), boxed).values["first_inside"] == 1.0
    with pytest.raises(EvaluationError, match="neither masks, boxes nor points"):
        score(points_to_text([inside], "a"), {**references, "metadata": {}})


@pytest.mark.parametrize("name", ["pointing", "points_in_region"])
def test_a_reference_in_words_is_refused_not_taken_for_nothing_to_point_at(name):
    with pytest.raises(EvaluationError, match="choose another metric"):
        METRICS[name].score("Green.", {"answer": "Green.", "points": None, "width": 10, "height": 10})
