"""Whether a task's metrics fit its dataset, told from the first references: before hours of answers.

No engine and no stage of answers imports this, so that an edited metric touches no answer; `pipelines.tasks check` and
the score stage do.
"""

from dataclasses import replace
from typing import Any

from molmo_model.config import TaskConfig, TaskKind, lookup
from molmo_model.data.shard_reader import ShardReader
from molmo_model.errors import ConfigError, EvaluationError
from molmo_model.eval import tasks
from molmo_model.eval.metrics import METRICS, Metric
from molmo_model.eval.slices import check_field

LOOKED_AT = 50
"""Questions whose references are tried."""


def check_task(task: TaskConfig, name: str, reader: ShardReader) -> int:
    """Tries the task's metrics on its first references; returns how many questions it looked at.

    Raises:
        ConfigError: an unknown metric, or one that scores another kind of task.
        EvaluationError: the dataset has no such conversations, or a metric cannot read a reference.
    """
    table = {one: lookup(METRICS, one, f"metric of tasks.{name}") for one in (task.metric, *task.also)}
    if twice := [one for one in table if [task.metric, *task.also].count(one) > 1]:
        raise ConfigError(f"tasks.{name}: {', '.join(twice)} stands twice in metric and also; name each once")
    for one, metric in table.items():
        check_kind(task, name, one, metric)
    most = min(LOOKED_AT, task.max_examples or LOOKED_AT)
    items = tasks.items(replace(task, max_examples=most), name, reader)
    references = [tasks.references(item) for item in items]
    for one, metric in table.items():
        for item, reference in zip(items, references, strict=True):
            try_reference(metric, one, name, item.id, reference)
    if task.kind is TaskKind.loss and any(one["answer"] is None for one in references):
        raise EvaluationError(f"tasks.{name}: the answers of this set are not public; there is nothing to measure")
    check_slices(task, name, references)
    return len(items)


def check_kind(task: TaskConfig, name: str, metric_name: str, metric: Metric) -> None:
    """Refuses a metric of answers for a task that measures, and the other way round."""
    if metric.measured and task.kind is not TaskKind.loss:
        raise ConfigError(f"tasks.{name}: metric {metric_name!r} scores what was measured; set `kind: loss`")
    if task.kind is TaskKind.loss and not metric.measured:
        known = ", ".join(sorted(one for one, other in METRICS.items() if other.measured))
        raise ConfigError(f"tasks.{name}: a task of kind loss has no answers for metric {metric_name!r}; use {known}")


def try_reference(metric: Metric, metric_name: str, task: str, item: str, reference: dict[str, Any]) -> None:
    """Scores a nonsense answer, which must be possible.

    Raises:
        EvaluationError: the references have not what the metric reads.
    """
    if metric.measured or metric.score_all is not None or reference["answer"] is None:
        return  # measured tokens, whole corpora and judges have no references of one item to try
    try:
        metric.score("", reference)
    except (EvaluationError, LookupError, TypeError, ValueError, AttributeError) as error:
        found = ", ".join(sorted(reference.get("metadata", {}))) or "nothing"
        raise EvaluationError(
            f"tasks.{task}: metric {metric_name!r} does not fit the references of item {item}: {error} (its metadata "
            f"have {found}); choose another metric, other styles, or add what is missing to the data"
        ) from error


def check_slices(task: TaskConfig, name: str, references: list[dict[str, Any]]) -> None:
    """Refuses slices by a field that none of the items has, or by which every task is sliced anyway."""
    fields = {field for one in references for part in ("metadata", "example_metadata") for field in one.get(part) or {}}
    for field in task.slices:
        check_field(field, name)
        if field not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise EvaluationError(f"tasks.{name}.slices: none of the first items has {field!r}; they have {known}")
