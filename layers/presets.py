"""Published members of the linear family: names for a shell with other defaults.

A preset has no code of its own. `{type: retnet, d_model: 1024, num_heads: 8}` is the mixer `base` with
`defaults`, of which a config may replace any. The defaults are those of the papers, and where a paper leaves
one open those of flash-linear-attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named set of defaults.

    Attributes:
        base: type of the mixer that it is a preset of.
        source: paper, as an arXiv number.
        defaults: fields of the config of `base`.
        small_configs: two small configs of unequal sizes for the contract tests.
    """

    base: str
    source: str
    defaults: Mapping[str, Any]
    small_configs: tuple[Mapping[str, Any], Mapping[str, Any]]


PRESETS: dict[str, Preset] = {
    "delta_net": Preset(
        base="gated_linear_attention",
        source="2406.06484",
        defaults={"rule": "delta", "feature_map": "l2_norm", "conv_size": 4, "activation": "silu"},
        small_configs=(
            {
                "d_model": 12,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 3,
                "value_dim": 5,
                "chunk_size": 5,
            },
            {"d_model": 10, "num_heads": 2, "conv_size": 2, "allow_neg_eigval": True, "chunk_size": 7},
        ),
    ),
    "dpfp": Preset(
        base="linear_attention",
        source="2102.11174",
        defaults={"feature_map": "dpfp"},
        small_configs=(
            {"d_model": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 3, "chunk_size": 5},
            {"d_model": 10, "num_heads": 2, "feature_dim": 5, "decay": "fixed", "chunk_size": 7},
        ),
    ),
    "gated_delta_net": Preset(
        base="gated_linear_attention",
        source="2412.06464",
        defaults={
            "rule": "delta",
            "decay": "softplus_head",
            "feature_map": "l2_norm",
            "conv_size": 4,
            "activation": "silu",
            "gate": "silu",
            "expand_k": 0.75,
            "expand_v": 1.5,
        },
        small_configs=(
            {"d_model": 12, "num_heads": 3, "chunk_size": 5},
            {
                "d_model": 10,
                "num_heads": 2,
                "num_value_heads": 4,
                "head_dim": 3,
                "value_dim": 5,
                "allow_neg_eigval": True,
                "chunk_size": 7,
            },
        ),
    ),
    "gla": Preset(
        base="gated_linear_attention",
        source="2312.06635",
        defaults={"decay": "sigmoid_channel", "gate": "silu", "expand_k": 0.5},
        small_configs=(
            {"d_model": 12, "num_heads": 3, "chunk_size": 5},
            {
                "d_model": 10,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 3,
                "conv_size": 3,
                "chunk_size": 7,
            },
        ),
    ),
    "hedgehog": Preset(
        base="linear_attention",
        source="2402.04347",
        defaults={"feature_map": "hedgehog"},
        small_configs=(
            {"d_model": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 5, "chunk_size": 5},
            {"d_model": 10, "num_heads": 2, "feature_map": "hedgehog_lolcats", "chunk_size": 7},
        ),
    ),
    "kda": Preset(
        base="gated_linear_attention",
        source="2510.26692",
        defaults={
            "rule": "delta",
            "decay": "softplus_channel",
            "feature_map": "l2_norm",
            "conv_size": 4,
            "activation": "silu",
            "gate": "sigmoid",
            "gate_low_rank": True,
        },
        small_configs=(
            {"d_model": 12, "num_heads": 3, "chunk_size": 5},
            {
                "d_model": 10,
                "num_heads": 2,
                "num_value_heads": 4,
                "head_dim": 3,
                "value_dim": 5,
                "decay_bound": -5.0,
                "chunk_size": 7,
            },
        ),
    ),
    "rebased": Preset(
        base="linear_attention",
        source="2402.10644",
        defaults={"feature_map": "rebased", "feature_dim": 16, "eps": 1e-5},
        # A squared weight is the small difference of large features for a query that is across to its few
        # keys; divided by it, float32 loses digits. These two have an eps far above that rounding.
        small_configs=(
            {
                "d_model": 12,
                "num_heads": 4,
                "num_kv_heads": 2,
                "feature_dim": 3,
                "eps": 1.0,
                "chunk_size": 5,
            },
            {"d_model": 10, "num_heads": 2, "feature_dim": 5, "head_dim": 3, "eps": 1.0, "chunk_size": 7},
        ),
    ),
    "retnet": Preset(
        base="gated_linear_attention",
        source="2307.08621",
        defaults={"decay": "fixed", "use_rope": True, "expand_v": 2.0, "gate": "silu"},
        small_configs=(
            {"d_model": 12, "num_heads": 3, "chunk_size": 5},
            {
                "d_model": 10,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 2,
                "value_dim": 5,
                "chunk_size": 7,
            },
        ),
    ),
    "simple_gla": Preset(
        base="gated_linear_attention",
        source="2312.06635",
        defaults={"decay": "sigmoid_head", "conv_size": 4, "activation": "silu", "gate": "silu"},
        small_configs=(
            {"d_model": 12, "num_heads": 3, "chunk_size": 5},
            {
                "d_model": 10,
                "num_heads": 2,
                "num_value_heads": 4,
                "head_dim": 3,
                "conv_size": 2,
                "chunk_size": 7,
            },
        ),
    ),
}
