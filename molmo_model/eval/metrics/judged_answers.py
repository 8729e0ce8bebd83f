"""Open answers, judged: whether a judge takes an answer for right, given the reference answers."""

import re
from collections.abc import Sequence
from typing import NoReturn

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.answers import answers_of, most_frequent
from molmo_model.eval.metrics.metric import Judge, Metric, Output, References, Score

_PROMPT = """\
Is the response right? Compare it with the reference {answers}: it is right if it says the same, in whatever words; what
it adds must not contradict the reference. Answer with Yes or No, and with nothing else.
{question}
Reference: {reference}
Response: {response}"""

_VERDICT = re.compile(r"\W*(yes|no)\b")


def judged_answer(items: Sequence[tuple[str, References]], judge: Judge) -> list[Score]:
    """Scores answers; an empty one is wrong, and nobody is asked about it."""
    places = [i for i, (answer, _) in enumerate(items) if answer.strip()]
    verdicts = judge.ask([_prompt(*items[i]) for i in places])
    scores = [Score({"correct": 0.0}) for _ in items]
    for i, verdict in zip(places, verdicts, strict=True):
        found = _VERDICT.match((verdict or "").lower())
        scores[i] = Score(
            {"correct": float(found[1] == "yes")} if found else {}, parsed=verdict is None or found is not None
        )
    return scores


def _prompt(answer: str, references: References) -> str:
    accepted = answers_of(references)
    question = references.get("question")
    return _PROMPT.format(
        answers="answer" if len(accepted) == 1 else "answers, any of which is right",
        question=f"\nQuestion: {question}" if question else "",
        reference=" | ".join(accepted),
        response=answer.strip(),
    )


def _alone(prediction: str, references: References) -> NoReturn:
    raise EvaluationError("judged answers are scored together, with `score_all`")


METRICS: dict[str, Metric] = {
    "judged_answer": Metric(
        _alone,
        "correct",
        most_frequent,
        "none: a judge is not asked about the constant answer",
        "Open answers as in allenai/molmo2 `llm_judge_score`: a language model sees the reference answers and the"
        " response, and says whether it is right. Different here: it sees the question too where that is known, the"
        " prompt is our own words, and a judgement that is missing or no yes or no leaves the answer out instead of"
        " scoring 0. Numbers are comparable only between models judged by the same judge.",
        outputs={"correct": Output("1 if the judge takes the answer for right; an empty answer is wrong")},
        score_all=judged_answer,
        judged=True,
        unparsed="A judgement that is neither yes nor no: the answer is left out of the mean, and counted. Missing"
        " judgements are counted apart.",
    ),
}
