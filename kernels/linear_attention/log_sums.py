"""Running sums of log-decays inside a chunk, and the decay factors between its tokens."""

import torch
from torch import Tensor

# Dimensions: C chunk length


class LogSums:
    """Running sums G_i of log-decays over a chunk, kept so that their differences keep all digits.

    Behind some strong decays G is large, and G_i - G_j between weak ones would be the small difference of
    large numbers. So G is kept in two parts: whole numbers, whose sums and differences are exact, and rests
    within a half each. No factor is above 1, and exponents below a floor (a factor that no sum of this
    precision can see) are raised to it, because denormal numbers are slow.

    Args:
        g: (..., C), at most 0.
    """

    def __init__(self, g: Tensor) -> None:
        self.floor = -700.0 if g.dtype == torch.float64 else -60.0
        g = g.clamp(min=self.floor)
        whole = g.round()
        self.whole, self.rest = whole.cumsum(-1), (g - whole).cumsum(-1)

    def from_start(self) -> Tensor:
        """From before the chunk to each token, (..., C)."""
        return self._factor(self.whole + self.rest)

    def to_end(self) -> Tensor:
        """From each token to the end of the chunk, (..., C)."""
        whole = self.whole[..., -1:] - self.whole
        return self._factor(whole.add_(self.rest[..., -1:]).sub_(self.rest))

    def between(self) -> Tensor:
        """From token j to token i >= j, (..., C, C); what lies above the diagonal is meaningless."""
        whole = self.whole[..., None] - self.whole[..., None, :]
        return self._factor(whole.add_(self.rest[..., None]).sub_(self.rest[..., None, :]))

    def _factor(self, exponent: Tensor) -> Tensor:
        return exponent.clamp_(self.floor, 0).exp_()


def later_sums(x: Tensor) -> Tensor:
    """Sums of (..., C) over each token and all behind it."""
    return x.flip(-1).cumsum(-1).flip(-1)


def kept_overlap(overlap: Tensor, decay: Tensor) -> Tensor:
    """What a memory kept over a chunk, as the difference of two sums, without their rounding.

    Args:
        overlap: the difference.
        decay: over the chunk, of the same shape. Below the rounding of any sum it keeps nothing.
    """
    return overlap.masked_fill(decay < torch.finfo(decay.dtype).eps, 0)
