"""What happens to the net when a chunk is full, with one pair of gates per chunk."""

import torch
from torch import Tensor

from ..fast_weights import newton_schulz
from .types import Rule, Tensors

# Dimensions: M some sequences, H heads

MUON_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),)
SMALLEST_NORM = 1e-7


def advance(
    weights: Tensors, momentum: Tensors, update: Tensors, logits: Tensor, rule: Rule
) -> tuple[Tensors, Tensors]:
    """Net and momentum after a chunk that writes `update`, with mean logits (M, H, 2) of its gates."""
    decay, keep = logits.sigmoid()[..., None, None].unbind(2)  # (M, H, 1, 1)
    if rule.max_grad_norm is not None:
        update = tuple(_drawn_in(u, rule.max_grad_norm) for u in update)
    if rule.use_momentum:
        momentum = tuple(keep * s + u for s, u in zip(momentum, update, strict=True))
        update = momentum
    if rule.orthogonalize:
        update = (update[0], *(orthogonal(u) for u in update[1:]))
    return tuple((1 - decay) * w + u for w, u in zip(weights, update, strict=True)), momentum


def orthogonal(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps of Muon."""
    return newton_schulz(matrices, 5, coefficients=MUON_COEFFICIENTS, eps=0.0, floor=SMALLEST_NORM)


def _drawn_in(update: Tensor, largest: float) -> Tensor:
    """The update with its norm n per head drawn in to largest * tanh(n / largest)."""
    norm = (update.square().sum((-2, -1), keepdim=True) + 1e-30).sqrt()
    return update * (largest * torch.tanh(norm / largest) / norm)
