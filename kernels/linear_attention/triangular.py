"""Inverses of many small triangular matrices."""

import torch
from torch import Tensor

# Dimensions: Y matrices, C size, M blocks of a level, S half the size of such a block


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower triangular L.

    Blocks of twice the size are put together from two inverted ones, [[A, 0], [B, D]]^-1 =
    [[A^-1, 0], [-D^-1 B A^-1, D^-1]]: matmuls over all matrices at once, where a triangular solve takes them
    one by one, and no powers of L, whose entries grow where its inverse stays small (equal keys).

    Args:
        lower: (Y, C, C) with C a power of two; what lies on and above the diagonal is not read.

    Returns:
        (Y, C, C) with exact zeros above the diagonal.
    """
    chunk_size = lower.shape[1]
    inverse = torch.eye(chunk_size, dtype=lower.dtype, device=lower.device).repeat(lower.shape[0], 1, 1)
    size = 1
    while size < chunk_size:
        block = _blocks(lower, size, 1, 0)
        if size > 1:
            first, second = (_blocks(inverse, size, n, n).flatten(0, 1) for n in (0, 1))
            block = torch.bmm(second, torch.bmm(block.flatten(0, 1), first)).view_as(block)
        _blocks(inverse, size, 1, 0).copy_(block.neg())
        size *= 2
    return inverse


def _blocks(x: Tensor, size: int, row: int, column: int) -> Tensor:
    """Quarter (row, column) of every block of size 2 S on the diagonal, (Y, M, S, S)."""
    parts = x.unflatten(2, (-1, 2, size)).unflatten(1, (-1, 2, size))  # (Y, M, 2, S, M, 2, S)
    return parts[:, :, row, :, :, column].diagonal(dim1=1, dim2=3).movedim(-1, 1)
