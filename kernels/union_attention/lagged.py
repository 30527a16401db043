"""Window attention over keys that are at least some tokens old: the fading stream of B'MOJO.

It is window attention of the queries over keys moved back by the lag; queries that are too early for any key
are left out.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..attention import KVPrefix, attention
from ..layout import sequence_lengths
from .types import UnionOutput

# Dimensions: B batch, T tokens, N sequences, P prefix slots, L tokens of all sequences, H query heads, G
# key/value heads, D key width, E value width


def lagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lag: int,
    window_size: int,
    prefix: KVPrefix | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> UnionOutput:
    """Softmax attention in which the query at position i sees keys i - lag - window_size < j <= i - lag.

    Args:
        q: (B, T, H, D); T = 0 is allowed.
        k: (B, T, G, D), H a multiple of G.
        v: (B, T, G, E).
        lag: tokens between a query and the newest key it sees, at least 0.
        window_size: number of visible keys, at least 1.
        prefix: keys and values of the past, the last lag + window_size - 1 tokens at least; see `attention`.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1).
        scale: factor on the logits, default D ** -0.5.
        backend: as in `attention`.

    Returns:
        output (B, T, H, E) and lse (B, T, H), 0 and -inf for the first `lag` positions of a sequence.

    Raises:
        ValueError: a negative lag, a prefix that is too short, and whatever `attention` refuses.
    """
    if lag < 0:
        raise ValueError(f"lag must not be negative, got {lag}.")
    batch_size, num_tokens = q.shape[:2]
    lengths = sequence_lengths(cu_seqlens, batch_size, num_tokens)
    seen = [0] * len(lengths) if prefix is None else prefix.num_seen.tolist()
    slots = 0 if prefix is None else prefix.k.shape[1]
    if any(min(count, lag + window_size - 1) > slots for count in seen):
        raise ValueError(
            f"keys {lag} to {lag + window_size - 1} tokens old are visible, but the prefix has {slots} "
            f"slots. Carry {lag + window_size - 1} tokens."
        )
    # queries of each sequence that come before its first visible key
    early = [min(max(lag - count, 0), length) for count, length in zip(seen, lengths, strict=True)]
    kept = [length - skipped for length, skipped in zip(lengths, early, strict=True)]
    options = {"window_size": window_size, "scale": scale, "return_stats": True, "backend": backend}
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (*q.shape[:3], v.shape[-1])
    if not any(kept):
        return UnionOutput(q.new_zeros(shape), q.new_full(shape[:3], -torch.inf, dtype=wide))
    if prefix is not None:
        k, v = k.to(prefix.k.dtype), v.to(prefix.v.dtype)
    if cu_seqlens is None and len(set(seen)) == 1:
        keys, values = (
            (k, v) if prefix is None else (torch.cat([prefix.k, k], 1), torch.cat([prefix.v, v], 1))
        )
        start, skipped = slots - lag + early[0], early[0]
        first, end = max(0, start - window_size), slots - lag + num_tokens
        num_seen = seen[0] + skipped - lag
        past = KVPrefix(keys[:, first:start], values[:, first:start], torch.tensor([num_seen] * len(seen)))
        out = attention(
            q[:, skipped:],
            keys[:, start:end],
            values[:, start:end],
            prefix=past if num_seen else None,
            **options,  # type: ignore[arg-type]
        )
        assert out.lse is not None
        blank = q.new_full((batch_size, skipped, q.shape[2]), -torch.inf, dtype=wide)
        return UnionOutput(
            torch.cat([q.new_zeros(batch_size, skipped, *shape[2:]), out.output], 1),
            torch.cat([blank, out.lse], 1),
        )
    return _ragged(q, k, v, lengths, seen, early, lag, prefix, options)


def _ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    seen: list[int],
    early: list[int],
    lag: int,
    prefix: KVPrefix | None,
    options: Mapping[str, object],
) -> UnionOutput:
    """`lagged_attention` of sequences that have read unequal numbers of tokens, or lie in one packed row."""
    slots = 0 if prefix is None else prefix.k.shape[1]
    window_size = options["window_size"]
    assert isinstance(window_size, int)
    queries, own, past, bounds, offset = [], [], [], [0], 0
    for n, (length, skipped) in enumerate(zip(lengths, early, strict=True)):
        # place in [prefix | tokens of the call] of every position from the oldest in the prefix on
        places = torch.cat(
            [
                torch.arange(n * slots, (n + 1) * slots),
                torch.arange(offset, offset + length) + len(seen) * slots,
            ]
        )
        start = slots - lag + skipped  # slot of the newest key of the first query that is kept
        queries.append(torch.arange(offset + skipped, offset + length))
        own.append(places[max(start, 0) : max(start, 0) + length - skipped])
        window = torch.zeros(window_size, dtype=torch.int64)
        held = places[max(0, start - window_size) : max(start, 0)]
        window[window_size - len(held) :] = held
        past.append(window)
        bounds.append(bounds[-1] + length - skipped)
        offset += length
    pool_k, pool_v = k.flatten(0, 1), v.flatten(0, 1)
    if prefix is not None:
        pool_k = torch.cat([prefix.k.flatten(0, 1), pool_k])
        pool_v = torch.cat([prefix.v.flatten(0, 1), pool_v])
    at, where, old = (x.to(q.device) for x in (torch.cat(queries), torch.cat(own), torch.stack(past)))
    num_seen = [max(0, count + skipped - lag) for count, skipped in zip(seen, early, strict=True)]
    out = attention(
        q.flatten(0, 1)[at][None],
        pool_k[where][None],
        pool_v[where][None],
        prefix=KVPrefix(pool_k[old], pool_v[old], torch.tensor(num_seen)) if any(num_seen) else None,
        cu_seqlens=torch.tensor(bounds),
        **options,  # type: ignore[arg-type]
    )
    assert out.lse is not None
    output = q.new_zeros(q.shape[0] * q.shape[1], q.shape[2], v.shape[-1]).index_copy(0, at, out.output[0])
    lse = out.lse.new_full((q.shape[0] * q.shape[1], q.shape[2]), -torch.inf).index_copy(0, at, out.lse[0])
    return UnionOutput(output.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2]))
