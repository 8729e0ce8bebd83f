"""Errors and intervals against plain formulas, resampling and simulated coverage."""

import dataclasses
import math
import random
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_model.errors import EvaluationError
from molmo_model.eval.distributions import sign_p_value, t_p_value, t_quantile
from molmo_model.eval.metrics import METRICS, Metric, Output, Score
from molmo_model.eval.scoring import Judged, as_json, estimate, interval, mean_of, paired, score_task, wilson


def clustered_stderr(values, clusters):
    return mean_of(values, [1.0] * len(values), list(clusters)).stderr


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


# --- names that not every item has, weights, macro averages, exponentials, unbounded numbers


def metric_of(**changes: Any) -> Metric:
    """A metric that scores what the references say."""

    def score(said: str, references: Any) -> Score:
        return Score(dict(references["values"]), weight=references.get("weight", 1.0))

    outputs = {
        "part_*": Output("a part"),
        "all": Output("all"),
        "loss": Output("l", True, None),
        "ppl": Output("p", True, None),
    }
    return Metric(score, "all", lambda references: "", "none", "", **{"outputs": outputs, **changes})


def item(number: int, values: dict[str, float], weight: float = 1.0, image: int | None = None) -> dict[str, Any]:
    references = {"values": values, "weight": weight}
    return {
        "id": f"e{number}#0",
        "prediction": "",
        "references": references,
        "image": {"sha256": [str(number if image is None else image)]},
    }


def test_names_that_items_lack_are_averaged_over_those_that_have_them():
    rows = [
        item(0, {"part_a": 1.0, "all": 1.0}),
        item(1, {"part_b": 0.0, "all": 0.0}),
        item(2, {"part_b": 1.0, "all": 1.0}),
    ]
    found = score_task(metric_of(), rows, [], 0.95).metrics
    assert (found["part_a"].mean, found["part_a"].n) == (1.0, 1)
    assert (found["part_b"].mean, found["part_b"].n) == (0.5, 2)
    assert found["all"].mean == pytest.approx(2 / 3)


def simulated(seed: int, images: int = 150) -> list[dict[str, Any]]:
    """Items of images of unlike difficulty, categories and lengths, one to five questions each."""
    dice = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for image in range(images):
        rate = dice.betavariate(2, 1)
        for _ in range(dice.randint(1, 5)):
            tokens = float(dice.randint(1, 30))
            category = dice.choice(["part_a", "part_a", "part_b", "part_c"])
            right, loss = float(dice.random() < rate), dice.expovariate(1.0) * (1.5 - rate)
            rows.append(item(len(rows), {category: right, "all": right, "loss": loss}, tokens, image))
    return rows


def test_errors_equal_the_bootstrap_over_images():
    """Weighted means, means over a part of the items, macro averages and exponentials."""
    metric = metric_of(
        macro={"macro": "part_*"},
        functions={"ratio": lambda means: means["all"] / (1.0 + means["loss"])},
        exponentials={"ppl": "loss"},
        outputs={**metric_of().outputs, "macro": Output("m"), "ratio": Output("r")},
    )
    rows = simulated(5)
    found = score_task(metric, rows, [], 0.95).metrics
    by_image: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_image.setdefault(row["image"]["sha256"][0], []).append(row)
    dice, drawn = random.Random(6), []
    for _ in range(1200):
        sample = [row for group in dice.choices(list(by_image.values()), k=len(by_image)) for row in group]
        drawn.append(plain_numbers(sample))
    for name in ("part_a", "part_c", "all", "loss", "macro", "ratio", "ppl"):
        values = sorted(one[name] for one in drawn)
        assert found[name].mean == pytest.approx(plain_numbers(rows)[name])
        assert found[name].stderr == pytest.approx(statistics.stdev(values), rel=0.12), name
        for end, at in ((found[name].low, 30), (found[name].high, -31)):
            assert end == pytest.approx(values[at], abs=0.35 * found[name].stderr), name


def plain_numbers(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Every number by its plain formula."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        weight = row["references"]["weight"]
        for name, value in row["references"]["values"].items():
            one = sums.setdefault(name, [0.0, 0.0])
            one[0], one[1] = one[0] + weight * value, one[1] + weight
    means = {name: total / weight for name, (total, weight) in sums.items()}
    return means | {
        "macro": statistics.fmean(means[f"part_{c}"] for c in "abc"),
        "ratio": means["all"] / (1.0 + means["loss"]),
        "ppl": math.exp(means["loss"]),
    }


def test_clustered_weighted_intervals_cover_the_truth():
    """A token-weighted loss over images of unlike difficulty and length: truth from a large draw."""
    truth = plain_numbers(simulated(99, 20_000))["loss"]
    covered = 0
    for seed in range(300):
        rows = simulated(1000 + seed, 60)
        values = [row["references"]["values"]["loss"] for row in rows]
        weights = [row["references"]["weight"] for row in rows]
        result = estimate(values, [row["image"]["sha256"][0] for row in rows], 0.9, weights, upper=None)
        covered += result.low <= truth <= result.high
    assert covered / 300 == pytest.approx(0.9, abs=0.05)


def test_few_images_widen_the_interval():
    agreeing = [1.0] * 10 + [0.0] * 10 + [1.0] * 20
    clustered, single = (estimate(agreeing, clusters, 0.95) for clusters in ([n // 10 for n in range(40)], range(40)))
    assert clustered.high - clustered.low > 1.5 * (single.high - single.low)
    assert 0.0 <= clustered.low < clustered.high <= 1.0


def test_right_or_wrong_answers_of_one_question_per_image_have_wilsons_interval():
    for right, n in ((3, 10), (81, 263), (0, 20), (20, 20), (999, 1000)):
        result = estimate([1.0] * right + [0.0] * (n - right), range(n), 0.95)
        size = n - 1 if 0 < right < n else n  # the n/(n-1) of the variance
        assert (result.low, result.high) == pytest.approx(wilson(right / n, size, 0.95), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 8)), min_size=2, max_size=40),
    weighted=st.booleans(),
)
def test_order_and_copies_do_not_matter(scores, weighted):
    values, images = zip(*scores, strict=True)
    weights = [1.0 + 3 * (number % 3) if weighted else 1.0 for number in range(len(values))]
    one = mean_of(values, weights, images)
    back = mean_of(values[::-1], weights[::-1], images[::-1])
    double = mean_of(values * 2, weights * 2, images * 2)
    for other in (back, double):
        assert other.value == pytest.approx(one.value)
        assert other.stderr == pytest.approx(one.stderr)
        assert other.images == pytest.approx(one.images)
    assert mean_of([1.0] * len(values), weights, images).value == 1.0
    first, second = (interval(mean, 1.0, 0.95) for mean in (one, back))
    assert (first.low, first.high) == pytest.approx((second.low, second.high))
    assert first.low <= first.mean <= first.high


def test_bounded_by_another_number_than_one_is_wilson_scaled():
    small = estimate([0.2, 0.4, 1.0, 0.0], range(4), 0.95)
    large = estimate([2.0, 4.0, 10.0, 0.0], range(4), 0.95, upper=10.0)
    assert [large.mean, large.stderr, large.low, large.high] == pytest.approx(
        [10 * small.mean, 10 * small.stderr, 10 * small.low, 10 * small.high]
    )


def test_quantiles_and_p_values_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 4, 30, 999, 100_000):
        for confidence in (0.5, 0.9, 0.999):
            assert t_quantile(confidence, freedom) == pytest.approx(
                stats.t.ppf(0.5 + confidence / 2, freedom), rel=1e-7
            )
        for t in (0.01, 1.0, 4.0, 20.0):
            assert t_p_value(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-9)
    for wins, losses in ((0, 0), (3, 0), (5, 2), (40, 70), (5000, 5200), (10, 10)):
        expected = stats.binomtest(wins, wins + losses).pvalue if wins else 1.0
        assert sign_p_value(wins, losses) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "weight", "message"),
    [
        ({"all": math.nan}, 1.0, r"e1#0: all: a score is nan; scores lie in \[0, 1\]"),
        ({"all": 1.01}, 1.0, r"e1#0: all: a score is 1\.01"),
        ({"loss": math.inf}, 1.0, "e1#0: loss: a score is inf; scores are finite"),
        ({"loss": -1.0}, 1.0, "e1#0: loss: a score is -1"),
        ({"all": 1.0}, math.nan, "e1#0: the weight is nan"),
        ({"all": 1.0}, -1.0, "e1#0: the weight is -1"),
        ({"other": 1.0}, 1.0, "'other' is no number of this metric"),
    ],
)
def test_scores_that_are_no_scores_are_refused_by_id(values, weight, message):
    with pytest.raises(EvaluationError, match=message):
        score_task(metric_of(), [item(0, {"all": 1.0}), item(1, values, weight)], [], 0.95)


def test_an_exponential_beyond_all_numbers_is_refused():
    with pytest.raises(EvaluationError, match="ppl is e to the power of 5000"):
        score_task(metric_of(exponentials={"ppl": "loss"}), [item(0, {"loss": 5000.0})], [], 0.95)


def test_weights_of_nothing_are_refused():
    with pytest.raises(EvaluationError, match=r"the weights of 2 scores add up to 0"):
        score_task(metric_of(), [item(0, {"all": 1.0}, 0.0), item(1, {"all": 1.0}, 0.0)], [], 0.95)


# --- further metrics, judges, what the model measured


def test_further_metrics_are_named_apart_and_share_the_constant_answer():
    rows = [row(0, "2", "2"), row(1, "two", "2"), row(2, "3", "2")]
    also = {"count": METRICS["count"], "anls": METRICS["anls"]}
    scored = score_task(METRICS["exact_match"], rows, [], 0.95, also=also)
    assert {"exact_match", "count.correct", "count.within_one", "anls.anls"} <= scored.metrics.keys()
    assert scored.metrics["count.correct"].mean == pytest.approx(2 / 3)
    assert scored.constant == "2"
    assert scored.baseline is not None
    assert scored.baseline["count.correct"].mean == 1.0
    assert scored.scores[1].values["count.correct"] == 1.0
    assert scored.outputs["count.within_one"] == METRICS["count"].output("within_one")
    assert "count.correct" not in scored.own[0].values


def test_a_further_metric_with_other_weights_is_refused():
    light = dataclasses.replace(metric_of(), score=lambda said, references: Score({"all": 1.0}))
    with pytest.raises(
        EvaluationError, match=r"'light' of tasks.<name>.also weighs an item 1.0, the task's metric 4.0"
    ):
        score_task(metric_of(), [item(0, {"all": 1.0}, 4.0)], [], 0.95, also={"light": light})


class Judge:
    """Knows the answer to prompts with an even number."""

    name, asked, missing = "even", 0, 0

    def ask(self, prompts):
        answers = [None if int(prompt) % 2 else "yes" for prompt in prompts]
        self.asked, self.missing = self.asked + len(prompts), self.missing + answers.count(None)
        return answers


def judged_metric() -> Metric:
    def score_all(pairs, judge):
        said = judge.ask([prediction for prediction, _ in pairs])
        return [Score({} if answer is None else {"all": float(answer == "yes")}) for answer in said]

    return dataclasses.replace(metric_of(), score_all=score_all, judged=True)


def test_what_a_judge_leaves_out_is_counted_and_not_averaged():
    rows = [row(number, str(number), "x") for number in range(5)]
    scored = score_task(judged_metric(), rows, [], 0.95, judge=Judge())
    assert (scored.metrics["all"].mean, scored.metrics["all"].n) == (1.0, 3)
    assert scored.judged == Judged(asked=5, missing=2, judge="even")
    assert scored.baseline is None
    nobody = score_task(judged_metric(), rows, [], 0.95)
    assert nobody.metrics == {}
    assert nobody.judged == Judged(asked=5, missing=5, judge="nobody")


def test_a_metric_of_the_whole_corpus_has_its_baseline():
    def score_all(pairs, judge):
        return [Score({"all": float(said == references["answer"]) / len(pairs)}) for said, references in pairs]

    metric = dataclasses.replace(
        METRICS["exact_match"], score_all=score_all, primary="all", outputs={"all": Output("a")}
    )
    scored = score_task(metric, [row(0, "x", "b"), row(1, "b", "b")], [], 0.95)
    assert (scored.metrics["all"].mean, scored.judged) == (0.25, None)
    assert scored.baseline is not None
    assert scored.baseline["all"].mean == 0.5
    with pytest.raises(EvaluationError, match="gave 0 scores for 2 items"):
        score_task(dataclasses.replace(metric, score_all=lambda pairs, judge: []), [row(0, "x", "b")] * 2, [], 0.95)


def test_a_loss_is_weighted_by_tokens_and_needs_to_be_measured():
    rows = [row(0, "", "b"), row(1, "", "a"), row(2, "", "c")]
    with pytest.raises(EvaluationError, match=r"^0: .*kind: loss"):
        score_task(METRICS["loss"], rows, [], 0.95)
    for one, (nll, tokens, right) in zip(rows, ((3.0, 3, 1), (2.0, 1, 0), (20.0, 40, 39)), strict=True):
        one["measured"] = {"nll": nll, "tokens": tokens, "right": right}
    scored = score_task(METRICS["loss"], rows, [], 0.95)
    assert scored.metrics["loss"].mean == pytest.approx(25 / 44)
    assert scored.metrics["token_accuracy"].mean == pytest.approx(40 / 44)
    perplexity, loss = scored.metrics["perplexity"], scored.metrics["loss"]
    assert (perplexity.mean, perplexity.low, perplexity.high) == pytest.approx(
        (math.exp(25 / 44), math.exp(loss.low), math.exp(loss.high))
    )
    assert scored.baseline is None
    assert scored.constant is None
