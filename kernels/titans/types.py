"""The state of the neural memory of Titans, and the settings of a call."""

from typing import NamedTuple

from torch import Tensor

# Dimensions: N sequences, H heads, F head width, G hidden width

Tensors = tuple[Tensor, ...]


class TitansState(NamedTuple):
    """Everything the memory keeps of what it has read; its size does not depend on the tokens.

    A net is a tuple of tensors: the gain gamma (N, H, 1, F) of its norm and its matrices, (N, H, F, F) or
    (N, H, F, G), (N, H, G, G) and (N, H, G, F). float32, or float64 for float64 input.

    Attributes:
        weights: the net as it is read: the learned one at first.
        base: the net at which gradients are taken: the learned one at first.
        momentum: a net, the running sum of writes, zeros at first; empty without momentum.
        pending: a net, what the tokens of the open chunk write, zeros at first; empty with gates per token.
        gates: (N, H, 2) sums of the gates' logits over the open chunk; None with gates per token.
        position: of each sequence, tokens read since the last multiple of the chunk size, or of the rebase
            size where there is one.
    """

    weights: Tensors
    base: Tensors
    momentum: Tensors
    pending: Tensors
    gates: Tensor | None
    position: tuple[int, ...]


class Rule(NamedTuple):
    """How a memory is written: plain settings, as in `memzoo.kernels.titans`."""

    chunk_size: int
    rebase_size: int | None
    use_momentum: bool
    per_token: bool
    loss_scale: float
    max_grad_norm: float | None
    orthogonalize: bool

    @property
    def period(self) -> int:
        """Tokens after which everything begins again."""
        return self.rebase_size or self.chunk_size
