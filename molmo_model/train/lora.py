"""Low-rank adapters (LoRA, arXiv 2106.09685) through PEFT: training them, merging them, and keeping them apart.

`inject` puts adapters on linear layers of the language model and freezes all the rest but, on wish, the connector. The
model in memory stays unmerged. A checkpoint holds the merged weights under the names that they always have, computed on
copies, so whatever loads a checkpoint knows nothing of adapters; beside them lies `adapter/` in PEFT's own format, with
the trained connector, to be put on the checkpoint that the run began from. Adapters and their moments are in
`train_state/`, and a resumed run takes the layers below the adapters from where the run began: exactly, not by
subtraction.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from molmo_model.config import LoraConfig, lookup
from molmo_model.errors import ConfigError
from molmo_model.model_config import CONNECTOR_MODULES
from molmo_model.nn.build import component_of, parameter_counts

ADAPTER = "adapter"
"""Folder of a checkpoint with the adapters."""
NAME = "default"
"""PEFT's name of the one set of adapters."""
LANGUAGE_MODEL = "model.language_model."
BASE_LAYER = ".base_layer."


def inject(model: nn.Module, config: LoraConfig) -> None:
    """Adds adapters in place and freezes what is not trained. Call it before the model is sharded.

    Raises:
        ConfigError: a target names no linear layer of the language model.
    """
    from peft import inject_adapter_in_model

    linear = {
        name.rsplit(".", 1)[-1]: None
        for name, module in model.named_modules()
        if name.startswith(LANGUAGE_MODEL) and isinstance(module, nn.Linear)
    }
    for target in config.targets:
        lookup(linear, target, "linear layer of the language model in train.lora.targets")
    if not config.targets:
        raise ConfigError("train.lora.targets is empty; name linear layers such as q_proj")
    inject_adapter_in_model(_peft_config(config, whole=()), model, low_cpu_mem_usage=True)
    for name, parameter in model.named_parameters():
        trained = is_adapter(name) or (config.train_connector and component_of(name) == "connector")
        parameter.requires_grad_(trained)


def first_adapters(model: nn.Module, seed: int) -> None:
    """Draws the adapters of a sharded model: A as PEFT draws it (Kaiming uniform, a = sqrt 5), B zero. Each matrix has
    a generator of its own from `seed` and its name, so any number of ranks draws the same."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not is_adapter(name):
                continue
            full = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
            full = full.to(parameter.device)
            if isinstance(parameter, DTensor):
                full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(full)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


def merged_counts(model: nn.Module) -> dict[str, int]:
    """Parameters per component of the model that checkpoints hold: adapters are part of what they sit on."""
    counts = parameter_counts(model)
    counts["language"] -= sum(parameter.numel() for name, parameter in model.named_parameters() if is_adapter(name))
    return counts


def plain_name(name: str) -> str:
    """The name of a parameter in a model without adapters."""
    return name.replace(BASE_LAYER, ".")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters by the name that `train_state/` has for them."""
    return {f"adapter.{name}": parameter.data for name, parameter in model.named_parameters() if is_adapter(name)}


def updates(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """For every weight with an adapter, by plain name, a function that gathers `scale * B @ A`: all ranks must call it.

    The weight itself is not touched: training goes on from the unmerged model.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            found[f"{name}.weight"] = lambda module=module: (  # type: ignore[misc]
                module.scaling[NAME] * (_full(module.lora_B[NAME].weight) @ _full(module.lora_A[NAME].weight))
            )
    return found


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path, first: bool, base: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` as PEFT does. All ranks must call it, because they
    gather the tensors together; the first one writes.

    Args:
        base: the checkpoint below the adapters, as it is named in the file.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.replace(f".{NAME}.", ".")
            tensors[f"base_model.model.{plain}"] = _full(parameter.detach()).to("cpu", torch.float32).contiguous()
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        whole = [part for part in CONNECTOR_MODULES if any(f".{part}." in name for name in tensors)]
        peft_config = _peft_config(config, whole=tuple(whole))
        peft_config.base_model_name_or_path = base
        peft_config.inference_mode = True
        peft_config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_model.safetensors").chmod(0o644)


def _peft_config(config: LoraConfig, whole: tuple[str, ...]) -> Any:
    import peft

    layers = "|".join(map(str, config.targets))
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=rf"model\.language_model\..*\.({layers})",
        modules_to_save=list(whole) or None,
    )


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
