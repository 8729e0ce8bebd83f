"""Metrics: pure functions from a prediction and its references to scores in [0, 1], each with its source.

`METRICS` is the table; to add one, write a function and an entry. References are those of `eval.tasks`: `answer`,
`points`, `label`, `width`, `height` and the example's own `metadata`. An answer that cannot be parsed scores 0 and is
counted; nothing is guessed. No torch and no numpy: a task is scored in a fraction of a second.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo_model.errors import EvaluationError
from molmo_model.eval import pointing, vqa
from molmo_model.preprocessing.points import NO_POINTS, parse_exact, points_to_text
from molmo_model.preprocessing.structured import parse_count

References = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """One example's scores by name, each in [0, 1]."""

    values: dict[str, float]
    parsed: bool = True
    """False: the answer was not of the form that the metric asks for."""


@dataclass(frozen=True)
class Metric:
    """One way to score a task."""

    score: Callable[[str, References], Score]
    primary: str
    """The score that leaderboards show."""
    constant: Callable[[Sequence[References]], str]
    """From training references, the one answer that a model without eyes would always give."""
    constant_rule: str
    """How `constant` chooses, for people."""
    citation: str
    """Where the definition comes from, and what is different here."""


# --- what was said


def short_answer(prediction: str) -> str:
    """The answer inside a prediction, as Molmo's VQA evaluation takes it (allenai/molmo, `VqaEval`).

    What follows the first `Answer:`; else, of several lines, the most frequent (the first of those that tie); white
    space is collapsed in lines.
    """
    prediction = prediction.strip()
    if "Answer:" in prediction:
        return prediction.split("Answer:")[1].strip()
    lines = Counter(" ".join(line.split()) for line in prediction.split("\n"))
    return max(lines, key=lambda line: lines[line])


def answers_of(references: References) -> list[str]:
    """The accepted answers: all annotators' where the metadata list them, else the one in the conversation.

    Raises:
        EvaluationError: there is none.
    """
    answers = references.get("metadata", {}).get("answers") or [references.get("answer")]
    if not all(isinstance(answer, str) for answer in answers):
        raise EvaluationError(f"references {dict(references)!r} have no text answer; choose another metric")
    return list(answers)


# --- text


def exact_match(prediction: str, references: References) -> Score:
    """1 iff the short answer equals an accepted answer, case and outer white space aside."""
    answer = short_answer(prediction).lower()
    return Score({"exact_match": float(any(answer == accepted.strip().lower() for accepted in answers_of(references)))})


def relaxed_accuracy(prediction: str, references: References) -> Score:
    """Within 5% of a numeric target, equal to a textual one.

    As published, `5%` is 0.05, commas are not removed, and a target of 0 is compared as text ("0" is not "0.0").
    """
    answer, accepted = short_answer(prediction), answers_of(references)
    right = any(relaxed_equal(answer, target) for target in accepted)
    exact = any(answer.lower() == target.lower() for target in accepted)
    wants_number = all(_number(target) is not None for target in accepted)
    parsed = not wants_number or _number(answer) is not None
    return Score({"relaxed_accuracy": float(right), "exact_match": float(exact)}, parsed)


def relaxed_equal(prediction: str, target: str, tolerance: float = 0.05) -> bool:
    """Relaxed correctness of ChartQA for one target."""
    wanted, said = _number(target), _number(prediction)
    if said is not None and wanted:
        return abs(said - wanted) / abs(wanted) <= tolerance
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def vqa_accuracy(prediction: str, references: References) -> Score:
    """VQA accuracy, official (leave one annotator out) and Molmo's variant, side by side."""
    answer, accepted = short_answer(prediction), answers_of(references)
    return Score({"vqa_official": vqa.official(answer, accepted), "vqa_molmo": vqa.molmo(answer, accepted)})


def anls(prediction: str, references: References) -> Score:
    """Average normalised Levenshtein similarity: the best over accepted answers, 0 from half the letters wrong."""
    answer = short_answer(prediction)
    return Score({"anls": max(anls_of(answer, target) for target in answers_of(references))})


def anls_of(prediction: str, target: str, threshold: float = 0.5) -> float:
    """ANLS for one target; case does not count, spaces do. Distance/length at or above `threshold` gives 0.

    Two empty texts, undefined in the published code, give 1.
    """
    longest = max(len(prediction), len(target))
    if not longest:
        return 1.0
    distance = edit_distance(prediction.lower(), target.lower()) / longest
    return 1.0 - distance if distance < threshold else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]


def _most_frequent(references: Sequence[References]) -> str:
    counts = Counter(answer for item in references for answer in answers_of(item))
    return min(counts, key=lambda answer: (-counts[answer], answer))


# --- grids of digits


def caption_digits(prediction: str, references: References) -> Score:
    """Cell by cell through a caption such as `3 . 5 / . 7 1`: digits right, all cells right, the whole caption right.

    `digits` is the fraction of the cells that hold a digit where the caption has that digit at that place. An answer
    whose rows and columns are not those of the reference counts as unparsed; the cells it does have are still compared.
    """
    target, said = _reference_grid(references), _grid(prediction)
    shape = [len(row) for row in target]
    right = [
        (wanted, row < len(said) and column < len(said[row]) and said[row][column] == wanted)
        for row, cells in enumerate(target)
        for column, wanted in enumerate(cells)
    ]
    digits = [hit for wanted, hit in right if wanted.isdigit()]
    values = {
        "digits": sum(digits) / len(digits) if digits else float(said == target),
        "cells": sum(hit for _, hit in right) / len(right),
        "exact": float(said == target),
    }
    return Score(values, parsed=[len(row) for row in said] == shape)


def _grid(text: str) -> list[list[str]]:
    return [row.split() for row in text.strip().split("/")]


def _reference_grid(references: References) -> list[list[str]]:
    cells = references.get("metadata", {}).get("cells")
    if cells:
        return [["." if value is None else str(value) for value in row] for row in cells]
    return _grid(answers_of(references)[0])


def _most_frequent_grid(references: Sequence[References]) -> str:
    grids = [_reference_grid(item) for item in references]
    shape = Counter(tuple(len(row) for row in grid) for grid in grids).most_common(1)[0][0]
    same = [grid for grid in grids if tuple(len(row) for row in grid) == shape]

    def commonest(row: int, column: int) -> str:
        counts = Counter(grid[row][column] for grid in same if grid[row][column].isdigit())
        return min(counts, key=lambda digit: (-counts[digit], digit)) if counts else "."

    return " / ".join(" ".join(commonest(row, column) for column in range(size)) for row, size in enumerate(shape))


# --- counting


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


# --- pointing


def point_f1(prediction: str, references: References) -> Score:
    """Precision, recall and F1 of points inside their targets' regions; see `eval.pointing`."""
    predicted = parse_exact(prediction)
    if predicted is None:
        return Score({"f1": 0.0, "precision": 0.0, "recall": 0.0, "valid": 0.0}, parsed=False)
    precision, recall, f1 = pointing.score(predicted, references)
    return Score({"f1": f1, "precision": precision, "recall": recall, "valid": 1.0})


def _best_constant_point(references: Sequence[References]) -> str:
    """Of no point and 25 places, that with the best mean F1 over at most 200 training references."""
    places = [NO_POINTS, *(points_to_text([(x, y)], "it") for x in range(10, 91, 20) for y in range(10, 91, 20))]
    sample = references[:: max(1, len(references) // 200)]
    return max(places, key=lambda place: sum(point_f1(place, item).values["f1"] for item in sample))


_FREQUENT = "the most frequent training answer"

METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        exact_match, "exact_match", _most_frequent, _FREQUENT, "Lower case and outer spaces aside, equal text."
    ),
    "relaxed_accuracy": Metric(
        relaxed_accuracy,
        "relaxed_accuracy",
        _most_frequent,
        _FREQUENT,
        "ChartQA (Masry et al. 2022, arXiv:2203.10244, section 5.1), with the parsing of google-research/pix2struct.",
    ),
    "vqa_accuracy": Metric(
        vqa_accuracy,
        "vqa_official",
        _most_frequent,
        _FREQUENT,
        "VQA (Antol et al. 2015, arXiv:1505.00468; GT-Vision-Lab/VQA); vqa_molmo is allenai/molmo's variant.",
    ),
    "anls": Metric(
        anls, "anls", _most_frequent, _FREQUENT, "Biten et al. 2019, arXiv:1907.00490, equation 1, threshold 0.5."
    ),
    "caption_digits": Metric(
        caption_digits,
        "digits",
        _most_frequent_grid,
        "the most frequent digit of each cell in training",
        "This project: fraction of the digits of a grid that a caption reads at their place.",
    ),
    "count": Metric(
        count,
        "correct",
        _most_frequent_count,
        "the most frequent training count",
        "CountBench and PixMo-Count as in allenai/molmo CountEval; its `none` pattern, which never matched, does here.",
    ),
    "pointing": Metric(
        point_f1,
        "f1",
        _best_constant_point,
        "the best of 25 fixed points and of none, by training F1",
        "Molmo (Deitke et al. 2024, arXiv:2409.17146): Hungarian matching in pixels, hit inside the target's region.",
    ),
}
