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
from molmo_model.train import lora
from molmo_model.train.checkpoint import load_weights
from molmo_model.train.distributed import Ranks
from molmo_model.train.optim import freeze
from molmo_model.train.weights import LARGE_MODEL

SMALL_BLOCK = 1_000_000
"""Blocks of fewer parameters belong to the root: gathering a few megabytes costs less than one more collective. With
2 ranks on CPUs and a model of 0.9 million parameters, units per block took 27 % longer."""
COMPUTE_DTYPES = {Precision.fp32: None, Precision.bf16: torch.bfloat16}


def build_sharded_model(
    folder: Path, train: TrainConfig, ranks: Ranks, *, start: Path | None = None, seed: int = 0
) -> nn.Module:
    """The model of a checkpoint folder, sharded over all ranks, frozen and checkpointed as the params say.

    Args:
        start: with adapters, the checkpoint that the run began from, below which nothing is trained; None is `folder`.
        seed: first weights of adapters.

    Raises:
        ConfigError: a precision that training does not do.
        CheckpointError: the folder's weights do not fit its configuration.
    """
    config = MolmoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = MolmoForConditionalGeneration(config).float()
    model.train()
    if train.lora is None:
        freeze(model, train.optim, component_of)
    else:
        lora.inject(model, train.lora)
    if train.activation_checkpointing is ActivationCheckpointing.full:
        model.gradient_checkpointing_enable()
    shard(model, train.precision, init_device_mesh(ranks.device.type, (ranks.world,)))
    model.to_empty(device=ranks.device)
    restore_buffers(model)
    load_weights(model, folder, start)
    lora.first_adapters(model, seed)
    if train.compile:
        compile_blocks(model)
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


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles the forward of every transformer block in place; call it after `shard`.

    Blocks of one kind share one graph. The forward is replaced, not the call: FSDP2's hooks, which gather and free the
    weights, stay outside, and what checkpointing recomputes is part of the graph. Names of parameters do not change.
    Masks reach the blocks ready-made.

    The number of crops changes from batch to batch, so the vision tower's graphs may become dynamic. Rows of text have
    one length on a GPU; there dynamic graphs are forbidden, because torch would take the head width, which differs
    between the towers, for one more size that changes, and FlexAttention does not compile then.
    """
    # the towers' layers share transformers' checkpointing wrapper, and with it one count of recompilations
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    text = set(transformer_blocks(model.get_submodule("model.language_model")))
    for block in transformer_blocks(model):
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False if block in text else None)


def refresh_units(model: nn.Module) -> None:
    """Tells the units that parameters were unfrozen. Call it on all ranks, between two steps.

    A unit notes at its first gathering in which type its trained parameters are kept and reduced. One that was wholly
    frozen then has noted neither, and with bf16 would hand over bf16 sums, which fp32 parameters refuse. Gathering it
    by hand makes it look again.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def accumulate_locally(model: nn.Module, last: bool) -> None:
    """Says before a backward pass whether its gradients travel: small models send one sum per step, large ones each
    micro-batch, because the unsent gradients of a whole model would not fit."""
    if isinstance(model, FSDPModule) and not _is_large(model):
        model.set_requires_gradient_sync(last)


def _is_large(model: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) >= LARGE_MODEL
