"""The multiplicative gate behind a recurrence: norm(out) * act(x W_g)."""

from __future__ import annotations

from torch import Tensor, nn

from ...kernels import gated_rms_norm
from ...kernels.gated_norm import ACTIVATIONS as GATE_ACTIVATIONS
from ..contract import is_probing, record
from .norm import RMSNorm
from .projection import init_projections, make_projection

# Dimensions: B batch, T tokens, H heads, E value width, M model width


class OutputGate(nn.Module):
    """Normalises heads and multiplies them by a gate made from the input of the layer.

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

    def forward(self, out: Tensor, x: Tensor, norm: RMSNorm) -> Tensor:
        """norm(out) gated: out (B, T, H, E), x (B, T, M), result (B, T, H E); `norm` is that of one head."""
        gate = self.proj(x)
        if is_probing():
            record("output_gate", GATE_ACTIVATIONS[self.activation](gate).unflatten(-1, (self.num_heads, -1)))
        return gated_rms_norm(
            out.flatten(-2),
            gate,
            norm.weight.repeat(self.num_heads),
            num_groups=self.num_heads,
            activation=self.activation,
            norm_before_gate=True,
            eps=norm.eps,
        )

    def extra_repr(self) -> str:
        """What it does, for printing."""
        return f"num_heads={self.num_heads}, activation={self.activation!r}"
