"""The multiplicative gate behind a recurrence: out * act(x W_g)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..contract import record
from .projection import init_projections, make_projection

# Dimensions: B batch, T tokens, H heads, E value width, M model width

GATES = {"sigmoid": F.sigmoid, "silu": F.silu}


class OutputGate(nn.Module):
    """Multiplies heads by a gate made from the input of the layer.

    Args:
        d_model: M.
        num_heads, head_dim: H and E.
        activation: "sigmoid" or "silu".
        rank: of the projection, None for full.
    """

    def __init__(
        self, d_model: int, num_heads: int, head_dim: int, activation: str, rank: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.activation = activation
        self.proj = make_projection(d_model, num_heads * head_dim, rank)

    def init_weights(self) -> None:
        """As all projections."""
        init_projections(self.proj)

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Gates out (B, T, H, E) by x (B, T, M)."""
        gate = GATES[self.activation](self.proj(x).unflatten(-1, (self.num_heads, -1)))
        record("output_gate", gate)
        return out * gate

    def extra_repr(self) -> str:
        """What it does, for printing."""
        return f"num_heads={self.num_heads}, activation={self.activation!r}"
