"""Test-time training of one token per sequence: the primal form in closed form, for decoding."""

import torch
from torch import Tensor

from .nets import Norm, activate, writes
from .types import TTTState

# Dimensions: N sequences, H heads, C tokens of a mini-batch, F head width


def ttt_single(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, reader_rate: Tensor, norm: Norm, state: TTTState
) -> tuple[Tensor, TTTState]:
    """`memzoo.kernels.ttt` for T = 1 without packing; arguments are already checked."""
    weights, size = state.weights, len(reader_rate)
    acc = weights[0].dtype
    query, key, value = (x.to(acc).transpose(1, 2) for x in (q, k, v))  # (N, H, 1, F)
    found = writes(weights, key, value, norm)
    sums = found.sums(rate.to(acc).transpose(1, 2)[..., None])
    pending = tuple(p + s for p, s in zip(state.pending, sums, strict=True))
    reader_rate = reader_rate.to(acc)
    places = state.position
    index = list(places) if len(set(places)) > 1 else places[:1]
    read = reader_rate[torch.tensor(index, device=q.device)][:, None, None, None]
    x = query
    for i in range(0, len(weights), 2):
        x = activate(x) if i else x
        x = x @ weights[i] + weights[i + 1] - read * (x @ pending[i] + pending[i + 1])
    output = query + norm.apply(x)
    if size - 1 in places:
        closed = torch.tensor([place == size - 1 for place in places], device=q.device)[:, None, None, None]
        weights = tuple(
            torch.where(closed, w - reader_rate[-1] * p, w) for w, p in zip(weights, pending, strict=True)
        )
        pending = tuple(p.masked_fill(closed, 0) for p in pending)
    return output.transpose(1, 2).to(q.dtype), TTTState(
        weights, pending, tuple((place + 1) % size for place in places)
    )
