"""How many tokens fit in the processor's cache at once.

A chain of cheap operations over a long row reads and writes memory once per operation. Taken some tokens at a
time it stays in cache, and making it again for the backward pass costs less than reading back what it
computed.
"""

from torch import Tensor

# Dimensions: B batch, T tokens

# Numbers of one piece (1 MiB of float32), and the fewest tokens of it.
PIECE_NUMBERS = 2**18
PIECE_TOKENS = 16


def piece_size(like: Tensor) -> int:
    """Tokens of a piece of a tensor (B, T, ...)."""
    numbers = like.shape[0] * like.shape[2:].numel()
    return max(PIECE_TOKENS, PIECE_NUMBERS // max(1, numbers))
