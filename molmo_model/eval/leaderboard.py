"""The report's first table, tasks by checkpoints, ready to be written down; and the same as flat rows.

It is readable without scripts. Marks say who is best or level with it (`standings`), never who is best by rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo_model.eval import cards
from molmo_model.eval.report_data import Inputs, TaskResult
from molmo_model.eval.standings import Group, Reading

LONGEST_ANSWER = 80
"""Characters of the majority answer in the table."""


@dataclass(frozen=True)
class Cell:
    """One number with its interval, and where its bar begins and ends, in percent of the widest."""

    value: str
    interval: str
    best: bool
    """It is the best of its row, or not significantly worse."""
    against: str
    """How it compares with the majority answer: `above`, `level`, `below`; empty where there is none."""
    left: float
    width: float
    mark: float
    link: str
    """Of the place that says where it comes from; empty for an average."""


@dataclass(frozen=True)
class Row:
    """One task, or the average of a group of them."""

    name: str
    note: str
    is_group: bool
    cells: tuple[Cell, ...]
    baseline: str
    """The majority answer's number; empty where there is none."""
    answer: str
    base: float | None
    """Where the majority answer stands in the bars, in percent."""


def rows(tasks: Sequence[TaskResult], groups: Sequence[Group]) -> list[Row]:
    """Groups' averages first, then the tasks."""
    return [*map(_group_row, groups), *map(_task_row, tasks)]


def _task_row(task: TaskResult) -> Row:
    reading, estimates, baseline = task.reading, task.estimates, task.baseline
    widest = _widest(reading, [item["high"] for item in estimates], baseline)
    last = list(task.results.values())[-1].metrics
    answer = (last.get("baseline") or {}).get("answer")
    names = list(task.results)
    return Row(
        task.name,
        f"{task.primary}{' (less is better)' if reading.lower_is_better else ''} · n = {estimates[-1]['n']}",
        False,
        tuple(
            _cell(reading, item, best and len(names) > 1, baseline, widest, f"lineage/{task.name}/{name}")
            for name, item, best in zip(names, estimates, task.best, strict=True)
        ),
        "" if baseline is None else reading.shown(baseline),
        "" if answer is None else _on_one_line(str(answer)),
        None if baseline is None else _share(baseline, widest),
    )


def _on_one_line(text: str) -> str:
    """A text's beginning; what would hide or turn round what follows is shown as such."""
    line = " ".join(cards.shorten(text, LONGEST_ANSWER).split())
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in line)


def _group_row(group: Group) -> Row:
    several = len(group.averages) > 1
    left_out = f"; without {', '.join(group.left_out)}" if group.left_out else ""
    return Row(
        group.name,
        f"average of {len(group.tasks)} tasks{left_out}",
        True,
        tuple(
            _cell(Reading(), {"mean": one.mean, "low": one.low, "high": one.high}, best and several, None, 1.0, "")
            for one, best in zip(group.averages, group.best, strict=True)
        ),
        "",
        "",
        None,
    )


def _cell(
    reading: Reading, item: Mapping[str, Any], best: bool, baseline: float | None, widest: float, link: str
) -> Cell:
    left, right = _share(item["low"], widest), _share(item["high"], widest)
    return Cell(
        reading.shown(item["mean"]),
        f"{reading.shown(item['low'])} – {reading.shown(item['high'])}",
        best,
        _against(reading, item, baseline),
        left,
        round(max(right - left, 0.0), 1),
        max(0.0, _share(item["mean"], widest) - 0.6),
        link,
    )


def _against(reading: Reading, item: Mapping[str, Any], baseline: float | None) -> str:
    if baseline is None:
        return ""
    better, worse = item["low"] > baseline, item["high"] < baseline
    if reading.lower_is_better:
        better, worse = worse, better
    return "above" if better else "below" if worse else "level"


def _widest(reading: Reading, highs: Sequence[float], baseline: float | None) -> float:
    if reading.upper is not None:
        return reading.upper
    return max([*highs, baseline or 0.0, 1e-9])


def _share(value: float, widest: float) -> float:
    return round(min(100.0, max(0.0, value / widest * 100)), 1)


def table(inputs: Inputs, tasks: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """One row per task, checkpoint and metric: the numbers of the report, flat."""
    found = []
    for task in tasks:
        for (checkpoint, result), best in zip(task.results.items(), task.best, strict=True):
            run, _, step = checkpoint.partition("/step-")
            document, lineage = result.metrics, result.lineage
            baseline = (document.get("baseline") or {}).get("metrics") or {}
            for metric, estimate in document["metrics"].items():
                reading = Reading.of(document, metric)
                is_primary = metric == document["primary"]
                found.append(
                    {
                        "task": task.name,
                        "checkpoint": checkpoint,
                        "run": run,
                        "step": int(step),
                        "metric": metric,
                        "primary": is_primary,
                        "lower_is_better": reading.lower_is_better,
                        "upper": reading.upper,
                        **{name: estimate[name] for name in ("mean", "stderr", "low", "high", "n")},
                        "best_or_level": best if is_primary and len(task.results) > 1 else "",
                        "baseline": baseline[metric]["mean"] if metric in baseline else None,
                        "unparsed": document["unparsed"],
                        "groups": " ".join(document.get("groups") or ()),
                        "predictions": lineage.predictions,
                        "metrics": lineage.metrics,
                        "checkpoint_digest": lineage.weights,
                        "shards": lineage.shards,
                        "code": lineage.code,
                    }
                )
    return found
