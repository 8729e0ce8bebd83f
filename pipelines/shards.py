"""Makes the shards of one dataset: tar files with the original images and the examples, and an index.

Reads what the dataset's family reads and writes `artifacts/shards/<dataset>`: `shards-*.tar` (plain tar, readable by
WebDataset), `index.parquet` (one row per example: place, hash, sizes, styles) and `problems.jsonl` (one line per bad
row: file, line, id, field, reason). Bad rows are skipped up to the dataset's `tolerance`, a share of all rows; one more
and the stage fails and lists them.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from molmo_model.errors import DataError
from pipelines.stage import Build, Key, Stage, main

if TYPE_CHECKING:
    from molmo_model.data.example import BadRow, Example

SHOWN_PROBLEMS = 10
"""Bad rows in the message of a failed build; all of them are in its `problems.jsonl`."""


def build(build: Build) -> dict[str, Any]:
    """Writes shards, index and problems; returns the counts."""
    from molmo_model.data.datasets import family_of
    from molmo_model.data.schemas import check_table
    from molmo_model.data.shards import write_shards

    name = build.key["dataset"]
    config = build.params.datasets[name]
    family = family_of(config)
    problems: list[BadRow] = []
    rows = _good(family.make(config, build.params.seed), problems)
    index = write_shards(_progress(rows, f"shards {name}"), build.out, config.shard_bytes, scratch=build.work)
    lines = [json.dumps(asdict(bad), ensure_ascii=False, sort_keys=True) + "\n" for bad in problems]
    (build.out / "problems.jsonl").write_text("".join(lines), encoding="utf-8")
    faults = [bad for bad in problems if not bad.known]
    _check_tolerance(name, index.num_rows, faults, config.tolerance, str(build.out / "problems.jsonl"))
    check_table(index, "index", str(build.out / "index.parquet"))
    splits = Counter(index["split"].to_pylist())
    styles = Counter(style for row in index["styles"].to_pylist() for style in row)
    return {
        "examples": {split: splits[split] for split in ("train", "eval")},
        "conversations": dict(sorted(styles.items())),
        "images": sum(index["n_images"].to_pylist()),
        "bytes": sum(index["size"].to_pylist()),
        "shards": len(set(index["shard"].to_pylist())),
        "bad_rows": len(faults),
        "missing_downloads": len(problems) - len(faults),
        "licence": family.licence,
        "source": family.source,
    }


def _good(rows: "Iterable[tuple[str, Example | BadRow]]", problems: "list[BadRow]") -> "Iterator[tuple[str, Example]]":
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


def _progress(rows: "Iterable[tuple[str, Example]]", title: str) -> "Iterable[tuple[str, Example]]":
    """The rows, with a bar on stderr once they take longer than a few seconds."""
    from tqdm import tqdm

    return tqdm(rows, desc=title, unit=" examples", delay=2, mininterval=1)


def fingerprints(params: Any, key: Key) -> dict[str, str]:
    """Digests of the data that the family reads."""
    from molmo_model.data.datasets import family_of

    config = params.datasets[key["dataset"]]
    return family_of(config).fingerprint(config, params.seed)


STAGE = Stage(
    name="shards",
    schema="molmo/shards",
    version=1,
    keys=("dataset",),
    out="artifacts/shards/{dataset}",
    params=("seed", "datasets.{dataset}"),
    build=build,
    partitions=lambda params: [{"dataset": name} for name in params.datasets],
    fingerprints=fingerprints,
)

if __name__ == "__main__":
    main(STAGE)
