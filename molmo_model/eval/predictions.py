"""`predictions.jsonl`: what stage 1 of evaluation hands to stage 2, one row per item, and the checks on both sides.

A row holds everything that scoring and the report may want, references with all their metadata included, so no metric
ever needs a model or a second look at the data set's files.
"""

import contextlib
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
OPTIONAL: dict[str, type | tuple[type, ...]] = {"measured": dict}
"""Fields that a row may lack: `measured` is what a task of kind `loss` measured on the reference answer."""
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
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    if not lines[-1]:
        lines.pop()
    rows: list[Any] = []
    with contextlib.suppress(ValueError):  # all at once is faster by a third: a field's name is one object in all rows
        rows = json.loads(f"[{','.join(lines)}]")
    if len(rows) != len(lines):  # a line is broken, or holds two objects
        rows = [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}:{number}: a {type(row).__name__} where an object is needed")
    return rows


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise EvaluationError(f"{where}: not JSON ({error}); run the predict stage again") from error


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
    known = FIELDS | OPTIONAL
    for number, row in enumerate(rows, start=1):
        if row.keys() != FIELDS.keys() and row.keys() - OPTIONAL.keys() != FIELDS.keys():
            extra, missing = sorted(row.keys() - known.keys()), sorted(FIELDS.keys() - row.keys())
            raise EvaluationError(f"{source}:{number}: unknown fields {extra}, missing fields {missing}")
        for name, value in row.items():
            if value is True or value is False or not isinstance(value, known[name]):
                raise EvaluationError(f"{source}:{number}: {name} is {value!r}, a {type(value).__name__}")
        if row["finish_reason"] not in FINISH_REASONS:
            raise EvaluationError(
                f"{source}:{number}: finish_reason is {row['finish_reason']!r}, not one of {FINISH_REASONS}"
            )
        if (first := seen.setdefault(row["id"], number)) != number:
            raise EvaluationError(
                f"{source}:{number}: id {row['id']!r} stands on line {first} too; one row per item is needed"
            )
