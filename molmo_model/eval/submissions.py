"""Files for test servers: the answers to a test set whose labels are not public, in the form that its server reads.

The answer in a file is what the set's metric would have compared (`metrics.answers.short_answer`, for choices
`metrics.choices.read_choice`), so a local validation score and the server's are of the same reading. `FORMATS` is the
table; a row of `molmo_model.benchmarks` names its format in `submission`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.answers import short_answer
from molmo_model.eval.metrics.choices import Choices, read_choice

Row = Mapping[str, Any]
Pairs = Sequence[tuple[str, str]]
"""Question ids and answers."""


@dataclass(frozen=True)
class Format:
    """What one server reads."""

    source: str
    """Who defines it."""
    document: Callable[[Pairs], Any]
    """The JSON document of all answers."""
    choice: bool = False
    """True: the text of a choice is wanted."""


@dataclass(frozen=True)
class Submission:
    """A file for a test server."""

    text: str
    """JSON."""
    answers: int
    empty: int
    """Answers without a word, or without a choice that could be read; the server counts them as wrong."""


FORMATS: dict[str, Format] = {
    "vqa": Format(
        "https://visualqa.org/evaluation.html and the EvalAI challenge of TextVQA: a list of question_id and answer",
        lambda pairs: [{"question_id": _number(name), "answer": answer} for name, answer in pairs],
    ),
    "doc_vqa": Format(
        "https://rrc.cvc.uab.es/?ch=17&com=tasks, DocVQA and InfographicVQA: a list of questionId and answer",
        lambda pairs: [{"questionId": _number(name), "answer": answer} for name, answer in pairs],
    ),
    "a_okvqa_da": Format(
        "https://github.com/allenai/aokvqa: an object of direct_answer by question id",
        lambda pairs: {name: {"direct_answer": answer} for name, answer in pairs},
    ),
    "a_okvqa_mc": Format(
        "https://github.com/allenai/aokvqa: an object of multiple_choice, the text of a choice, by question id",
        lambda pairs: {name: {"multiple_choice": answer} for name, answer in pairs},
        choice=True,
    ),
}
QUESTIONS = {
    "vqa_v2_test": 447_793,
    "vqa_v2_testdev": 107_394,
    "text_vqa_test": 5_734,
    "doc_qa_test": 5_188,
    "info_qa_test": 3_288,
    "a_okvqa_da_test": 6_702,
    "a_okvqa_mc_test": 6_702,
}
"""Published numbers of questions; a server refuses, or scores as wrong, what is left out. Of A-OKVQA's direct answers
those that are hard to give without the choices are not asked here, so there may be fewer."""
MAY_BE_FEWER = frozenset({"a_okvqa_da_test"})


def submission(rows: Sequence[Row], form: Format, wanted: int | None, fewer: bool = False) -> Submission:
    """The file of all answers, in the order of their ids.

    Args:
        rows: of `predictions.jsonl`.
        wanted: questions of the set; None is not known.
        fewer: that many at most.

    Raises:
        EvaluationError: ids that are missing, or stand twice; another number of answers than the set has questions.
    """
    pairs = [(_id_of(row), _answer(row, form)) for row in rows]
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise EvaluationError(
            f"{len(twice)} question ids have several answers, such as {twice[0]!r}; the server wants one each"
        )
    if wanted is not None and len(pairs) != wanted and not (fewer and len(pairs) < wanted):
        raise EvaluationError(
            f"{len(pairs)} answers, but the set has {wanted} questions; predict without max_examples and look at the "
            "bad rows of its shards (problems.jsonl), or write the incomplete file with incomplete=true"
        )
    pairs.sort(key=lambda pair: (len(pair[0]), pair[0]))
    text = json.dumps(form.document(pairs), ensure_ascii=False, separators=(",", ":"))
    return Submission(text + "\n", len(pairs), sum(not answer for _, answer in pairs))


def _id_of(row: Row) -> str:
    name = row["references"].get("metadata", {}).get("question_id")
    if isinstance(name, bool) or not isinstance(name, int | str) or name == "":
        raise EvaluationError(f"item {row['id']!r} has the question_id {name!r}; the server needs the published one")
    return str(name)


def _answer(row: Row, form: Format) -> str:
    if not form.choice:
        return short_answer(row["prediction"])
    options = row["references"].get("metadata", {}).get("options")
    if not options:
        raise EvaluationError(f"item {row['id']!r} has no options; this server's format names one of them")
    place = read_choice(row["prediction"], Choices(tuple(options), 0, lettered=True))
    return "" if place is None else str(options[place])


def _number(name: str) -> int:
    if not name.isascii() or not name.isdecimal():
        raise EvaluationError(f"question_id {name!r} is no whole number; the server's ids are")
    return int(name)
