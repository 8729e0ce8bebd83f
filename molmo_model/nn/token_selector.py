"""HeMolmo's choice: scores for every high-resolution token of an image, and the K that are kept.

    score of a candidate = what the language model's low-resolution states say about its place (learned from the answer)
                         + a prior of its own features                   + its dot product with the image's query

The K best of each image are kept, in raster order. A kept token's *importance* is the sigmoid of its score; in training
it multiplies the token's values in every attention layer, which is how the answer's loss reaches the scorer at all:
choosing K tokens has no gradient, scaling them has. Two penalties keep importances useful: their mean is drawn to a
target below 1 (at 1 or 0 the sigmoid has no slope), and scores far out on its flat ends cost extra.

Shape suffixes: B rows, S tokens of a row, M images of the batch, H candidates and K slots of an image, N low-resolution
tokens of the batch, T image tokens of the batch, E text width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from molmo_model.model_config import SelectorConfig, TokenScore
from molmo_model.nn.pooling import FanInLinear

SATURATED = 10.0
"""Scores beyond this, on either side, have next to no gradient and are penalised."""
LOWEST = torch.finfo(torch.float32).min


def selector_config(fields: Mapping[str, Any]) -> SelectorConfig:
    """The settings as `config.json` holds them."""
    return SelectorConfig(**{**fields, "score": TokenScore(fields["score"])})


class SmallLinear(nn.Linear):
    """A matrix whose results are at first a tenth as large as what goes in, whatever the width."""

    def first_weights(self) -> None:
        init.normal_(self.weight, std=0.1 * self.in_features**-0.5)
        init.zeros_(self.bias)


class ScoreMLP(nn.Module):
    """SwiGLU to a few scores: `down(up(x) * silu(gate(x)))`; or, without hidden width, one matrix.

    First scores are small: which tokens are kept is nearly random then, and their importance the offset's.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.gate_up = FanInLinear(in_features, 2 * hidden_features, bias=False) if hidden_features else None
        self.down = SmallLinear(hidden_features or in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up is not None:
            up, gate = self.gate_up(x).chunk(2, -1)
            x = up * F.silu(gate)
        return self.down(x)


class TokenScorer(nn.Module):
    """Scores of all candidates.

    Args:
        width: E.
        layers: layers of the low-resolution pass.
        patches: scores of one low-resolution token, one per patch of its window.
    """

    def __init__(self, config: SelectorConfig, width: int, layers: int, patches: int) -> None:
        super().__init__()
        self.config = config
        learned = config.score is TokenScore.learned
        prior = config.prior and config.score is not TokenScore.random
        features = width * layers if config.all_layers else width
        self.norm = nn.LayerNorm(features) if learned and config.norm else None
        self.scorer = ScoreMLP(features, config.hidden_size, patches) if learned else None
        self.prior_norm = nn.LayerNorm(width) if prior and config.norm else None
        self.prior = ScoreMLP(width, config.hidden_size, 1) if prior else None
        # begins with next to no say: scale and shift, its last two features, are all but zero
        self.query = SmallLinear(features, width + 2) if learned and config.query else None

    def forward(self, states: Sequence[Tensor], tokens: Tensor, where: Mapping[str, Tensor]) -> Tensor:
        """float32 [M, H]; what stands where there is no candidate has no meaning.

        Args:
            states: [B, L, E] after every layer of the low-resolution pass that is looked at; empty without a pass.
            tokens: image tokens [T, E].
            where: see `preprocessing.selection.selector_arrays`.
        """
        candidates = where["selector_candidates"].clamp(min=0)
        scores = torch.zeros(candidates.shape, dtype=torch.float32, device=tokens.device)
        tokens = tokens.detach()  # a score judges the features, it does not shape them
        if self.scorer is not None:
            low = self._features(states, where["selector_low"])
            flat = self.scorer(F.dropout(low, self.config.dropout, self.training)).float().view(-1, 1)
            around = F.embedding(where["selector_sources"], flat).squeeze(-1)
            scores = scores + (around * where["selector_weights"]).sum(-1)
        if self.prior is not None:
            features = tokens if self.prior_norm is None else self.prior_norm(tokens)
            prior = self.prior(F.dropout(features, self.config.dropout, self.training)).float()
            scores = scores + F.embedding(candidates, prior).squeeze(-1)
        if self.query is not None:
            query, scale, shift = self.query(self._features(states, where["selector_ends"])).split(
                [tokens.shape[-1], 1, 1], -1
            )
            product = torch.einsum("me,mhe->mh", query, F.embedding(candidates, tokens)) * tokens.shape[-1] ** -0.5
            scores = scores + ((1 + scale) * product + shift).float()
        return scores

    def _features(self, states: Sequence[Tensor], places: Tensor) -> Tensor:
        """The states at flat places of the pass, all layers side by side."""
        features = torch.cat([F.embedding(places, layer.flatten(0, 1)) for layer in states], -1)
        features = features * len(states) ** -0.5
        return features if self.norm is None else self.norm(features)


@dataclass(frozen=True)
class Choice:
    """What is kept of every image."""

    chosen: Tensor
    """int64 [M, K] numbers of the kept candidates in raster order, -1 behind the last."""
    importance: Tensor
    """float32 [M, K] sigmoid of their scores; 1 where there is none."""
    gate: Tensor
    """float32 [M, K] what their values are multiplied by."""
    penalty: Tensor
    """float32 [M] auxiliary loss of each image."""


class TokenSelector(nn.Module):
    """Scores, and the choice by them; see the module."""

    def __init__(self, config: SelectorConfig, width: int, layers: int, patches: int) -> None:
        super().__init__()
        self.config = config
        self.scorer = TokenScorer(config, width, layers, patches)

    @property
    def reads_states(self) -> bool:
        """Whether a low-resolution pass is needed."""
        return self.config.score is TokenScore.learned

    @property
    def weighs(self) -> bool:
        """Whether values are multiplied by importances now."""
        return self.config.score is not TokenScore.random and (self.training or self.config.gate_at_test)

    def forward(self, states: Sequence[Tensor], tokens: Tensor, where: Mapping[str, Tensor]) -> Choice:
        """The tokens to keep; arguments as of `TokenScorer.forward`."""
        config, candidates = self.config, where["selector_candidates"]
        if config.score is TokenScore.random:
            scores = self._random(candidates)
        else:
            scores = self.scorer(states, tokens, where) + config.offset
        slots = where["selector_slots"] >= 0
        chosen = best(scores.detach().masked_fill(candidates < 0, LOWEST), slots)
        kept = scores.gather(1, chosen.clamp(min=0))
        importance = torch.where(slots, kept.sigmoid(), 1.0)
        dropped = torch.rand_like(importance) < config.gate_dropout if self.training else torch.zeros_like(slots)
        gate = torch.where(dropped, 1.0, importance)
        return Choice(chosen, importance, gate, self._penalty(kept, importance, slots & ~dropped))

    def _penalty(self, scores: Tensor, importance: Tensor, counted: Tensor) -> Tensor:
        """[M] distance of the mean importance from its target, and mean square of scores beyond `SATURATED`."""
        config, share = self.config, counted / counted.sum(-1, keepdim=True).clamp(min=1)
        if config.score is TokenScore.random:
            return torch.zeros_like(importance[:, 0])
        mean = (importance * share).sum(-1)
        beyond = F.relu(scores.abs() - SATURATED).square()
        penalty = config.importance_weight * (mean - config.target_importance).abs()
        if config.saturation_weight:
            penalty = penalty + config.saturation_weight * (beyond * share).sum(-1)
        return penalty * counted.any(-1)

    def _random(self, candidates: Tensor) -> Tensor:
        """Drawn in training; in evaluation the same order for every image, so that a batch answers as its rows."""
        if self.training:
            return torch.rand(candidates.shape, device=candidates.device)
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(candidates.shape[1], generator=generator)
        return order.to(candidates.device).expand(candidates.shape)


def best(scores: Tensor, slots: Tensor) -> Tensor:
    """The candidates [M, K] with the highest scores [M, H], as many of each image as it has slots [M, K] (which come
    first), in raster order, -1 behind them."""
    chosen = scores.topk(slots.shape[1], dim=-1).indices
    last = scores.shape[1]  # sorts behind every candidate
    chosen = torch.where(slots, chosen, last).sort(-1).values
    return torch.where(slots, chosen, -1)
