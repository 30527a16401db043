"""The union softmax in Triton: one program reads one tile by one query head, memory after memory, online.

Logits of a block of slots live on the chip; what is kept is the output, and the log-sum-exp for the backward
pass, which computes the probabilities again. Everything is float32; products of bfloat16 inputs may use TF32.
Untested on a GPU until a record agrees with the reference.

    forward      m' = max(m, l),  o = o exp(m - m') + exp(l - m') v,  s = s exp(m - m') + sum exp(l - m')
    backward     p = exp(l - lse),  dl = p (do . v - do . o + dlse),  dq = s dl k,  dk = s dl q,  dv = p do
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autograd import backward_without_autocast
from .types import SlotStream, UnionOutput

# Dimensions: K tiles, C queries of a tile, J slots of a tile, P slots of a pool, H query heads, G key/value
# heads, D key width, E value width

BLOCK = 32  # slots that are read at a time


@triton.jit
def _visible(  # type: ignore[no-untyped-def]
    place, first, last, tile, slot, slots, query,
    has_place: tl.constexpr, has_first: tl.constexpr, has_last: tl.constexpr,
):  # fmt: skip
    """Source row of each slot (J,), and which queries see it (C, J)."""
    is_slot = slot < slots
    row = tile * slots + slot
    source = row
    seen = (query[:, None] >= 0) & is_slot[None, :]
    if has_place:
        source = tl.load(place + row, mask=is_slot, other=-1)
        seen = seen & (source >= 0)[None, :]
    if has_first:
        seen = seen & (query[:, None] >= tl.load(first + row, mask=is_slot, other=0)[None, :])
    if has_last:
        seen = seen & (query[:, None] <= tl.load(last + row, mask=is_slot, other=-1)[None, :])
    return source, seen


@triton.jit
def _rows(pointer, row, is_row, head, heads, width, num: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, num) of a head from (.., heads, width); zero outside."""
    column = tl.arange(0, num)
    offset = (row[:, None] * heads + head) * width + column[None, :]
    mask = is_row[:, None] & (column < width)[None, :]
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, place, first, last, output, top, total, scale, queries, slots, heads, groups, width, columns,
    d: tl.constexpr, e: tl.constexpr, block_c: tl.constexpr, block: tl.constexpr,
    has_place: tl.constexpr, has_first: tl.constexpr, has_last: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    tile, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = head // (heads // groups)
    query = part * block_c + tl.arange(0, block_c)
    is_query = query < queries
    row = tile * queries + query
    q_rows = _rows(q, row, is_query, head, heads, width, d)
    column = tl.arange(0, e)
    where = (row[:, None] * heads + head) * columns + column[None, :]
    is_where = is_query[:, None] & (column < columns)[None, :]
    # what the memories before this one have left
    out = tl.load(output + where, mask=is_where, other=0.0)
    best = tl.load(top + row * heads + head, mask=is_query, other=float("-inf"))
    sums = tl.load(total + row * heads + head, mask=is_query, other=0.0)
    for start in range(0, slots, block):
        slot = start + tl.arange(0, block)
        source, seen = _visible(place, first, last, tile, slot, slots, query, has_place, has_first, has_last)
        is_row = (slot < slots) & (source >= 0)
        keys = _rows(k, source, is_row, group, groups, width, d)
        values = _rows(v, source, is_row, group, groups, columns, e)
        logits = tl.dot(q_rows, tl.trans(keys), input_precision=precision) * scale
        logits = tl.where(seen, logits, float("-inf"))
        larger = tl.maximum(best, tl.max(logits, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp(logits - base[:, None])
        shrink = tl.exp(best - base)
        sums = sums * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None] + tl.dot(weights, values, input_precision=precision)
        best = larger
    tl.store(output + where, out, mask=is_where)
    tl.store(top + row * heads + head, best, mask=is_query)
    tl.store(total + row * heads + head, sums, mask=is_query)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, place, first, last, lse, d_output, shift, d_q, d_k, d_v, scale, queries, slots, heads, groups,
    width, columns,
    d: tl.constexpr, e: tl.constexpr, block_c: tl.constexpr, block: tl.constexpr,
    has_place: tl.constexpr, has_first: tl.constexpr, has_last: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    tile, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = head // (heads // groups)
    query = part * block_c + tl.arange(0, block_c)
    is_query = query < queries
    row = tile * queries + query
    q_rows = _rows(q, row, is_query, head, heads, width, d)
    d_out = _rows(d_output, row, is_query, head, heads, columns, e)
    level = tl.load(lse + row * heads + head, mask=is_query, other=float("-inf"))
    base = tl.where(level == float("-inf"), 0.0, level)
    moved = tl.load(shift + row * heads + head, mask=is_query, other=0.0)
    grad = tl.zeros([block_c, d], dtype=tl.float32)
    column_d, column_e = tl.arange(0, d), tl.arange(0, e)
    for start in range(0, slots, block):
        slot = start + tl.arange(0, block)
        source, seen = _visible(place, first, last, tile, slot, slots, query, has_place, has_first, has_last)
        is_row = (slot < slots) & (source >= 0)
        seen = seen & is_query[:, None]
        keys = _rows(k, source, is_row, group, groups, width, d)
        values = _rows(v, source, is_row, group, groups, columns, e)
        logits = tl.dot(q_rows, tl.trans(keys), input_precision=precision) * scale
        probs = tl.where(seen, tl.exp(tl.where(seen, logits - base[:, None], 0.0)), 0.0)
        d_logits = tl.dot(d_out, tl.trans(values), input_precision=precision) + moved[:, None]
        d_logits = probs * d_logits * scale
        grad += tl.dot(d_logits, keys, input_precision=precision)
        # tiles share the slots of a pool, and query heads those of a key head
        where = (source[:, None] * groups + group) * width + column_d[None, :]
        share = tl.dot(tl.trans(d_logits), q_rows, input_precision=precision)
        tl.atomic_add(d_k + where, share, mask=is_row[:, None] & (column_d < width)[None, :])
        where = (source[:, None] * groups + group) * columns + column_e[None, :]
        share = tl.dot(tl.trans(probs), d_out, input_precision=precision)
        tl.atomic_add(d_v + where, share, mask=is_row[:, None] & (column_e < columns)[None, :])
    offset = (row[:, None] * heads + head) * width + column_d[None, :]
    tl.store(d_q + offset, grad, mask=is_query[:, None] & (column_d < width)[None, :])


def union_triton(streams: Sequence[SlotStream], scale: float) -> UnionOutput:
    """Arguments are already checked, shapes as in `union_attention`; no float64."""
    flat = [None if x is None else x.contiguous() for stream in streams for x in stream]
    return UnionOutput(*_Union.apply(scale, *flat))


def _streams(flat: Sequence[Any]) -> list[SlotStream]:
    width = len(SlotStream._fields)
    return [SlotStream(*flat[start : start + width]) for start in range(0, len(flat), width)]


def _launch(stream: SlotStream) -> tuple[tuple[int, int, int], dict[str, Any], tuple[int, ...]]:
    """Grid, constants and sizes of a call."""
    num_tiles, num_queries, heads, width = stream.q.shape
    groups, columns = stream.v.shape[-2:]
    block_c = max(16, min(64, triton.next_power_of_2(num_queries)))
    constants = {
        "d": max(16, triton.next_power_of_2(width)),
        "e": max(16, triton.next_power_of_2(columns)),
        "block_c": block_c,
        "block": BLOCK,
        "has_place": stream.place is not None,
        "has_first": stream.first is not None,
        "has_last": stream.last is not None,
        "precision": "ieee" if stream.q.dtype == torch.float32 else "tf32",
    }
    grid = (num_tiles, heads, triton.cdiv(num_queries, block_c))
    return grid, constants, (num_queries, stream.num_slots, heads, groups, width, columns)


class _Union(torch.autograd.Function):
    """The union softmax with its gradient."""

    @staticmethod
    def forward(ctx: Any, scale: float, *flat: Tensor | None) -> tuple[Tensor, Tensor]:
        streams = _streams(flat)
        q, v = streams[0].q, streams[0].v
        shape = q.shape[:3]
        output = torch.zeros(*shape, v.shape[-1], dtype=torch.float32, device=q.device)
        total = torch.zeros(shape, dtype=torch.float32, device=q.device)
        top = torch.full_like(total, -torch.inf)
        for stream in streams:
            grid, constants, sizes = _launch(stream)
            lists = [q if x is None else x for x in stream[3:]]  # a place that is never read
            _forward_kernel[grid](*stream[:3], *lists, output, top, total, scale, *sizes, **constants)
        is_empty = total == 0
        output = output / total.masked_fill(is_empty, 1)[..., None]
        lse = (top.masked_fill(is_empty, 0) + total.masked_fill(is_empty, 1).log()).masked_fill(
            is_empty, -torch.inf
        )
        ctx.save_for_backward(*flat, output, lse)
        ctx.scale = scale
        return output.to(q.dtype), lse

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        *flat, output, lse = ctx.saved_tensors
        d_output = d_output.float().contiguous()
        shift = (d_lse.float() - (d_output * output).sum(-1)).contiguous()
        grads: list[Tensor | None] = []
        for stream in _streams(flat):
            grid, constants, sizes = _launch(stream)
            lists = [stream.q if x is None else x for x in stream[3:]]
            found = [torch.zeros_like(x, dtype=torch.float32) for x in stream[:3]]
            _backward_kernel[grid](
                *stream[:3], *lists, lse, d_output, shift, *found, ctx.scale, *sizes, **constants
            )
            grads += [x.to(like.dtype) for x, like in zip(found, stream[:3], strict=True)]
            grads += [None, None, None]
        return None, *grads
