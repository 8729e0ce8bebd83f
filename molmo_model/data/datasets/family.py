"""What a dataset family is: the type of the entries of `FAMILIES`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from molmo_model.config import DatasetConfig
from molmo_model.data.example import BadRow, Example, Unchanged
from molmo_model.data.row_memory import RowMemory


@dataclass(frozen=True)
class Family:
    """One way to make examples."""

    make: Callable[[DatasetConfig, int], Iterator[tuple[str, Example | BadRow]]]
    """(dataset, seed) to pairs of split (`train` or `eval`) and example or bad row; deterministic, in a fixed order."""
    fingerprint: Callable[[DatasetConfig, int], dict[str, str]]
    """(dataset, seed) to digests, by name, of all data that `make` would read; cheap next to `make`."""
    options: type[Any]
    """Dataclass of the `options:` that the family takes; anything else is refused."""
    licence: str
    """SPDX identifier or a short name of the licence of the data."""
    source: str
    """Where the data come from."""
    revision: str = ""
    """Commit, tag or branch of the source that is read where `revision` of the params says nothing; empty where the
    data come with a package, whose version the constraints name, or are the user's own."""
    card: str = ""
    """URL of the page that describes the published data."""
    memory: Callable[[DatasetConfig], RowMemory] | None = None
    """For a family that need not make an example again whose row did not change: opens what is remembered of the rows.
    Then `remake` is given too."""
    remake: Callable[[DatasetConfig, int, RowMemory], Iterator[tuple[str, Example | BadRow | Unchanged]]] | None = None
    """As `make`, but yields `Unchanged` for examples that the memory's previous artefact holds."""
    urls: Callable[[DatasetConfig], Iterator[tuple[str, str | None]]] | None = None
    """For data that name their pictures by URL: every URL in order, with the SHA-256 of its file where the data say it;
    `python -m pipelines.download` fetches them."""
