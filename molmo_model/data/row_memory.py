"""What the rows of a source file became when they were last read, so that a row that did not change need not be
parsed, checked and probed again.

A family that reads rows keeps one (`Family.memory`). It is keyed by the text of a row and the digests of the files that
the row names; what it says holds for one `context`: the code of the family, its options, and whatever else decides what
a row becomes. Another context knows nothing. Rules about several rows (unique ids, which side an image is on, how many
examples are wanted) are no part of it: the family applies them again each time.

It lies in the state folder, a Parquet file for each source; deleting it costs time and nothing else. It does not hold
examples: those stand in the previous artefact, found by id and by the digest of their range.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_model import remembered
from molmo_model.artifacts import digest_of
from molmo_model.data.example import Unchanged

if TYPE_CHECKING:
    import pyarrow as pa

    from molmo_model.data.previous_shards import PreviousShards

FOLDER = "rows"
SEPARATOR = "\0"
"""Between names and between digests; no path holds it."""
MISSING = "missing"
"""Digest of a file that cannot be read. Why it cannot is not remembered, so its row is read again each time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one good row became, before any rule about several rows. Bad rows are not remembered: they are few."""

    id: str
    """Of the example."""
    files: int
    """How many pictures and films it has: those that the row names, and those that it holds itself."""
    asked: str | None
    """The side that the row asks for."""
    content: str
    """Digest that its side is drawn by."""
    range: str | None = None
    """SHA-256 of its members in a shard; None: not known, because it was not wanted there."""


class RowMemory:
    """The memory of one source.

    Args:
        path: the Parquet file; None: nothing is remembered and nothing is kept.
        context: digest of all that decides, beside a row's text and files, what it becomes.
    """

    def __init__(self, path: Path | None, context: str) -> None:
        self.path, self.context = path, context
        self.previous: PreviousShards | None = None
        """Where examples that did not change are taken from."""
        self._table = _read(path, context)
        self._columns: dict[str, list[Any]] = self._table.to_pydict()
        self._places = {text: place for place, text in enumerate(self._columns["text"])}
        self.begin()

    def begin(self) -> None:
        """Nothing of the rows has been read yet."""
        self._kept: dict[int, None] = {}
        self._learnt: dict[bytes, tuple[dict[str, Any], bool]] = {}

    @classmethod
    def of(cls, source: str, facts: Any) -> "RowMemory":
        """The memory of a source in the memory of the run, if there is one.

        Args:
            source: path or URL of the file of rows.
            facts: plain value, all that its context is.
        """
        run = remembered.current()
        name = f"{hashlib.sha256(os.path.abspath(source).encode()).hexdigest()[:20]}.parquet"
        context = digest_of(facts)
        if run is None:
            return cls(None, context)
        if (shared := run.shared.get(name)) is None or shared.context != context:
            shared = run.shared[name] = cls(run.folder / FOLDER / name, context)
        shared.begin()
        return shared

    def find(self, text: bytes | None) -> int | None:
        """The place of a row by the SHA-256 of its text, if it is known."""
        return None if text is None else self._places.get(text)

    def names(self, place: int) -> list[str]:
        """The files that a known row names, in order."""
        names: str = self._columns["names"][place]
        return names.split(SEPARATOR) if names else []

    def joins(self, place: int) -> bool:
        """Whether a known row has a say in the sides of its files: it has several, or asks for one."""
        return self._columns["files"][place] > 1 or self._columns["asked"][place] is not None

    def recall(self, place: int, digests: Sequence[str]) -> Outcome | None:
        """What a known row became, if its files are still the same."""
        columns = self._columns
        if SEPARATOR.join(digests) != columns["digests"][place] or MISSING in digests:
            return None
        return Outcome(*[columns[name][place] for name in _FACTS])

    def unchanged(self, outcome: Outcome) -> Unchanged | None:
        """The example of a row as the previous artefact has it, if it does."""
        if self.previous is None or outcome.range is None:
            return None
        row = self.previous.find(outcome.id, outcome.range)
        return None if row is None else Unchanged(outcome.id, row)

    def keep(self, place: int) -> None:
        """A known row goes on being known."""
        self._kept[place] = None

    def learn(self, text: bytes, names: Sequence[str], digests: Sequence[str], outcome: Outcome, written: bool) -> None:
        """What a row became that was read anew.

        Args:
            text: SHA-256 of its text.
            names: of the files that it names, in order.
            digests: of those files.
            outcome: what it became; its range is not known yet.
            written: its example goes to the shards.
        """
        if any(SEPARATOR in name for name in names) or (text in self._learnt and not written):
            return
        row = {"text": text, "names": SEPARATOR.join(names), "digests": SEPARATOR.join(digests)}
        self._learnt[text] = row | {name: getattr(outcome, name) for name in _FACTS}, written

    def save(self, index: "pa.Table") -> None:
        """Writes what was kept and learnt.

        Args:
            index: of the shards that were made of these rows, which says the digests of their ranges.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if self.path is None or (not self._learnt and len(self._kept) == self._table.num_rows):
            return
        wanted = [row["id"] for row, written in self._learnt.values() if written]
        found = index.filter(pc.is_in(index["id"], pa.array(wanted, pa.string()))) if wanted else index.slice(0, 0)
        ranges = dict(zip(found["id"].to_pylist(), found["sha256"].to_pylist(), strict=True))
        new = [row | {"range": ranges.get(row["id"]) if written else None} for row, written in self._learnt.values()]
        replaced = self._learnt.keys()
        kept = [place for place in self._kept if self._columns["text"][place] not in replaced]
        table = pa.concat_tables(
            [self._table.take(pa.array(kept, pa.int64())).cast(_schema()), pa.Table.from_pylist(new, _schema())]
        )
        _write(table.replace_schema_metadata({"context": self.context}), self.path)


_FACTS = tuple(field.name for field in fields(Outcome))


def _schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        [
            ("text", pa.binary(32)),  # SHA-256 of the row's text
            ("names", pa.string()),  # of the files that it names
            ("digests", pa.string()),  # of those files
            ("id", pa.string()),
            ("files", pa.int32()),
            ("asked", pa.string()),
            ("content", pa.string()),
            ("range", pa.string()),
        ]
    )


def _read(path: Path | None, context: str) -> "pa.Table":
    """The rows of a memory; none where there is no file yet, or one that is broken or of another context."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path is not None:
        with contextlib.suppress(OSError, pa.ArrowException):
            table = pq.read_table(path)
            if (table.schema.metadata or {}).get(b"context") == context.encode() and table.schema == _schema():
                return table
    return _schema().empty_table()


def _write(table: "pa.Table", path: Path) -> None:
    """Writes atomically: two builds at once leave one of their memories."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            pq.write_table(table, file, compression="zstd", use_dictionary=False)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
