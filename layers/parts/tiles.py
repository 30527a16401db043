"""Chunks of queries on the token grid, and where the keys they look at lie.

A *pool* holds what a ring kept of the past, row after row, and then the tokens of the call:
[N rings of R slots | L tokens]. Chunks begin at multiples of C in their own sequence, wherever a call begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import ChunkLayout, SlotStream
from ..contract import SequenceContext

# Dimensions: B batch, T tokens, N sequences, L tokens of all sequences, K tiles (chunks of all sequences), U
# chunks of the longest sequence, C chunk, R slots of a ring, J slots of a tile, H query heads, G key/value
# heads, D head width


@dataclass(frozen=True)
class Tiles:
    """The chunks of one call.

    Attributes:
        ctx: the call.
        chunk_size: C.
        layout: where the tokens of the call lie on the grid.
        boundaries: (N, U) on the CPU, position at which each chunk begins, the one that the call cuts
            included.
    """

    ctx: SequenceContext
    chunk_size: int
    layout: ChunkLayout
    boundaries: Tensor

    @classmethod
    def make(cls, ctx: SequenceContext, chunk_size: int) -> Tiles:
        """The chunks of a call."""
        phases = [start % chunk_size for start in ctx.starts]
        layout = ChunkLayout.make(ctx.lengths, chunk_size, phases)
        first = torch.tensor([start // chunk_size for start in ctx.starts])[:, None]
        boundaries = (first + torch.arange(max(layout.num_chunks, default=0))) * chunk_size
        return cls(ctx, chunk_size, layout, boundaries)

    def is_begun(self) -> Tensor:
        """(N, U) on the CPU, True for chunks whose first token is in this call."""
        starts = self._column(self.ctx.starts)
        return (self.boundaries >= starts) & (self.boundaries < starts + self._column(self.ctx.lengths))

    def places(self, positions: Tensor, ring: int) -> Tensor:
        """Places in the pool of positions (N, U, X) of each sequence; -1 where the pool does not hold one.

        Args:
            positions: on the CPU.
            ring: R, 0 without a past.
        """
        rows = len(self.ctx.lengths)
        starts, lengths = (self._column(x)[..., None] for x in (self.ctx.starts, self.ctx.lengths))
        past = torch.arange(rows)[:, None, None] * ring + ring
        own = rows * ring + lengths.cumsum(0) - lengths
        place = positions - starts + torch.where(positions < starts, past, own)
        is_held = (positions >= 0) & (positions >= starts - ring) & (positions < starts + lengths)
        return torch.where(is_held, place, -1)

    def of_tiles(self, x: Tensor) -> Tensor:
        """(N, U, ...) -> (K, ...), without the chunks that shorter sequences do not have."""
        counts = self.layout.num_chunks
        longest = max(counts, default=0)
        if all(count == longest for count in counts):
            return x.flatten(0, 1)
        kept = [torch.arange(row * longest, row * longest + count) for row, count in enumerate(counts)]
        return x.flatten(0, 1).index_select(0, torch.cat(kept).to(x.device))

    def cut(self, x: Tensor) -> Tensor:
        """Tokens (B, T, ...) in internal form -> (K, C, ...)."""
        return self.layout.to_chunks(x.flatten(0, 1))

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `cut`, in the batch form of `like` (B, T, ...)."""
        return self.layout.from_chunks(x).unflatten(0, like.shape[:2])

    def band(
        self, q: Tensor, key: Tensor, value: Tensor, ring: int, *, lag: int, window_size: int
    ) -> SlotStream:
        """The memory in which the query at position i sees i - lag - window_size < j <= i - lag.

        Args:
            q: (K, C, H, D).
            key, value: pools (P, G, D).
            ring: R of the pools.
        """
        last = self.chunk_size - 1 - lag
        offset = torch.arange(1 - lag - window_size, last + 1)  # against the first position of the chunk
        place = self.of_tiles(self.places(self.boundaries[..., None] + offset, ring)).to(q.device)
        first = (offset + lag).to(q.device).expand_as(place)
        return SlotStream(q, key, value, place, first, first + window_size - 1)

    def _column(self, values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)[:, None]


def pool(past: Tensor | None, new: Tensor) -> Tensor:
    """A pool (P, ...) from rings in order of time (N, R, ...) and the tokens of a call (B, T, ...)."""
    own = new.flatten(0, 1)
    return own if past is None else torch.cat([past.flatten(0, 1).to(own.dtype), own])
