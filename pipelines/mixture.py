"""Resolves the mixture of a run: rates, sizes, the cost of every draw, and how full the packs will be.

Joins the shards of the run's datasets with what its model's preprocessor says that each example costs (no pixel is
looked at) and writes `artifacts/mixture/<run>`: `mixture.json` (entries with rates that sum to 1, digests of the
shards, fill of the packs), `costs.parquet`, `schedule.parquet` and `packs.parquet`, from which training finds any step
at once. Refuses a run whose training rows show a picture of the evaluation rows, and one that draws an example too
large for a pack.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipelines.stage import Build, Key, Stage, main

if TYPE_CHECKING:
    from molmo_model.data.example import Example
    from molmo_model.data.mixture import ExampleCost
    from molmo_model.preprocessing.preprocessor import Preprocessor


def build(build: Build) -> dict[str, Any]:
    """Writes the mixture; returns rates, sizes, epochs and fill."""
    from pyarrow import parquet
    from tqdm import tqdm

    from molmo_model.data.mixture import check_leaks, resolve
    from molmo_model.data.plan import Plan, plan_packs
    from molmo_model.data.schemas import check_table
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.preprocessing.preprocessor import Preprocessor

    run = build.params.runs[build.key["run"]]
    readers = {name: ShardReader(build.inputs[f"shards/{name}"]) for name in _datasets(build.params, build.key)}
    preprocessor = Preprocessor.from_pretrained(build.inputs["model"] / "step-000000")
    with tqdm(desc=f"costs {build.key['run']}", unit=" examples", delay=2, mininterval=1) as bar:
        mixture = resolve(run.mixture, build.params.seed, readers, _counted(_cost_of(preprocessor), bar.update))
    leaks = check_leaks(mixture, readers)
    mixture.info["shards"] = {name: reader.digest for name, reader in readers.items()}
    mixture.info["allowed_leaks"] = [leak.train[1] for leak in leaks]
    packs = run.train.steps * run.train.packs_per_step
    with tqdm(total=packs, desc=f"packs {build.key['run']}", unit=" packs", delay=2, mininterval=1) as bar:
        mixture = plan_packs(Plan.of(mixture, readers, run.train), packs, lambda done: bar.update(done - bar.n))
    mixture.save(build.out, {name: reader.index["id"].to_pylist() for name, reader in readers.items()})
    costs = build.out / "costs.parquet"
    check_table(parquet.read_table(costs), "costs", str(costs))
    packing = mixture.info["packing"]
    period = sum(entry.share for entry in mixture.entries)
    return {
        "rates": {entry.name: entry.share / period for entry in mixture.entries},
        "examples": {entry.name: len(entry.rows) for entry in mixture.entries},
        "conversations": {entry.name: len(entry.conversations) for entry in mixture.entries},
        "epochs": packing["epochs"],
        "packs": packs,
        "examples_per_pack": packing["examples_per_pack"],
        "token_fill": packing["token_fill"],
        "crop_fill": packing["crop_fill"],
        "longest_example": packing["longest_example"],
        "allowed_leaks": len(leaks),
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


def _datasets(params: Any, key: Key) -> list[str]:
    """The datasets of a run's mixture, once each."""
    return sorted({entry.dataset for entry in params.runs[key["run"]].mixture.values()})


def inputs(params: Any, key: Key) -> dict[str, str]:
    """The shards of the mixture's datasets, and the model's folder for its preprocessor."""
    from molmo_model.config import model_of

    shards = {f"shards/{name}": f"artifacts/shards/{name}" for name in _datasets(params, key)}
    return {**shards, "model": f"artifacts/checkpoints/{model_of(params, key['run'])}"}


STAGE = Stage(
    name="mixture",
    schema="molmo/mixture",
    version=1,
    keys=("run",),
    out="artifacts/mixture/{run}",
    params=(
        "seed",
        "runs.{run}.mixture",
        # what decides the packs, and how many of them there are
        "runs.{run}.train.steps",
        "runs.{run}.train.packs_per_step",
        "runs.{run}.train.sequence_length",
        "runs.{run}.train.crops_per_pack",
        "runs.{run}.train.packing_window",
    ),
    build=build,
    partitions=lambda params: [{"run": name} for name in params.runs],
    inputs=inputs,
)

if __name__ == "__main__":
    main(STAGE)
