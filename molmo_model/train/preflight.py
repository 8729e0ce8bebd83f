"""What a training will need, said before it starts; what cannot fit is refused with what to change. Needs no torch.

Numbers are estimates from the params, the headers of the weights and the last run's log; they err on the large side.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_model.artifacts import digest_of, read_manifest
from molmo_model.config import ActivationCheckpointing, ComponentOptim, Precision, TrainConfig, saved_steps
from molmo_model.errors import PreflightError
from molmo_model.model_config import CONNECTOR_MODULES, GPU_CHUNK
from molmo_model.train.weights import LARGE_MODEL, read_shapes

PROCESS_BYTES = 700_000_000
"""Resident memory of one rank before it has a model: python, torch, transformers, the data."""
STATE_BYTES = 16
"""Bytes per trained parameter, spread over the ranks: fp32 weight and gradient, two fp32 moments."""
CHECKPOINT_BYTES = 12
"""Bytes per parameter on disk: fp32 weight and two fp32 moments."""
CPU_EFFICIENCY = 0.3
"""Part of a CPU's speed on a matrix product that training reaches; measured 0.3 to 0.4 on models below 1M."""
RECENT_STEPS = 50
"""Steps of the last run's log that the expected time is taken from."""


@dataclass(frozen=True)
class Machine:
    """What there is."""

    cores: int
    memory: int
    """Bytes of host memory that can be had now."""
    gpus: int
    gpu_memory: int
    """Bytes of the smallest GPU."""
    disk: int
    """Free bytes where checkpoints go."""


@dataclass(frozen=True)
class Need:
    """What the run takes."""

    parameters: dict[str, int]
    """Per component, as far as the start checkpoint's manifest says; at least `total`."""
    trained: int
    memory_per_rank: int
    activations_per_rank: int
    tokens: int
    """At most: packs are not always full."""
    steps: int
    done: int
    checkpoint_bytes: int
    disk: int
    """Bytes still to be written, DVC's copy included."""
    seconds: float | None
    """Expected, of the steps still to do; None where nothing is known."""
    seconds_from: str
    longest: int | None
    """Positions that the language model knows."""
    longest_example: int
    """Positions that an example takes at most: each begins at 0, wherever in its pack it stands."""

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


def survey(folder: Path) -> Machine:
    """Looks at this machine; `folder` says on which disk."""
    memory = _host_memory()
    sizes = _gpu_memory()
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=memory,
        gpus=len(sizes),
        gpu_memory=min(sizes, default=0),
        disk=shutil.disk_usage(folder).free,
    )


def estimate(
    train: TrainConfig,
    start: Path,
    *,
    done: int,
    saved: int,
    timings: Path,
    machine: Machine,
    longest_example: int | None = None,
) -> Need:
    """What a run needs from its params and the checkpoint it starts from.

    Args:
        start: checkpoint folder with `config.json` and weights.
        done: steps already done.
        saved: checkpoints of the run that already lie on the disk.
        timings: log of earlier runs.
        longest_example: tokens of the longest example that the run draws; None where the mixture does not say.
    """
    shapes = read_shapes(start)
    total = sum(math.prod(shape) for shape in shapes.values())
    parameters = _parameters(start, total)
    trained = _trained(train, parameters, shapes)
    width = 4 if train.precision is Precision.fp32 else 2
    config = json.loads((start / "config.json").read_text(encoding="utf-8"))
    activations = _activation_bytes(config, train, width, on_gpu=machine.gpus > 0)
    gathered = (
        total * width * (2 if total < LARGE_MODEL else 0.2)
    )  # weights and unsent gradients, or two blocks of them
    sharded = (total * 4 + trained * (STATE_BYTES - 4)) / train.processes
    checkpoint = total * 4 + trained * (CHECKPOINT_BYTES - 4)
    to_save = len(saved_steps(train)) - saved
    if train.keep_checkpoints is not None:
        to_save = min(to_save, train.keep_checkpoints + 1)
    seconds, source = expected_seconds(train, total, done, timings, machine)
    return Need(
        parameters=parameters,
        trained=trained,
        memory_per_rank=int(sharded + gathered + activations) + (0 if machine.gpus else PROCESS_BYTES),
        activations_per_rank=activations,
        tokens=train.steps * train.packs_per_step * train.sequence_length,
        steps=train.steps,
        done=done,
        checkpoint_bytes=checkpoint,
        disk=2 * checkpoint * max(0, to_save),
        seconds=seconds,
        seconds_from=source,
        longest=config.get("text_config", {}).get("max_position_embeddings"),
        # selected tokens keep the positions of the whole view, so that a HeMolmo's positions are not its tokens
        longest_example=train.sequence_length if longest_example is None or config.get("selector") else longest_example,
    )


def check(train: TrainConfig, need: Need, machine: Machine) -> None:
    """Refuses what cannot fit.

    Raises:
        PreflightError: with both numbers and what to change.
    """
    if machine.gpus and train.processes > machine.gpus:
        raise PreflightError(f"train.processes is {train.processes}, this machine has {machine.gpus} GPUs; lower it")
    have = machine.gpu_memory if machine.gpus else machine.memory // train.processes
    if need.memory_per_rank > have:
        raise PreflightError(
            f"each of {train.processes} ranks needs about {size(need.memory_per_rank)} of memory "
            f"({size(need.activations_per_rank)} of it activations), {size(have)} can be had; lower "
            "train.packs_per_microbatch, train.sequence_length or train.crops_per_pack, set "
            "train.activation_checkpointing to full, or spread the model over more GPUs"
        )
    if need.disk > machine.disk:
        raise PreflightError(
            f"the checkpoints still to write take {size(need.disk)} with DVC's copy, {size(machine.disk)} are free;"
            " raise train.save_every, set train.keep_checkpoints, or free some space"
        )
    if need.longest is not None and min(need.longest_example, train.sequence_length) > need.longest:
        raise PreflightError(
            f"train.sequence_length is {train.sequence_length} and an example may take {need.longest_example} of it, "
            f"the language model has {need.longest} positions; lower it, or raise max_position_embeddings of the model"
        )


def lines(run: str, train: TrainConfig, need: Need, machine: Machine) -> list[str]:
    """The preflight as a person reads it."""
    components = ", ".join(f"{name} {count:,}" for name, count in sorted(need.parameters.items()))
    place = f"{machine.gpus} GPUs" if machine.gpus else f"{machine.cores} CPU cores"
    have = machine.gpu_memory if machine.gpus else machine.memory // train.processes
    rest = need.steps - need.done
    expected = "unknown until the first steps" if need.seconds is None else f"about {duration(need.seconds)}"
    found = [
        f"preflight of run {run}: {train.processes} ranks of {train.threads} threads on {place}, "
        f"{train.precision.value}",
        f"  parameters: {need.total:,} ({components}), {need.trained:,} of them trained",
        f"  memory per rank: about {size(need.memory_per_rank)} of {size(have)}",
        f"  steps: {rest} of {need.steps}" + (f" (going on after step {need.done})" if need.done else ""),
        f"  tokens: at most {need.tokens:,} in {train.steps * train.packs_per_step:,} packs",
        f"  time: {expected} ({need.seconds_from})",
        f"  disk: {size(need.checkpoint_bytes)} per checkpoint, {size(need.disk)} to be written with DVC's copy, "
        f"{size(machine.disk)} free",
    ]
    if not machine.gpus and train.processes * train.threads > machine.cores:
        found.append(f"  note: {train.processes} ranks x {train.threads} threads share {machine.cores} cores")
    for name, component in _components(train).items():
        trained = train.steps - (component.unfreeze_step or 1) + 1
        if component.warmup_steps >= trained:
            found.append(
                f"  note: {name} warms up for {component.warmup_steps} steps, the run has {trained} of it: it "
                f"never reaches its learning rate; set train.optim.{name}.warmup_steps"
            )
    return found


def pace_key(train: TrainConfig, parameters: int) -> str:
    """Runs with the same key take about the same time per step on one machine."""
    shape = ("packs_per_step", "packs_per_microbatch", "sequence_length", "crops_per_pack", "processes", "threads")
    settings = {name: getattr(train, name) for name in shape}
    modes: dict[str, Any] = {
        "precision": train.precision.value,
        "checkpointing": train.activation_checkpointing.value,
        "compile": train.compile,
        "trained": {name: one.unfreeze_step for name, one in _components(train).items()},
    }
    if train.lora is not None:
        modes["lora"] = {"rank": train.lora.rank, "targets": train.lora.targets}
    return digest_of({**settings, **modes, "parameters": parameters})[:16]


def expected_seconds(
    train: TrainConfig, parameters: int, done: int, timings: Path, machine: Machine
) -> tuple[float | None, str]:
    """Seconds of the steps still to do, and where the number is from: the last equal run's log, else a guess from a
    product of matrices timed now and 6 FLOP per parameter and token (Kaplan et al. 2020, arXiv:2001.08361)."""
    rest = train.steps - done
    if pace := _logged_pace(timings, pace_key(train, parameters)):
        return rest * pace, f"{pace:.2f} s per step in the last such run"
    if machine.gpus:
        return None, "no earlier run of this shape"
    work = 6 * parameters * train.packs_per_step * train.sequence_length
    rate = CPU_EFFICIENCY * _matmul_rate() * min(machine.cores, train.processes * train.threads)
    return rest * work / rate, f"a guess at {rate / 1e9:.0f} GFLOP/s on a free machine; the next run will know better"


def size(count: float) -> str:
    """Bytes for people: `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds for people: `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _parameters(start: Path, total: int) -> dict[str, int]:
    """Per component from the manifest of the checkpoint, if it tells and agrees with the weights."""
    stated = read_manifest(start).summary.get("parameters")
    if isinstance(stated, dict) and all(isinstance(count, int) for count in stated.values()):
        stated = {name: count for name, count in stated.items() if name != "total"}
        if sum(stated.values()) == total:
            return stated
    return {"model": total}


def _components(train: TrainConfig) -> dict[str, ComponentOptim]:
    """Settings of the components that a run trains, whole, by adapters, or from some step on."""
    names = ["vision", "connector", "language"]
    if train.lora is not None:
        names = ["connector", "language"] if train.lora.train_connector else ["language"]
    components = {name: getattr(train.optim, name) for name in names}
    return {name: one for name, one in components.items() if not one.freeze or one.unfreeze_step is not None}


def _trained(train: TrainConfig, parameters: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Parameters that get gradients and moments."""
    if train.lora is None:
        frozen = {"vision", "connector", "language"} - set(_components(train))
        return sum(count for name, count in parameters.items() if name not in frozen)
    layers = tuple(f".{target}.weight" for target in train.lora.targets)
    adapters = [s for name, s in shapes.items() if ".language_model." in name and name.endswith(layers)]
    whole = CONNECTOR_MODULES if train.lora.train_connector else ()
    connector = [shape for name, shape in shapes.items() if set(whole) & set(name.split("."))]
    return sum(train.lora.rank * sum(shape) for shape in adapters) + sum(map(math.prod, connector))


def _activation_bytes(config: Mapping[str, Any], train: TrainConfig, width: int, on_gpu: bool) -> int:
    """Activations that one micro-batch of one rank keeps for the backward pass.

    Per token and layer about 16 vectors of the hidden and 4 of the MLP's width; the mask and, without a fused kernel,
    nothing of the size S x S per head. With full checkpointing one vector per layer, and one layer in full. Logits,
    their gradient and one more copy in fp32 for half of the tokens; on a GPU one chunk of the loss at a time.
    """

    def of_stack(part: Mapping[str, Any], positions: int) -> int:
        hidden, layers = part.get("hidden_size", 0), part.get("num_hidden_layers", 0)
        layer = (16 * hidden + 4 * part.get("intermediate_size", 0)) * positions * width
        if train.activation_checkpointing is ActivationCheckpointing.full:
            return layer + layers * hidden * positions * width
        return layer * layers

    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    packs, tokens = train.packs_per_microbatch, train.sequence_length
    patches = (vision.get("image_size", 0) // max(1, vision.get("patch_size", 1))) ** 2
    answered = min(packs * tokens, GPU_CHUNK) if on_gpu else packs * tokens // 2
    logits = answered * text.get("vocab_size", 0) * 4 * 3
    mask = packs * tokens * tokens
    return of_stack(text, packs * tokens) + of_stack(vision, packs * train.crops_per_pack * patches) + logits + mask


def _logged_pace(timings: Path, key: str) -> float | None:
    """Median seconds per step of the last run in the log that has this key."""
    if not timings.exists():
        return None
    recent: list[float] = []
    matches = False
    for text in timings.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut short by a kill
            continue
        if line["kind"] == "start":
            matches = line["pace"] == key
            recent = [] if matches else recent
        elif line["kind"] == "step" and matches:
            recent = [*recent[-RECENT_STEPS:], line["seconds"]]
    return statistics.median(recent) if len(recent) > 1 else None


def _matmul_rate() -> float:
    """Floating point operations per second of one core on a small fp32 matrix product, the best of a tenth of a second:
    what other processes take away does not count, and BLAS starts no threads for one this small."""
    import numpy as np

    a = np.ones((64, 64), np.float32)
    best, stop = math.inf, time.perf_counter() + 0.1
    while (started := time.perf_counter()) < stop:
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * len(a) ** 3 / best


def _host_memory() -> int:
    """Bytes that can be had: the kernel's estimate, or a container's limit where that is lower."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.exists() and (text := path.read_text().strip()).isdigit():
            available = min(available, int(text))
    return available


def _gpu_memory() -> list[int]:
    """Bytes of each NVIDIA GPU that is visible to this process."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    sizes = [int(line) * 2**20 for line in answer.stdout.split()]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return sizes if chosen is None else sizes[: len(chosen.split(","))]
