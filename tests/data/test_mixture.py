import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from molmo_assets import flow
from molmo_assets.checks import RULES
from molmo_assets.metadata import describe
from molmo_model.artifacts import write_manifest
from molmo_model.config import DatasetConfig, LeakRule, MixtureEntry, Params, RunConfig, TaskConfig
from molmo_model.data.loader import generator
from molmo_model.data.mixture import Leak, Mixture, check_leaks, image_leaks, leaks_to_drop, map_table, resolve
from molmo_model.data.near_duplicates import NearDuplicate
from molmo_model.data.plan import Plan, plan_packs
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.errors import ArtifactError, ConfigError, DataError
from molmo_model.model_config import ModelConfig, PreprocessingConfig
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.tokenizer import load_tokenizer
from pipelines import mixture as mixture_stage
from pipelines.stage import run
from tests.data.builders import cost_of, example, make_mixture, make_plan, rows, train_config


@pytest.fixture
def plan(tmp_path):
    return make_plan(tmp_path)


def saved(plan: Plan, folder: Path, packs: int = 50) -> Mixture:
    folder.mkdir(exist_ok=True)
    mixture = plan_packs(plan, packs)
    mixture.info["shards"] = {}
    mixture.save(folder, {name: reader.index["id"].to_pylist() for name, reader in plan.readers.items()})
    return mixture


def test_entries_hold_the_training_rows_that_have_their_styles(plan):
    by_name = {entry.name: entry for entry in plan.mixture.entries}
    assert list(by_name) == ["single", "styled", "whole"]  # sorted: their order in the file does not matter
    d0, d1 = plan.readers["d0"], plan.readers["d1"]
    assert by_name["whole"].rows.tolist() == by_name["single"].rows.tolist() == d0.rows("train")
    kept = [row for row in d1.rows("train") if {"qa", "count"} & {c.style for c in d1.read(row).conversations}]
    assert by_name["styled"].rows.tolist() == kept
    assert 0 < len(kept) < len(d1.rows("train"))


def test_what_a_rate_means(plan):
    # counted in examples, whatever the sizes: of 1,000 draws 500, 300 and 200
    drawn = Counter(draw.entry for draw in plan.mixture.draws(range(1000)))
    assert drawn == {"whole": 500, "styled": 300, "single": 200}


def test_costs_are_those_of_the_conversations_drawn(plan):
    tokens, crops = plan.mixture.costs_at(40, 300)
    draws = plan.mixture.draws(range(40, 340))
    for i, draw in enumerate(draws):
        one = plan.read(draw)
        cost = cost_of(one)
        expected = cost.tokens + sum(cost.conversations[number] for number in draw.conversations)
        assert (draw.tokens, draw.crops) == (tokens[i], crops[i]) == (expected, cost.crops)
        styles = [one.conversations[number].style for number in draw.conversations]
        assert len(set(draw.conversations)) == len(draw.conversations)
        if draw.entry == "whole":
            assert sorted(draw.conversations) == list(range(len(one.conversations)))
        if draw.entry == "single":
            assert len(draw.conversations) == 1
        if draw.entry == "styled":
            wanted = [number for number, c in enumerate(one.conversations) if c.style in ("qa", "count")]
            assert sorted(draw.conversations) == wanted and "caption" not in styles


def test_conversations_are_drawn_evenly_and_in_changing_order(plan):
    single = [d for d in plan.mixture.draws(range(8000)) if d.entry == "single"]
    of_four = Counter(d.conversations[0] for d in single if len(plan.read(d).conversations) == 4)
    assert sorted(of_four) == [0, 1, 2, 3]
    assert max(of_four.values()) / min(of_four.values()) < 1.5
    whole = [d for d in plan.mixture.draws(range(2000)) if d.entry == "whole" and len(d.conversations) == 2]
    orders = Counter(d.conversations for d in whole)
    assert 0.7 < orders[0, 1] / orders[1, 0] < 1.4


def test_a_draw_alone_equals_a_draw_among_others(plan):
    positions = [900, 3, 77, 3, 12_345_678]
    assert plan.mixture.draws(positions) == [plan.mixture.draws([n])[0] for n in positions]
    for n in positions:
        position, draw = plan.mixture.order.example_at(n), plan.mixture.draws([n])[0]
        assert (position.entry, position.dataset, position.row) == (draw.entry, draw.dataset, draw.row)
        assert (position.epoch, position.draw) == (draw.epoch, draw.key)


def test_a_saved_mixture_is_the_same_mixture(plan, tmp_path):
    saved(plan, tmp_path / "mix")
    loaded = Mixture.load(tmp_path / "mix")
    assert loaded.draws(range(500)) == plan.mixture.draws(range(500))
    again = Plan.of(loaded, plan.readers, train_config())
    assert [again.pack(p) for p in range(49, -1, -1)] == [plan.pack(p) for p in range(49, -1, -1)]
    document = json.loads((tmp_path / "mix" / "mixture.json").read_text())
    assert sum(entry["rate"] for entry in document["entries"]) == pytest.approx(1, abs=1e-12)
    assert [entry["rate"] for entry in document["entries"]] == [0.2, 0.3, 0.5]
    ids = map_table(tmp_path / "mix" / "costs.arrow")["id"].to_pylist()
    assert ids[0] == "d0-1" and len(ids) == sum(len(entry.rows) for entry in plan.mixture.entries)


def test_two_builds_write_the_same_bytes(plan, tmp_path):
    def digest(folder: Path) -> str:
        return write_manifest(folder, schema="x", version=1, params={}, inputs={}, code="", summary={}).digest

    saved(plan, tmp_path / "a")
    saved(make_plan(tmp_path), tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    saved(make_plan(tmp_path, seed=8), tmp_path / "c")
    assert digest(tmp_path / "c") != digest(tmp_path / "a")


def test_planned_counts_spare_replaying_and_say_how_full_the_packs_are(plan, tmp_path):
    mixture = saved(plan, tmp_path / "mix", packs=53)
    packing = mixture.info["packing"]
    whole = [plan.pack(p) for p in range(53)]
    assert (packing["packs"], packing["examples"]) == (53, sum(map(len, whole)))
    assert packing["planned_packs"] == sum(mixture.planned.counts) == 60  # of whole windows
    assert packing["examples_per_pack"] == pytest.approx(packing["examples"] / 53, abs=1e-4)
    assert packing["token_fill"] == pytest.approx(
        sum(d.tokens for p in whole for d in p) / (160 * len(whole)), abs=1e-6
    )
    assert packing["crop_fill"] == pytest.approx(sum(d.crops for p in whole for d in p) / (12 * len(whole)), abs=1e-6)
    planned = [plan.pack(p) for p in range(packing["planned_packs"])]
    assert packing["longest_example"] == max(d.tokens for p in planned for d in p)
    drawn = Counter(d.entry for p in whole for d in p)
    assert packing["drawn"] == drawn
    assert {name: one["drawn_examples"] for name, one in mixture.tree().items()} == drawn
    sizes = {entry.name: len(entry.rows) for entry in mixture.entries}
    assert packing["epochs"] == pytest.approx({name: drawn[name] / sizes[name] for name in sizes}, abs=1e-4)

    loaded, windows = Mixture.load(tmp_path / "mix"), []
    costs_at = loaded.costs_at
    loaded.costs_at = lambda start, count: windows.append(start) or costs_at(start, count)
    assert Plan.of(loaded, plan.readers, train_config()).pack(55) == planned[55]
    assert not windows  # nothing is packed again
    # counts of other capacities are not used
    assert Plan.of(loaded, plan.readers, train_config(sequence_length=200)).packing.counts(5) != list(
        mixture.planned.counts
    )


def test_packs_keep_to_their_capacities_and_lose_nothing(plan):
    seen = []
    for number in range(sum(plan.packing.counts(100)) and 100):
        draws = plan.pack(number)
        assert sum(draw.tokens for draw in draws) <= 160 and sum(draw.crops for draw in draws) <= 12
        seen += [draw.position for draw in draws]
    assert len(set(seen)) == len(seen) and max(seen) < len(seen) + 32


def test_an_example_larger_than_a_pack_is_named(tmp_path):
    plan = make_plan(tmp_path, sequence_length=40)
    with pytest.raises(DataError, match=r"example 'd0-\d+' of dataset 'd0' needs \d+ tokens.*40 tokens"):
        plan_packs(plan, 1000)


def test_shards_must_be_those_the_mixture_was_made_from(plan, tmp_path):
    stamp = {"schema": "molmo/shards", "version": 1, "params": {}, "inputs": {}, "code": "", "summary": {}}
    for name in ("d0", "d1"):
        write_manifest(tmp_path / name, **stamp)
    mixture = plan_packs(plan, 20)
    mixture.info["shards"] = {name: reader.digest for name, reader in plan.readers.items()}
    (tmp_path / "mix").mkdir()
    mixture.save(tmp_path / "mix", {name: reader.index["id"].to_pylist() for name, reader in plan.readers.items()})
    shards = {name: tmp_path / name for name in ("d0", "d1")}
    assert Plan.load(tmp_path / "mix", shards, train_config()).pack(3) == plan.pack(3)
    with pytest.raises(ArtifactError, match="needs the shards of dataset 'd1'"):
        Plan.load(tmp_path / "mix", {"d0": tmp_path / "d0"}, train_config())
    write_shards(rows(range(100, 126), "d1"), tmp_path / "other", 20_000)
    write_manifest(tmp_path / "other", **stamp)
    with pytest.raises(ArtifactError, match=r"of dataset 'd1', .*run the mixture stage again"):
        Plan.load(tmp_path / "mix", {**shards, "d1": tmp_path / "other"}, train_config())
    (tmp_path / "mix" / "costs.arrow").write_bytes(b"ARROW1")
    with pytest.raises(ArtifactError, match="no readable mixture"):
        Plan.load(tmp_path / "mix", shards, train_config())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"styles": ["nonsense"]},
            DataError,
            "no training example of dataset 'd0' has a conversation of style nonsense",
        ),
        ({"max_conversations": 0}, ConfigError, "max_conversations is 0"),
        ({"rate": -1.0}, ConfigError, "rate of 'x' is -1.0"),
    ],
)
def test_bad_entries_are_refused_by_name(plan, changes, error, message):
    with pytest.raises(error, match=message):
        resolve({"x": MixtureEntry(**{"dataset": "d0", **changes})}, 1, plan.readers, cost_of)


def test_leaked_pictures_are_refused_by_id_unless_allowed(tmp_path, plan):
    assert check_leaks(plan.mixture, plan.readers) == []
    leaky = [*rows(range(100, 125), "d1"), ("train", example(20, "copy"))]  # 20 of d0 is an evaluation row
    write_shards(leaky, tmp_path / "leaky", 20_000)
    readers = {"d0": plan.readers["d0"], "d1": ShardReader(tmp_path / "leaky")}
    mixture = make_mixture(readers)
    with pytest.raises(DataError, match=r"1 training examples show an evaluation picture.*copy-20.*d0-20"):
        check_leaks(mixture, readers)
    (leak,) = check_leaks(mixture, readers, allowed=["copy-20"])
    assert (leak.train, leak.eval) == (("d1", "copy-20"), ("d0", "d0-20"))


def test_only_rows_that_are_drawn_can_leak():
    held_out = [("d", "e1", ["h1", "h2"]), ("d", "e2", [])]
    train = [("d", "t1", ["h9"]), ("d", "t2", ["h2", "h2", "h1"]), ("d", "t3", [])]
    assert image_leaks(train, held_out) == [
        Leak("h2", ("d", "t2"), ("d", "e1")),
        Leak("h1", ("d", "t2"), ("d", "e1")),
    ]
    assert image_leaks([], held_out) == image_leaks(train, []) == []


def test_the_key_of_an_example_comes_from_its_id(plan):
    entries = {entry.name: entry for entry in plan.mixture.entries}
    assert np.array_equal(entries["whole"].keys, entries["single"].keys)
    assert len(set(entries["whole"].keys.tolist())) == len(entries["whole"].keys)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with the shards of `d0`, `d1` and an assembled model's preprocessor, and params that name them."""
    tokenizer = load_tokenizer("molmo_model/preprocessing/tokenizers/bytes512")
    section = PreprocessingConfig(max_crops=4, overlap_margins=[1, 1])
    sizes = {"image_size": 64, "patch_size": 16, "pooling_size": 2, "resize": "siglip", "vocab_size": 520}
    preprocessor = Preprocessor(PreprocessorConfig.build(section, **sizes), tokenizer)
    monkeypatch.chdir(tmp_path)
    stamp = {"version": 1, "params": {}, "inputs": {}, "code": "", "summary": {}}
    preprocessor.save_pretrained("artifacts/checkpoints/m/step-000000")
    write_manifest("artifacts/checkpoints/m", schema="molmo/checkpoints", **stamp)
    for name, numbers in (("d0", range(40)), ("d1", range(100, 125))):
        write_shards(rows(numbers, name), f"artifacts/shards/{name}", 20_000)
        write_manifest(f"artifacts/shards/{name}", schema="molmo/shards", **stamp)
    mixture = {"x": MixtureEntry(dataset="d0", rate=3.0), "y": MixtureEntry(dataset="d1", max_conversations=2)}
    train = train_config(sequence_length=400, crops_per_pack=20)
    runs = {"r": RunConfig(model="m", init="m", mixture=mixture, train=train)}
    datasets = {name: DatasetConfig(family="chat") for name in ("d0", "d1")}
    return Params(seed=3, datasets=datasets, models={"m": ModelConfig()}, runs=runs), preprocessor


def test_the_stage_joins_shards_and_preprocessor(world):
    params, preprocessor = world
    manifest = run(mixture_stage.STAGE, params, run="r")
    assert manifest.summary["rates"] == {"x": 0.75, "y": 0.25}
    assert manifest.summary["examples"] == {"x": 36, "y": 22}
    assert set(manifest.inputs) == {"shards/d0", "shards/d1", "model"}
    shards = {name: f"artifacts/shards/{name}" for name in ("d0", "d1")}
    plan = Plan.load("artifacts/mixture/r", shards, params.runs["r"].train)
    bounds = spent = 0
    for number in range(50):  # 10 steps of 5 packs: all that this run reads
        for draw in plan.pack(number):
            encoded = preprocessor.encode(plan.read(draw), draw.conversations, generator(draw.key))
            assert len(encoded) <= draw.tokens and len(encoded.pixels) == draw.crops
            bounds, spent = bounds + draw.tokens, spent + len(encoded)
    assert spent > 0.9 * bounds
    assert len(plan.mixture.planned.counts) and manifest.summary["packs"] == 50
    params.runs["r"].train.save_every = 1  # not what the packs depend on
    assert run(mixture_stage.STAGE, params, run="r").digest == manifest.digest
    params.runs["r"].train.sequence_length = 300
    assert run(mixture_stage.STAGE, params, run="r").digest != manifest.digest


def test_the_stage_refuses_leaks_and_examples_larger_than_a_pack(world):
    params, _ = world
    params.runs["r"].train.sequence_length = 60
    with pytest.raises(DataError, match=r"example 'd\d-\d+' of dataset .* needs \d+ tokens.*sequence_length"):
        run(mixture_stage.STAGE, params, run="r")
    write_shards([*rows(range(100, 125), "d1"), ("train", example(20, "copy"))], "artifacts/shards/d1", 20_000)
    with pytest.raises(DataError, match=r"evaluation picture.*copy-20.*d0-20"):
        run(mixture_stage.STAGE, params, run="r")
    assert not Path("artifacts/mixture/r").exists()


def test_pictures_that_a_task_asks_about_may_not_be_trained_on(world, capsys):
    """The task's dataset is none of the mixture's; a person may accept a leak by its id."""
    params, _ = world
    stamp = {"version": 1, "params": {}, "inputs": {}, "code": "", "summary": {}}
    asked = [("eval", dataclasses.replace(example(7, "asked"), id="asked")), ("train", example(901, "asked"))]
    write_shards(asked, "artifacts/shards/bench", 20_000)
    write_manifest("artifacts/shards/bench", schema="molmo/shards", **stamp)
    before = run(mixture_stage.STAGE, params, run="r").digest
    params.datasets["bench"] = DatasetConfig(family="chat")
    params.tasks["t"] = TaskConfig(dataset="bench", metric="exact_match")
    with pytest.raises(DataError, match=r"\('d0', 'd0-7'\) = eval \('bench', 'asked'\).*runs.<run>.allow_leaks"):
        run(mixture_stage.STAGE, params, run="r")
    params.runs["r"].allow_leaks = ["d0-8"]
    with pytest.raises(DataError, match="1 training examples"):
        run(mixture_stage.STAGE, params, run="r")
    params.runs["r"].allow_leaks = ["d0-7"]
    manifest = run(mixture_stage.STAGE, params, run="r")
    assert manifest.summary["allowed_leaks"] == 1 and manifest.digest != before
    document = json.loads(Path("artifacts/mixture/r/mixture.json").read_text())
    assert document["allowed_leaks"] == ["d0-7"]
    assert set(document["shards"]) == {"d0", "d1"}  # training reads no other
    assert "not looked for near duplicates in bench, d0, d1" in capsys.readouterr().out


def test_leaks_can_be_dropped_before_anything_is_counted(world):
    """Of two training pictures that a task asks about, one is accepted and stays, the other is left out; the entry that
    keeps neither style is none the worse."""
    params, _ = world
    stamp = {"version": 1, "params": {}, "inputs": {}, "code": "", "summary": {}}
    asked = [("eval", dataclasses.replace(example(number, "asked"), id=f"asked{number}")) for number in (7, 8, 103)]
    write_shards([*asked, ("train", example(901, "asked"))], "artifacts/shards/bench", 20_000)
    write_manifest("artifacts/shards/bench", schema="molmo/shards", **stamp)
    params.datasets["bench"] = DatasetConfig(family="chat")
    params.tasks["t"] = TaskConfig(dataset="bench", metric="exact_match")
    one = params.runs["r"]
    one.mixture["z"] = MixtureEntry(dataset="d1", styles=["caption"])
    one.leaks, one.allow_leaks = LeakRule.drop, ["d0-8"]
    manifest = run(mixture_stage.STAGE, params, run="r")
    document = json.loads(Path("artifacts/mixture/r/mixture.json").read_text())
    assert document["dropped_leaks"] == [
        {"dataset": "d0", "id": "d0-7", "shows": [{"dataset": "bench", "id": "asked7"}]},
        {"dataset": "d1", "id": "d1-103", "shows": [{"dataset": "bench", "id": "asked103"}]},
    ]
    assert (manifest.summary["dropped_leaks"], document["allowed_leaks"]) == (2, ["d0-8"])
    sizes = manifest.summary["examples"]
    assert (sizes["x"], sizes["y"]) == (35, 21)  # of 36 and 22
    costs = map_table(Path("artifacts/mixture/r/costs.arrow"))["id"].to_pylist()
    assert not {"d0-7", "d1-103"} & set(costs) and "d0-8" in costs
    shown = flow.artefact("mixture", "r", params)
    metadata = describe(shown, manifest)
    assert metadata["dropped_leaks"] == 2 and "bench asked103" in metadata["left_out"].value

    # what no entry draws is not left out of it
    one.mixture = {"x": MixtureEntry(dataset="d0"), "z": MixtureEntry(dataset="d1", styles=["count"])}
    has_count = "count" in [talk.style for talk in example(103).conversations]
    assert run(mixture_stage.STAGE, params, run="r").summary["dropped_leaks"] == 1 + has_count
    one.leaks = LeakRule.refuse
    with pytest.raises(DataError, match=r"'d0-7'.*runs.<run>.leaks: drop"):
        run(mixture_stage.STAGE, params, run="r")


def test_an_entry_that_dropped_leaks_leave_empty_is_refused_by_name(plan, tmp_path):
    copies = [("train", example(20, "copy")), ("train", example(10, "copy"))]  # of d0's evaluation rows
    write_shards(copies, tmp_path / "copies", 20_000)
    readers = {"d0": plan.readers["d0"], "copies": ShardReader(tmp_path / "copies")}
    entries = {"a": MixtureEntry(dataset="d0"), "b": MixtureEntry(dataset="copies")}
    left_out = [leak.train for leak in leaks_to_drop(entries, readers)]
    assert sorted(set(left_out)) == [("copies", "copy-10"), ("copies", "copy-20")]
    with pytest.raises(DataError, match=r"entry 'b': nothing is left.* all its 2 examples of dataset 'copies'"):
        resolve(entries, 1, readers, cost_of, left_out=left_out)
    (kept,) = {leak.train[1] for leak in leaks_to_drop(entries, readers, allowed=["copy-10"])}
    assert kept == "copy-20"
    mixture = resolve(entries, 1, readers, cost_of, left_out=[("copies", kept)])
    assert [len(entry.rows) for entry in mixture.entries] == [36, 1]


def test_near_duplicates_of_a_run_are_told(world, capsys, monkeypatch):
    params, _ = world
    pair = NearDuplicate(("d1", "d1-103"), ("d0", "d0-20"), 4, 7)
    monkeypatch.setattr("molmo_model.data.near_duplicates.find_near_duplicates", lambda *_: [pair] * 11)
    run(mixture_stage.STAGE, params, run="r")
    told = capsys.readouterr().out
    assert "warning: run r: train ('d1', 'd1-103') looks like eval ('d0', 'd0-20'), 4 of 64 bits and 7" in told
    assert "warning: run r: and 1 more near duplicates" in told

    item = flow.artefact("mixture", "r", params)
    results = {rule.name: rule.holds(item, params) for rule in RULES if rule.asset == "mixture"}
    assert results["schema"].passed, results["schema"].description
    warned = results["near_duplicates"]
    assert (warned.passed, warned.severity.value) == (False, "WARN")
    assert "d0: not validated" in str(warned.description) and "looks like eval ('d0', 'd0-20')" in str(
        warned.description
    )


def test_an_entry_s_weight_reaches_the_draws(tmp_path):
    """It is part of the mixture, comes back with it, and changes neither order nor cost."""
    write_shards(rows(range(30), "w"), tmp_path / "d", 20_000)
    readers = {"d": ShardReader(tmp_path / "d")}
    plain, weighted = (
        resolve({"a": MixtureEntry(dataset="d", weight=weight), "b": MixtureEntry(dataset="d")}, 7, readers, cost_of)
        for weight in (1.0, 0.2)
    )
    train = train_config(steps=1)
    planned = plan_packs(Plan.of(weighted, readers, train), 5)
    planned.info["shards"] = {}
    (tmp_path / "mix").mkdir()
    planned.save(tmp_path / "mix", {"d": readers["d"].index["id"].to_pylist()})
    for mixture in (weighted, Mixture.load(tmp_path / "mix")):
        for draw, before in zip(mixture.draws(range(40)), plain.draws(range(40)), strict=True):
            assert draw.weight == {"a": 0.2, "b": 1.0}[draw.entry] and before.weight == 1.0
            assert dataclasses.replace(draw, weight=1.0) == before
