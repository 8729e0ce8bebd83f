"""Metrics: pure functions from a prediction and its references to scores, each with its definition and source.

`METRICS` is the table, put together from those of the modules here; to add a metric, write a function and an entry in
the module it belongs to. An answer that cannot be parsed scores what the definition says and is counted; nothing is
guessed. No torch: a task is scored in a fraction of a second. `docs/metrics.md` is written from the table.
"""

from molmo_model.eval.metrics import counting, grids, pointing, text
from molmo_model.eval.metrics.metric import Metric, Output, References, Score

__all__ = ["METRICS", "Metric", "Output", "References", "Score"]

METRICS: dict[str, Metric] = {
    **text.METRICS,
    **grids.METRICS,
    **counting.METRICS,
    **pointing.METRICS,
}
