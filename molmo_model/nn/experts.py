"""Mixtures of experts (MolmoE, with OLMoE as language model): what keeps the router healthy, and what a token costs.

Both losses are means over the tokens of one micro-batch, padding excluded. A batch of several micro-batches takes the
mean of theirs, each weighted by its share of the loss weight: balance is asked of every micro-batch, not of the batch
as a whole, so these two terms, unlike the cross-entropy, depend a little on how a batch is cut into micro-batches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func


def experts_per_token(text_config: PreTrainedConfig) -> int | None:
    """How many experts compute each token; None for a model without experts."""
    return getattr(text_config, "num_experts_per_tok", None)


def load_balancing_loss(router_logits: Sequence[Tensor], per_token: int, present: Tensor) -> Tensor:
    """1 if every expert gets the same share of the tokens, up to their number if one gets all.

    `experts * sum over experts of (share of assignments) * (mean router probability)`: equations 4 to 6 of the Switch
    Transformer (arXiv 2101.03961), over all layers together. transformers' function counts each of `per_token`
    assignments fully; dividing by them gives the scale that OLMoE was trained at.

    Args:
        router_logits: [B * S, experts] of each layer.
        present: [B, S] 1 on tokens, 0 on padding.
    """
    logits = tuple(layer.float() for layer in router_logits)
    loss: Any = load_balancing_loss_func(logits, logits[0].shape[-1], per_token, present.long())
    return loss / per_token


def router_z_loss(router_logits: Sequence[Tensor], present: Tensor) -> Tensor:
    """Mean over tokens and layers of the squared log-partition of the router: equation 5 of ST-MoE (arXiv 2202.08906).

    Args:
        router_logits: [B * S, experts] of each layer.
        present: [B, S] 1 on tokens, 0 on padding.
    """
    weights = present.flatten().to(torch.float32)
    squares = torch.stack([layer.float().logsumexp(-1).square() for layer in router_logits])
    return (squares * weights).sum() / (weights.sum().clamp(min=1) * len(router_logits))


def idle_parameters(model: nn.Module) -> dict[str, int]:
    """By name, how many numbers of each experts' tensor a single token does not meet."""
    idle: dict[str, int] = {}
    for prefix, block in model.named_modules():
        experts, gate = getattr(block, "experts", None), getattr(block, "gate", None)
        if not isinstance(experts, nn.Module) or not isinstance(top := getattr(gate, "top_k", None), int):
            continue
        for name, parameter in experts.named_parameters():
            count = int(parameter.shape[0])
            idle[f"{prefix}.experts.{name}"] = parameter.numel() // count * (count - top)
    return idle
