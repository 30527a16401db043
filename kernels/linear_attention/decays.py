"""Decayed products inside chunks: the one thing in which decays none, per head and per channel differ.

With d_ij the decay from token j to token i >= j, a number or one per channel c:

    scores_ij = sum_c x_ic w_jc d_ijc
    rows_ic   = sum_j p_ij w_jc d_ijc          columns_jc = sum_i p_ij x_ic d_ijc

Rows and columns are the gradients of the scores by x and by w when p is the gradient of the scores, and the
gradient of the log-decays follows from them: (x rows)_i - (w columns)_i is that of their running sum up to i.

No factor above 1 is ever made, and none below a floor that no sum of this precision can see, because
denormal numbers are slow.
"""

import torch
from torch import Tensor

from .log_sums import LogSums

# Dimensions: Y chunks (of all heads), C chunk length, R kinds of rows (0 reads its own token too, 1 only
# earlier ones), K width, M blocks of a level, S half the length of such a block


class _Decay:
    """What decays have in common: the factors between a token and the ends of its chunk, None for 1."""

    start: Tensor | None = None  # from before the chunk to each token, (Y, C, 1, 1 or K)
    end: Tensor | None = None  # from each token to the end of the chunk, (Y, C, 1 or K)
    whole: Tensor | None = None  # (Y, 1 or K)

    def from_start(self, x: Tensor) -> Tensor:
        """x (Y, C, R, K) times the decay from before the chunk to each token."""
        return x if self.start is None else x * self.start

    def to_end(self, w: Tensor) -> Tensor:
        """w (Y, C, K) times the decay from each token to the end of the chunk."""
        return w if self.end is None else w * self.end

    def add_from_start(self, total: Tensor, x: Tensor) -> None:
        """Add `from_start(x)` to `total` in place."""
        if self.start is None:
            total.add_(x)
        else:
            total.addcmul_(x, self.start)


class NoDecay(_Decay):
    """d = 1."""

    def __init__(self, like: Tensor):
        chunk_size = like.shape[1]
        self.inside = torch.ones(chunk_size, chunk_size, dtype=like.dtype, device=like.device).tril_()[None]

    def scores(self, x: Tensor, w: Tensor) -> Tensor:
        """(Y, C, R, K) and (Y, C, K) -> (Y, C, R, C)."""
        product = torch.bmm(x.flatten(1, 2), w.transpose(1, 2))
        return self._masked(product.unflatten(1, x.shape[1:3]))

    def gradients(self, p: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (Y, C, R, K) and columns (Y, C, K) of p (Y, C, R, C), which is overwritten."""
        flat = self._masked(p).flatten(1, 2)
        return torch.bmm(flat, w).view_as(x), torch.bmm(flat.transpose(1, 2), x.flatten(1, 2))

    def _masked(self, p: Tensor) -> Tensor:
        p.mul_(self.inside[:, :, None])
        if p.shape[2] > 1:
            p[:, :, 1].diagonal(dim1=1, dim2=2).zero_()
        return p


class HeadDecay(NoDecay):
    """One log-decay per token, (Y, C)."""

    def __init__(self, g: Tensor):
        sums = LogSums(g)
        self.inside = sums.between().tril_()  # (Y, C, C)
        self.start = sums.from_start()[:, :, None, None]  # (Y, C, 1, 1)
        self.end = self.inside[:, -1, :, None]  # (Y, C, 1)
        self.whole = self.start[:, -1, 0]  # (Y, 1)


class ChannelDecay(_Decay):
    """One log-decay per token and channel, (Y, C, K); C is a power of two.

    Chunks are halved down to single tokens. At each level the rows in the second half of a block meet the
    columns in its first half, and the decay between them is a product of two factors, from the column to the
    middle and from the middle to the row; so one matmul per level does, and both factors are at most 1.
    """

    whole: Tensor

    def __init__(self, g: Tensor):
        floor = -350.0 if g.dtype == torch.float64 else -40.0
        tiny = torch.tensor(floor, dtype=g.dtype).exp().item()
        # of every token: the decay from the start of its block to it, and from it to the end of its block
        start = g.clamp(min=floor).exp_()
        end = torch.ones_like(start)
        self._levels: list[tuple[int, Tensor, Tensor]] = []
        size = 1
        while size < g.shape[1]:
            first, second = start.unflatten(1, (-1, 2, size)).unbind(2)  # (Y, M, S, K)
            end_first = end.unflatten(1, (-1, 2, size))[:, :, 0]
            to_row, from_column = second.clone(), end_first.clone()
            self._levels.append((size, to_row, from_column))
            end_first.mul_(to_row[:, :, -1:]).clamp_(min=tiny)
            second.mul_(first[:, :, -1:]).clamp_(min=tiny)
            size *= 2
        self.start, self.end = start[:, :, None], end
        self.whole = start[:, -1]  # (Y, K)

    def scores(self, x: Tensor, w: Tensor) -> Tensor:
        """(Y, C, R, K) and (Y, C, K) -> (Y, C, R, C)."""
        scores = x.new_zeros(*x.shape[:3], x.shape[1])
        scores[:, :, 0].diagonal(dim1=1, dim2=2).copy_((x[:, :, 0] * w).sum(2))
        for size, to_row, from_column in self._levels:
            rows, columns = self._rows(x, size, to_row), self._columns(w, size, from_column)
            block = torch.bmm(rows.flatten(2, 3).flatten(0, 1), columns.flatten(0, 1).transpose(1, 2))
            target = _blocks(scores, size)
            target.copy_(block.view_as(target))
        return scores

    def gradients(self, p: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (Y, C, R, K) and columns (Y, C, K) of p (Y, C, R, C)."""
        return self.rows(p, w), self.columns(p, x)

    def rows(self, p: Tensor, w: Tensor) -> Tensor:
        """(Y, C, R, C) and (Y, C, K) -> (Y, C, R, K)."""
        result = w.new_zeros(*p.shape[:3], w.shape[2])
        own = p[:, :, 0].diagonal(dim1=1, dim2=2)  # (Y, C)
        result[:, :, 0] = own[..., None] * w
        for size, to_row, from_column in self._levels:
            columns = self._columns(w, size, from_column).flatten(0, 1)
            block = _blocks(p, size).flatten(2, 3).flatten(0, 1)  # (Y M, S R, S)
            target = result.unflatten(1, (-1, 2, size))[:, :, 1]  # (Y, M, S, R, K)
            target.addcmul_(torch.bmm(block, columns).view(target.shape), to_row[:, :, :, None])
        return result

    def columns(self, p: Tensor, x: Tensor) -> Tensor:
        """(Y, C, R, C) and (Y, C, R, K) -> (Y, C, K)."""
        result = p[:, :, 0].diagonal(dim1=1, dim2=2)[..., None] * x[:, :, 0]
        for size, to_row, from_column in self._levels:
            rows = self._rows(x, size, to_row).flatten(2, 3).flatten(0, 1)
            block = _blocks(p, size).flatten(2, 3).flatten(0, 1)  # (Y M, S R, S)
            target = result.unflatten(1, (-1, 2, size))[:, :, 0]  # (Y, M, S, K)
            target.addcmul_(torch.bmm(block.transpose(1, 2), rows).view(target.shape), from_column)
        return result

    def _rows(self, x: Tensor, size: int, to_row: Tensor) -> Tensor:
        """Rows of the second halves as the middle sees them, (Y, M, S, R, K)."""
        return x.unflatten(1, (-1, 2, size))[:, :, 1] * to_row[:, :, :, None]

    def _columns(self, w: Tensor, size: int, from_column: Tensor) -> Tensor:
        """Columns of the first halves as the middle sees them, (Y, M, S, K)."""
        return w.unflatten(1, (-1, 2, size))[:, :, 0] * from_column


def make_decay(g: Tensor | None, like: Tensor) -> NoDecay | ChannelDecay:
    """The decay of log-decays (Y, C), (Y, C, K) or None, for tokens `like` (Y, C, K)."""
    if g is None:
        return NoDecay(like)
    return HeadDecay(g) if g.dim() == 2 else ChannelDecay(g)


def _blocks(p: Tensor, size: int) -> Tensor:
    """The parts of p (Y, C, R, C) where rows of a second half meet columns of its first, (Y, M, S, R, S)."""
    parts = p.unflatten(3, (-1, 2, size)).unflatten(1, (-1, 2, size))  # (Y, M, 2, S, R, M, 2, S)
    return parts[:, :, 1, :, :, :, 0].diagonal(dim1=1, dim2=4).movedim(-1, 1)
