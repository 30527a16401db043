"""Softmax attention over the whole past.

    o_t = sum_{j <= t} softmax_j(q_t . k_j / sqrt(D)) v_j        (Vaswani et al., 2017; grouped heads: Ainslie
    et al., 2023)

State: the keys and values of every token read, in the dtype of the activations; grows with the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import attention, decode_attention
from .contract import LayerOutput, SequenceContext
from .parts.attention_base import AttentionBase, HeadsConfig
from .parts.kv_cache import GrowingCache, growing_slots

# Dimensions: B batch, T tokens, N sequences, H query heads, G key/value heads, D head width, P slots of the
# cache


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(HeadsConfig):
    """Configuration of `Attention`; all fields are those of `HeadsConfig`."""

    type: str = "attention"


class Attention(AttentionBase):
    """Causal softmax attention with grouped heads and rotary positions."""

    config: AttentionConfig

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.init_weights()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GrowingCache:
        weight = self.q_proj.weight
        return GrowingCache.empty(
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim,
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: GrowingCache | None) -> LayerOutput:
        q, k, v = self.project(x, ctx)
        prefix = None if state is None else state.prefix(ctx)
        out = attention(q, k, v, prefix=prefix, cu_seqlens=ctx.cu_seqlens).output  # (B, T, H, D)
        new_state = None
        if ctx.return_state:
            cache = (
                state
                if state is not None
                else self.init_state(ctx.batch_size, device=x.device, dtype=k.dtype)
            )
            new_state = cache.append(k, v, ctx)
        return self.finish(out, ctx, new_state)

    def mix_step(self, x: Tensor, ctx: SequenceContext, state: GrowingCache) -> LayerOutput:
        q, k, v = self.project(x, ctx)
        new_state = state.append(k, v, ctx)
        longest = int(new_state.num_tokens.max())
        valid = None
        if ctx.uniform_num_seen is None:
            valid = (torch.arange(longest) < new_state.num_tokens[:, None]).to(x.device)  # (N, P)
        out = decode_attention(
            q, new_state.key[:, :longest], new_state.value[:, :longest], valid=valid
        ).output
        return self.finish(out, ctx, new_state)

    def state_num_bytes(
        self, num_tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        per_slot = 2 * self.num_kv_heads * self.head_dim * dtype.itemsize
        return batch_size * (8 + growing_slots(num_tokens) * per_slot)

    def flops_per_token(self, num_tokens: int) -> int:
        return self.projection_flops() + 4 * self.num_heads * self.head_dim * (num_tokens + 1)

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return (
            {"d_model": 16, "num_heads": 2},
            {
                "d_model": 18,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 6,
                "qk_norm": True,
                "qkv_bias": True,
                "o_bias": True,
            },
        )
