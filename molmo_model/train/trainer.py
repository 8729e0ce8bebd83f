"""The training loop: accumulate, clip, step, log, save; stop when asked; refuse to go on with a broken number.

One optimizer step is one global batch. Its loss is the sum over all packs of weighted cross-entropy, divided once by
the sum of weights over all packs of all ranks, so neither the number of ranks nor that of micro-batches changes what
is computed (only the order in which floats are added).
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from molmo_model.config import TrainConfig, checkpoint_name, saved_steps
from molmo_model.data.loader import Skipped
from molmo_model.errors import DataError, TrainingError
from molmo_model.nn.loss import answered_places
from molmo_model.train.checkpoint import Position, save
from molmo_model.train.distributed import Ranks, StopRequest, gather_over_ranks, seed_step, sum_over_ranks
from molmo_model.train.metrics_log import EventLog, MetricsLog, SkippedLog, StepMetrics
from molmo_model.train.optim import clip_gradients, set_learning_rates, thaw
from molmo_model.train.parallelize import accumulate_locally, refresh_units

Batch = dict[str, torch.Tensor]


class Batches(Protocol):
    """Where the data comes from: the micro-batches of this rank for optimizer step n, counted from 1."""

    def step(self, n: int) -> list[Batch]: ...

    @property
    def skipped(self) -> Sequence[Skipped]:
        """What was left out of them."""


@dataclass
class Logs:
    """What the first rank writes while it trains; the other ranks have none."""

    metrics: MetricsLog
    """Deterministic numbers of every step, for the artefact."""
    skipped: SkippedLog
    """The examples that were left out, for the artefact."""
    events: EventLog
    """What the supervising process follows."""
    timings: EventLog
    """Seconds and rates of every step."""
    every: int
    """Steps between two progress events."""


@dataclass
class Places:
    """Directories of one training."""

    start: Path
    """Checkpoint that the run began from."""
    out: Path
    """Checkpoints of the saved steps, which become the artefact."""
    work: Path
    """Scratch, and the checkpoint of a run that was stopped between saved steps."""

    @property
    def staging(self) -> Path:
        return self.work / "saving"

    @property
    def stopped(self) -> Path:
        return self.work / "stopped"


@dataclass
class Trainer:
    """Everything that one rank needs to train a run."""

    run: str
    train: TrainConfig
    seed: int
    stamp: Mapping[str, Any]
    """`params`, `inputs` and `code` of the manifests."""
    model: Any
    optimizer: torch.optim.Optimizer
    batches: Batches
    ranks: Ranks
    places: Places
    logs: Logs | None
    stop: StopRequest
    clock: Callable[[], float] = time.perf_counter
    parameters: dict[str, int] = field(default_factory=dict)
    """Per component, for the manifests."""

    def fit(self, done: int) -> int:
        """Trains from step `done` + 1 to the end, or until a stop is asked for; returns the last step done.

        Raises:
            TrainingError: the loss or a gradient is no finite number; the last checkpoint stays.
        """
        saved = set(saved_steps(self.train))
        for step in range(done + 1, self.train.steps + 1):
            started = self.clock()
            seed_step(self.seed, step, self.ranks.rank)
            batches = [self._to_device(batch) for batch in self.batches.step(step)]
            counts = self._count(batches)
            if counts.pop("stop"):
                self._save_stopped(step - 1, done)
                return step - 1
            if counts["skipped"]:
                self._note_skipped(step, counts)
            metrics = self._optimize(step, batches, counts)
            self._log(metrics, counts, self.clock() - started)
            if step in saved:
                self._save_regular(step, metrics)
        return self.train.steps

    def _count(self, batches: list[Batch]) -> dict[str, float]:
        """Sums over the whole batch, and whether any rank was asked to stop: one collective for all of it."""
        counts = {"stop": float(self.stop.wanted), "weight": 0.0, "tokens": 0.0, "examples": 0.0, "crops": 0.0}
        counts["skipped"] = float(len(self.batches.skipped))
        for batch in batches:
            answered = batch["labels"] >= 0
            counts["weight"] += float(batch["loss_weights"][answered].double().sum())
            counts["tokens"] += float((batch["example_ids"] >= 0).sum())
            counts["examples"] += float((batch["example_ids"].amax(1) + 1).sum())
            counts["crops"] += float(len(batch["pixel_values"]))
        return dict(zip(counts, sum_over_ranks(list(counts.values()), self.ranks), strict=True))

    def _note_skipped(self, step: int, counts: Mapping[str, float]) -> None:
        """Lists what was left out of a step on any rank, in the order of the packs.

        Raises:
            DataError: with these, more than `train.bad_examples` of the examples of the whole run are bad, as many as
                it has if its other steps are like those so far; on the first rank, which ends the others too.
        """
        found = gather_over_ranks(self.batches.skipped, self.ranks)
        if self.logs is None:
            return
        found.sort(key=lambda one: one.pack)  # stable: within a pack they come in its order
        self.logs.skipped.append([asdict(one) for one in found])
        lines = self.logs.skipped.lines
        drawn = self.logs.metrics.drawn + counts["examples"] + counts["skipped"]
        of_run = round(drawn / step * self.train.steps)
        if len(lines) > self.train.bad_examples * of_run:
            last = "; ".join(f"{one['id']!r} of {one['dataset']!r}: {one['reason']}" for one in lines[-3:])
            raise DataError(
                f"run {self.run}: {len(lines)} bad examples up to step {step}; train.bad_examples allows "
                f"{self.train.bad_examples:.4%} of the run's {of_run}, {self.train.bad_examples * of_run:.1f}. All are "
                f"listed in {self.logs.skipped.path}. The last: {last}"
            )

    def _optimize(self, step: int, batches: list[Batch], counts: Mapping[str, float]) -> StepMetrics:
        if not counts["weight"] > 0:
            skipped = f" ({counts['skipped']:.0f} bad ones were skipped)" if counts["skipped"] else ""
            raise DataError(
                f"run {self.run}: no token of step {step} is answered; its examples{skipped} have no assistant text"
            )
        if thaw(self.optimizer, step):
            refresh_units(self.model)
        loss_sum = 0.0
        for number, batch in enumerate(batches, start=1):
            accumulate_locally(self.model, last=number == len(batches))
            output = self.model(**batch, z_loss=self.train.z_loss, use_cache=False)
            (output.loss_sum / counts["weight"]).backward()
            loss_sum += float(output.cross_entropy_sum)
        (loss_sum,) = sum_over_ranks([loss_sum], self.ranks)
        rates = set_learning_rates(self.optimizer, self.train.optim, step, self.train.steps)
        norms = clip_gradients(self.optimizer, self.train.optim)
        self._require_finite(step, loss_sum, norms)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepMetrics(
            step=step,
            loss=loss_sum / counts["weight"],
            weight=counts["weight"],
            tokens=int(counts["tokens"]),
            examples=int(counts["examples"]),
            learning_rate=rates,
            grad_norm=norms,
            skipped=int(counts["skipped"]),
        )

    def _require_finite(self, step: int, loss_sum: float, norms: Mapping[str, float]) -> None:
        broken = {"loss": loss_sum, **{f"gradient norm of {name}": norm for name, norm in norms.items()}}
        broken = {name: value for name, value in broken.items() if not math.isfinite(value)}
        if broken:
            raise TrainingError(
                f"run {self.run}: at step {step} {', '.join(f'{name} is {value}' for name, value in broken.items())}; "
                "lower the learning rates, lengthen the warm-up, or look at the examples of this step. "
                "The weights were not changed and the last checkpoint stays"
            )

    def _to_device(self, batch: Batch) -> Batch:
        if self.ranks.device.type == "cuda":  # found here, so that the forward pass need not wait for the labels
            batch = {**batch, "answered": answered_places(batch["labels"])}
        return {name: tensor.to(self.ranks.device, non_blocking=True) for name, tensor in batch.items()}

    def _log(self, metrics: StepMetrics, counts: Mapping[str, float], seconds: float) -> None:
        if self.logs is None:
            return
        self.logs.metrics.append(metrics)
        rates = {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(counts["tokens"] / seconds, 1),
            "examples_per_second": round(counts["examples"] / seconds, 2),
            "crops_per_second": round(counts["crops"] / seconds, 2),
        }
        self.logs.timings.append_timed({"kind": "step", "step": metrics.step, "loss": metrics.loss, **rates})
        if metrics.step % self.logs.every == 0 or metrics.step in {1, self.train.steps}:
            event = {"kind": "progress", "step": metrics.step, "total": self.train.steps, "loss": metrics.loss, **rates}
            self.logs.events.append(event)

    def _save_regular(self, step: int, metrics: StepMetrics) -> None:
        self._save(step, self.places.out, {"loss": metrics.loss})
        if self.ranks.first:
            shutil.rmtree(self.places.stopped, ignore_errors=True)  # older than what was saved just now

    def _save_stopped(self, step: int, done: int) -> None:
        """Saves the state of a run that is stopped between two saved steps, outside the artefact."""
        if step > done and step not in saved_steps(self.train):
            self._save(step, self.places.stopped, {})
        if self.logs is not None:
            self.logs.events.append({"kind": "stopped", "step": step})

    def _save(self, step: int, folder: Path, facts: Mapping[str, Any]) -> None:
        started = self.clock()
        manifest = save(
            model=self.model,
            optimizer=self.optimizer,
            position=Position(step, self.seed),
            ranks=self.ranks,
            start=self.places.start,
            staging=self.places.staging,
            folder=folder,
            stamp=self.stamp,
            lora=self.train.lora,
            summary={"run": self.run, "step": step, "parameters": self.parameters, **facts},
        )
        if self.logs is not None and manifest is not None:
            name = checkpoint_name(self.run, step)
            event = {"kind": "checkpoint", "run": self.run, "step": step, "name": name, "digest": manifest.digest}
            if folder == self.places.out:
                self.logs.events.append(event)
            self.logs.timings.append_timed({**event, "seconds": round(self.clock() - started, 3)})
