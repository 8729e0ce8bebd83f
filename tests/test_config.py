"""`params.yaml`: what is refused, by which name, and that old files still mean what they meant."""

import copy
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from molmo_model import config
from molmo_model.artifacts import digest_of
from molmo_model.config import load_params, params_from_dict, pick
from molmo_model.errors import ConfigError

ROOT = Path(__file__).parent.parent
V1 = Path(__file__).parent / "fixtures" / "params_v1.yaml"


def shipped() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def put(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    node = raw
    *parents, last = path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return raw


def test_shipped_params_load_and_their_runs_name_real_things() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.version == config.PARAMS_VERSION
    for run in params.runs:
        assert config.model_of(params, run) in params.models
    assert params.eval.checkpoints


def test_version_1_migrates() -> None:
    params = load_params(V1)
    assert params.version == 2
    assert list(params.runs) == ["train"]
    run = params.runs["train"]
    assert (run.model, run.init) == ("small", "small")
    assert {name: (entry.dataset, entry.rate) for name, entry in run.mixture.items()} == {
        "scenes": ("scenes", 0.75),
        "mine": ("mine", 0.25),
    }
    assert config.saved_steps(run.train) == [8, 16, 20]
    assert params.datasets["mine"].path == "data/mine.jsonl"


def test_migration_does_not_change_its_argument() -> None:
    raw = yaml.safe_load(V1.read_text(encoding="utf-8"))
    before = copy.deepcopy(raw)
    config.migrate(raw, "x")
    assert raw == before


@pytest.mark.parametrize("version", [None, 0, -1, "2", 2.0, True, config.PARAMS_VERSION + 1])
def test_bad_versions_are_refused(version: Any) -> None:
    with pytest.raises(ConfigError, match="version"):
        config.migrate({**shipped(), "version": version}, "params.yaml")


def test_version_1_with_runs_or_two_models_is_refused() -> None:
    raw = yaml.safe_load(V1.read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match="runs"):
        config.migrate({**raw, "runs": {}}, "p")
    with pytest.raises(ConfigError, match="2"):
        config.migrate({**raw, "models": {"a": {}, "b": {}}}, "p")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("sed", 1, "sed"),
        ("runs.sft.train.stepz", 5, "stepz"),
        ("runs.sft.train.optim.vision.lr", 0.1, "lr"),
        ("models.base.vision.encodr", "clip", "encodr"),
        ("datasets.charts.famly", "charts", "famly"),
        ("tasks.charts_qa.metrik", "x", "metrik"),
        ("runs.sft.mixture.scenes.rates", 1, "rates"),
        ("runs.sft.train.steps", "many", "steps"),
        ("runs.sft.train.steps", 2.5, "steps"),
        ("runs.sft.train.steps", True, "steps"),
        ("runs.sft.train.steps", [3], "steps"),
        ("runs.sft.train.deterministic", "perhaps", "deterministic"),
        ("runs.sft.train.precision", "fp8", "precision"),
        ("models.base.preprocessing.crop_mode", "tile", "crop_mode"),
        ("models.base.connector.pooling", "max", "pooling"),
        ("models.base.vision.feature_layers", ["last"], "feature_layers"),
        ("runs.sft.train.optim.betas", 0.9, "betas"),
        ("models.base.connector.pooling_size", 2, "pooling_size: must be a list, such as"),
        ("models.base.connector", "mlp", "'mlp' stands where the keys of a ConnectorConfig belong"),
        ("runs.sft.init", "nowhere", "nowhere"),
        ("runs.sft.init", "sft", "never reaches a model"),
        ("runs.pretrain.init", "sft", "never reaches a model"),
        ("runs.sft.model", "other", "other"),
        ("runs.sft.mixture", {}, "mixture"),
        ("runs.sft.mixture.scenes.dataset", "nowhere", "nowhere"),
        ("runs.sft.mixture.scenes.rate", 0, "rate"),
        ("runs.sft.mixture.scenes.rate", float("nan"), "rate"),
        ("runs.sft.train.steps", 0, "steps"),
        ("runs.sft.train.save_every", 0, "save_every"),
        ("runs.sft.train.processes", 0, "processes"),
        ("datasets.charts.tolerance", 1.0, "tolerance"),
        ("datasets.charts.eval_fraction", -0.1, "eval_fraction"),
        ("tasks.charts_qa.dataset", "nowhere", "nowhere"),
        ("eval.checkpoints", ["sft/step-000151"], "never saved"),
        ("eval.checkpoints", ["sft/300"], "step-"),
        ("eval.checkpoints", ["nowhere/step-000300"], "nowhere"),
        ("runs.sft.mixture.scenes.dataset", "${oc.env:HOME}", "interpolation"),
        ("runs.sft.train.steps", "${seed}", "interpolation"),
        ("datasets.charts.path", "x/${oc.env:AWS_SECRET_ACCESS_KEY}", "interpolation"),
        ("runs.base", {"model": "base"}, "base"),
        ("runs.bad/name", {"model": "base"}, "bad/name"),
        ("datasets...", {"family": "charts"}, "name"),
        ("tasks.a|b", {"dataset": "charts", "metric": "x"}, "name"),
    ],
)
def test_mistakes_are_refused_by_name(path: str, value: Any, named: str) -> None:
    if path == "datasets...":
        raw = shipped()
        raw["datasets"][".."] = value
    else:
        raw = put(shipped(), path, value)
    with pytest.raises(ConfigError, match=named.replace("|", r"\|")):
        params_from_dict(raw, "params.yaml")


@pytest.mark.parametrize(
    "path", ["runs.sft.train.steps", "runs.sft.model", "models.base.tokenizer", "tasks.charts_qa.metric"]
)
def test_what_is_required_is_asked_for(path: str) -> None:
    raw = shipped()
    *parents, last = path.split(".")
    node = raw
    for part in parents:
        node = node[part]
    del node[last]
    with pytest.raises(ConfigError, match=rf"{last}.*required"):
        params_from_dict(raw, "params.yaml")


def test_overrides_take_yaml_values_of_existing_keys() -> None:
    params = load_params(
        ROOT / "params.yaml",
        [
            "seed=5",
            "runs.sft.train.optim.vision.learning_rate=1e-5",
            "eval.checkpoints=[sft/step-000500]",
            "runs.sft.train.precision=bf16",
        ],
    )
    assert params.seed == 5
    assert params.runs["sft"].train.optim.vision.learning_rate == pytest.approx(1e-5)
    assert params.eval.checkpoints == ["sft/step-000500"]
    assert params.runs["sft"].train.precision is config.Precision.bf16


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sede=5", "did you mean 'seed'"),
        ("runs.sftt.train.steps=5", "did you mean 'sft'"),
        ("runs.sft.train.step=5", "did you mean 'steps'"),
        ("--steps", "has no '='"),
        ("runs.sft.train.steps=soon", "steps"),
        ("seed.x=1", "seed"),
        ("runs.sft.train.steps=-1", "steps"),
    ],
)
def test_bad_overrides_are_refused(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_params(ROOT / "params.yaml", [override])


@pytest.mark.parametrize("text", ["", "- a\n", "just words", "a: [", "version: 2\nversion: 2\n", "a: &x\n  b: *y\n"])
def test_broken_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"p\.yaml"):
        load_params(tmp_path / "p.yaml")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load_params(tmp_path / "nothing.yaml")


def test_pick_gives_plain_values_whose_digest_is_stable() -> None:
    params = load_params(ROOT / "params.yaml")
    paths = ["seed", "models.base", "runs.sft.train", "datasets.charts.family"]
    picked = pick(params, paths)
    assert list(picked) == paths
    assert picked["runs.sft.train"]["precision"] == "fp32"
    assert type(picked["runs.sft.train"]["precision"]) is str
    assert digest_of(picked) == digest_of(pick(load_params(ROOT / "params.yaml"), paths))
    with pytest.raises(ConfigError, match="seet"):
        pick(params, ["seet"])


def test_order_of_keys_in_the_file_is_no_change() -> None:
    def turned(value: Any) -> Any:
        return {key: turned(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    one, other = (params_from_dict(raw, "p") for raw in (shipped(), turned(shipped())))
    sections = ["seed", "datasets", "models", "runs", "tasks", "eval"]
    assert digest_of(pick(one, sections)) == digest_of(pick(other, sections))


def test_config_needs_no_torch() -> None:
    code = "import sys, molmo_model.config; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("datasets.charts.train_examples=-5", "datasets.charts.train_examples"),
        ("datasets.charts.shard_bytes=-1", "datasets.charts.shard_bytes"),
        ("models.base.vision.patch_size=0", "models.base.vision.patch_size"),
        ("models.base.preprocessing.max_crops=1000000", "max_crops is 1000000; it must lie between 1 and 10000"),
        ("models.base.preprocessing.overlap_margins=[-1, 1]", "models.base.preprocessing.overlap_margins"),
        ("runs.sft.mixture.scenes.rate=.inf", "runs.sft.mixture.scenes.rate"),
        ("runs.sft.train.crops_per_pack=0", "runs.sft.train.crops_per_pack"),
        ("runs.sft.train.optim.betas=[1.5, 2]", "runs.sft.train.optim.betas"),
        ("runs.sft.train.optim.vision.learning_rate=.nan", "runs.sft.train.optim.vision.learning_rate"),
        ("tasks.scene_qa.max_new_tokens=0", "tasks.scene_qa.max_new_tokens"),
        ("tasks.scene_qa.split=test", "tasks.scene_qa.split"),
        ("eval.confidence=2", "eval.confidence"),
        ("eval.checkpoints=[base/step-000100]", "eval.checkpoints"),
        ("eval.checkpoints=[base/step-000000, base/step-000000]", "eval.checkpoints"),
        ("runtime.eval_batch_size=0", "runtime.eval_batch_size"),
        ("seed=-1", "seed"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_params(ROOT / "params.yaml", [override])


def test_every_bound_names_a_field() -> None:
    for kind, bounds in config.BOUNDS.items():
        assert set(bounds) <= {field.name for field in dataclasses.fields(kind)}, kind


def test_options_of_a_family_can_be_overridden() -> None:
    assert load_params(ROOT / "params.yaml", ["datasets.charts.options.max_values=4"]).datasets["charts"].options == {
        "max_values": 4
    }
