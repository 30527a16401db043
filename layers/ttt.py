"""Test-time training: a net per head learns to map keys to values while it reads (arXiv 2407.04620).

    f(x; W) = x + LN(g(x; W)),   g linear (TTT-Linear) or with one hidden layer and tanh-GELU (TTT-MLP)
    P_i = sum over the mini-batch up to token i of rate_j * gradient of 1/2 |f(k_j; W) - v_j|^2 by W
    o_i = f(q_i; W - reader_rate_i P_i),   W <- W - reader_rate_last P_last after a mini-batch
    rate_j = base_lr sigmoid(x_j w + b) / F,   reader_rate_i = max(0, 1/(i + 1) + delta_i)
    y = W_o (LN(o) * gelu(x W_g))   the gate only with use_gate

Queries and keys are rotated by their place in the mini-batch. Gradients of a mini-batch are taken at its
start. State: the fast weights at the start of the open mini-batch and the sums that its tokens have written,
float32; with share_qk also the last inputs of the convolutions. Constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import TTTState, ttt
from .contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    check_positive,
    record,
    tag_parameter,
)
from .parts.kv_cache import empty_tokens
from .parts.projection import init_projections, projection_flops
from .parts.rotary import Rotary
from .parts.short_conv import ShortConv
from .parts.state_space import is_number, undecayed

# Dimensions: B batch, T tokens, N sequences, H heads, F head width, G hidden width, C tokens of a mini-batch,
# D model width, K taps

CONV_SIZE = 4  # taps of the convolutions that make queries and keys of one projection
NORM_EPS = 1e-6  # of both norms
HIDDEN_MULT = 4  # hidden width of the net of TTT-MLP, in head widths
NAMES = ("w1", "b1", "w2", "b2")


@dataclass(frozen=True, kw_only=True)
class TTTLinearConfig(MixerConfig):
    """Configuration of `TTTLinear`.

    Attributes:
        num_heads: heads, each with a net of its own; a divisor of d_model into heads of even width.
        mini_batch_size: tokens whose gradients are taken at the same weights.
        base_lr: factor on the inner rates.
        rope_theta: base of the rotation of queries and keys by their place in the mini-batch.
        use_gate: multiply the normalised output by gelu(x W_g).
        share_qk: make queries and keys of one projection by two convolutions of four taps.
    """

    type: str = "ttt_linear"
    num_heads: int
    mini_batch_size: int = 16
    base_lr: float = 1.0
    rope_theta: float = 10000.0
    use_gate: bool = False
    share_qk: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_heads", "mini_batch_size")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads must divide d_model, got {self.num_heads} heads and d_model {self.d_model}."
            )
        if not is_number(self.base_lr) or not 0 < self.base_lr < float("inf"):
            raise ValueError(f"base_lr must be a finite number above 0, got {self.base_lr!r}.")
        Rotary(self.head_dim, self.rope_theta)  # raises on an odd width or a bad base

    @property
    def head_dim(self) -> int:
        """F, the width of a head."""
        return self.d_model // self.num_heads

    @property
    def net_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the fast weights of one head."""
        return (self.head_dim, self.head_dim), (1, self.head_dim)


@dataclass(frozen=True, kw_only=True)
class TTTMLPConfig(TTTLinearConfig):
    """Configuration of `TTTMLP`: that of `TTTLinear` with a lower default rate."""

    type: str = "ttt_mlp"
    base_lr: float = 0.1

    @property
    def net_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the fast weights of one head."""
        width, hidden = self.head_dim, HIDDEN_MULT * self.head_dim
        return (width, hidden), (1, hidden), (hidden, width), (1, width)


@dataclass(kw_only=True)
class TTTLayerState(State):
    """What the inner nets keep; float32 but for the tail (float64 for float64 activations).

    Attributes:
        w1: (N, H, F, F), or (N, H, F, G) of TTT-MLP: fast weights after the last whole mini-batch.
        b1: (N, H, 1, F or G), likewise.
        w2, b2: (N, H, G, F) and (N, H, 1, F), likewise; None without a hidden layer.
        pending_w1, pending_b1, pending_w2, pending_b2: what the open mini-batch has written, without the
            readers' rates.
        tail: (N, K - 1, D) last inputs of the convolutions, in the dtype of the activations; None without
            them.
    """

    w1: Tensor
    b1: Tensor
    pending_w1: Tensor
    pending_b1: Tensor
    w2: Tensor | None = None
    b2: Tensor | None = None
    pending_w2: Tensor | None = None
    pending_b2: Tensor | None = None
    tail: Tensor | None = None


class TTTLinear(TokenMixer):
    """Test-time training; the config says with which net."""

    config: TTTLinearConfig

    def __init__(self, config: TTTLinearConfig) -> None:
        super().__init__(config)
        c, width = config, config.d_model
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = None if c.share_qk else nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, width, bias=False) if c.use_gate else None
        self.o_proj = nn.Linear(width, width, bias=False)
        self.rate_proj = nn.Linear(width, c.num_heads)
        tag_parameter(self.rate_proj.bias, weight_decay=False)
        self.q_conv, self.k_conv = (
            ShortConv(width, CONV_SIZE, "none", use_bias=True) if c.share_qk else None for _ in range(2)
        )
        self.reader_offset = undecayed(c.mini_batch_size)  # delta
        self.norm_weight, self.norm_bias = (undecayed(c.num_heads, c.head_dim) for _ in range(2))
        self.names = NAMES[: len(c.net_shapes)]
        for name, shape in zip(self.names, c.net_shapes, strict=True):
            initial = nn.Parameter(torch.empty(c.num_heads, *shape))
            setattr(self, name, tag_parameter(initial, weight_decay=name.startswith("w")))
        self.post_norm = nn.LayerNorm(width, eps=NORM_EPS)
        for parameter in self.post_norm.parameters():
            tag_parameter(parameter, weight_decay=False)
        self.rotary = Rotary(c.head_dim, c.rope_theta)
        self.init_weights()

    def init_weights(self) -> None:
        """Projections and first nets N(0, 0.02) with zero biases; norms as the identity."""
        init_projections(self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.o_proj, self.rate_proj)
        for conv in (self.q_conv, self.k_conv):
            if conv is not None:
                conv.init_weights()
        for name in self.names:
            nn.init.normal_(getattr(self, name), std=0.02 if name.startswith("w") else 0.0)
        nn.init.zeros_(self.reader_offset)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        self.post_norm.reset_parameters()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TTTLayerState:
        """The learned nets, nothing pending."""
        weight = self.o_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        parts: dict[str, Tensor] = {}
        for name in self.names:
            initial = getattr(self, name).to(device, wide).expand(batch_size, -1, -1, -1)
            parts |= {name: initial.clone(), f"pending_{name}": torch.zeros_like(initial)}
        return TTTLayerState(
            num_tokens=empty_tokens(batch_size),
            tail=None if self.q_conv is None else self.q_conv.empty_tail(batch_size, device, dtype),
            **parts,
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: TTTLayerState | None) -> LayerOutput:
        """Project, rotate, read with the nets that learn, normalise."""
        c = self.config
        if state is None:
            state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
        q, tail = self.q_proj(x), None
        if self.q_conv is not None and self.k_conv is not None:
            k, tail = self.k_conv(q, ctx, state.tail)
            q, _ = self.q_conv(q, ctx, state.tail)
        else:
            assert self.k_proj is not None
            k = self.k_proj(x)
        q, k, v = (item.unflatten(-1, (c.num_heads, -1)) for item in (q, k, self.v_proj(x)))  # (B, T, H, F)
        q, k = self._rotated(q, ctx), self._rotated(k, ctx)
        logits = self.rate_proj(x)
        rate = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        rate = rate * (c.base_lr / c.head_dim)  # (B, T, H)
        record("inner_rate", rate)
        out, memory = ttt(
            q,
            k,
            v,
            rate,
            self._reader_rate(rate.dtype),
            self.norm_weight,
            self.norm_bias,
            TTTState(
                tuple(getattr(state, name) for name in self.names),
                tuple(getattr(state, f"pending_{name}") for name in self.names),
                tuple(seen % c.mini_batch_size for seen in ctx.starts),
            ),
            eps=NORM_EPS,
            return_state=ctx.return_state,
            cu_seqlens=ctx.cu_seqlens,
        )  # (B, T, H, F)
        out = self.post_norm(out.flatten(-2))
        if self.gate_proj is not None:
            out = out * F.gelu(self.gate_proj(x), approximate="tanh")
        new_state = None
        if memory is not None:
            parts = dict(zip(self.names, memory.weights, strict=True))
            parts |= {f"pending_{name}": x for name, x in zip(self.names, memory.pending, strict=True)}
            new_state = TTTLayerState(num_tokens=ctx.num_tokens_after, tail=tail, **parts)
        return LayerOutput(self.o_proj(out), new_state)

    @property
    def span(self) -> int:
        """The longer of mini-batch and convolution."""
        return max(self.config.mini_batch_size, CONV_SIZE if self.config.share_qk else 1)

    def flops_per_token(self, num_tokens: int) -> int:
        """Projections; per map of the net one pass of keys, one of queries and one through what is pending;
        and the way back through every map but the first.
        """
        linears = (self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.o_proj, self.rate_proj)
        maps = [rows * columns for rows, columns in self.config.net_shapes[::2]]
        return projection_flops(*linears) + 2 * self.config.num_heads * (3 * sum(maps) + sum(maps[1:]))

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Plain; with gate and shared queries and keys."""
        return (
            {"d_model": 12, "num_heads": 3, "mini_batch_size": 5, "base_lr": 0.5},
            {"d_model": 8, "num_heads": 2, "mini_batch_size": 3, "use_gate": True, "share_qk": True},
        )

    def _reader_rate(self, dtype: torch.dtype) -> Tensor:
        """(C,), of the first weights of a mini-batch for the readers at each place."""
        offset = self.reader_offset.to(dtype)
        places = torch.arange(1, len(offset) + 1, device=offset.device, dtype=dtype)
        return (1 / places + offset).clamp(min=0)

    def _rotated(self, x: Tensor, ctx: SequenceContext) -> Tensor:
        """x (B, T, H, F) with neighbouring channels turned by the place in the mini-batch."""
        c = self.config
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        key = ("ttt", c.head_dim, c.rope_theta, c.mini_batch_size, wide.dtype)
        if key not in ctx.tables:
            tables = self.rotary.tables(ctx.positions % c.mini_batch_size, wide.dtype)
            ctx.tables[key] = tuple(table[..., : c.head_dim // 2] for table in tables)
        cos, sin = ctx.tables[key]  # (B, T, 1, F / 2)
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        return turned.flatten(-2).to(x.dtype)


class TTTMLP(TTTLinear):
    """Test-time training with a hidden layer of four head widths."""

    config: TTTMLPConfig

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """With gate and shared queries and keys; plain."""
        return (
            {"d_model": 8, "num_heads": 2, "mini_batch_size": 3, "use_gate": True, "share_qk": True},
            {"d_model": 12, "num_heads": 3, "mini_batch_size": 4, "base_lr": 0.2},
        )
