"""Paired comparisons against the bootstrap, scipy and plain counting, and what cannot be compared."""

import json
import math
import random
import statistics
from typing import Any

import numpy as np
import pytest

from molmo_model.errors import EvaluationError
from molmo_model.eval.comparison import Column, average, average_difference, column, compare, holm

stats = pytest.importorskip("scipy.stats")


def made(
    values: list[float | None],
    checkpoint: str = "run/a",
    task: str = "t",
    per_image: int = 1,
    upper: float | None = 1.0,
    lower: bool = False,
    prompt: str = "p",
    weights: list[float] | None = None,
    shuffled: int | None = None,
    pictures: str = "",
) -> Column:
    """A checkpoint's column with one score per item."""
    document = {
        "checkpoint": checkpoint,
        "task": task,
        "metric": "m",
        "primary": "x",
        "outputs": {"x": {"definition": "d", "lower_is_better": lower, "upper": upper}},
    }
    rows: list[dict[str, Any]] = [
        {"id": f"e{i:05d}#0", "prompt": prompt, "image": {"sha256": [f"{pictures}{i // per_image}"]}}
        for i in range(len(values))
    ]
    scores = [
        {
            "id": row["id"],
            "scores": {} if value is None else {"x": value},
            "weight": 1.0 if weights is None else weights[i],
        }
        for i, (row, value) in enumerate(zip(rows, values, strict=True))
    ]
    if shuffled is not None:
        random.Random(shuffled).shuffle(rows)
        random.Random(shuffled + 1).shuffle(scores)
    return column(document, rows, scores)


def drawn(seed: int, images: int, per_image: int, better: float) -> tuple[list[float], list[float]]:
    """Right and wrong answers of two checkpoints to the same questions about images of unlike difficulty."""
    dice = random.Random(seed)
    a, b = [], []
    for _ in range(images):
        rate, shift = dice.betavariate(2, 1), dice.gauss(better, 0.15)
        for _ in range(per_image):
            a.append(float(dice.random() < rate))
            b.append(float(dice.random() < min(1.0, max(0.0, rate + shift))))
    return a, b


def test_single_questions_are_the_paired_t_test():
    dice = random.Random(1)
    a = [dice.random() for _ in range(60)]
    b = [min(1.0, value + dice.gauss(0.05, 0.1)) for value in a]
    b = [max(0.0, value) for value in b]
    found = compare(made(a), made(b, "run/b"), 0.95).paired
    expected = stats.ttest_rel(b, a)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.exact_p_value is None


def test_clustered_errors_equal_the_bootstrap_over_images():
    a, b = drawn(2, 120, 4, 0.05)
    weights = [1.0 + index % 7 for index in range(len(a))]
    found = compare(made(a, per_image=4, weights=weights), made(b, "run/b", per_image=4, weights=weights), 0.95).paired
    dice, differences = np.random.default_rng(3), []
    first, second, weighing = (np.array(one).reshape(120, 4) for one in (a, b, weights))
    for _ in range(2000):
        chosen = dice.integers(0, 120, 120)
        differences.append(((second - first) * weighing)[chosen].sum() / weighing[chosen].sum())
    assert found.stderr == pytest.approx(statistics.stdev(differences), rel=0.07)
    assert found.difference == pytest.approx(((second - first) * weighing).sum() / weighing.sum())


def test_p_values_of_equal_checkpoints_are_uniform_and_ignoring_images_is_not():
    """Questions of one image agree: with clusters 5% of the tests fall below 5%, without them many more."""
    below = {1: 0, 5: 0}
    for seed in range(300):
        dice = random.Random(seed)
        shifts = [dice.choice([-1.0, 0.0, 1.0]) for _ in range(30)]
        a = [0.5] * 150
        b = [0.5 + 0.5 * shifts[index // 5] for index in range(150)]
        for per_image in below:
            found = compare(made(a, per_image=per_image), made(b, "run/b", per_image=per_image), 0.95).paired
            below[per_image] += found.p_value < 0.05
    assert 0.02 <= below[5] / 300 <= 0.08
    assert below[1] / 300 > 0.2


def test_right_or_wrong_has_mcnemars_exact_p_value():
    a, b = drawn(4, 90, 1, 0.1)
    found = compare(made(a), made(b, "run/b"), 0.95).paired
    wins, losses = (sum(y - x == sign for x, y in zip(a, b, strict=True)) for sign in (1, -1))
    assert (found.wins, found.losses, found.ties, found.n) == (wins, losses, 90 - wins - losses, 90)
    assert found.exact_p_value == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)


def test_every_item_the_same_amount_better_is_tested_by_sign():
    found = compare(made([0.0] * 10), made([1.0] * 10, "run/b"), 0.95).paired
    assert (found.difference, found.stderr) == (1.0, 0.0)
    assert found.p_value == pytest.approx(2 * 0.5**10)
    assert compare(made([0.3] * 10), made([0.3] * 10, "run/b"), 0.95).paired.p_value == 1.0
    assert compare(made([0.0] * 9, per_image=9), made([1.0] * 9, "run/b", per_image=9), 0.95).paired.p_value == 1.0


def test_turned_around_the_difference_changes_its_sign_only():
    a, b = drawn(5, 40, 3, 0.1)
    there, back = (
        compare(made(x, n, per_image=3), made(y, m, per_image=3), 0.95)
        for x, n, y, m in ((a, "run/a", b, "run/b"), (b, "run/b", a, "run/a"))
    )
    assert back.paired.difference == -there.paired.difference
    assert back.paired.p_value == pytest.approx(there.paired.p_value)
    assert (back.wins, back.losses) == (there.losses, there.wins)


def test_order_of_rows_is_irrelevant():
    a, b = drawn(6, 30, 2, 0.1)
    plain = compare(made(a, per_image=2), made(b, "run/b", per_image=2), 0.95)
    assert compare(made(a, per_image=2, shuffled=1), made(b, "run/b", per_image=2, shuffled=5), 0.95) == plain


def test_lower_is_better_turns_wins_and_gain():
    found = compare(
        made([3.0, 2.0, 1.0], upper=None, lower=True), made([1.0, 2.0, 1.5], "run/b", upper=None, lower=True), 0.95
    )
    assert (found.paired.wins, found.paired.losses, found.paired.ties) == (1, 1, 1)
    assert (found.wins, found.losses) == (["e00000#0"], ["e00002#0"])
    assert found.paired.difference == pytest.approx(-0.5)
    assert found.gain == pytest.approx(0.5)


def test_examples_are_the_largest_and_spread_over_equal_ones():
    values = [0.0] * 200
    better = [1.0 if index % 2 else 0.0 for index in range(200)]
    better[7] = 0.5
    found = compare(made(values), made(better, "run/b"), 0.95, examples=10)
    assert len(found.wins) == 10
    assert "e00007#0" not in found.wins
    numbers = sorted(int(name[1:6]) for name in found.wins)
    assert numbers[0] < 100 < numbers[-1]  # not the first ten
    assert compare(made(values), made([0.2, 0.9, *values[2:]], "run/b"), 0.95).wins == ["e00001#0", "e00000#0"]


def test_items_without_the_number_are_left_out_on_both_sides():
    found = compare(made([1.0, None, 0.0, 1.0]), made([1.0, 1.0, None, 0.0], "run/b"), 0.95).paired
    assert (found.n, found.losses, found.difference) == (2, 1, -0.5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"values": [1.0, 0.0]}, "3 and 2 items, such as 'e00002#0' only in one"),
        ({"prompt": "q"}, "item 'e00000#0' has prompt 'p' and 'q'"),
        ({"per_image": 2}, "item 'e00001#0' has image"),
        ({"task": "u"}, "differ in task: 't' and 'u'"),
        ({"upper": 2.0}, "differ in upper: 1.0 and 2.0"),
        ({"values": [None, None, 1.0]}, "no item of t has the number 'x' from both"),
    ],
)
def test_what_was_not_asked_the_same_is_refused(other, message):
    a = made([0.0, 1.0, None] if None in other.get("values", ()) else [0.0, 1.0, 1.0])
    with pytest.raises(EvaluationError, match=message):
        compare(a, made(other.pop("values", [0.0, 1.0, 1.0]), "run/b", **other), 0.95)


def test_scores_of_other_items_or_of_no_item_are_refused():
    document = {"checkpoint": "r/a", "task": "t", "metric": "m", "primary": "x", "outputs": {}}
    rows = [{"id": "1", "prompt": "", "image": {"sha256": []}}]
    with pytest.raises(EvaluationError, match="r/a t: scores are of other items"):
        column(document, rows, [{"id": "2", "scores": {"x": 1.0}}])
    with pytest.raises(EvaluationError, match="no item has the number 'x'; they have y"):
        column(document, rows, [{"id": "1", "scores": {"y": 1.0}}])


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_averages_over_tasks_know_which_share_images():
    """Two tasks about the same images in which a checkpoint's answers agree are no more certain than one."""
    a, b = drawn(7, 80, 1, 0.1)
    one = compare(made(a), made(b, "run/b"), 0.95).paired
    shared = [(made(a, task=task), made(b, "run/b", task=task)) for task in ("t", "u")]
    apart = [(made(a, task=task, pictures=task), made(b, "run/b", task=task, pictures=task)) for task in ("t", "u")]
    found, independent = average_difference(shared, 0.95), average_difference(apart, 0.95)
    assert found.difference == pytest.approx(one.difference) == independent.difference
    assert found.stderr == pytest.approx(one.stderr)
    assert found.p_value == pytest.approx(one.p_value)
    assert independent.stderr == pytest.approx(one.stderr / math.sqrt(2), rel=0.02)
    assert (found.wins, found.n) == (2 * one.wins, 160)
    first, second = (average([pair[0] for pair in pairs], 0.95) for pairs in (shared, apart))
    assert first.mean == pytest.approx(sum(a) / 80) == second.mean
    assert second.stderr == pytest.approx(first.stderr / math.sqrt(2), rel=0.02)


def test_averages_weigh_tasks_not_items():
    short, long = made([1.0, 1.0], task="t"), made([0.0] * 20 + [1.0] * 20, task="u")
    assert average([short, long], 0.95).mean == 0.75
    with pytest.raises(EvaluationError, match=r"x of t .* are on different scales"):
        average([short, made([1.0], task="v", upper=None)], 0.95)


def test_a_comparison_is_plain_json():
    from dataclasses import asdict

    json.dumps(asdict(compare(made([0.0, 1.0]), made([1.0, 1.0], "run/b"), 0.95)), allow_nan=False)
