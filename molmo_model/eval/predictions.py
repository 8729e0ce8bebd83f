"""`predictions.jsonl`: what stage 1 of evaluation hands to stage 2, one row per item, and the checks on both sides.

A row holds everything that scoring and the report may want, references with all their metadata included, so no metric
ever needs a model or a second look at the data set's files.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from molmo_model.artifacts import canonical_json
from molmo_model.errors import EvaluationError

FILE = "predictions.jsonl"
TRAINING_FILE = "training_references.jsonl"
"""References of a sample of training items: what the majority answer is taken from."""
SCORES_FILE = "scores.jsonl"
SCHEMA = "molmo/predictions"

FIELDS: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "example_id": str,
    "conversation": int,
    "style": str,
    "prompt": str,
    "prediction": str,
    "references": dict,
    "finish_reason": str,
    "tokens": int,
    "prompt_tokens": int,
    "image": dict,
}
"""Fields of a row: `image` names `dataset`, `row` of its index and `sha256` of the pictures; `tokens` counts the
answer's without the end token; `references` is `eval.tasks.references`."""
FINISH_REASONS = ("stop", "length")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One canonical JSON object per line: equal rows give equal bytes."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(canonical_json(row) + "\n" for row in rows)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        EvaluationError: naming file and line, for whatever is no JSON object.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise EvaluationError(f"{path}:{number}: not JSON ({error}); run the predict stage again") from error
            if not isinstance(row, dict):
                raise EvaluationError(f"{path}:{number}: a {type(row).__name__} where an object is needed")
            rows.append(row)
    return rows


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """The checked rows of a predictions file.

    Raises:
        EvaluationError: naming file, line and field.
    """
    rows = read_jsonl(path)
    check(rows, str(path))
    return rows


def check(rows: list[dict[str, Any]], source: str) -> None:
    """Checks every row's fields and types, and that no id comes twice.

    Raises:
        EvaluationError: naming source, line and field.
    """
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{source}:{number}"
        if row.keys() != FIELDS.keys():
            extra, missing = sorted(row.keys() - FIELDS.keys()), sorted(FIELDS.keys() - row.keys())
            raise EvaluationError(f"{where}: unknown fields {extra}, missing fields {missing}")
        for name, kind in FIELDS.items():
            if not isinstance(row[name], kind) or isinstance(row[name], bool):
                raise EvaluationError(f"{where}: {name} is {row[name]!r}, a {type(row[name]).__name__}")
        if row["finish_reason"] not in FINISH_REASONS:
            raise EvaluationError(f"{where}: finish_reason is {row['finish_reason']!r}, not one of {FINISH_REASONS}")
        if (first := seen.setdefault(row["id"], number)) != number:
            raise EvaluationError(f"{where}: id {row['id']!r} stands on line {first} too; one row per item is needed")
