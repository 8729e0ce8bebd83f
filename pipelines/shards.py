"""Makes the shards of one dataset: tar files with the original images and the examples, and an index.

Reads what the dataset's family reads and writes `artifacts/shards/<dataset>`: `shards-*.tar` (plain tar, readable by
WebDataset), `index.parquet` (one row per example: place, hash, sizes, styles) and `problems.jsonl` (one line per bad
row: file, line, id, field, reason). Bad rows are skipped up to the dataset's `tolerance`, a share of all rows; one more
and the stage fails and lists them.

The last artefact of the dataset is taken from, whatever it was made from: shards whose rows did not change are hard
links to its files, and families that remember their rows (`chat`) read only those that changed. The bytes are those of
a full build.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from molmo_model import remembered
from molmo_model.errors import DataError
from pipelines.stage import Build, Key, Stage, main

if TYPE_CHECKING:
    import pyarrow

    from molmo_model.data.example import BadRow, Example, Unchanged
    from molmo_model.data.previous_shards import PreviousShards

SHOWN_PROBLEMS = 10
"""Bad rows in the message of a failed build; all of them are in its `problems.jsonl`."""


def build(build: Build) -> dict[str, Any]:
    """Writes shards, index and problems, as far as the previous artefact does not have them; returns the counts."""
    from molmo_model.data.datasets import family_of, revision_of
    from molmo_model.data.previous_shards import DamagedShard

    while True:
        previous = _previous(build)
        try:
            index, problems = _write(build, previous)
            break
        except DamagedShard as error:  # it was believed unread; now it is read, found out and left alone
            run = remembered.current()
            if run is not None:
                run.forget(error.path)
            print(f"shards: {error}; its rows are made again from their source", file=sys.stderr)
    name = build.key["dataset"]
    config = build.params.datasets[name]
    family = family_of(config)
    lines = [json.dumps(asdict(bad), ensure_ascii=False, sort_keys=True) + "\n" for bad in problems]
    (build.out / "problems.jsonl").write_text("".join(lines), encoding="utf-8")
    faults = [bad for bad in problems if not bad.known]
    _check_tolerance(name, index.num_rows, faults, config.tolerance, str(build.out / "problems.jsonl"))
    _check_index(build, index, previous)
    splits = _counts(index["split"])
    return {
        "examples": {split: splits.get(split, 0) for split in ("train", "eval")},
        "conversations": dict(sorted(_counts(index["styles"].combine_chunks().flatten()).items())),
        "images": sum(index["n_images"].to_pylist()),
        "bytes": sum(index["size"].to_pylist()),
        "shards": len(_counts(index["shard"])),
        "bad_rows": len(faults),
        "missing_downloads": len(problems) - len(faults),
        "licence": family.licence,
        "source": family.source,
        "revision": revision_of(config),
        "card": family.card,
    }


def _write(build: Build, previous: "PreviousShards | None") -> "tuple[pyarrow.Table, list[BadRow]]":
    """The shards and their index; returns it, and the bad rows."""
    from molmo_model.data.datasets import family_of
    from molmo_model.data.shards import write_shards

    name = build.key["dataset"]
    config, seed = build.params.datasets[name], build.params.seed
    family = family_of(config)
    problems: list[BadRow] = []
    memory = None if family.memory is None else family.memory(config)
    if memory is None or family.remake is None:
        rows: Iterable[tuple[str, Example | BadRow | Unchanged]] = family.make(config, seed)
    else:
        memory.previous = previous
        rows = family.remake(config, seed, memory)
    good = _progress(_good(rows, problems), f"shards {name}")
    index = write_shards(good, build.out, config.shard_bytes, scratch=build.work, previous=previous)
    if memory is not None:
        memory.save(index)
    return index, problems


def _previous(build: Build) -> "PreviousShards | None":
    """The previous artefact, if it can be trusted: its files must be those that its manifest lists."""
    from molmo_model.artifacts import file_sha256
    from molmo_model.data.previous_shards import PreviousShards
    from molmo_model.errors import ArtifactError

    if build.previous is None:
        return None
    run = remembered.current()
    try:
        return PreviousShards(build.previous, file_sha256 if run is None else run.sha256)
    except ArtifactError as error:
        print(f"shards: all are made anew, because {error}", file=sys.stderr)
        return None


def _check_index(build: Build, index: "pyarrow.Table", previous: "PreviousShards | None") -> None:
    """Checks the contract of the index. Rows that the same code wrote, and checked, in the previous artefact are not
    checked again; that ids are unique and ranges lie side by side, the writer sees to for all."""
    from pyarrow import compute

    from molmo_model.data.schemas import check_table

    if previous is not None and previous.manifest.code == build.stamp["code"]:
        index = index.filter(compute.invert(compute.is_in(index["sha256"], previous.index["sha256"])))
    if previous is None or index.num_rows:
        check_table(index, "index", str(build.out / "index.parquet"))


def _counts(column: "pyarrow.ChunkedArray") -> dict[str, int]:
    """How often each value stands there."""
    return {str(one["values"]): int(one["counts"]) for one in column.value_counts().to_pylist()}


def _good(
    rows: "Iterable[tuple[str, Example | BadRow | Unchanged]]", problems: "list[BadRow]"
) -> "Iterator[tuple[str, Example | Unchanged]]":
    """The examples among the rows; bad rows go to `problems`."""
    from molmo_model.data.example import BadRow

    for split, row in rows:
        if isinstance(row, BadRow):
            problems.append(row)
        else:
            yield split, row


def _check_tolerance(name: str, good: int, problems: "list[BadRow]", tolerance: float, listed: str) -> None:
    """Refuses a dataset with too many bad rows, or with none at all."""
    total = good + len(problems)
    first = "".join(
        f"\n  {bad.file}:{bad.line} id {bad.id!r} field {bad.field}: {bad.reason}" for bad in problems[:SHOWN_PROBLEMS]
    )
    more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    if problems and len(problems) / total > tolerance:  # 0.29 * 100 is less than 29, but 29 / 100 is 0.29
        raise DataError(
            f"dataset {name!r}: {len(problems)} of {total} rows are bad ({len(problems) / total:.2%}), "
            f"datasets.{name}.tolerance allows {tolerance:.2%}; mend them or raise it. All in {listed}:{first}{more}"
        )
    if not good:
        raise DataError(f"dataset {name!r} is empty; check datasets.{name} in the params")


def _progress(
    rows: "Iterable[tuple[str, Example | Unchanged]]", title: str
) -> "Iterable[tuple[str, Example | Unchanged]]":
    """The rows, with a bar on stderr once they take longer than a few seconds."""
    from tqdm import tqdm

    return tqdm(rows, desc=title, unit=" examples", delay=2, mininterval=1)


def fingerprints(params: Any, key: Key) -> dict[str, str]:
    """Digests of the data that the family reads."""
    from molmo_model.data.datasets import family_of

    config = params.datasets[key["dataset"]]
    return family_of(config).fingerprint(config, params.seed)


def settings(params: Any, key: Key) -> tuple[str, ...]:
    """All that the params say of the dataset, but for what its statistics are held to: that changes no shard."""
    from dataclasses import fields

    from molmo_model.config import DatasetConfig

    return tuple(f"datasets.{key['dataset']}.{one.name}" for one in fields(DatasetConfig) if one.name != "expectations")


STAGE = Stage(
    name="shards",
    schema="molmo/shards",
    version=1,
    keys=("dataset",),
    out="artifacts/shards/{dataset}",
    params=("seed",),
    more_params=settings,
    build=build,
    partitions=lambda params: [{"dataset": name} for name in params.datasets],
    fingerprints=fingerprints,
    incremental=True,
)

if __name__ == "__main__":
    main(STAGE)
