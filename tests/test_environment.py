"""One environment holds Dagster and DVC: the two commands that their parsers' versions used to break.

Both need ANTLR's Python runtime: Dagster's asset selections 4.13, `dvc exp run -S` through hydra and omegaconf until
lately 4.9. docs/adr/0002 says which pins make one version serve both.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

BIN = Path(sys.executable).parent
STAGES = """stages:
  copy:
    cmd: python copy.py
    deps: [copy.py]
    params: [train.steps]
    outs: [out.txt]
"""
DEFINITIONS = """import dagster as dg

@dg.asset
def shards(): ...

@dg.asset(deps=[shards])
def train(): ...

defs = dg.Definitions(assets=[shards, train])
"""


def call(folder: Path, *command: str, **environment: str) -> str:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    quiet = {"PATH": path, "DAGSTER_DISABLE_TELEMETRY": "1", "DVC_NO_ANALYTICS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **quiet}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_dvc_exp_run_with_a_changed_param(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("train: {steps: 3}\n")
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "copy.py").write_text("open('out.txt', 'w').write(open('params.yaml').read())\n")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
    call(tmp_path, *git, "init", "-q")
    call(tmp_path, "dvc", "init", "-q")
    call(tmp_path, *git, "add", "-A")
    call(tmp_path, *git, "commit", "-qm", "start")
    call(tmp_path, "dvc", "exp", "run", "-q", "-S", "train.steps=7")
    assert yaml.safe_load((tmp_path / "out.txt").read_text()) == {"train": {"steps": 7}}


@pytest.mark.slow
def test_dagster_materialises_a_selection_by_name(tmp_path: Path) -> None:
    (tmp_path / "definitions.py").write_text(DEFINITIONS)
    (tmp_path / "home").mkdir()
    command = ("dagster", "asset", "materialize", "--select", "shards+", "-f", "definitions.py")
    output = call(tmp_path, *command, DAGSTER_HOME=str(tmp_path / "home"))
    assert "RUN_SUCCESS" in output
    for step in ("shards", "train"):
        assert f'Finished execution of step "{step}"' in output
