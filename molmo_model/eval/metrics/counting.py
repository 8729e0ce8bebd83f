"""Counting: the number that was said against the number that is there."""

from collections import Counter
from collections.abc import Sequence

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.answers import answers_of
from molmo_model.eval.metrics.metric import Metric, Output, References, Score
from molmo_model.preprocessing.structured import parse_count


def count(prediction: str, references: References) -> Score:
    """The number said: exactly right, within one, and whether a number was said at all."""
    said, wanted = parse_count(prediction), _reference_count(references)
    values = {
        "correct": float(said == wanted),
        "within_one": float(said is not None and abs(said - wanted) <= 1),
        "valid": float(said is not None),
    }
    return Score(values, parsed=said is not None)


def _reference_count(references: References) -> int:
    if references.get("points") is not None:
        return len(references["points"])
    number = parse_count(answers_of(references)[0])
    if number is None:
        raise EvaluationError(f"reference answer {references.get('answer')!r} is not a count; choose another metric")
    return number


def _most_frequent_count(references: Sequence[References]) -> str:
    return str(min(Counter(map(_reference_count, references)).items(), key=lambda item: (-item[1], item[0]))[0])


METRICS: dict[str, Metric] = {
    "count": Metric(
        count,
        "correct",
        _most_frequent_count,
        "the most frequent training count",
        "CountBench and PixMo-Count as in allenai/molmo CountEval; its `none` pattern, which never matched, does here.",
        outputs={
            "correct": Output("1 if the number is exactly right"),
            "within_one": Output("1 if the number is right or off by one"),
            "valid": Output("1 if a number was said"),
        },
    ),
}
