"""From a folder of weights to a model that is sharded over the ranks; the model itself does not know.

FSDP2: each transformer block of the vision tower and of the language model is a unit of its own, the rest (embeddings,
connector, head, very small blocks) belongs to the root. The model is built without memory for its weights, sharded, and
only then does each rank read its own part of every tensor.
"""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from molmo_model.config import ActivationCheckpointing, Precision, TrainConfig
from molmo_model.errors import ConfigError
from molmo_model.nn.build import component_of, restore_buffers
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.train.checkpoint import load_weights
from molmo_model.train.distributed import Ranks
from molmo_model.train.optim import freeze
from molmo_model.train.weights import LARGE_MODEL

SMALL_BLOCK = 1_000_000
"""Blocks of fewer parameters belong to the root: gathering a few megabytes costs less than one more collective. With
2 ranks on CPUs and a model of 0.9 million parameters, units per block took 27 % longer."""
COMPUTE_DTYPES = {Precision.fp32: None, Precision.bf16: torch.bfloat16}


def build_sharded_model(folder: Path, train: TrainConfig, ranks: Ranks) -> nn.Module:
    """The model of a checkpoint folder, sharded over all ranks, frozen and checkpointed as the params say.

    Raises:
        ConfigError: a precision that training does not do.
        CheckpointError: the folder's weights do not fit its configuration.
    """
    config = MolmoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = MolmoForConditionalGeneration(config).float()
    model.train()
    freeze(model, train.optim, component_of)
    if train.activation_checkpointing is ActivationCheckpointing.full:
        model.gradient_checkpointing_enable()
    shard(model, train.precision, init_device_mesh(ranks.device.type, (ranks.world,)))
    model.to_empty(device=ranks.device)
    restore_buffers(model)
    load_weights(model, folder)
    return model


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of every tower: the members of the outermost module lists, in order."""
    blocks: list[nn.Module] = []
    for child in model.children():
        blocks += list(child) if isinstance(child, nn.ModuleList) else transformer_blocks(child)
    return blocks


def shard(model: nn.Module, precision: Precision, mesh: DeviceMesh) -> None:
    """Applies FSDP2 in place, per block and at the root. Gradients are summed over the ranks, not averaged: the loss
    is already divided by the weight of the whole batch."""
    if precision not in COMPUTE_DTYPES:
        raise ConfigError(f"train.precision {precision.value} needs loss scaling, which training does not do; use bf16")
    # inputs are not cast: rotary tables and loss weights must stay fp32
    policy = MixedPrecisionPolicy(
        param_dtype=COMPUTE_DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    large = _is_large(model)
    for block in transformer_blocks(model):
        if sum(parameter.numel() for parameter in block.parameters()) < SMALL_BLOCK:
            continue
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=large)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum


def accumulate_locally(model: nn.Module, last: bool) -> None:
    """Says before a backward pass whether its gradients travel: small models send one sum per step, large ones each
    micro-batch, because the unsent gradients of a whole model would not fit."""
    if isinstance(model, FSDPModule) and not _is_large(model):
        model.set_requires_gradient_sync(last)


def _is_large(model: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) >= LARGE_MODEL
