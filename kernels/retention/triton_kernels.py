"""The soft cache size in Triton: exponentials of a tile live on the chip, only g, S and their gradients move.

A program owns one block of queries (forward) or of keys (backward) of one sequence and head, and walks over
the blocks of the other side. Everything is float32. Untested on a GPU until a record agrees with the
reference.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autograd import backward_without_autocast

# Dimensions: L tokens of all sequences, N sequences, H heads, C tokens of a block

BLOCK_SIZE = 64


@triton.jit
def _forward_kernel(g, bounds, output, heads, block: tl.constexpr):  # type: ignore[no-untyped-def]
    sequence, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    query = start + part * block + tl.arange(0, block)
    is_query = query < end
    total = tl.zeros([block], dtype=tl.float32)
    if start + part * block < end:
        for first in range(start, start + (part + 1) * block, block):
            key = first + tl.arange(0, block)
            rate = tl.load(g + key * heads + head, mask=key < end, other=0.0)
            age = query[:, None] - key[None, :]
            is_seen = (age >= 0) & is_query[:, None]
            kept = tl.exp(tl.where(is_seen, age.to(tl.float32) * rate[None, :], float("-inf")))
            total += tl.sum(kept, axis=1)
        tl.store(output + query * heads + head, total, mask=is_query)


@triton.jit
def _backward_kernel(g, bounds, d_output, d_g, heads, block: tl.constexpr):  # type: ignore[no-untyped-def]
    sequence, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    key = start + part * block + tl.arange(0, block)
    is_key = key < end
    rate = tl.load(g + key * heads + head, mask=is_key, other=0.0)
    total = tl.zeros([block], dtype=tl.float32)
    if start + part * block < end:
        for first in range(start + part * block, end, block):
            query = first + tl.arange(0, block)
            d_out = tl.load(d_output + query * heads + head, mask=query < end, other=0.0)
            age = query[:, None] - key[None, :]
            is_seen = (age >= 0) & (query < end)[:, None] & is_key[None, :]
            length = age.to(tl.float32)
            kept = tl.exp(tl.where(is_seen, length * rate[None, :], float("-inf")))
            total += tl.sum(kept * length * d_out[:, None], axis=0)
        tl.store(d_g + key * heads + head, total, mask=is_key)


class _SoftCacheSize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_retention: Tensor, bounds: Tensor, longest: int) -> Tensor:
        g = log_retention.contiguous()
        output = torch.empty_like(g)
        _forward_kernel[_grid(g, bounds, longest)](g, bounds, output, g.shape[1], block=BLOCK_SIZE)
        ctx.save_for_backward(g, bounds)
        ctx.longest = longest
        return output

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        g, bounds = ctx.saved_tensors
        d_g = torch.empty_like(g)
        grid = _grid(g, bounds, ctx.longest)
        _backward_kernel[grid](g, bounds, d_output.contiguous(), d_g, g.shape[1], block=BLOCK_SIZE)
        return d_g, None, None


def _grid(g: Tensor, bounds: Tensor, longest: int) -> tuple[int, int, int]:
    return len(bounds) - 1, triton.cdiv(longest, BLOCK_SIZE), g.shape[1]


def soft_cache_size_triton(log_retention: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Triton form of `memzoo.kernels.soft_cache_size`; (L, H) float32 -> (L, H), at least one token."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(log_retention.device)
    sizes: Tensor = _SoftCacheSize.apply(log_retention, bounds, max(lengths))
    return sizes
