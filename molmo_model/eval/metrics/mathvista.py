"""MathVista: the answer taken out of what was said, brought into the form of the reference, and compared.

Follows the official evaluation (Lu et al. 2023, arXiv:2310.02255; lupantech/MathVista, `extract_answer.py` and
`calculate_score.py`) but for one step: what is not at once a number or a choice is given to GPT-4 there, which extracts
the answer. Here `mathvista` looks for the answer by rules, offline, and `mathvista_judged` asks the judge in the place
of GPT-4. An answer that names no choice is given the nearest one there; here it is unparsed, and the published way
stands beside it as `nearest`.
"""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.answers import answers_of, edit_distance, most_frequent
from molmo_model.eval.metrics.choices import Choices, read_choice
from molmo_model.eval.metrics.metric import Judge, Metric, Output, References, Score

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_CONCLUSION = re.compile(
    r"\b(?:answer|result|total|value)\b(?: is| are|:| =)+|=|≈|\bthus\b|\btherefore\b|\bso\b", re.IGNORECASE
)
"""What comes before the number that an explanation ends with."""
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?![\d])")
_LIST = re.compile(r"\[[^\[\]]*\]")
_ROUND = re.compile(r"\(([a-zA-Z])\)")
_NO_JUDGE = " (read by rules: the judge gave no answer)"


def mathvista(prediction: str, references: References) -> Score:
    """The answer, read by rules alone."""
    response = prediction.strip()
    extraction = at_once(response, references)
    return _scored(by_rules(response, references) if extraction is None else extraction, response, references)


def _scored(extraction: str, response: str, references: References, note: str = "") -> Score:
    metadata, answer = references.get("metadata", {}), _answer(references)
    said = published = normal(extraction, metadata)
    if said is None and response and metadata.get("options"):
        published = nearest(extraction or response, metadata["options"])
    values = {"mathvista": float(said == answer), "nearest": float(published == answer)}
    return Score(values, said is not None, read=None if said is None else said + note)


def _answer(references: References) -> str:
    """The right answer, a choice by its text.

    Raises:
        EvaluationError: the metadata do not say of what kind it is, so that nothing could be read as it.
    """
    metadata = references.get("metadata", {})
    if "options" in metadata and "answer" in metadata:
        return str(metadata["answer"])
    if "options" in metadata or metadata.get("answer_type") is None:
        raise EvaluationError(
            "this metric reads `options` with the text of the right one as `answer`, or an `answer_type` (integer, "
            "float with `precision`, list), in the metadata; choose another metric"
        )
    return answers_of(references)[0]


def at_once(response: str, references: References) -> str | None:
    """The response where it is the answer as it stands, else None: nothing, the text of a choice, a number."""
    metadata = references.get("metadata", {})
    if not response or response in metadata.get("options", ()):
        return response
    kind = metadata.get("answer_type")
    try:
        return str(int(response)) if kind == "integer" else str(float(response)) if kind == "float" else None
    except ValueError:
        return None


def by_rules(response: str, references: References) -> str:
    """The answer within an explanation: what `The answer is "..."` quotes, the choice that is named, or the number
    after the last conclusion, else the only number; empty where there is none."""
    metadata = references.get("metadata", {})
    if quoted := _QUOTED.search(response):
        return quoted[1]
    if options := metadata.get("options"):
        place = read_choice(response, Choices(tuple(options), 0, lettered=True))
        return "" if place is None else str(options[place])
    if metadata.get("answer_type") == "list":
        lists = _LIST.findall(response)
        return lists[-1] if lists else ""
    return _number(response) or ""


def _number(response: str) -> str | None:
    tail = _CONCLUSION.split(response)[-1]
    for text in (tail, response):
        numbers = [found[0].replace(",", "") for found in _NUMBER.finditer(text) if found[0]]
        if len(set(numbers)) == 1:
            return numbers[0]
    return None


def normal(extraction: str, metadata: Mapping[str, Any]) -> str | None:
    """An extraction in the form of the reference: a choice's text, a whole number, a number of `precision` decimals, a
    list as it stands; None where it is none of it."""
    if options := metadata.get("options"):
        return _choice(extraction.strip(), options)
    kind = metadata.get("answer_type")
    try:
        if kind == "integer":
            return str(int(float(extraction)))
        if kind == "float":
            return str(round(float(extraction), int(metadata["precision"])))
    except (ValueError, OverflowError):
        return None
    except (KeyError, TypeError) as error:
        raise EvaluationError(
            f"the metadata of a number have the precision {metadata.get('precision')!r}; it must be the decimals that "
            "count; choose another metric"
        ) from error
    return extraction or None


def _choice(said: str, options: Sequence[str]) -> str | None:
    """The choice with the first letter in brackets, or with the letter that was said, or what was said."""
    if rounded := _ROUND.search(said):
        said = rounded[1].upper()
    if len(said) == 1 and said in LETTERS[: len(options)]:
        return options[LETTERS.index(said)]
    return said if said in options else None


def nearest(extraction: str, options: Sequence[str]) -> str:
    """The first choice at the least edit distance of what was said, or of the first letter in brackets."""
    said = extraction.strip()
    said = rounded[1].upper() if (rounded := _ROUND.search(said)) else said
    return min(options, key=lambda option: edit_distance(said, option))


# --- asking a judge

_ASK = """Below are a question and what somebody answered to it. Reply with the final answer alone: {form}. Do not \
solve the question and add no word of your own; if the answer says no result, reply with nothing but NONE.

Question:
{question}

What was answered:
{response}

Final answer:"""
_FORMS = {"integer": "a whole number", "float": "a decimal number", "list": "a Python list", "text": "the text"}


def judged(items: Sequence[tuple[str, References]], judge: Judge) -> list[Score]:
    """As `mathvista`, but the judge takes the answer out of what is not one as it stands; where the judge has none, the
    rules do, and `read` says so."""
    taken = [at_once(prediction.strip(), references) for prediction, references in items]
    asked = [i for i, extraction in enumerate(taken) if extraction is None]
    answers = dict(zip(asked, judge.ask([_prompt(*items[i]) for i in asked]), strict=True))
    scores = []
    for i, (prediction, references) in enumerate(items):
        extraction, note = taken[i], ""
        if extraction is None and (extraction := answers[i]) is None:
            extraction, note = by_rules(prediction.strip(), references), _NO_JUDGE
        extraction = "" if extraction.strip() == "NONE" else extraction.strip()
        scores.append(_scored(extraction, prediction.strip(), references, note))
    return scores


def _prompt(prediction: str, references: References) -> str:
    metadata = references.get("metadata", {})
    options = metadata.get("options")
    form = "the letter of the choice" if options else _FORMS.get(str(metadata.get("answer_type")), "the text")
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options or (), strict=False))
    question = metadata.get("query") or listed
    return _ASK.format(form=form, question=question, response=prediction.strip())


_OUTPUTS = {
    "mathvista": Output("1 if the answer, in the form of the reference, equals it"),
    "nearest": Output("the same where an answer that names no choice is given the nearest one, as published"),
}
_SOURCE = (
    "MathVista testmini (Lu et al. 2023, arXiv:2310.02255; lupantech/MathVista): its short cuts, its normalisation by "
    "type and precision, equality. An answer that names no choice scores 0; `nearest` gives it one, as published."
)

METRICS: dict[str, Metric] = {
    "mathvista": Metric(
        mathvista,
        "mathvista",
        most_frequent,
        "the most frequent right letter, or answer, of training",
        f"{_SOURCE} Where the published code asks GPT-4 to extract the answer, rules look for it here.",
        unparsed="No number or choice is found in it: 0.",
        outputs=_OUTPUTS,
    ),
    "mathvista_judged": Metric(
        mathvista,
        "mathvista",
        most_frequent,
        "the most frequent right letter, or answer, of training",
        f"{_SOURCE} Where the published code asks GPT-4 to extract the answer, the judge is asked, in other words; "
        "without its answer rules look for it.",
        unparsed="No number or choice is found in it: 0.",
        outputs=_OUTPUTS,
        score_all=judged,
        judged=True,
    ),
}
