"""Linear attention: an inner product of features in place of softmax; the past is one matrix per head.

    S_t = a_h S_{t-1} + phi(k_t)^T v_t,   n_t = a_h n_{t-1} + phi(k_t)
    o_t = s phi(q_t) S_t                                      without normaliser
    o_t = s phi(q_t) S_t / (s phi(q_t) . n_t + eps)           with normaliser

Katharopoulos et al., arXiv 2006.16236; feature maps: parts/feature_maps.py. a_h = 1, or the fixed decay of
RetNet, 1 - 2^(-5 - h) (arXiv 2307.08621). Query heads that share a key/value head share its memory.
State: S (K x E) and, where normalised, n (K) per key/value head, float32. Constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import LinearState, linear_attention, taylor_attention
from .contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    check_choice,
    check_positive,
)
from .parts.decay import make_decay
from .parts.feature_maps import list_feature_maps, make_feature_map
from .parts.kv_cache import empty_tokens
from .parts.norm import RMSNorm
from .parts.rotary import Rotary
from .parts.state_space import is_number

# Dimensions: B batch, T tokens, N sequences, H query heads, G key/value heads, F raw query/key width,
# K features, E value width, M model width

# feature maps whose operation needs no features in memory -> the layout of its state
TAYLOR_LAYOUTS = {"taylor": "expanded", "taylor_compact": "compact"}


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(MixerConfig):
    """Configuration of `LinearAttention`.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of `num_heads` (default: `num_heads`).
        head_dim: width of a value head (default: d_model / num_heads).
        feature_dim: width of a query or key head before the feature map (default: head_dim).
        feature_map: name of the map, see `list_feature_maps`.
        normalize: divide by the sum of the weights; only for maps whose weights cannot be negative.
        eps: added to that sum.
        decay: "none", or "fixed" for the decays of RetNet, one per key/value head.
        use_rope: rotate queries and keys by their positions before the feature map.
        rope_theta: base of that rotation.
        norm_output: RMS-normalise every head of the output (for layers without normaliser).
        chunk_size: tokens per block of the parallel form; changes speed, not numbers.
    """

    type: str = "linear_attention"
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    feature_dim: int | None = None
    feature_map: str = "elu1"
    normalize: bool = True
    eps: float = 1e-6
    decay: str = "none"
    use_rope: bool = False
    rope_theta: float = 10000.0
    norm_output: bool = False
    chunk_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_heads", "chunk_size")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model must be a multiple of num_heads, got {self.d_model} and {self.num_heads}. "
                "Or set head_dim."
            )
        for name, default in (("num_kv_heads", self.num_heads), ("head_dim", self.d_model // self.num_heads)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.feature_dim is None:
            object.__setattr__(self, "feature_dim", self.head_dim)
        check_positive(self, "num_kv_heads", "head_dim", "feature_dim")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}. Every key/value head serves an equal group of query heads."
            )
        check_choice("feature_map", self.feature_map, list_feature_maps())
        check_choice("decay", self.decay, ("none", "fixed"))
        if self.normalize and self.feature_map in ("hadamard", "identity", "l2_norm"):
            raise ValueError(
                "normalize=True needs weights that cannot be negative, but with feature_map="
                f"{self.feature_map!r} their sum can cross zero. Set normalize=False or choose another map."
            )
        if not is_number(self.eps) or not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be at least 0 and finite, got {self.eps!r}.")
        if self.normalize and self.eps == 0 and self.feature_map in ("dpfp", "rebased", "relu", "t2r"):
            raise ValueError(
                f"eps must be above 0 with feature_map={self.feature_map!r}, whose weights can all be 0, got "
                f"{self.eps}. Use for instance 1e-6."
            )
        if self.use_rope:
            Rotary(self.key_dim, self.rope_theta)  # raises on an odd width or a bad base

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def value_dim(self) -> int:
        """Width of a value head, resolved."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def key_dim(self) -> int:
        """Width of a raw query or key head, resolved."""
        assert self.feature_dim is not None
        return self.feature_dim


@dataclass(kw_only=True)
class LinearAttentionState(State):
    """Sum of the outer products of features and values.

    Attributes:
        memory: (N, G, K, E) float32 (float64 for float64 activations).
        normalizer: (N, G, K), sum of the features, or None without normaliser.
    """

    memory: Tensor
    normalizer: Tensor | None = None


class LinearAttention(TokenMixer):
    """Linear attention with a feature map, an optional normaliser and an optional fixed decay."""

    config: LinearAttentionConfig
    overridable = frozenset({"chunk_size"})

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__(config)
        c = config
        self.num_heads, self.num_kv_heads = c.num_heads, c.kv_heads
        self.key_dim, self.head_dim = c.key_dim, c.value_dim
        self.q_proj = nn.Linear(c.d_model, c.num_heads * c.key_dim, bias=False)
        self.k_proj = nn.Linear(c.d_model, c.kv_heads * c.key_dim, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.kv_heads * c.value_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.value_dim, c.d_model, bias=False)
        per_head = c.feature_map == "hedgehog_lolcats"
        self.q_map = make_feature_map(c.feature_map, c.key_dim, num_heads=c.num_heads if per_head else None)
        self.k_map = make_feature_map(c.feature_map, c.key_dim, num_heads=c.kv_heads if per_head else None)
        self.decay = make_decay(c.decay, c.d_model, c.kv_heads)
        self.o_norm = RMSNorm(c.value_dim) if c.norm_output else None
        self.rotary = Rotary(c.key_dim, c.rope_theta) if c.use_rope else None
        self.init_weights()

    def init_weights(self) -> None:
        """Projections N(0, 0.02), as the models of the BASED paper; maps and norms as they define."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)
        self.q_map.init_weights()
        self.k_map.init_weights()
        if self.o_norm is not None:
            self.o_norm.reset_parameters()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LinearAttentionState:
        """Zeros."""
        weight = self.q_proj.weight
        wide = torch.float64 if (dtype or weight.dtype) == torch.float64 else torch.float32
        shape = (batch_size, self.num_kv_heads, self.k_map.out_dim)
        device = device or weight.device
        return LinearAttentionState(
            num_tokens=empty_tokens(batch_size),
            memory=torch.zeros(*shape, self.head_dim, device=device, dtype=wide),
            normalizer=torch.zeros(shape, device=device, dtype=wide) if self.config.normalize else None,
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: LinearAttentionState | None) -> LayerOutput:
        """Projects, maps, and runs the recurrence."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.key_dim))  # (B, T, H, F)
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.key_dim))  # (B, T, G, F)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))  # (B, T, G, E)
        if self.rotary is not None:
            q, k = self.rotary.rotate(q, ctx), self.rotary.rotate(k, ctx)
        options: dict[str, Any] = {
            "normalize": self.config.normalize,
            "eps": self.config.eps,
            "initial_state": None if state is None else LinearState(state.memory, state.normalizer),
            "return_state": ctx.return_state,
            "cu_seqlens": ctx.cu_seqlens,
            "chunk_size": ctx.overrides.get("chunk_size", self.config.chunk_size),
        }
        layout = TAYLOR_LAYOUTS.get(self.config.feature_map) if self.decay is None else None
        if layout is not None:
            out, memory = taylor_attention(q, k, v, layout=layout, **options)  # (B, T, H, E)
        else:
            g = None if self.decay is None else self.decay(x)  # (B, T, G)
            q, k = self.q_map(q), self.k_map(k)  # (B, T, H, K), (B, T, G, K)
            out, memory = linear_attention(q, k, v, g=g, scale=self.q_map.scale, **options)  # (B, T, H, E)
        if self.o_norm is not None:
            out = self.o_norm(out)
        new_state = None
        if memory is not None:
            new_state = LinearAttentionState(
                num_tokens=ctx.num_tokens_after, memory=memory.memory, normalizer=memory.normalizer
            )
        return LayerOutput(self.o_proj(out.flatten(-2)), new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        """Projections, feature maps, one write per memory and one read per query head."""
        heads = self.num_heads + self.num_kv_heads
        projections = 2 * self.d_model * heads * (self.key_dim + self.head_dim)
        maps = self.q_map.num_flops(self.num_heads) + self.k_map.num_flops(self.num_kv_heads)
        features, width = self.k_map.out_dim, self.head_dim
        memory = 2 * heads * features * width
        if self.config.normalize:
            memory += 2 * self.num_heads * features
        return projections + maps + memory

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Normalised with grouped heads and odd widths; RetNet-like without normaliser."""
        return (
            {
                "d_model": 16,
                "num_heads": 8,
                "num_kv_heads": 2,
                "head_dim": 5,
                "feature_dim": 3,
                "feature_map": "hedgehog",
                "chunk_size": 5,
            },
            {
                "d_model": 24,
                "num_heads": 3,
                "feature_dim": 6,
                "feature_map": "identity",
                "normalize": False,
                "decay": "fixed",
                "use_rope": True,
                "norm_output": True,
                "chunk_size": 7,
            },
        )
