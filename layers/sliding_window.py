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

from .contract import LayerOutput, SequenceContext
from .parts.attention_base import HeadsConfig, check_window
from .parts.kv_cache import WindowCache
from .parts.window_base import WindowBase

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


class SlidingWindowAttention(WindowBase):
    """Causal attention with a bounded reach; equals full attention while the sequence fits the window.

    `overrides` of a call may replace `window_size` and `num_sinks` while no state is given or asked for.
    """

    config: SlidingWindowConfig
    overridable = frozenset({"window_size", "num_sinks"})

    def __init__(self, config: SlidingWindowConfig) -> None:
        super().__init__(config, config.window_size, config.num_sinks)
        self.init_weights()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> WindowCache:
        weight = self.q_proj.weight
        return self.empty_cache(batch_size, device or weight.device, dtype or weight.dtype)

    def mix(self, x: Tensor, ctx: SequenceContext, state: WindowCache | None) -> LayerOutput:
        heads, cache = self.attend(*self.project(x, ctx), ctx, state)
        return self.finish(heads, ctx, cache)

    def mix_step(self, x: Tensor, ctx: SequenceContext, state: WindowCache) -> LayerOutput:
        heads, cache = self.attend_step(*self.project(x, ctx), ctx, state)
        return self.finish(heads, ctx, cache)

    def flops_per_token(self, num_tokens: int) -> int:
        return self.projection_flops() + self.window_flops()

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
