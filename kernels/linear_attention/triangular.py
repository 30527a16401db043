"""Inverses of many small triangular matrices."""

import torch
from torch import Tensor

# Dimensions: Y matrices, C size, M blocks of a level, S half the size of such a block

_BASE = 8


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower triangular L.

    Rows of small blocks on the diagonal are substituted one after the other, for all blocks of all matrices
    at once. Two inverted blocks then make one of twice the size, [[A, 0], [B, D]]^-1 =
    [[A^-1, 0], [-D^-1 B A^-1, D^-1]]. So nearly all of the work is matmuls, where a triangular solve takes
    the matrices one by one; and there are no powers of L, whose entries grow where its inverse stays small
    (equal keys).

    Args:
        lower: (Y, C, C) with C a power of two; what lies on and above the diagonal is not read.

    Returns:
        (Y, C, C) with exact zeros above the diagonal.
    """
    chunk_size = lower.shape[1]
    size = min(_BASE, chunk_size)
    parts = lower.unflatten(2, (-1, size)).unflatten(1, (-1, size)).diagonal(dim1=1, dim2=3)  # (Y, S, S, M)
    given = parts.permute(1, 2, 0, 3).flatten(2).contiguous()  # (S, S, Y M), so that rows are wide
    rows = torch.eye(size, dtype=lower.dtype, device=lower.device)[..., None].repeat(1, 1, given.shape[2])
    for i in range(1, size):
        rows[i, :i] = (given[i, :i, None] * rows[:i, :i]).sum(0).neg_()
    inverse = torch.zeros_like(lower, memory_format=torch.contiguous_format)
    target = inverse.unflatten(2, (-1, size)).unflatten(1, (-1, size)).diagonal(dim1=1, dim2=3)
    target.copy_(rows.unflatten(2, (-1, target.shape[3])).permute(2, 0, 1, 3))
    while size < chunk_size:
        block = _quarter(lower, size, 1, 0)
        first, second = (_quarter(inverse, size, n, n).flatten(0, 1) for n in (0, 1))
        product = torch.bmm(second, torch.bmm(block.flatten(0, 1), first))
        _quarter(inverse, size, 1, 0).copy_(product.neg_().view_as(block))
        size *= 2
    return inverse


def _quarter(x: Tensor, size: int, row: int, column: int) -> Tensor:
    """Quarter (row, column) of every block of size 2 S on the diagonal, (Y, M, S, S)."""
    parts = x.unflatten(2, (-1, 2, size)).unflatten(1, (-1, 2, size))  # (Y, M, 2, S, M, 2, S)
    return parts[:, :, row, :, :, column].diagonal(dim1=1, dim2=3).movedim(-1, 1)
