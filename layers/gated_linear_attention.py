"""Gated linear attention: a linear recurrence whose decay, gates and convolutions depend on the tokens.

    S~_t = Diag(exp(g_t)) S_{t-1}
    S_t  = S~_t + k_t^T v_t                          additive rule
    S_t  = S~_t + k_t^T beta_t (v_t - k_t S~_t)      delta rule
    o_t  = s q_t S_t,   y_t = W_o (norm(o_t) * gate(x_t))

One shell for the family: q, k, v are projected, convolved, activated, rotated and mapped as the config says;
g_t comes from parts/decay.py, beta_t from parts/write_step.py, the gate from parts/output_gate.py. The
published members are presets of it (presets.py): RetNet (arXiv 2307.08621), simple GLA and GLA (2312.06635),
DeltaNet (2406.06484), Gated DeltaNet (2412.06464), Kimi Delta Attention (2510.26692).
State: S (K x E) per value head, float32, and the last inputs of the convolution. Constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import LinearState, linear_attention
from .contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    check_choice,
    check_positive,
    record,
)
from .parts.decay import DECAYS, make_decay
from .parts.feature_maps import list_feature_maps, make_feature_map
from .parts.heads import head_width
from .parts.kv_cache import empty_tokens
from .parts.norm import RMSNorm
from .parts.output_gate import GATE_ACTIVATIONS, OutputGate
from .parts.projection import init_projections, projection_flops
from .parts.rotary import Rotary
from .parts.short_conv import ShortConv
from .parts.state_space import is_number
from .parts.write_step import WriteStep

# Dimensions: B batch, T tokens, N sequences, H query heads, G key heads, HV value heads, F raw query/key
# width, K features, E value width, D channels of the convolution, C its taps


@dataclass(frozen=True, kw_only=True)
class GatedLinearAttentionConfig(MixerConfig):
    """Configuration of `GatedLinearAttention`.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of `num_heads` (default: `num_heads`).
        num_value_heads: value heads where there are more than key heads, a multiple of `num_heads` (default:
            as many as key heads).
        head_dim: width of a query, key and value head (default: from `expand_k` and `expand_v`).
        value_dim: width of a value head, where it is another.
        expand_k: width of all query heads together, as a multiple of d_model; without head_dim.
        expand_v: width of all heads of the output together, likewise.
        feature_map: of queries and keys, see `list_feature_maps`; "l2_norm" gives them length one.
        use_rope: rotate queries and keys by their positions before the feature map.
        rope_theta: base of that rotation.
        conv_size: taps of the convolution over queries, keys and values; 0 for none.
        activation: of queries, keys and values behind the convolution: "silu" or "none".
        decay: "none"; "fixed" for the decays of RetNet; "sigmoid_head" or "softplus_head" for one per token
            and value head; "sigmoid_channel" or "softplus_channel" for one per key channel too.
        decay_bound: what the log-decays of "softplus_channel" stay above, for instance -5; null for no bound.
        rule: "additive", or "delta" for writing what the key does not read yet.
        allow_neg_eigval: steps of the delta rule up to 2 in place of 1; needs keys of length one.
        gate: activation of the output gate: "silu", "sigmoid", or "none" for no gate.
        gate_low_rank: project the gate through the width of one value head.
        norm_eps: added to the mean square in the norm of the output.
        chunk_size: tokens per block of the parallel form; changes speed, not numbers.
    """

    type: str = "gated_linear_attention"
    num_heads: int
    num_kv_heads: int | None = None
    num_value_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    feature_map: str = "identity"
    use_rope: bool = False
    rope_theta: float = 10000.0
    conv_size: int = 0
    activation: str = "none"
    decay: str = "none"
    decay_bound: float | None = None
    rule: str = "additive"
    allow_neg_eigval: bool = False
    gate: str = "none"
    gate_low_rank: bool = False
    norm_eps: float = 1e-5
    chunk_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_heads", "chunk_size")
        if type(self.conv_size) is not int or self.conv_size:  # 0 for none
            check_positive(self, "conv_size")
        self._resolve_heads()
        self._resolve_widths()
        for name, known in (
            ("feature_map", list_feature_maps()),
            ("activation", ("none", "silu")),
            ("decay", DECAYS),
            ("rule", ("additive", "delta")),
            ("gate", ("none", *GATE_ACTIVATIONS)),
        ):
            check_choice(name, getattr(self, name), known)
        self._check_parts()
        if not is_number(self.norm_eps) or not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be above 0 and finite, got {self.norm_eps!r}.")
        if self.use_rope:
            Rotary(self.key_width, self.rope_theta)  # raises on an odd width or a bad base

    @property
    def key_heads(self) -> int:
        """G, resolved."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def value_heads(self) -> int:
        """HV, resolved."""
        assert self.num_value_heads is not None
        return self.num_value_heads

    @property
    def output_heads(self) -> int:
        """Heads of the output: value heads, or query heads where those share them."""
        return max(self.num_heads, self.value_heads)

    @property
    def key_width(self) -> int:
        """F, resolved."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def value_width(self) -> int:
        """E, resolved."""
        assert self.value_dim is not None
        return self.value_dim

    def _resolve_heads(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.num_value_heads is None:
            object.__setattr__(self, "num_value_heads", self.num_kv_heads)
        check_positive(self, "num_kv_heads", "num_value_heads")
        if self.num_heads % self.key_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}. Every key/value head serves an equal group of query heads."
            )
        if self.value_heads != self.key_heads and (
            self.key_heads != self.num_heads or self.value_heads % self.num_heads
        ):
            raise ValueError(
                f"num_value_heads must be a multiple of num_heads with one key head each, got "
                f"{self.num_value_heads} value, {self.num_heads} query and {self.num_kv_heads} key heads. "
                "Leave num_value_heads out, or leave num_kv_heads out."
            )

    def _resolve_widths(self) -> None:
        """`head_dim` and `value_dim`, from the expansions where none is given."""
        if self.value_dim is None:
            width = self.head_dim or self._share("expand_v", self.output_heads, "value_dim")
            object.__setattr__(self, "value_dim", width)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self._share("expand_k", self.num_heads, "head_dim"))
        check_positive(self, "head_dim", "value_dim")

    def _check_parts(self) -> None:
        """Fields that need another one."""
        if self.gate_low_rank and self.gate == "none":
            raise ValueError('gate_low_rank has no effect with gate="none". Leave it out or choose a gate.')
        bound = self.decay_bound
        is_bound = is_number(bound) and -math.inf < bound < 0  # type: ignore[operator]  # checked on its left
        if bound is not None and (self.decay != "softplus_channel" or not is_bound):
            raise ValueError(
                'decay_bound must be a number below 0 and needs decay="softplus_channel", got '
                f"{bound!r} and {self.decay!r}. Leave it out for no bound."
            )
        if self.allow_neg_eigval and (self.rule != "delta" or self.feature_map != "l2_norm"):
            raise ValueError(
                'allow_neg_eigval needs rule="delta" and feature_map="l2_norm", got '
                f"{self.rule!r} and {self.feature_map!r}: with longer keys a step above 1 diverges."
            )

    def _share(self, name: str, heads: int, instead: str) -> int:
        return head_width(self.d_model, getattr(self, name), heads, name=name, instead=instead)


@dataclass(kw_only=True)
class GatedLinearAttentionState(State):
    """What the recurrence and the convolution keep.

    Attributes:
        memory: (N, HV, K, E) float32 (float64 for float64 activations).
        tail: (N, C - 1, D) last inputs of the convolution over queries, keys and values side by side, in the
            dtype of the activations; None without convolution.
    """

    memory: Tensor
    tail: Tensor | None = None


class GatedLinearAttention(TokenMixer):
    """The shell of all gated linear recurrences."""

    config: GatedLinearAttentionConfig
    overridable = frozenset({"chunk_size"})

    def __init__(self, config: GatedLinearAttentionConfig) -> None:
        super().__init__(config)
        c = config
        self.widths = [c.num_heads * c.key_width, c.key_heads * c.key_width, c.value_heads * c.value_width]
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(c.d_model, width, bias=False) for width in self.widths
        )
        self.conv = ShortConv(sum(self.widths), c.conv_size, c.activation) if c.conv_size else None
        self.rotary = Rotary(c.key_width, c.rope_theta) if c.use_rope else None
        per_head = c.feature_map == "hedgehog_lolcats"
        self.q_map = make_feature_map(c.feature_map, c.key_width, num_heads=c.num_heads if per_head else None)
        self.k_map = make_feature_map(c.feature_map, c.key_width, num_heads=c.key_heads if per_head else None)
        self.decay = make_decay(
            c.decay,
            c.d_model,
            c.value_heads,
            key_width=self.k_map.out_dim,
            value_width=c.value_width,
            bound=c.decay_bound,
        )
        self.beta = None
        if c.rule == "delta":
            self.beta = WriteStep(c.d_model, c.value_heads, 2.0 if c.allow_neg_eigval else 1.0)
        self.o_norm = RMSNorm(c.value_width, c.norm_eps)
        self.gate = None
        if c.gate != "none":
            self.gate = OutputGate(
                c.d_model,
                c.output_heads,
                c.value_width,
                c.gate,
                rank=c.value_width if c.gate_low_rank else None,
            )
        self.o_proj = nn.Linear(c.output_heads * c.value_width, c.d_model, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Projections N(0, 0.02) with zero biases; every part as it defines."""
        init_projections(self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        for part in (self.conv, self.q_map, self.k_map, self.decay, self.beta, self.gate):
            if part is not None:
                part.init_weights()
        self.o_norm.reset_parameters()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GatedLinearAttentionState:
        """Zeros."""
        c, weight = self.config, self.o_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        shape = (batch_size, c.value_heads, self.k_map.out_dim, c.value_width)
        return GatedLinearAttentionState(
            num_tokens=empty_tokens(batch_size),
            memory=torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)),
            tail=None if self.conv is None else self.conv.empty_tail(batch_size, device, dtype),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: GatedLinearAttentionState | None) -> LayerOutput:
        """Project, convolve, map; run the recurrence; normalise and gate."""
        q, k, v, tail = self._heads(x, ctx, None if state is None else state.tail)
        keys = self.k_map(k)  # (B, T, G, K)
        g = None if self.decay is None else self.decay(x)  # (B, T, HV) or (B, T, HV, K)
        if g is not None:
            record("log_decay", g)
        out, memory = linear_attention(
            self.q_map(q),  # (B, T, H, K)
            keys,
            v,
            g=g,
            beta=None if self.beta is None else self.beta(x, keys),  # (B, T, HV)
            rule=self.config.rule,
            scale=self.q_map.scale,
            initial_state=None if state is None else LinearState(state.memory),
            return_state=ctx.return_state,
            cu_seqlens=ctx.cu_seqlens,
            chunk_size=ctx.overrides.get("chunk_size", self.config.chunk_size),
        )  # (B, T, max(H, HV), E)
        out = self.o_norm(out).flatten(-2) if self.gate is None else self.gate(out, x, self.o_norm)
        new_state = None
        if memory is not None:
            new_state = GatedLinearAttentionState(
                num_tokens=ctx.num_tokens_after, memory=memory.memory, tail=tail
            )
        return LayerOutput(self.o_proj(out), new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        """Projections, feature maps, one write per memory and one read per query head; and what each key
        reads first with the delta rule.
        """
        c = self.config
        projections = projection_flops(
            self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.decay, self.beta, self.gate
        )
        maps = self.q_map.num_flops(c.num_heads) + self.k_map.num_flops(c.key_heads)
        products = c.value_heads * (2 if c.rule == "delta" else 1) + c.output_heads
        return projections + maps + 2 * products * self.k_map.out_dim * c.value_width

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Grouped query heads without parts; grouped value heads with all parts."""
        return (
            {
                "d_model": 16,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 3,
                "value_dim": 5,
                "chunk_size": 5,
            },
            {
                "d_model": 12,
                "num_heads": 2,
                "num_value_heads": 4,
                "head_dim": 5,
                "feature_map": "l2_norm",
                "conv_size": 3,
                "activation": "silu",
                "decay": "softplus_head",
                "rule": "delta",
                "allow_neg_eigval": True,
                "gate": "sigmoid",
                "gate_low_rank": True,
                "chunk_size": 7,
            },
        )

    def _heads(
        self, x: Tensor, ctx: SequenceContext, tail: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q (B, T, H, F), k (B, T, G, F), v (B, T, HV, E), and the new tail of the convolution."""
        c = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv is not None:
            joined, tail = self.conv(torch.cat([q, k, v], dim=-1), ctx, tail)  # (B, T, D)
            q, k, v = joined.split(self.widths, dim=-1)
        elif c.activation == "silu":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = q.unflatten(-1, (c.num_heads, -1)), k.unflatten(-1, (c.key_heads, -1))
        if self.rotary is not None:
            q, k = self.rotary.rotate(q, ctx), self.rotary.rotate(k, ctx)
        return q, k, v.unflatten(-1, (c.value_heads, -1)), tail
