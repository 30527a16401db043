"""What attention takes and returns besides tensors."""

from typing import NamedTuple

from torch import Tensor

# Dimensions: B batch, T tokens, N sequences, P prefix slots, S sink slots, H query heads, D key width, E
# value width


class KVPrefix(NamedTuple):
    """Keys and values of the past that the queries of a call may see.

    Slots are in time order and right-aligned: slot j holds position num_seen - P + j, and is empty where that
    is negative. Whatever lies in an empty slot is never read.

    Attributes:
        k: (N, P, Hkv, D).
        v: (N, P, Hkv, E).
        num_seen: (N,) int64 CPU tensor, tokens each sequence read before this call.
        sink_k: (N, S, Hkv, D) keys of positions 0 .. S-1 (empty where the position is not below num_seen), or
            None.
        sink_v: (N, S, Hkv, E), or None.
    """

    k: Tensor
    v: Tensor
    num_seen: Tensor
    sink_k: Tensor | None = None
    sink_v: Tensor | None = None


class AttentionOutput(NamedTuple):
    """Result of attention.

    Attributes:
        output: (B, T, H, E), dtype of the queries.
        lse: (B, T, H) logsumexp of the scaled logits of the visible keys, or None when not asked for.
            float32, or float64 for float64 input.
        row_max: (B, T, H) maximum of the same logits, or None. Same dtype. Its gradient is shared evenly
            between ties.
    """

    output: Tensor
    lse: Tensor | None
    row_max: Tensor | None
