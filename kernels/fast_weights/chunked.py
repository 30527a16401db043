"""The fast-weight memory chunk by chunk: matmuls over all tokens of a chunk, sequences of a kind together.

A chunk reads the weights that the chunk before left, so its reads and its gradient are independent of one
another, and a call may end or begin anywhere in it: the steps of its tokens add up in the state.

The backward pass keeps the state in front of every few chunks and runs those chunks again, with a graph of
their own that lives as long as they do. With K chunks, states of S numbers and chunks of I intermediate
numbers, K S / k + k I numbers are held when k chunks lie between two kept states; k is chosen to make that
small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..autograd import backward_without_autocast
from .nets import Matrix, descend, read_net
from .types import FastWeightState, Memory, Rule, pack
from .update import complete_chunk, read_and_gradient_points

# Dimensions: B batch, T tokens, N sequences, G sequences of a group, H heads, D width of keys, E width of
# values, R matrices, P numbers in all matrices of one head's net


class Tokens(NamedTuple):
    """Tokens of the sequences of a group, or a piece of them."""

    q: Tensor  # (G, T, H, D)
    k: Tensor  # (G, T, H, D)
    v: Tensor  # (G, T, H, E)
    rates: Tensor  # (G, T, H, R)
    momentum: Tensor | None  # (G, T, H)

    def split(self, sizes: Sequence[int]) -> list[Tokens]:
        """Pieces of the given numbers of tokens."""
        return [Tokens(*piece) for piece in _split(self, sizes, 1)]


class _Piece(NamedTuple):
    """Tokens of one call that lie in one chunk of the sequences' own grid."""

    size: int
    chunk: int  # which one
    completes: bool  # whether they fill it


def _pieces(num_tokens: int, num_seen: int, chunk_size: int) -> list[_Piece]:
    pieces, position, end = [], num_seen, num_seen + num_tokens
    while position < end:
        chunk = position // chunk_size
        boundary = (chunk + 1) * chunk_size
        pieces.append(_Piece(min(boundary, end) - position, chunk, boundary <= end))
        position = boundary
    return pieces


def _groups(lengths: Sequence[int], num_seen: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of sequences with as many tokens, now and before: (sequences, tokens, tokens before)."""
    groups: list[tuple[int, int, int]] = []
    for length, seen in zip(lengths, num_seen, strict=True):
        if groups and groups[-1][1:] == (length, seen):
            groups[-1] = (groups[-1][0] + 1, length, seen)
        else:
            groups.append((1, length, seen))
    return groups


def fast_weight_scan_torch(
    tokens: Tokens,
    lengths: tuple[int, ...],
    row_norms: tuple[Tensor, ...],
    state: FastWeightState,
    rule: Rule,
    *,
    recompute: bool,
    num_seen: Sequence[int],
) -> tuple[Tensor, FastWeightState]:
    """Chunked form of `memzoo.kernels.fast_weight_scan`; arguments are already checked."""
    groups = _groups(lengths, num_seen)
    memory = Memory(state.weights, state.pending, state.momentum, state.momentum_sum)
    tight = [None if x is None else x.flatten(0, 1) for x in tokens]  # (L, ...)
    rows = _split(tight, [count * length for count, length, _ in groups], 0)
    states = _split(memory, [count for count, _, _ in groups], 0)
    outputs: list[Tensor] = []
    finals: list[Memory] = []
    for (count, length, seen), row, entering in zip(groups, rows, states, strict=True):
        dense: list[Any] = [None if x is None else x.unflatten(0, (count, length)) for x in row]
        pieces = _pieces(length, seen, rule.chunk_size)
        out, final = _scan(Tokens(*dense), Memory(*entering), row_norms, rule, pieces, recompute)
        outputs.append(out.flatten(0, 1))
        finals.append(final)
    num_tokens = torch.tensor([seen + n for seen, n in zip(num_seen, lengths, strict=True)])
    weights, pending, momentum, momentum_sum = _join(finals, 0)
    after = FastWeightState(weights, pending, num_tokens, momentum, momentum_sum)
    return torch.cat(outputs).view(tokens.v.shape), after


def _scan(
    tokens: Tokens,
    memory: Memory,
    row_norms: tuple[Tensor, ...],
    rule: Rule,
    pieces: list[_Piece],
    recompute: bool,
) -> tuple[Tensor, Memory]:
    """Output (G, T, H, E) and final memory of one group."""
    tensors = [x for x in (*tokens, *memory, *row_norms) if x is not None]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not pieces or not recompute or not needs_grad or is_compiling():
        return _run(tokens, memory, row_norms, rule, pieces)
    out, *final = _RecomputedScan.apply(_Plan(rule, pieces), *tokens, *memory, *row_norms)
    return out, Memory(*final)


def _run(
    tokens: Tokens, memory: Memory, row_norms: tuple[Tensor, ...], rule: Rule, pieces: list[_Piece]
) -> tuple[Tensor, Memory]:
    """Piece after piece in plain differentiable algebra."""
    outputs = []
    for own, piece in zip(tokens.split([piece.size for piece in pieces]), pieces, strict=True):
        out, memory = _run_piece(own, memory, row_norms, rule, piece)
        outputs.append(out)
    return torch.cat(outputs, dim=1) if outputs else torch.zeros_like(tokens.v), memory


def _run_piece(
    tokens: Tokens, memory: Memory, row_norms: tuple[Tensor, ...], rule: Rule, piece: _Piece
) -> tuple[Tensor, Memory]:
    """One piece: read, add its steps to the pending ones, and apply them where the chunk is full."""
    acc = memory.weights.dtype
    q, k, v, rates = (x.to(acc).transpose(1, 2) for x in tokens[:4])  # (G, H, C, D, E or R)
    read, base = read_and_gradient_points(memory.weights, row_norms, rule, is_first=piece.chunk == 0)
    matrices = [Matrix(x) for x in rule.unpack(read)]
    out = read_net(rule.net, q, matrices, residual=rule.residual)  # (G, H, C, E)
    if base is not read:
        matrices = [Matrix(x) for x in rule.unpack(base)]
    steps = descend(rule.net, k, v, rates, matrices, residual=rule.residual, loss=rule.loss)
    momentum_sum = memory.momentum_sum
    if momentum_sum is not None:
        assert tokens.momentum is not None
        momentum_sum = momentum_sum + tokens.momentum.to(acc).sum(1)
    memory = Memory(memory.weights, memory.pending + pack(steps), memory.momentum, momentum_sum)
    if piece.completes:
        memory = complete_chunk(memory, base, row_norms, rule)
        if rule.bptt_chunks is not None and (piece.chunk + 1) % rule.bptt_chunks == 0:
            memory = memory.map(Tensor.detach)
    return out.transpose(1, 2).to(tokens.q.dtype), memory


class _Plan(NamedTuple):
    """What a scan with recomputation needs beside tensors."""

    rule: Rule
    pieces: list[_Piece]

    def segments(self, head_dim: int) -> list[list[_Piece]]:
        """Pieces between two kept states, about as many as make the memory of the backward pass small."""
        shapes = self.rule.shapes
        weights = sum(rows * columns for rows, columns in shapes)
        state = weights * (1 if self.rule.optimizer == "sgd" else 2)
        size = max(piece.size for piece in self.pieces)
        # what autograd holds of a chunk: some rows per token, some copies of the weights
        chunk = size * (4 * head_dim + 4 * sum(rows for rows, _ in shapes)) + 6 * weights
        if self.rule.optimizer == "muon":
            chunk += 4 * self.rule.ns_steps * weights
        length = max(1, round(math.sqrt(len(self.pieces) * state / chunk)))
        return [self.pieces[i : i + length] for i in range(0, len(self.pieces), length)]


class _RecomputedScan(torch.autograd.Function):
    """`_run` with a backward pass that runs the pieces again, a segment at a time."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        tokens, memory, row_norms = _take_apart(tensors)
        segments = plan.segments(tokens.q.shape[-1])
        kept: list[Tensor | None] = []
        outputs: list[Tensor] = []
        for own, segment in zip(tokens.split(_token_counts(segments)), segments, strict=True):
            if outputs:
                kept += [memory.weights, memory.momentum]
            out, memory = _run(own, memory, row_norms, plan.rule, segment)
            outputs.append(out)
        ctx.save_for_backward(*tensors, *kept)
        ctx.plan, ctx.num_inputs = plan, len(tensors)
        return (torch.cat(outputs, dim=1), *memory)

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, d_output: Tensor, *d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        tokens, first, row_norms = _take_apart(saved[: ctx.num_inputs])
        kept = saved[ctx.num_inputs :]
        segments = ctx.plan.segments(tokens.q.shape[-1])
        counts = _token_counts(segments)
        token_grads: list[list[Any]] = []
        norm_grads = [torch.zeros_like(x) for x in row_norms]
        d_memory = list(d_final)
        parts = list(zip(segments, tokens.split(counts), d_output.split(counts, dim=1), strict=True))
        for s, (segment, own, d_out) in reversed(list(enumerate(parts))):
            memory = first
            if s > 0:
                weights, momentum = kept[2 * s - 2 : 2 * s]
                sums = None if first.momentum_sum is None else torch.zeros_like(first.momentum_sum)
                memory = Memory(weights, torch.zeros_like(weights), momentum, sums)
            leaves = [None if x is None else x.detach().requires_grad_() for x in (*own, *memory, *row_norms)]
            with torch.enable_grad():
                out, final = _run(*_take_apart(leaves), ctx.plan.rule, segment)
            # detached or zeroed parts of the memory have nothing before them
            ends = [
                (x, grad)
                for x, grad in zip((out, *final), (d_out, *d_memory), strict=True)
                if x is not None and x.requires_grad
            ]
            wanted = [x for x in leaves if x is not None]
            found = torch.autograd.grad(
                [x for x, _ in ends], wanted, [grad for _, grad in ends], allow_unused=True
            )
            grads = iter(found)
            filled: list[Any] = [None if x is None else _or_zeros(next(grads), x) for x in leaves]
            token_grads.append(filled[:5])
            d_memory = filled[5:9]
            for total, grad in zip(norm_grads, filled[9:], strict=True):
                total += grad
        return None, *_join(token_grads[::-1], 1), *d_memory, *norm_grads


def _split(parts: Sequence[Tensor | None], sizes: Sequence[int], axis: int) -> list[tuple[Any, ...]]:
    """All parts cut in the same way; what is None stays None."""
    columns = [[None] * len(sizes) if x is None else x.split(list(sizes), axis) for x in parts]
    return list(zip(*columns, strict=True))


def _join(pieces: Sequence[Sequence[Any]], axis: int) -> list[Any]:
    """The inverse of `_split`."""
    return [None if column[0] is None else torch.cat(column, axis) for column in zip(*pieces, strict=True)]


def _take_apart(tensors: Sequence[Any]) -> tuple[Tokens, Memory, tuple[Tensor, ...]]:
    return Tokens(*tensors[:5]), Memory(*tensors[5:9]), tuple(tensors[9:])


def _token_counts(segments: list[list[_Piece]]) -> list[int]:
    return [sum(piece.size for piece in segment) for segment in segments]


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
