"""Looks at one dataset as a whole: row counts, styles, lengths of answers, sizes of images, dropped and repeated rows,
pictures of evaluation that training shows too.

Reads `artifacts/shards/<dataset>` and writes `artifacts/validation/<dataset>`: `validation.json` and
`image_hashes.parquet` (`molmo_model.data.image_hashes`). Every picture is decoded once. One that is broken, or is not
of the size that the index says, breaks the contract of the shards: listed, and more than the dataset's `tolerance` of
them stop the stage. What is only unusual, by the thresholds of `datasets.<dataset>.expectations`, is a warning and
stops nothing, and so is a near duplicate. Pages to look at come to `artifacts/data_docs/<dataset>/index.html`; they
hold times, so they are a by-product and no artefact.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_model import remembered
from molmo_model.artifacts import file_sha256, verify
from molmo_model.errors import ArtifactError, DataError
from pipelines.stage import Build, Key, Stage, main, state_root

if TYPE_CHECKING:
    from molmo_model.data.image_hashes import Fault
    from molmo_model.data.mixture import Leak
    from molmo_model.data.near_duplicates import NearDuplicate
    from molmo_model.data.shard_reader import ShardReader

DOCS = Path("artifacts/data_docs")
SHOWN_BROKEN = 100
"""Examples that cannot be read, in the message of an error."""
LISTED = 1000
"""Leaks and near duplicates that `validation.json` lists; all are counted."""
SHOWN = 10


def build(build: Build) -> dict[str, Any]:
    """Writes `validation.json`, the hashes and the pages; returns the counts."""
    from pyarrow import parquet

    from molmo_model.data import expectations
    from molmo_model.data.image_hashes import FILE, hash_files
    from molmo_model.data.schemas import check_table
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.data.shards import INDEX

    name, folder = build.key["dataset"], build.inputs["shards"]
    config = build.params.datasets[name]
    reader = ShardReader(folder)
    problems = read_problems(folder)
    missing = sum(bool(problem["known"]) for problem in problems)
    check_table(reader.index, "index", str(folder / INDEX))
    check_table(problems, "problems", str(folder / "problems.jsonl"))
    hashes, faults = hash_files(reader, state_root() / "image_hashes", config.max_image_pixels)
    _check_bytes(folder, reader)
    check_table(hashes, "image_hashes", str(build.out / FILE))
    parquet.write_table(hashes, build.out / FILE, compression="zstd")
    leaks, pairs = _duplicates(name, reader, hashes)
    seen = {leak.eval[1] for leak in leaks} | {pair.eval[1] for pair in pairs}
    frame = expectations.conversations(reader, len(problems), seen)
    results = expectations.validate(frame, name, DOCS / name, config.expectations)
    failed = [result for result in results if not result["success"]]
    document = {
        "dataset": name,
        "success": not failed and not faults,
        "results": results,
        "statistics": expectations.statistics(frame, reader),
        "bad_rows": len(problems) - missing,
        "missing_downloads": missing,
        "faults": [asdict(fault) for fault in faults],
        "leaks": _listed([_leak_json(leak) for leak in leaks]),
        "near_duplicates": _listed([_pair_json(pair) for pair in pairs]),
    }
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (build.out / "validation.json").write_text(text + "\n", encoding="utf-8")
    _warn(name, failed, leaks, pairs)
    _check_faults(name, faults, len(reader), config.tolerance, build.out / "validation.json")
    return {
        "success": document["success"],
        "expectations": len(results),
        "failed": [f"{result['column'] or 'table'}: {result['expectation']}" for result in failed],
        "conversations": len(frame),
        "bad_rows": len(problems) - missing,
        "missing_downloads": missing,
        "pictures": len(hashes),
        "faults": len(faults),
        "leaks": len(leaks),
        "near_duplicates": len(pairs),
    }


def _check_bytes(folder: Path, reader: "ShardReader") -> None:
    """Refuses shards that changed since they were made: pictures whose hashes are remembered are not read again.

    Raises:
        DataError: an example is not what the index says; names it.
        ArtifactError: another file is not what the manifest lists.
    """
    run = remembered.current()
    try:
        verify(folder, "molmo/shards", file_sha256 if run is None else run.sha256)
    except ArtifactError as error:
        broken = [str(problem) for problem in map(partial(_problem, reader), range(len(reader))) if problem]
        if not broken:
            raise
        shown = "".join(f"\n  {one}" for one in broken[:SHOWN_BROKEN])
        more = f"\n  and {len(broken) - SHOWN_BROKEN} more" if len(broken) > SHOWN_BROKEN else ""
        raise DataError(f"{len(broken)} of {len(reader)} examples cannot be read:{shown}{more}") from error


def _problem(reader: "ShardReader", row: int) -> DataError | None:
    """What is wrong with an example's bytes."""
    try:
        reader.members(row)
    except DataError as error:
        return error
    return None


def read_problems(shards: Path) -> list[dict[str, Any]]:
    """The bad rows that the shards stage listed."""
    return [json.loads(line) for line in (shards / "problems.jsonl").read_text(encoding="utf-8").splitlines()]


def _duplicates(name: str, reader: "ShardReader", hashes: Any) -> "tuple[list[Leak], list[NearDuplicate]]":
    """Training examples with a picture of the same dataset's evaluation: the same file, and another that looks it."""
    from molmo_model.data.mixture import image_leaks
    from molmo_model.data.near_duplicates import find_near_duplicates

    ids, files = reader.index["id"].to_pylist(), reader.files()
    train, held_out = ([(name, ids[row], files[row]) for row in reader.rows(split)] for split in ("train", "eval"))
    return image_leaks(train, held_out), find_near_duplicates(train, held_out, hashes)


def _leak_json(leak: "Leak") -> dict[str, Any]:
    return {"train": leak.train[1], "eval": leak.eval[1], "image_sha256": leak.image_sha256}


def _pair_json(pair: "NearDuplicate") -> dict[str, Any]:
    facts = {"distance": pair.distance, "difference": pair.difference}
    return {"train": pair.train[1], "eval": pair.eval[1], **facts}


def _listed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"found": len(rows), "listed": rows[:LISTED]}


def _warn(
    name: str, failed: Sequence[dict[str, Any]], leaks: "Sequence[Leak]", pairs: "Sequence[NearDuplicate]"
) -> None:
    for result in failed:
        what = f"{result['expectation']} of {result['column'] or 'the table'}"
        print(f"warning: {name}: {what}: {result['observed']}; {result['why']}")
    told = [f"train {leak.train} shows the very picture of eval {leak.eval}" for leak in leaks]
    for kind, lines in (("leaks", told), ("near duplicates", [str(pair) for pair in pairs])):
        for line in lines[:SHOWN]:
            print(f"warning: {name}: {line}")
        if len(lines) > SHOWN:
            print(f"warning: {name}: and {len(lines) - SHOWN} more {kind}")


def _check_faults(name: str, faults: "Sequence[Fault]", examples: int, tolerance: float, listed: Path) -> None:
    """Refuses a dataset with too many files that are not what its index says."""
    first = "".join(f"\n  {fault.id!r} {fault.field}: {fault.reason}" for fault in faults[:SHOWN])
    more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    bad = len({fault.id for fault in faults})
    if bad / max(examples, 1) > tolerance:
        raise DataError(
            f"dataset {name!r}: files of {bad} of {examples} examples are not what the shards say, "
            f"datasets.{name}.tolerance allows {tolerance:.2%}; mend the source and run the shards stage again, or "
            f"raise it. All in {listed}:{first}{more}"
        )
    for fault in faults[:SHOWN]:
        print(f"warning: {name}: {fault.id!r} {fault.field} {fault.reason}")


def settings(params: Any, key: Key) -> tuple[str, ...]:
    """What the params hold the dataset to."""
    return tuple(f"datasets.{key['dataset']}.{one}" for one in ("expectations", "tolerance", "max_image_pixels"))


STAGE = Stage(
    name="validate",
    schema="molmo/validation",
    version=2,
    keys=("dataset",),
    out="artifacts/validation/{dataset}",
    params=(),
    more_params=settings,
    build=build,
    partitions=lambda params: [{"dataset": name} for name in params.datasets],
    inputs=lambda params, key: {"shards": f"artifacts/shards/{key['dataset']}"},
)

if __name__ == "__main__":
    main(STAGE)
