"""Softmax attention with forget gates: every token lets all before it fade (Forgetting Transformer, FoX).

    f_t  = sigmoid(w_h . x_t + b_h)                                   one per query head
    s_ti = q_t . k_i / sqrt(D) + sum_{j=i+1..t} log f_j               (arXiv 2503.02130, eq. 9)
    o_t  = sum_{i <= t} softmax_i(s_ti) v_i

Trained from scratch, without rotary positions. The decay between two tokens is set by those in between, not
by the older one as in `gated_attention`.

State: keys, values and log f of every token read; grows with the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import decayed_attention, decode_attention
from .contract import LayerOutput, SequenceContext, record, tag_parameter
from .parts.attention_base import AttentionBase, HeadsConfig
from .parts.kv_cache import DecayedCache, growing_slots
from .parts.state_space import is_number

# Dimensions: B batch, T tokens, N sequences, H query heads, G key/value heads, D head width, P slots of the
# cache


@dataclass(frozen=True, kw_only=True)
class ForgettingAttentionConfig(HeadsConfig):
    """Configuration of `ForgettingAttention`; heads as in `HeadsConfig`, without rotary positions by default.

    Attributes:
        gate_bias: what the forget gates begin with, before their sigmoid; a higher one keeps tokens longer.
    """

    type: str = "forgetting_attention"
    rope_theta: float | None = None
    gate_bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.gate_bias) or not math.isfinite(self.gate_bias):
            raise ValueError(f"gate_bias must be a number, got {self.gate_bias!r}.")


class ForgettingAttention(AttentionBase):
    """Causal softmax attention under forget gates.

    Extras: `log_forget` (B, T, H); `head_outputs`.
    """

    config: ForgettingAttentionConfig

    def __init__(self, config: ForgettingAttentionConfig) -> None:
        super().__init__(config)
        self.f_proj = nn.Linear(config.d_model, config.num_heads)
        tag_parameter(self.f_proj.bias, weight_decay=False)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.f_proj.weight, std=0.02)
        nn.init.constant_(self.f_proj.bias, self.config.gate_bias)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DecayedCache:
        weight = self.q_proj.weight
        return DecayedCache.empty_decayed(
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            self.num_heads,
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )

    def log_forget(self, x: Tensor) -> Tensor:
        """(B, T, H), float32 or float64."""
        logits = self.f_proj(x)
        log_f = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        record("log_forget", log_f)
        return log_f

    def mix(self, x: Tensor, ctx: SequenceContext, state: DecayedCache | None) -> LayerOutput:
        q, k, v = self.project(x, ctx)
        log_f = self.log_forget(x)
        prefix = None if state is None else state.decayed_prefix(ctx)
        out = decayed_attention(q, k, v, log_f, form="sum", prefix=prefix, cu_seqlens=ctx.cu_seqlens)
        new_state = None
        if ctx.return_state:
            cache = (
                state
                if state is not None
                else self.init_state(ctx.batch_size, device=x.device, dtype=k.dtype)
            )
            new_state = cache.append_decayed(k, v, log_f, ctx)
        return self._finish(out, log_f, ctx, new_state)

    def mix_step(self, x: Tensor, ctx: SequenceContext, state: DecayedCache) -> LayerOutput:
        q, k, v = self.project(x, ctx)
        log_f = self.log_forget(x)
        new_state = state.append_decayed(k, v, log_f, ctx)
        key, value, faded, valid = new_state.slots(ctx)
        # unread slots hold zeros, behind the last token: they add nothing
        since = faded.flip(1).cumsum(1).flip(1)  # (N, P, H), the token of the slot included
        bias = torch.cat([since[:, 1:], torch.zeros_like(since[:, :1])], 1)
        out = decode_attention(q, key, value, valid=valid, bias=bias).output
        return self._finish(out, log_f, ctx, new_state)

    def _finish(
        self, out: Tensor, log_f: Tensor, ctx: SequenceContext, state: DecayedCache | None
    ) -> LayerOutput:
        done = self.finish(out, ctx, state)
        if ctx.return_extras:
            done.extras["log_forget"] = log_f
        return done

    def state_num_bytes(
        self, num_tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        wide = torch.promote_types(dtype, torch.float32).itemsize
        per_slot = 2 * self.num_kv_heads * self.head_dim * dtype.itemsize + self.num_heads * wide
        return batch_size * (8 + growing_slots(num_tokens) * per_slot)

    def flops_per_token(self, num_tokens: int) -> int:
        attended = 4 * self.num_heads * self.head_dim * (num_tokens + 1)
        return self.projection_flops() + 2 * self.d_model * self.num_heads + attended

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return (
            {"d_model": 16, "num_heads": 2},
            {
                "d_model": 18,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 6,
                "rope_theta": 10000.0,
                "qk_norm": True,
                "gate_bias": 2.0,
            },
        )
