"""Ranks, devices and determinism: what a training process needs before it has a model.

Every function takes or returns plain values, so the trainer can be read without knowing torch's process groups.
"""

import contextlib
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from molmo_model.config import TrainConfig
from molmo_model.errors import PreflightError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that waits this long for the others raises instead of hanging for ever."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of the training."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on the one rank that writes what is written once."""
        return self.rank == 0


@contextlib.contextmanager
def process_group(meeting: Path) -> Iterator[Ranks]:
    """The default process group: NCCL on GPUs, else gloo; rank and number of ranks are torchrun's.

    It is destroyed only after success: after an error the others may wait in a collective, and leaving at once is
    what makes torchrun end them.

    Args:
        meeting: a file that does not exist yet, the same for all ranks.

    Raises:
        PreflightError: this machine has GPUs, but fewer than ranks.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    ranks: dict[str, Any] = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    ranks |= {"init_method": f"file://{meeting.resolve()}", "timeout": COLLECTIVE_TIMEOUT}
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise PreflightError(
                f"rank {local_rank} has no GPU: {torch.cuda.device_count()} GPUs are visible; lower train.processes"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **ranks)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", **ranks)
    yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    dist.barrier()
    dist.destroy_process_group()


def set_determinism(train: TrainConfig) -> None:
    """Threads and kernels that give equal bits in equal runs.

    The number of threads is part of a run's identity, because it decides the order in which floats are added.
    """
    torch.set_num_threads(train.threads)
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # every empty tensor would be filled; nothing here reads memory that it did not write
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds all generators from (seed, step, rank): resuming at a step needs no saved generator state."""
    (value,) = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(value))
    np.random.seed(int(value) % 2**32)
    random.seed(int(value))


def sum_over_ranks(values: Sequence[float], ranks: Ranks) -> list[float]:
    """Sums plain numbers over all ranks in float64, in one collective; every rank gets the same bits."""
    total = torch.tensor(list(values), dtype=torch.float64, device=ranks.device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def gather_over_ranks(values: Sequence[Any], ranks: Ranks) -> list[Any]:
    """Plain objects of all ranks, those of the first rank first, in one collective; every rank gets them."""
    gathered: list[Any] = [None] * ranks.world
    dist.all_gather_object(gathered, list(values))
    return [value for part in gathered for value in part]


class StopRequest:
    """Remembers SIGTERM or SIGINT, so that the step at hand can end and be saved."""

    def __init__(self) -> None:
        self.wanted = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
