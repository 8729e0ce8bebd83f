"""Resolves the mixture of a run: rates, sizes, the cost of every draw, and how full the packs will be.

Joins the shards of the run's datasets with what its model's preprocessor says that each example costs (no pixel is
looked at) and writes `artifacts/mixture/<run>`: `mixture.json` (entries with rates that sum to 1, digests of the
shards, fill of the packs), `costs.arrow`, `schedule.parquet` and the packs, from which training finds any step at once.
Refuses a run whose training rows show a picture of the evaluation rows, its own datasets' or any task's, but for those
that `runs.<run>.allow_leaks` accepts by id; with `runs.<run>.leaks: drop` it leaves the others out instead. Refuses a
run that draws an example too large for a pack.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.stage import Build, Key, Stage, main

if TYPE_CHECKING:
    from molmo_model.data.example import Example
    from molmo_model.data.mixture import ExampleCost, Mixture
    from molmo_model.data.near_duplicates import NearDuplicate
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.preprocessing.preprocessor import Preprocessor

HASHES = Path("artifacts/validation")
"""Where the validate stage puts the hashes of pictures, by dataset."""
SHOWN = 10
"""Near duplicates that are told."""


def build(build: Build) -> dict[str, Any]:
    """Writes the mixture; returns rates, sizes, epochs and fill."""
    from tqdm import tqdm

    from molmo_model.config import LeakRule, drawn_datasets
    from molmo_model.data.mixture import check_leaks, described_leaks, leaks_to_drop, map_table, resolve
    from molmo_model.data.plan import Plan, plan_packs
    from molmo_model.data.schemas import check_table
    from molmo_model.data.shard_reader import ShardReader, read_columns
    from molmo_model.preprocessing.preprocessor import Preprocessor

    run = build.params.runs[build.key["run"]]
    readers = {
        name: ShardReader(build.inputs[f"shards/{name}"]) for name in drawn_datasets(build.params, build.key["run"])
    }
    asked = {name: ShardReader(build.inputs[f"shards/{name}"]) for name in asked_datasets(build.params)}
    drop = run.leaks is LeakRule.drop
    dropped = described_leaks(leaks_to_drop(run.mixture, asked | readers, run.allow_leaks) if drop else [])
    left_out = {(example["dataset"], example["id"]) for example in dropped}
    preprocessor = Preprocessor.from_pretrained(build.inputs["model"] / "step-000000")
    with tqdm(desc=f"costs {build.key['run']}", unit=" examples", delay=2, mininterval=1) as bar:
        cost_of = _counted(_cost_of(preprocessor), bar.update)
        mixture = resolve(run.mixture, build.params.seed, readers, cost_of, run.schedule, left_out)
    leaks = check_leaks(mixture, asked | readers, run.allow_leaks)
    _tell(build.key["run"], *near_duplicates(mixture, asked | readers))
    mixture.info["shards"] = {name: reader.digest for name, reader in readers.items()}
    mixture.info["allowed_leaks"] = [leak.train[1] for leak in leaks]
    mixture.info["dropped_leaks"] = dropped
    packs = run.train.steps * run.train.packs_per_step
    with tqdm(total=packs, desc=f"packs {build.key['run']}", unit=" packs", delay=2, mininterval=1) as bar:
        mixture = plan_packs(Plan.of(mixture, readers, run.train), packs, lambda done: bar.update(done - bar.n))
    mixture.save(build.out, {name: reader.index["id"].to_pylist() for name, reader in readers.items()})
    costs = build.out / "costs.arrow"
    check_table(map_table(costs), "costs", str(costs))
    for table in ("schedule", "packs"):
        check_table(read_columns(build.out / f"{table}.parquet"), table, str(build.out / f"{table}.parquet"))
    packing = mixture.info["packing"]
    period = sum(entry.share for entry in mixture.entries)
    return {
        "rates": {entry.name: entry.share / period for entry in mixture.entries},
        "examples": {entry.name: len(entry.rows) for entry in mixture.entries},
        "conversations": {entry.name: len(entry.conversations) for entry in mixture.entries},
        "schedule": str(run.schedule),
        "epochs": packing["epochs"],
        "packs": packs,
        "examples_per_pack": packing["examples_per_pack"],
        "token_fill": packing["token_fill"],
        "crop_fill": packing["crop_fill"],
        "longest_example": packing["longest_example"],
        "allowed_leaks": len(leaks),
        "dropped_leaks": len(dropped),
    }


def _cost_of(preprocessor: "Preprocessor") -> "Callable[[Example], ExampleCost]":
    from molmo_model.data.mixture import ExampleCost

    def cost_of(example: "Example") -> "ExampleCost":
        sizes = [(image.width, image.height) for image in example.images]
        cost = preprocessor.cost_parts(sizes, example.conversations, example.id, example.videos)
        return ExampleCost(cost.prefix, cost.crops, cost.branches)

    return cost_of


def _counted(
    cost_of: "Callable[[Example], ExampleCost]", update: Callable[[int], object]
) -> "Callable[[Example], ExampleCost]":
    def counted(example: "Example") -> "ExampleCost":
        update(1)
        return cost_of(example)

    return counted


def asked_datasets(params: Any) -> list[str]:
    """The datasets that any task asks, once each: none of their evaluation pictures may be trained on."""
    return sorted({task.dataset for task in params.tasks.values()})


def near_duplicates(
    mixture: "Mixture", readers: "Mapping[str, ShardReader]"
) -> "tuple[list[NearDuplicate], list[str]]":
    """Training pictures that look like evaluation's, as far as the validate stage has hashed them, and the datasets
    that it has not. No input of the mixture: they are told, and nothing depends on them."""
    from molmo_model.data.mixture import two_sides
    from molmo_model.data.near_duplicates import find_in_artefacts

    return find_in_artefacts(*two_sides(mixture, readers), HASHES)


def _tell(run: str, pairs: "list[NearDuplicate]", unknown: list[str]) -> None:
    for pair in pairs[:SHOWN]:
        print(f"warning: run {run}: {pair}")
    if len(pairs) > SHOWN:
        print(f"warning: run {run}: and {len(pairs) - SHOWN} more near duplicates")
    if unknown:
        print(f"run {run}: not looked for near duplicates in {', '.join(unknown)}; python -m pipelines.validate does")


def inputs(params: Any, key: Key) -> dict[str, str]:
    """The shards of the mixture's datasets and, for leaks, of all tasks'; the model's folder for its preprocessor."""
    from molmo_model.config import drawn_datasets, model_of

    names = sorted({*drawn_datasets(params, key["run"]), *asked_datasets(params)})
    shards = {f"shards/{name}": f"artifacts/shards/{name}" for name in names}
    return {**shards, "model": f"artifacts/checkpoints/{model_of(params, key['run'])}"}


STAGE = Stage(
    name="mixture",
    schema="molmo/mixture",
    version=2,
    keys=("run",),
    out="artifacts/mixture/{run}",
    params=(
        "seed",
        "runs.{run}.mixture",
        "runs.{run}.allow_leaks",
        "runs.{run}.leaks",
        # what decides the packs, and how many of them there are
        "runs.{run}.train.steps",
        "runs.{run}.train.packs_per_step",
        "runs.{run}.train.sequence_length",
        "runs.{run}.train.crops_per_pack",
        "runs.{run}.train.packing_window",
        "runs.{run}.train.packing",
        "runs.{run}.schedule",
    ),
    build=build,
    partitions=lambda params: [{"run": name} for name in params.runs],
    inputs=inputs,
)

if __name__ == "__main__":
    main(STAGE)
