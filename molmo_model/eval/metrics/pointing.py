"""Pointing: points inside their targets' regions, one to one, or all of them inside one region."""

from collections.abc import Callable, Sequence
from statistics import fmean

from molmo_model.eval.metrics import matching
from molmo_model.eval.metrics.metric import Metric, Output, References, Score
from molmo_model.preprocessing.points import NO_POINTS, parse_exact, points_to_text, read_points


def point_f1(prediction: str, references: References) -> Score:
    """Precision, recall and F1 of points inside their targets' regions; see `matching`.

    Where there is nothing to point at, an answer without points is right, whatever its words.

    Raises:
        EvaluationError: the reference answer is no points.
    """
    predicted = parse_exact(prediction)
    valid = float(predicted is not None)
    if predicted is None and not matching.targets_of(references):
        reading = read_points(prediction)
        right = float(not (reading.points or reading.outside or reading.malformed))
        return Score({"f1": right, "precision": right, "recall": right, "valid": valid}, parsed=False)
    precision, recall, f1 = (0.0, 0.0, 0.0) if predicted is None else matching.score(predicted, references)
    return Score({"f1": f1, "precision": precision, "recall": recall, "valid": valid}, parsed=predicted is not None)


def points_in_region(prediction: str, references: References) -> Score:
    """1 if there are points and every one of them lies in one of the targets' regions, and shares of it."""
    matching.require_any_region(references)
    reading = read_points(prediction)
    inside = [matching.in_any_region((point.x, point.y), references) for point in reading.points]
    inside += [False] * reading.outside
    values = {
        "all_inside": float(bool(inside) and all(inside)),
        "first_inside": float(bool(inside) and inside[0] and not reading.outside),
        "share_inside": fmean(inside) if inside else 0.0,
    }
    return Score(values, parsed=bool(inside))


_PLACES = [points_to_text([(x, y)], "it") for x in range(10, 91, 20) for y in range(10, 91, 20)]


def _best_constant_point(references: Sequence[References]) -> str:
    """Of no point and 25 places, that with the best mean F1 over at most 200 training references."""
    return _best([NO_POINTS, *_PLACES], references, "f1", point_f1)


def _best_constant_place(references: Sequence[References]) -> str:
    return _best(_PLACES, references, "all_inside", points_in_region)


def _best(
    places: Sequence[str], references: Sequence[References], number: str, score: Callable[[str, References], Score]
) -> str:
    sample = references[:: max(1, len(references) // 200)]
    return max(places, key=lambda place: sum(score(place, item).values[number] for item in sample))


METRICS: dict[str, Metric] = {
    "pointing": Metric(
        point_f1,
        "f1",
        _best_constant_point,
        "the best of 25 fixed points and of none, by training F1",
        "Molmo (Deitke et al. 2024, arXiv:2409.17146; allenai/molmo `PointingEval`): Hungarian matching, then a pair"
        " is a hit if the point, rounded to a pixel, lies in its target's mask. Different here: both sides of the"
        " matching are pixels. The code of 2024 mixed pixels with percent there, so its published numbers of pictures"
        " with several targets cannot be reproduced; allenai/molmo2 corrected it and reads points inside other text"
        " too. An answer that counts its points, or says that there are none, is of the form too; one with a point"
        " outside of the picture, a bare list of pairs, or quotes in a label is not. Without masks a target's region"
        " is its box, or a circle. Its `_lower` numbers are a slice by a field that the public set does not have.",
        outputs={
            "f1": Output("harmonic mean of precision and recall of the picture"),
            "precision": Output("matched points inside their target's region / points said"),
            "recall": Output("matched points inside their target's region / targets"),
            "valid": Output("1 if the answer is exactly one tag of points, or says that there are none"),
        },
        unparsed="Not exactly one tag of points inside the picture: 0; 1 where there is nothing to point at and the"
        " answer has no points.",
    ),
    "points_in_region": Metric(
        points_in_region,
        "all_inside",
        _best_constant_place,
        "the best of 25 fixed points, by training score",
        "PointBench as in allenai/molmo2 `PointBenchEval` (`all_inside`), ScreenSpot as in its `ScreenSpotEvaluator`"
        " (`first_inside`): pixels are cut off, not rounded, and points may stand in other text. Different here: a"
        " point outside of the picture is a miss, and several regions count as one.",
        outputs={
            "all_inside": Output("1 if the answer has points and all of them lie inside a target's region"),
            "first_inside": Output("1 if the first point lies inside a target's region"),
            "share_inside": Output("share of the points inside a target's region; 0 without points"),
        },
        unparsed="No point at all: 0.",
    ),
}
