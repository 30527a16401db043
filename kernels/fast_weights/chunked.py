"""The fast-weight memory chunk by chunk: matmuls over all tokens of a chunk, sequences together.

A chunk reads the weights that the chunk before left, so its reads and its gradient are independent of one
another, and a call may end or begin anywhere in it: the steps of its tokens add up in the state.

The backward pass runs chunks again (`memzoo.kernels.grid_scan`). With K chunks, states of S numbers and
chunks of I intermediate numbers, K S / k + k I numbers are held when k chunks lie between two kept states; k
is chosen to make that small.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..grid_scan import scan_grid
from ..recompute import Step, Tensors
from .nets import add_steps, run_net
from .types import FastWeightState, Rule, pack_blocks
from .update import close_chunk, move, points

# Dimensions: B batch, T tokens, N sequences, M some of them, H heads, C tokens of a chunk, D width of keys,
# E width of values, R matrices, P numbers in all matrices of one head's net


class Tokens(NamedTuple):
    """Tokens of a call."""

    q: Tensor  # (B, T, H, D)
    k: Tensor  # (B, T, H, D)
    v: Tensor  # (B, T, H, E)
    rates: Tensor  # (B, T, H, R)
    momentum: Tensor | None  # (B, T, H)


class Pieces(NamedTuple):
    """Tokens of one chunk, and what is special about it."""

    q: Tensor  # (M, C, H, D)
    k: Tensor  # (M, C, H, D)
    v: Tensor  # (M, C, H, E)
    rates: Tensor  # (M, C, H, R)
    momentum: Tensor | None  # (M, C, H)
    is_first: Tensor | None  # (M,) whether it is the first of its sequence; None where that does not matter
    is_cut: Tensor | None  # (M,) whether no gradient goes through its end; None for none


class Layout(NamedTuple):
    """Which tensors a scan hands on: blocks of weights, of momentum and pending ones, the sum of momenta."""

    num_blocks: int
    has_momentum: bool
    has_first: bool
    has_cuts: bool

    @property
    def num_lasting(self) -> int:
        """How many of them a chunk finds when it begins, in front; the rest are zeros then."""
        return self.num_blocks * (2 if self.has_momentum else 1)

    def pieces(self, tensors: Tensors) -> Pieces:
        """What the tokens of a chunk are."""
        given = iter(tensors)
        q, k, v, rates = (next(given) for _ in range(4))
        momentum = next(given) if self.has_momentum else None
        # missing tokens are zeros
        is_first = next(given).amax(1) > 0 if self.has_first else None
        is_cut = next(given).amax(1) > 0 if self.has_cuts else None
        return Pieces(q, k, v, rates, momentum, is_first, is_cut)


def fast_weight_scan_torch(
    tokens: Tokens,
    lengths: tuple[int, ...],
    row_norms: tuple[Tensor, ...],
    state: FastWeightState,
    rule: Rule,
    *,
    recompute: bool,
    num_seen: list[int],
    forward: Step | None = None,
) -> tuple[Tensor, FastWeightState]:
    """Chunked form of `memzoo.kernels.fast_weight_scan`; arguments are already checked.

    Args:
        forward: takes the place of `whole_chunk` where no gradient is recorded.
    """
    if not sum(lengths):
        return torch.zeros_like(tokens.v), state
    layout = layout_of(rule, state.momentum is not None)
    places = [seen + t for seen, length in zip(num_seen, lengths, strict=True) for t in range(length)]
    inputs = [x.flatten(0, 1) for x in tokens if x is not None]
    acc: dict[str, Any] = {"dtype": state.weights.dtype, "device": state.weights.device}
    if layout.has_first:
        inputs.append(torch.tensor([float(place < rule.chunk_size) for place in places], **acc))
    if rule.bptt_chunks is not None:
        period = rule.chunk_size * rule.bptt_chunks
        inputs.append(
            torch.tensor([float(place % period >= period - rule.chunk_size) for place in places], **acc)
        )
    parts = [state.weights, state.momentum, state.pending]
    carried = [block for part in parts if part is not None for block in rule.blocks(part)]
    if state.momentum_sum is not None:
        carried.append(state.momentum_sum)
    output, found = scan_grid(
        partial(open_chunk, rule, layout),
        partial(whole_chunk, rule, layout),
        tuple(carried),
        tuple(inputs),
        rule.block_lengths(row_norms),
        lengths,
        tuple(seen % rule.chunk_size for seen in num_seen),
        rule.chunk_size,
        num_lasting=layout.num_lasting,
        is_ordered=False,
        recompute=recompute,
        group_size=_group_size(rule, max(lengths) // rule.chunk_size, tokens.q.shape[-1]),
        forward=forward,
    )
    count = layout.num_blocks
    starts = range(0, (3 if layout.has_momentum else 2) * count, count)
    nets = [pack_blocks(found[start : start + count]) for start in starts]
    num_tokens = torch.tensor([seen + n for seen, n in zip(num_seen, lengths, strict=True)])
    momentum, momentum_sum = (nets[1], found[-1]) if layout.has_momentum else (None, None)
    after = FastWeightState(nets[0], nets[-1], num_tokens, momentum, momentum_sum)
    return output.reshape(tokens.v.shape), after


def layout_of(rule: Rule, has_momentum: bool) -> Layout:
    """What a scan with these settings hands on."""
    num_blocks = 1 if rule.net == "linear" else 2
    return Layout(num_blocks, has_momentum, rule.fast_norm == "pre", rule.bptt_chunks is not None)


def whole_chunk(
    rule: Rule, layout: Layout, carried: Tensors, tensors: Tensors, constants: Tensors
) -> tuple[Tensor, Tensors]:
    """A full chunk: read, and step."""
    pieces = layout.pieces(tensors)
    weights, momentum = carried[: layout.num_blocks], carried[layout.num_blocks :]
    out, pairs, base = _read(rule, pieces, weights, constants)
    keep = None if pieces.momentum is None else pieces.momentum.to(out.dtype).mean(1)  # (M, H)
    if rule.max_grad_norm is None and keep is not None:
        moved = add_steps(pairs, [keep[..., None, None, None] * x for x in momentum])
        closed = move(weights, base, moved, constants, rule)
    else:
        total = add_steps(pairs, weights, is_zero=True)
        closed, moved = close_chunk(weights, base, total, momentum or None, keep, constants, rule)
    return out.transpose(1, 2).to(pieces.q.dtype), _cut(pieces, [*closed, *moved])


def open_chunk(
    rule: Rule, layout: Layout, carried: Tensors, tensors: Tensors, constants: Tensors
) -> tuple[Tensor, Tensors]:
    """A chunk of which tokens may be missing: what is carried on if it is full now, and if not."""
    pieces, count = layout.pieces(tensors), layout.num_blocks
    weights, momentum = carried[:count], carried[count : layout.num_lasting]
    pending = carried[layout.num_lasting : layout.num_lasting + count]
    out, pairs, base = _read(rule, pieces, weights, constants)
    total = add_steps(pairs, pending)
    sums: tuple[Tensor, ...] = ()
    if pieces.momentum is not None:
        sums = (carried[-1] + pieces.momentum.to(out.dtype).sum(1),)
    keep = sums[0] / rule.chunk_size if sums else None
    closed, moved = close_chunk(weights, base, total, momentum or None, keep, constants, rule)
    nothing = (torch.zeros_like(x) for x in (*total, *sums))
    full = (*_cut(pieces, [*closed, *moved]), *nothing)
    return out.transpose(1, 2).to(pieces.q.dtype), (*full, *weights, *momentum, *total, *sums)


def _read(
    rule: Rule, pieces: Pieces, weights: Tensors, lengths: Tensors
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list[Tensor] | None]:
    """Outputs (M, H, C, E) and what is written, as `run_net` has it; factors of `points`."""
    acc = weights[0].dtype
    q, k, v, rates = (x.to(acc).transpose(1, 2) for x in pieces[:4])  # (M, H, C, D, E or R)
    scales, base = points(weights, lengths, rule, pieces.is_first)
    out, pairs = run_net(rule.net, q, k, v, rates, weights, scales, residual=rule.residual, loss=rule.loss)
    return out, pairs, base


def _cut(pieces: Pieces, blocks: list[Tensor]) -> Tensors:
    """Blocks (M, ...) without their gradient where the chunk says so."""
    if pieces.is_cut is None:
        return tuple(blocks)
    return tuple(torch.where(pieces.is_cut.view(-1, 1, 1, 1, 1), x.detach(), x) for x in blocks)


def _group_size(rule: Rule, num_chunks: int, head_dim: int) -> int:
    """Chunks between two kept states, about as many as make the memory of the backward pass small."""
    weights = sum(rows * columns for rows, columns in rule.shapes)
    state = weights * (1 if rule.optimizer == "sgd" else 2)
    # what autograd holds of a chunk: some rows per token, some copies of the weights
    chunk = rule.chunk_size * (4 * head_dim + 4 * sum(rows for rows, _ in rule.shapes)) + 6 * weights
    if rule.optimizer == "muon":
        chunk += 4 * rule.ns_steps * weights
    return max(1, round(math.sqrt(num_chunks * state / chunk)))
