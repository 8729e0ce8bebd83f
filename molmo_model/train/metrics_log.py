"""The numbers of a training: deterministic ones for the artefact, timings for a log beside it.

`metrics.jsonl` has one line per optimizer step with nothing that depends on the machine, so two equal runs have equal
files, also when one of them was killed and went on. Tokens per second and the like go to `logs/train/<run>.jsonl`.
Needs no torch.
"""

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molmo_model.artifacts import write_text_atomic
from molmo_model.errors import DataError

METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
LOSS_CURVE = "loss.csv"


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step; equal in equal runs, to the last bit."""

    step: int
    loss: float
    """Weighted cross-entropy of the answered tokens, divided by their weight over the whole batch."""
    weight: float
    """Sum of the loss weights of the whole batch."""
    tokens: int
    """Tokens of the packs, padding left out, over all ranks."""
    examples: int
    """Examples in the packs, over all ranks."""
    learning_rate: dict[str, float]
    grad_norm: dict[str, float]
    """Per component, before clipping."""
    skipped: int = 0
    """Examples that were left out of the packs because their data are at fault, over all ranks."""


class MetricsLog:
    """Appends one line per step; opening it for a resume drops the lines after the checkpoint's step."""

    def __init__(self, path: Path, after_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= after_step] if path.exists() else []
        if [line["step"] for line in kept] != list(range(1, after_step + 1)):
            raise DataError(
                f"{path} lacks steps before {after_step}; delete {path.parent.parent} to train from the start"
            )
        write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.path = path
        self.drawn = sum(line["examples"] + line["skipped"] for line in kept)
        """Examples of all steps, those that were skipped too."""
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 open for the whole run

    def append(self, metrics: StepMetrics) -> None:
        self.drawn += metrics.examples + metrics.skipped
        self._file.write(json.dumps(asdict(metrics)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class SkippedLog:
    """The examples that a training left out, one line each; `skipped.jsonl` beside the metrics, absent without any.

    Opening it for a resume drops the lines after the checkpoint's step, which will be found again.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        self.path = path
        self.lines = [line for line in read_metrics(path) if line["step"] <= after_step] if path.exists() else []
        self._write()

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.lines += map(dict, lines)
        self._write()

    def _write(self) -> None:
        """The whole file: there are few lines, and what a kill interrupts is the old file or the new one."""
        if self.lines or self.path.exists():
            write_text_atomic(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is empty or torn


def write_loss_curve(metrics: list[dict[str, Any]], path: Path) -> None:
    """`step,loss,learning_rate.<component>,grad_norm.<component>` per step, for DVC's and other people's plots."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, line in enumerate(metrics):
            row = {"step": line["step"], "loss": line["loss"]}
            for part in ("learning_rate", "grad_norm"):
                row |= {f"{part}.{component}": value for component, value in line[part].items()}
            if number == 0:
                writer.writerow(row)
            writer.writerow(row.values())


class EventLog:
    """Appends JSON lines that another process follows: progress, saved checkpoints, timings."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 open for the whole run

    def append(self, event: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(dict(event)) + "\n")
        self._file.flush()

    def append_timed(self, event: Mapping[str, Any]) -> None:
        """Adds the wall-clock time: for logs beside the artefacts, never inside them."""
        self.append({"time": round(time.time(), 3), **event})
