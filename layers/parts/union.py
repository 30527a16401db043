"""Three memories under one softmax: a window, a fading stream behind it, and a store (B'MOJO).

Each may be read alone and the results weighted by their log-sum-exp ("merged"), or all in one softmax over
their slots ("concatenated"). A single token reads the rings and the store as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import (
    KVPrefix,
    SlotStream,
    attention,
    lagged_attention,
    merge_streams,
    union_attention,
)
from ..contract import SequenceContext, is_probing, record
from .eidetic import EideticStoreState, Stored
from .kv_cache import WindowCache
from .tiles import Tiles, pool

# Dimensions: B batch, T tokens, N sequences, H query heads, G key/value heads, D head width, R slots of a
# ring, S slots of the store


@dataclass(frozen=True)
class Reach:
    """What a query at position i sees.

    Attributes:
        window_size: W, tokens i - W < j <= i.
        fading_size: fading tokens.
        on_grid: these are the last ones before the chunk of W tokens that holds i; else the last ones behind
            the window.
    """

    window_size: int
    fading_size: int
    on_grid: bool


@dataclass
class Streams:
    """Queries, keys and values of the tokens of one call, normed and rotated.

    Attributes:
        ctx: the call.
        q, k, v: of the window (B, T, H or G, D).
        fading_q, fading_k, fading_v: of the fading stream; None without one.
        stored_q, stored_k: queries for the store, and keys as they are stored; None without one.
        window_prefix, image_prefix: what the rings hold of the past; None without a state.
    """

    ctx: SequenceContext
    q: Tensor
    k: Tensor
    v: Tensor
    fading_q: Tensor | None = None
    fading_k: Tensor | None = None
    fading_v: Tensor | None = None
    stored_q: Tensor | None = None
    stored_k: Tensor | None = None
    window_prefix: KVPrefix | None = None
    image_prefix: KVPrefix | None = None


def read_merged(streams: Streams, reach: Reach, tiles: Tiles, found: Stored | None) -> Tensor:
    """Outputs of the heads (B, T, H, D), each memory by itself; records the share of each.

    Args:
        tiles: the chunks of the call, those of the store.
        found: what they find in the store; None for no store.
    """
    ctx, parts = streams.ctx, {}
    if reach.window_size:
        out = attention(
            streams.q,
            streams.k,
            streams.v,
            window_size=reach.window_size,
            prefix=streams.window_prefix,
            cu_seqlens=ctx.cu_seqlens,
            return_stats=True,
        )
        assert out.lse is not None
        parts["window_mass"] = (out.output, out.lse)
    # memories that no token of the call reaches are left out
    last = max([start + length for start, length in zip(ctx.starts, ctx.lengths, strict=True)], default=0)
    if streams.fading_q is not None and last > reach.window_size:
        parts["fading_mass"] = _read_fading(streams, reach, tiles)
    if found is not None and found.index.shape[2]:
        assert streams.stored_q is not None
        output, lse = union_attention([found.stream(tiles.cut(streams.stored_q), tiles)])
        parts["eidetic_mass"] = (tiles.join(output, streams.q), tiles.join(lse, streams.q))
    if not parts:
        return torch.zeros_like(streams.q)
    if len(parts) == 1:
        return next(iter(parts.values()))[0]
    merged, weights = merge_streams(list(parts.values()))
    if is_probing():
        for name, weight in zip(parts, weights.unbind(0), strict=True):
            record(name, weight)
    return merged.output


def read_concatenated(streams: Streams, reach: Reach, tiles: Tiles, found: Stored | None) -> Tensor:
    """Outputs of the heads (B, T, H, D), one softmax over the slots of all; arguments as `read_merged`."""
    parts = []
    if reach.window_size:
        key, value, ring = _pools(streams.window_prefix, streams.k, streams.v)
        q = tiles.cut(streams.q)
        parts.append(tiles.band(q, key, value, ring, lag=0, window_size=reach.window_size))
    if streams.fading_q is not None:
        parts.append(_fading_stream(streams, reach, tiles))
    if found is not None:
        assert streams.stored_q is not None
        parts.append(found.stream(tiles.cut(streams.stored_q), tiles))
    if not parts:
        return torch.zeros_like(streams.q)
    return tiles.join(union_attention(parts).output, streams.q)


def read_rings(
    streams: Streams,
    reach: Reach,
    window: WindowCache | None,
    images: WindowCache | None,
    store: EideticStoreState | None,
) -> Tensor:
    """Outputs of the heads (N, 1, H, D) for one token of every sequence.

    Args:
        window, images, store: the memories with this token in them; None for one that is not to be read.
    """
    position, parts = streams.ctx.num_seen[:, None], []
    if window is not None and reach.window_size:
        parts.append(_ring_stream(streams.q, window, position, reach.window_size))
    if images is not None and streams.fading_q is not None:
        newest = position - reach.window_size
        if reach.on_grid:
            newest = position // reach.window_size * reach.window_size - 1
        parts.append(_ring_stream(streams.fading_q, images, position, reach.fading_size, newest))
    if store is not None and streams.stored_q is not None:
        q, hidden = streams.stored_q, (store.order == 0).long()
        parts.append(SlotStream(q, store.key.to(q.dtype), store.value.to(q.dtype), first=hidden))
    return union_attention(parts).output if parts else torch.zeros_like(streams.q)


def _read_fading(streams: Streams, reach: Reach, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, D) and log-sum-exp (B, T, H) of the fading stream alone."""
    if reach.on_grid:
        output, lse = union_attention([_fading_stream(streams, reach, tiles)])
        return tiles.join(output, streams.q), tiles.join(lse, streams.q)
    assert streams.fading_q is not None
    assert streams.fading_k is not None
    assert streams.fading_v is not None
    return lagged_attention(
        streams.fading_q,
        streams.fading_k,
        streams.fading_v,
        lag=reach.window_size,
        window_size=reach.fading_size,
        prefix=streams.image_prefix,
        cu_seqlens=streams.ctx.cu_seqlens,
    )


def _fading_stream(streams: Streams, reach: Reach, tiles: Tiles) -> SlotStream:
    """The fading stream as slots of the queries of each chunk."""
    assert streams.fading_q is not None
    assert streams.fading_k is not None
    assert streams.fading_v is not None
    key, value, ring = _pools(streams.image_prefix, streams.fading_k, streams.fading_v)
    q = tiles.cut(streams.fading_q)
    if not reach.on_grid:
        return tiles.band(q, key, value, ring, lag=reach.window_size, window_size=reach.fading_size)
    before = tiles.boundaries[..., None] + torch.arange(-reach.fading_size, 0)
    return SlotStream(q, key, value, tiles.of_tiles(tiles.places(before, ring)).to(q.device))


def _pools(prefix: KVPrefix | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Pools of keys and values, and the slots of a ring in them."""
    if prefix is None:
        return pool(None, key), pool(None, value), 0
    return pool(prefix.k, key), pool(prefix.v, value), prefix.k.shape[1]


def _ring_stream(
    q: Tensor, ring: WindowCache, position: Tensor, size: int, newest: Tensor | None = None
) -> SlotStream:
    """The last `size` positions up to `newest` (N, 1) of a ring that ends at `position`, the default."""
    newest = position if newest is None else newest
    held = position - (position - torch.arange(ring.key.shape[1])) % ring.key.shape[1]  # (N, R)
    is_seen = (held >= 0) & (held <= newest) & (held > newest - size)
    hidden = None if bool(is_seen.all()) else (~is_seen).long().to(q.device)
    return SlotStream(q, ring.key.to(q.dtype), ring.value.to(q.dtype), first=hidden)
