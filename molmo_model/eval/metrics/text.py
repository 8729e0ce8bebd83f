"""Short text answers: equal, nearly equal, as several people answered."""

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import vqa
from molmo_model.eval.metrics.answers import (
    MOST_FREQUENT,
    answers_of,
    edit_distance,
    most_frequent,
    short_answer,
)
from molmo_model.eval.metrics.metric import Metric, Output, References, Score

EXACT = Output("1 if the short answer equals an accepted one, case and outer spaces aside")


def exact_match(prediction: str, references: References) -> Score:
    """1 iff the short answer equals an accepted answer, case and outer white space aside."""
    return Score({"exact_match": _exact(short_answer(prediction), answers_of(references))})


def _exact(answer: str, accepted: list[str]) -> float:
    answer = answer.lower()
    return float(any(answer == target.strip().lower() for target in accepted))


def vqa_accuracy(prediction: str, references: References) -> Score:
    """VQA accuracy, official (leave one annotator out) and Molmo's variant, side by side."""
    answer, accepted = short_answer(prediction), _votes(references)
    return Score({"vqa_official": vqa.official(answer, accepted), "vqa_molmo": vqa.molmo(answer, accepted)})


def _votes(references: References) -> list[str]:
    """The answers of several people, of whom three must agree for a full score.

    Raises:
        EvaluationError: there is one answer, with which the right one would score 0, or a third.
    """
    votes = answers_of(references)
    if len(votes) == 1:
        raise EvaluationError(
            f"the only reference answer is {votes[0]!r}; this metric counts how many people agree and needs all of "
            "theirs in `metadata.answers`; use exact_match or anls"
        )
    return votes


def a_okvqa(prediction: str, references: References) -> Score:
    """A third for every annotator who gave this answer, case and outer spaces aside; at most 1."""
    answer = short_answer(prediction).lower()
    matches = sum(answer == accepted.strip().lower() for accepted in _votes(references))
    return Score({"a_okvqa": min(1.0, matches / 3)})


def anls(prediction: str, references: References) -> Score:
    """Average normalised Levenshtein similarity: the best over accepted answers, 0 from half the letters wrong."""
    answer, accepted = short_answer(prediction), answers_of(references)
    return Score({"anls": max(anls_of(answer, target) for target in accepted), "exact_match": _exact(answer, accepted)})


def anls_of(prediction: str, target: str, threshold: float = 0.5) -> float:
    """ANLS for one target; case does not count, spaces do. Distance/length at or above `threshold` gives 0.

    Two empty texts, undefined in the published code, give 1.
    """
    longest = max(len(prediction), len(target))
    prediction, target = prediction.lower(), target.lower()
    if prediction == target:
        return 1.0
    if abs(len(prediction) - len(target)) >= threshold * longest:  # no distance is less than that of the lengths
        return 0.0
    distance = edit_distance(prediction, target) / longest
    return 1.0 - distance if distance < threshold else 0.0


METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        exact_match,
        "exact_match",
        most_frequent,
        MOST_FREQUENT,
        "Equal text in lower case, as for GQA (Hudson and Manning 2019, arXiv:1902.09506) and TallyQA (Acharya et al. "
        "2018, arXiv:1810.12440) in allenai/molmo (`em`).",
        outputs={"exact_match": EXACT},
    ),
    "vqa_accuracy": Metric(
        vqa_accuracy,
        "vqa_official",
        most_frequent,
        MOST_FREQUENT,
        "VQA (Antol et al. 2015, arXiv:1505.00468; GT-Vision-Lab/VQA), normalised only where annotators disagree; "
        "`vqa_molmo` is allenai/molmo's variant (`vqa_score`), which leaves no annotator out and always normalises.",
        outputs={
            "vqa_official": Output("mean over annotators of min(1, matches among the other annotators / 3)"),
            "vqa_molmo": Output("min(1, matches among all annotators / 3)"),
        },
    ),
    "a_okvqa": Metric(
        a_okvqa,
        "a_okvqa",
        most_frequent,
        MOST_FREQUENT,
        "A-OKVQA, direct answers (Schwenk et al. 2022, arXiv:2206.01718; allenai/aokvqa `eval_predictions.py`), in "
        "lower case and without outer spaces as in allenai/molmo (`a_okvqa_score`).",
        outputs={"a_okvqa": Output("min(1, annotators who gave this answer / 3)")},
    ),
    "anls": Metric(
        anls,
        "anls",
        most_frequent,
        MOST_FREQUENT,
        "DocVQA, InfoVQA and ST-VQA (Biten et al. 2019, arXiv:1907.00490, equation 1, threshold 0.5), in lower case as "
        "the task page (rrc.cvc.uab.es) says; half the letters wrong is 0.",
        outputs={
            "anls": Output("1 - edit distance / length to the nearest accepted answer, 0 from half the letters"),
            "exact_match": EXACT,
        },
    ),
}
