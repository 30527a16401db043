"""The state of linear attention."""

from typing import NamedTuple

from torch import Tensor

# Dimensions: N sequences, Hk key heads, HV value heads, K key width, V value width


class LinearState(NamedTuple):
    """Everything linear attention keeps of the tokens it has read; its size does not depend on their number.

    Attributes:
        memory: (N, HV, K, V), sum of (decayed) outer products k v^T. float32, or float64 for float64 input.
        normalizer: (N, Hk, K), sum of (decayed) keys, same dtype; None without normalisation.
    """

    memory: Tensor
    normalizer: Tensor | None = None
