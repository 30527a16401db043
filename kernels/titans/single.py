"""The neural memory of Titans for one token per sequence, for decoding."""

import torch
from torch import Tensor

from .nets import read, writes
from .types import Rule, Tensors, TitansState
from .update import advance

# Dimensions: N sequences, H heads, F head width


def titans_single(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, gates: Tensor, rule: Rule, state: TitansState
) -> tuple[Tensor, TitansState]:
    """`memzoo.kernels.titans` for T = 1 without packing; arguments are already checked."""
    acc = state.weights[0].dtype
    query, key, value = (x.to(acc).transpose(1, 2) for x in (q, k, v))  # (N, H, 1, F)
    found = writes(state.base, key, value, rule.loss_scale)
    sums = found.sums(rate.to(acc).transpose(1, 2)[..., None])
    ends = [n + 1 for n in state.position]
    is_full = _flags([n % rule.chunk_size == 0 for n in ends], q)
    position = tuple(n % rule.period for n in ends)
    if rule.per_token:
        decay, keep = gates.to(acc).transpose(1, 2)[..., None].sigmoid().unbind(-2)  # (N, H, 1, 1)
        update = tuple(-u for u in sums)
        momentum = state.momentum
        if rule.use_momentum:
            momentum = update = tuple(keep * s + u for s, u in zip(momentum, update, strict=True))
        weights = tuple((1 - decay) * w + u for w, u in zip(state.weights, update, strict=True))
        output = read(weights, query)
        base = _choose(is_full, weights, state.base)
        new = TitansState(weights, base, momentum, (), None, position)
    else:
        assert state.gates is not None
        pending = tuple(p - u for p, u in zip(state.pending, sums, strict=True))
        logits = state.gates + gates.to(acc).squeeze(1)
        weights, base, momentum = state.weights, state.base, state.momentum
        if any(n % rule.chunk_size == 0 for n in ends):
            closed, moved = advance(weights, momentum, pending, logits / rule.chunk_size, rule)
            weights, momentum = _choose(is_full, closed, weights), _choose(is_full, moved, momentum)
            pending = tuple(p.masked_fill(is_full, 0) for p in pending)
            logits = logits.masked_fill(is_full.squeeze(-1), 0)
            if rule.rebase_size is not None:
                is_moved = _flags([n % rule.rebase_size == 0 for n in ends], q)
                base = _choose(is_moved, weights, base)
        output = read(weights, query)
        new = TitansState(weights, base, momentum, pending, logits, position)
    return output.transpose(1, 2).to(q.dtype), new


def _flags(values: list[bool], like: Tensor) -> Tensor:
    """(N, 1, 1, 1) booleans."""
    return torch.tensor(values, device=like.device)[:, None, None, None]


def _choose(mask: Tensor, first: Tensors, second: Tensors) -> Tensors:
    return tuple(torch.where(mask, a, b) for a, b in zip(first, second, strict=True))
