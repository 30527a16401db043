"""The state of test-time training."""

from typing import NamedTuple

from torch import Tensor

# Dimensions: N sequences, H heads, F head width, G hidden width of the net


class TTTState(NamedTuple):
    """Everything test-time training keeps of what it has read; its size does not depend on the tokens.

    float32, or float64 for float64 input.

    Attributes:
        weights: fast weights after the last whole mini-batch, the learned ones before the first: W1
            (N, H, F, F) and b1 (N, H, 1, F) of the linear net; W1 (N, H, F, G), b1 (N, H, 1, G), W2
            (N, H, G, F) and b2 (N, H, 1, F) of the net with a hidden layer.
        pending: sums of rate_j times the gradient of token j over the open mini-batch, shapes as `weights`.
        position: of each sequence, tokens read of the open mini-batch.
    """

    weights: tuple[Tensor, ...]
    pending: tuple[Tensor, ...]
    position: tuple[int, ...]
