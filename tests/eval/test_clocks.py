"""Clocks against the published evaluator, wherever that one can read the answer, and at its edges."""

import random

import pytest

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import METRICS


def values(metric, prediction, hour, minute, second=-1):
    metadata = {"hour": hour, "minute": minute, "second": second}
    return METRICS[metric].score(prediction, {"answer": "", "metadata": metadata}).values


def published(text, hour, minute, second, is_test):
    """allenai/molmo `ClockEval` for answers that are nothing but a time: the overall numbers."""
    hour, minute = (0 if is_test and hour == 12 else hour), (0 if is_test and minute == 60 else minute)
    parts, limit = text.split(":"), 1 if is_test else 3
    said = int(parts[0].split()[-1]) + (12 if "PM" in text and not is_test else 0)
    said = said - 12 if is_test and said >= 12 else said
    hour_right = said == hour or (hour == 0 and said == 12)
    minute_said = int(parts[1].split()[0])
    minute_said = 0 if is_test and minute_said == 60 else minute_said
    apart = abs(minute_said - minute)
    minute_close = apart <= limit or (is_test and apart == 59)
    if second != -1:
        seconds = abs(int(parts[2].split()[0]) - second) if len(parts) > 2 else 99
        return hour_right and apart == 0 and seconds == 0, hour_right and minute_close and seconds <= limit
    wraps = is_test and abs(hour * 60 + minute - (said * 60 + minute_said)) == 719
    return hour_right and apart == 0, (minute_close and hour_right) or wraps


@pytest.mark.parametrize("metric", ["clocks", "clock_bench"])
def test_times_score_as_the_published_evaluator_scores_them(metric):
    rng = random.Random(metric)
    dial = metric == "clock_bench"
    for _ in range(4000):
        hour, minute = rng.randrange(13 if dial else 24), rng.choice([0, 1, 2, 29, 58, 59] + [60] * dial)
        second = -1 if dial else rng.choice([-1, 0, 30, 58])
        said = (rng.choice([hour, hour % 12, 12, 11]), rng.choice([minute % 60, 0, 1, 59, 3]))
        half = "" if dial else rng.choice(["", " PM", " AM"])
        if half and not 0 < said[0] < 12:
            continue  # 12 PM is hour 24 there, and there are no 13 AM and 0 PM
        text = f"The time shown is {said[0]}:{said[1]:02d}" + (f":{rng.choice([second, 0]):02d}" if second >= 0 else "")
        text += half
        found = values(metric, text, hour, minute, second)
        expected = published(text, hour, minute, second, dial)
        assert (found["overall_exact"], found["overall_close"]) == tuple(map(float, expected)), (text, hour, minute)


@pytest.mark.parametrize(
    ("text", "hour", "exact"),
    [
        ("12:30 PM", 12, 1.0),
        ("12:30 PM", 0, 0.0),
        ("12:30 AM", 0, 1.0),
        ("12:30", 0, 1.0),
        ("12:30", 12, 1.0),
        ("4:30 p.m.", 16, 1.0),
        ("It is 4:30pm.", 16, 1.0),
        ("4:30 in the program", 4, 1.0),
        ("16:30", 16, 1.0),
        ("4:30", 16, 0.0),
    ],
)
def test_halves_of_the_day(text, hour, exact):
    assert values("clocks", text, hour, 30)["overall_exact"] == exact


@pytest.mark.parametrize(("answer", "hour"), [("4:05 PM", 4), ("4:05", 16), ("4:05 PM", 16), ("12:05 AM", 12)])
def test_the_reference_answer_is_right_however_its_hour_is_written(answer, hour):
    references = {"answer": answer, "metadata": {"hour": hour, "minute": 5, "second": -1}}
    assert METRICS["clocks"].score(answer, references).values["overall_exact"] == 1.0
    assert METRICS["clocks"].score("5:05", references).values["overall_exact"] == 0.0


def test_seconds_count_only_where_the_clock_shows_them():
    assert values("clocks", "4:05:50", 4, 5)["overall_exact"] == 1.0
    with_seconds = values("clocks", "4:05:50", 4, 8, 53)
    assert (with_seconds["overall_exact"], with_seconds["overall_close"]) == (0.0, 1.0)
    assert values("clocks", "4:05", 4, 5, 0)["overall_close"] == 0.0
    assert "second_correct" not in values("clocks", "4:05:50", 4, 5)


def test_one_minute_around_the_dial_is_named_apart():
    over_the_hour = values("clock_bench", "4:00", 3, 59)
    assert (over_the_hour["overall_close"], over_the_hour["within_one_minute"]) == (0.0, 1.0)
    over_twelve = values("clock_bench", "11:59", 0, 0)
    assert (over_twelve["overall_close"], over_twelve["within_one_minute"]) == (1.0, 1.0)
    assert values("clock_bench", "4:02", 4, 0)["within_one_minute"] == 0.0


@pytest.mark.parametrize("metric", ["clocks", "clock_bench"])
def test_a_clock_that_cannot_be_read_wants_no_time(metric):
    assert values(metric, "I cannot tell.", -1, -1) == dict.fromkeys(values(metric, "no", -1, -1), 1.0)
    assert set(values(metric, "4:05", -1, -1).values()) == {0.0}
    missing = METRICS[metric].score("five past four", {"answer": "", "metadata": {"hour": 4, "minute": 5}})
    assert not missing.parsed
    assert set(missing.values.values()) == {0.0}


def test_references_without_a_time_are_refused():
    assert METRICS["clocks"].score("16:05", {"answer": "It is 4:05 PM"}).values["overall_exact"] == 1.0
    with pytest.raises(EvaluationError, match="nor a time"):
        METRICS["clocks"].score("4:05", {"answer": "noon"})
