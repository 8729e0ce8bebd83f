"""Dropout inside transformers' language models, which have none.

What attention and MLP of a layer add to the residual stream is dropped by hooks, so the layers, their names and their
checkpoints stay transformers' own. Where the family has norms behind attention and MLP (OLMo 2 and 3), those come
first: it is the summand that is dropped. Answered tokens can have a probability of their own, as in Molmo, where
`response_residual_dropout` keeps the language model from leaning on the answer's earlier words alone.

Shape suffixes: B rows, S tokens of a row, E width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBABILITY = "drop_probability"
"""Keyword that carries the probability of each token through the language model to every layer's attention."""

_SUMMANDS = (("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm"))
"""Modules whose output is added to the residual stream: without, and with a norm behind."""


class ResidualDropout(nn.Module):
    """The dropout of one layer; holds no parameters and does nothing in evaluation."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.per_token: Tensor | None = None
        """[B, S, 1] while the layer runs, if tokens differ."""

    def remember(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hook in front of the attention, which alone is given the keywords of the language model. It runs again when
        a checkpointed layer is recomputed."""
        self.per_token = kwargs.get(PROBABILITY)

    def drop(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hook behind a summand: the output, or the first of several outputs, with tokens' features dropped."""
        if not self.training:
            return output
        if isinstance(output, tuple):
            return (self._dropped(output[0]), *output[1:])
        return self._dropped(output)

    def drop_last(self, module: nn.Module, args: Any, output: Any) -> Any:
        """`drop` behind the layer's last summand; forgets the tokens' probabilities."""
        dropped = self.drop(module, args, output)
        self.per_token = None
        return dropped

    def _dropped(self, states: Tensor) -> Tensor:
        if self.per_token is None:
            return F.dropout(states, self.probability, training=True)
        keep = 1.0 - self.per_token
        return states * (torch.rand(states.shape, device=states.device) < keep) / keep.to(states.dtype)

    def extra_repr(self) -> str:
        return f"probability={self.probability}"


def add_residual_dropout(language_model: nn.Module, probability: float, response: float | None) -> None:
    """Gives every layer of a transformers language model its dropout; nothing at all where both are 0."""
    if not probability and not response:
        return
    for layer in language_model.layers:  # type: ignore[union-attr]
        dropout = ResidualDropout(probability)
        layer.residual_dropout = dropout
        layer.self_attn.register_forward_pre_hook(dropout.remember, with_kwargs=True)
        after_norms = hasattr(layer, _SUMMANDS[1][1])
        attention, mlp = (getattr(layer, names[after_norms]) for names in _SUMMANDS)
        attention.register_forward_hook(dropout.drop)
        mlp.register_forward_hook(dropout.drop_last)


def drop_probabilities(labels: Tensor | None, probability: float, response: float | None) -> Tensor | None:
    """The probability [B, S, 1] of each token, by whether it is answered (predicts a label); None if all are alike."""
    if labels is None or response is None or response == probability:
        return None
    return torch.where(labels >= 0, response, probability)[..., None]
