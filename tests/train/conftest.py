"""A tiny real workspace: a Molmo of 50 thousand parameters on thirty digit scenes, made once per session."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from molmo_model.config import load_params
from molmo_model.source_digest import ROOT
from pipelines import assemble, mixture, shards
from pipelines.stage import run

OPTIM = {"learning_rate": 3.0e-3, "warmup_steps": 4, "weight_decay": 0.02}
PARAMS: dict[str, Any] = {
    "version": 2,
    "seed": 5,
    "datasets": {"digit_scenes": {"family": "digit_scenes", "train_examples": 30, "eval_examples": 3}},
    "models": {
        "tiny": {
            "tokenizer": "molmo_model/preprocessing/tokenizers/bytes512",
            "vision": {
                "encoder": "siglip",
                "image_size": 64,
                "patch_size": 16,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "feature_layers": [-1, -2],
            },
            "connector": {"num_heads": 2, "window_position_embedding": True, "projector_hidden_size": 32},
            "language": {
                "family": "qwen2",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 1024,
            },
            "preprocessing": {"max_crops": 2, "overlap_margins": [1, 1]},
        }
    },
    "runs": {
        "go": {
            "model": "tiny",
            "init": "tiny",
            "mixture": {"scenes": {"dataset": "digit_scenes", "styles": ["scene_caption", "scene_qa"]}},
            "train": {
                "steps": 24,
                "packs_per_step": 3,  # not even over two ranks: one of them gets an empty pack
                "packs_per_microbatch": 1,
                "sequence_length": 512,
                "crops_per_pack": 24,
                "packing_window": 16,
                "packing": "best_fit",
                "save_every": 10,
                "processes": 2,
                "optim": {"vision": OPTIM, "connector": {**OPTIM, "learning_rate": 6.0e-3}, "language": OPTIM},
            },
        }
    },
    "runtime": {"log_every": 1},
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with everything that a training reads."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    with contextlib.chdir(folder):
        params = load_params()
        run(assemble.STAGE, params, model="tiny")
        run(shards.STAGE, params, dataset="digit_scenes")
        run(mixture.STAGE, params, run="go")
    return folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it as the current directory, with nothing trained yet."""
    shutil.copytree(prepared, tmp_path / "w")
    with contextlib.chdir(tmp_path / "w"):
        yield tmp_path / "w"


@pytest.fixture(scope="session")
def start_training() -> Callable[..., "subprocess.Popen[str]"]:
    """A function that starts `python -m pipelines.train run=go` in a folder, its output in a pipe."""

    def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "pipelines.train", "run=go", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return start


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[Any]:
    """A process group of this process alone."""
    import torch
    import torch.distributed as dist

    from molmo_model.train.distributed import Ranks

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"))
    dist.destroy_process_group()
    torch.set_num_threads(threads)


class Never:
    """A stop request that nobody makes."""

    wanted = False


@pytest.fixture
def make_trainer(workspace: Path, one_rank: Any) -> Any:
    """A function that builds the real trainer of the workspace in this process, with other params and resume points."""
    from molmo_model.config import load_params, to_dict
    from molmo_model.train.job import Job
    from molmo_model.train.worker import build_trainer
    from pipelines.stage import stamp
    from pipelines.train import STAGE, shards_of

    def make(*overrides: str, name: str = "a", resume: Path | None = None) -> Any:
        params = load_params("params.yaml", overrides)
        job = Job(
            run="go",
            params=to_dict(params),
            inputs=STAGE.inputs(params, {"run": "go"})
            | shards_of(params, "go", params.runtime.shards_root or "artifacts/shards"),
            out=f"{name}/out",
            work=f"{name}/work",
            stamp=stamp(STAGE, params, {"run": "go"}),
            resume=str(resume) if resume else None,
            timings=f"{name}/timings.jsonl",
        )
        job.write()
        return build_trainer(job, params, one_rank, Never())[0]

    return make
