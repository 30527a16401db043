"""The state of gated slot attention."""

from typing import NamedTuple

from torch import Tensor

# Dimensions: N sequences, Hk key/value heads, K key width, V value width, M slots


class SlotState(NamedTuple):
    """What the slots of every head hold; float32, or float64 for float64 input.

    Attributes:
        keys: (N, Hk, K, M).
        values: (N, Hk, M, V).
    """

    keys: Tensor
    values: Tensor
