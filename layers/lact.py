"""LaCT: one set of queries, keys and values for a window of attention and for a net that learns them.

    q, k, v   = W_q x, W_k x, W_v x                             q and k normalised over their width if wanted
    window    = attention(rope(q), rope(k), v)                  last tokens
    q', k'    = rope(l2(silu(a_q q + b_q))), rope(l2(silu(a_k k + b_k)))      v' = silu(v)
    memory    = norm(f(q')) * silu(W_s x)                       f learns v' under k', parts/fast_net.py
    y         = W_o (window + memory)

Zhang et al., arXiv 2505.23884, and their code. The net has few wide heads, attention many narrow ones; both
see the same channels, and the rotation of the net's queries and keys is that of the attention heads.
State: keys and values of the window in the dtype of the activations; the net (parts/fast_net.py), float32.
Constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .contract import LayerOutput, SequenceContext, State, check_positive, tag_parameter
from .parts.fast_net import FastNet, FastNetConfig, FastNetState, unit_length
from .parts.kv_cache import WindowCache, empty_tokens
from .parts.norm import RMSNorm
from .parts.projection import init_projections, projection_flops
from .parts.window_base import WindowBase
from .sliding_window import SlidingWindowConfig

# Dimensions: B batch, T tokens, N sequences, H attention heads, D their width, F fast heads, E their width,
# W = H D = F E all heads together


@dataclass(frozen=True, kw_only=True)
class LaCTConfig(SlidingWindowConfig, FastNetConfig):
    """Configuration of `LaCT`: the window as in `SlidingWindowConfig`, the net as in `FastNetConfig`.

    Attributes:
        fast_heads: heads of the net, a divisor of num_heads * head_dim.
        qk_norm: RMS-normalise queries and keys over their whole width, not head by head.
        value_silu: silu on the values that the net learns.
        memory_rope: rotate queries and keys of the net too.
        memory_scale: a learned scale of the memory per token and fast head.
    """

    type: str = "lact"
    fast_heads: int = 4
    norm_eps: float = 1e-5
    hidden_mult: float = 1.0
    residual: bool = False
    fast_norm: str = "post"
    value_silu: bool = True
    memory_rope: bool = True
    memory_scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "fast_heads")
        if self.kv_heads != self.num_heads:
            raise ValueError(
                "the net learns a value per query, so num_kv_heads must equal num_heads, got "
                f"{self.kv_heads} and {self.num_heads}. Leave num_kv_heads out."
            )
        if self.num_heads * self.width % self.fast_heads:
            raise ValueError(
                f"fast_heads must divide num_heads * head_dim, got {self.fast_heads} and {self.num_heads} * "
                f"{self.width}."
            )


@dataclass(kw_only=True)
class LaCTState(State):
    """The window, and what the net has become.

    Attributes:
        window: keys and values of the window and the sinks.
        net: see `FastNetState`.
    """

    window: WindowCache
    net: FastNetState


class LaCT(WindowBase):
    """Attention over a window, and fast weights over everything before, from one projection.

    `overrides` of a call may replace `window_size`, `num_sinks` and `chunk_size` while no state is given or
    asked for.
    """

    config: LaCTConfig
    overridable = frozenset({"window_size", "num_sinks", "chunk_size"})

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__(config, config.window_size, config.num_sinks)
        c, width = config, config.num_heads * config.width
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(width, c.norm_eps), RMSNorm(width, c.norm_eps)
        self.qk_scale, self.qk_offset = (
            tag_parameter(nn.Parameter(torch.empty(2, width)), weight_decay=False) for _ in range(2)
        )
        self.net = FastNet(c, c.fast_heads, width // c.fast_heads)
        self.memory_norm = RMSNorm(width // c.fast_heads, c.norm_eps)
        self.scale_proj: nn.Linear | None = None
        if c.memory_scale:
            self.scale_proj = nn.Linear(c.d_model, c.fast_heads)
            tag_parameter(self.scale_proj.bias, weight_decay=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Projections as all attention layers; the net sees queries and keys unchanged at first."""
        super().init_weights()
        nn.init.ones_(self.qk_scale)
        nn.init.zeros_(self.qk_offset)
        self.net.init_weights()
        self.memory_norm.reset_parameters()
        init_projections(self.scale_proj)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LaCTState:
        """An empty window, and the initial net with its gradient."""
        weight = self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return LaCTState(
            num_tokens=empty_tokens(batch_size),
            window=self.empty_cache(batch_size, device, dtype),
            net=self.net.init_state(batch_size, device, dtype),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: LaCTState | None) -> LayerOutput:
        """Project once, for the window and for the net."""
        q, k, v = self._widths(x)
        heads, window = self.attend(
            self._rotated(q, ctx),
            self._rotated(k, ctx),
            self._split(v),
            ctx,
            None if state is None else state.window,
        )
        memory, net = self._memory(x, q, k, v, ctx, state)
        new_state = None
        if window is not None and net is not None:
            new_state = LaCTState(num_tokens=ctx.num_tokens_after, window=window, net=net)
        return self.finish(heads + memory, ctx, new_state)

    def mix_step(self, x: Tensor, ctx: SequenceContext, state: LaCTState) -> LayerOutput:
        """One token of every sequence."""
        q, k, v = self._widths(x)
        heads, window = self.attend_step(
            self._rotated(q, ctx), self._rotated(k, ctx), self._split(v), ctx, state.window
        )
        memory, net = self._memory(x, q, k, v, ctx, state)
        assert net is not None
        new_state = LaCTState(num_tokens=ctx.num_tokens_after, window=window, net=net)
        return self.finish(heads + memory, ctx, new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        """Projections, the window, and the net."""
        projections = self.projection_flops() + projection_flops(self.scale_proj)
        return projections + self.window_flops() + self.net.num_flops()

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """As published at toy size; low-rank nets and sinks, without momentum, rotation and scale."""
        return (
            {
                "d_model": 12,
                "num_heads": 3,
                "fast_heads": 2,
                "window_size": 5,
                "qk_norm": True,
                "chunk_size": 4,
                "lr_init": 0.1,
            },
            {
                "d_model": 10,
                "num_heads": 2,
                "head_dim": 6,
                "fast_heads": 3,
                "window_size": 6,
                "num_sinks": 2,
                "low_rank": 2,
                "momentum": False,
                "value_silu": False,
                "memory_rope": False,
                "memory_scale": False,
                "chunk_size": 7,
                "lr_init": 0.1,
            },
        )

    def _widths(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, W) of all heads together, normed."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _memory(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, ctx: SequenceContext, state: LaCTState | None
    ) -> tuple[Tensor, FastNetState | None]:
        """What the net answers, as heads of the attention (B, T, H, D), and its state."""
        c = self.config
        scale, offset = self.qk_scale.to(q.dtype), self.qk_offset.to(q.dtype)
        q, k = (F.silu(part * scale[i] + offset[i]) for i, part in enumerate((q, k)))
        q, k = (unit_length(part.unflatten(-1, (c.fast_heads, -1))) for part in (q, k))  # (B, T, F, E)
        if c.memory_rope:
            q, k = (self._rotated(part.flatten(-2), ctx).reshape(part.shape) for part in (q, k))
        v = (F.silu(v) if c.value_silu else v).unflatten(-1, (c.fast_heads, -1))
        out, net = self.net(x, q, k, v, ctx, None if state is None else state.net)
        out = self.memory_norm(out)
        if self.scale_proj is not None:
            out = out * F.silu(self.scale_proj(x))[..., None]
        return self._split(out.flatten(-2)), net

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, T, H, D)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _rotated(self, x: Tensor, ctx: SequenceContext) -> Tensor:
        """(B, T, W) -> (B, T, H, D), turned by the positions."""
        x = self._split(x)
        return x if self.rotary is None else self.rotary.rotate(x, ctx)
