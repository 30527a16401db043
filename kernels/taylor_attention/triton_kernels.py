"""Taylor attention in Triton: scores and features of a chunk live on the chip, only q, k, v and outputs move.

One program reads one sequence by one query head into one block of value columns, chunk after chunk, with
the sums over powers of the keys in registers. Where the weights are asked for, a column of ones is appended
to the values. Everything is float32; products of bfloat16 inputs may use TF32. Untested on a GPU until a
record agrees with the reference.

A = lower triangle of 1 + u + u^2 / 2, u = scale q . k

    forward      o  = A v + S0 + scale q S1 + scale^2 / 2 (q q^T) S2
                 S0, S1, S2 += 1, k, (k k^T) times v^T
    queries      dq = scale ((dA (1 + u)) k + S1 do + scale S2 do q)       with the sums of the past
    keys         dk = scale (dA (1 + u))^T q + D1 v + 2 (D2 v) k,  dv = A^T do + D0 + k D1 + (k k^T) D2
                 D0, D1, D2 += 1, scale q, scale^2 / 2 (q q^T) times do^T   from the end to the start
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autograd import backward_without_autocast

# Dimensions: L tokens of all sequences, N sequences, H query heads, G key/value heads, d width of a head
# (a power of two, at least 16), V value width, E value columns (V, or V + 1 with the weights), C chunk length

CHUNK_SIZE = 32
MAX_WIDTH = 16  # features of a chunk of wider heads do not fit on the chip


@triton.jit
def _columns(pointer, token, is_token, head, heads, width, first, num: tl.constexpr):  # type: ignore[no-untyped-def]
    """(C, num) columns of a head from (L, heads, width); zero outside."""
    column = first + tl.arange(0, num)
    offset = (token[:, None] * heads + head) * width + column[None, :]
    mask = is_token[:, None] & (column < width)[None, :]
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _values(pointer, token, is_token, head, heads, width, first, num: tl.constexpr, weigh: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `_columns`, with the column of ones behind the values."""
    value = _columns(pointer, token, is_token, head, heads, width, first, num)
    if weigh:
        column = first + tl.arange(0, num)
        value = tl.where(is_token[:, None] & (column == width)[None, :], 1.0, value)
    return value


@triton.jit
def _products(x, chunk: tl.constexpr, d: tl.constexpr):  # type: ignore[no-untyped-def]
    """x x^T of every row, (C, d * d)."""
    return tl.reshape(x[:, :, None] * x[:, None, :], (chunk, d * d))


@triton.jit
def _times(matrix, x, chunk: tl.constexpr, d: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows (C, d * d) as matrices times rows (C, d)."""
    return tl.sum(tl.reshape(matrix, (chunk, d, d)) * x[:, None, :], axis=2)


@triton.jit
def _sums(pointer, row, columns, column, is_column, d: tl.constexpr):  # type: ignore[no-untyped-def]
    """The three sums of a block of columns from (N * heads, 1 + d + d * d, E)."""
    base = pointer + row * (1 + d + d * d) * columns + column
    s0 = tl.load(base, mask=is_column, other=0.0)
    linear = 1 + tl.arange(0, d)
    s1 = tl.load(base[None, :] + linear[:, None] * columns, mask=is_column[None, :], other=0.0)
    square = 1 + d + tl.arange(0, d * d)
    s2 = tl.load(base[None, :] + square[:, None] * columns, mask=is_column[None, :], other=0.0)
    return s0, s1, s2


@triton.jit
def _keep_sums(pointer, row, columns, column, is_column, s0, s1, s2, d: tl.constexpr):  # type: ignore[no-untyped-def]
    base = pointer + row * (1 + d + d * d) * columns + column
    tl.store(base, s0, mask=is_column)
    linear = 1 + tl.arange(0, d)
    tl.store(base[None, :] + linear[:, None] * columns, s1, mask=is_column[None, :])
    square = 1 + d + tl.arange(0, d * d)
    tl.store(base[None, :] + square[:, None] * columns, s2, mask=is_column[None, :])


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bounds, before, after, output, scale, heads, groups, width, columns,
    d: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr, weigh: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = head // (heads // groups)
    column = part * block + tl.arange(0, block)
    is_column = column < columns
    start, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    slot = tl.arange(0, chunk)
    s0, s1, s2 = _sums(before, sequence * groups + group, columns, column, is_column, d)
    for first in range(start, end, chunk):
        token = first + slot
        is_token = token < end
        query = _columns(q, token, is_token, head, heads, d, 0, d)
        key = _columns(k, token, is_token, group, groups, d, 0, d)
        value = _values(v, token, is_token, group, groups, width, part * block, block, weigh)
        u = tl.dot(query, tl.trans(key), input_precision=precision) * scale
        score = tl.where(slot[:, None] >= slot[None, :], 1.0 + u + 0.5 * u * u, 0.0)
        out = tl.dot(score, value, input_precision=precision) + s0[None, :]
        out += tl.dot(query, s1, input_precision=precision) * scale
        out += tl.dot(_products(query, chunk, d), s2, input_precision=precision) * (0.5 * scale * scale)
        offset = (token[:, None] * heads + head) * columns + column[None, :]
        tl.store(output + offset, out, mask=is_token[:, None] & is_column[None, :])
        s0 += tl.sum(value, axis=0)
        s1 += tl.dot(tl.trans(key), value, input_precision=precision)
        s2 += tl.dot(tl.trans(_products(key, chunk, d)), value, input_precision=precision)
    if head % (heads // groups) == 0:
        _keep_sums(after, sequence * groups + group, columns, column, is_column, s0, s1, s2, d)


@triton.jit
def _queries_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bounds, before, d_output, d_query, scale, heads, groups, width, columns, num_tokens,
    d: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr, weigh: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = head // (heads // groups)
    column = part * block + tl.arange(0, block)
    is_column = column < columns
    start, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    slot = tl.arange(0, chunk)
    _s0, s1, s2 = _sums(before, sequence * groups + group, columns, column, is_column, d)
    for first in range(start, end, chunk):
        token = first + slot
        is_token = token < end
        query = _columns(q, token, is_token, head, heads, d, 0, d)
        key = _columns(k, token, is_token, group, groups, d, 0, d)
        value = _values(v, token, is_token, group, groups, width, part * block, block, weigh)
        d_out = _columns(d_output, token, is_token, head, heads, columns, part * block, block)
        u = tl.dot(query, tl.trans(key), input_precision=precision) * scale
        d_score = tl.dot(d_out, tl.trans(value), input_precision=precision)
        d_u = tl.where(slot[:, None] >= slot[None, :], d_score * (1.0 + u), 0.0)
        grad = tl.dot(d_u, key, input_precision=precision) + tl.dot(
            d_out, tl.trans(s1), input_precision=precision
        )
        read = tl.dot(d_out, tl.trans(s2), input_precision=precision)
        grad = scale * (grad + scale * _times(read, query, chunk, d))
        offset = ((part * num_tokens + token[:, None]) * heads + head) * d + tl.arange(0, d)[None, :]
        tl.store(d_query + offset, grad, mask=is_token[:, None])
        s1 += tl.dot(tl.trans(key), value, input_precision=precision)
        s2 += tl.dot(tl.trans(_products(key, chunk, d)), value, input_precision=precision)


@triton.jit
def _keys_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bounds, d_after, d_output, d_key, d_value, d_before, scale, heads, groups, width, columns,
    num_tokens,
    d: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr, weigh: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = head // (heads // groups)
    column = part * block + tl.arange(0, block)
    is_column = column < columns
    start, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    slot = tl.arange(0, chunk)
    # the gradient of the final sums enters once per group of query heads
    enters = is_column & (head % (heads // groups) == 0)
    d0, d1, d2 = _sums(d_after, sequence * groups + group, columns, column, enters, d)
    for index in range(tl.cdiv(end - start, chunk)):
        first = start + (tl.cdiv(end - start, chunk) - 1 - index) * chunk
        token = first + slot
        is_token = token < end
        query = _columns(q, token, is_token, head, heads, d, 0, d)
        key = _columns(k, token, is_token, group, groups, d, 0, d)
        value = _values(v, token, is_token, group, groups, width, part * block, block, weigh)
        d_out = _columns(d_output, token, is_token, head, heads, columns, part * block, block)
        u = tl.dot(query, tl.trans(key), input_precision=precision) * scale
        is_past = slot[:, None] >= slot[None, :]
        score = tl.where(is_past, 1.0 + u + 0.5 * u * u, 0.0)
        d_score = tl.dot(d_out, tl.trans(value), input_precision=precision)
        d_u = tl.where(is_past, d_score * (1.0 + u), 0.0)
        products = _products(key, chunk, d)
        grad_value = tl.dot(tl.trans(score), d_out, input_precision=precision) + d0[None, :]
        grad_value += tl.dot(key, d1, input_precision=precision) + tl.dot(
            products, d2, input_precision=precision
        )
        grad_key = scale * tl.dot(tl.trans(d_u), query, input_precision=precision)
        grad_key += tl.dot(value, tl.trans(d1), input_precision=precision)
        written = tl.dot(value, tl.trans(d2), input_precision=precision)
        grad_key += 2.0 * _times(written, key, chunk, d)
        offset = ((part * num_tokens + token[:, None]) * heads + head) * d + tl.arange(0, d)[None, :]
        tl.store(d_key + offset, grad_key, mask=is_token[:, None])
        offset = (token[:, None] * heads + head) * width + column[None, :]
        tl.store(d_value + offset, grad_value, mask=is_token[:, None] & (column < width)[None, :])
        d0 += tl.sum(d_out, axis=0)
        d1 += tl.dot(tl.trans(query), d_out, input_precision=precision) * scale
        d2 += tl.dot(tl.trans(_products(query, chunk, d)), d_out, input_precision=precision) * (
            0.5 * scale * scale
        )
    _keep_sums(d_before, sequence * heads + head, columns, column, is_column, d0, d1, d2, d)


def weighted_sums(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, before: Tensor, *, scale: float, weigh: bool
) -> tuple[Tensor, Tensor]:
    """Sums of values, and of weights, over the past of every token.

    Args:
        q: (L, H, d), contiguous as all tensors here.
        k: (L, G, d).
        v: (L, G, V).
        bounds: (N + 1,) int64 on the device.
        before: (N, G, 1 + d + d * d, E) float32, sums over powers of the keys read before; the part of the
            squares is symmetric.
        scale: factor on q . k.
        weigh: also sum the weights; E = V + 1 then.

    Returns:
        (L, H, E) float32, and the sums after the last token, as `before`.
    """
    return _WeightedSums.apply(q, k, v, bounds, before, scale, weigh)


def _launch(q: Tensor, v: Tensor, before: Tensor) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid (sequences, query heads, blocks of value columns), and the constants of all kernels."""
    d, columns = q.shape[2], before.shape[3]
    block = max(16, min(32, triton.next_power_of_2(columns)))
    grid = (before.shape[0], q.shape[1], triton.cdiv(columns, block))
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return grid, {"d": d, "block": block, "chunk": CHUNK_SIZE, "precision": precision}


class _WeightedSums(torch.autograd.Function):
    """`weighted_sums` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, before: Tensor, scale: float, weigh: bool
    ) -> tuple[Tensor, Tensor]:
        grid, constants = _launch(q, v, before)
        (num_tokens, heads, _), groups, columns = q.shape, k.shape[1], before.shape[3]
        output = torch.empty(num_tokens, heads, columns, dtype=torch.float32, device=q.device)
        after = torch.empty_like(before)
        sizes = (scale, heads, groups, v.shape[2], columns)
        _forward_kernel[grid](q, k, v, bounds, before, after, output, *sizes, weigh=weigh, **constants)
        ctx.save_for_backward(q, k, v, bounds, before)
        ctx.scale, ctx.weigh = scale, weigh
        return output, after

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, d_output: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bounds, before = ctx.saved_tensors
        grid, constants = _launch(q, v, before)
        (num_tokens, heads, d), (_, groups, width), columns = q.shape, v.shape, before.shape[3]
        d_output, d_after = d_output.contiguous(), d_after.contiguous()
        wide = {"dtype": torch.float32, "device": q.device}
        d_query, d_key = (torch.empty(grid[2], num_tokens, heads, d, **wide) for _ in range(2))
        d_value = torch.empty(num_tokens, heads, width, **wide)
        d_before = torch.empty(before.shape[0], heads, *before.shape[2:], **wide)
        sizes = (ctx.scale, heads, groups, width, columns, num_tokens)
        options = {"weigh": ctx.weigh, **constants}
        _queries_kernel[grid](q, k, v, bounds, before, d_output, d_query, *sizes, **options)
        _keys_kernel[grid](q, k, v, bounds, d_after, d_output, d_key, d_value, d_before, *sizes, **options)
        shared = (groups, heads // groups)
        return (
            d_query.sum(0).to(q.dtype),
            d_key.sum(0).unflatten(1, shared).sum(2).to(k.dtype),
            d_value.unflatten(1, shared).sum(2).to(v.dtype),
            None,
            d_before.unflatten(1, shared).sum(2),
            None,
            None,
        )
