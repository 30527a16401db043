"""What decayed attention takes besides tensors."""

from typing import NamedTuple

from torch import Tensor

# Dimensions: N sequences, P prefix slots, H query heads, Hkv key heads, D key width, E value width


class DecayPrefix(NamedTuple):
    """Keys, values and decays of the whole past of each sequence.

    Slots are in time order and right-aligned: slot j holds position num_seen - P + j, and is empty where that
    is negative. Whatever lies in an empty slot is never read.

    Attributes:
        k: (N, P, Hkv, D).
        v: (N, P, Hkv, E).
        log_decay: (N, P, Hkv), or (N, P, H) for form "sum"; float32, or float64 beside float64.
        num_seen: (N,) int64 CPU tensor, tokens each sequence read before this call, at most P.
    """

    k: Tensor
    v: Tensor
    log_decay: Tensor
    num_seen: Tensor
