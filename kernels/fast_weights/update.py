"""Where the net is read, where its gradient is taken, and how a complete chunk changes it.

With N(W) the rows of W brought to the lengths of the initial ones, and D the step (momentum, orthogonalised):

    fast_norm   after a chunk             read at    gradient at
    internal    W' = N(W) + D             W          N(W)
    post        W' = N(W + D)             W          W
    pre         W' = W + D                N(W)       N(W); W itself in the first chunk, before any step
    none        W' = W + D                W          W
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .newton_schulz import newton_schulz
from .types import Memory, Rule, pack

# Dimensions: N sequences, H heads, P numbers in all matrices of one head's net

NORM_EPS = 1e-5


def row_lengths(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Lengths (..., rows) of the rows of each matrix (..., rows, columns)."""
    return tuple(torch.linalg.vector_norm(matrix, dim=-1) for matrix in weights)


def row_scales(weights: Tensor, lengths: Sequence[Tensor], rule: Rule) -> list[Tensor]:
    """Factors (N, H, rows) that bring the rows of flat weights (N, H, P) to the given lengths (H, rows)."""
    found = row_lengths(rule.unpack(weights))
    return [wanted / (length + NORM_EPS) for wanted, length in zip(lengths, found, strict=True)]


def renormalise(weights: Tensor, lengths: Sequence[Tensor], rule: Rule) -> Tensor:
    """N(W) for flat weights (N, H, P)."""
    scales = row_scales(weights, lengths, rule)
    return pack([x * scale[..., None] for x, scale in zip(rule.unpack(weights), scales, strict=True)])


def read_and_gradient_points(
    weights: Tensor, lengths: Sequence[Tensor], rule: Rule, *, is_first: bool
) -> tuple[Tensor, Tensor]:
    """Flat weights at which a chunk is read, and at which its gradient is taken."""
    if rule.fast_norm == "internal":
        return weights, renormalise(weights, lengths, rule)
    if rule.fast_norm == "pre" and not is_first:
        normal = renormalise(weights, lengths, rule)
        return normal, normal
    return weights, weights


def complete_chunk(memory: Memory, base: Tensor, lengths: Sequence[Tensor], rule: Rule) -> Memory:
    """Applies the pending steps of a full chunk.

    Args:
        memory: with the steps and momenta of all its tokens.
        base: (N, H, P) where the gradient was taken.
        lengths: row lengths of the initial weights, one (H, rows) per matrix.
    """
    step = memory.pending
    if rule.max_grad_norm is not None:
        step = pack([_clip(matrix, rule.max_grad_norm) for matrix in rule.unpack(step)])
    momentum = None
    if memory.momentum is not None:
        assert memory.momentum_sum is not None
        momentum = (memory.momentum_sum / rule.chunk_size)[..., None] * memory.momentum + step
        step = momentum
    if rule.optimizer == "muon":
        step = pack([newton_schulz(x, rule.ns_steps, dtype=rule.ns_dtype) for x in rule.unpack(step)])
    weights = (base if rule.fast_norm == "internal" else memory.weights) + step
    if rule.fast_norm == "post":
        weights = renormalise(weights, lengths, rule)
    momentum_sum = None if memory.momentum_sum is None else torch.zeros_like(memory.momentum_sum)
    return Memory(weights, torch.zeros_like(memory.pending), momentum, momentum_sum)


def _clip(step: Tensor, limit: float) -> Tensor:
    """Steps (..., rows, columns) no longer than `limit`."""
    length = torch.linalg.vector_norm(step, dim=(-2, -1), keepdim=True)
    return step * (limit / length.clamp(min=limit))
