"""The shards that an earlier build made, as the next one takes from them what did not change (see `shards`).

Nothing of them is believed without its manifest: the index and every shard must have the digest that it lists, a range
that is copied is hashed again, and what fails is made again from its source. Only a whole shard that is linked is not
read, if the run remembers its digest and nothing touched the file since (`molmo_model.remembered`).
"""

import hashlib
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from molmo_model.artifacts import Manifest, Sha256, file_sha256, read_manifest, verify_file
from molmo_model.data.shards import INDEX, INDEX_SCHEMA, SCHEMA, VIDEO_FIELDS, VIDEO_INDEX_SCHEMA
from molmo_model.errors import ArtifactError, DataError

NO_ROWS: NDArray[np.int64] = np.zeros(0, np.int64)


class DamagedShard(DataError):
    """A range of the previous artefact is not what its index says.

    Attributes:
        path: of the shard.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class PreviousShards:
    """What can be taken from a finished `shards/<dataset>` folder.

    Args:
        path: the folder.
        sha256: how the digests of its files are had.

    Raises:
        ArtifactError: the manifest or the index cannot be trusted, or the index is of another layout.
    """

    def __init__(self, path: str | Path, sha256: Sha256 = file_sha256) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path, SCHEMA)
        if not self._sound(INDEX, sha256):
            raise ArtifactError(f"{self.path / INDEX} is not the file that the manifest lists")
        try:
            self.index = pq.read_table(self.path / INDEX).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{self.path / INDEX} cannot be read ({error})") from error
        if self.index.schema not in (INDEX_SCHEMA, VIDEO_INDEX_SCHEMA):
            raise ArtifactError(f"{self.path / INDEX} has other columns than this code writes")
        self._shards = self.index["shard"].combine_chunks().dictionary_encode()
        names = self._shards.dictionary.to_pylist()
        self.sound = frozenset(name for name in names if self._sound(name, sha256))
        """Names of the shards that may be used."""

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of every row's range."""
        sizes: list[int] = self.index["size"].to_pylist()
        return sizes

    def find(self, example_id: str, sha256: str) -> int | None:
        """The row of an example whose range has this digest, if its shard may be used."""
        row = self._by_id.get(example_id)
        return row if row is not None and self._hashes[row] == sha256 else None

    def rows_of(self, shard: str) -> NDArray[np.int64]:
        """Rows of a shard in their order; none if it may not be used."""
        return self._by_shard.get(shard, NO_ROWS)

    def read(self, row: int) -> bytes:
        """The range of a row, verified.

        Raises:
            DamagedShard: it cannot be read, or is not what the index says.
        """
        path = self.path / self.index["shard"][row].as_py()
        try:
            with open(path, "rb") as file:
                data = os.pread(file.fileno(), self.sizes[row], self.index["offset"][row].as_py())
        except OSError as error:
            raise DamagedShard(path, str(error)) from error
        if (found := hashlib.sha256(data).hexdigest()) != self._hashes[row]:
            raise DamagedShard(path, f"row {row} has SHA-256 {found}, the index says {self._hashes[row]}")
        return data

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """Rows of the index, with the columns of films."""
        table = self.index.take(pa.array(rows))
        for field in VIDEO_FIELDS if len(table.schema) == len(INDEX_SCHEMA) else ():
            table = table.append_column(field, pa.array([[]] * len(rows), field.type))
        return table

    @cached_property
    def _hashes(self) -> list[str]:
        hashes: list[str] = self.index["sha256"].to_pylist()
        return hashes

    @cached_property
    def _by_id(self) -> dict[str, int]:
        names = self._shards.dictionary.to_pylist()
        usable = np.array([name in self.sound for name in names], bool)[np.asarray(self._shards.indices)]
        ids = self.index["id"].to_pylist()
        return {ids[row]: row for row in np.flatnonzero(usable).tolist()}

    @cached_property
    def _by_shard(self) -> dict[str, NDArray[np.int64]]:
        numbers = np.asarray(self._shards.indices)
        order = np.argsort(numbers, kind="stable")  # rows stand in a shard in the order of the index
        names = self._shards.dictionary.to_pylist()
        parts = np.split(order, np.cumsum(np.bincount(numbers, minlength=len(names)))[:-1])
        return {name: part for name, part in zip(names, parts, strict=True) if name in self.sound}

    def _sound(self, name: str, sha256: Sha256) -> bool:
        """Whether a file is the one that the manifest lists."""
        try:
            verify_file(self.path / name, self.manifest.files[name], sha256)
        except (KeyError, OSError, ArtifactError):
            return False
        return True
