"""One token per sequence: the step of decoding. Sequences may stand anywhere in their chunks.

The renormalised net is never made: its row factors go on the products instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .chunked import Tokens
from .nets import Matrix, descend, read_net
from .types import FastWeightState, Memory, Rule, pack
from .update import complete_chunk, renormalise, row_scales

# Dimensions: N sequences, H heads, D width of keys, E width of values, R matrices, P numbers in all matrices


def fast_weight_scan_single(
    tokens: Tokens,
    row_norms: tuple[Tensor, ...],
    state: FastWeightState,
    rule: Rule,
    *,
    num_seen: Sequence[int],
) -> tuple[Tensor, FastWeightState]:
    """`memzoo.kernels.fast_weight_scan` for T = 1 without packing; arguments are already checked."""
    acc = state.weights.dtype
    q, k, v, rates = (x.to(acc).transpose(1, 2) for x in tokens[:4])  # (N, H, 1, D, E or R)
    weights, pending, num_tokens, momentum, momentum_sum = state
    matrices = rule.unpack(weights)
    plain = [Matrix(x) for x in matrices]
    chunks = [seen // rule.chunk_size for seen in num_seen]
    normalised = plain
    if rule.fast_norm == "internal" or (rule.fast_norm == "pre" and any(chunks)):
        scales = row_scales(weights, row_norms, rule)
        if rule.fast_norm == "pre" and not all(chunks):
            # a sequence in its first chunk has not stepped yet
            is_first = torch.tensor([chunk == 0 for chunk in chunks], device=weights.device)
            scales = [torch.where(is_first[:, None, None], torch.ones_like(x), x) for x in scales]
        normalised = [Matrix(x, scale) for x, scale in zip(matrices, scales, strict=True)]
    read = normalised if rule.fast_norm == "pre" else plain
    out = read_net(rule.net, q, read, residual=rule.residual)
    steps = descend(rule.net, k, v, rates, normalised, residual=rule.residual, loss=rule.loss)
    pending = pending + pack(steps)
    if momentum_sum is not None:
        assert tokens.momentum is not None
        momentum_sum = momentum_sum + tokens.momentum.to(acc)[:, 0]
    memory = Memory(weights, pending, momentum, momentum_sum)
    full = [n for n, seen in enumerate(num_seen) if (seen + 1) % rule.chunk_size == 0]
    if full:
        memory = _complete_rows(memory, full, [chunks[n] for n in full], row_norms, rule)
    after = FastWeightState(
        memory.weights, memory.pending, num_tokens + 1, memory.momentum, memory.momentum_sum
    )
    return out.transpose(1, 2).to(tokens.q.dtype), after


def _complete_rows(
    memory: Memory, rows: list[int], chunks: list[int], row_norms: tuple[Tensor, ...], rule: Rule
) -> Memory:
    """Applies the pending steps of the sequences whose chunk is full."""
    index = torch.tensor(rows, device=memory.weights.device)
    is_all = len(rows) == memory.weights.shape[0]
    own = memory if is_all else memory.map(lambda x: x[index])
    base = renormalise(own.weights, row_norms, rule) if rule.fast_norm == "internal" else own.weights
    done = complete_chunk(own, base, row_norms, rule)
    if rule.bptt_chunks is not None:
        cut = torch.tensor([(chunk + 1) % rule.bptt_chunks == 0 for chunk in chunks], device=index.device)
        done = done.map(lambda x: torch.where(cut.view(-1, *(1,) * (x.dim() - 1)), x.detach(), x))
    if is_all:
        return done
    pairs: list[tuple[Any, Any]] = list(zip(memory, done, strict=True))
    merged: list[Any] = [None if old is None else old.index_copy(0, index, new) for old, new in pairs]
    return Memory(*merged)
