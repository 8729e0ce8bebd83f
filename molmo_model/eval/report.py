"""The metric report: one offline HTML page, a CSV and a JSON, with every number's interval, baseline and lineage.

The page needs nothing else: pictures are data URIs, charts are inline SVG, and its content security policy lets the
browser neither load anything nor run any script but the page's own, named by its hash. Everything that came from data
is escaped by the template engine. Equal inputs give equal bytes. No torch here.
"""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from molmo_model.artifacts import canonical_json
from molmo_model.data.example import Image
from molmo_model.errors import EvaluationError
from molmo_model.eval import cards
from molmo_model.eval.charts import Point, Series, line_chart, standalone, thin
from molmo_model.eval.pages import TEMPLATES, environment


@dataclass(frozen=True)
class Lineage:
    """What one number was made from: digests of artefacts and code, and the params by dotted path."""

    predictions: str
    metrics: str
    weights: str
    """Digest of the checkpoint."""
    shards: str
    code: str
    params: dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """One checkpoint's result in one task."""

    metrics: Mapping[str, Any]
    """`metrics.json`, as the scorecard holds it."""
    lineage: Lineage
    predictions: Sequence[Mapping[str, Any]]
    scores: Sequence[Mapping[str, Any]]
    """Rows of `scores.jsonl`, in the order of the predictions."""


@dataclass(frozen=True)
class DataSource:
    """One dataset behind the numbers, and what uses it."""

    dataset: str
    summary: Mapping[str, Any]
    """Of its shards' manifest: licence, source, revision, card, counts; what an older artefact lacks is left out."""
    runs: Sequence[str] = ()
    """Runs that were trained on it."""
    tasks: Sequence[str] = ()
    """Tasks that ask about it."""


@dataclass(frozen=True)
class Inputs:
    """Everything a report is made from."""

    results: Mapping[str, Mapping[str, Evaluated]]
    """By task, then by checkpoint, both in the order shown."""
    losses: Mapping[str, Sequence[tuple[int, float]]]
    """Training loss by run: (step, loss)."""
    pictures: Callable[[str, int], Sequence[Image]]
    """An example's pictures by dataset and row of its index."""
    confidence: float
    examples: int
    """Cards per task."""
    checkpoints: Sequence[str]
    params: Mapping[str, Any] = field(default_factory=dict)
    """Params of the training runs shown, for lineage; by run."""
    data: Sequence[DataSource] = ()


def write(inputs: Inputs, out: Path) -> dict[str, Any]:
    """Writes `index.html`, `report.csv`, `report.json` and `plots/*.svg`; returns a summary.

    Raises:
        EvaluationError: checkpoints of one task were asked different items, or scores do not fit predictions.
    """
    for task, results in inputs.results.items():
        _check(task, results)
    rows = table(inputs)
    plots = _plots(inputs)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for name, svg in plots.items():
        (out / "plots" / f"{name}.svg").write_text(standalone(svg), encoding="utf-8")
    (out / "report.csv").write_text(_csv(rows), encoding="utf-8")
    document = {
        "confidence": inputs.confidence,
        "checkpoints": list(inputs.checkpoints),
        "rows": rows,
        "data": [_data(source) for source in inputs.data],
    }
    (out / "report.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    page = _render(inputs, plots)
    (out / "index.html").write_text(page, encoding="utf-8")
    return {"checkpoints": len(inputs.checkpoints), "tasks": len(inputs.results), "page_bytes": len(page.encode())}


def table(inputs: Inputs) -> list[dict[str, Any]]:
    """One row per task, checkpoint and metric: the numbers of the report, flat."""
    rows = []
    for task, results in inputs.results.items():
        for checkpoint, result in results.items():
            run, _, step = checkpoint.partition("/step-")
            document, lineage = result.metrics, result.lineage
            for metric, estimate in document["metrics"].items():
                rows.append(
                    {
                        "task": task,
                        "checkpoint": checkpoint,
                        "run": run,
                        "step": int(step),
                        "metric": metric,
                        "primary": metric == document["primary"],
                        **{name: estimate[name] for name in ("mean", "stderr", "low", "high", "n")},
                        "baseline": document["baseline"]["metrics"][metric]["mean"],
                        "unparsed": document["unparsed"],
                        "predictions": lineage.predictions,
                        "metrics": lineage.metrics,
                        "checkpoint_digest": lineage.weights,
                        "shards": lineage.shards,
                        "code": lineage.code,
                    }
                )
    return rows


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


# --- charts


def _runs(inputs: Inputs) -> dict[str, int]:
    """Runs by name, with their colour."""
    names = dict.fromkeys([checkpoint.partition("/")[0] for checkpoint in inputs.checkpoints])
    return {name: number for number, name in enumerate([*names, *(run for run in inputs.losses if run not in names)])}


def _plots(inputs: Inputs) -> dict[str, str]:
    """SVG by name: one per task with a line per run, and the training losses."""
    colours = _runs(inputs)
    plots = {}
    for task, results in inputs.results.items():
        lines: dict[str, list[Point]] = {}
        baseline = primary = None
        for checkpoint, result in results.items():
            run, _, step = checkpoint.partition("/step-")
            primary = result.metrics["primary"]
            value, baseline = result.metrics["metrics"][primary], result.metrics["baseline"]["metrics"][primary]["mean"]
            lines.setdefault(run, []).append(Point(int(step), value["mean"], value["low"], value["high"]))
        series = [Series(run, tuple(points), colours[run]) for run, points in lines.items()]
        plots[task] = line_chart(
            f"{task}: {primary} over steps", series, baseline=baseline, y_range=(0.0, 1.0), percent=True
        )
    losses = [
        Series(run, thin([Point(step, loss) for step, loss in curve]), colours[run], dots=False)
        for run, curve in inputs.losses.items()
        if curve
    ]
    if losses:
        plots["training_loss"] = line_chart("training loss over steps", losses)
    return plots


# --- the page


def _render(inputs: Inputs, plots: Mapping[str, str]) -> str:
    jinja = environment()
    jinja.filters["percent"] = lambda value: f"{value * 100:.1f}"
    jinja.filters["short"] = lambda digest: digest[:12]
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    lineage = _lineage(inputs)
    return jinja.get_template("report.html.j2").render(
        script=script,
        style=style,
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        checkpoints=[
            {"name": name, "run": name.partition("/")[0], "step": int(name.partition("/step-")[2])}
            for name in inputs.checkpoints
        ],
        colours=_runs(inputs),
        confidence=inputs.confidence,
        tasks=[_task(inputs, task, results) for task, results in inputs.results.items()],
        plots=plots,
        lineage=lineage,
        data=[_data(source) for source in inputs.data],
        runs={run: canonical_json(params) for run, params in inputs.params.items()},
        digest=hashlib.sha256(canonical_json(lineage).encode()).hexdigest(),
    )


def _hash(text: str) -> str:
    """A source expression of a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _task(inputs: Inputs, task: str, results: Mapping[str, Evaluated]) -> dict[str, Any]:
    """What the template shows of one task."""
    last = list(results.values())[-1]
    primary = last.metrics["primary"]
    scores = [row["scores"][primary] for row in last.scores]
    chosen = cards.choose(scores, inputs.examples)
    best = max(result.metrics["metrics"][primary]["mean"] for result in results.values())
    return {
        "name": task,
        "metric": last.metrics["metric"],
        "primary": primary,
        "citation": last.metrics["citation"],
        "baseline": last.metrics["baseline"],
        "n": last.metrics["metrics"][primary]["n"],
        "results": {checkpoint: result.metrics for checkpoint, result in results.items()},
        "best": best,
        "imperfect": sum(score < 1.0 for score in scores),
        "cards": [
            cards.make(
                [result.predictions[index] for result in results.values()],
                [result.scores[index] for result in results.values()],
                primary,
                inputs.pictures,
            )
            for index in chosen
        ],
    }


def _lineage(inputs: Inputs) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "checkpoint": checkpoint,
            **asdict(result.lineage),
            "params": [(name, canonical_json(value)) for name, value in sorted(result.lineage.params.items())],
        }
        for task, results in inputs.results.items()
        for checkpoint, result in results.items()
    ]


def _data(source: DataSource) -> dict[str, Any]:
    """What the page and `report.json` say of a dataset; None where its shards do not say."""
    counts = source.summary.get("examples") or {}
    facts = ("licence", "source", "revision", "card", "bad_rows", "missing_downloads")
    return {
        "dataset": source.dataset,
        **{name: source.summary.get(name) for name in facts},
        "train": counts.get("train"),
        "eval": counts.get("eval"),
        "runs": list(source.runs),
        "tasks": list(source.tasks),
    }
