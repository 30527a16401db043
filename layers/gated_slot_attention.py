"""Gated slot attention: softmax attention to a few slots that fade and are rewritten by every token.

    g_t = logsigmoid(x_t W_f) / 8,   s_t = 1 - exp(g_t)
    P_t = P_{t-1} Diag(exp(g_t)) + silu(k_t)^T s_t,   a_t = softmax(silu(q_t) P_t)
    R_t = Diag(exp(g_t)) R_{t-1} + s_t^T silu(v_t),   y_t = W_o norm(silu(a_t R_t))

Zhang et al., arXiv 2409.07146; activations and the 8 as in flash-linear-attention.
State: keys P (K x M) and values R (M x E) of the M slots per key/value head, float32. Constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import SlotState, gated_slot_attention
from .contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    check_positive,
    record,
)
from .parts.heads import head_width
from .parts.kv_cache import empty_tokens
from .parts.norm import RMSNorm
from .parts.projection import init_projections, projection_flops
from .parts.state_space import is_number

# Dimensions: B batch, T tokens, N sequences, H query heads, G key/value heads, K key width, E value width,
# M slots

GATE_TEMPERATURE = 8


@dataclass(frozen=True, kw_only=True)
class GatedSlotConfig(MixerConfig):
    """Configuration of `GatedSlotAttention`.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of `num_heads` (default: `num_heads`).
        head_dim: width of a query, key and value head (default: from `expand_k` and `expand_v`).
        value_dim: width of a value head, where it is another.
        expand_k: width of all query heads together, as a multiple of d_model; without head_dim.
        expand_v: width of all heads of the output together, likewise.
        num_slots: slots of a key/value head (default: the width of a key).
        norm_eps: added to the mean square in the norm of the output.
        chunk_size: tokens per block of the parallel form; changes speed, not numbers.
    """

    type: str = "gsa"
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    num_slots: int | None = None
    norm_eps: float = 1e-5
    chunk_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_heads", "chunk_size")
        for field, name in (("value_dim", "expand_v"), ("head_dim", "expand_k")):
            if getattr(self, field) is None:
                width = self.head_dim or head_width(
                    self.d_model, getattr(self, name), self.num_heads, name=name, instead=field
                )
                object.__setattr__(self, field, width)
        for field, default in (("num_kv_heads", self.num_heads), ("num_slots", self.head_dim)):
            if getattr(self, field) is None:
                object.__setattr__(self, field, default)
        check_positive(self, "head_dim", "value_dim", "num_kv_heads", "num_slots")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}. Every key/value head serves an equal group of query heads."
            )
        if not is_number(self.norm_eps) or not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be above 0 and finite, got {self.norm_eps!r}.")

    @property
    def kv_heads(self) -> int:
        """G, resolved."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def key_width(self) -> int:
        """K, resolved."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def value_width(self) -> int:
        """E, resolved."""
        assert self.value_dim is not None
        return self.value_dim

    @property
    def slots(self) -> int:
        """M, resolved."""
        assert self.num_slots is not None
        return self.num_slots


@dataclass(kw_only=True)
class GatedSlotState(State):
    """The slots.

    Attributes:
        keys: (N, G, K, M) float32 (float64 for float64 activations).
        values: (N, G, M, E), likewise.
    """

    keys: Tensor
    values: Tensor


class GatedSlotAttention(TokenMixer):
    """Attention to slots."""

    config: GatedSlotConfig
    overridable = frozenset({"chunk_size"})

    def __init__(self, config: GatedSlotConfig) -> None:
        super().__init__(config)
        c = config
        self.q_proj = nn.Linear(c.d_model, c.num_heads * c.key_width, bias=False)
        self.k_proj = nn.Linear(c.d_model, c.kv_heads * c.key_width, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.kv_heads * c.value_width, bias=False)
        self.f_proj = nn.Linear(c.d_model, c.kv_heads * c.slots, bias=False)
        self.o_norm = RMSNorm(c.num_heads * c.value_width, c.norm_eps)
        self.o_proj = nn.Linear(c.num_heads * c.value_width, c.d_model, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Projections N(0, 0.02)."""
        init_projections(self)
        self.o_norm.reset_parameters()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GatedSlotState:
        """Zeros."""
        c, weight = self.config, self.o_proj.weight
        device, wide = device or weight.device, torch.promote_types(dtype or weight.dtype, torch.float32)
        heads = (batch_size, c.kv_heads)
        return GatedSlotState(
            num_tokens=empty_tokens(batch_size),
            keys=torch.zeros(*heads, c.key_width, c.slots, device=device, dtype=wide),
            values=torch.zeros(*heads, c.slots, c.value_width, device=device, dtype=wide),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: GatedSlotState | None) -> LayerOutput:
        """Project, run both passes, normalise."""
        c = self.config
        q = F.silu(self.q_proj(x)).unflatten(-1, (c.num_heads, -1))  # (B, T, H, K)
        k = F.silu(self.k_proj(x)).unflatten(-1, (c.kv_heads, -1))  # (B, T, G, K)
        v = F.silu(self.v_proj(x)).unflatten(-1, (c.kv_heads, -1))  # (B, T, G, E)
        logits = self.f_proj(x).unflatten(-1, (c.kv_heads, -1))  # (B, T, G, M)
        g = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / GATE_TEMPERATURE
        record("log_decay", g)
        out, slots = gated_slot_attention(
            q,
            k,
            v,
            g,
            scale=1.0,
            initial_state=None if state is None else SlotState(state.keys, state.values),
            return_state=ctx.return_state,
            cu_seqlens=ctx.cu_seqlens,
            chunk_size=ctx.overrides.get("chunk_size", c.chunk_size),
        )  # (B, T, H, E)
        hidden = self.o_proj(self.o_norm(F.silu(out.flatten(-2))))
        new_state = None
        if slots is not None:
            new_state = GatedSlotState(num_tokens=ctx.num_tokens_after, keys=slots[0], values=slots[1])
        return LayerOutput(hidden, new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        """Projections, and per query head a write to and a read of both keys and values of the slots."""
        c = self.config
        memory = (
            c.num_heads * 2 * c.key_width * c.slots + (c.num_heads + c.kv_heads) * c.slots * c.value_width
        )
        return projection_flops(self) + 2 * memory

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Grouped heads with odd widths; as many slots as key channels."""
        return (
            {
                "d_model": 12,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 3,
                "value_dim": 5,
                "num_slots": 4,
                "chunk_size": 5,
            },
            {"d_model": 10, "num_heads": 2, "chunk_size": 7},
        )
