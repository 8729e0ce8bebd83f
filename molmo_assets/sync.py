"""Telling Dagster what was made outside of it: `python -m molmo_assets.sync`.

`dvc repro` and the command line write the same artefacts as Dagster's assets. This reads their manifests and reports
each one that is up to date, and that Dagster does not know in this version, as a materialisation with full provenance,
in topological order. Afterwards no asset is stale that is not. A sensor does it every half minute; a second call
reports nothing.
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg

from molmo_assets import provenance
from molmo_assets.flow import STAGES, Artefact, all_artefacts
from molmo_assets.metadata import describe
from molmo_assets.partitions import params_file
from molmo_model.artifacts import MANIFEST, Manifest, canonical_json
from molmo_model.config import Params, load_params, to_dict
from molmo_model.errors import ArtifactError
from molmo_model.source_digest import source_closure
from pipelines.stage import exit_on_error

REPORTED_BY = "molmo/reported_by"
"""Tag of the events that we report; its value says by what."""


@dataclass
class Report:
    """What one call found."""

    reported: list[str] = field(default_factory=list)
    """Names of the artefacts that are now known to Dagster."""
    out_of_date: dict[str, str] = field(default_factory=dict)
    """Artefacts that lie there, are new to Dagster, and are not what the params would make; with the first reason."""
    finished: bool = True
    """False: time was up; call again."""


def sync(
    instance: dg.DagsterInstance,
    params: Params,
    *,
    chosen: Iterable[Artefact] | None = None,
    emit: Callable[[dg.AssetMaterialization], object] | None = None,
    seconds: float = math.inf,
) -> Report:
    """Reports to Dagster what lies in the workspace.

    Args:
        instance: what Dagster knows.
        params: the params as they are now.
        chosen: the artefacts to look at, in topological order; all by default.
        emit: takes the events; by default they belong to no run.
        seconds: stop after this long; what is reported stays reported.
    """
    emit_to = emit or instance.report_runless_asset_event
    report, until = Report(), time.monotonic() + seconds
    for item in all_artefacts(params) if chosen is None else chosen:
        if time.monotonic() > until:
            report.finished = False
            break
        try:
            manifest = item.manifest()
        except ArtifactError:
            continue  # not made yet, or unfinished
        tags = provenance.tags(item, manifest, instance, params)
        if provenance.same(provenance.recorded_tags(instance, item) or {}, tags):
            continue
        if found := item.differences(params):
            report.out_of_date[item.name] = found[0]
            continue
        emit_to(event(item, manifest, {**tags, REPORTED_BY: "sync"}))
        report.reported.append(item.name)
    return report


def event(item: Artefact, manifest: Manifest, tags: dict[str, str]) -> dg.AssetMaterialization:
    """The materialisation event of one artefact."""
    partition = (
        dg.MultiPartitionKey(item.key) if len(item.key) > 1 and "|" in (item.partition or "") else item.partition
    )
    return dg.AssetMaterialization(item.asset, partition=partition, metadata=describe(item, manifest), tags=tags)


def signature(params: Params) -> str:
    """Changes whenever a manifest, the params or the code has; cheap, reads no file of an artefact."""
    parts = [canonical_json(to_dict(params))]
    parts += [f"{path} {path.stat().st_mtime_ns}" for stage in STAGES.values() for path in source_closure(stage.module)]
    for item in all_artefacts(params):
        try:
            status = (item.path / MANIFEST).stat()
            parts.append(f"{item.name} {status.st_mtime_ns} {status.st_ino}")
        except FileNotFoundError:
            parts.append(item.name)
    return "\n".join(parts)


def sync_and_say(instance: dg.DagsterInstance, say: Callable[[str], object] = print) -> Report:
    """`sync` with the params of the working directory, and a line for each artefact."""
    report = sync(instance, load_params(params_file()))
    for name in report.reported:
        say(f"reported {name}")
    for name, reason in report.out_of_date.items():
        say(f"left out {name}: {reason}")
    say(f"{len(report.reported)} artefacts reported to Dagster, {len(report.out_of_date)} out of date")
    return report


def prepare_home() -> Path:
    """Makes `$DAGSTER_HOME` (default `.dagster`), with this project's `dagster.yaml` when it has none."""
    home = Path(os.environ.setdefault("DAGSTER_HOME", str(Path(".dagster").absolute())))
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "dagster.yaml").exists() and Path("dagster.yaml").exists():
        shutil.copyfile("dagster.yaml", home / "dagster.yaml")
    return home


def main() -> None:
    """The command line; see the module."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(
            f"usage: python -m molmo_assets.sync\n\n{__doc__}\nThe instance is $DAGSTER_HOME's, by default .dagster's."
        )
        return
    with exit_on_error("sync"):
        prepare_home()
        with dg.DagsterInstance.get() as instance:
            sync_and_say(instance)


if __name__ == "__main__":
    main()
