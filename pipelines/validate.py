"""Looks at one dataset as a whole: row counts, styles, lengths of answers, sizes of images, dropped and repeated rows.

Reads `artifacts/shards/<dataset>` and writes `artifacts/validation/<dataset>/validation.json`. What is unusual is a
warning there and in the output, and stops nothing; broken rows have already stopped the shards. Pages to look at come
to `artifacts/data_docs/<dataset>/index.html`; they hold times, so they are a by-product and no artefact.
"""

import json
from pathlib import Path
from typing import Any

from pipelines.stage import Build, Stage, main

DOCS = Path("artifacts/data_docs")


def build(build: Build) -> dict[str, Any]:
    """Writes `validation.json` and the pages; returns the counts."""
    from molmo_model.data import expectations
    from molmo_model.data.schemas import check_table
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.data.shards import INDEX

    name, folder = build.key["dataset"], build.inputs["shards"]
    reader = ShardReader(folder)
    problems = _problems(folder / "problems.jsonl")
    check_table(reader.index, "index", str(folder / INDEX))
    check_table(problems, "problems", str(folder / "problems.jsonl"))
    frame = expectations.conversations(reader, len(problems))
    results = expectations.validate(frame, name, DOCS / name)
    failed = [result for result in results if not result["success"]]
    document = {
        "dataset": name,
        "success": not failed,
        "results": results,
        "statistics": expectations.statistics(frame, reader),
        "bad_rows": len(problems),
    }
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (build.out / "validation.json").write_text(text + "\n", encoding="utf-8")
    for result in failed:
        what = f"{result['expectation']} of {result['column'] or 'the table'}"
        print(f"warning: {name}: {what}: {result['observed']}; {result['why']}")
    return {
        "success": not failed,
        "expectations": len(results),
        "failed": [f"{result['column'] or 'table'}: {result['expectation']}" for result in failed],
        "conversations": len(frame),
        "bad_rows": len(problems),
    }


def _problems(path: Path) -> list[dict[str, Any]]:
    """The bad rows that the shards stage listed."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


STAGE = Stage(
    name="validate",
    schema="molmo/validation",
    version=1,
    keys=("dataset",),
    out="artifacts/validation/{dataset}",
    params=(),
    build=build,
    partitions=lambda params: [{"dataset": name} for name in params.datasets],
    inputs=lambda params, key: {"shards": f"artifacts/shards/{key['dataset']}"},
)

if __name__ == "__main__":
    main(STAGE)
