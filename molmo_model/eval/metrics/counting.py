"""Counting: the number that was said, or the points that were set, against the number that is there."""

from collections import Counter
from collections.abc import Callable, Sequence

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.answers import answers_of
from molmo_model.eval.metrics.metric import Metric, Output, References, Score
from molmo_model.preprocessing.points import read_points
from molmo_model.preprocessing.structured import parse_count


def count(prediction: str, references: References) -> Score:
    """The number said; an answer that only points is counted by its points."""
    said = _number(prediction)
    return _scored(said if said is not None else _points(prediction), references)


def point_count(prediction: str, references: References) -> Score:
    """The points set, whatever number stands beside them; an answer without points is read as `count` reads it."""
    points = _points(prediction)
    return _scored(points if points is not None else _number(prediction), references)


def _number(prediction: str) -> int | None:
    try:
        return parse_count(prediction)
    except ValueError:  # thousands of digits, which Python refuses to read: no count
        return None


def _points(prediction: str) -> int | None:
    """How many points an answer sets; None where it sets none."""
    return len(read_points(prediction).points) or None


def _scored(said: int | None, references: References) -> Score:
    wanted = _reference_count(references)
    correct = float(said == wanted)
    values = {
        "correct": correct,
        "within_one": float(said is not None and abs(said - wanted) <= 1),
        "valid": float(said is not None),
        f"correct_{wanted}": correct,
    }
    return Score(values, parsed=said is not None, read=None if said is None else str(said))


def _reference_count(references: References) -> int:
    if references.get("points") is not None:
        return len(references["points"])
    number = parse_count(answers_of(references)[0])
    if number is None:
        raise EvaluationError(f"reference answer {references.get('answer')!r} is not a count; choose another metric")
    return number


def _most_frequent_count(references: Sequence[References]) -> str:
    return str(min(Counter(map(_reference_count, references)).items(), key=lambda item: (-item[1], item[0]))[0])


def _metric(score: Callable[[str, References], Score], citation: str) -> Metric:
    return Metric(
        score,
        "correct",
        _most_frequent_count,
        "the most frequent training count",
        citation,
        outputs={
            "correct": Output("1 if the number is exactly right"),
            "within_one": Output("1 if the number is right or off by one; the field calls it close"),
            "valid": Output("1 if the answer has a number"),
            "per_category_average": Output("every number that occurs counts the same, however many pictures have it"),
            "correct_*": Output("1 if the number is exactly right; over the pictures with that many"),
        },
        macro={"per_category_average": "correct_*"},
        unparsed="Neither a number nor a point: 0 everywhere.",
    )


METRICS: dict[str, Metric] = {
    "count": _metric(
        count,
        "CountBench and PixMo-Count as in allenai/molmo `PointCountEval`: the last word, else `a total of N`, else"
        " `none` for 0. Different here: `none` is found (that code's pattern never matched), numbers are words up to"
        " twenty only as whole words, `There are N` counts, and an answer that only points is counted by its points.",
    ),
    "point_count": _metric(
        point_count,
        "PixMo-Count as in allenai/molmo2 `PointCountEval`: the points are counted. Different here: an answer without"
        " points is read as a number, where that code scores it as 0 objects.",
    ),
}
