"""Brings together rows that belong to one example, such as all questions about one picture, wherever they stand.

Rows go to a temporary file as they come; keys and places stay in memory, pictures do not: each is written once,
however many rows repeat it. The file is as large as the texts and the different pictures; it lies where `TMPDIR` says
and is deleted at the end.
"""

import hashlib
import io
import json
import secrets
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import IO, Any

from molmo_model.data.datasets.chat_rows import RowError
from molmo_model.data.datasets.published_rows import Row
from molmo_model.errors import DataError


def grouped(rows: Iterable[Row], group: Callable[[dict[str, Any]], Hashable]) -> Iterator[list[Row]]:
    """Rows of one key together, in order of their first rows; a row that cannot be read, or that has no key (`group`
    raises `RowError`), alone, with its error."""
    places: dict[Hashable, list[tuple[int, int]]] = {}
    with tempfile.TemporaryFile(prefix="molmo-rows-") as file:
        store = _Store(file)
        for number, row in enumerate(rows):
            key, error = _key(row, number, group)
            places.setdefault(key, []).append(store.write(replace(row, error=error)))
        for found in places.values():
            yield [store.read(place) for place in found]


def _key(row: Row, number: int, group: Callable[[dict[str, Any]], Hashable]) -> tuple[Hashable, RowError | None]:
    """The key of a row, one of its own where it has none, and then what is wrong with it."""
    if row.error is None:
        try:
            return ("key", group(row.fields)), None
        except RowError as error:
            return ("alone", number), error
    return ("alone", number), row.error


class _Store:
    """Rows in a file, as JSON by place and length; long bytes lie beside them and stand in the JSON as their place."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self._pictures: dict[bytes, tuple[int, int]] = {}
        self._mark = secrets.token_hex(16)  # a key that no row can have

    def write(self, row: Row) -> tuple[int, int]:
        error = None if row.error is None else [row.error.field, row.error.reason]
        return self._append(json.dumps([row.file, row.line, row.fields, error], default=self._put).encode())

    def read(self, place: tuple[int, int]) -> Row:
        file, line, fields, error = json.loads(self._bytes(place), object_hook=self._get)
        return Row(file, line, fields, None if error is None else RowError(*error))

    def _put(self, value: Any) -> dict[str, Any]:
        """What stands in JSON for a value that it cannot say: where the bytes lie, written now if they are new.

        Raises:
            DataError: the value is of another type.
        """
        if not isinstance(value, bytes):
            raise DataError(f"a row holds a {type(value).__name__}; rows that are brought together hold JSON and bytes")
        digest = hashlib.sha256(value).digest()
        if digest not in self._pictures:
            self._pictures[digest] = self._append(value)
        return {self._mark: self._pictures[digest]}

    def _get(self, value: dict[str, Any]) -> Any:
        return self._bytes(value[self._mark]) if self._mark in value else value

    def _append(self, value: bytes) -> tuple[int, int]:
        place = self.file.seek(0, io.SEEK_END)
        self.file.write(value)
        return place, len(value)

    def _bytes(self, place: Sequence[int]) -> bytes:
        self.file.seek(place[0])
        return self.file.read(place[1])
