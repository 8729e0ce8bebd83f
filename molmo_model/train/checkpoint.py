"""Writing and reading a training checkpoint from all ranks.

The weights lie once, in fp32, as a folder of safetensors that transformers loads. Beside it `train_state/` holds the
optimizer's moments as `torch.distributed.checkpoint` shards, which any number of ranks can load, and the position.
Everything is written to a staging folder, hashed into a manifest and renamed: a kill leaves the old state or the new.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.tensor import DTensor

from molmo_model.artifacts import Manifest, canonical_json, write_manifest
from molmo_model.config import LoraConfig
from molmo_model.errors import CheckpointError
from molmo_model.train import lora as adapters
from molmo_model.train.distributed import Ranks
from molmo_model.train.history import SCHEMA, TRAIN_STATE, VERSION, step_name
from molmo_model.train.optim import optimizer_tensors, set_optimizer_step
from molmo_model.train.weights import WEIGHTS, WEIGHTS_INDEX, read_shapes

POSITION = "position.json"
WEIGHT_FILE_BYTES = 4_000_000_000
"""A weights file is closed once it holds this many bytes; also the host memory that writing takes."""


@dataclass(frozen=True)
class Position:
    """Where a run stands. The data order and the generators are functions of seed and step, so this is all of it."""

    step: int
    """Optimizer steps done."""
    seed: int


class DeterministicWriter(FileSystemWriter):
    """A writer whose `.metadata` names neither the place nor a random save id: equal state gives equal bytes."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=None, save_id="0")


def save(
    *,
    model: Any,
    optimizer: torch.optim.Optimizer,
    position: Position,
    ranks: Ranks,
    start: Path,
    staging: Path,
    folder: Path,
    stamp: Mapping[str, Any],
    summary: Mapping[str, Any],
    lora: LoraConfig | None = None,
) -> Manifest | None:
    """Writes the checkpoint `folder/step-NNNNNN` from all ranks; returns its manifest on the first rank.

    Args:
        start: the checkpoint that the run began from; its tokenizer, preprocessor and generation files are copied.
        staging: scratch directory on the file system of `folder`, emptied first.
        stamp: `params`, `inputs` and `code` of the manifest.
        lora: the model has adapters, which are merged into the weights and written beside them.
    """
    if ranks.first:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / TRAIN_STATE).mkdir(parents=True)
    dist.barrier()
    save_weights(model, staging, ranks)
    state = {**optimizer_tensors(optimizer), **adapters.adapter_tensors(model)}
    dcp.save(state, storage_writer=DeterministicWriter(staging / TRAIN_STATE))
    if lora is not None:
        adapters.save_adapter(model, lora, staging / adapters.ADAPTER, ranks.first, base=start.name)
    manifest = None
    if ranks.first:
        _copy_companions(start, staging)
        model.config.save_pretrained(staging)
        (staging / TRAIN_STATE / POSITION).write_text(canonical_json(position.__dict__) + "\n")
        (staging / "params.json").write_text(canonical_json(stamp["params"]) + "\n")
        manifest = write_manifest(staging, schema=SCHEMA, version=VERSION, summary=summary, **stamp)
        target = folder / step_name(position.step)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(staging, target)
    dist.barrier()
    return manifest


def load_state(optimizer: torch.optim.Optimizer, checkpoint: Path, model: nn.Module | None = None) -> Position:
    """Loads the moments of a checkpoint into a fresh optimizer, whatever number of ranks wrote it, and adapters into
    their model.

    Raises:
        CheckpointError: the state is of another model or another freezing, or cannot be read.
    """
    folder = checkpoint / TRAIN_STATE
    try:
        position = Position(**json.loads((folder / POSITION).read_text()))
        state = optimizer_tensors(optimizer, create=True, step=position.step)
        state |= {} if model is None else adapters.adapter_tensors(model)
        dcp.load(state, storage_reader=FileSystemReader(folder))
    except (Exception, CheckpointException) as error:  # DCP's own is no Exception
        raise CheckpointError(
            f"{folder} does not fit this run: {error}; delete {checkpoint} to start earlier"
        ) from error
    set_optimizer_step(optimizer, position.step)
    return position


def weight_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a weights file holds: parameters once each, also where two are tied, and persistent buffers. Adapters are
    left out, and what they sit on has its plain name."""
    parameters = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters
    return {
        adapters.plain_name(name): tensor
        for name, tensor in model.state_dict().items()
        if name not in tied and not adapters.is_adapter(name)
    }


def save_weights(model: nn.Module, folder: Path, ranks: Ranks, file_bytes: int = WEIGHT_FILE_BYTES) -> None:
    """Writes the sharded weights as one set of fp32 safetensors files, in the layout of `save_pretrained`.

    Tensors are gathered one after the other; the files take turns among the ranks, so no rank holds the model.
    """
    tensors = weight_tensors(model)
    updates = adapters.updates(model)
    plan = _plan_files({name: tensor.numel() * 4 for name, tensor in tensors.items()}, file_bytes)
    for number, (file_name, names) in enumerate(plan.items()):
        mine: dict[str, torch.Tensor] = {}
        for name in names:
            tensor = tensors[name].detach()
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # a collective: all ranks take part
            if name in updates:
                full = full + updates[name]()
            if number % ranks.world == ranks.rank:
                mine[name] = full.to("cpu", torch.float32 if full.is_floating_point() else full.dtype).contiguous()
        if mine:
            save_file(mine, folder / file_name, metadata={"format": "pt"})
            os.chmod(folder / file_name, 0o644)  # the library leaves it to its owner alone
    if ranks.first and len(plan) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.numel() * 4 for tensor in tensors.values())},
            "weight_map": {name: file_name for file_name, names in plan.items() for name in names},
        }
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    dist.barrier()


def load_weights(model: nn.Module, folder: Path, below_adapters: Path | None = None) -> None:
    """Reads a checkpoint's weights into a sharded model; every rank reads its own part of each tensor.

    Args:
        below_adapters: checkpoint to take the weights under adapters from, where `folder` holds merged ones.

    Raises:
        CheckpointError: names or shapes differ from the model's, or a file cannot be read.
    """
    tensors = weight_tensors(model)
    shapes = read_shapes(folder)
    for name in sorted(set(tensors) - set(shapes)):
        raise CheckpointError(f"{folder} has no weights for {name}; it is of another model than its config.json says")
    for name in sorted(set(shapes) - set(tensors)):
        raise CheckpointError(f"{folder} holds {name}, which the model of its config.json does not have")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(f"{folder}: {name} has shape {shapes[name]}, the model needs {tuple(tensor.shape)}")
    sources = [(folder, tensors)]
    if below_adapters not in (None, folder) and (names := adapters.updates(model)):
        sources.append((below_adapters, {name: tensors[name] for name in names}))
    for source, wanted in sources:
        try:
            dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(source)))
        except (Exception, CheckpointException) as error:  # DCP's own is no Exception
            raise CheckpointError(f"weights of {source} cannot be read: {error}") from error


def _plan_files(sizes: Mapping[str, int], file_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names: sorted by name, a new file when the next tensor would not fit."""
    files: list[list[str]] = [[]]
    used = 0
    for name in sorted(sizes):
        if files[-1] and used + sizes[name] > file_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += sizes[name]
    if len(files) == 1:
        return {WEIGHTS: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, start=1)}


def _copy_companions(start: Path, staging: Path) -> None:
    """Tokenizer, preprocessor, `generation_config.json` and other small files beside the weights: the same for every
    checkpoint of a model. The sharded model knows the generation's settings only as far as its configuration tells,
    which has no end token."""
    for path in _companions(start):
        shutil.copyfile(path, staging / path.name)


def _companions(start: Path) -> Iterable[Path]:
    written_here = {"manifest.json", "params.json", WEIGHTS_INDEX}
    for path in sorted(start.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in written_here:
            yield path
