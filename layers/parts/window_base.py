"""Softmax attention over the last tokens and the first few, for the layers that have it.

token i sees token j  iff  j <= i  and  (i - j < W  or  j < S)        (W counts the token itself)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import attention, decode_attention
from ..contract import SequenceContext
from .attention_base import AttentionBase, HeadsConfig, overridden_window
from .kv_cache import WindowCache

# Dimensions: B batch, T tokens, H query heads, G key/value heads, D head width, W window, S sinks


class WindowBase(AttentionBase):
    """Attention of heads with a bounded reach; subclasses say what is projected and what becomes of it.

    Args:
        config: the heads.
        window_size, num_sinks: W and S.
    """

    def __init__(self, config: HeadsConfig, window_size: int, num_sinks: int) -> None:
        super().__init__(config)
        self.window_size, self.num_sinks = window_size, num_sinks

    def empty_cache(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> WindowCache:
        """Sinks and window without tokens."""
        slots, heads, width = self.num_sinks + self.window_size, self.num_kv_heads, self.head_dim
        return WindowCache.empty(batch_size, slots, heads, width, width, device=device, dtype=dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: SequenceContext, state: WindowCache | None
    ) -> tuple[Tensor, WindowCache | None]:
        """Outputs of the heads (B, T, H, D) and, where the call wants it, the new cache.

        Args:
            q: (B, T, H, D).
            k, v: (B, T, G, D).
        """
        window_size, num_sinks = overridden_window(ctx, state, self.window_size, self.num_sinks)
        prefix = None if state is None else state.prefix(ctx, num_sinks)
        out = attention(
            q, k, v, window_size=window_size, num_sinks=num_sinks, prefix=prefix, cu_seqlens=ctx.cu_seqlens
        ).output  # (B, T, H, D)
        if not ctx.return_state:
            return out, None
        cache = state if state is not None else self.empty_cache(ctx.batch_size, k.device, k.dtype)
        return out, cache.append(k, v, ctx, num_sinks)

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: SequenceContext, state: WindowCache
    ) -> tuple[Tensor, WindowCache]:
        """`attend` for one token of every sequence."""
        cache = state.append(k, v, ctx, self.num_sinks)
        # the ring holds exactly the tokens that the newest one may see
        return decode_attention(q, cache.key, cache.value, valid=cache.valid(q.device)).output, cache

    def window_flops(self) -> int:
        """Matrix-product FLOPs of one token over all slots."""
        return 4 * self.num_heads * self.head_dim * (self.num_sinks + self.window_size)
