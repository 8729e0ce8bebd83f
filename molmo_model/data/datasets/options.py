"""Reads the `options:` of a dataset strictly against the dataclass of its family."""

from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from molmo_model.config import DatasetConfig, lookup
from molmo_model.errors import ConfigError

Options = TypeVar("Options")


def parse_options(cls: type[Options], config: DatasetConfig) -> Options:
    """`config.options` as an instance of `cls`, its own checks included.

    Raises:
        ConfigError: an unknown option (with the one that was probably meant), a wrong type or a value out of range.
    """
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for name in config.options:
        lookup(known, name, f"option of dataset family {config.family!r}")
    try:
        options: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), dict(config.options)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or getattr(error, "key", None)
        reason = str(getattr(error, "msg", None) or error).splitlines()[0]
        raise ConfigError(f"options of dataset family {config.family!r}: {key}: {reason}") from error
    return options


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises `ConfigError` where an option lies outside [low, high]."""
    if not low <= value <= high:
        raise ConfigError(f"dataset option {name} is {value}; it must lie in [{low}, {high}]")
