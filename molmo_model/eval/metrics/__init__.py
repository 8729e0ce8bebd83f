"""Metrics: pure functions from a prediction and its references to scores, each with its definition and source.

`METRICS` is the table, put together from those of the modules here; to add a metric, write a function and an entry in
the module it belongs to. An answer that cannot be parsed scores what the definition says and is counted; nothing is
guessed. No torch: a task is scored in a fraction of a second. `docs/metrics.md` is written from the table.
"""

from molmo_model.eval.metrics import (
    android_control,
    boxes,
    captions,
    charts,
    choices,
    clocks,
    counting,
    dense_captions,
    grids,
    judged_answers,
    letters,
    loss,
    mathvista,
    mmmu,
    pointing,
    temp_compass,
    text,
)
from molmo_model.eval.metrics.metric import Metric, Output, References, Score

__all__ = ["METRICS", "Metric", "Output", "References", "Score"]

METRICS: dict[str, Metric] = {
    **text.METRICS,
    **charts.METRICS,
    **choices.METRICS,
    **letters.METRICS,
    **mathvista.METRICS,
    **mmmu.METRICS,
    **temp_compass.METRICS,
    **grids.METRICS,
    **counting.METRICS,
    **pointing.METRICS,
    **boxes.METRICS,
    **clocks.METRICS,
    **android_control.METRICS,
    **captions.METRICS,
    **dense_captions.METRICS,
    **judged_answers.METRICS,
    **loss.METRICS,
}
