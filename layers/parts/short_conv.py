"""A short causal convolution per channel, in front of a recurrence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...kernels import causal_conv
from ..contract import SequenceContext, tag_parameter

# Dimensions: B batch, T tokens, N sequences, D channels, K taps


class ShortConv(nn.Module):
    """y_t = act(sum_{i < K} w_i x_{t - K + 1 + i} + b) per channel, zeros before the start.

    Args:
        channels: D.
        conv_size: K, taps of the convolution, the token itself included.
        activation: "silu", or "none".
        use_bias: whether there is a b.
    """

    def __init__(
        self, channels: int, conv_size: int, activation: str = "silu", *, use_bias: bool = False
    ) -> None:
        super().__init__()
        self.activation = None if activation == "none" else activation
        self.weight = tag_parameter(nn.Parameter(torch.empty(channels, conv_size)), weight_decay=False)
        self.bias: nn.Parameter | None = None
        if use_bias:
            self.bias = tag_parameter(nn.Parameter(torch.empty(channels)), weight_decay=False)

    def init_weights(self) -> None:
        """Taps and bias uniform within 1 / sqrt(K), as torch initialises such a convolution."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def init_identity(self) -> None:
        """Every token passes through as it is (up to the activation)."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[:, -1])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def empty_tail(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """(N, K - 1, D) zeros, which is what stands before the first token."""
        channels, conv_size = self.weight.shape
        return torch.zeros(batch_size, conv_size - 1, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, ctx: SequenceContext, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolves x (B, T, D) in internal form.

        Args:
            tail: (N, K - 1, D) last inputs of the calls before, oldest first; None for none.

        Returns:
            y (B, T, D) and the new tail.
        """
        return causal_conv(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            tail=None if tail is None else tail.to(x.dtype),  # autocast may have changed the activations
            cu_seqlens=ctx.cu_seqlens,
        )

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.weight.shape[0]}, conv_size={self.weight.shape[1]}, activation={self.activation!r}"
