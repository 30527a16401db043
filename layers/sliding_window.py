"""Softmax attention over the last W tokens and, optionally, the first S (attention sinks).

    token i sees token j  iff  j <= i  and  (i - j < W  or  j < S)        (W counts the token itself)

Sources: sliding window, Beltagy et al. 2020 (2004.05150); sinks, Xiao et al. 2023 (2309.17453), here with
unchanged positions.
State: keys and values of S + W tokens, in the dtype of the activations; constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import attention, decode_attention
from .contract import LayerOutput, SequenceContext
from .parts.attention_base import AttentionBase, HeadsConfig, check_window, overridden_window
from .parts.kv_cache import WindowCache

# Dimensions: B batch, T tokens, N sequences, H query heads, G key/value heads, D head width, W window, S
# sinks


@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(HeadsConfig):
    """Configuration of `SlidingWindowAttention`; heads as in `HeadsConfig`.

    Attributes:
        window_size: tokens seen, the token itself included.
        num_sinks: first tokens of the sequence that stay visible, in addition to the window.
    """

    type: str = "sliding_window"
    window_size: int
    num_sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window_size, self.num_sinks)


class SlidingWindowAttention(AttentionBase):
    """Causal attention with a bounded reach; equals full attention while the sequence fits the window.

    `overrides` of a call may replace `window_size` and `num_sinks` while no state is given or asked for.
    """

    config: SlidingWindowConfig
    overridable = frozenset({"window_size", "num_sinks"})

    def __init__(self, config: SlidingWindowConfig) -> None:
        super().__init__(config)
        self.window_size, self.num_sinks = config.window_size, config.num_sinks
        self.init_weights()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> WindowCache:
        weight = self.q_proj.weight
        return WindowCache.empty(
            batch_size,
            self.num_sinks + self.window_size,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim,
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: WindowCache | None) -> LayerOutput:
        window_size, num_sinks = overridden_window(ctx, state, self.window_size, self.num_sinks)
        q, k, v = self.project(x, ctx)
        prefix = None if state is None else state.prefix(ctx, num_sinks)
        out = attention(
            q, k, v, window_size=window_size, num_sinks=num_sinks, prefix=prefix, cu_seqlens=ctx.cu_seqlens
        ).output  # (B, T, H, D)
        new_state = None
        if ctx.return_state:
            cache = (
                state
                if state is not None
                else self.init_state(ctx.batch_size, device=x.device, dtype=k.dtype)
            )
            new_state = cache.append(k, v, ctx, num_sinks)
        return self.finish(out, ctx, new_state)

    def mix_step(self, x: Tensor, ctx: SequenceContext, state: WindowCache) -> LayerOutput:
        q, k, v = self.project(x, ctx)
        new_state = state.append(k, v, ctx, self.num_sinks)
        # the ring holds exactly the tokens that the newest one may see
        out = decode_attention(q, new_state.key, new_state.value, valid=new_state.valid(x.device)).output
        return self.finish(out, ctx, new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        return self.projection_flops() + 4 * self.num_heads * self.head_dim * (
            self.num_sinks + self.window_size
        )

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return (
            {"d_model": 16, "num_heads": 2, "window_size": 5},
            {
                "d_model": 18,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 6,
                "window_size": 7,
                "num_sinks": 3,
                "qk_norm": True,
            },
        )
