"""A project whose stages are the real ones with builds that take no time: they write down what they are made from.

Keys, params, inputs, manifests and digests are those of the real stages; only the content is not.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("MOLMO_PARAMS", str(ROOT / "params.yaml"))  # as `pytest` may be started from anywhere
os.environ["DAGSTER_DISABLE_TELEMETRY"] = "1"

from molmo_assets import flow, sync  # noqa: E402
from molmo_model.artifacts import write_manifest  # noqa: E402
from molmo_model.config import Params, checkpoint_name, load_params, saved_steps  # noqa: E402
from pipelines.stage import Build, Stage, run  # noqa: E402


def fake_build(content: dict[str, str]) -> Callable[[Build], dict[str, Any]]:
    """A build that writes what it is made from, and `content[stage.key...]` where a test wants other content."""

    def build(build: Build) -> dict[str, Any]:
        name = "-".join(build.key.values())
        made_from = json.dumps({"key": build.key, **build.stamp, "extra": content.get(name, "")}, sort_keys=True)
        (build.out / "content.txt").write_text(made_from, encoding="utf-8")
        if build.stamp and (run_name := build.key.get("run")) and str(build.target).startswith("artifacts/checkpoints"):
            for step in saved_steps(build.params.runs[run_name].train):
                save_part(build, f"step-{step:06d}", made_from)
            (build.out / "loss.csv").write_text("step,loss\n1,2.0\n2,1.5\n", encoding="utf-8")
        if "model" in build.key:
            save_part(build, "step-000000", made_from)
        return {"examples": 3}

    return build


def save_part(build: Build, step: str, text: str) -> None:
    """One checkpoint of a run: an artefact of its own inside the run's folder."""
    folder = build.out / step
    folder.mkdir(exist_ok=True)
    (folder / "weights.txt").write_text(f"{step} {text}", encoding="utf-8")
    write_manifest(folder, schema="molmo/checkpoint", version=1, summary={"step": step}, **build.stamp)


@dataclasses.dataclass
class Project:
    """A workspace with fake builds: what the command line would do in it, and an instance of Dagster's."""

    path: Path
    instance: dg.DagsterInstance
    content: dict[str, str]
    """Extra content by joined key; change it to make a stage give another result from the same inputs."""

    @property
    def params(self) -> Params:
        return load_params("params.yaml")

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Edits params.yaml."""
        raw = yaml.safe_load((self.path / "params.yaml").read_text(encoding="utf-8"))
        change(raw)
        (self.path / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")

    def saved(self, run: str) -> list[str]:
        """The checkpoints that a run saves."""
        return [checkpoint_name(run, step) for step in saved_steps(self.params.runs[run].train)]

    @property
    def unasked(self) -> list[str]:
        """Saved checkpoints that `eval.checkpoints` does not name."""
        every = [name for run in self.params.runs for name in self.saved(run)]
        return [name for name in every if name not in self.params.eval.checkpoints]

    def produce(self, *assets: str, **key: str) -> None:
        """What `python -m pipelines.<stage>` does, for the artefacts that `dvc.yaml` names."""
        for asset in assets or flow.STAGES:
            stage, params = flow.STAGES[asset], self.params
            for full in sorted(stage.partitions(params), key=lambda full: _order(full, params)):
                if key.items() <= full.items():
                    run(stage, params, **full)

    def forget(self, asset: str, partition: str | None = None) -> None:
        """Makes the stage run again: as if its artefact and state were lost."""
        shutil.rmtree(flow.artefact(asset, partition, self.params).path)
        shutil.rmtree(self.path / ".state" / flow.STAGES[asset].name)

    def sync(self) -> sync.Report:
        return sync.sync(self.instance, self.params)


def _order(key: dict[str, str], params: Params) -> int:
    return flow.dimension("run", params).index(key["run"]) if "run" in key else 0


def faked(stage: Stage, content: dict[str, str]) -> Stage:
    return dataclasses.replace(stage, build=fake_build(content), fingerprints=lambda params, key: {}, resumable=False)
