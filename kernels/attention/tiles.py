"""How a call of softmax attention is cut into tiles.

A *tile* is one block of queries and one contiguous range of key slots (plus the sink slots in front of it).
Every form of the call (window or not, sinks, carried prefix, packed rows) becomes a list of tiles of plain
integers, so empty slots are never touched and no position tensor is needed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .types import KVPrefix

# Dimensions: B batch, T tokens, N sequences, P prefix slots, S key slots, R rows of heads (B * Hkv), C
# queries of a tile, J keys of a tile


class Segment(NamedTuple):
    """One sequence (or all equal rows of a dense batch): where its queries and keys lie."""

    rows: int  # rows of heads that share this geometry
    q_start: int
    length: int
    key_start: int
    num_sinks: int  # sink slots in front that the rest of the key slots do not hold
    first_position: int  # position of the first slot behind those
    num_seen: int


class Tile(NamedTuple):
    """Queries q0..q1 against sink slots s0..s0+num_sinks and key slots k0..k1, on rows r0..r1 of heads."""

    r0: int
    r1: int
    q0: int
    q1: int
    s0: int
    num_sinks: int
    k0: int
    k1: int
    offset: int  # position of the first query minus position of key slot k0
    num_kept: int  # leading key slots that are sinks: never too old

    def columns(self, x: Tensor) -> Tensor:
        """The keys (or values) of this tile: (R, S, D) -> (r1 - r0, J, D)."""
        if self.num_sinks == 0 or self.s0 + self.num_sinks == self.k0:
            return x[self.r0 : self.r1, self.k0 - self.num_sinks : self.k1]
        sinks = x[self.r0 : self.r1, self.s0 : self.s0 + self.num_sinks]
        return torch.cat([sinks, x[self.r0 : self.r1, self.k0 : self.k1]], dim=1)


def _past_slots(prefix: KVPrefix | None, num_seen: int, num_sinks: int) -> tuple[int, int]:
    """Sink slots whose positions the prefix slots do not hold, and filled prefix slots: how many."""
    if prefix is None:
        return 0, 0
    num_filled = min(prefix.k.shape[1], num_seen)
    sink_slots = 0 if prefix.sink_k is None else prefix.sink_k.shape[1]
    return min(sink_slots, num_sinks, num_seen - num_filled), num_filled


def lay_out_dense(
    k: Tensor, v: Tensor, num_seen: int, num_sinks: int, prefix: KVPrefix | None
) -> tuple[Tensor, Tensor, list[Segment]]:
    """Key slots (B, S, Hkv, D) of a batch whose rows have all read `num_seen` tokens."""
    rows = k.shape[0] * k.shape[2]
    if prefix is None:
        return k, v, [Segment(rows, 0, k.shape[1], 0, 0, 0, 0)]
    num_extra, num_filled = _past_slots(prefix, num_seen, num_sinks)
    first_slot = prefix.k.shape[1] - num_filled
    key_parts, value_parts = [prefix.k[:, first_slot:], k], [prefix.v[:, first_slot:], v]
    if num_extra and prefix.sink_k is not None and prefix.sink_v is not None:
        key_parts.insert(0, prefix.sink_k[:, :num_extra])
        value_parts.insert(0, prefix.sink_v[:, :num_extra])
    segment = Segment(rows, 0, k.shape[1], 0, num_extra, num_seen - num_filled, num_seen)
    return torch.cat(key_parts, 1), torch.cat(value_parts, 1), [segment]


def lay_out_ragged(
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    seen: list[int],
    num_sinks: int,
    prefix: KVPrefix | None,
) -> tuple[Tensor, Tensor, list[Segment]]:
    """Key slots (1, S, Hkv, D) of sequences one after the other, each: sinks, filled prefix, own tokens."""
    num_sequences, rows = len(lengths), k.shape[2]
    num_slots = 0 if prefix is None else prefix.k.shape[1]
    max_sinks = 0 if prefix is None or prefix.sink_k is None else prefix.sink_k.shape[1]
    own_start, segments, pieces = 0, [], []
    key_start = 0
    for n, (length, num_seen) in enumerate(zip(lengths, seen, strict=True)):
        num_extra, num_filled = _past_slots(prefix, num_seen, num_sinks)
        if length:
            segments.append(
                Segment(rows, own_start, length, key_start, num_extra, num_seen - num_filled, num_seen)
            )
            if prefix is not None:
                past_end = num_sequences * max_sinks + (n + 1) * num_slots
                pieces.append(torch.arange(num_extra) + n * max_sinks)
                pieces.append(torch.arange(past_end - num_filled, past_end))
                own = num_sequences * (max_sinks + num_slots) + own_start
                pieces.append(torch.arange(own, own + length))
            key_start += num_extra + num_filled + length
        own_start += length
    if prefix is None:
        return k, v, segments
    index = torch.cat(pieces or [torch.zeros(0, dtype=torch.int64)]).to(k.device)

    def gather(sinks: Tensor | None, past: Tensor, own: Tensor) -> Tensor:
        parts = (
            [past.flatten(0, 1), own[0]]
            if sinks is None
            else [sinks.flatten(0, 1), past.flatten(0, 1), own[0]]
        )
        return torch.cat(parts).index_select(0, index)[None]

    return gather(prefix.sink_k, prefix.k, k), gather(prefix.sink_v, prefix.v, v), segments


def tile_limits(window_size: int | None, on_cpu: bool) -> tuple[int, int]:
    """Queries and scores of a tile.

    Few queries waste little outside the window, many make fast matmuls; on the CPU (measured) the scores also
    have to stay in the cache, elsewhere a tile should be worth its launches.
    """
    if on_cpu:
        return (256 if window_size is None else 64 if window_size <= 256 else 128), 1 << 20
    return (1024 if window_size is None else 256 if window_size <= 256 else 512), 1 << 26


def make_tiles(
    segments: list[Segment],
    num_groups: int,
    window_size: int | None,
    window_grid: int | None,
    num_sinks: int,
    limits: tuple[int, int],
) -> tuple[Tile, ...]:
    """All tiles of a call; `limits` are those of `tile_limits`."""
    tiles = []
    block, max_scores = limits
    for segment in segments:
        for t0, t1 in _cut_queries(segment, block, window_grid):
            start = segment.first_position
            if window_size is not None:
                oldest = segment.num_seen + t0
                if window_grid is not None:
                    oldest = (oldest // window_grid + 1) * window_grid - 1
                start = max(start, oldest - window_size + 1)
            num_cols = segment.num_sinks + max(0, min(num_sinks, start) - segment.first_position)
            slot_of_zero = segment.key_start + segment.num_sinks - segment.first_position
            k0, k1 = slot_of_zero + start, slot_of_zero + segment.num_seen + t1
            area = num_groups * (t1 - t0) * (num_cols + k1 - k0)
            rows = max(1, max_scores // area)
            for r0 in range(0, segment.rows, rows):
                tiles.append(
                    Tile(
                        r0=r0,
                        r1=min(r0 + rows, segment.rows),
                        q0=segment.q_start + t0,
                        q1=segment.q_start + t1,
                        s0=segment.key_start,
                        num_sinks=num_cols,
                        k0=k0,
                        k1=k1,
                        offset=segment.num_seen + t0 - start,
                        num_kept=max(0, num_sinks - start),
                    )
                )
    return tuple(tiles)


def _cut_queries(segment: Segment, block: int, window_grid: int | None) -> list[tuple[int, int]]:
    """First and last (exclusive) query of each tile: at most `block`, none across a line of the grid."""
    cuts, t0 = [], 0
    while t0 < segment.length:
        t1 = min(t0 + block, segment.length)
        if window_grid is not None:
            t1 = min(t1, ((segment.num_seen + t0) // window_grid + 1) * window_grid - segment.num_seen)
        cuts.append((t0, t1))
        t0 = t1
    return cuts


class Masks:
    """Additive masks of tiles, only for the columns that some query must not see; made once per geometry."""

    def __init__(self, window_size: int | None, like: Tensor):
        self.window_size = window_size
        self.like = like
        self.made: dict[tuple[int, ...], list[tuple[int, int, Tensor]]] = {}

    def add_to(self, scores: Tensor, tile: Tile) -> None:
        """Set the hidden entries of scores (R, G, C, J) to -inf, in place."""
        num_queries, num_keys = tile.q1 - tile.q0, tile.k1 - tile.k0
        key = (num_queries, num_keys, tile.offset, tile.num_kept)
        if key not in self.made:
            self.made[key] = self._make(*key)
        for first, last, mask in self.made[key]:
            scores[..., tile.num_sinks + first : tile.num_sinks + last].add_(mask)

    def _make(
        self, num_queries: int, num_keys: int, offset: int, num_kept: int
    ) -> list[tuple[int, int, Tensor]]:
        # Query a and key slot b are offset + a - b tokens apart.
        device = self.like.device
        query = torch.arange(num_queries, device=device)[:, None] + offset
        zero = self.like.new_zeros(())
        patches = []
        if num_keys > offset + 1:
            slot = torch.arange(offset + 1, num_keys, device=device)
            patches.append((offset + 1, num_keys, zero.masked_fill(slot > query, float("-inf"))))
        if self.window_size is not None and offset + num_queries - self.window_size > num_kept:
            last = offset + num_queries - self.window_size
            slot = torch.arange(num_kept, last, device=device)
            patches.append(
                (num_kept, last, zero.masked_fill(query - slot >= self.window_size, float("-inf")))
            )
        return patches


def add_columns(total: Tensor, tile: Tile, part: Tensor) -> None:
    """Add a tile's gradient (r1 - r0, J, D) to the key slots (R, S, D) it came from."""
    total[tile.r0 : tile.r1, tile.s0 : tile.s0 + tile.num_sinks] += part[:, : tile.num_sinks]
    total[tile.r0 : tile.r1, tile.k0 : tile.k1] += part[:, tile.num_sinks :]
