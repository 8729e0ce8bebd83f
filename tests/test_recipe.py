"""Merging a recipe changes exactly the keys it names, keeps every comment, and never leaves bad params behind."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from molmo_model.config import load_params
from molmo_model.errors import ConfigError
from pipelines import recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def params(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    return path


def overlay(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_nothing_to_change_leaves_every_byte(params, tmp_path):
    before = params.read_bytes()
    assert recipe.apply(overlay(tmp_path, "version: 2\n"), params) == []
    assert params.read_bytes() == before


def test_changes_only_what_it_names_and_keeps_comments(params, tmp_path):
    before = params.read_text()
    old = yaml.safe_load(before)
    text = "seed: 99\ndatasets: {charts: {options: {numbers: row}}}\n"
    changed = recipe.apply(overlay(tmp_path, text), params)
    assert changed[0] == f"seed: {old['seed']} -> 99"
    new = yaml.safe_load(params.read_text())
    old["seed"] = 99
    old["datasets"]["charts"].setdefault("options", {})["numbers"] = "row"
    assert new == old
    lost = [line for line in before.splitlines() if line not in params.read_text().splitlines()]
    assert lost == [line for line in lost if line.startswith("seed:") or "options" in line]
    assert recipe.apply(tmp_path / "recipe.yaml", params) == []


def test_lists_are_replaced(params, tmp_path):
    recipe.apply(overlay(tmp_path, "eval: {checkpoints: []}\n"), params)
    assert load_params(params).eval.checkpoints == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runtime: {log_evry: 3}\n", "log_evry"),
        ("seed: [1]\n", "seed"),
        ("runs: {sft: {train: {steps: 0}}}\n", "steps is 0|is 0; it must"),
        ("runs: {sft: {init: nobody}}\n", "nobody"),
        ("- seed\n", "must be a mapping"),
        ("seed: [\n", "not valid YAML"),
    ],
)
def test_refuses_and_leaves_the_file(params, tmp_path, text, message):
    before = params.read_bytes()
    with pytest.raises(ConfigError, match=message):
        recipe.apply(overlay(tmp_path, text), params)
    assert params.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml", "recipe.yaml"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_fit_the_params(params, path):
    assert recipe.apply(path, params)
    load_params(params)


@pytest.mark.parametrize("argv", [[], ["a.yaml", "b.yaml"], ["a.yaml", "parms=x"], ["a.yaml", "params="]])
def test_command_line_refuses(argv):
    with pytest.raises(ConfigError):
        recipe.parse(argv)


def test_help_and_exit_codes(params, tmp_path):
    def run(*argv):
        command = [sys.executable, "-m", "pipelines.recipe", *argv]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    shown = run("--help")
    assert shown.returncode == 0 and "recipes/long.yaml" in shown.stdout
    done = run(str(overlay(tmp_path, "seed: 5\n")), f"params={params}")
    assert done.returncode == 0 and "-> 5" in done.stdout
    refused = run(str(tmp_path / "none.yaml"), f"params={params}")
    assert refused.returncode == 2 and "cannot be read" in refused.stderr
