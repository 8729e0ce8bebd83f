"""Answers about charts: nearly equal numbers, equal words, in the published variants.

The rule of ChartQA is one function in google-research/pix2struct, allenai/molmo, lmms-eval and VLMEvalKit; what they
take for the answer differs. Molmo's variant for long, scientific answers is corrected where it reads numbers wrongly.
"""

import math
import re
from collections.abc import Mapping

from molmo_model.eval.metrics.answers import MOST_FREQUENT, answers_of, most_frequent, short_answer
from molmo_model.eval.metrics.metric import Metric, Output, References, Score
from molmo_model.eval.metrics.vqa import NUMBER_WORDS

TOLERANCE = 0.05
"""Share of the target by which a number may be off."""


def relaxed_accuracy(prediction: str, references: References) -> Score:
    """Within 5% of a numeric target, equal to a textual one; and its variants.

    As published, `5%` is 0.05, commas are not removed, and a target of 0 is compared as text ("0" is not "0.0").
    """
    answer, accepted = short_answer(prediction), answers_of(references)
    whole, lower = prediction.strip(), answer.lower()
    relaxed = any(relaxed_equal(answer, target) for target in accepted)
    values = {
        "relaxed_accuracy": float(relaxed),
        "relaxed_whole": float(relaxed if whole == answer else any(relaxed_equal(whole, one) for one in accepted)),
        "scifi_relaxed": float(any(scifi_relaxed_equal(prediction, target) for target in accepted)),
        "exact_match": float(any(lower == target.lower() for target in accepted)),
    }
    wants_number = all(_number(target) is not None for target in accepted)
    parsed = not wants_number or _number(answer) is not None
    return Score(values | _by_author(values, references), parsed)


def _by_author(values: Mapping[str, float], references: References) -> dict[str, float]:
    """The same under the name of the part of ChartQA that a question is from; none where the metadata do not say."""
    is_human = references.get("metadata", {}).get("is_human")
    if not isinstance(is_human, bool):
        return {}
    part = "human" if is_human else "augmented"
    return {f"{name}_{part}": value for name, value in values.items()}


def relaxed_equal(prediction: str, target: str, tolerance: float = TOLERANCE) -> bool:
    """Relaxed correctness of ChartQA for one target. Equal texts are always right, which in the published code `nan`
    and `inf` are not."""
    if prediction.lower() == target.lower():
        return True
    wanted, said = _number(target), _number(prediction)
    if said is not None and wanted:
        return abs(said - wanted) / abs(wanted) <= tolerance
    return False


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


_SAID_NUMBER = re.compile(
    r"(?:(?<!\w)[-+])?(?:\d*\.\d+|\d+)(?:e[-+]?\d+)?(?=(\s?(?:k|m|b|thousand|million|billion)\b)?)"
)
"""A number, and what it is counted in."""
_SCALE = {"k": 1e3, "t": 1e3, "m": 1e6, "b": 1e9}
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(word for word in NUMBER_WORDS if word != 'none')})\b")


def scifi_relaxed_equal(prediction: str, target: str, tolerance: float = TOLERANCE) -> bool:
    """Relaxed correctness of a whole sentence: its first number, as it is, as a percentage, or in the thousands,
    millions or billions that it names, is within 5% of a numeric target; or it holds a textual target, or every entry
    of a list."""
    said, wanted = _concluded(prediction).removesuffix("."), _concluded(target)
    if not said:
        return False
    if said == wanted:
        return True
    number = _number(wanted) if not wanted.endswith("%") else None
    if number is not None and math.isfinite(number):
        return _near(said, number, tolerance)
    if "[" in wanted and "," in wanted:
        return all(entry.strip() in said for entry in wanted.replace("[", "").replace("]", "").split(","))
    return wanted in said


def _concluded(text: str) -> str:
    text = text.lower().strip()
    return text.split("answer:")[1].strip() if "answer:" in text else text


def _near(said: str, wanted: float, tolerance: float) -> bool:
    said = _NUMBER_WORD.sub(lambda word: NUMBER_WORDS[word[0]], said.replace(",", ""))
    if not (found := _SAID_NUMBER.search(said)):
        return False
    number, unit = float(found[0]), (found[1] or "").strip()
    scales = (1.0, 0.01, _SCALE[unit[0]]) if unit else (1.0, 0.01)
    return any(abs(number * scale - wanted) <= tolerance * (abs(wanted) or 1.0) for scale in scales)


METRICS: dict[str, Metric] = {
    "relaxed_accuracy": Metric(
        relaxed_accuracy,
        "relaxed_accuracy",
        most_frequent,
        MOST_FREQUENT,
        "ChartQA (Masry et al. 2022, arXiv:2203.10244, section 5.1), parsed as google-research/pix2struct does, of "
        "the short answer as in allenai/molmo. `relaxed_whole` is VLMEvalKit's and lmms-eval's: the same rule, of the "
        "whole answer. `scifi_relaxed` is allenai/molmo's `scifi_relaxed_correctness`, corrected: words for numbers "
        "only as whole words (there `iphone 3` holds a 1), signs and powers of ten are read, and so are k, m, b and "
        "their words.",
        unparsed="No number where every target is one: compared as text all the same.",
        outputs={
            "relaxed_accuracy": Output("1 if within 5% of a numeric target, or equal to a textual one"),
            "relaxed_whole": Output("the same of all that was said, of which nothing is taken as the short answer"),
            "scifi_relaxed": Output(
                "1 if the first number said is within 5% of the target, or a text is in the answer"
            ),
            "exact_match": Output("1 if equal to a target, case aside"),
            "*_human": Output("the same over questions that people wrote"),
            "*_augmented": Output("the same over questions that a model wrote"),
        },
    ),
}
