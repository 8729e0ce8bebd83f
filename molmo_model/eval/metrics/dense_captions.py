"""Dense captions, judged: how much of what people said about a picture a caption states, and how much of the caption
agrees with what they said.

The judge takes captions apart into statements and goes through lists of them. What people said are the transcripts of
their speech (`metadata.transcripts`), else the reference caption; their statements are `metadata.statements`, or the
judge takes them from what they said. Several descriptions of one picture belong in `metadata.transcripts`.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NoReturn

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.answers import answers_of, most_frequent
from molmo_model.eval.metrics.judged_lists import numbered, statements_of, verdicts
from molmo_model.eval.metrics.metric import Judge, Metric, Output, References, Score

Item = tuple[str, References]

STATED = {"stated": True, "not stated": False}
CONSISTENT = {"consistent": True, "inconsistent": False}
AT_MOST = 10
"""Statements that `recall_at_10` counts."""

_STATEMENTS = """\
Below is a description of a picture. List what it says about the picture as short statements, one fact each, as finely
as you can, leaving out repetitions. Write nothing but a numbered list:

1. first statement
2. second statement

Description:
{caption}"""

_RECALL = """\
People made these statements about a picture:

{statements}

Read the caption below. For each statement, say whether the caption states it. Answer with a numbered list of the words
Stated and Not Stated, one for each statement in its order, and with nothing else.

Caption:
{caption}"""

_CONSISTENCY = """\
People described a picture ({count} of them):

{descriptions}

A captioning model made the statements below about the same picture. For each of them, say whether it is consistent with
what the people said. Answer with a numbered list of the words Consistent and Inconsistent, one for each statement in
its order, and with nothing else.

Statements:
{statements}"""

_REPEATS = """\
Does the following caption get stuck, saying the same things over and over again? Answer with Yes or No, and with
nothing else.

Caption:
{caption}"""


def dense_caption(items: Sequence[Item], judge: Judge) -> list[Score]:
    """Scores captions; a number whose judgement is missing or cannot be read is left out of its item."""
    said = [caption.strip() or "(The caption is empty.)" for caption, _ in items]
    people = [_descriptions(references) for _, references in items]
    taken = judge.ask([_STATEMENTS.format(caption=caption) for caption in said])
    theirs = _statements_of_people(items, people, judge)
    repeats = judge.ask([_REPEATS.format(caption=caption) for caption in said])
    ours = [None if text is None else statements_of(text) for text in taken]
    recall = _asked(
        judge,
        theirs,
        lambda i, statements: _RECALL.format(statements=numbered(statements), caption=said[i]),
        STATED,
    )
    consistency = _asked(
        judge,
        ours,
        lambda i, statements: _CONSISTENCY.format(
            count=len(people[i]), descriptions="\n\n".join(people[i]), statements=numbered(statements)
        ),
        CONSISTENT,
    )
    return [_score(*parts) for parts in zip(recall, consistency, repeats, strict=True)]


def _asked(
    judge: Judge,
    lists: Sequence[list[str] | None],
    prompt: Callable[[int, list[str]], str],
    words: dict[str, bool],
) -> list[list[bool | None] | None]:
    """The judge's verdicts on each item's statements; None without statements or without an answer."""
    places = [i for i, statements in enumerate(lists) if statements]
    answers = judge.ask([prompt(i, lists[i] or []) for i in places])
    found: list[list[bool | None] | None] = [None] * len(lists)
    for i, answer in zip(places, answers, strict=True):
        if answer is not None:
            found[i] = verdicts(answer, len(lists[i] or []), words)
    return found


def _statements_of_people(items: Sequence[Item], people: Sequence[list[str]], judge: Judge) -> list[list[str] | None]:
    """`metadata.statements`, or what the judge takes from the descriptions."""
    known: list[list[str] | None] = [references.get("metadata", {}).get("statements") for _, references in items]
    places = [i for i, statements in enumerate(known) if not statements]
    answers = judge.ask([_STATEMENTS.format(caption="\n\n".join(people[i])) for i in places])
    for i, answer in zip(places, answers, strict=True):
        known[i] = None if answer is None else statements_of(answer)
    return known


def _score(recall: list[bool | None] | None, consistency: list[bool | None] | None, repeats: str | None) -> Score:
    stated = [verdict for verdict in recall or () if verdict is not None]
    agrees = [verdict for verdict in consistency or () if verdict is not None]
    values: dict[str, float] = {}
    if stated:
        values["recall"] = fmean(stated)
        values["recall_at_10"] = min(sum(stated), AT_MOST) / min(len(stated), AT_MOST)
    if agrees:
        values |= {"consistency": fmean(agrees), "statements": float(len(agrees))}
    if stated and agrees:
        both = values["recall"] + values["consistency"]
        values |= {"average": both / 2, "f1": 2 * values["recall"] * values["consistency"] / both if both else 0.0}
    word = (repeats or "").lower().strip(" .*\n")
    if word.startswith(("yes", "no")):
        values["repeats"] = float(word.startswith("yes"))
    unread = any(None in (parts or ()) for parts in (recall, consistency))
    unread |= repeats is not None and "repeats" not in values
    return Score(values, parsed=not unread, read=f"{sum(stated)} of {len(stated)} stated" if stated else None)


def _descriptions(references: References) -> list[str]:
    metadata = references.get("metadata", {})
    return list(metadata.get("transcripts") or answers_of(references))


def _alone(prediction: str, references: References) -> NoReturn:
    raise EvaluationError("dense captions are judged together, with `score_all`")


METRICS: dict[str, Metric] = {
    "dense_caption": Metric(
        _alone,
        "f1",
        most_frequent,
        "none: a judge is not asked about the constant answer",
        "Molmo's dense-caption evaluation (Deitke et al. 2024, arXiv:2409.17146; its script `gpt_dense_caption_eval.py`"
        " with GPT-4o): recall of people's statements, consistency of the caption's with what people said, and"
        " repetition, as means over pictures. Different here: the prompts are our own words, so numbers are comparable"
        " only between models judged by the same judge; verdicts are read by their numbers, not by their order; f1 is"
        " of each picture. `average` is what that script prints.",
        outputs={
            "f1": Output("harmonic mean of the picture's recall and consistency"),
            "recall": Output("share of people's statements that the caption states"),
            "recall_at_10": Output("as recall, but ten statements are enough"),
            "consistency": Output("share of the caption's statements that agree with what people said"),
            "average": Output("mean of the picture's recall and consistency"),
            "repeats": Output("1 if the caption repeats itself over and over", lower_is_better=True),
            "statements": Output("statements that the judge finds in the caption", upper=None, neutral=True),
        },
        score_all=dense_caption,
        judged=True,
        unparsed="A verdict of the judge that cannot be read is left out of its caption; captions with such a verdict"
        " are counted. Missing judgements are counted apart.",
    ),
}
