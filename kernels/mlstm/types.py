"""The state of mLSTM."""

from typing import NamedTuple

from torch import Tensor

# Dimensions: N sequences, H heads, K key width, V value width


class MLSTMState(NamedTuple):
    """Everything mLSTM keeps of the tokens it has read; its size does not depend on their number.

    What was read is memory * exp(stabilizer) and normalizer * exp(stabilizer). float32, or float64 for
    float64 input.

    Attributes:
        memory: (N, H, K, V), C of the paper.
        normalizer: (N, H, K), n.
        stabilizer: (N, H), m; 0 for an empty memory.
    """

    memory: Tensor
    normalizer: Tensor
    stabilizer: Tensor
