"""The union softmax in groups of tiles: gather the slots of a group, one matmul per memory, one softmax.

The scores of one group are alive at a time, in the backward pass too, where they are computed again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..autograd import backward_without_autocast
from .types import SlotStream, UnionOutput

# Dimensions: K tiles, N tiles of a group, C queries of a tile, H query heads, G key/value heads, R query
# heads of each, D key width, E value width, J slots

CPU_SCORES, DEVICE_SCORES = 1 << 20, 1 << 26  # of one group: on a CPU they stay in cache


def union_torch(streams: Sequence[SlotStream], scale: float) -> UnionOutput:
    """Grouped gathers and matmuls; arguments are already checked, shapes as in `union_attention`."""
    num_tiles, num_queries, num_heads, _ = streams[0].q.shape
    on_cpu = streams[0].q.device.type == "cpu"
    scores = num_queries * num_heads * sum(stream.num_slots for stream in streams)
    size = max(1, (CPU_SCORES if on_cpu else DEVICE_SCORES) // max(1, scores))
    # a compiler decides by itself what to store
    if num_tiles <= size or is_compiling():
        return _attend(streams, scale)
    groups = [(start, min(start + size, num_tiles)) for start in range(0, num_tiles, size)]
    flat = [tensor for stream in streams for tensor in stream]
    return UnionOutput(*_Grouped.apply(scale, groups, *flat))


def _attend(streams: Sequence[SlotStream], scale: float) -> UnionOutput:
    """All tiles at once, by differentiable operations."""
    q = streams[0].q
    groups = streams[0].v.shape[-2]
    logits = torch.cat([_logits(stream, scale) for stream in streams], dim=-1)  # (N, G, R, C, J)
    top = (
        logits.detach().amax(-1, keepdim=True)
        if logits.shape[-1]
        else logits.new_zeros(*logits.shape[:-1], 1)
    )
    is_empty = top == -torch.inf
    weights = (logits - top.masked_fill(is_empty, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    probs = (weights / total.masked_fill(is_empty, 1)).to(streams[0].v.dtype)
    parts = probs.split([stream.num_slots for stream in streams], dim=-1)
    output = sum(
        torch.matmul(part.flatten(2, 3), _slots(stream.v, stream.place).transpose(1, 2))
        for part, stream in zip(parts, streams, strict=True)
    )
    assert isinstance(output, Tensor)
    heads = output.unflatten(2, (q.shape[2] // groups, q.shape[1]))  # (N, G, R, C, E)
    lse = top + total.masked_fill(is_empty, 1).log()
    return UnionOutput(
        heads.flatten(1, 2).transpose(1, 2).to(q.dtype), lse.squeeze(-1).flatten(1, 2).transpose(1, 2)
    )


def _logits(stream: SlotStream, scale: float) -> Tensor:
    """Scaled logits (N, G, R, C, J), -inf where a query does not see a slot."""
    wide = torch.float64 if stream.q.dtype == torch.float64 else torch.float32
    keys = _slots(stream.k, stream.place)  # (N, J, G, D)
    grouped = stream.q.unflatten(2, (keys.shape[2], -1)).permute(0, 2, 3, 1, 4)  # (N, G, R, C, D)
    logits = torch.matmul(grouped.flatten(2, 3), keys.permute(0, 2, 3, 1)).to(wide) * scale
    logits = logits.unflatten(2, grouped.shape[2:4])
    hidden = _hidden(stream)
    return logits if hidden is None else logits.masked_fill(hidden[:, None, None], -torch.inf)


def _slots(source: Tensor, place: Tensor | None) -> Tensor:
    """Keys or values (N, J, G, D) of the slots."""
    if place is None:
        return source
    if source.shape[0] == 0:  # an empty pool, every slot is empty
        return source.new_zeros(*place.shape, *source.shape[1:])
    return source.index_select(0, place.clamp(min=0).flatten()).unflatten(0, place.shape)


def _hidden(stream: SlotStream) -> Tensor | None:
    """(N, C or 1, J) bool, True where a query does not see a slot; None when all see all."""
    found = None if stream.place is None else (stream.place < 0)[:, None]
    query = torch.arange(stream.q.shape[1], device=stream.q.device)[:, None]
    if stream.first is not None:
        early = query < stream.first[:, None]
        found = early if found is None else found | early
    if stream.last is not None:
        late = query > stream.last[:, None]
        found = late if found is None else found | late
    return found


class _Grouped(torch.autograd.Function):
    """`_attend`, one group of tiles after the other."""

    @staticmethod
    def forward(
        ctx: Any, scale: float, groups: list[tuple[int, int]], *flat: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*flat)
        ctx.scale, ctx.groups = scale, groups
        streams = _streams(flat)
        parts = [_attend([stream.rows(*group) for stream in streams], scale) for group in groups]
        return torch.cat([part.output for part in parts]), torch.cat([part.lse for part in parts])

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        flat = ctx.saved_tensors
        streams = _streams(flat)
        wanted = [n for n, is_wanted in enumerate(ctx.needs_input_grad[2:]) if is_wanted]
        grads: list[Tensor | None] = [None] * len(flat)
        for n in wanted:
            # sums over groups are rounded once
            wide = torch.promote_types(flat[n].dtype, torch.float32)
            grads[n] = torch.zeros_like(flat[n], dtype=wide)
        for start, end in ctx.groups:
            parts = [stream.rows(start, end) for stream in streams]
            leaves = [None if x is None else x.detach() for part in parts for x in part]
            learned = [leaf.requires_grad_() for n in wanted if (leaf := leaves[n]) is not None]
            with torch.enable_grad():
                found = _attend(_streams(leaves), ctx.scale)
            shares = torch.autograd.grad(
                found, learned, (d_output[start:end], d_lse[start:end]), materialize_grads=True
            )
            for n, share in zip(wanted, shares, strict=True):
                total = grads[n]
                assert total is not None
                is_shared = n % _WIDTH in (1, 2) and streams[n // _WIDTH].place is not None
                (total if is_shared else total[start:end]).add_(share)
        done = [None if x is None else x.to(like.dtype) for x, like in zip(grads, flat, strict=True)]
        return None, None, *done


_WIDTH = len(SlotStream._fields)


def _streams(flat: Sequence[Any]) -> list[SlotStream]:
    return [SlotStream(*flat[start : start + _WIDTH]) for start in range(0, len(flat), _WIDTH)]
