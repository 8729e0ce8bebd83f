"""Reads the rows of a user's JSONL or Parquet file, and tells every row that cannot be read."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, NamedTuple

from molmo_model.errors import ConfigError, DataError
from molmo_model.storage import open_file

MAX_LINE_BYTES = 64 * 2**20
"""A longer line of a JSONL file is not read into memory."""
PARQUET_BATCH = 64
"""Rows of a Parquet file that are in memory at once; they may hold images."""


class RowError(Exception):
    """A row is bad: the field at fault and the reason. Becomes a `BadRow`, never leaves the family.

    Args:
        known: already accounted for elsewhere, as a dead link in the list of downloads; see `BadRow.known`.
        rows: of a group of rows that become one example, the numbers of those at fault: the first is told, the example
            is made without them. Empty is the group as a whole.
    """

    def __init__(self, field: str, reason: str, known: bool = False, rows: tuple[int, ...] = ()) -> None:
        super().__init__(f"{field} {reason}")
        self.field, self.reason, self.known, self.rows = field, reason, known, rows


@dataclass(frozen=True)
class RawRow:
    """One row of the file: its fields without those that are null, or why it cannot be read."""

    line: int
    """1-based; of a Parquet file the number of the row."""
    fields: dict[str, Any]
    error: RowError | None = None


class Line(NamedTuple):
    """One row of the file, not parsed yet."""

    number: int
    """1-based, as `RawRow.line`."""
    sha256: bytes | None
    """Of its text, or of all values of a Parquet file's row; None: it cannot be read."""
    parse: Callable[[], RawRow]


def read_rows(path: str) -> Iterator[RawRow]:
    """All rows of a file, in order; blank lines are passed over. Raises what `read_lines` does."""
    return (line.parse() for line in read_lines(path))


def read_lines(path: str) -> Iterator[Line]:
    """All rows of a file before they are parsed, in order; blank lines are passed over.

    Raises:
        ConfigError: the file's name ends neither with `.jsonl` nor with `.parquet`.
        DataError: a Parquet file is broken.
        StorageError: the file cannot be opened.
    """
    if path.endswith(".jsonl"):
        with open_file(path, "rb") as file:
            # the file itself of one of this machine: a wrapper around it takes longer than to read a line
            yield from _read_jsonl(getattr(file, "f", file))
    elif path.endswith(".parquet"):
        with open_file(path, "rb") as file:
            yield from _read_parquet(file, path)
    else:
        raise ConfigError(f"dataset path {path!r} must end with .jsonl or .parquet")


def _read_jsonl(file: IO[bytes]) -> Iterator[Line]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            too_long = RowError("row", f"is longer than {MAX_LINE_BYTES} bytes")
            yield Line(number, None, partial(RawRow, number, {}, too_long))
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
        if line.strip():
            yield Line(number, hashlib.sha256(line).digest(), partial(_parse, number, line))


def _parse(number: int, line: bytes) -> RawRow:
    try:
        fields = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return RawRow(number, {}, RowError("row", f"is not UTF-8: byte {error.start} of the line"))
    except json.JSONDecodeError as error:
        return RawRow(number, {}, RowError("row", f"is not JSON: {error.msg} at character {error.pos}"))
    except RecursionError:
        return RawRow(number, {}, RowError("row", "is nested too deeply"))
    except RowError as error:
        return RawRow(number, {}, error)
    except ValueError as error:  # a number of thousands of digits
        return RawRow(number, {}, RowError("row", f"is not JSON: {error}"))
    if not isinstance(fields, dict):
        return RawRow(number, {}, RowError("row", f"is a JSON {type(fields).__name__}; it must be an object"))
    return RawRow(number, _without_nulls(fields))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which a field stands once: Python would silently keep the last one."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise RowError(next(name for name in names if names.count(name) > 1), "stands twice in one object")
    return fields


def _read_parquet(file: IO[bytes], path: str) -> Iterator[Line]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=PARQUET_BATCH):
            for i in range(batch.num_rows):
                number += 1
                row = batch.take(pa.array([i]))  # a copy: a slice is serialised with some of its neighbours
                text = hashlib.sha256(batch.schema.serialize())
                text.update(row.serialize())
                yield Line(number, text.digest(), partial(_parquet_row, number, row))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet after row {number}: {error}") from error


def _parquet_row(number: int, row: Any) -> RawRow:
    """The one row of a record batch."""
    try:
        (fields,) = row.to_pylist()
    except UnicodeDecodeError:
        return RawRow(number, {}, RowError("row", "holds text that is not UTF-8"))
    return RawRow(number, _without_nulls(fields))


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """Null means absent: a Parquet column is there for all rows or for none."""
    return {name: value for name, value in fields.items() if value is not None}
