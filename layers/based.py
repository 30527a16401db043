"""BASED linear attention: the second-order Taylor expansion of softmax over small heads (arXiv 2402.18668).

    o_t = sum_{j <= t} w_tj v_j / (sum_{j <= t} w_tj + eps)
    w_tj = 1 + u + u^2 / 2,   u = q_t . k_j / sqrt(feature_dim)

A preset of `LinearAttention` without rotation, decay or gate. BASED models alternate it with `base_conv` and
`sliding_window`. Every weight is at least 1/2, so the normaliser needs no clamp.
State: as `LinearAttention` with K = 1 + d + d (d + 1) / 2 features (153 for feature_dim 16).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .linear_attention import LinearAttention, LinearAttentionConfig


@dataclass(frozen=True, kw_only=True)
class BasedConfig(LinearAttentionConfig):
    """`LinearAttentionConfig` with the choices of the paper as defaults.

    Attributes:
        feature_dim: width of a query or key head; the paper's recall/throughput dial (8, 16, 24).
        feature_map: "taylor_compact", or "taylor" for the layout of the paper's code.
    """

    type: str = "based"
    feature_dim: int | None = 16
    feature_map: str = "taylor_compact"


class BasedAttention(LinearAttention):
    """Linear attention with Taylor features."""

    config: BasedConfig

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Compact features with grouped heads; the expanded layout."""
        return (
            {"d_model": 16, "num_heads": 4, "num_kv_heads": 2, "feature_dim": 3, "chunk_size": 5},
            {"d_model": 24, "num_heads": 8, "feature_dim": 4, "feature_map": "taylor", "chunk_size": 7},
        )
