"""What a folder of safetensors holds, read from the files' headers alone: no torch, no tensor in memory."""

import json
import struct
from pathlib import Path

from molmo_model.errors import CheckpointError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
LARGE_MODEL = 200_000_000
"""Parameters from which on memory decides: each rank then gathers one block at a time and sends its gradients after
every micro-batch. Smaller models are gathered once per micro-batch and send one sum per step."""
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name, over all safetensors files of a checkpoint folder.

    Raises:
        CheckpointError: there is no weights file, or one is not safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors; run the stage that makes this checkpoint")
    shapes = {}
    for path in files:
        for name, entry in _header(path).items():
            if name != "__metadata__":
                shapes[name] = tuple(entry["shape"])
    return shapes


def _header(path: Path) -> dict[str, dict[str, list[int]]]:
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LARGEST_HEADER:
                raise ValueError(f"header of {length} bytes")
            return json.loads(file.read(length))
    except (OSError, struct.error, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
