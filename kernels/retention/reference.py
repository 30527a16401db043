"""The soft cache size by its definition: one token at a time, over all tokens before it.

S_t = sum_{i <= t} exp((t - i) g_i)
"""

import torch
from torch import Tensor

# Dimensions: L tokens of all sequences, T tokens of one, H heads


def soft_cache_size_reference(log_retention: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The definition of `memzoo.kernels.soft_cache_size`; (L, H) in float32 or float64 -> (L, H)."""
    sizes = []
    for g in log_retention.split(list(lengths)):  # (T, H)
        age = torch.arange(g.shape[0], device=g.device, dtype=g.dtype)
        for t in range(g.shape[0]):
            sizes.append((age[: t + 1].flip(0)[:, None] * g[: t + 1]).exp().sum(0))
    return torch.stack(sizes) if sizes else log_retention.clone()
