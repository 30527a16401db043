"""The soft cache size in blocks of tokens, mostly by matrix products.

A later block of queries begins b tokens after key i and holds the queries a = 0, 1, ... of it:

    exp((b + a) g_i) = exp(b g_i) exp(a g_i)

The second factor is the same for all later blocks. So one block of C keys makes C^2 exponentials for itself
and C per later block, and the sums over its keys are one product: no exponent is ever positive, and time is
that of a matrix product rather than of T^2 exponentials. The backward pass makes the factors again:

    d g_i = sum_t (t - i) exp((t - i) g_i) d S_t,        t - i = b + a

Factors below exp(-80) are taken as 0: S is at least 1, and denormal numbers are slow on a CPU.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..autograd import backward_without_autocast
from ..layout import ChunkLayout

# Dimensions: L tokens of all sequences, N sequences, K chunks, H heads, C chunk length, M later chunks

CHUNK_SIZE = 64
_LOWEST = -80.0  # of an exponent
_PAIR_NUMBERS = 2**20  # exponentials of pairs inside chunks that are held at once


def soft_cache_size_torch(log_retention: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Chunked form of `memzoo.kernels.soft_cache_size`; (L, H) in float32 or float64 -> (L, H)."""
    if not log_retention.numel():
        return log_retention.clone()
    if is_compiling():
        sizes: Tensor = _sizes_op(log_retention, lengths)
        return sizes
    sizes = _SoftCacheSize.apply(log_retention, lengths)
    return sizes


def _sizes(log_retention: Tensor, lengths: list[int]) -> Tensor:
    layout = ChunkLayout.make(lengths, CHUNK_SIZE)
    g = layout.to_chunks(log_retention).permute(0, 2, 1).contiguous()  # (K, H, C)
    sizes = torch.empty_like(g)
    for part, age, is_past in _pairs_inside(g):
        # empty slots lie behind the last token: no query that counts sees them
        sizes[part] = (_exp(age * g[part, :, None, :]) * is_past).sum(-1)  # over keys of (M, H, C, C)
    for first, last in _spans(layout):
        keys = g[first]  # (H, C), a chunk without empty slots: others follow it
        near, far = _factors(keys, last - first)
        later = far.transpose(1, 2) @ near  # (H, M, C)
        sizes[first + 1 : last + 1] += later.transpose(0, 1)
    return layout.from_chunks(sizes.permute(0, 2, 1))


def _size_gradients(log_retention: Tensor, d_sizes: Tensor, lengths: list[int]) -> Tensor:
    layout = ChunkLayout.make(lengths, CHUNK_SIZE)
    g = layout.to_chunks(log_retention).permute(0, 2, 1).contiguous()  # (K, H, C)
    d_chunks = layout.to_chunks(d_sizes.contiguous()).permute(0, 2, 1).contiguous()  # (K, H, C)
    d_g = torch.empty_like(g)
    for part, age, is_past in _pairs_inside(g):
        kept = _exp(age * g[part, :, None, :]) * (is_past * age)
        d_g[part] = (kept * d_chunks[part, :, :, None]).sum(2)
    a = torch.arange(CHUNK_SIZE, device=g.device, dtype=g.dtype)
    for first, last in _spans(layout):
        near, far = _factors(g[first], last - first)
        d_later = d_chunks[first + 1 : last + 1].transpose(0, 1)  # (H, M, C queries)
        distance = _distances(g[first], last - first)  # (C, M)
        by_start = torch.cat([far, far * distance], 1) @ d_later  # (H, 2 C, C queries)
        plain, weighted = by_start.chunk(2, 1)
        d_g[first] += (near * (plain * a + weighted)).sum(-1)
    return layout.from_chunks(d_g.permute(0, 2, 1))


def _pairs_inside(g: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks a few at a time, with the age (C, C) of key j for query a, at least 0, and 1 where j <= a."""
    slot = torch.arange(CHUNK_SIZE, device=g.device)
    age = slot[:, None] - slot
    is_past = (age >= 0).to(g.dtype)
    age = age.clamp(min=0).to(g.dtype)
    count = max(1, _PAIR_NUMBERS // (g.shape[1] * CHUNK_SIZE**2))
    for start in range(0, g.shape[0], count):
        yield slice(start, start + count), age, is_past


def _spans(layout: ChunkLayout) -> Iterator[tuple[int, int]]:
    """Every chunk that others of its sequence follow, and the last of those."""
    for start, count in zip(layout.chunk_starts, layout.num_chunks, strict=True):
        for first in range(start, start + count - 1):
            yield first, start + count - 1


def _distances(keys: Tensor, num_later: int) -> Tensor:
    """(C, M) tokens from a key to the first query of each later chunk."""
    start = torch.arange(1, num_later + 1, device=keys.device, dtype=keys.dtype) * CHUNK_SIZE
    return start - torch.arange(CHUNK_SIZE, device=keys.device, dtype=keys.dtype)[:, None]


def _factors(keys: Tensor, num_later: int) -> tuple[Tensor, Tensor]:
    """exp(a g), (H, C, C queries), and exp(b g), (H, C, M), of keys (H, C)."""
    a = torch.arange(CHUNK_SIZE, device=keys.device, dtype=keys.dtype)
    return _exp(keys[..., None] * a), _exp(keys[..., None] * _distances(keys, num_later))


def _exp(exponent: Tensor) -> Tensor:
    return exponent.masked_fill_(exponent < _LOWEST, float("-inf")).exp_()


class _SoftCacheSize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_retention: Tensor, lengths: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(log_retention)
        ctx.lengths = lengths
        return _sizes(log_retention, list(lengths))

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, d_sizes: Tensor) -> tuple[Tensor | None, ...]:
        (log_retention,) = ctx.saved_tensors
        return _size_gradients(log_retention, d_sizes, list(ctx.lengths)), None


# one opaque operation under torch.compile, which would unroll the loop over chunks
_sizes_op = torch.library.custom_op(
    "memzoo::soft_cache_size",
    _sizes,
    mutates_args=(),
    schema="(Tensor log_retention, SymInt[] lengths) -> Tensor",
)
_gradients_op = torch.library.custom_op(
    "memzoo::soft_cache_size_backward",
    _size_gradients,
    mutates_args=(),
    schema="(Tensor log_retention, Tensor d_sizes, SymInt[] lengths) -> Tensor",
)


@_sizes_op.register_fake
def _(log_retention: Tensor, lengths: Any) -> Tensor:
    return torch.empty_like(log_retention)


@_gradients_op.register_fake
def _(log_retention: Tensor, d_sizes: Tensor, lengths: Any) -> Tensor:
    return torch.empty_like(log_retention)


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    log_retention, ctx.lengths = inputs
    ctx.save_for_backward(log_retention)


def _op_backward(ctx: Any, d_sizes: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients_op(*ctx.saved_tensors, d_sizes, ctx.lengths), None


_sizes_op.register_autograd(_op_backward, setup_context=_save_for_op)
