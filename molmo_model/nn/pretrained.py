"""Pretrained parts: reading a transformers configuration and weights from a folder or hub id, strictly.

Sizes that the params name must be those of the part, and weights that the model wants must all be there. Vision and
language models are loaded through the same functions.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from molmo_model.errors import CheckpointError, ConfigError

CONFIG_NAMES = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
"""Sizes that transformers' configurations call otherwise."""


def load_config(source: str, where: str) -> Any:
    """The configuration in a folder or of a hub id.

    Raises:
        ConfigError: there is none, or transformers does not know its kind.
    """
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        kind = "has no configuration that" if Path(source).is_dir() else "is no folder here and no hub id whose config"
        raise ConfigError(f"{where}: {source} {kind} can be read: {error}") from error


def same_sizes(wanted: Any, config: PreTrainedConfig, where: str, names: Iterable[str]) -> None:
    """Refuses sizes in the params that a pretrained part does not have.

    Raises:
        ConfigError: names the size and both numbers.
    """
    for name in names:
        asked, found = getattr(wanted, name), getattr(config, CONFIG_NAMES.get(name, name))
        if asked is not None and asked != found:
            raise ConfigError(f"{where}: {name} is {asked}, but {wanted.pretrained} has {found}; leave it out")


def load_model(auto: Any, source: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Model and loading report in fp32; the report is for the caller to check, and not printed.

    Args:
        auto: one of transformers' auto classes.

    Raises:
        CheckpointError: the weights cannot be read, or are not finite.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # tensors of another shape go into the report, with both shapes, instead of an error that has none
        kwargs |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = auto.from_pretrained(source, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        kind = "" if Path(source).is_dir() else "are in no folder here and of no hub id, or "
        raise CheckpointError(f"pretrained weights {source} {kind}cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    read = {name: tensor for name, tensor in model.named_parameters() if name not in info["missing_keys"]}
    if wrong := [name for name, tensor in read.items() if not tensor.isfinite().all()]:
        raise CheckpointError(
            f"pretrained weights {source}: {len(wrong)} tensors hold NaN or infinity: {sorted(wrong)[:5]}; "
            "get the files again"
        )
    return model, info


def require_none_missing(source: str, missing: Iterable[str], info: dict[str, Any]) -> None:
    """Refuses weights that lack tensors of the model, or hold them in another shape.

    Raises:
        CheckpointError: names the first of them.
    """
    names = sorted(map(str, [*missing, *info.get("mismatched_keys", [])]))
    if names:
        raise CheckpointError(f"the weights in {source} lack {len(names)} of the model's tensors: {names[:5]}")
