"""What Dagster must be told about an artefact so that it never calls a fresh one stale, or a stale one fresh.

Dagster compares, for every partition: the code version, and whether an upstream partition has got another data version
since the event that the recorded pointer names. Events that Dagster's own steps write carry these tags; events that we
report (a checkpoint while training goes on, what `dvc repro` made) must carry the same ones.
"""

from collections.abc import Iterable

import dagster as dg

from molmo_assets.flow import (
    UPSTREAM,
    Artefact,
    code_module,
    combined_version,
    depends_on_all,
    dimensions,
    partition_keys,
    partition_map,
    split_key,
)
from molmo_model.artifacts import Manifest
from molmo_model.config import Params
from molmo_model.source_digest import source_digest

DATA_VERSION = "dagster/data_version"
CODE_VERSION = "dagster/code_version"
USER_PROVIDED = "dagster/data_version_is_user_provided"
INPUT_VERSION = "dagster/input_data_version/"
INPUT_POINTER = "dagster/input_event_pointer/"
NO_POINTER = "NULL"
NO_VERSION = "INITIAL"
MANY_PARTITIONS = 100
"""From this many upstream partitions on, Dagster compares no versions of that upstream."""


def tags(item: Artefact, manifest: Manifest, instance: dg.DagsterInstance, params: Params) -> dict[str, str]:
    """The tags of a materialisation that was made from the latest recorded versions of everything upstream."""
    found = {
        DATA_VERSION: manifest.digest,
        CODE_VERSION: source_digest(code_module(item.asset)),
        USER_PROVIDED: "true",
    }
    for upstream in UPSTREAM[item.asset]:
        records = latest(instance, upstream, upstream_partitions(item, upstream, params))
        versions = {key: version for key, (version, _) in records.items()}
        newest = max((storage_id for _, storage_id in records.values()), default=None)
        found[INPUT_VERSION + upstream] = combined_version(versions)
        found[INPUT_POINTER + upstream] = NO_POINTER if newest is None else str(newest)
    return found


def same(recorded: dict[str, str], wanted: dict[str, str]) -> bool:
    """Whether an event says what a new one would say; pointers may be older as long as the versions are equal."""
    names = [name for name in wanted if not name.startswith(INPUT_POINTER)]
    return all(recorded.get(name) == wanted[name] for name in names)


def latest(instance: dg.DagsterInstance, asset: str, partitions: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Data version and storage id of the latest materialisation of each partition that has one."""
    found = {}
    for partition in partitions:
        filters = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[partition])
        for record in instance.fetch_materializations(filters, limit=1).records:
            event = record.asset_materialization
            version = (event.tags or {}).get(DATA_VERSION, NO_VERSION) if event else NO_VERSION
            found[partition] = (version, record.storage_id)
    return found


def recorded_tags(instance: dg.DagsterInstance, item: Artefact) -> dict[str, str] | None:
    """The tags of the latest materialisation of an artefact's partition; None when Dagster knows of none."""
    partitions = None if item.partition is None else [item.partition]
    filters = dg.AssetRecordsFilter(asset_key=dg.AssetKey(item.asset), asset_partitions=partitions)
    for record in instance.fetch_materializations(filters, limit=1).records:
        return dict(record.asset_materialization.tags or {}) if record.asset_materialization else {}
    return None


def upstream_partitions(item: Artefact, upstream: str, params: Params) -> list[str]:
    """The upstream partitions that an artefact stands on, by the same rule as `partitions.reads`."""
    every = [str(key) for key in partition_keys(upstream, params)]
    if depends_on_all(upstream, item.asset):
        return every
    own = split_key(item.asset, item.partition) if item.partition is not None else {}
    if shared := own.keys() & set(dimensions(upstream)):
        return [key for key in every if all(split_key(upstream, key)[name] == own[name] for name in shared)]
    mapping = partition_map(upstream, item.asset, params)
    return [key for key in every if str(item.partition) in mapping[key]]
