"""Every family of language models at a size for tests, and what differs between them there."""

from typing import Any

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"num_layers": 4, "sliding_window": 6},
    "olmoe": {"num_experts": 4, "num_experts_per_token": 2, "intermediate_size": 32},
}
"""Sizes beside those of `make_params`. OLMo 3 has its pattern of three sliding layers and a full one."""
