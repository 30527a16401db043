"""Test-time training mini-batch by mini-batch, in the dual form (Sun et al., arXiv 2407.04620, section 2.5).

All gradients of a mini-batch are taken at its start, so that its tokens are handled by matmuls and no weights
per token are made. With X the inputs of a linear map (the keys) for the writers, G the gradients of its
outputs, x its inputs for the readers, (W, b) its weights at the start, r_i = reader_rate_i and

    A_ij = rate_j (1 + x_i . X_j) for j <= i
    z_i  = x_i W + b - r_i sum_j A_ij G_j

A mini-batch may be open when a call begins or ends. Because rates are a reader's factor times a writer's, the
tokens of earlier calls count through two sums alone, P = sum_j rate_j X_j^T G_j and p = sum_j rate_j G_j,
which add x_i P + p to the sum above.

The backward pass runs mini-batches again (`memzoo.kernels.grid_scan`).
"""

from functools import partial

import torch
from torch import Tensor

from ..grid_scan import scan_grid
from ..recompute import Tensors
from .nets import Norm, activate, writes
from .types import TTTState

# Dimensions: M some sequences, H heads, C tokens of a mini-batch, F head width


def ttt_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    reader_rate: Tensor,
    norm: Norm,
    lengths: tuple[int, ...],
    state: TTTState,
) -> tuple[Tensor, TTTState]:
    """Dual form of `memzoo.kernels.ttt`; arguments are already checked."""
    acc, num_parts = state.weights[0].dtype, len(state.weights)
    if not sum(lengths):
        return torch.zeros_like(q), state
    # tokens that are missing in a mini-batch have rate 0: they write nothing
    tokens = tuple(x.flatten(0, 1) for x in (q, k, v, rate.to(acc)))
    output, found = scan_grid(
        partial(_part, norm.eps),
        partial(_whole, norm.eps),
        (*state.weights, *state.pending),
        tokens,
        (reader_rate.to(acc)[:, None], norm.weight, norm.bias),
        lengths,
        state.position,
        len(reader_rate),
        num_lasting=num_parts,
    )
    ends = zip(state.position, lengths, strict=True)
    position = tuple((place + length) % len(reader_rate) for place, length in ends)
    output = output.reshape(q.shape).to(q.dtype)
    return output, TTTState(found[:num_parts], found[num_parts:], position)


def _mini_batch(
    start: Tensors, pieces: Tensors, constants: Tensors, eps: float, pending: Tensors | None = None
) -> tuple[Tensor, Tensors]:
    """Outputs (M, C, H, F) of one mini-batch per sequence, and the sums that its tokens (and those pending)
    write.

    Args:
        start: fast weights (M, H, ...) at its start.
        pieces: q, k, v (M, C, H, F) and rate (M, C, H).
        constants: reader rates (C, 1), weight and bias of the norm (H, 1, F).
        pending: sums of the tokens of this mini-batch that earlier calls have read.
    """
    reader_rate, norm = constants[0], Norm(constants[1], constants[2], eps)
    *tokens, rate = pieces
    q, k, v = (x.transpose(1, 2).to(rate.dtype) for x in tokens)  # (M, H, C, F)
    rate = rate.transpose(1, 2)  # (M, H, C)
    found = writes(start, k, v, norm)
    x = q
    for index, (inputs, gradients) in enumerate(zip(found.inputs, found.gradients, strict=True)):
        x = activate(x) if index else x
        scores = ((x @ inputs.mT + 1) * rate[..., None, :]).tril()  # (M, H, C, C)
        moved = scores @ gradients
        if pending is not None:
            moved = moved + x @ pending[2 * index] + pending[2 * index + 1]
        x = x @ start[2 * index] + start[2 * index + 1] - reader_rate * moved
    sums = found.sums(rate[..., None])
    if pending is not None:
        sums = tuple(p + s for p, s in zip(pending, sums, strict=True))
    return (q + norm.apply(x)).transpose(1, 2), sums


def _whole(eps: float, carried: Tensors, pieces: Tensors, constants: Tensors) -> tuple[Tensor, Tensors]:
    """A step over a mini-batch that no other call has read from: nothing is pending before or behind it."""
    output, total = _mini_batch(carried, pieces, constants, eps)
    return output, _close(carried, total, constants)


def _part(eps: float, carried: Tensors, pieces: Tensors, constants: Tensors) -> tuple[Tensor, Tensors]:
    """A step over a mini-batch with tokens missing: what is carried on if it is full now, and if not."""
    start, pending = carried[: len(carried) // 2], carried[len(carried) // 2 :]
    output, total = _mini_batch(start, pieces, constants, eps, pending)
    nothing = (torch.zeros_like(x) for x in total)
    return output, (*_close(start, total, constants), *nothing, *start, *total)


def _close(start: Tensors, total: Tensors, constants: Tensors) -> Tensors:
    """Fast weights after a whole mini-batch that writes `total`."""
    return tuple(w - constants[0][-1] * t for w, t in zip(start, total, strict=True))
