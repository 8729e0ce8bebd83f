"""TempCompass: questions about the course of films, whose answers are matched by rules.

Follows the matching rules of llyx97/TempCompass (Liu et al. 2024, arXiv:2403.00476; `eval_multi-choice.py`,
`eval_yes_no.py`, `eval_caption_matching.py`), which ask ChatGPT about what they do not match; here that is unparsed and
scores 0, as in allenai/molmo2 without its judge. Its fourth task, captioning, needs a judge for every answer.
"""

import re
from collections.abc import Callable

from molmo_model.config import lookup
from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.answers import answers_of, most_frequent
from molmo_model.eval.metrics.metric import Metric, Output, References, Score

_LETTER = re.compile(r"([A-D])(?:\Z|[.)])")
_NAME = re.compile(r"Sentence |Option |Caption ")


def multi_choice(prediction: str, question: str, answer: str) -> bool | None:
    """The whole choice, its letter, or its letter with a mark and whatever follows; None where it is none of it."""
    if prediction == answer:
        return True
    letter = _LETTER.match(prediction)
    return None if letter is None else letter[1] == answer[:1]


def yes_no(prediction: str, question: str, answer: str) -> bool | None:
    """What the answer begins with, case aside, be it a word's beginning (`not`)."""
    said = prediction.lower()
    begun = next((word for word in ("yes", "no") if said.startswith(word)), None)
    return None if begun is None else begun == answer


def caption_matching(prediction: str, question: str, answer: str) -> bool | None:
    """A line of the question such as `Caption A: a man runs`, its sentence, its name, or its letter."""
    lines = question.split("\n")[1:]
    parts = [line.split(": ") for line in lines if ": " in line]
    heads = [head for head, *_ in parts]
    sentence, name = prediction.split(") ")[1] if ") " in prediction else prediction, prediction.replace(".", "")
    spelt = (
        *((line, (prediction,)) for line in lines),
        *((text, (prediction, sentence)) for _, text, *_ in parts),
        *((head, (prediction, name)) for head in (*heads, *(_NAME.sub("", head) for head in heads))),
    )
    said = [text for text, ways in spelt if text in ways]
    head, *rest = answer.split(": ")
    return said[-1] in (answer, head, *rest[:1], *head.split()[1:2]) if said else None


_RULES: dict[str, Callable[[str, str, str], bool | None]] = {
    "multi-choice": multi_choice,
    "yes_no": yes_no,
    "caption_matching": caption_matching,
}


def temp_compass(prediction: str, references: References) -> Score:
    """Right or wrong by the rules of the question's task.

    Raises:
        EvaluationError: the metadata do not say the task and the question, or the task has no rules.
    """
    metadata = references.get("metadata", {})
    task, question = metadata.get("task"), metadata.get("question")
    if not isinstance(task, str) or not isinstance(question, str):
        raise EvaluationError(f"the metadata have the task {task!r} and the question {question!r}; both must be text")
    rule = lookup(_RULES, task, "task of TempCompass with rules")
    right = rule(prediction.strip(), question, answers_of(references)[0])
    score = float(bool(right))
    return Score({"temp_compass": score, task.replace("-", "_"): score}, right is not None)


METRICS: dict[str, Metric] = {
    "temp_compass": Metric(
        temp_compass,
        "temp_compass",
        most_frequent,
        "the most frequent right answer of training",
        "TempCompass (Liu et al. 2024, arXiv:2403.00476; llyx97/TempCompass): its rules alone. What they do not match "
        "is given to ChatGPT there, and scores 0 here, as in allenai/molmo2 with `disable_api`; that code reads "
        "caption_matching by the rules of multi-choice, here its own are used.",
        unparsed="No rule of its task matches it: 0.",
        outputs={
            "temp_compass": Output("1 if the answer matches the right one by the rules of its task"),
            "multi_choice": Output("the same over questions with choices"),
            "yes_no": Output("the same over questions for yes or no"),
            "caption_matching": Output("the same over questions for the caption that fits"),
        },
    ),
}
