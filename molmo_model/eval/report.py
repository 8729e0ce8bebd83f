"""The metric report: one offline HTML page, a CSV and a JSON, with every number's interval, baseline and lineage.

The page needs nothing else: pictures are data URIs, charts are inline SVG, and its content security policy lets the
browser neither load anything nor run any script but the page's own, named by its hash. What came from data is escaped
by the template engine, or stands in blocks of JSON that its script writes as text. Equal inputs give equal bytes. No
torch here.

Numbers and charts are HTML; cards, comparisons and lineage are drawn by `templates/report.js` when they are looked at,
so that fifty tasks of ten checkpoints open as fast as one.
"""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo_model.artifacts import canonical_json
from molmo_model.errors import EvaluationError
from molmo_model.eval import leaderboard, report_data
from molmo_model.eval.charts import Point, Series, line_chart, standalone, thin
from molmo_model.eval.pages import TEMPLATES, environment
from molmo_model.eval.report_data import Evaluated, Inputs, TaskResult
from molmo_model.eval.standings import Group

COMMITS = '<script type="application/json" id="commits">{}</script>'
"""Where a published copy of the page says which commit each code digest is of; see `pipelines.publish`."""


def write(inputs: Inputs, out: Path) -> dict[str, Any]:
    """Writes `index.html`, `report.csv`, `report.json` and `plots/*.svg`; returns a summary.

    Raises:
        EvaluationError: checkpoints of one task were asked different items, or scores do not fit predictions.
    """
    for name, results in inputs.results.items():
        _check(name, results)
    tasks = [TaskResult(name, results, inputs.confidence) for name, results in inputs.results.items()]
    groups = report_data.groups(tasks, inputs.confidence)
    rows = leaderboard.table(inputs, tasks)
    plots = _plots(inputs, tasks, groups)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for name, svg in plots.items():
        (out / "plots" / f"{name}.svg").write_text(standalone(svg), encoding="utf-8")
    (out / "report.csv").write_text(_csv(rows), encoding="utf-8")
    numbers = report_data.numbers(inputs, tasks, _runs(inputs))
    document = {
        "confidence": inputs.confidence,
        "checkpoints": list(inputs.checkpoints),
        "rows": rows,
        "groups": [report_data.facts(group) for group in groups],
        "comparisons": _comparisons(inputs, numbers["pairs"]),
        "runs": numbers["runs"],
        "data": [report_data.data_source(source) for source in inputs.data],
    }
    (out / "report.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    page = _render(inputs, tasks, groups, plots, numbers)
    (out / "index.html").write_text(page, encoding="utf-8")
    return {"checkpoints": len(inputs.checkpoints), "tasks": len(tasks), "page_bytes": len(page.encode())}


def _check(task: str, results: Mapping[str, Evaluated]) -> None:
    reference: list[str] | None = None
    for checkpoint, result in results.items():
        asked = [row["id"] for row in result.predictions]
        if asked != [row["id"] for row in result.scores]:
            raise EvaluationError(f"{checkpoint} {task}: scores are of other items than predictions; run score again")
        if reference is not None and asked != reference:
            raise EvaluationError(f"{checkpoint} {task}: other items than the checkpoints before; run predict again")
        reference = asked


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _comparisons(inputs: Inputs, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every pair and task as one flat object."""
    names = ("difference", "low", "high", "p_value", "p_value_holm", "wins", "losses", "n", "win_ids", "loss_ids")
    return [
        {
            "a": inputs.checkpoints[pair["a"]],
            "b": inputs.checkpoints[pair["b"]],
            "task": task,
            **dict(zip(names, compared, strict=True)),
        }
        for pair in pairs
        for task, compared in zip(inputs.results, pair["tasks"], strict=True)
    ]


# --- charts


def _runs(inputs: Inputs) -> dict[str, int]:
    """Runs by name, with their colour."""
    names = dict.fromkeys([checkpoint.partition("/")[0] for checkpoint in inputs.checkpoints])
    return {name: number for number, name in enumerate([*names, *(run for run in inputs.losses if run not in names)])}


def _plots(inputs: Inputs, tasks: Sequence[TaskResult], groups: Sequence[Group]) -> dict[str, str]:
    """SVG by name: one per group and task with a line per run, and the training losses."""
    colours = _runs(inputs)
    plots = {}
    for number, group in enumerate(groups):
        values = [{"mean": one.mean, "low": one.low, "high": one.high} for one in group.averages]
        title = f"{group.name}: average over steps"
        plots[f"group-{number}"] = _curve(title, inputs.checkpoints, values, colours, None, True)
    for task in tasks:
        title = f"{task.name}: {task.primary} over steps"
        plots[task.name] = _curve(
            title, inputs.checkpoints, task.estimates, colours, task.baseline, task.reading.percent
        )
    losses = [
        Series(run, thin([Point(step, loss) for step, loss in curve]), colours[run], dots=False)
        for run, curve in inputs.losses.items()
        if curve
    ]
    if losses:
        plots["training_loss"] = line_chart("training loss over steps", losses)
    return plots


def _curve(
    title: str,
    checkpoints: Sequence[str],
    values: Sequence[Mapping[str, Any]],
    colours: Mapping[str, int],
    baseline: float | None,
    percent: bool,
) -> str:
    lines: dict[str, list[Point]] = {}
    for checkpoint, value in zip(checkpoints, values, strict=True):
        run, _, step = checkpoint.partition("/step-")
        lines.setdefault(run, []).append(Point(int(step), value["mean"], value["low"], value["high"]))
    series = [Series(run, tuple(points), colours[run]) for run, points in lines.items()]
    y_range = (0.0, 1.0) if percent else (0.0, max([point.high or 0 for one in series for point in one.points]) * 1.05)
    return line_chart(title, series, baseline=baseline, y_range=y_range, percent=percent)


# --- the page


def _render(
    inputs: Inputs,
    tasks: Sequence[TaskResult],
    groups: Sequence[Group],
    plots: Mapping[str, str],
    numbers: Mapping[str, Any],
) -> str:
    jinja = environment()
    jinja.filters["short"] = lambda digest: digest[:12]
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    made, pictures = report_data.all_cards(inputs, tasks)
    written = embedded(numbers)
    titles = {f"group-{number}": group.name for number, group in enumerate(groups)}
    return jinja.get_template("report.html.j2").render(
        script=script,
        style=style,
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        checkpoints=numbers["checkpoints"],
        colours=_runs(inputs),
        confidence=inputs.confidence,
        rows=leaderboard.rows(tasks, groups),
        tasks=[(task.name, task.primary, len(cards)) for task, cards in zip(tasks, made, strict=True)],
        plots=[(titles.get(name, name.replace("_", " ")), svg) for name, svg in plots.items()],
        data=[report_data.data_source(source) for source in inputs.data],
        runs=list(inputs.training),
        numbers=written,
        cards=[(embedded(cards), embedded(own)) for cards, own in zip(made, pictures, strict=True)],
        commits=COMMITS,
        digest=hashlib.sha256(written.encode()).hexdigest(),
    )


def embedded(value: Any) -> str:
    """JSON for a block inside HTML: nothing in it can end the block or begin another."""
    text = canonical_json(value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")


def _hash(text: str) -> str:
    """A source expression of a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"
