"""Clocks: the time that was read from a picture of a clock or watch, hand by hand."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.answers import answers_of, most_frequent
from molmo_model.eval.metrics.metric import Metric, Output, References, Score

CLOSE = 3
"""Minutes and seconds that PixMo-Clocks forgives."""

_TIME = re.compile(r"(?<![\d:])(\d{1,2}):(\d{1,2})(?::(\d{1,2}))?(?![\d:])")
_HALF = re.compile(r"(?<![a-z])([ap])\.?\s?m\b")


@dataclass(frozen=True)
class Time:
    """A time of day, -1 for what is not known."""

    hour: int
    minute: int
    second: int = -1
    half: str | None = None
    """`a` or `p`, where AM or PM was said."""


def read_time(text: str) -> Time | None:
    """The first `h:mm` or `h:mm:ss` of a text, with AM or PM from wherever it stands."""
    found = _TIME.search(text)
    if found is None:
        return None
    half = _HALF.search(text.lower())
    return Time(int(found[1]), int(found[2]), int(found[3] or -1), half[1] if half else None)


def clocks(prediction: str, references: References) -> Score:
    """PixMo-Clocks: hour, minute and second exactly, and minutes and seconds off by at most 3."""
    wanted, said = _reference_time(references), read_time(prediction)
    if wanted.hour < 0:
        return _declined(prediction, ("overall_exact", "overall_close"))
    if said is None:
        return Score(_nothing(wanted, ("overall_exact", "overall_close")), parsed=False)
    hour = _hour_of_day(said) in _hours(wanted, references)
    hour |= wanted.hour == 0 and said.hour == 12 and said.half is None
    values = {"hour_correct": hour, **_hand("minute", said.minute, wanted.minute)}
    if wanted.second >= 0:
        values |= _hand("second", said.second, wanted.second)
    values["overall_exact"] = hour and values["minute_correct"] and values.get("second_correct", True)
    values["overall_close"] = hour and values["minute_close"] and values.get("second_close", True)
    return Score({name: float(value) for name, value in values.items()}, read=_written(said))


def clock_bench(prediction: str, references: References) -> Score:
    """ClockBench: the dial of twelve hours, minutes off by at most one around the dial."""
    wanted, said = _reference_time(references), read_time(prediction)
    numbers = ("overall_exact", "overall_close", "within_one_minute")
    if wanted.hour < 0:
        return _declined(prediction, numbers)
    if said is None:
        return Score(_nothing(wanted, numbers), parsed=False)
    apart = abs((wanted.hour % 12 * 60 + wanted.minute % 60) - (said.hour % 12 * 60 + said.minute % 60))
    minutes = abs(wanted.minute % 60 - said.minute % 60)
    hour, minute = said.hour % 12 == wanted.hour % 12, minutes == 0
    close = minutes in (0, 1, 59)
    values = {
        "hour_correct": hour,
        "minute_correct": minute,
        "minute_close": close,
        "overall_exact": hour and minute,
        "overall_close": (hour and close) or apart == 719,
        "within_one_minute": min(apart, 720 - apart) <= 1,
    }
    return Score({name: float(value) for name, value in values.items()}, read=_written(said))


def _hand(name: str, said: int, wanted: int) -> dict[str, bool]:
    return {f"{name}_correct": said == wanted, f"{name}_close": said >= 0 and abs(said - wanted) <= CLOSE}


def _hour_of_day(time: Time) -> int:
    return time.hour if time.half is None else time.hour % 12 + 12 * (time.half == "p")


def _hours(wanted: Time, references: References) -> set[int]:
    """The hour of the metadata, and that hour as the reference answer writes it: `4:05 PM` of a dial that shows 4."""
    written = read_time(references.get("answer") or "")
    if written is None or (written.hour - wanted.hour) % 12:
        return {wanted.hour}
    return {wanted.hour, _hour_of_day(written)}


def _declined(prediction: str, overall: Sequence[str]) -> Score:
    """Of a clock that cannot be read: right is an answer without a time."""
    right = float(":" not in prediction)
    return Score({"declines": right, **dict.fromkeys(overall, right)})


def _nothing(wanted: Time, overall: Sequence[str]) -> dict[str, float]:
    hands = ["hour_correct", "minute_correct", "minute_close"]
    if wanted.second >= 0:
        hands += ["second_correct", "second_close"]
    return dict.fromkeys([*hands, *overall], 0.0)


def _written(time: Time) -> str:
    second = "" if time.second < 0 else f":{time.second:02d}"
    half = {"a": " AM", "p": " PM", None: ""}[time.half]
    return f"{time.hour}:{time.minute:02d}{second}{half}"


def _reference_time(references: References) -> Time:
    metadata = references.get("metadata", {})
    if "hour" in metadata and "minute" in metadata:
        return Time(metadata["hour"], metadata["minute"], metadata.get("second", -1))
    time = read_time(answers_of(references)[0])
    if time is None:
        raise EvaluationError(
            f"references have neither `metadata.hour` and `metadata.minute` nor a time in the answer "
            f"{references.get('answer')!r}; choose another metric"
        )
    return Time(_hour_of_day(time), time.minute, time.second)


_OUTPUTS = {
    "overall_exact": Output("1 if every hand is read exactly; for a clock that cannot be read, if no time is said"),
    "overall_close": Output("1 if the hour is right and the other hands are close"),
    "hour_correct": Output("1 if the hour is right"),
    "minute_correct": Output("1 if the minute is right"),
    "minute_close": Output(f"1 if the minute is off by at most {CLOSE}"),
    "second_correct": Output("1 if the second is right; over the clocks that show seconds"),
    "second_close": Output(f"1 if the second is off by at most {CLOSE}; over the clocks that show seconds"),
    "declines": Output("1 if no time is said; over the clocks that cannot be read"),
}
_UNPARSED = "No `h:mm`: 0, where the clock can be read."

METRICS: dict[str, Metric] = {
    "clocks": Metric(
        clocks,
        "overall_exact",
        most_frequent,
        "the most frequent training answer",
        "PixMo-Clocks as in allenai/molmo `ClockEval`: PM adds 12 to the hour, minutes and seconds may be off by 3"
        " and do not wrap around. Different here: 12 PM is hour 12 (24 there), the hour as the reference answer writes"
        " it is right too, and a time is found wherever it stands, where that code splits at colons and misses"
        " `4:05.`. Its all_correct and all_close are the overall numbers without clocks that cannot be read.",
        outputs=_OUTPUTS,
        unparsed=_UNPARSED,
    ),
    "clock_bench": Metric(
        clock_bench,
        "overall_close",
        most_frequent,
        "the most frequent training answer",
        "ClockBench (It's About Time, Yang et al. 2022, arXiv:2111.09162) as in allenai/molmo `ClockEval` for tests:"
        " twelve hours, minutes may be off by one around the dial. Its overall_close wants the right hour, except"
        " between 11:59 and 12:00; within_one_minute is the same at every hour, and ours. A time is found wherever it"
        " stands.",
        outputs={
            "overall_close": Output("1 if the hour is right and the minute off by at most one, or from 11:59 to 12:00"),
            "overall_exact": _OUTPUTS["overall_exact"],
            "within_one_minute": Output("1 if the time is off by at most one minute, around the dial"),
            "hour_correct": _OUTPUTS["hour_correct"],
            "minute_correct": _OUTPUTS["minute_correct"],
            "minute_close": Output("1 if the minute is off by at most one, around the dial"),
            "declines": _OUTPUTS["declines"],
        },
        unparsed=_UNPARSED,
    ),
}
