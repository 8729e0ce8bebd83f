"""Projectors: a pooled feature becomes a vector of the language model's width. `PROJECTORS` names what there is."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


class LinearProjector(nn.Linear):
    """One matrix without bias."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def first_weights(self) -> None:
        """Xavier's uniform weights, as in Molmo."""
        init.xavier_uniform_(self.weight)


class SwiGLUProjector(nn.Module):
    """`down(silu(gate(x)) * up(x))`, without biases."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.up_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.down_proj = nn.Linear(hidden_features, out_features, bias=False)

    def first_weights(self) -> None:
        """Keeps the scale but for the last matrix: encoder features have no norm behind them, word embeddings are
        small, and image tokens of many times the size of words delayed learning."""
        for linear in (self.gate_proj, self.up_proj):
            init.normal_(linear.weight, std=linear.in_features**-0.5)
        init.normal_(self.down_proj.weight, std=0.1 * self.down_proj.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ResidualProjector(nn.Module):
    """A SwiGLU to the language model's width, then `y + SwiGLU(y)` at that width."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.first = SwiGLUProjector(in_features, hidden_features, out_features)
        self.second = SwiGLUProjector(out_features, hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + self.second(y)


PROJECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearProjector,
    "mlp": SwiGLUProjector,
    "mlpx": ResidualProjector,
}
