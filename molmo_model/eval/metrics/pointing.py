"""Pointing: precision, recall and F1 of points inside their targets' regions; the matching is in `matching`."""

from collections.abc import Sequence

from molmo_model.eval.metrics import matching
from molmo_model.eval.metrics.metric import Metric, Output, References, Score
from molmo_model.preprocessing.points import NO_POINTS, parse_exact, points_to_text


def point_f1(prediction: str, references: References) -> Score:
    """Precision, recall and F1 of points inside their targets' regions; see `matching`."""
    predicted = parse_exact(prediction)
    if predicted is None:
        return Score({"f1": 0.0, "precision": 0.0, "recall": 0.0, "valid": 0.0}, parsed=False)
    precision, recall, f1 = matching.score(predicted, references)
    return Score({"f1": f1, "precision": precision, "recall": recall, "valid": 1.0})


def _best_constant_point(references: Sequence[References]) -> str:
    """Of no point and 25 places, that with the best mean F1 over at most 200 training references."""
    places = [NO_POINTS, *(points_to_text([(x, y)], "it") for x in range(10, 91, 20) for y in range(10, 91, 20))]
    sample = references[:: max(1, len(references) // 200)]
    return max(places, key=lambda place: sum(point_f1(place, item).values["f1"] for item in sample))


METRICS: dict[str, Metric] = {
    "pointing": Metric(
        point_f1,
        "f1",
        _best_constant_point,
        "the best of 25 fixed points and of none, by training F1",
        "Molmo (Deitke et al. 2024, arXiv:2409.17146): Hungarian matching in pixels, hit inside the target's region.",
        outputs={
            "f1": Output("harmonic mean of precision and recall of the picture"),
            "precision": Output("matched points inside their target's region / points said"),
            "recall": Output("matched points inside their target's region / targets"),
            "valid": Output("1 if the answer is exactly one tag of points, or says that there are none"),
        },
    ),
}
