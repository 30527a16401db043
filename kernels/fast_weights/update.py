"""Where the net is read, where its gradient is taken, and how a complete chunk changes it.

With N(W) the rows of W brought to the lengths of the initial ones, and D the step (momentum, orthogonalised):

    fast_norm   after a chunk             read at    gradient at
    internal    W' = N(W) + D             W          N(W)
    post        W' = N(W + D)             W          W
    pre         W' = W + D                N(W)       N(W); W itself in the first chunk, before any step
    none        W' = W + D                W          W

N(W) is never made where it is only read: its factors go on the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .nets import Scales
from .newton_schulz import newton_schulz
from .types import Rule

# Dimensions: N sequences, H heads, G matrices of a block, rows and columns of each

NORM_EPS = 1e-5


def row_lengths(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Lengths (..., rows) of the rows of matrices or blocks (..., rows, columns)."""
    return tuple(torch.linalg.vector_norm(matrix, dim=-1) for matrix in weights)


def row_scales(blocks: Sequence[Tensor], lengths: Sequence[Tensor]) -> list[Tensor]:
    """Factors (N, H, G, rows) that bring the rows of blocks (N, H, G, rows, columns) to given lengths."""
    found = row_lengths(blocks)
    return [wanted / (length + NORM_EPS) for wanted, length in zip(lengths, found, strict=True)]


def points(
    blocks: Sequence[Tensor], lengths: Sequence[Tensor], rule: Rule, is_first: Tensor | None
) -> tuple[list[Scales], list[Tensor] | None]:
    """Where a chunk is read and where its gradient is taken, as factors on rows.

    Args:
        blocks: weights, (N, H, G, rows, columns) each.
        lengths: row lengths of the initial weights, (H, G, rows) each.
        is_first: (N,) which sequences are in their first chunk; for "pre", None where none is.

    Returns:
        Factors for `run_net`, and those (N, H, G, rows) of the net that the step is added to, or None.
    """
    if rule.fast_norm in ("post", "none"):
        return [Scales(None, None)] * len(blocks), None
    scales = row_scales(blocks, lengths)
    flat = [scale.flatten(-2) for scale in scales]
    if rule.fast_norm == "internal":
        return [Scales(None, scale) for scale in flat], scales
    if is_first is not None:
        flat = [torch.where(is_first[:, None, None], torch.ones_like(scale), scale) for scale in flat]
    return [Scales(scale, scale) for scale in flat], None


def close_chunk(
    blocks: Sequence[Tensor],
    base: Sequence[Tensor] | None,
    total: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    keep: Tensor | None,
    lengths: Sequence[Tensor],
    rule: Rule,
) -> tuple[list[Tensor], list[Tensor]]:
    """Net and momentum after a full chunk.

    Args:
        blocks: weights, (N, H, G, rows, columns) each.
        base: factors of `points`.
        total: what the chunk writes, of the same shapes.
        momentum: of the same shapes, and None without.
        keep: (N, H), the share of it that stays.
        lengths: row lengths of the initial weights.

    Returns:
        The two, the second empty without momentum.
    """
    steps = list(total) if rule.max_grad_norm is None else clip(total, rule.max_grad_norm)
    if momentum is not None:
        assert keep is not None
        steps = [keep[..., None, None, None] * old + new for old, new in zip(momentum, steps, strict=True)]
    return move(blocks, base, steps, lengths, rule), [] if momentum is None else steps


def move(
    blocks: Sequence[Tensor],
    base: Sequence[Tensor] | None,
    steps: Sequence[Tensor],
    lengths: Sequence[Tensor],
    rule: Rule,
) -> list[Tensor]:
    """The net after steps: momentum, or what a chunk writes where there is none."""
    if rule.optimizer == "muon":
        steps = [newton_schulz(step, rule.ns_steps, dtype=rule.ns_dtype) for step in steps]
    if base is not None:
        return [
            torch.addcmul(step, block, scale[..., None])
            for block, scale, step in zip(blocks, base, steps, strict=True)
        ]
    moved = [block + step for block, step in zip(blocks, steps, strict=True)]
    if rule.fast_norm != "post":
        return moved
    scales = row_scales(moved, lengths)
    return [block * scale[..., None] for block, scale in zip(moved, scales, strict=True)]


def clip(steps: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Steps (..., rows, columns) no longer than `limit` each."""
    norms = [torch.linalg.vector_norm(step, dim=(-2, -1), keepdim=True) for step in steps]
    return [step * (limit / norm.clamp(min=limit)) for step, norm in zip(steps, norms, strict=True)]
