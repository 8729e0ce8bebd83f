"""Training over examples that turn out bad, and from shards that lie elsewhere."""

import contextlib
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from molmo_model import storage
from molmo_model.config import load_params
from molmo_model.data.plan import Plan
from molmo_model.data.shard_reader import ShardReader
from molmo_model.errors import DataError
from molmo_model.train.metrics_log import read_metrics
from pipelines.stage import stamp
from pipelines.train import STAGE

SHARDS = Path("artifacts/shards/digit_scenes")
SHORT = ("runs.go.train.steps=4", "runs.go.train.save_every=2")


def corrupt(rows: list[int]) -> list[str]:
    """Flips a byte in the picture of each row; returns their ids."""
    reader = ShardReader(SHARDS)
    for row in reader.index.take(rows).to_pylist():
        path = SHARDS / row["shard"]
        data = bytearray(path.read_bytes())
        data[row["offset"] + row["text_size"] + 600] ^= 1
        path.unlink()  # it may be a hard link
        path.write_bytes(bytes(data))
    return [reader.id(row) for row in rows]


def drawn(*overrides: str) -> list[tuple[int, int, int]]:
    """(step, pack, row) of everything that a run of four steps draws, in order."""
    train = load_params("params.yaml", overrides).runs["go"].train
    plan = Plan.load("artifacts/mixture/go", {"digit_scenes": SHARDS}, train)
    packs = range(4 * train.packs_per_step)
    return [(1 + pack // train.packs_per_step, pack, draw.row) for pack in packs for draw in plan.pack(pack)]


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_bad_examples_end_a_training_unless_it_tolerates_them(make_trainer: Any) -> None:
    order = drawn(*SHORT)
    bad = {order[0][2], order[-1][2]}
    ids = corrupt(sorted(bad))
    with pytest.raises(DataError, match=rf"'({ids[0]}|{ids[1]})' of dataset 'digit_scenes'.*SHA-256"):
        make_trainer(*SHORT).fit(0)

    expected = [one for one in order if one[2] in bad]
    share = len(expected) / len(order)
    trainer = make_trainer(*SHORT, f"runs.go.train.bad_examples={share + 0.02}", name="b")
    assert trainer.fit(0) == 4
    found = lines("b/work/skipped.jsonl")
    assert [(one["step"], one["pack"], one["row"]) for one in found] == expected
    assert {(one["dataset"], one["id"]) for one in found} == {("digit_scenes", name) for name in ids}
    assert all("SHA-256" in one["reason"] for one in found)
    for metrics in read_metrics(Path("b/work/metrics.jsonl")):
        of_step = [one for one in order if one[0] == metrics["step"]]
        skipped = sum(one in expected for one in of_step)
        assert (metrics["skipped"], metrics["examples"]) == (skipped, len(of_step) - skipped)

    # going on from step 2 finds the same ones again, and gives the same numbers
    whole = Path("b/work/skipped.jsonl").read_text(), Path("b/work/metrics.jsonl").read_text()
    again = make_trainer(
        *SHORT, f"runs.go.train.bad_examples={share + 0.02}", name="b", resume=Path("b/out/step-000002").resolve()
    )
    assert all(one["step"] <= 2 for one in lines("b/work/skipped.jsonl"))
    assert again.fit(2) == 4
    assert (Path("b/work/skipped.jsonl").read_text(), Path("b/work/metrics.jsonl").read_text()) == whole

    with pytest.raises(DataError, match=r"bad examples up to step \d; train.bad_examples allows 0\.1000% of the run's"):
        make_trainer(*SHORT, "runs.go.train.bad_examples=0.001", name="c").fit(0)
    assert lines("c/work/skipped.jsonl")[0]["row"] in bad


def test_a_step_with_emptied_packs_keeps_its_loss_divisor(make_trainer: Any) -> None:
    order = drawn(*SHORT)
    kept_pack = 1
    keep = {row for _, pack, row in order if pack == kept_pack}
    corrupt(sorted({row for step, _, row in order if step == 1} - keep))
    tolerant = (*SHORT, "runs.go.train.bad_examples=0.99")
    trainer = make_trainer(*tolerant)
    batches = trainer.batches.step(1)
    counts = trainer._count(batches)
    filled = [batch for batch in batches if bool((batch["example_ids"] >= 0).any())]
    assert len(batches) == 3 and counts["skipped"] > 0
    weight = sum(float(batch["loss_weights"][batch["labels"] >= 0].sum()) for batch in filled)
    loss = sum(float(trainer.model(**batch, use_cache=False).loss_sum.detach()) for batch in filled)
    metrics = trainer._optimize(1, batches, counts)  # the emptied ones go through the model too, for nothing
    assert metrics.weight == pytest.approx(weight) and metrics.loss == pytest.approx(loss / weight, rel=1e-5)
    assert metrics.examples == sum(int(batch["example_ids"].max()) + 1 for batch in filled)


def test_shards_in_a_bucket_give_the_same_training(make_trainer: Any) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    storage.copy_tree(SHARDS, f"{root}/digit_scenes")
    trainer = make_trainer(*SHORT)
    trainer.fit(0)
    local = stamp(STAGE, load_params(), {"run": "go"})
    away = [f"runtime.shards_root={root}", "runtime.shard_cache=cache"]
    assert stamp(STAGE, load_params("params.yaml", away), {"run": "go"}) == local  # one identity, so it is up to date
    with contextlib.suppress(FileNotFoundError):
        SHARDS.rename("elsewhere")  # nothing of it is needed here
    make_trainer(*SHORT, *away, name="b").fit(0)
    assert Path("b/work/metrics.jsonl").read_text() == Path("a/work/metrics.jsonl").read_text()
    assert list(Path("cache").glob("??/*")) and not Path("b/work/skipped.jsonl").exists()


@pytest.mark.slow
def test_two_ranks_skip_what_one_skips(make_trainer: Any, start_training: Any) -> None:
    order = drawn(*SHORT)
    corrupt([order[3][2]])
    tolerant = (*SHORT, "runs.go.train.bad_examples=0.5")
    make_trainer(*tolerant).fit(0)
    process = start_training(Path.cwd(), *tolerant, "runtime.loader_workers=1")
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    folder = Path("artifacts/checkpoints/go")
    skipped = (folder / "skipped.jsonl").read_text()
    assert skipped == Path("a/work/skipped.jsonl").read_text() != ""
    ones, twos = read_metrics(Path("a/work/metrics.jsonl")), read_metrics(folder / "metrics.jsonl")
    for one, two in zip(ones, twos, strict=True):
        assert (one["skipped"], one["examples"], one["weight"]) == (two["skipped"], two["examples"], two["weight"])
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    summary = json.loads((folder / "manifest.json").read_text())["summary"]
    assert summary["skipped_examples"] == len(skipped.splitlines())
