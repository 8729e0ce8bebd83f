"""Short text answers: equal, nearly equal, as several people answered."""

from molmo_model.eval.metrics import vqa
from molmo_model.eval.metrics.answers import MOST_FREQUENT, answers_of, most_frequent, short_answer
from molmo_model.eval.metrics.metric import Metric, Output, References, Score


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


METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        exact_match,
        "exact_match",
        most_frequent,
        MOST_FREQUENT,
        "Lower case and outer spaces aside, equal text.",
        outputs={"exact_match": Output("1 if the short answer equals an accepted one, case and outer spaces aside")},
    ),
    "relaxed_accuracy": Metric(
        relaxed_accuracy,
        "relaxed_accuracy",
        most_frequent,
        MOST_FREQUENT,
        "ChartQA (Masry et al. 2022, arXiv:2203.10244, section 5.1), with the parsing of google-research/pix2struct.",
        outputs={
            "relaxed_accuracy": Output("1 if within 5% of a numeric target, or equal to a textual one"),
            "exact_match": Output("1 if equal to a target, case aside"),
        },
    ),
    "vqa_accuracy": Metric(
        vqa_accuracy,
        "vqa_official",
        most_frequent,
        MOST_FREQUENT,
        "VQA (Antol et al. 2015, arXiv:1505.00468; GT-Vision-Lab/VQA); vqa_molmo is allenai/molmo's variant.",
        outputs={
            "vqa_official": Output("mean over annotators of min(1, matches among the other annotators / 3)"),
            "vqa_molmo": Output("min(1, matches among all annotators / 3)"),
        },
    ),
    "anls": Metric(
        anls,
        "anls",
        most_frequent,
        MOST_FREQUENT,
        "Biten et al. 2019, arXiv:1907.00490, equation 1, threshold 0.5.",
        outputs={"anls": Output("1 - edit distance / length to the nearest accepted answer, 0 from half the letters")},
    ),
}
