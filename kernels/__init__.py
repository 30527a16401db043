"""Pure functions on tensors: attention, convolutions and recurrences with several backends each."""

# Python started in the root of the repository finds this folder as `kernels`, a name that transformers looks
# for among its optional packages. Loaded under a second name, it would define its custom operations anew, and
# those that `memzoo.kernels` holds would point at freed memory.
if __name__ != "kernels":
    from .attention import AttentionOutput, KVPrefix, attention, decode_attention
    from .backend import available_backends, use_backend
    from .causal_conv import causal_conv
    from .decayed_attention import DecayPrefix, decayed_attention
    from .fast_weights import (
        FastWeightOptions,
        FastWeightState,
        empty_fast_weights,
        fast_weight_scan,
        fast_weight_shapes,
        fast_weight_step,
        newton_schulz,
        unpack_fast_weights,
    )
    from .gated_norm import gated_rms_norm
    from .gated_slot_attention import SlotState, gated_slot_attention
    from .innovation import innovation_scores, select_eidetic
    from .layout import ChunkLayout, sequence_lengths
    from .linear_attention import LinearState, linear_attention
    from .linear_cross_entropy import linear_cross_entropy, linear_divergence
    from .mlstm import MLSTMState, mlstm
    from .retention import soft_cache_size
    from .selective_scan import selective_scan
    from .taylor_attention import taylor_attention
    from .titans import TitansState, titans, titans_read
    from .ttt import TTTState, ttt
    from .union_attention import SlotStream, UnionOutput, lagged_attention, merge_streams, union_attention

__all__ = [
    "AttentionOutput",
    "ChunkLayout",
    "DecayPrefix",
    "FastWeightOptions",
    "FastWeightState",
    "KVPrefix",
    "LinearState",
    "MLSTMState",
    "SlotState",
    "SlotStream",
    "TTTState",
    "TitansState",
    "UnionOutput",
    "attention",
    "available_backends",
    "causal_conv",
    "decayed_attention",
    "decode_attention",
    "empty_fast_weights",
    "fast_weight_scan",
    "fast_weight_shapes",
    "fast_weight_step",
    "gated_rms_norm",
    "gated_slot_attention",
    "innovation_scores",
    "lagged_attention",
    "linear_attention",
    "linear_cross_entropy",
    "linear_divergence",
    "merge_streams",
    "mlstm",
    "newton_schulz",
    "select_eidetic",
    "selective_scan",
    "sequence_lengths",
    "soft_cache_size",
    "taylor_attention",
    "titans",
    "titans_read",
    "ttt",
    "union_attention",
    "unpack_fast_weights",
    "use_backend",
]
