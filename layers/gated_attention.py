"""Softmax attention whose tokens fade as they grow old, at a rate that each says for itself (TRIM-KV).

    s_ti = q_t . k_i / sqrt(D) + (t - i) g_i,   g_i = log beta_i <= 0        (arXiv 2512.03324)
    o_t  = sum_{i <= t} softmax_i(s_ti) v_i

The form in which retention gates are trained: nothing is dropped, and g comes out as an extra for the loss on
what is kept. Afterwards the bias goes and a bounded cache keeps the tokens of largest age * g.

State: keys, values and g of every token read; grows with the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import attention, decayed_attention, decode_attention
from .contract import LayerOutput, SequenceContext, check_positive, record
from .parts.attention_base import AttentionBase, HeadsConfig
from .parts.kv_cache import DecayedCache, growing_slots
from .parts.retention_gate import RetentionGate, check_gates

# Dimensions: B batch, T tokens, N sequences, H query heads, G key/value heads, D head width, P slots of the
# cache


@dataclass(frozen=True, kw_only=True)
class GatedAttentionConfig(HeadsConfig):
    """Configuration of `GatedAttention`; heads as in `HeadsConfig`.

    Attributes:
        gate: kind of the gates: "mlp", "mlp3", "kv" or "kv_swiglu", see `RetentionGate`.
        gate_width: their hidden width.
        gate_activation: "silu", "gelu", "gelu_tanh" or "relu".
        gate_bias: what they begin with: a number (the paper: 18), or "auto" for max(8, ln(20 train_length)).
        train_length: tokens of the texts they learn from.
    """

    type: str = "gated_attention"
    gate: str = "mlp"
    gate_width: int = 512
    gate_activation: str = "silu"
    gate_bias: float | str = "auto"
    train_length: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        check_gates(self.gate, self.gate_activation, self.gate_bias)
        check_positive(self, "gate_width", "train_length")


class GatedAttention(AttentionBase):
    """Causal softmax attention with retention gates, over all tokens.

    Extras: `log_retention` (B, T, G), the g of every token; `head_outputs`.

    Attributes:
        memory_enabled: set to False it is plain attention: the gates are read and say nothing.
    """

    config: GatedAttentionConfig

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__(config)
        self.retention_gate = RetentionGate(
            config.d_model,
            config.kv_heads,
            config.width,
            width=config.gate_width,
            activation=config.gate_activation,
            bias_init=config.gate_bias,
            kind=config.gate,
            train_length=config.train_length,
        )
        self.memory_enabled = True
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        self.retention_gate.init_weights()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DecayedCache:
        weight = self.q_proj.weight
        return DecayedCache.empty_decayed(
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            self.num_kv_heads,
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: DecayedCache | None) -> LayerOutput:
        q, k, v = self.project(x, ctx)
        g = self.retention_gate(x, k, v)  # (B, T, G)
        record("log_retention", g)
        if self.memory_enabled:
            faded = None if state is None else state.decayed_prefix(ctx)
            out = decayed_attention(q, k, v, g, prefix=faded, cu_seqlens=ctx.cu_seqlens)  # (B, T, H, D)
        else:
            plain = None if state is None else state.prefix(ctx)
            out = attention(q, k, v, prefix=plain, cu_seqlens=ctx.cu_seqlens).output
        new_state = None
        if ctx.return_state:
            cache = (
                state
                if state is not None
                else self.init_state(ctx.batch_size, device=x.device, dtype=k.dtype)
            )
            new_state = cache.append_decayed(k, v, g, ctx)
        return self._finish(out, g, ctx, new_state)

    def mix_step(self, x: Tensor, ctx: SequenceContext, state: DecayedCache) -> LayerOutput:
        q, k, v = self.project(x, ctx)
        g = self.retention_gate(x, k, v)
        record("log_retention", g)
        new_state = state.append_decayed(k, v, g, ctx)
        key, value, faded, valid = new_state.slots(ctx)
        bias = None
        if self.memory_enabled:
            place = ctx.positions - torch.arange(key.shape[1], device=x.device)  # (N, P), age of each slot
            bias = place.clamp(min=0)[..., None] * faded  # (N, P, G)
            bias = bias.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
        out = decode_attention(q, key, value, valid=valid, bias=bias).output
        return self._finish(out, g, ctx, new_state)

    def _finish(
        self, out: Tensor, g: Tensor, ctx: SequenceContext, state: DecayedCache | None
    ) -> LayerOutput:
        done = self.finish(out, ctx, state)
        if ctx.return_extras:
            done.extras["log_retention"] = g
        return done

    def state_num_bytes(
        self, num_tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        wide = torch.promote_types(dtype, torch.float32).itemsize
        per_slot = self.num_kv_heads * (2 * self.head_dim * dtype.itemsize + wide)
        return batch_size * (8 + growing_slots(num_tokens) * per_slot)

    def flops_per_token(self, num_tokens: int) -> int:
        attended = 4 * self.num_heads * self.head_dim * (num_tokens + 1)
        return self.projection_flops() + self.retention_gate.flops_per_token() + attended

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return (
            {"d_model": 16, "num_heads": 2, "gate_width": 8, "gate_bias": 1.0},
            {
                "d_model": 18,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 6,
                "qk_norm": True,
                "gate": "kv",
                "gate_width": 12,
                "gate_bias": 3.0,
            },
        )
