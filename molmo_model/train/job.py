"""What the supervising process tells its workers, as one JSON file. Needs no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molmo_model.artifacts import write_text_atomic
from molmo_model.config import Params, params_from_dict

JOB = "job.json"
EVENTS = "events.jsonl"
ERRORS = "errors"
"""Folder with one JSON file per rank that failed."""
MEETING = "meeting"
"""Folder for the files through which agent and ranks find each other; fresh for every start."""


@dataclass(frozen=True)
class Job:
    """One training to do or to go on with. Paths are relative to the working directory or absolute."""

    run: str
    params: dict[str, Any]
    """All params as plain values."""
    inputs: dict[str, str]
    """The stage's inputs by name: `init`, `mixture` and `shards/<dataset>`."""
    out: str
    work: str
    stamp: dict[str, Any]
    resume: str | None
    """Checkpoint to go on from; None starts from `init`."""
    timings: str
    """Log file of step times."""
    shard_cache: str | None = None
    """Folder for what comes from shards in a bucket, where the params name none."""

    def write(self) -> Path:
        path = Path(self.work) / JOB
        write_text_atomic(path, json.dumps(asdict(self), indent=1))
        return path

    @staticmethod
    def read(path: Path) -> "Job":
        return Job(**json.loads(path.read_text(encoding="utf-8")))

    def load_params(self) -> Params:
        return params_from_dict(self.params, self.work)
