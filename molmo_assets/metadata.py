"""What a person sees on an asset's page: counts, curves, tables, sample pictures with predictions, paths.

One function for each kind of artefact; each reads only files of the artefact and, for pictures, the shards that it was
asked about. Pictures are small and inline, so that a page needs no other server.
"""

import base64
import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from molmo_assets.flow import Artefact
from molmo_model.artifacts import Manifest
from molmo_model.errors import MolmoError

THUMBNAIL = 160
"""Longest side of a sample picture, in pixels."""
SAMPLES = 4
TABLE_ROWS = 12

Metadata = dict[str, Any]


def describe(item: Artefact, manifest: Manifest) -> Metadata:
    """The metadata of a materialisation, from the artefact itself."""
    size = sum(entry.size for entry in manifest.files.values())
    common: Metadata = {
        "path": dg.MetadataValue.path(str(item.path.absolute())),
        "digest": manifest.digest,
        "files": len(manifest.files),
        "megabytes": round(size / 1e6, 3),
    }
    counts = {name: value for name, value in manifest.summary.items() if isinstance(value, int | float | str)}
    try:
        shown = DESCRIBE.get(item.asset, lambda item: {})(item)
    except (OSError, ValueError, KeyError, TypeError, MolmoError) as error:
        shown = {"cannot_be_shown": f"{type(error).__name__}: {error}"}  # what is shown must not fail what was made
    return {**counts, **shown, **common}


def describe_shards(item: Artefact) -> Metadata:
    """Sample pictures, and the rows that were refused."""
    shown: Metadata = {}
    problems = _json_lines(item.path / "problems.jsonl")
    if problems:
        shown["refused_rows"] = markdown_table(("file", "line", "id", "field", "reason"), problems)
    samples = [(row, example) for row, example in _examples(item.path, range(SAMPLES))]
    if samples:
        rows = [
            {"picture": _picture(example), "id": example.id, "conversations": "; ".join(_styles(example))}
            for _, example in samples
        ]
        shown["samples"] = markdown_table(("picture", "id", "conversations"), rows)
    return shown


def describe_mixture(item: Artefact) -> Metadata:
    """The rates as they were resolved, and the examples that were left out for showing pictures of evaluation."""
    document = json.loads((item.path / "mixture.json").read_text(encoding="utf-8"))
    entries = document.get("entries", {})
    rows = [{"entry": name, **entry} for name, entry in entries.items()] if isinstance(entries, dict) else entries
    if not rows:
        return {}
    columns = [name for row in rows for name, value in row.items() if isinstance(value, int | float | str)]
    shown: Metadata = {"mixture": markdown_table(list(dict.fromkeys(columns)), rows)}
    left_out = [
        {**one, "shows": ", ".join(f"{of['dataset']} {of['id']}" for of in one["shows"])}
        for one in document.get("dropped_leaks", [])
    ]
    return shown | ({"left_out": markdown_table(("dataset", "id", "shows"), left_out)} if left_out else {})


def describe_training(item: Artefact) -> Metadata:
    """The loss curve, and the loss in numbers."""
    curve = loss_curve(item.path)
    if not curve:
        return {}
    every = max(1, len(curve) // TABLE_ROWS)
    rows = [{"step": step, "loss": f"{loss:.4f}"} for step, loss in [*curve[:-1][::every], curve[-1]]]
    return {
        "final_loss": curve[-1][1],
        "loss_curve": dg.MetadataValue.md(f"![loss over steps]({_data_uri(draw_curve(curve))})"),
        "loss": markdown_table(("step", "loss"), rows),
    }


def describe_validation(item: Artefact) -> Metadata:
    """What was expected of the dataset and what was found, and the pictures that are broken or seen in training."""
    document = json.loads((item.path / "validation.json").read_text(encoding="utf-8"))
    rows = [row for row in document.get("results", []) if isinstance(row, dict)]
    columns = [name for name in rows[0] if isinstance(rows[0][name], str | int | float | bool)] if rows else []
    shown: Metadata = {"expectations": markdown_table(columns, rows)} if columns else {}
    tables = {
        "faults": (("id", "field", "reason"), document.get("faults", [])),
        "leaks": (("train", "eval", "image_sha256"), document.get("leaks", {}).get("listed", [])),
        "near_duplicates": (
            ("train", "eval", "distance", "difference"),
            document.get("near_duplicates", {}).get("listed", []),
        ),
    }
    return shown | {name: markdown_table(header, listed) for name, (header, listed) in tables.items() if listed}


def describe_predictions(item: Artefact) -> Metadata:
    """Sample predictions beside their references, with the picture that was asked about."""
    rows = []
    asked = _json_lines(item.path / "predictions.jsonl")
    one_of_each = {str(prediction.get("example_id")): prediction for prediction in reversed(asked)}
    for prediction in list(reversed(one_of_each.values()))[:SAMPLES]:
        image = prediction.get("image") or {}
        shards = Path("artifacts/shards") / str(image.get("dataset"))
        examples = list(_examples(shards, [image["row"]])) if "row" in image else []
        references = prediction.get("references", {})
        rows.append(
            {
                "picture": _picture(examples[0][1]) if examples else "",
                "prompt": prediction.get("prompt", ""),
                "prediction": prediction.get("prediction", ""),
                "reference": references.get("text") or references.get("answer") or json.dumps(references)[:200],
            }
        )
    return {"samples": markdown_table(("picture", "prompt", "prediction", "reference"), rows)} if rows else {}


def describe_metrics(item: Artefact) -> Metadata:
    """The numbers with their intervals; the primary one also by itself, so that Dagster plots it over time."""
    document = json.loads((item.path / "metrics.json").read_text(encoding="utf-8"))
    primary = document.get("metrics", {}).get(document.get("primary"), {})
    shown: Metadata = {"metrics": metrics_table([document])}
    if isinstance(primary.get("mean"), int | float):
        shown[str(document["primary"])] = float(primary["mean"])
    return shown


def describe_scorecard(item: Artefact) -> Metadata:
    """All tasks of one checkpoint, from their metrics."""
    metrics = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((Path("artifacts/metrics") / str(item.partition)).glob("*/metrics.json"))
    ]
    return {"scores": metrics_table(metrics)} if metrics else {}


def describe_report(item: Artefact) -> Metadata:
    """Where the page is, and its table."""
    shown: Metadata = {"page": dg.MetadataValue.path(str((item.path / "index.html").absolute()))}
    table = item.path / "report.csv"
    if table.exists():
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if rows:
            shown["scores"] = markdown_table(list(rows[0]), rows, limit=60)
    return shown


DESCRIBE: dict[str, Callable[[Artefact], Metadata]] = {
    "shards": describe_shards,
    "validation": describe_validation,
    "mixture": describe_mixture,
    "training_run": describe_training,
    "predictions": describe_predictions,
    "metrics": describe_metrics,
    "scorecard": describe_scorecard,
    "report": describe_report,
}


def metrics_table(documents: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue:
    """One row for each metric of each task: mean, interval, n, and the majority answer's score."""
    rows = []
    for document in documents:
        for name, value in document.get("metrics", {}).items():
            baseline = (document.get("baseline") or {}).get("metrics", {}).get(name, {})
            rows.append(
                {
                    "task": document.get("task", ""),
                    "metric": name,
                    "mean": _number(value.get("mean")),
                    "interval": f"{_number(value.get('low'))} to {_number(value.get('high'))}",
                    "n": value.get("n", ""),
                    "majority answer": _number(baseline.get("mean")),
                }
            )
    return markdown_table(("task", "metric", "mean", "interval", "n", "majority answer"), rows, limit=60)


def markdown_table(
    columns: Sequence[str], rows: Sequence[Mapping[str, Any]], limit: int = TABLE_ROWS
) -> dg.MarkdownMetadataValue:
    """A Markdown table; cells are escaped, except pictures that were made here (`Picture`)."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows[:limit]:
        lines.append("| " + " | ".join(_cell(row.get(name, "")) for name in columns) + " |")
    if len(rows) > limit:
        lines.append(f"\n{len(rows) - limit} more rows are in the artefact.")
    return dg.MetadataValue.md("\n".join(lines))


class Picture(str):
    """Markdown of a picture made here; the one kind of cell that is not escaped."""


def loss_curve(folder: Path) -> list[tuple[int, float]]:
    """`(step, loss)` of a training run's `loss.csv`; empty when there is none."""
    path = folder / "loss.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def draw_curve(curve: Sequence[tuple[int, float]], width: int = 480, height: int = 200) -> bytes:
    """A PNG of the loss over the steps, with its ends written on the axes. Losses that are not finite are left out."""
    from PIL import Image, ImageDraw

    points = [(step, loss) for step, loss in curve if loss - loss == 0]
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = 48, 12, width - 12, height - 22
    pen.rectangle((left, top, right, bottom), outline="#cccccc")
    if points:
        first, last = points[0][0], points[-1][0]
        low, high = min(loss for _, loss in points), max(loss for _, loss in points)
        across, up = max(last - first, 1), max(high - low, 1e-12)
        line = [
            (left + (right - left) * (step - first) / across, bottom - (bottom - top) * (loss - low) / up)
            for step, loss in points
        ]
        pen.line(line, fill="#1f5fbf", width=2)
        pen.text((4, top - 6), f"{high:.3g}", fill="black")
        pen.text((4, bottom - 6), f"{low:.3g}", fill="black")
        pen.text((left, bottom + 4), f"step {first}", fill="black")
        pen.text((right - 60, bottom + 4), f"step {last}", fill="black")
    return _png(image)


def _examples(shards: Path, rows: Iterable[int]) -> Iterable[tuple[int, Any]]:
    """Rows of a dataset that are there; none when the dataset is not."""
    if not (shards / "index.parquet").exists():
        return
    from molmo_model.data.shard_reader import ShardReader

    reader = ShardReader(shards)
    for row in rows:
        if row < len(reader):
            yield row, reader.read(row)


def _picture(example: Any) -> str:
    """A small copy of an example's first image, as Markdown; empty when it has none."""
    if not example.images:
        return ""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(example.images[0].data)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return Picture(f"![{_cell(example.id)}]({_data_uri(_png(image))})")


def _styles(example: Any) -> list[str]:
    return sorted({conversation.style for conversation in example.conversations})


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _cell(value: Any) -> str:
    """Plain text in a table cell: no Markdown, no HTML, no second line, at most 300 characters."""
    if isinstance(value, Picture):
        return value
    text = " ".join(str(value).split())[:300]
    for character in "\\`*_[]|!#~":
        text = text.replace(character, f"\\{character}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
