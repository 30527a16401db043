"""What all softmax attention layers share: the configuration of heads, the four projections, rotation and
head norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    check_positive,
    check_size,
)
from .norm import RMSNorm
from .rotary import Rotary

# Dimensions: B batch, T tokens, H query heads, G key/value heads, D head width, M model width


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(MixerConfig):
    """Heads of an attention layer, as the Llama family has them.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of `num_heads` (default: `num_heads`).
        head_dim: width of a head (default: d_model / num_heads).
        rope_theta: base of the rotary positions; None leaves positions out.
        rope_scaling: scaling rule of the rotary positions, see `Rotary`.
        qk_norm: RMS-normalise each head of queries and keys before the rotation (Qwen3).
        norm_eps: of those norms.
        qkv_bias: biases of the projections to queries, keys and values (Qwen2 has them).
        o_bias: bias of the projection to the output.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_heads")
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        check_positive(self, "num_kv_heads")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}. "
                "Every key/value head serves an equal group of query heads."
            )
        if self.head_dim is None:
            if self.d_model % self.num_heads:
                raise ValueError(
                    f"d_model must be a multiple of num_heads, got {self.d_model} and {self.num_heads}. Or "
                    "set head_dim."
                )
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        check_positive(self, "head_dim")
        if self.rope_theta is not None:
            Rotary(self.width, self.rope_theta, self.rope_scaling)  # raises on an impossible rule

    @property
    def kv_heads(self) -> int:
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def width(self) -> int:
        assert self.head_dim is not None
        return self.head_dim


class AttentionBase(TokenMixer):
    """Projections of an attention layer; subclasses say what is attended to.

    Extras: `head_outputs` (B, T, H, D), the output before `o_proj`.
    """

    config: HeadsConfig

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        c = config
        self.num_heads, self.num_kv_heads, self.head_dim = c.num_heads, c.kv_heads, c.width
        self.q_proj = nn.Linear(c.d_model, c.num_heads * c.width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.d_model, c.kv_heads * c.width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.d_model, c.kv_heads * c.width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.width, c.d_model, bias=c.o_bias)
        self.q_norm = RMSNorm(c.width, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.width, c.norm_eps) if c.qk_norm else None
        self.rotary = None if c.rope_theta is None else Rotary(c.width, c.rope_theta, c.rope_scaling)

    def init_weights(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def project(self, x: Tensor, ctx: SequenceContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, G, D); normed and rotated."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))  # (B, T, H, D)
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))  # (B, T, G, D)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))  # (B, T, G, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary.rotate(q, ctx), self.rotary.rotate(k, ctx)
        return q, k, v

    def finish(self, heads: Tensor, ctx: SequenceContext, state: State | None) -> LayerOutput:
        """The output of the layer from those of its heads (B, T, H, D)."""
        extras = {"head_outputs": heads} if ctx.return_extras else {}
        return LayerOutput(self.o_proj(heads.flatten(-2)), state, extras=extras)

    def projection_flops(self) -> int:
        """Matrix-product FLOPs of the four projections for one token."""
        return 4 * self.d_model * (self.num_heads + self.num_kv_heads) * self.head_dim


def check_window(window_size: int, num_sinks: int) -> None:
    """Raises ValueError unless window_size >= 1 and num_sinks >= 0."""
    if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
        raise ValueError(
            f"window_size must be an integer of at least 1, got {window_size!r}. "
            "For attention over the whole sequence use the mixer type 'attention'."
        )
    if isinstance(num_sinks, bool) or not isinstance(num_sinks, int) or num_sinks < 0:
        raise ValueError(f"num_sinks must be an integer of at least 0, got {num_sinks!r}.")
    check_size("window_size", window_size)
    check_size("num_sinks", num_sinks)


def overridden_window(
    ctx: SequenceContext, state: object, window_size: int, num_sinks: int
) -> tuple[int, int]:
    """Window and sinks of this call; replacing them is refused where a state would not fit."""
    if not {"window_size", "num_sinks"} & set(ctx.overrides):
        return window_size, num_sinks
    if state is not None or ctx.return_state:
        raise ValueError(
            "window_size and num_sinks can be overridden only in calls without a state, got overrides "
            f"{dict(ctx.overrides)}. Drop them, or call with state=None and return_state=False."
        )
    window_size = ctx.overrides.get("window_size", window_size)
    num_sinks = ctx.overrides.get("num_sinks", num_sinks)
    check_window(window_size, num_sinks)
    return window_size, num_sinks
