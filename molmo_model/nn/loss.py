"""The loss over answered tokens, without ever forming logits of the others.

Logits of one token are as many numbers as the vocabulary has words: 2,048 answered tokens of a Qwen2 are 1.2 GB in
fp32, as much again for their gradients. In chunks, each computed again in the backward pass, only one chunk's worth
exists at a time, for one more product with the head.

Shape suffixes: B rows, S tokens of a row, A answered tokens, E width, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class AnsweredLoss(NamedTuple):
    """Sums over answered tokens."""

    loss_sum: Tensor
    """Weight times (cross-entropy + z-loss)."""
    cross_entropy_sum: Tensor
    """The same without z-loss, detached."""
    weight_sum: Tensor
    logits: Tensor | None
    """[A, V] in fp32; None where they were computed in chunks."""


def answered_places(labels: Tensor) -> Tensor:
    """Flat places [A] of tokens with a label. On a GPU this waits for the labels: give the model `answered` instead."""
    return (labels.flatten() >= 0).nonzero().squeeze(1)


def answered_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    z_loss: float,
    answered: Tensor | None = None,
    chunk: int | None = None,
) -> AnsweredLoss:
    """Weighted cross-entropy of the answered tokens, plus `z_loss` times the squared log-partition.

    Args:
        head: from [A, E] to logits [A, V].
        hidden: [B, S, E].
        labels: [B, S], below 0 where nothing is answered.
        weights: [B, S] factor of each token; None is 1.
        answered: flat places [A] with a label, where they are known; places below 0 fill a fixed length up and count
            nothing.
        chunk: answered tokens whose logits exist at a time; None is all, whose logits are returned.
    """
    places = answered_places(labels) if answered is None else answered
    targets, states = labels.flatten()[places.clamp(min=0)], hidden.flatten(0, 1)[places.clamp(min=0)]
    if weights is None:
        factors = torch.ones(len(places), dtype=torch.float32, device=hidden.device)
    else:
        factors = weights.flatten()[places.clamp(min=0)].float()
    if answered is not None:
        factors, targets = factors * (places >= 0), targets.clamp(min=0)

    def sums(states: Tensor, targets: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = head(states)
        total, cross_entropy = (_compiled_sums() if logits.is_cuda else _sums)(logits, targets, factors, z_loss)
        return total, cross_entropy, logits

    if chunk is None:
        total, cross_entropy, logits = sums(states, targets, factors)
        return AnsweredLoss(total, cross_entropy, factors.sum(), logits.float())
    # without answered tokens one empty chunk keeps the head in the graph
    pieces = zip(*(tensor.split(chunk) for tensor in (states, targets, factors)), strict=True)
    parts = [checkpoint(lambda *piece: sums(*piece)[:2], *piece, use_reentrant=False) for piece in pieces]
    total, cross_entropy = (torch.stack(part).sum() for part in zip(*parts, strict=True))
    return AnsweredLoss(total, cross_entropy, factors.sum(), None)


def _sums(logits: Tensor, targets: Tensor, factors: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    per_token = cross_entropy + z_loss * logits.logsumexp(-1).square() if z_loss else cross_entropy
    return (factors * per_token).sum(), (factors * cross_entropy.detach()).sum()


@cache
def _compiled_sums() -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    """Uncompiled, a dozen kernels read and write the logits in fp32, one after the other."""
    return torch.compile(_sums)
