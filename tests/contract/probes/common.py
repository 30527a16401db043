"""Small tools of the probes: plain loops over sequences, nothing clever."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Dimensions: N sequences, R slots of a ring, T tokens of one sequence


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which accumulation happens."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_tokens(batch_size: int) -> Tensor:
    """(N,) int64 zeros on the CPU."""
    return torch.zeros(batch_size, dtype=torch.int64)


def draw(linears: list[nn.Linear]) -> None:
    """Initialises linear maps; small biases."""
    for linear in linears:
        nn.init.normal_(linear.weight, std=0.2)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def ring_past(ring: Tensor, num_seen: int) -> Tensor:
    """What a ring (R, ...) holds, oldest first: the last min(num_seen, R) tokens."""
    held = min(num_seen, ring.shape[0])
    slots = torch.arange(num_seen - held, num_seen) % ring.shape[0]
    return ring[slots.to(ring.device)]


def ring_after(history: Tensor, size: int, num_seen: int) -> Tensor:
    """A ring (size, ...) after `num_seen` tokens, of which `history` holds the last ones, oldest first."""
    held = min(num_seen, size)
    slots = torch.arange(num_seen - held, num_seen) % size
    ring = history.new_zeros(size, *history.shape[1:])
    return ring.index_copy(0, slots.to(history.device), history[history.shape[0] - held :])


def stack_padded(rows: list[Tensor], slots: int | None = None) -> Tensor:
    """Stacks (slots_i, ...) tensors; the missing slots at the end of each are zeros."""
    longest = max([row.shape[0] for row in rows], default=0) if slots is None else slots
    return torch.stack(
        [torch.cat([row, row.new_zeros(longest - row.shape[0], *row.shape[1:])]) for row in rows]
    )


def softmax_read(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of queries (T, H, D) over slots (S, G, D), one softmax; `allowed` (T, S) or (H, T, S).

    `bias` (H, T, S) is added to the scaled logits. A query that may see nothing reads zeros.
    """
    wide, group = wide_dtype(q.dtype), q.shape[1] // k.shape[1]
    if k.shape[0] == 0:
        return torch.zeros_like(q[..., : v.shape[-1]])
    queries = q.transpose(0, 1).to(wide)  # (H, T, D)
    keys = k.repeat_interleave(group, dim=1).permute(1, 2, 0).to(wide)  # (H, D, S)
    values = v.repeat_interleave(group, dim=1).transpose(0, 1).to(wide)  # (H, S, D)
    logits = (queries @ keys).to(wide) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~allowed, -torch.inf)
    top = logits.amax(-1, keepdim=True).detach().clamp(min=torch.finfo(wide).min)
    weights = (logits - top).exp()  # (H, T, S)
    total = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    return (weights / total @ values).transpose(0, 1).to(q.dtype)
