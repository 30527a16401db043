"""The features of the second-order Taylor expansion of exp, and what their two layouts have in common.

    expanded   [1 | x / d^(1/4) | x_m x_n / sqrt(2 d), row-major]
    compact    [1 | x / d^(1/4) | x_i^2 / sqrt(2 d) | x_i x_j / sqrt(d), i < j, by rows]

with K = 1 + d + d^2 and 1 + d + d (d + 1) / 2 features, and

phi(q) . phi(k) = 1 + u + u^2 / 2 with u = q . k / sqrt(d), in both.
"""

import math

import torch
from torch import Tensor

# Dimensions: d raw width of a head, K features

LAYOUTS = ("compact", "expanded")


def num_features(width: int, layout: str) -> int:
    """K of heads of raw width d."""
    return 1 + width + (width**2 if layout == "expanded" else width * (width + 1) // 2)


def taylor_features(x: Tensor, layout: str) -> Tensor:
    """Features of heads.

    Args:
        x: (..., d).
        layout: "compact" or "expanded".

    Returns:
        (..., K) in the dtype of x.
    """
    d = x.shape[-1]
    first = [torch.ones_like(x[..., :1]), x / d**0.25]
    if layout == "expanded":
        products = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2 * d)
        return torch.cat([*first, products], dim=-1)
    row, column = torch.triu_indices(d, d, offset=1, device=x.device)
    pairs = x[..., row] * x[..., column] / math.sqrt(d)
    return torch.cat([*first, x.square() / math.sqrt(2 * d), pairs], dim=-1)


def to_powers(memory: Tensor, width: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over features (N, H, K, V) as sums over powers of the keys.

    Returns:
        sum v (N, H, V), sum k v^T (N, H, d, V), and sum (k k^T) v^T (N, H, d, d, V), symmetric in d and d
        (what a query reads depends on the symmetric part alone).
    """
    d = width
    constant, linear, rest = memory[:, :, 0], memory[:, :, 1 : 1 + d] * d**0.25, memory[:, :, 1 + d :]
    if layout == "expanded":
        square = rest.unflatten(2, (d, d)) * math.sqrt(2 * d)
        return constant, linear, (square + square.transpose(2, 3)) / 2
    row, column = torch.triu_indices(d, d, offset=1, device=memory.device)
    index = torch.empty(d, d, dtype=torch.long, device=memory.device)
    diagonal = torch.arange(d, device=memory.device)
    index[diagonal, diagonal] = diagonal
    index[row, column] = index[column, row] = d + torch.arange(len(row), device=memory.device)
    scale = torch.full((d, d), math.sqrt(d), dtype=memory.dtype, device=memory.device)
    scale[diagonal, diagonal] = math.sqrt(2 * d)
    return constant, linear, rest[:, :, index] * scale[..., None]


def from_powers(constant: Tensor, linear: Tensor, square: Tensor, layout: str) -> Tensor:
    """The inverse of `to_powers`: (N, H, K, V)."""
    d = linear.shape[2]
    first = [constant[:, :, None], linear / d**0.25]
    square = (square + square.transpose(2, 3)) / 2
    if layout == "expanded":
        return torch.cat([*first, square.flatten(2, 3) / math.sqrt(2 * d)], dim=2)
    row, column = torch.triu_indices(d, d, offset=1, device=square.device)
    diagonal = square.diagonal(dim1=2, dim2=3).transpose(2, 3) / math.sqrt(2 * d)  # (N, H, d, V)
    return torch.cat([*first, diagonal, square[:, :, row, column] / math.sqrt(d)], dim=2)
