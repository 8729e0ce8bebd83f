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
    """`down(silu(gate(x)) * up(x))`, without biases.

    Its matrices begin as those of the language model do (`initializer_range`).
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.up_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.down_proj = nn.Linear(hidden_features, out_features, bias=False)

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
