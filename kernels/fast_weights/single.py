"""One token per sequence: the step of decoding. Sequences may stand anywhere in their chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .chunked import Tokens
from .nets import add_steps, run_net
from .types import FastWeightState, Rule, pack_blocks
from .update import close_chunk, points

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
    chunks = [seen // rule.chunk_size for seen in num_seen]
    is_first = None
    if rule.fast_norm == "pre" and not all(chunks):  # a sequence in its first chunk has not stepped yet
        is_first = torch.tensor([chunk == 0 for chunk in chunks], device=q.device)
    blocks, lengths = rule.blocks(state.weights), rule.block_lengths(row_norms)
    scales, base = points(blocks, lengths, rule, is_first)
    out, pairs = run_net(
        rule.net, q, k, v, rates, blocks, scales, residual=rule.residual, loss=rule.loss
    )  # (N, H, 1, E)
    pending = pack_blocks(add_steps(pairs, rule.blocks(state.pending)))
    momentum_sum = state.momentum_sum
    if momentum_sum is not None:
        assert tokens.momentum is not None
        momentum_sum = momentum_sum + tokens.momentum.to(acc)[:, 0]
    after = FastWeightState(state.weights, pending, state.num_tokens + 1, state.momentum, momentum_sum)
    full = [n for n, seen in enumerate(num_seen) if (seen + 1) % rule.chunk_size == 0]
    if full:
        after = _closed(after, base, full, [chunks[n] for n in full], lengths, rule)
    return out.transpose(1, 2).to(tokens.q.dtype), after


def _closed(
    state: FastWeightState,
    base: list[Tensor] | None,
    rows: list[int],
    chunks: list[int],
    lengths: Sequence[Tensor],
    rule: Rule,
) -> FastWeightState:
    """Applies the pending steps of the sequences whose chunk is full."""
    index = torch.tensor(rows, device=state.weights.device)
    is_all = len(rows) == state.weights.shape[0]

    def own(x: Tensor) -> Tensor:
        return x if is_all else x[index]

    keep = momentum = None
    if state.momentum is not None:
        assert state.momentum_sum is not None
        keep, momentum = own(state.momentum_sum) / rule.chunk_size, rule.blocks(own(state.momentum))
    weights, moved = close_chunk(
        rule.blocks(own(state.weights)),
        None if base is None else [own(scale) for scale in base],
        rule.blocks(own(state.pending)),
        momentum,
        keep,
        lengths,
        rule,
    )
    if rule.bptt_chunks is not None:
        cut = torch.tensor([(chunk + 1) % rule.bptt_chunks == 0 for chunk in chunks], device=index.device)
        weights, moved = (
            [torch.where(cut.view(-1, 1, 1, 1, 1), x.detach(), x) for x in blocks]
            for blocks in (weights, moved)
        )

    def merged(old: Tensor | None, new: Tensor | None) -> Tensor | None:
        return new if is_all or old is None or new is None else old.index_copy(0, index, new)

    pending, sums = own(state.pending), state.momentum_sum
    after = merged(state.weights, pack_blocks(weights))
    nothing = merged(state.pending, torch.zeros_like(pending))
    assert after is not None
    assert nothing is not None
    return FastWeightState(
        after,
        nothing,
        state.num_tokens,
        merged(state.momentum, pack_blocks(moved) if moved else None),
        merged(sums, None if sums is None else torch.zeros_like(own(sums))),
    )
