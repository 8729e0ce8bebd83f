"""Five published families and rows of one's own in one mixture, trained for a few steps on one rank and on two."""

import contextlib
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from molmo_model.config import load_params
from molmo_model.source_digest import ROOT
from molmo_model.train.metrics_log import read_metrics
from pipelines import assemble, mixture, shards
from pipelines.stage import run
from tests.data.test_families_together import copies
from tests.train.conftest import PARAMS

STEPS = 3


def trained(folder: Path, processes: int) -> list[dict]:
    """The metrics of a training of its own."""
    argv = [f"runs.go.train.processes={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipelines.train", "run=go", *argv]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(folder / "artifacts/checkpoints/go/metrics.jsonl")


@pytest.mark.slow
def test_the_loss_is_the_same_on_one_rank_and_on_two(tmp_path, monkeypatch):
    named = copies(tmp_path, monkeypatch)
    params = copy.deepcopy(PARAMS)
    params["datasets"] = {
        name: {"family": name, "eval_fraction": 0.0, **{key: str(value) for key, value in config.items()}}
        for name, config in named.items()
    }
    params["models"]["tiny"]["preprocessing"] |= {
        "system_prompt": "demo_or_style",
        "video": {"max_frames": 4, "pooling_size": [2, 2]},
    }
    going = params["runs"]["go"]
    going["mixture"] = {name: {"dataset": name} for name in named}
    # two packs of every family in a step: enough that both ranks have pictures, films and text alone
    going["train"] |= {"steps": STEPS, "save_every": STEPS, "packs_per_step": 4, "sequence_length": 256}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with contextlib.chdir(tmp_path):
        loaded = load_params()
        run(assemble.STAGE, loaded, model="tiny")
        for name in named:
            run(shards.STAGE, loaded, dataset=name)
        made = run(mixture.STAGE, loaded, run="go")
        assert set(made.summary["examples"]) == set(named) == set(made.summary["epochs"])
        assert min(made.summary["epochs"].values()) > 0, "every family is drawn"
        one, two = trained(tmp_path, 1), trained(tmp_path, 2)
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, STEPS + 1))
    for alone, together in zip(one, two, strict=True):
        # the same numbers, summed in another order
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["tokens"] == alone["tokens"]
        assert together["examples"] == alone["examples"]
