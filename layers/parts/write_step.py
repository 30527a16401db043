"""The step of the delta rule: how far a token moves what its key reads towards its value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contract import record
from .projection import init_projections, make_projection

# Dimensions: B batch, T tokens, H value heads, M model width


class WriteStep(nn.Module):
    """beta = sigmoid(x W), one per token and value head.

    Args:
        d_model: M.
        num_heads: H.
        largest: 1, or 2 for steps beyond the value, which give the transition negative eigenvalues
            (arXiv 2411.12537).
    """

    def __init__(self, d_model: int, num_heads: int, largest: float = 1.0) -> None:
        super().__init__()
        self.largest = largest
        self.proj = make_projection(d_model, num_heads)

    def init_weights(self) -> None:
        """As all projections."""
        init_projections(self.proj)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """Steps of the tokens.

        Args:
            x: (B, T, M).
            keys: (B, T, G, K) of length one but for rounding, H a multiple of G.

        Returns:
            (B, T, H) float32, float64 for float64 activations.
        """
        logits = self.proj(x)
        beta = self.largest * torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        if self.largest > 1 and keys.dtype in (torch.bfloat16, torch.float16):
            # with beta |k|^2 above 2, as for a long step and a key rounded up, a repeated token would let the
            # memory grow without bound
            square = keys.detach().float().square().sum(-1)  # (B, T, G)
            most = 2 / square.repeat_interleave(beta.shape[2] // square.shape[2], 2)
            beta = torch.minimum(beta, most)
        record("beta", beta)
        return beta

    def extra_repr(self) -> str:
        """What it does, for printing."""
        return f"largest={self.largest}"
