"""Dataset families: how an entry of `datasets:` in `params.yaml` becomes examples.

To add one: a file in this folder with a `make`, a `fingerprint` and an options dataclass, and a line in `FAMILIES`.
Your own data needs neither: family `chat` reads a JSONL or Parquet file (`docs/guides/own_data.md`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from molmo_model.config import DatasetConfig, lookup
from molmo_model.data.datasets import charts, chat, digit_clips, digit_scans, digit_scenes
from molmo_model.data.example import BadRow, Example

__all__ = ["FAMILIES", "BadRow", "Family", "family_of"]


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


FAMILIES: dict[str, Family] = {
    "digit_scenes": Family(
        make=digit_scenes.make,
        fingerprint=digit_scenes.fingerprint,
        options=digit_scenes.Options,
        licence=digit_scans.LICENCE,
        source=digit_scans.SOURCE,
    ),
    "digit_clips": Family(
        make=digit_clips.make,
        fingerprint=digit_clips.fingerprint,
        options=digit_clips.Options,
        licence=digit_scans.LICENCE,
        source=digit_scans.SOURCE,
    ),
    "charts": Family(
        make=charts.make,
        fingerprint=charts.fingerprint,
        options=charts.Options,
        licence="BSD-3-Clause",
        source="vega_datasets, the tables that lie inside the package",
    ),
    "chat": Family(
        make=chat.make,
        fingerprint=chat.fingerprint,
        options=chat.Options,
        licence="yours",
        source="a JSONL or Parquet file of your own",
    ),
}


def family_of(config: DatasetConfig) -> Family:
    """The family that a dataset names.

    Raises:
        ConfigError: there is none of that name; lists those there are.
    """
    return lookup(FAMILIES, config.family, "dataset family")
