"""BaseConv: a short causal convolution with a multiplicative gate, the cheapest mixer of BASED models.

    gated (arXiv 2402.18668)      [u | w] = W_in x + b,   y = W_out (silu(conv(u)) * w) + b
    zoology (arXiv 2312.04927)    y = conv(x) * (W x + b) + x        (with the residual inside, as published)

conv is depthwise over the last k = `conv_size` tokens, conv(u)_t = sum_i c_i u_{t - k + 1 + i}, zeros before
the start.
State: the last conv_size - 1 inputs of the convolution, in the dtype of the activations. Constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import causal_conv
from .contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    check_choice,
    check_positive,
    tag_parameter,
)
from .parts.kv_cache import empty_tokens

# Dimensions: B batch, T tokens, N sequences, M model width, D channels of the convolution, K taps


@dataclass(frozen=True, kw_only=True)
class BaseConvConfig(MixerConfig):
    """Configuration of `BaseConv`.

    Attributes:
        variant: "gated" or "zoology".
        conv_size: taps of the convolution, the token itself included.
        expand: the gated variant projects to expand * d_model, half convolved and half gate; even.
    """

    type: str = "base_conv"
    variant: str = "gated"
    conv_size: int = 3
    expand: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, ("gated", "zoology"))
        check_positive(self, "conv_size", "expand")
        if self.expand * self.d_model % 2:
            raise ValueError(
                f"expand * d_model must be even, got {self.expand} * {self.d_model}: one half is convolved, "
                "the other is the gate. Use an even expand."
            )


@dataclass(kw_only=True)
class BaseConvState(State):
    """What the convolution still needs of the past.

    Attributes:
        tail: (N, K - 1, D) its last inputs, oldest first, zeros where none was read.
    """

    tail: Tensor


class BaseConv(TokenMixer):
    """Gated short convolution."""

    config: BaseConvConfig

    def __init__(self, config: BaseConvConfig) -> None:
        super().__init__(config)
        self.is_gated = config.variant == "gated"
        self.channels = config.expand * config.d_model // 2 if self.is_gated else config.d_model
        self.in_proj = nn.Linear(config.d_model, 2 * self.channels if self.is_gated else config.d_model)
        self.conv_weight = tag_parameter(
            nn.Parameter(torch.empty(self.channels, config.conv_size)), weight_decay=False
        )
        self.conv_bias: nn.Parameter | None = None
        self.out_proj: nn.Linear | None = None
        if self.is_gated:
            self.out_proj = nn.Linear(self.channels, config.d_model)
        else:
            self.conv_bias = nn.Parameter(torch.empty(self.channels))
        for bias in (self.in_proj.bias, self.conv_bias, self.out_proj.bias if self.out_proj else None):
            if bias is not None:
                tag_parameter(bias, weight_decay=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Projections N(0, 0.02), biases zero, taps uniform within 1 / sqrt(conv_size)."""
        bound = 1 / math.sqrt(self.config.conv_size)
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.zeros_(self.conv_bias)
        for linear in (self.in_proj, self.out_proj):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BaseConvState:
        """Zeros, which is what stands before the first token."""
        weight = self.in_proj.weight
        tail = torch.zeros(
            batch_size,
            self.config.conv_size - 1,
            self.channels,
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )
        return BaseConvState(num_tokens=empty_tokens(batch_size), tail=tail)

    def mix(self, x: Tensor, ctx: SequenceContext, state: BaseConvState | None) -> LayerOutput:
        """Convolves and gates."""
        tail = None if state is None else state.tail
        if self.out_proj is not None:
            u, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, T, D) each
            y, tail = causal_conv(
                u, self.conv_weight, activation="silu", tail=tail, cu_seqlens=ctx.cu_seqlens
            )
            hidden = self.out_proj(y * gate)
        else:
            y, tail = causal_conv(x, self.conv_weight, self.conv_bias, tail=tail, cu_seqlens=ctx.cu_seqlens)
            hidden = y * self.in_proj(x) + x
        new_state = BaseConvState(num_tokens=ctx.num_tokens_after, tail=tail) if ctx.return_state else None
        return LayerOutput(hidden, new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        """The projections; the convolution has no matrix product."""
        linears = [self.in_proj] if self.out_proj is None else [self.in_proj, self.out_proj]
        return 2 * sum(linear.weight.numel() for linear in linears)

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Both variants."""
        return (
            {"d_model": 16, "conv_size": 3},
            {"d_model": 8, "variant": "zoology", "conv_size": 4},
        )
